//! The `tun` transport (Linux, CAP_NET_ADMIN): the host's own packets, through a TUN device.
//!
//! All of 10.77.0.0/16 is routed to the device. So is TCP to 127.0.0.1, port base + n, by a rule that is looked at before
//! the table of local addresses. The host's stack never sees those packets as its own, so it never answers them with a
//! reset; docs/network.md tells more.

mod device;
mod netlink;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use std::os::fd::AsRawFd;

use super::Links;
use super::bridge::{Bridge, Error, io_error};
use super::capture::{Capture, Wire};
use super::lan::Watch;
use super::policy::Policy;
use super::ports;
use super::rewrite::Ports;

pub use device::{DEVICE, TunError};

const DEVICE_TOKEN: Token = Token(0);
const WAKER: Token = Token(1);

/// The bridge: bound, then started, then stopped (at the latest when dropped).
pub struct TunBridge {
    ports: Ports,
    watch: Watch,
    policy: Policy,
    /// Ours as long as the bridge stands, so that no other program gets them.
    _reserved: Vec<OwnedFd>,
    device: Option<device::Device>,
    running: Option<(Capture, device::Routes)>,
}

impl TunBridge {
    /// Takes ports, device and routes, or nothing.
    pub fn bind(ports: Ports, policy: Policy) -> Result<Self, Error> {
        ports::check(&ports)?;
        ports::allow_files(ports.vms, 0)?;
        let reserved = ports::reserve(&ports)?;
        let device = device::Device::open(&ports)?;
        Ok(Self {
            ports,
            watch: Watch::new(ports.vms),
            policy,
            _reserved: reserved,
            device: Some(device),
            running: None,
        })
    }
}

impl Bridge for TunBridge {
    fn start(&mut self, links: Arc<dyn Links>) -> Result<(), Error> {
        let device::Device { file, routes } = self.device.take().ok_or(Error::Started)?;
        let wire = TunWire::new(file).map_err(io_error("watch its device"))?;
        let wire = Box::new(wire);
        let capture = Capture::start("net-tun", wire, &self.policy, self.ports, links, self.watch.clone())?;
        self.running = Some((capture, routes));
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.device = None;
        let Some((capture, routes)) = self.running.take() else { return Ok(()) };
        // The rules first: as long as they stand, packets need the device.
        drop(routes);
        let stopped = capture.stop();
        self.watch.tap.close();
        stopped
    }

    fn has_failed(&self) -> bool {
        self.running.as_ref().is_some_and(|(capture, _)| !capture.is_running())
    }

    fn watch(&self) -> &Watch {
        &self.watch
    }

    fn ports(&self) -> Ports {
        self.ports
    }
}

impl Drop for TunBridge {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

struct TunWire {
    file: OwnedFd,
    poll: Poll,
    events: Events,
    waker: Arc<Waker>,
    readable: bool,
}

impl TunWire {
    fn new(file: OwnedFd) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.registry().register(&mut SourceFd(&file.as_raw_fd()), DEVICE_TOKEN, Interest::READABLE)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        Ok(Self { file, poll, events: Events::with_capacity(4), waker, readable: true })
    }
}

impl Wire for TunWire {
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        self.readable |= self.events.iter().any(|event| event.token() == DEVICE_TOKEN);
        Ok(())
    }

    fn capture(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        if !self.readable {
            return Ok(None);
        }
        match rustix::io::read(&self.file, packet) {
            Ok(len) => Ok(Some(len)),
            Err(rustix::io::Errno::AGAIN) => {
                self.readable = false;
                Ok(None)
            }
            Err(rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn inject(&mut self, packet: &[u8]) -> io::Result<()> {
        match rustix::io::write(&self.file, packet) {
            // The device is down: somebody has set it so.
            Err(rustix::io::Errno::IO) => Err(io::ErrorKind::WouldBlock.into()),
            result => result.map(drop).map_err(io::Error::from),
        }
    }

    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        let waker = self.waker.clone();
        Arc::new(move || {
            // It fails only if the poll is gone, and then nobody waits.
            let _ = waker.wake();
        })
    }
}
