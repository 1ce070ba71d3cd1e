//! What passes on a VM's link, or on all of them, as a pcapng file that grows while it is downloaded.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use tokio::sync::mpsc;

use super::error::{error, no_such_vm};
use super::{Hub, Seat};
use crate::net::tap::PcapStream;

/// How long a packet may wait to be sent, and how soon the end of a download is seen.
const PAUSE: Duration = Duration::from_millis(100);
/// Pieces that wait for a slow client. Then the tap loses packets, and the file says how many.
const PIECES: usize = 4;

/// `GET /api/vms/3/pcap?seconds=10`
pub async fn one(State(hub): State<Arc<Hub>>, Path(text): Path<String>, query: RawQuery) -> Response {
    match hub.vm(&text) {
        Some(vm) => capture(&hub, Some(vm), query),
        None => no_such_vm(&hub, &text),
    }
}

/// `GET /api/pcap?seconds=10`
pub async fn all(State(hub): State<Arc<Hub>>, query: RawQuery) -> Response {
    capture(&hub, None, query)
}

fn capture(hub: &Arc<Hub>, vm: Option<u32>, RawQuery(query): RawQuery) -> Response {
    let seconds = match query.as_deref().map(|query| query.strip_prefix("seconds=").map(str::parse::<u32>)) {
        None => None,
        Some(Some(Ok(seconds))) => Some(seconds),
        Some(_) => return error(StatusCode::BAD_REQUEST, "expected seconds=NUMBER, or nothing"),
    };
    let Some(watch) = &hub.watch else {
        return error(StatusCode::NOT_FOUND, "there are no packets: the fleet runs with --net off");
    };
    let Some(seat) = hub.seat() else {
        return error(StatusCode::SERVICE_UNAVAILABLE, "too many consoles and captures are open");
    };
    let stream = watch.tap.stream(vm);
    let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    let (sender, receiver) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || send(stream, end, &sender, seat));
    let name = vm.map_or("fleet.pcapng".to_owned(), |vm| format!("vm-{vm}.pcapng"));
    let headers = [
        (CONTENT_TYPE, "application/x-pcapng".to_owned()),
        (CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
    ];
    (headers, Body::new(Pieces(receiver))).into_response()
}

/// Until its time is over, the client has gone, or the bridge has ended.
fn send(mut stream: PcapStream, end: Option<Instant>, pieces: &mpsc::Sender<Bytes>, _seat: Seat) {
    // The file's head comes first, whatever the time.
    while let Some(bytes) = stream.read(PAUSE) {
        if !bytes.is_empty() && pieces.blocking_send(bytes.into()).is_err() {
            return;
        }
        if pieces.is_closed() || end.is_some_and(|end| Instant::now() >= end) {
            break;
        }
    }
    // Fails if the client has gone.
    let _ = pieces.blocking_send(stream.finish().into());
}

/// A body that comes piece by piece.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}
