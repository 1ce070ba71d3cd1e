//! The bridge's thread: sockets, the VMs' frames and timers, served in rounds.
//!
//! A round takes all that is ready and serves each connection concerned once, so that packets that came together are
//! acknowledged together. Without events the thread sleeps: idle VMs and idle connections cost nothing.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mio::net::TcpListener;
use mio::{Events, Interest, Poll, Token};

use super::Config;
use super::connection::{Connection, Env, Failure, Phase, ServiceKey};
use super::stack::Stack;
use crate::net::counters::Counters;
use crate::net::lan::{Lan, TCP_ROOM};
use crate::net::packet::{FRAME_MAX, FrameBuf, Ipv4, TCP};
use crate::net::policy::Services;
#[cfg(unix)]
use crate::net::reach::Door;
use crate::net::reason::Reason;

/// The waker's token; listeners have their VM's number, connections follow.
pub const WAKER: Token = Token(usize::MAX);
/// Frames taken from one VM, and connections accepted from one listener, before others get their turn.
pub(super) const TURN: usize = 64;
/// How often the VMs of open connections are looked after: nobody tells when a VM goes down.
const DOWN_CHECK: Duration = Duration::from_millis(250);
/// Timers look no further ahead. They are not taken back when something earlier comes up, so a connection that is used
/// again and again leaves one behind each time: for so long.
const HORIZON: Duration = Duration::from_secs(30);
/// What connections to one VM share. Exists while there are any.
#[derive(Default)]
pub(super) struct Vm {
    /// Connections of any phase.
    open: u32,
    /// Connections that have a port of the host side.
    pub(super) active: u32,
    pub(super) handshakes: u32,
    /// Connections to services of the host.
    pub(super) services: u32,
    pub(super) waiting: VecDeque<(usize, u64)>,
    starved: VecDeque<(usize, u64)>,
}

/// Where clients come from.
pub struct Entrances {
    /// Of the first VMs, one each.
    pub listeners: Vec<TcpListener>,
    /// To all VMs.
    #[cfg(unix)]
    pub door: Door,
}

pub struct EventLoop {
    pub(super) config: Config,
    pub(super) services: Services,
    pub(super) poll: Poll,
    stop: Arc<AtomicBool>,
    woken: Arc<AtomicBool>,
    pub(super) listeners: Vec<TcpListener>,
    #[cfg(unix)]
    pub(super) door: Door,
    pub(super) counters: Arc<Counters>,
    pub(super) lan: Lan,
    pub(super) stack: Stack,
    pub(super) connections: Vec<Option<Connection>>,
    pub(super) free: Vec<usize>,
    pub(super) open: usize,
    pub(super) next_id: u64,
    pub(super) by_port: HashMap<(u32, u16), usize>,
    pub(super) by_service: HashMap<ServiceKey, usize>,
    pub(super) vms: HashMap<u32, Vm>,
    timers: BinaryHeap<Reverse<(Instant, usize, u64)>>,
    /// Connections to serve in this round.
    touched: Vec<usize>,
    /// VMs that may have frames.
    dirty: Vec<u32>,
    /// Listeners with clients to accept.
    pub(super) accepting: VecDeque<u32>,
    /// Which listeners are among them.
    pub(super) queued: Vec<bool>,
    /// Nothing is accepted before then.
    pub(super) accept_after: Option<Instant>,
    next_down_check: Option<Instant>,
    pub(super) now: Instant,
}

impl EventLoop {
    pub fn new(
        config: Config,
        lan: Lan,
        services: Services,
        poll: Poll,
        entrances: Entrances,
        stop: Arc<AtomicBool>,
        woken: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        let Entrances { mut listeners, .. } = entrances;
        for (vm, listener) in listeners.iter_mut().enumerate() {
            poll.registry().register(listener, Token(vm), Interest::READABLE)?;
        }
        let now = Instant::now();
        Ok(Self {
            config,
            services,
            poll,
            stop,
            woken,
            queued: vec![false; listeners.len()],
            listeners,
            #[cfg(unix)]
            door: entrances.door,
            counters: lan.watch().counters.clone(),
            lan,
            stack: Stack::new(config.ports.vms, config.limits.window, now),
            connections: Vec::new(),
            free: Vec::new(),
            open: 0,
            next_id: 0,
            by_port: HashMap::new(),
            by_service: HashMap::new(),
            vms: HashMap::new(),
            timers: BinaryHeap::new(),
            touched: Vec::new(),
            dirty: Vec::new(),
            accepting: VecDeque::new(),
            accept_after: None,
            next_down_check: None,
            now,
        })
    }

    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut frame: FrameBuf = [0; FRAME_MAX];
        let mut with_room = Vec::new();
        loop {
            let timeout = self.timeout();
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            if self.stop.load(Ordering::Acquire) {
                self.counters.open.store(0, Ordering::Relaxed);
                return Ok(());
            }
            self.now = Instant::now();
            for event in &events {
                self.event(event);
            }
            // What is sent from here on wakes the next round.
            let woken = self.woken.swap(false, Ordering::AcqRel);
            self.take_frames(&mut frame);
            self.lan.retry_due(woken, self.now, &mut with_room);
            for vm in with_room.drain(..) {
                self.touch_starved(vm, TCP_ROOM);
            }
            self.accept();
            #[cfg(unix)]
            self.let_in();
            self.expire();
            self.check_down();
            self.serve_touched();
        }
    }

    fn timeout(&self) -> Option<Duration> {
        let accept_now = !self.accepting.is_empty() && self.accept_after.is_none() && self.may_accept();
        #[cfg(unix)]
        let accept_now = accept_now || (self.may_accept() && self.door.has_guests());
        if accept_now || !self.dirty.is_empty() || !self.touched.is_empty() {
            return Some(Duration::ZERO);
        }
        let due = [
            self.timers.peek().map(|Reverse((at, ..))| *at),
            self.lan.next_retry(),
            self.accept_after.filter(|_| !self.accepting.is_empty()),
            self.next_down_check,
        ];
        let due = due.into_iter().flatten().min()?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    fn event(&mut self, event: &mio::event::Event) {
        let Token(token) = event.token();
        if event.token() == WAKER {
            return;
        }
        let Some(index) = token.checked_sub(self.listeners.len()) else {
            if !std::mem::replace(&mut self.queued[token], true) {
                self.accepting.push_back(token as u32);
            }
            return;
        };
        // The connection may be gone, and another in its place: it will find that nothing is ready.
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        connection.ready(event);
        if event.is_error() && connection.client_failed() {
            let mut env = Env {
                stack: &mut self.stack,
                lan: &mut self.lan,
                limits: &self.config.limits,
                now: self.now,
            };
            let reaching = connection.phase() == Phase::Reaching;
            connection.fail(if reaching { Failure::Refused } else { Failure::Reset }, &mut env);
        }
        self.touch(index);
    }

    pub(super) fn touch(&mut self, index: usize) {
        if let Some(Some(connection)) = self.connections.get_mut(index)
            && !connection.touched
        {
            connection.touched = true;
            self.touched.push(index);
        }
    }

    /// Touches connections that wait for room at a VM, the longest waiting first. Each that finds more room than it
    /// needs touches the next.
    fn touch_starved(&mut self, vm: u32, most: usize) {
        for _ in 0..most {
            let Some((index, id)) = self.vms.get_mut(&vm).and_then(|state| state.starved.pop_front()) else {
                return;
            };
            if let Some(Some(connection)) = self.connections.get_mut(index)
                && connection.id == id
            {
                connection.listed = false;
                self.touch(index);
            }
        }
    }

    fn take_frames(&mut self, frame: &mut FrameBuf) {
        let mut dirty = std::mem::take(&mut self.dirty);
        self.lan.links().take_dirty(&mut dirty);
        for vm in dirty.drain(..) {
            if !self.lan.is_clear(vm) && self.lan.retry(vm, self.now) {
                self.touch_starved(vm, TCP_ROOM);
            }
            let mut taken = 0;
            while let Ok(packet) = self.lan.take(vm, frame, self.now) {
                if let Some(packet) = packet {
                    let refused = self.receive(vm, packet).err();
                    self.lan.done(vm, &packet, refused);
                }
                taken += 1;
                if taken == TURN {
                    self.dirty.push(vm);
                    break;
                }
            }
        }
    }

    /// A packet from a VM to the host side.
    fn receive(&mut self, vm: u32, packet: Ipv4<'_>) -> Result<(), Reason> {
        let segment = packet.segment()?;
        if packet.protocol() != TCP {
            return Err(Reason::Protocol);
        }
        packet.verify_segment(&segment)?;
        let index = match self.by_port.get(&(vm, segment.dst_port)) {
            Some(&index) if segment.src_port == self.config.ports.guest => index,
            _ => return self.receive_for_service(vm, packet, &segment),
        };
        self.receive_at(index, packet)
    }

    pub(super) fn receive_at(&mut self, index: usize, packet: Ipv4<'_>) -> Result<(), Reason> {
        let Some(Some(connection)) = self.connections.get_mut(index) else {
            return Err(Reason::NoConnection);
        };
        let mut env =
            Env { stack: &mut self.stack, lan: &mut self.lan, limits: &self.config.limits, now: self.now };
        if connection.receive(packet.bytes(), &mut env).is_err() {
            connection.crash(self.lan.counters());
            self.remove(index);
            return Ok(());
        }
        self.touch(index);
        Ok(())
    }

    /// A place for a connection.
    pub(super) fn slot(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        })
    }

    /// There is a connection more.
    pub(super) fn opened(&mut self, vm: u32) {
        self.open += 1;
        Counters::add(&self.counters.open, 1);
        self.next_down_check.get_or_insert(self.now + DOWN_CHECK);
        self.vms.entry(vm).or_default().open += 1;
    }

    fn expire(&mut self) {
        while let Some(&Reverse((at, index, id))) = self.timers.peek() {
            if at > self.now {
                return;
            }
            self.timers.pop();
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            if connection.id == id && connection.scheduled == Some(at) {
                connection.scheduled = None;
                self.touch(index);
            }
        }
    }

    /// Refuses connections to VMs that have gone down.
    fn check_down(&mut self) {
        if self.next_down_check.is_none_or(|at| self.now < at) {
            return;
        }
        let mut down: Vec<u32> = self.vms.keys().copied().collect();
        down.retain(|&vm| self.lan.links().is_down(vm));
        if !down.is_empty() {
            for index in 0..self.connections.len() {
                let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
                if !down.contains(&connection.vm) || connection.phase() == Phase::Draining {
                    continue;
                }
                let why = if connection.phase() == Phase::Open { Failure::Reset } else { Failure::Refused };
                let mut env = Env {
                    stack: &mut self.stack,
                    lan: &mut self.lan,
                    limits: &self.config.limits,
                    now: self.now,
                };
                connection.fail(why, &mut env);
                self.remove(index);
            }
            for vm in down {
                self.lan.forget(vm);
            }
        }
        self.next_down_check = (self.open > 0).then_some(self.now + DOWN_CHECK);
    }

    fn serve_touched(&mut self) {
        // Serving one may touch others; they are served in the next round, which then follows at once.
        for index in std::mem::take(&mut self.touched) {
            self.serve(index);
        }
    }

    fn serve(&mut self, index: usize) {
        self.reach(index);
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        connection.touched = false;
        let before = connection.phase();
        let mut env =
            Env { stack: &mut self.stack, lan: &mut self.lan, limits: &self.config.limits, now: self.now };
        let over = connection.serve(&mut env);
        let (vm, id) = (connection.vm, connection.id);
        if over {
            self.remove(index);
            self.pass_room_on(vm);
            return;
        }
        if connection.starved
            && !connection.listed
            && let Some(state) = self.vms.get_mut(&vm)
        {
            connection.listed = true;
            state.starved.push_back((index, id));
        }
        if let Some(due) = connection.next_due(&self.config.limits)
            && connection.scheduled.is_none_or(|at| due < at)
        {
            let due = due.min(self.now + HORIZON);
            connection.scheduled = Some(due);
            self.timers.push(Reverse((due, index, id)));
        }
        let handshake_over = before == Phase::Connecting && connection.phase() != Phase::Connecting;
        if handshake_over && connection.service.is_none() {
            if let Some(state) = self.vms.get_mut(&vm) {
                state.handshakes -= 1;
            }
            connection.handshake_over = true;
            self.admit(vm);
        }
        self.pass_room_on(vm);
    }

    fn pass_room_on(&mut self, vm: u32) {
        if self.lan.has_room(vm) {
            self.touch_starved(vm, 1);
        }
    }

    fn remove(&mut self, index: usize) {
        let Some(connection) = self.connections.get_mut(index).and_then(Option::take) else { return };
        self.free.push(index);
        self.open -= 1;
        self.counters.open.fetch_sub(1, Ordering::Relaxed);
        let vm = connection.vm;
        self.forget_service(&connection);
        if let Some(state) = self.vms.get_mut(&vm) {
            state.open -= 1;
            if connection.port != 0 {
                self.by_port.remove(&(vm, connection.port));
                state.active -= 1;
                if !connection.handshake_over {
                    state.handshakes -= 1;
                }
            }
            if state.open == 0 {
                self.vms.remove(&vm);
            }
        }
        self.admit(vm);
    }
}
