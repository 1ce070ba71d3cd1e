//! Connections from the host: taken from listeners and the door, and let go ahead to their VMs, as many as may.

use std::io::{self, ErrorKind};
use std::time::Duration;

use mio::{Interest, Token};

use super::connection::{Connection, Phase};
use super::event_loop::{EventLoop, TURN};
use crate::net::counters::Counters;
use crate::net::reach::Stream;

/// After the system had no file or memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl EventLoop {
    /// Whether there may be one connection more.
    pub(super) fn may_accept(&self) -> bool {
        self.open < self.config.limits.connections
    }

    /// Takes clients from listeners in turn.
    pub(super) fn accept(&mut self) {
        if self.accept_after.is_some_and(|after| self.now < after) {
            return;
        }
        self.accept_after = None;
        for _ in 0..self.accepting.len() {
            let Some(vm) = self.accepting.pop_front() else { return };
            let mut turn = TURN;
            loop {
                if turn == 0 || !self.may_accept() {
                    self.accepting.push_back(vm);
                    break;
                }
                turn -= 1;
                match self.listeners[vm as usize].accept() {
                    Ok((client, _)) => {
                        // Without it, small answers could wait for acknowledgements. It is no loss if the system
                        // refuses.
                        let _ = client.set_nodelay(true);
                        self.accepted(vm, Stream::Tcp(client));
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        self.queued[vm as usize] = false;
                        break;
                    }
                    Err(error) if is_exhausted(&error) => {
                        self.accept_after = Some(self.now + ACCEPT_PAUSE);
                        self.accepting.push_back(vm);
                        return;
                    }
                    // The client has gone again.
                    Err(_) => {}
                }
            }
        }
    }

    /// Serves those that came through the door.
    #[cfg(unix)]
    pub(super) fn let_in(&mut self) {
        let room = self.config.limits.connections.saturating_sub(self.open);
        for (vm, client) in self.door.take(room) {
            self.accepted(vm, Stream::Pair(client));
        }
    }

    fn accepted(&mut self, vm: u32, mut client: Stream) {
        Counters::add(&self.counters.accepted, 1);
        if self.lan.links().is_down(vm) {
            Counters::add(&self.counters.refused, 1);
            client.reset();
            return;
        }
        let index = self.slot();
        let token = Token(self.listeners.len() + index);
        let interest = Interest::READABLE | Interest::WRITABLE;
        if self.poll.registry().register(&mut client, token, interest).is_err() {
            self.free.push(index);
            client.reset();
            return;
        }
        self.next_id += 1;
        let id = self.next_id;
        self.connections[index] = Some(Connection::new(id, vm, client, self.now));
        self.opened(vm);
        self.vms.entry(vm).or_default().waiting.push_back((index, id));
        self.touch(index);
        self.admit(vm);
    }

    /// Lets the connections that wait for their turn at a VM go ahead, as many as may.
    pub(super) fn admit(&mut self, vm: u32) {
        let limits = self.config.limits;
        loop {
            let Some(state) = self.vms.get_mut(&vm) else { return };
            if state.active >= limits.connections_per_vm || state.handshakes >= limits.handshakes_per_vm {
                return;
            }
            let Some((index, id)) = state.waiting.pop_front() else { return };
            let Some(Some(connection)) = self.connections.get_mut(index) else { continue };
            if connection.id != id || connection.phase() != Phase::Waiting {
                continue;
            }
            let by_port = &self.by_port;
            let started = self
                .stack
                .port(vm, |port| by_port.contains_key(&(vm, port)))
                .and_then(|port| Some((self.stack.connect(vm, port, self.config.ports.guest)?, port)));
            // All ports to this VM in use: the next connection that ends admits again.
            let Some((tcp, port)) = started else {
                state.waiting.push_front((index, id));
                return;
            };
            state.active += 1;
            state.handshakes += 1;
            connection.connect(tcp, port, self.now);
            self.by_port.insert((vm, port), index);
            self.touch(index);
        }
    }
}

/// Whether the system is out of files or memory, so that accepting has to wait.
fn is_exhausted(error: &io::Error) -> bool {
    #[cfg(unix)]
    {
        use rustix::io::Errno;
        let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
        Errno::from_io_error(error).is_some_and(|errno| exhausted.contains(&errno))
    }
    #[cfg(not(unix))]
    {
        error.kind() == ErrorKind::OutOfMemory
    }
}
