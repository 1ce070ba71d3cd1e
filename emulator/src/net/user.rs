//! The `user` transport: no privileges, only host sockets on loopback.
//!
//! One listener a VM on 127.0.0.1, or as many as the limit of open files allows; each accepted connection becomes a TCP
//! connection from the LAN's host side to the VM, made by our own TCP ([`stack`]). One thread serves them all and sleeps
//! when nothing happens.

mod accept;
mod connection;
mod event_loop;
mod services;
mod stack;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use mio::net::TcpListener;
use mio::{Poll, Waker};

use super::Links;
pub use super::bridge::Error;
use super::bridge::{Bridge, io_error};
use super::counters::Counters;
use super::lan::{Lan, Watch};
use super::policy::Policy;
use super::ports;
#[cfg(unix)]
use super::reach::{Door, Reach};
use super::rewrite::Ports;
use event_loop::{Entrances, EventLoop, WAKER};

/// What the bridge serves.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Host port of VM 0, number of VMs, and the port in the VMs.
    pub ports: Ports,
    /// Limits; the defaults suit a fleet of web servers.
    pub limits: Limits,
}

impl Config {
    /// VM n's port 80 on 127.0.0.1:`port_base` + n.
    pub fn new(port_base: u16, vms: u32) -> Self {
        Self { ports: Ports { base: port_base, vms, guest: 80 }, limits: Limits::default() }
    }
}

/// How long and how much the bridge bears. All times are the host's.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From a client's connect until its VM has answered; a VM that is still booting is waited for so long.
    pub connect: Duration,
    /// Without a byte in either direction.
    pub idle: Duration,
    /// Without the client closing, once the VM has closed.
    pub half_closed: Duration,
    /// Without a sign of a VM that owes an acknowledgement.
    pub silence: Duration,
    /// VMs that get a port at most, from VM 0 on. The limit of open files may lower it.
    pub listeners: u32,
    /// Connections open at once; more wait in the listeners' backlogs. The limit of open files may lower it.
    pub connections: usize,
    /// Connections open at once to one VM; more wait their turn. A web server closes what is beyond its own limit
    /// without an answer, so this has to be lower than that (the guest's nginx: 128).
    pub connections_per_vm: u32,
    /// Handshakes at once with one VM; more wait their turn.
    pub handshakes_per_vm: u32,
    /// Bytes buffered in each direction of a connection: the most that is in flight.
    pub window: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            idle: Duration::from_secs(300),
            half_closed: Duration::from_secs(60),
            silence: Duration::from_secs(90),
            listeners: u32::MAX,
            connections: 16_384,
            connections_per_vm: 96,
            handshakes_per_vm: 16,
            window: 16 * 1024,
        }
    }
}

/// The bridge: bound, then started, then stopped (at the latest when dropped).
pub struct UserBridge {
    config: Config,
    policy: Policy,
    watch: Watch,
    listeners: Option<Vec<TcpListener>>,
    /// VMs that have a port.
    listening: u32,
    #[cfg(unix)]
    door: Door,
    running: Option<Running>,
}

struct Running {
    thread: JoinHandle<Result<(), Error>>,
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    links: Arc<dyn Links>,
}

impl UserBridge {
    /// Takes all ports, or none. Nothing is served before [`UserBridge::start`], but clients can already connect and
    /// wait.
    pub fn bind(config: Config) -> Result<Self, Error> {
        Self::bind_with(config, Policy::default())
    }

    /// As [`UserBridge::bind`], with a policy.
    pub fn bind_with(mut config: Config, policy: Policy) -> Result<Self, Error> {
        ports::check(&config.ports)?;
        let files = ports::allow_files(config.ports.vms, config.limits.connections)?;
        config.limits.connections = files.connections;
        let listening = files.listeners.min(config.limits.listeners);
        let listeners = ports::bind(&Ports { vms: listening, ..config.ports })?;
        let watch = Watch::new(config.ports.vms);
        Ok(Self {
            config,
            policy,
            watch,
            listeners: Some(listeners),
            listening,
            #[cfg(unix)]
            door: Door::default(),
            running: None,
        })
    }

    /// Starts to serve, in a thread of its own.
    pub fn start(&mut self, links: Arc<dyn Links>) -> Result<(), Error> {
        let (ports, vms) = (self.config.ports.vms, links.vms());
        if ports != vms {
            return Err(Error::Vms { ports, vms });
        }
        let listeners = self.listeners.take().ok_or(Error::Started)?;
        let poll = Poll::new().map_err(io_error("wait for sockets"))?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).map_err(io_error("be woken"))?);
        let stop = Arc::new(AtomicBool::new(false));
        let woken = Arc::new(AtomicBool::new(false));
        let mut event_loop = EventLoop::new(
            self.config,
            Lan::new(links.clone(), self.watch.clone(), &self.policy),
            self.policy.services.clone(),
            poll,
            Entrances {
                listeners,
                #[cfg(unix)]
                door: self.door.clone(),
            },
            stop.clone(),
            woken.clone(),
        )
        .map_err(io_error("watch its ports"))?;
        let thread = std::thread::Builder::new()
            .name("net-user".into())
            .spawn(move || event_loop.run().map_err(io_error("wait for sockets")))
            .map_err(io_error("start its thread"))?;
        #[cfg(unix)]
        {
            let wake = waker.clone();
            // Should this fail, the next round is begun by something else.
            self.door.set_bell(Arc::new(move || drop(wake.wake())));
        }
        let wake = waker.clone();
        links.set_waker(Arc::new(move || {
            // The first call since the last round writes to the waker; the rest cost one atomic.
            if !woken.swap(true, Ordering::AcqRel) {
                let _ = wake.wake();
            }
        }));
        // A frame may have been sent before the waker was set.
        let _ = waker.wake();
        self.running = Some(Running { thread, stop, waker, links });
        Ok(())
    }

    /// Ends all connections and joins the thread. The ports are free afterwards.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.listeners = None;
        #[cfg(unix)]
        self.door.close();
        let Some(running) = self.running.take() else { return Ok(()) };
        running.stop.store(true, Ordering::Release);
        let woken = running.waker.wake();
        running.links.set_waker(Arc::new(|| ()));
        woken.map_err(io_error("wake its thread"))?;
        let result = running.thread.join().map_err(|_| Error::Failed)?;
        self.watch.tap.close();
        result
    }

    /// Whether it serves. Once started it does until it is stopped, unless the system fails it: [`UserBridge::stop`] then
    /// tells why.
    pub fn is_serving(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.thread.is_finished())
    }

    /// What passed so far. Can be read while the bridge runs and after it stopped.
    pub fn counters(&self) -> Arc<Counters> {
        self.watch.counters.clone()
    }

    /// VMs that have a port, from VM 0 on: all of them, unless the limit of open files is too low for that.
    pub fn listening(&self) -> u32 {
        self.listening
    }

    /// The configuration, with the number of connections that the limit of open files leaves.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl Bridge for UserBridge {
    fn start(&mut self, links: Arc<dyn Links>) -> Result<(), Error> {
        UserBridge::start(self, links)
    }

    fn stop(&mut self) -> Result<(), Error> {
        UserBridge::stop(self)
    }

    fn has_failed(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.thread.is_finished())
    }

    fn watch(&self) -> &Watch {
        &self.watch
    }

    fn ports(&self) -> Ports {
        self.config.ports
    }

    #[cfg(unix)]
    fn reach(&self) -> Reach {
        Reach::with_door(self.config.ports, self.listening, self.door.clone())
    }
}

impl Drop for UserBridge {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}
