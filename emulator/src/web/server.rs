//! The thread that serves: one runtime, the router, and the tasks beside it.

use std::io;
use std::net::TcpListener;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use axum::Router;
use axum::http::header::{CACHE_CONTROL, HeaderName};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{any, get, post};
use tokio::sync::{oneshot, watch};

#[cfg(unix)]
use super::attach;
use super::error::error;
use super::guard::{Gate, guard};
use super::listener::Limited;
use super::pages::{self, Limits, Pages};
use super::survey::{History, Sample};
use super::{Facts, Hub, Network, StatusReport, api, assets, console, live, metrics, pcap, proxy, survey};
use crate::fleet::Fleet;

/// The page may load what it is made of and talk to its own server; nobody may frame it. The terminal sets styles.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; \
    img-src 'self' data:; font-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";

/// What is served.
pub struct Config {
    /// The fleet.
    pub fleet: Arc<Fleet>,
    /// What does not change.
    pub facts: Facts,
    /// The status document.
    pub status: StatusReport,
    /// The bridge, if there is one.
    pub net: Option<Network>,
}

/// The server; dropping it ends it and its connections.
pub struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on the control socket `path`, which only this user can open, and at `page`, by the gate's rules. Systems
    /// without Unix sockets have the page alone.
    pub fn start(path: &Path, page: Option<(TcpListener, Gate)>, config: Config) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let inside = runtime.enter();
        let socket = control::bind(path)?;
        let page = match page {
            Some((listener, gate)) => Some((tokio::net::TcpListener::from_std(listener)?, gate)),
            None => None,
        };
        drop(inside);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("web".into()).spawn(move || {
            runtime.block_on(async move {
                let hub = start(config);
                let serve = async |page: Option<(tokio::net::TcpListener, Gate)>| match page {
                    Some((listener, gate)) => {
                        let router = router(hub.clone());
                        let guarded = router.layer(from_fn_with_state(Arc::new(gate), guard));
                        axum::serve(Limited::new(listener), guarded).await
                    }
                    None => std::future::pending().await,
                };
                tokio::select! {
                    ended = serve(page) => complain("the page", ended),
                    ended = control::serve(socket, &hub) => complain("the control socket", ended),
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic was printed; there is nothing to add.
            let _ = thread.join();
        }
    }
}

/// The control socket.
#[cfg(unix)]
mod control {
    use super::*;

    pub fn bind(path: &Path) -> io::Result<tokio::net::UnixListener> {
        let socket = std::os::unix::net::UnixListener::bind(path)?;
        socket.set_nonblocking(true)?;
        tokio::net::UnixListener::from_std(socket)
    }

    pub async fn serve(socket: tokio::net::UnixListener, hub: &Arc<Hub>) -> io::Result<()> {
        axum::serve(socket, router(hub.clone()).merge(attach::router(hub.clone()))).await
    }
}

#[cfg(not(unix))]
mod control {
    use super::*;

    pub fn bind(_: &Path) -> io::Result<()> {
        Ok(())
    }

    pub async fn serve(_: (), _: &Arc<Hub>) -> io::Result<()> {
        std::future::pending().await
    }
}

fn complain(what: &str, ended: io::Result<()>) {
    if let Err(error) = ended {
        tracing::warn!("{what} is served no more: {error}");
    }
}

/// Starts the tasks beside the router.
fn start(config: Config) -> Arc<Hub> {
    let (sender, samples) = watch::channel(Arc::<Sample>::default());
    let pages =
        config.net.as_ref().map(|net| Arc::new(Pages::new(net.reach.clone(), Limits::of(&config.fleet))));
    let hub = Arc::new(Hub {
        fleet: config.fleet,
        facts: config.facts,
        status: config.status,
        pages: pages.clone(),
        watch: config.net.map(|net| net.watch),
        samples,
        history: Mutex::new(History::default()),
        sockets: AtomicUsize::new(0),
        clients: AtomicU64::new(0),
        watched: Mutex::default(),
    });
    survey::start(hub.clone(), sender);
    if let Some(pages) = pages {
        tokio::spawn(pages::fetch_all(hub.clone(), pages));
    }
    hub
}

fn router(hub: Arc<Hub>) -> Router {
    let ours = Router::new()
        .route("/", get(assets::index))
        .route("/assets/{*path}", get(assets::asset))
        .route("/api/fleet", get(api::fleet))
        .route("/api/status", get(api::status))
        .route("/api/vms", get(api::vms))
        .route("/api/vms/{vm}", get(api::vm))
        .route("/api/vms/{vms}/{action}", post(api::act))
        .route("/api/vms/{vm}/console", get(console::console))
        .route("/api/vms/{vm}/link", get(api::link))
        .route("/api/vms/{vm}/pcap", get(pcap::one))
        .route("/api/pcap", get(pcap::all))
        .route("/api/live", get(live::live))
        .route("/metrics", get(metrics::fleet))
        .route("/metrics/vms", get(metrics::vms))
        .fallback(async || {
            error(StatusCode::NOT_FOUND, "there is nothing here; docs/web.md lists what there is")
        })
        .layer(from_fn(async |request, next: axum::middleware::Next| {
            let mut response: Response = next.run(request).await;
            let headers = response.headers_mut();
            for (name, value) in [
                ("content-security-policy", POLICY),
                ("x-content-type-options", "nosniff"),
                ("referrer-policy", "no-referrer"),
                ("cross-origin-opener-policy", "same-origin"),
                ("cross-origin-resource-policy", "same-origin"),
            ] {
                headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
            }
            headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
            response
        }));
    let guests =
        Router::new().route("/vm/{vm}/", any(proxy::root)).route("/vm/{vm}/{*path}", any(proxy::path));
    ours.merge(guests).with_state(hub)
}
