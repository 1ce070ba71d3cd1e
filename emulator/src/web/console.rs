//! A VM's console over a WebSocket: binary messages both ways, as many listeners as like.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;

use super::error::error;
use super::{Hub, Seat};
use crate::console::hub::Output;

/// Input that does not find room in the VM is tried again so often.
const RETRY: Duration = Duration::from_millis(20);
/// Code of the close message when the VM is down: the page shows its reason.
const DOWN: u16 = 4000;

pub async fn console(
    State(hub): State<Arc<Hub>>,
    Path(vm): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let Some(vm) = hub.vm(&vm) else {
        return error(StatusCode::NOT_FOUND, format_args!("there is no VM {vm}"));
    };
    let Some(seat) = hub.seat() else {
        return error(StatusCode::SERVICE_UNAVAILABLE, "too many consoles are open");
    };
    upgrade.max_message_size(64 * 1024).on_upgrade(move |socket| async move {
        // An error means that the page has gone.
        let _ = attach(&hub, vm, socket, seat).await;
    })
}

async fn attach(hub: &Hub, vm: u32, mut socket: WebSocket, _seat: Seat) -> Result<(), axum::Error> {
    let listener = hub.fleet.subscribe(vm);
    if !listener.tail.is_empty() {
        socket.send(Message::binary(listener.tail.clone())).await?;
    }
    // What was typed and did not find room yet. While there is some, no more is read: the page's sending waits.
    let mut typed: Vec<u8> = Vec::new();
    loop {
        tokio::select! {
            output = poll_fn(|context| listener.poll_receive(context)) => match output {
                Output::Bytes { bytes, lost } => {
                    if lost > 0 {
                        let note = format!("\r\n[{lost} bytes of output skipped]\r\n");
                        socket.send(Message::binary(note)).await?;
                    }
                    socket.send(Message::binary(bytes)).await?;
                }
                Output::Nothing => {}
                Output::Closed => {
                    let reason = hub.fleet.status(vm).reason();
                    // A close message has room for 123 bytes.
                    let reason: String = reason.chars().filter(char::is_ascii).take(120).collect();
                    let frame = CloseFrame { code: DOWN, reason: reason.into() };
                    return socket.send(Message::Close(Some(frame))).await;
                }
            },
            message = socket.recv(), if typed.is_empty() => match message {
                Some(Ok(Message::Binary(bytes))) => typed.extend(bytes),
                Some(Ok(Message::Text(text))) => typed.extend(text.as_bytes()),
                Some(Ok(Message::Close(_))) | None => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
            },
            () = tokio::time::sleep(RETRY), if !typed.is_empty() => {}
        }
        if !typed.is_empty() {
            let taken = hub.fleet.type_in(vm, &typed);
            typed.drain(..taken);
        }
    }
}
