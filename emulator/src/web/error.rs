//! Errors of the API, which say in JSON what is wrong.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::Hub;

/// An error of the API.
pub(super) fn error(status: StatusCode, why: impl std::fmt::Display) -> Response {
    let body = serde_json::json!({ "error": why.to_string() }).to_string() + "\n";
    (status, [("content-type", "application/json")], body).into_response()
}

/// There is no such VM; `text` is what was asked for.
pub(super) fn no_such_vm(hub: &Hub, text: &str) -> Response {
    let last = hub.facts.vms.saturating_sub(1);
    error(StatusCode::NOT_FOUND, format_args!("there is no VM {text}: they are numbered from 0 to {last}"))
}
