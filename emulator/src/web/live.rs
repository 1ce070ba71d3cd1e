//! What changed, once a second, over a WebSocket.
//!
//! First a text message `{"hello": ..., "history": [...]}`, then each second `{"totals": ...}` and one binary message
//! with the rows that changed ([`super::survey::Row::write`]). The page answers with `{"watch": [vm, ...]}`, the VMs
//! whose console lines it shows, and gets `{"lines": [[vm, "text"], ...]}` for those that changed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde_json::json;

use super::survey::{ROW_BYTES, Row, Sample};
use super::{Hub, Seat};
use crate::sync::lock;

/// VMs whose lines a page may ask for.
const WATCHED: usize = 2048;
/// Characters of a line.
const LINE: usize = 160;

pub async fn live(State(hub): State<Arc<Hub>>, upgrade: WebSocketUpgrade) -> Response {
    let Some(seat) = hub.seat() else {
        return super::error::error(StatusCode::SERVICE_UNAVAILABLE, "too many pages are open");
    };
    upgrade.max_message_size(64 * 1024).on_upgrade(move |socket| async move {
        let id = hub.clients.fetch_add(1, Relaxed);
        lock(&hub.watched).insert(id, Vec::new());
        let mut client = Client { hub: &hub, id, rows: Vec::new(), lines: HashMap::new() };
        // An error means that the page has gone.
        let _ = client.serve(socket, seat).await;
    })
}

#[derive(Deserialize)]
struct Wish {
    watch: Vec<u32>,
}

/// One open page.
struct Client<'a> {
    hub: &'a Arc<Hub>,
    id: u64,
    /// What it has been told.
    rows: Vec<Row>,
    /// The VMs whose lines it shows, and how much they had printed when it was told; none: nothing yet.
    lines: HashMap<u32, Option<u64>>,
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        lock(&self.hub.watched).remove(&self.id);
    }
}

impl Client<'_> {
    async fn serve(&mut self, mut socket: WebSocket, _seat: Seat) -> Result<(), axum::Error> {
        let mut samples = self.hub.samples.clone();
        let history = lock(&self.hub.history).all();
        let hello = json!({ "hello": self.hub.facts, "history": history });
        socket.send(Message::text(hello.to_string())).await?;
        samples.mark_changed();
        loop {
            tokio::select! {
                changed = samples.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let sample = samples.borrow_and_update().clone();
                    if !sample.rows.is_empty() {
                        self.tell(&mut socket, &sample).await?;
                    }
                }
                message = socket.recv() => match message {
                    Some(Ok(Message::Text(text))) => {
                        // A page of another version may say what this one does not know.
                        if let Ok(wish) = serde_json::from_str::<Wish>(&text) {
                            self.watch(wish.watch);
                            self.tell_lines(&mut socket).await?;
                        }
                    }
                    Some(Ok(Message::Close(_))) | None => return Ok(()),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error),
                }
            }
        }
    }

    fn watch(&mut self, mut vms: Vec<u32>) {
        vms.retain(|vm| *vm < self.hub.facts.vms);
        vms.truncate(WATCHED);
        self.lines = vms.iter().map(|vm| (*vm, self.lines.get(vm).copied().flatten())).collect();
        lock(&self.hub.watched).insert(self.id, vms);
    }

    async fn tell(&mut self, socket: &mut WebSocket, sample: &Sample) -> Result<(), axum::Error> {
        let mut bytes = Vec::new();
        let first = self.rows.is_empty();
        for (vm, row) in sample.rows.iter().enumerate() {
            if first || self.rows[vm] != *row {
                row.write(vm as u32, &mut bytes);
            }
        }
        debug_assert_eq!(bytes.len() % ROW_BYTES, 0);
        self.rows.clone_from(&sample.rows);
        if !bytes.is_empty() {
            socket.send(Message::binary(bytes)).await?;
        }
        socket.send(Message::text(json!({ "totals": sample.totals }).to_string())).await?;
        self.tell_lines(socket).await
    }

    async fn tell_lines(&mut self, socket: &mut WebSocket) -> Result<(), axum::Error> {
        let mut news: Vec<(u32, String)> = Vec::new();
        for (vm, told) in &mut self.lines {
            let printed = self.hub.fleet.printed(*vm);
            if *told != Some(printed) {
                *told = Some(printed);
                news.push((*vm, last_line(self.hub, *vm)));
            }
        }
        if news.is_empty() {
            return Ok(());
        }
        socket.send(Message::text(json!({ "lines": news }).to_string())).await
    }
}

/// The last line that says something: a prompt alone does not.
pub(super) fn last_line(hub: &Hub, vm: u32) -> String {
    let lines = hub.fleet.last_lines(vm);
    let line = lines.iter().rev().find(|line| line.contains(char::is_alphanumeric));
    line.map(|line| line.chars().take(LINE).collect()).unwrap_or_default()
}
