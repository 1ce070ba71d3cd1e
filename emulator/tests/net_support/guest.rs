//! One fake VM: an Ethernet interface with its own addresses, and a server with a given behaviour on port 80.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use emulator::net::address::{ip_of, mac_of};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as Ticks;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::FakeLinks;

/// What a VM does with connections.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// Answers each request with this page, then closes.
    Http(Vec<u8>),
    /// Answers with the body's bytes, no length, and closes: close-delimited.
    Body(usize),
    /// Sends back what it gets; closes after the client has.
    Echo,
    /// Reads to the end, then answers with the number of bytes.
    Count,
    /// Resets the connection when a request has come.
    Abort,
    /// Never reacts to anything.
    Silent,
    /// As `Http`, but the VM boots that long.
    Late(Duration, Vec<u8>),
    /// Nothing listens.
    NoServer,
    /// Answers the handshake, then vanishes.
    Vanish,
    /// Takes the request and never answers.
    Mute,
    /// Closes as soon as the connection stands.
    CloseEarly,
}

/// How many bytes of a body are at a place: a pattern that shows what is lost or swapped.
pub fn pattern(at: usize) -> u8 {
    (at % 251) as u8 ^ (at / 251) as u8
}

pub struct Guest {
    pub vm: u32,
    /// When it wants to run without a frame.
    pub due: Option<Instant>,
    /// Connections that ended with a reset.
    pub resets: usize,
    pub accepted: usize,
    behaviour: Behaviour,
    links: Arc<FakeLinks>,
    interface: Interface,
    sockets: SocketSet<'static>,
    served: HashMap<SocketHandle, Served>,
    boots: Instant,
    start: Instant,
}

#[derive(Default)]
struct Served {
    got: usize,
    request: Vec<u8>,
    sent: usize,
    established: bool,
    finished: bool,
}

/// Servers per VM: as few as a small guest may have.
const SLOTS: usize = 6;

impl Guest {
    pub fn new(vm: u32, behaviour: Behaviour, links: &Arc<FakeLinks>) -> Self {
        let start = Instant::now();
        let mac = EthernetAddress(mac_of(vm).unwrap());
        let mut config = Config::new(HardwareAddress::Ethernet(mac));
        config.random_seed = u64::from(vm) + 1;
        let mut interface = Interface::new(config, &mut Link { vm, links, deaf: false }, Ticks::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::Ipv4(ip_of(vm).unwrap()), 16)).unwrap();
        });
        let mut sockets = SocketSet::new(Vec::new());
        if !matches!(behaviour, Behaviour::NoServer) {
            for _ in 0..SLOTS {
                let mut socket =
                    Socket::new(SocketBuffer::new(vec![0; 8192]), SocketBuffer::new(vec![0; 8192]));
                socket.listen(80).unwrap();
                socket.set_ack_delay(None);
                sockets.add(socket);
            }
        }
        let boots = match behaviour {
            Behaviour::Late(late, _) => start + late,
            _ => start,
        };
        Self {
            vm,
            due: Some(boots),
            resets: 0,
            accepted: 0,
            behaviour,
            links: links.clone(),
            interface,
            sockets,
            served: HashMap::new(),
            boots,
            start,
        }
    }

    pub fn run(&mut self) {
        let now = Instant::now();
        if now < self.boots || matches!(self.behaviour, Behaviour::Silent) {
            self.due = (now < self.boots).then_some(self.boots);
            return;
        }
        if matches!(self.behaviour, Behaviour::Vanish) && self.accepted > 0 {
            self.due = None;
            return;
        }
        let links = self.links.clone();
        let mut link = Link { vm: self.vm, links: &links, deaf: false };
        let time = Ticks::from_micros((now - self.start).as_micros() as i64);
        loop {
            let mut moved = false;
            loop {
                // As a kernel whose backlog is full: a SYN that no server can take is not heard.
                let listens = |(_, socket): (_, &smoltcp::socket::Socket<'_>)| match socket {
                    smoltcp::socket::Socket::Tcp(socket) => socket.is_listening(),
                    #[allow(unreachable_patterns)]
                    _ => false,
                };
                link.deaf =
                    !matches!(self.behaviour, Behaviour::NoServer) && !self.sockets.iter().any(listens);
                match self.interface.poll_ingress_single(time, &mut link, &mut self.sockets) {
                    PollIngressSingleResult::None => break,
                    _ => moved = true,
                }
            }
            // No ingress here: a SYN that has come meanwhile would find no server, and be refused.
            self.interface.poll_maintenance(time);
            self.interface.poll_egress(time, &mut link, &mut self.sockets);
            let handles: Vec<SocketHandle> = self.sockets.iter().map(|(handle, _)| handle).collect();
            for handle in handles {
                moved |= self.serve(handle);
            }
            if !moved {
                break;
            }
        }
        self.due = self.interface.poll_at(time, &self.sockets).map(|at| {
            let pause = if at > time { (at - time).into() } else { Duration::from_millis(1) };
            now + pause
        });
    }

    fn serve(&mut self, handle: SocketHandle) -> bool {
        let socket = self.sockets.get_mut::<Socket>(handle);
        let served = self.served.entry(handle).or_default();
        match socket.state() {
            State::Closed | State::TimeWait => {
                if served.established {
                    self.resets += usize::from(socket.state() == State::Closed && !served.finished);
                    *served = Served::default();
                }
                socket.abort();
                // A fresh one: what smoltcp keeps of an old connection is not to disturb the next.
                let buffer = || SocketBuffer::new(vec![0; 8192]);
                let mut fresh = Socket::new(buffer(), buffer());
                fresh.listen(80).unwrap();
                fresh.set_ack_delay(None);
                *socket = fresh;
                return false;
            }
            State::Listen | State::SynSent | State::SynReceived => return false,
            _ => {}
        }
        if !served.established {
            served.established = true;
            self.accepted += 1;
        }
        let mut moved = false;
        match &self.behaviour {
            Behaviour::Http(page) | Behaviour::Late(_, page) => {
                let mut data = [0; 2048];
                while let Ok(bytes @ 1..) = socket.recv_slice(&mut data) {
                    served.request.extend_from_slice(&data[..bytes]);
                    moved = true;
                }
                if served.request.is_empty() && socket.state() == State::CloseWait {
                    socket.close();
                    served.finished = true;
                }
                if served.request.ends_with(b"\r\n\r\n") && !served.finished {
                    let header = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", page.len());
                    let answer = [header.as_bytes(), page].concat();
                    if socket.can_send() {
                        let bytes = socket.send_slice(&answer[served.sent..]).unwrap();
                        served.sent += bytes;
                        moved |= bytes > 0;
                    }
                    if served.sent == answer.len() {
                        socket.close();
                        served.finished = true;
                    }
                }
            }
            Behaviour::Body(size) => {
                let mut data = [0; 2048];
                while let Ok(bytes @ 1..) = socket.recv_slice(&mut data) {
                    served.got += bytes;
                    moved = true;
                }
                while served.got > 0 && served.sent < *size && socket.can_send() {
                    let at = served.sent;
                    let bytes = socket.send(|room| {
                        let bytes = room.len().min(size - at);
                        for (offset, byte) in room[..bytes].iter_mut().enumerate() {
                            *byte = pattern(at + offset);
                        }
                        (bytes, bytes)
                    });
                    served.sent += bytes.unwrap();
                    moved = true;
                }
                if served.sent == *size {
                    socket.close();
                    served.finished = true;
                }
            }
            Behaviour::Echo => {
                while socket.can_recv() && socket.can_send() {
                    let mut data = [0; 2048];
                    let room = socket.send_capacity() - socket.send_queue();
                    let room = room.min(data.len());
                    let bytes = socket.recv_slice(&mut data[..room]).unwrap();
                    assert_eq!(socket.send_slice(&data[..bytes]).unwrap(), bytes);
                    moved |= bytes > 0;
                }
                if !socket.may_recv() && socket.state() == State::CloseWait {
                    socket.close();
                    served.finished = true;
                    moved = true;
                }
            }
            Behaviour::Count => {
                let mut data = [0; 8192];
                while let Ok(bytes @ 1..) = socket.recv_slice(&mut data) {
                    for (offset, byte) in data[..bytes].iter().enumerate() {
                        assert_eq!(*byte, pattern(served.got + offset), "at {}", served.got + offset);
                    }
                    served.got += bytes;
                    moved = true;
                }
                if socket.state() == State::CloseWait {
                    socket.send_slice(format!("got {}", served.got).as_bytes()).unwrap();
                    socket.close();
                    served.finished = true;
                    moved = true;
                }
            }
            Behaviour::Abort => {
                if socket.can_recv() {
                    socket.abort();
                    served.finished = true;
                    moved = true;
                    // The reset has to go before the socket listens again.
                    let time = Ticks::from_micros((Instant::now() - self.start).as_micros() as i64);
                    let links = self.links.clone();
                    let mut link = Link { vm: self.vm, links: &links, deaf: false };
                    self.interface.poll(time, &mut link, &mut self.sockets);
                }
            }
            Behaviour::CloseEarly => {
                if !served.finished {
                    socket.close();
                    served.finished = true;
                    moved = true;
                }
            }
            Behaviour::Mute => {
                let mut data = [0; 2048];
                while let Ok(1..) = socket.recv_slice(&mut data) {
                    moved = true;
                }
                if socket.state() == State::CloseWait {
                    served.finished = true;
                }
            }
            Behaviour::Silent | Behaviour::NoServer | Behaviour::Vanish => {}
        }
        moved
    }
}

/// The VM's end of its link.
struct Link<'a> {
    vm: u32,
    links: &'a Arc<FakeLinks>,
    deaf: bool,
}

pub struct Frame(Vec<u8>);

pub struct Send<'a> {
    vm: u32,
    links: &'a FakeLinks,
}

impl Device for Link<'_> {
    type RxToken<'a>
        = Frame
    where
        Self: 'a;
    type TxToken<'a>
        = Send<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Ticks) -> Option<(Frame, Send<'_>)> {
        if !self.links.vm_can_send(self.vm) {
            return None;
        }
        let mut frame = self.links.vm_receives(self.vm)?;
        while self.deaf && is_syn(&frame) {
            frame = self.links.vm_receives(self.vm)?;
        }
        Some((Frame(frame), Send { vm: self.vm, links: self.links }))
    }

    fn transmit(&mut self, _: Ticks) -> Option<Send<'_>> {
        self.links.vm_can_send(self.vm).then_some(Send { vm: self.vm, links: self.links })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

fn is_syn(frame: &[u8]) -> bool {
    frame.len() > 47 && frame[12..14] == [8, 0] && frame[23] == 6 && frame[47] & 0x12 == 2
}

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Send<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        assert!(self.links.vm_sends(self.vm, &frame));
        result
    }
}
