//! Connections the other way: from VMs to the services of the host that were listed.
//!
//! The host's service is connected first; only then the VM's handshake is answered. So a VM sees a refusal where the
//! host does, and a service sees no connection that a VM did not want.

use std::net::{Ipv4Addr, SocketAddr};

use mio::net::TcpStream;
use mio::{Interest, Token};

use super::connection::{Connection, Env, ServiceKey};
use super::event_loop::EventLoop;
use crate::net::packet::{Ipv4, Segment};
use crate::net::reach::Stream;
use crate::net::reason::Reason;

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

impl EventLoop {
    /// A packet from a VM that belongs to no connection to it: perhaps to a service.
    pub(super) fn receive_for_service(
        &mut self,
        vm: u32,
        packet: Ipv4<'_>,
        segment: &Segment,
    ) -> Result<(), Reason> {
        let key = (vm, segment.src_port, segment.dst_port);
        if let Some(&index) = self.by_service.get(&key) {
            return self.receive_at(index, packet);
        }
        let flags = packet.payload().get(13).copied().unwrap_or(0);
        let service = self.services.host_port(segment.dst_port);
        if let Some(port) = service.filter(|_| flags & (SYN | RST | ACK) == SYN)
            && self.open_service(key, port, packet).is_some()
        {
            return Ok(());
        }
        let _ = self.stack.reject(vm, packet.bytes(), &mut self.lan, self.now);
        Err(Reason::NoConnection)
    }

    /// Begins to connect to a service; none if there are too many connections already.
    fn open_service(&mut self, key: ServiceKey, port: u16, syn: Ipv4<'_>) -> Option<()> {
        let vm = key.0;
        let used = self.vms.get(&vm).map_or(0, |state| state.services);
        if !self.may_accept() || used >= self.config.limits.connections_per_vm {
            return None;
        }
        let service = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).ok()?;
        // As for clients: without it, small pieces could wait.
        let _ = service.set_nodelay(true);
        let mut service = Stream::Tcp(service);
        let index = self.slot();
        let token = Token(self.listeners.len() + index);
        let interest = Interest::READABLE | Interest::WRITABLE;
        if self.poll.registry().register(&mut service, token, interest).is_err() {
            self.free.push(index);
            return None;
        }
        self.next_id += 1;
        let connection = Connection::to_service(self.next_id, vm, service, key, syn.bytes(), self.now);
        self.connections[index] = Some(connection);
        self.opened(vm);
        self.vms.entry(vm).or_default().services += 1;
        self.by_service.insert(key, index);
        self.touch(index);
        Some(())
    }

    /// The host's service has answered: lets the VM's handshake go on.
    pub(super) fn reach(&mut self, index: usize) {
        let Some(Some(connection)) = self.connections.get_mut(index) else { return };
        let Some((key, syn)) = connection.reached() else { return };
        let Some(mut tcp) = self.stack.listen(key.2) else { return };
        let env =
            Env { stack: &mut self.stack, lan: &mut self.lan, limits: &self.config.limits, now: self.now };
        if env.stack.receive(&mut tcp, key.0, &syn, env.lan, env.now).is_ok() {
            connection.answer(tcp, env.now);
        }
    }

    /// A connection to a service is over.
    pub(super) fn forget_service(&mut self, connection: &Connection) {
        let Some(key) = connection.service else { return };
        self.by_service.remove(&key);
        if let Some(state) = self.vms.get_mut(&key.0) {
            state.services -= 1;
        }
        if let Some(syn) = connection.unanswered() {
            // The service was not to be had.
            let _ = self.stack.reject(key.0, syn, &mut self.lan, self.now);
        }
    }
}
