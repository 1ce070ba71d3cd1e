//! The page's files, embedded.

use axum::extract::Path;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use super::error::error;

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../web/", $name)))),*]
    };
}

/// The folder emulator/web.
const FILES: &[(&str, &[u8])] = files![
    "index.html",
    "style.css",
    "icon.svg",
    "main.js",
    "link.js",
    "fleet.js",
    "grid.js",
    "plots.js",
    "search.js",
    "detail.js",
    "terminal.js",
    "format.js",
];

/// The terminal, if it was there when the emulator was built: see emulator/web/xterm.txt.
const XTERM: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/xterm.rs"));

/// Whether this build has the terminal.
pub const HAS_TERMINAL: bool = !XTERM.is_empty();

pub async fn index(headers: HeaderMap) -> Response {
    serve("index.html", &headers)
}

pub async fn asset(Path(path): Path<String>, headers: HeaderMap) -> Response {
    serve(&path, &headers)
}

fn serve(name: &str, headers: &HeaderMap) -> Response {
    let Some((_, bytes)) = FILES.iter().chain(XTERM).find(|(known, _)| *known == name) else {
        return error(StatusCode::NOT_FOUND, format_args!("there is no file {name}"));
    };
    let kind = match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("js" | "mjs") => "text/javascript; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "text/plain; charset=utf-8",
    };
    // A new build at the same address must not meet old files.
    let tag = format!("\"{}\"", hex::encode(&Sha256::digest(bytes)[..8]));
    let common = [(ETAG, tag.clone()), (CACHE_CONTROL, "no-cache".into()), (CONTENT_TYPE, kind.into())];
    if headers.get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return (StatusCode::NOT_MODIFIED, common).into_response();
    }
    (common, *bytes).into_response()
}
