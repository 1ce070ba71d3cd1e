//! A VM's own page under `/vm/N/`, through the bridge.
//!
//! What the guest sends is hostile. It is shown in a sandbox: the page has an origin of its own, so it can't read or
//! use ours, and may load from nowhere but its VM. Headers that act on our whole origin are dropped, and ours (cookie,
//! token) are not told to the guest.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::header::{self, HOST, HeaderName, HeaderValue, LOCATION};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use super::Hub;
use crate::net::address::ip_of;
use crate::net::reach::TaskStream;

/// For connecting and for the head of the answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Headers that go to the guest. Everything else is the browser's own matter.
const TO_GUEST: [HeaderName; 12] = [
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::ACCEPT_LANGUAGE,
    header::CACHE_CONTROL,
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::RANGE,
    header::USER_AGENT,
];

/// Headers that come from the guest.
const FROM_GUEST: [HeaderName; 12] = [
    header::ACCEPT_RANGES,
    header::ALLOW,
    header::CONTENT_DISPOSITION,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::DATE,
    header::ETAG,
    header::LAST_MODIFIED,
    header::RETRY_AFTER,
];

pub async fn root(State(hub): State<Arc<Hub>>, Path(vm): Path<String>, request: Request) -> Response {
    pass(&hub, &vm, request).await
}

pub async fn path(
    State(hub): State<Arc<Hub>>,
    Path((vm, _)): Path<(String, String)>,
    request: Request,
) -> Response {
    pass(&hub, &vm, request).await
}

/// Whatever comes of it, an error as well, is fenced.
async fn pass(hub: &Hub, text: &str, request: Request) -> Response {
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned();
    let mut response = fetch(hub, text, request).await;
    fence(response.headers_mut(), &host, text);
    response
}

/// The VM of `N` or `N~TICKET`; the guard has looked at the ticket.
fn number(hub: &Hub, text: &str) -> Option<u32> {
    hub.vm(text.split_once('~').map_or(text, |(vm, _)| vm))
}

async fn fetch(hub: &Hub, text: &str, request: Request) -> Response {
    let Some(vm) = number(hub, text) else {
        return note(StatusCode::NOT_FOUND, &format!("There is no VM {text}."));
    };
    let Some(pages) = &hub.pages else {
        return note(StatusCode::NOT_FOUND, "No bridge leads to the VMs: the fleet runs with --net off.");
    };
    if hub.fleet.is_down(vm) {
        return note(StatusCode::BAD_GATEWAY, &format!("VM {vm} is down: {}", hub.fleet.status(vm).reason()));
    }
    let prefix = format!("/vm/{text}");
    // Its name, in the request and in redirections.
    let host = match (pages.reach().port_of(vm), ip_of(vm)) {
        (Some(port), _) => format!("127.0.0.1:{port}"),
        (None, Ok(address)) => address.to_string(),
        (None, Err(_)) => return note(StatusCode::NOT_FOUND, &format!("VM {vm} has no address.")),
    };
    let asked = timeout(PATIENCE, async {
        ask(pages.reach().connect_task(vm).await?, &host, &prefix, request).await
    });
    let asked = asked.await;
    match asked {
        Ok(Ok(response)) => response,
        Ok(Err(why)) => note(StatusCode::BAD_GATEWAY, &format!("VM {vm} gave no answer: {why}")),
        Err(_) => note(StatusCode::GATEWAY_TIMEOUT, &format!("VM {vm} gave no answer in time.")),
    }
}

async fn ask(
    stream: TaskStream,
    host: &str,
    prefix: &str,
    request: Request,
) -> Result<Response, Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the answer; the answer's body tells errors.
    tokio::spawn(async move { drop(connection.await) });
    let (head, body) = request.into_parts();
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    let mut ours = hyper::Request::new(body);
    *ours.method_mut() = head.method;
    *ours.uri_mut() = target.strip_prefix(prefix).unwrap_or("/").parse::<Uri>()?;
    let headers = ours.headers_mut();
    keep(&head.headers, headers, &TO_GUEST);
    headers.insert(HOST, HeaderValue::from_str(host)?);
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    let (head, body) = sender.send_request(ours).await?.into_parts();
    let mut response = Response::new(Body::new(body));
    *response.status_mut() = head.status;
    keep(&head.headers, response.headers_mut(), &FROM_GUEST);
    let location = head.headers.get(LOCATION).and_then(|to| to.to_str().ok());
    if let Some(to) = location.and_then(|to| moved(to, host, prefix)) {
        response.headers_mut().insert(LOCATION, HeaderValue::from_str(&to)?);
    }
    Ok(response)
}

fn keep(from: &HeaderMap, to: &mut HeaderMap, names: &[HeaderName]) {
    for name in names {
        for value in from.get_all(name) {
            to.append(name.clone(), value.clone());
        }
    }
}

/// Where a redirection of the guest leads here. Only its own pages are ours to lead to.
fn moved(to: &str, address: &str, prefix: &str) -> Option<String> {
    let own = to.strip_prefix("http://").and_then(|rest| rest.strip_prefix(address)).unwrap_or(to);
    if own.starts_with('/') && !own.starts_with("//") {
        return Some(format!("{prefix}{own}"));
    }
    let relative = !own.is_empty() && !own.contains([':', '\\']) && !own.starts_with('/');
    relative.then(|| own.to_owned())
}

/// The sandbox around everything that is served under `/vm/N/`.
fn fence(headers: &mut HeaderMap, host: &str, vm: &str) {
    // What is no word of a policy can't be a VM either.
    let vm = if vm.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'~') { vm } else { "none" };
    let own = format!("{host}/vm/{vm}/");
    let policy = format!(
        "sandbox allow-scripts allow-forms; default-src {own} 'unsafe-inline' 'unsafe-eval' data: blob:; \
         form-action {own}; base-uri {own}; frame-ancestors 'self'"
    );
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
}

fn note(status: StatusCode, why: &str) -> Response {
    (status, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], format!("{why}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections_stay_with_the_vm() {
        let to = |to| moved(to, "127.0.0.1:4003", "/vm/3");
        assert_eq!(to("/a/b").as_deref(), Some("/vm/3/a/b"));
        assert_eq!(to("http://127.0.0.1:4003/a").as_deref(), Some("/vm/3/a"));
        assert_eq!(to("next.html").as_deref(), Some("next.html"));
        for bad in ["http://evil.example/", "//evil.example/", "javascript:alert(1)", "", "\\\\evil"] {
            assert_eq!(to(bad), None, "{bad}");
        }
    }
}
