//! One client's connection: a host socket on one side, our TCP to the VM on the other, and bytes both ways.

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use mio::event::Event;
use smoltcp::socket::tcp::{RecvError, State};

use super::Limits;
use super::stack::{Crashed, Sent, Stack, Tcp};
use crate::net::counters::Counters;
use crate::net::lan::Lan;
use crate::net::reach::Stream;
use crate::net::reason::Reason;
use crate::net::record::Direction;

/// Between a SYN and its first repetition; doubled up to [`SYN_PAUSE_MAX`]. A VM that has just booted is found soon.
const SYN_PAUSE_MIN: Duration = Duration::from_millis(250);
const SYN_PAUSE_MAX: Duration = Duration::from_secs(1);
/// For the VM's side to end after the client's has.
const DRAIN: Duration = Duration::from_secs(10);
/// Should TCP want to send at once and then not send, ask again so much later.
const PATIENCE: Duration = Duration::from_millis(10);
/// An acknowledgement that waits is due before then, the end of TIME-WAIT is not.
const ACK_SOON: Duration = Duration::from_secs(1);

/// What a connection needs of the bridge.
pub struct Env<'a> {
    pub stack: &'a mut Stack,
    pub lan: &'a mut Lan,
    pub limits: &'a Limits,
    pub now: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Other connections to the VM go first.
    Waiting,
    /// The host's service has not answered yet.
    Reaching,
    /// SYN sent.
    Connecting,
    /// Bytes flow.
    Open,
    /// The client is gone; the VM's side ends.
    Draining,
}

/// Why a connection ends before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Refused,
    Reset,
    TimedOut,
}

/// A VM's connection to a service: VM, its port, the host side's port.
pub type ServiceKey = (u32, u16, u16);

pub struct Connection {
    pub vm: u32,
    pub port: u16,
    pub id: u64,
    /// In the list of connections to serve in this round.
    pub touched: bool,
    /// It has more to send than its VM has room for.
    pub starved: bool,
    /// In its VM's list of starved connections.
    pub listed: bool,
    /// It counts no longer among its VM's handshakes.
    pub handshake_over: bool,
    /// The earliest entry among the timers.
    pub scheduled: Option<Instant>,
    /// Set if it is a VM's, to a service of the host.
    pub service: Option<ServiceKey>,
    phase: Phase,
    client: Option<Stream>,
    tcp: Option<Tcp>,
    readable: bool,
    /// The client has sent its end; no further event will announce it.
    read_closed: bool,
    writable: bool,
    client_done: bool,
    vm_done: bool,
    accepted: Instant,
    /// A byte moved.
    active: Instant,
    /// A packet came from the VM.
    heard: Instant,
    /// The VM owes an acknowledgement since then.
    owed: Option<Instant>,
    drain_until: Option<Instant>,
    syn: Option<Box<[u8]>>,
    syns: usize,
    syn_pause: Duration,
    syn_due: Instant,
    send_at: Option<Instant>,
}

impl Connection {
    pub fn new(id: u64, vm: u32, client: Stream, now: Instant) -> Self {
        Self {
            vm,
            port: 0,
            id,
            touched: false,
            starved: false,
            listed: false,
            handshake_over: false,
            scheduled: None,
            service: None,
            phase: Phase::Waiting,
            client: Some(client),
            tcp: None,
            readable: true,
            read_closed: false,
            writable: true,
            client_done: false,
            vm_done: false,
            accepted: now,
            active: now,
            heard: now,
            owed: None,
            drain_until: None,
            syn: None,
            syns: 0,
            syn_pause: SYN_PAUSE_MIN,
            syn_due: now + SYN_PAUSE_MIN,
            send_at: None,
        }
    }

    /// A connection that a VM has begun with this packet, to a service that is being connected.
    pub fn to_service(id: u64, vm: u32, service: Stream, key: ServiceKey, syn: &[u8], now: Instant) -> Self {
        Self {
            service: Some(key),
            phase: Phase::Reaching,
            writable: false,
            syn: Some(syn.into()),
            ..Self::new(id, vm, service, now)
        }
    }

    /// The service's key and the VM's first packet, once the service has answered.
    pub fn reached(&mut self) -> Option<(ServiceKey, Box<[u8]>)> {
        let reaching = self.phase == Phase::Reaching && self.writable;
        self.client.as_ref().filter(|client| reaching && client.is_connected())?;
        Some((self.service?, self.syn.take()?))
    }

    /// Goes on with the VM's handshake.
    pub fn answer(&mut self, tcp: Tcp, now: Instant) {
        self.tcp = Some(tcp);
        self.phase = Phase::Connecting;
        // TCP repeats its answer by itself.
        self.syn_due = now + Duration::from_secs(3600);
    }

    /// The VM's first packet, if nothing has answered it.
    pub fn unanswered(&self) -> Option<&[u8]> {
        self.syn.as_deref().filter(|_| self.service.is_some())
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Its turn has come: connects to the VM.
    pub fn connect(&mut self, tcp: Tcp, port: u16, now: Instant) {
        self.tcp = Some(tcp);
        self.port = port;
        self.phase = Phase::Connecting;
        self.syn_due = now + SYN_PAUSE_MIN;
    }

    /// The client's socket is ready for something.
    pub fn ready(&mut self, event: &Event) {
        self.read_closed |= event.is_read_closed();
        self.readable |= event.is_readable() || event.is_read_closed();
        self.writable |= event.is_writable();
    }

    /// Whether the client's socket reports an error: the client is gone.
    pub fn client_failed(&self) -> bool {
        self.client.as_ref().is_some_and(|client| !matches!(client.take_error(), Ok(None)))
    }

    /// A packet from the VM.
    pub fn receive(&mut self, packet: &[u8], env: &mut Env<'_>) -> Result<(), Crashed> {
        self.heard = env.now;
        match &mut self.tcp {
            Some(tcp) => env.stack.receive(tcp, self.vm, packet, env.lan, env.now),
            None => Ok(()),
        }
    }

    /// Does all that can be done now. True when the connection is over, and nothing of it is left but to forget it.
    pub fn serve(&mut self, env: &mut Env<'_>) -> bool {
        if matches!(self.phase, Phase::Waiting | Phase::Reaching) {
            if env.now >= self.accepted + env.limits.connect {
                self.fail(Failure::TimedOut, env);
            }
            return !matches!(self.phase, Phase::Waiting | Phase::Reaching);
        }
        self.check_limits(env);
        if self.phase == Phase::Connecting {
            self.check_handshake(env);
        }
        if self.phase == Phase::Open {
            self.pump(env);
        }
        match self.flush(env) {
            Ok(over) => over,
            Err(Crashed) => {
                self.crash(env.lan.counters());
                true
            }
        }
    }

    /// When [`Connection::serve`] has something to do without another event.
    pub fn next_due(&self, limits: &Limits) -> Option<Instant> {
        let due = match self.phase {
            Phase::Waiting | Phase::Reaching => Some(self.accepted + limits.connect),
            Phase::Connecting => Some((self.accepted + limits.connect).min(self.syn_due)),
            Phase::Open => {
                Some(self.active + self.idle_limit(limits)).into_iter().chain(self.silent_at(limits)).min()
            }
            Phase::Draining => self.drain_until,
        };
        due.into_iter().chain(self.send_at).min()
    }

    /// Ends the connection: the client and, where it has one, the VM get a reset.
    pub fn fail(&mut self, why: Failure, env: &mut Env<'_>) {
        let counters = env.lan.counters();
        Counters::add(
            match why {
                Failure::Refused => &counters.refused,
                Failure::Reset => &counters.reset,
                Failure::TimedOut => &counters.timed_out,
            },
            1,
        );
        self.reset_client();
        if self.phase == Phase::Connecting && self.service.is_none() {
            // Nothing was heard from the VM. Should it still answer, it will be told then.
            self.tcp = None;
        }
        if let Some(tcp) = &mut self.tcp {
            tcp.socket().abort();
        }
        self.drain(env.now);
    }

    /// The TCP code failed: only the client can still be told.
    pub fn crash(&mut self, counters: &Counters) {
        counters.dropped(Some(self.vm), Direction::Out, Reason::Stack);
        Counters::add(&counters.reset, 1);
        self.reset_client();
    }

    fn idle_limit(&self, limits: &Limits) -> Duration {
        if self.vm_done { limits.half_closed } else { limits.idle }
    }

    fn silent_at(&self, limits: &Limits) -> Option<Instant> {
        self.owed.map(|since| since.max(self.heard) + limits.silence)
    }

    fn check_limits(&mut self, env: &mut Env<'_>) {
        let passed = |at: Option<Instant>| at.is_some_and(|at| env.now >= at);
        let late = match self.phase {
            Phase::Waiting | Phase::Reaching | Phase::Connecting => {
                passed(Some(self.accepted + env.limits.connect))
            }
            Phase::Open => {
                passed(Some(self.active + self.idle_limit(env.limits))) || passed(self.silent_at(env.limits))
            }
            Phase::Draining => {
                if passed(self.drain_until) {
                    self.give_up_draining(env.now);
                }
                false
            }
        };
        if late {
            self.fail(Failure::TimedOut, env);
        }
    }

    /// Not in an orderly way, then: a reset, and if even that finds no room, nothing.
    fn give_up_draining(&mut self, now: Instant) {
        if let Some(tcp) = &mut self.tcp
            && tcp.socket().is_open()
        {
            tcp.socket().abort();
            self.drain(now);
        } else {
            self.tcp = None;
        }
    }

    fn check_handshake(&mut self, env: &mut Env<'_>) {
        let Some(tcp) = &mut self.tcp else { return };
        match tcp.socket().state() {
            State::SynSent | State::SynReceived => {
                if env.now >= self.syn_due {
                    // A copy of the first SYN: TCP's own back-off would find a freshly booted VM too late.
                    if let Some(syn) = self.syn.as_ref().filter(|_| env.lan.is_clear(self.vm)) {
                        env.lan.send(self.vm, syn, env.now);
                    }
                    self.syn_pause = (self.syn_pause * 2).min(SYN_PAUSE_MAX);
                    self.syn_due = env.now + self.syn_pause;
                }
            }
            State::Closed => self.fail(Failure::Refused, env),
            _ => {
                self.phase = Phase::Open;
                self.syn = None;
                self.active = env.now;
            }
        }
    }

    /// Moves bytes both ways, as far as they go.
    fn pump(&mut self, env: &mut Env<'_>) {
        let result = self.client_to_vm(env.now).and_then(|()| self.vm_to_client(env.now));
        if result.is_err() {
            self.fail(Failure::Reset, env);
        } else if self.client_done && self.vm_done {
            self.client = None;
            self.drain(env.now);
        }
    }

    fn client_to_vm(&mut self, now: Instant) -> io::Result<()> {
        let (Some(client), Some(tcp)) = (&mut self.client, &mut self.tcp) else { return Ok(()) };
        let socket = tcp.socket();
        while self.readable && !self.client_done && socket.can_send() {
            let read = socket.send(|room| {
                let size = room.len();
                match client.read(room) {
                    Ok(bytes) => (bytes, Ok((bytes, size))),
                    Err(error) => (0, Err(error)),
                }
            });
            match read {
                Ok(Ok((0, _))) => {
                    self.client_done = true;
                    self.active = now;
                    socket.close();
                }
                Ok(Ok((bytes, size))) => {
                    self.active = now;
                    // Less than asked for: the rest, or the end, will be announced. Elsewhere only an error tells.
                    if cfg!(target_os = "linux") && bytes < size && !self.read_closed {
                        self.readable = false;
                    }
                }
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn vm_to_client(&mut self, now: Instant) -> io::Result<()> {
        let (Some(client), Some(tcp)) = (&mut self.client, &mut self.tcp) else { return Ok(()) };
        let socket = tcp.socket();
        while self.writable && socket.can_recv() {
            let written = socket.recv(|data| match client.write(data) {
                Ok(bytes) => (bytes, Ok(bytes)),
                Err(error) => (0, Err(error)),
            });
            match written {
                Ok(Ok(0)) => return Err(ErrorKind::WriteZero.into()),
                Ok(Ok(_)) => self.active = now,
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        let gone = socket.state() == State::Closed;
        match socket.peek(1) {
            Err(RecvError::Finished) if !self.vm_done => {
                self.vm_done = true;
                self.active = now;
                match client.shutdown(std::net::Shutdown::Write) {
                    // The client may have gone meanwhile; reading tells.
                    Err(error) if error.kind() != ErrorKind::NotConnected => Err(error),
                    _ => Ok(()),
                }
            }
            // The VM reset the connection.
            Err(RecvError::InvalidState) => Err(ErrorKind::ConnectionReset.into()),
            // The VM acknowledged our end and is gone, but the client was not read to its end yet.
            Err(RecvError::Finished) if gone && !self.client_done => Err(ErrorKind::ConnectionReset.into()),
            _ => Ok(()),
        }
    }

    /// Sends what TCP has to send. True when the VM's side is over, too.
    fn flush(&mut self, env: &mut Env<'_>) -> Result<bool, Crashed> {
        let Some(tcp) = &mut self.tcp else { return Ok(true) };
        let mut sent = Sent::default();
        self.send_at = None;
        if self.phase != Phase::Connecting || self.service.is_some() {
            sent = env.stack.send(tcp, self.vm, env.lan, env.now, None)?;
        } else if self.syns < 2 {
            // TCP's first repetition teaches it not to take the boot for a round trip; later ones only slow it down.
            sent = env.stack.send(tcp, self.vm, env.lan, env.now, Some(&mut self.syn))?;
            self.syns += sent.packets;
        }
        self.starved = sent.starved;
        let more = if sent.starved || (self.phase == Phase::Connecting && self.syns >= 2) {
            None
        } else {
            env.stack.next_send(tcp, env.now)?
        };
        self.send_at = more.map(|at| if sent.packets == 0 { at.max(env.now + PATIENCE) } else { at });

        let socket = tcp.socket();
        let state = socket.state();
        let owes =
            socket.send_queue() > 0 || matches!(state, State::FinWait1 | State::Closing | State::LastAck);
        self.owed = if owes { self.owed.or(Some(env.now)) } else { None };
        // After TIME-WAIT's acknowledgement there is nothing that the reset for an unknown connection doesn't do, too.
        Ok(self.phase == Phase::Draining
            && match state {
                State::Closed => more.is_none() && !sent.starved,
                State::TimeWait => !sent.starved && more.is_none_or(|at| at > env.now + ACK_SOON),
                _ => false,
            })
    }

    fn drain(&mut self, now: Instant) {
        self.phase = Phase::Draining;
        self.drain_until = Some(now + DRAIN);
    }

    /// Closes the client's socket with a reset instead of an orderly end.
    fn reset_client(&mut self) {
        if let Some(client) = self.client.take() {
            client.reset();
        }
    }
}
