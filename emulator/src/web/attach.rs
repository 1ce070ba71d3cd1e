//! A VM's console, raw, for programs on this machine: after `GET /api/vms/N/terminal` with `Upgrade: console` on the
//! control socket, the connection is the console, both ways.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::error::{error, no_such_vm};
use super::{Hub, Seat};
use crate::console::hub::{Output, Subscription};

/// The protocol's name.
pub const PROTOCOL: &str = "console";
/// Input that does not find room in the VM is tried again so often.
const RETRY: Duration = Duration::from_millis(20);

pub fn router(hub: Arc<Hub>) -> Router {
    Router::new().route("/api/vms/{vm}/terminal", get(terminal)).with_state(hub)
}

async fn terminal(State(hub): State<Arc<Hub>>, Path(text): Path<String>, request: Request) -> Response {
    let Some(vm) = hub.vm(&text) else { return no_such_vm(&hub, &text) };
    if request.headers().get(UPGRADE).is_none_or(|what| what != PROTOCOL) {
        return error(StatusCode::UPGRADE_REQUIRED, format_args!("expected Upgrade: {PROTOCOL}"));
    }
    let Some(seat) = hub.seat() else {
        return error(
            StatusCode::SERVICE_UNAVAILABLE,
            "too many consoles of this fleet are open; close some",
        );
    };
    let upgrade = hyper::upgrade::on(request);
    tokio::spawn(async move {
        if let Ok(connection) = upgrade.await {
            // An error means that the client has gone.
            let _ = serve(&hub, vm, connection, seat).await;
        }
    });
    let headers =
        [(CONNECTION, "upgrade"), (UPGRADE, PROTOCOL)].map(|(k, v)| (k, HeaderValue::from_static(v)));
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn serve(hub: &Hub, vm: u32, connection: Upgraded, _seat: Seat) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(TokioIo::new(connection));
    let listener = hub.fleet.subscribe(vm);
    let typing = async {
        let mut bytes = [0; 1024];
        loop {
            let n = reader.read(&mut bytes).await?;
            if n == 0 {
                return Ok(());
            }
            // A guest that takes no input holds the client up, nobody else.
            let mut left = &bytes[..n];
            while !left.is_empty() && !hub.fleet.is_down(vm) {
                left = &left[hub.fleet.type_in(vm, left)..];
                if !left.is_empty() {
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    };
    tokio::select! {
        ended = print(hub, vm, &listener, &mut writer) => ended?,
        ended = typing => return ended,
    }
    writer.shutdown().await
}

async fn print(
    hub: &Hub,
    vm: u32,
    listener: &Subscription,
    writer: &mut (impl AsyncWriteExt + Unpin),
) -> io::Result<()> {
    writer.write_all(&listener.tail).await?;
    loop {
        match poll_fn(|context| listener.poll_receive(context)).await {
            Output::Bytes { bytes, lost } => {
                if lost > 0 {
                    let note = format!("\r\n[{lost} bytes of output skipped]\r\n");
                    writer.write_all(note.as_bytes()).await?;
                }
                writer.write_all(&bytes).await?;
                writer.flush().await?;
            }
            Output::Nothing => {}
            Output::Closed => {
                let reason = hub.fleet.status(vm).reason();
                return writer.write_all(format!("\r\n[VM {vm}: {reason}]\r\n").as_bytes()).await;
            }
        }
    }
}
