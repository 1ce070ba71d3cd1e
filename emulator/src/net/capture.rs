//! The thread of a transport that captures packets: from its wire through the gateway to the VMs, and back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Links;
use super::bridge::{Error, io_error};
use super::gateway::Gateway;
use super::lan::{Lan, Watch};
use super::packet::{FRAME_MAX, FrameBuf, Ipv4, MTU};
use super::policy::Policy;
use super::reason::Reason;
use super::record::{Direction, Place};
use super::rewrite::{PacketBuf, Ports, reset_for};

/// Packets taken from the host, and frames from one VM, before others get their turn.
const TURN: usize = 64;

/// Where a capturing transport gets the host's packets from and puts the VMs' packets to. IPv4, without link header.
pub trait Wire: Send {
    /// Waits until a packet is there, the waker was called, or so much time has passed. May return early.
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()>;
    /// The next packet of the host's, if one is there; its length. What does not fit is cut, and dropped later.
    fn capture(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>>;
    /// Gives a packet to the host. `WouldBlock` if the host takes none now.
    fn inject(&mut self, packet: &[u8]) -> io::Result<()>;
    /// Ends a wait, from any thread.
    fn waker(&self) -> Arc<dyn Fn() + Send + Sync>;
}

/// A capturing transport that runs.
pub struct Capture {
    thread: JoinHandle<io::Result<()>>,
    stop: Arc<AtomicBool>,
    wake: Arc<dyn Fn() + Send + Sync>,
    links: Arc<dyn Links>,
}

impl Capture {
    /// Starts its thread.
    pub fn start(
        name: &str,
        wire: Box<dyn Wire>,
        policy: &Policy,
        ports: Ports,
        links: Arc<dyn Links>,
        watch: Watch,
    ) -> Result<Self, Error> {
        let vms = links.vms();
        if ports.vms != vms {
            return Err(Error::Vms { ports: ports.vms, vms });
        }
        let gateway = Gateway::new(ports, policy.services.clone());
        let stop = Arc::new(AtomicBool::new(false));
        let woken = Arc::new(AtomicBool::new(false));
        let wake = wire.waker();
        let lan = Lan::new(links.clone(), watch, policy);
        let mut shuttle = Shuttle {
            wire,
            gateway,
            lan,
            stop: stop.clone(),
            woken: woken.clone(),
            dirty: Vec::new(),
            awake: None,
        };
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || shuttle.run())
            .map_err(io_error("start its thread"))?;
        let call = wake.clone();
        links.set_waker(Arc::new(move || {
            if !woken.swap(true, Ordering::AcqRel) {
                call();
            }
        }));
        // A frame may have been sent before the waker was set.
        wake();
        Ok(Self { thread, stop, wake, links })
    }

    /// Whether the thread runs.
    pub fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Ends the thread.
    pub fn stop(self) -> Result<(), Error> {
        self.stop.store(true, Ordering::Release);
        (self.wake)();
        self.links.set_waker(Arc::new(|| ()));
        let result = self.thread.join().map_err(|_| Error::Failed)?;
        result.map_err(io_error("exchange packets with the host"))
    }
}

struct Shuttle {
    wire: Box<dyn Wire>,
    gateway: Gateway,
    lan: Lan,
    stop: Arc<AtomicBool>,
    woken: Arc<AtomicBool>,
    /// VMs that may have frames.
    dirty: Vec<u32>,
    /// Until then nobody sleeps.
    awake: Option<Instant>,
}

impl Shuttle {
    fn run(&mut self) -> io::Result<()> {
        let mut buffers = (Box::new([0; FRAME_MAX]), Box::new([0; MTU]));
        let (frame, packet) = (&mut *buffers.0, &mut *buffers.1);
        let mut with_room = Vec::new();
        let mut more = false;
        loop {
            // Both are looked at before waiting too: a wire may have taken the call that came with them for nothing.
            if self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            self.awake = self.awake.filter(|until| Instant::now() < *until);
            let at_once = more || !self.dirty.is_empty() || self.woken.load(Ordering::Acquire);
            let timeout = if at_once || self.awake.is_some() {
                Some(Duration::ZERO)
            } else {
                self.lan.next_retry().map(|due| due.saturating_duration_since(Instant::now()))
            };
            self.wire.wait(timeout)?;
            if self.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            let now = Instant::now();
            // What is sent from here on wakes the next round.
            let woken = self.woken.swap(false, Ordering::AcqRel);
            self.take_frames(frame, packet, now)?;
            more = self.take_packets(frame, packet, now)?;
            self.lan.retry_due(woken, now, &mut with_room);
            with_room.clear();
        }
    }

    /// From the host to the VMs; true if there may be more.
    fn take_packets(
        &mut self,
        frame: &mut FrameBuf,
        packet: &mut PacketBuf,
        now: Instant,
    ) -> io::Result<bool> {
        for _ in 0..TURN {
            let Some(len) = self.wire.capture(&mut packet[..])? else { return Ok(false) };
            let captured = &packet[..len];
            // IPv6, which the host's stack tries on any link, is not spoken here.
            if captured.first().is_some_and(|byte| byte >> 4 != 4) {
                self.refuse(len, packet, None, Reason::EtherType)?;
                continue;
            }
            match self.gateway.from_host(captured, frame, now) {
                Ok((vm, _)) if self.lan.links().is_down(vm) => {
                    self.refuse(len, packet, Some(vm), Reason::Down)?
                }
                Ok((vm, len)) => {
                    self.awake = self.lan.links().attend(now);
                    self.lan.tap().see(Place::Host, Some(vm), Direction::Out, None, captured);
                    self.lan.send(vm, &frame[..len], now);
                }
                Err(reason) => self.refuse(len, packet, None, reason)?,
            }
        }
        Ok(true)
    }

    /// Drops a host's packet. Where nobody is, the client should not have to wait for its patience to end.
    fn refuse(&mut self, len: usize, packet: &PacketBuf, vm: Option<u32>, reason: Reason) -> io::Result<()> {
        self.lan.counters().dropped(vm, Direction::In, reason);
        self.lan.tap().see(Place::Host, vm, Direction::Out, Some(reason), &packet[..len]);
        let mut reset = [0; MTU];
        if matches!(reason, Reason::Down | Reason::UnknownDestination)
            && let Ok(ip) = Ipv4::parse(&packet[..len])
            && let Some(len) = reset_for(&ip, &mut reset)
        {
            self.inject(vm, &reset[..len])?;
        }
        Ok(())
    }

    fn take_frames(&mut self, frame: &mut FrameBuf, packet: &mut PacketBuf, now: Instant) -> io::Result<()> {
        let mut dirty = std::mem::take(&mut self.dirty);
        self.lan.links().take_dirty(&mut dirty);
        for vm in dirty.drain(..) {
            self.lan.retry(vm, now);
            let mut taken = 0;
            while let Ok(to_host) = self.lan.take(vm, frame, now) {
                if let Some(ip) = to_host {
                    match self.gateway.from_vm(vm, &ip, packet, now) {
                        Ok(len) => {
                            self.lan.done(vm, &ip, None);
                            self.inject(Some(vm), &packet[..len])?;
                        }
                        Err(reason) => {
                            self.lan.done(vm, &ip, Some(reason));
                            if reason == Reason::NoConnection
                                && let Some(len) = reset_for(&ip, packet)
                            {
                                self.lan.send_packet(vm, &packet[..len], now);
                            }
                        }
                    }
                }
                taken += 1;
                if taken == TURN {
                    self.dirty.push(vm);
                    break;
                }
            }
        }
        Ok(())
    }

    fn inject(&mut self, vm: Option<u32>, packet: &[u8]) -> io::Result<()> {
        let dropped = match self.wire.inject(packet) {
            Ok(()) => None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(Reason::HostFull),
            // What the host finds wrong with one packet is no reason to end.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Some(Reason::Malformed),
            Err(error) => return Err(error),
        };
        if let Some(reason) = dropped {
            self.lan.counters().dropped(vm, Direction::Out, reason);
        }
        self.lan.tap().see(Place::Host, vm, Direction::In, dropped, packet);
        Ok(())
    }
}
