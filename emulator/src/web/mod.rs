//! The page that shows every VM, and the JSON API and metrics behind it. docs/web.md describes them.
//!
//! | module | what |
//! |---|---|
//! | [`bind`] | which address, and whether it can be had |
//! | `listener` | so many connections at once |
//! | [`guard`] | who may ask: Host, Origin, token |
//! | [`survey`] | looks at all VMs once a second |
//! | [`pages`] | asks VMs for their own page, for their uptime |
//! | `live` | what changed, to the pages that are open |
//! | `api`, `metrics` | JSON, Prometheus |
//! | `console` | a VM's console over a WebSocket |
//! | `attach` | the same, raw, for `cargo xtask console`, on the control socket |
//! | `pcap` | what passes on a VM's link, as a download |
//! | `proxy` | a VM's own page, sandboxed |
//! | `assets` | the page's files, embedded |
//!
//! All of it is one thread with a runtime of its own. It reads what the fleet's workers leave behind, and takes locks
//! only for as long as copying a few words.

mod api;
mod assets;
#[cfg(unix)]
mod attach;
pub mod bind;
mod console;
mod error;
pub mod guard;
mod listener;
mod live;
mod metrics;
pub mod pages;
mod pcap;
mod proxy;
mod server;
pub mod survey;

pub use assets::HAS_TERMINAL;
pub use server::{Config, Server};

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use serde::Serialize;
use tokio::sync::watch;

use crate::fleet::Fleet;
use crate::net::lan::Watch;
use crate::net::reach::Reach;
use crate::sync::lock;
use pages::Pages;
use survey::{History, Sample};

/// Answers with the document of `emulator status`, or with the counters of one VM's link.
pub type StatusReport = Box<dyn Fn(Option<u32>) -> String + Send + Sync>;

/// The bridge, as the page sees it.
#[derive(Clone)]
pub struct Network {
    /// Where the VMs' web servers are reached.
    pub reach: Reach,
    /// What passes.
    pub watch: Watch,
}

/// WebSockets open at once, consoles included.
const SOCKETS: usize = 256;

/// What does not change while the fleet runs.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// Tells this fleet from one that ran at the same address before.
    pub fleet: String,
    /// The emulator's version.
    pub version: &'static str,
    /// VMs.
    pub vms: u32,
    /// `cpu` or `cuda`.
    pub backend: &'static str,
    /// The engine's name.
    pub engine: String,
    /// RAM of each VM in bytes.
    pub ram_bytes: u64,
    /// The image's hash.
    pub image: String,
    /// VM 0's port on the host; null without a bridge.
    pub port_base: Option<u16>,
    /// Whether this build has the terminal.
    pub terminal: bool,
}

/// What all handlers share.
struct Hub {
    fleet: Arc<Fleet>,
    facts: Facts,
    status: StatusReport,
    pages: Option<Arc<Pages>>,
    watch: Option<Watch>,
    samples: watch::Receiver<Arc<Sample>>,
    history: Mutex<History>,
    sockets: AtomicUsize,
    clients: AtomicU64,
    /// VMs that open pages show in detail, by page.
    watched: Mutex<BTreeMap<u64, Vec<u32>>>,
}

impl Hub {
    /// A place for one more WebSocket; it is given back when dropped.
    fn seat(self: &Arc<Self>) -> Option<Seat> {
        let taken = self.sockets.fetch_add(1, SeqCst);
        let seat = Seat(self.clone());
        (taken < SOCKETS).then_some(seat)
    }

    /// Whether somebody looks.
    fn is_watched(&self) -> bool {
        !lock(&self.watched).is_empty()
    }

    /// The number of the VM, if there is one.
    fn vm(&self, text: &str) -> Option<u32> {
        text.parse().ok().filter(|vm| *vm < self.facts.vms)
    }
}

/// See [`Hub::seat`].
struct Seat(Arc<Hub>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.sockets.fetch_sub(1, SeqCst);
    }
}
