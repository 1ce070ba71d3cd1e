//! Who may ask. Three things are kept out: other sites' pages in the user's browser (Origin, Sec-Fetch-Site), names
//! that were made to point here (Host: DNS rebinding), and, when the page is not on loopback, whoever has no token.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, COOKIE, HOST, LOCATION, ORIGIN, SET_COOKIE};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

/// Characters that a token may consist of, and its length.
const TOKEN_CHARACTERS: std::ops::RangeInclusive<usize> = 16..=128;

/// The rules of one address.
#[derive(Clone, Debug)]
pub struct Gate {
    at: SocketAddr,
    host_name: Option<String>,
    token: Option<String>,
}

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Host,
    Origin,
    Token,
}

impl Gate {
    /// The rules for a page at `at`. Beyond loopback a token is demanded: `token`, or a random one.
    pub fn new(at: SocketAddr, token: Option<String>) -> Result<Self, String> {
        if let Some(token) = &token {
            let plain = token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            if !plain || !TOKEN_CHARACTERS.contains(&token.len()) {
                return Err("a token is 16 to 128 letters, digits and -_.".into());
            }
        }
        let token = match token {
            None if !at.ip().is_loopback() => Some(random_token()?),
            other => other,
        };
        let name = this_machine();
        let host_name = (!at.ip().is_loopback() && !name.is_empty()).then_some(name);
        Ok(Self { at, host_name, token })
    }

    /// The address to give to a browser.
    pub fn url(&self) -> String {
        match &self.token {
            None => format!("http://{}/", self.at),
            Some(token) => {
                // An address that stands for all is none to go to.
                let host = match (self.at.ip().is_unspecified(), &self.host_name) {
                    (true, Some(name)) => format!("{name}:{}", self.at.port()),
                    _ => self.at.to_string(),
                };
                format!("http://{host}/?token={token}")
            }
        }
    }

    fn cookie(&self) -> String {
        // Cookies know no ports: two fleets of one host would overwrite each other's.
        format!("linux_on_gpu_{}", self.at.port())
    }

    fn check(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
        let host = text(headers, HOST.as_str()).ok_or(Refusal::Host)?;
        if !self.is_ours(host) {
            return Err(Refusal::Host);
        }
        // A VM's page is sandboxed and has no origin of its own; what it may reach is the VM, through the proxy.
        let guest = uri.path().starts_with("/vm/");
        if !guest {
            let ours = |origin: &str| {
                origin.strip_prefix("http://").or(origin.strip_prefix("https://")) == Some(host)
            };
            if headers.contains_key(ORIGIN) && !text(headers, ORIGIN.as_str()).is_some_and(ours) {
                return Err(Refusal::Origin);
            }
            // Browsers say where a request comes from. A link on another site may lead to the page itself.
            let site = text(headers, "sec-fetch-site").unwrap_or("none");
            let link = method == Method::GET
                && uri.path() == "/"
                && text(headers, "sec-fetch-mode") == Some("navigate")
                && text(headers, "sec-fetch-dest") == Some("document");
            if !matches!(site, "none" | "same-origin") && !link {
                return Err(Refusal::Origin);
            }
        }
        match &self.token {
            None => Ok(()),
            Some(token) if self.tokens(headers).any(|given| same(given, token)) => Ok(()),
            Some(token) => match ticketed(uri) {
                Some((vm, given)) if same(given, &ticket(token, vm)) => Ok(()),
                _ => Err(Refusal::Token),
            },
        }
    }

    /// Where to find a VM's page when a token is demanded. In its sandbox it has no cookie, so what it loads would be
    /// refused: the way to it has a ticket for this VM, and for nothing else.
    fn way_to_vm(&self, uri: &Uri) -> Option<String> {
        let token = self.token.as_ref()?;
        let (vm, path) = uri.path().strip_prefix("/vm/")?.split_once('/')?;
        let query = uri.query().map(|query| format!("?{query}")).unwrap_or_default();
        (!vm.contains('~')).then(|| format!("/vm/{vm}~{}/{path}{query}", ticket(token, vm)))
    }

    /// Whether a Host header names this server.
    fn is_ours(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => match rest.split_once(']') {
                Some((name, port)) if port.is_empty() || is_port(port) => name,
                _ => return false,
            },
            None => match host.split_once(':') {
                Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
                Some(_) => return false,
                None => host,
            },
        };
        if name.eq_ignore_ascii_case("localhost") {
            return true;
        }
        match name.parse::<IpAddr>() {
            // Nobody's name server has a say in what a number means.
            Ok(ip) => ip.is_loopback() || !self.at.ip().is_loopback(),
            Err(_) => self.host_name.as_ref().is_some_and(|ours| ours.eq_ignore_ascii_case(name)),
        }
    }

    fn tokens<'a>(&self, headers: &'a HeaderMap) -> impl Iterator<Item = &'a str> {
        let bearer = text(headers, AUTHORIZATION.as_str()).and_then(|value| value.strip_prefix("Bearer "));
        let name = self.cookie();
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        let ours = cookies.flat_map(|all| all.split(';')).filter_map(move |cookie| {
            let (key, value) = cookie.trim().split_once('=')?;
            (key == name).then_some(value)
        });
        ours.chain(bearer)
    }
}

/// VM and ticket of `/vm/N~TICKET/`.
fn ticketed(uri: &Uri) -> Option<(&str, &str)> {
    uri.path().strip_prefix("/vm/")?.split_once('/')?.0.split_once('~')
}

/// From the token, but it does not tell the token.
fn ticket(token: &str, vm: &str) -> String {
    hex::encode(&Sha256::digest(format!("page of VM {vm}, {token}"))[..16])
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()))
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// This machine's name, empty if it is unknown.
fn this_machine() -> String {
    #[cfg(unix)]
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    #[cfg(not(unix))]
    let name = std::env::var("COMPUTERNAME").unwrap_or_default();
    name.to_ascii_lowercase()
}

/// Compares without telling by its time how much is right.
fn same(given: &str, token: &str) -> bool {
    given.len() == token.len() && given.bytes().zip(token.bytes()).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

fn random_token() -> Result<String, String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| format!("no random numbers for a token: {error}"))?;
    Ok(hex::encode(bytes))
}

/// The middleware. A right `?token=` on the way to the page becomes a cookie, so that it is not in the address bar.
pub async fn guard(State(gate): State<Arc<Gate>>, request: Request, next: Next) -> Response {
    let checked = gate.check(request.method(), request.uri(), request.headers());
    match checked {
        Ok(()) => match gate.way_to_vm(request.uri()) {
            Some(way) => (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, way)]).into_response(),
            None => next.run(request).await,
        },
        Err(Refusal::Token) => match token_in_query(&gate, request.uri()) {
            Some(token) => {
                let cookie = format!("{}={token}; Path=/; HttpOnly; SameSite=Strict", gate.cookie());
                let mut response = (StatusCode::SEE_OTHER, [(LOCATION, "/")]).into_response();
                if let Ok(cookie) = HeaderValue::from_str(&cookie) {
                    response.headers_mut().insert(SET_COOKIE, cookie);
                }
                response
            }
            None => refuse(
                StatusCode::UNAUTHORIZED,
                "this fleet wants its token: open the address that it printed when it started, or send \
                 `Authorization: Bearer TOKEN`",
            ),
        },
        Err(Refusal::Host) => refuse(
            StatusCode::FORBIDDEN,
            "this name is not the fleet's: use its IP address, or localhost on the same machine",
        ),
        Err(Refusal::Origin) => refuse(StatusCode::FORBIDDEN, "other sites may not use this fleet's API"),
    }
}

fn token_in_query<'a>(gate: &Gate, uri: &'a Uri) -> Option<&'a str> {
    let query = uri.query().filter(|_| uri.path() == "/")?;
    let given = query.split('&').find_map(|pair| pair.strip_prefix("token="))?;
    gate.token.as_ref().is_some_and(|token| same(given, token)).then_some(given)
}

fn refuse(status: StatusCode, why: &str) -> Response {
    (status, format!("{why}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(gate: &Gate, request: &str, headers: &[(&'static str, &str)]) -> Result<(), Refusal> {
        let (method, uri) = request.split_once(' ').unwrap();
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        gate.check(&method.parse().unwrap(), &uri.parse().unwrap(), &map)
    }

    #[test]
    fn names_that_point_here_are_refused() {
        let gate = Gate::new("127.0.0.1:8080".parse().unwrap(), None).unwrap();
        for host in ["127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080", "127.0.0.1:9999"] {
            assert_eq!(check(&gate, "GET /api/fleet", &[("host", host)]), Ok(()), "{host}");
        }
        let bad = [
            "evil.example:8080",
            "192.0.2.1:8080",
            "127.0.0.1.evil.example",
            "localhost:8080@evil",
            "[::1",
            "",
        ];
        for host in bad {
            assert_eq!(check(&gate, "GET /", &[("host", host)]), Err(Refusal::Host), "{host}");
        }
        assert_eq!(check(&gate, "GET /", &[]), Err(Refusal::Host));
    }

    #[test]
    fn other_sites_are_refused() {
        let gate = Gate::new("127.0.0.1:8080".parse().unwrap(), None).unwrap();
        let host = ("host", "127.0.0.1:8080");
        let from = |request, origin| check(&gate, request, &[host, ("origin", origin)]);
        assert_eq!(from("GET /api/live", "http://127.0.0.1:8080"), Ok(()));
        for origin in ["http://evil.example", "null", "http://127.0.0.1:8081", "http://localhost:8080"] {
            assert_eq!(from("GET /api/live", origin), Err(Refusal::Origin), "{origin}");
            assert_eq!(from("POST /api/vms/0/reset", origin), Err(Refusal::Origin), "{origin}");
        }
        let site = ("sec-fetch-site", "cross-site");
        assert_eq!(check(&gate, "GET /api/fleet", &[host, site]), Err(Refusal::Origin));
        assert_eq!(check(&gate, "GET /", &[host, site]), Err(Refusal::Origin), "not in a frame");
        let link = [host, site, ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        assert_eq!(check(&gate, "GET /", &link), Ok(()));
        assert_eq!(check(&gate, "GET /api/fleet", &link), Err(Refusal::Origin));
        // A VM's own page may ask its VM.
        assert_eq!(from("POST /vm/3/form", "null"), Ok(()));
    }

    #[test]
    fn beyond_loopback_a_token_is_demanded() {
        let gate = Gate::new("0.0.0.0:80".parse().unwrap(), None).unwrap();
        let token = gate.token.clone().unwrap();
        let host = ("host", "192.0.2.7");
        assert_eq!(check(&gate, "GET /", &[host]), Err(Refusal::Token));
        assert_eq!(check(&gate, "GET /vm/0/", &[host]), Err(Refusal::Token));
        let bearer = format!("Bearer {token}");
        assert_eq!(check(&gate, "GET /", &[host, ("authorization", &bearer)]), Ok(()));
        let cookie = format!("a=b; linux_on_gpu_80={token}");
        assert_eq!(check(&gate, "GET /", &[host, ("cookie", &cookie)]), Ok(()));
        assert_eq!(check(&gate, "GET /", &[host, ("cookie", &cookie[..40])]), Err(Refusal::Token));
        assert_eq!(check(&gate, "GET /", &[("host", "evil.example")]), Err(Refusal::Host));
        assert!(gate.url().ends_with(&token));
        let uri: Uri = format!("/?x=1&token={token}").parse().unwrap();
        assert_eq!(token_in_query(&gate, &uri), Some(&token[..]));
        assert_eq!(token_in_query(&gate, &"/?token=".parse().unwrap()), None);
        let way = |path: &str| gate.way_to_vm(&path.parse().unwrap()).unwrap();
        let way = way("/vm/3/a?b");
        assert!(way.starts_with("/vm/3~") && way.ends_with("/a?b"), "{way}");
        assert_eq!(check(&gate, &format!("GET {way}"), &[host]), Ok(()));
        assert_eq!(gate.way_to_vm(&way.parse().unwrap()), None);
        let other = way.replace("/vm/3~", "/vm/4~");
        assert_eq!(check(&gate, &format!("GET {other}"), &[host]), Err(Refusal::Token));
        assert!(Gate::new("0.0.0.0:80".parse().unwrap(), Some("short".into())).is_err());
        let gate = Gate::new("127.0.0.1:80".parse().unwrap(), Some("0123456789abcdef".into())).unwrap();
        assert_eq!(check(&gate, "GET /", &[("host", "localhost")]), Err(Refusal::Token));
    }
}
