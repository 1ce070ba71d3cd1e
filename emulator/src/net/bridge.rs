//! What all transports have in common from outside: bound, then started, then stopped.

use std::io;
use std::sync::Arc;

use super::Links;
use super::lan::Watch;
use super::ports::PortsError;
use super::reach::Reach;
use super::rewrite::Ports;

/// A bridge between a fleet's links and the host.
pub trait Bridge: Send {
    /// Starts to serve, in a thread of its own.
    fn start(&mut self, links: Arc<dyn Links>) -> Result<(), Error>;
    /// Ends all connections and gives back what was taken of the host.
    fn stop(&mut self) -> Result<(), Error>;
    /// Whether it has ended by itself; [`Bridge::stop`] then tells why.
    fn has_failed(&self) -> bool;
    /// What passes, while it runs and afterwards.
    fn watch(&self) -> &Watch;
    /// The host ports that it serves.
    fn ports(&self) -> Ports;
    /// How this program reaches the VMs.
    fn reach(&self) -> Reach {
        Reach::by_ports(self.ports())
    }
}

/// Why the bridge could not be started, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host ports could not be had.
    #[error(transparent)]
    Ports(#[from] PortsError),
    /// The TUN device could not be had.
    #[cfg(target_os = "linux")]
    #[error(transparent)]
    Tun(#[from] super::tun::TunError),
    /// WinDivert could not be had.
    #[cfg(windows)]
    #[error(transparent)]
    WinDivert(#[from] super::windivert::WinDivertError),
    /// The links belong to another number of VMs than the ports.
    #[error("the bridge has ports for {ports} VMs, but the fleet has {vms}")]
    Vms {
        /// VMs that have ports.
        ports: u32,
        /// VMs in the fleet.
        vms: u32,
    },
    /// Started twice.
    #[error("the bridge was started already")]
    Started,
    /// The system refused something that the bridge can't do without.
    #[error("the bridge can't {what}")]
    Io {
        /// What it was about to do.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The bridge's thread failed: a mistake in the program.
    #[error("the bridge's thread failed")]
    Failed,
}

pub(crate) fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}
