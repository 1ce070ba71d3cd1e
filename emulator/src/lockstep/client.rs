//! An HTTP client that does the same in every run: its clock is the guest's, its ports and sequence numbers follow from a
//! seed, and it sees frames only when it is handed them.

use std::collections::VecDeque;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint};

use crate::net::address::{HOST_IP, NoAddress, PREFIX_LEN, ip_of};
use crate::net::packet::{ETHERNET_LEN, FRAME_MAX, FrameBuf, MTU};
use crate::net::rewrite::frame_to_vm;

/// Guest ticks of a microsecond.
const TICKS_PER_US: u64 = 65;
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 ";
const FIRST_PORT: u16 = 20_000;
/// Bytes of a connection's buffers, and of an answer that are kept.
const WINDOW: usize = 16 << 10;

/// One VM's client: a connection for each request, one after the other.
pub struct Client {
    vm: u32,
    interface: Interface,
    sockets: SocketSet<'static>,
    link: Link,
    open: Option<(SocketHandle, bool)>,
    answer: Vec<u8>,
    begun: u32,
    /// Requests that were answered with status 200.
    pub answered: u32,
    /// What was wrong with the first answer that was not.
    pub wrong: Option<String>,
    wanted: u32,
}

impl Client {
    /// A client that asks VM `vm` `wanted` times.
    pub fn new(vm: u32, wanted: u32) -> Result<Self, NoAddress> {
        ip_of(vm)?;
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = u64::from(vm) + 1;
        let mut link = Link::default();
        let mut interface = Interface::new(config, &mut link, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // The list has room for two.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(HOST_IP), PREFIX_LEN));
        });
        let sockets = SocketSet::new(Vec::new());
        let answer = Vec::new();
        Ok(Self {
            vm,
            interface,
            sockets,
            link,
            open: None,
            answer,
            begun: 0,
            answered: 0,
            wrong: None,
            wanted,
        })
    }

    /// All requests were answered, and the last connection is closed on both sides.
    pub fn is_done(&self) -> bool {
        self.answered >= self.wanted && self.open.is_none()
    }

    /// Takes a frame that the VM sent.
    pub fn take(&mut self, frame: &[u8]) {
        // IPv4 only: guests know the host's MAC, and nothing else is asked of it.
        if frame.len() > ETHERNET_LEN && frame[12..14] == [8, 0] {
            self.link.received.push_back(frame[ETHERNET_LEN..].to_vec());
        }
    }

    /// Goes on at guest time `ticks`; the frames to give to the VM, in order.
    pub fn run(&mut self, ticks: u64) -> Vec<Vec<u8>> {
        let now = Instant::from_micros((ticks / TICKS_PER_US) as i64);
        // A connection's end may make room for the next one.
        for _ in 0..2 {
            self.interface.poll(now, &mut self.link, &mut self.sockets);
            self.go_on();
        }
        self.interface.poll(now, &mut self.link, &mut self.sockets);
        let vm = self.vm;
        let frames = self.link.sent.drain(..).filter_map(|packet| {
            let mut frame: FrameBuf = [0; FRAME_MAX];
            frame_to_vm(&packet, vm, &mut frame).ok().map(|len| frame[..len].to_vec())
        });
        frames.collect()
    }

    fn go_on(&mut self) {
        let Some((handle, mut asked)) = self.open else {
            if self.begun < self.wanted && self.wrong.is_none() {
                self.connect();
            }
            return;
        };
        let socket = self.sockets.get_mut::<Socket<'_>>(handle);
        if !asked && socket.can_send() {
            asked = socket.send_slice(REQUEST).is_ok_and(|bytes| bytes == REQUEST.len());
            self.open = Some((handle, asked));
        }
        while socket.can_recv() {
            let answer = &mut self.answer;
            let took = socket.recv(|bytes| {
                answer.extend_from_slice(bytes);
                (bytes.len(), bytes.len())
            });
            if !matches!(took, Ok(1..)) {
                break;
            }
        }
        match socket.state() {
            State::CloseWait => socket.close(),
            State::Closed | State::TimeWait => {
                self.sockets.remove(handle);
                self.open = None;
                if self.answer.starts_with(OK) {
                    self.answered += 1;
                } else {
                    let start =
                        String::from_utf8_lossy(&self.answer[..self.answer.len().min(80)]).into_owned();
                    self.wrong = Some(format!("request {} was answered with {start:?}", self.begun));
                }
            }
            _ => {}
        }
    }

    fn connect(&mut self) {
        let Ok(ip) = ip_of(self.vm) else { return };
        let buffer = || SocketBuffer::new(vec![0; WINDOW]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        let port = FIRST_PORT + (self.begun % 40_000) as u16;
        let to = IpEndpoint::new(IpAddress::Ipv4(ip), 80);
        if socket.connect(self.interface.context(), to, (IpAddress::Ipv4(HOST_IP), port)).is_ok() {
            self.open = Some((self.sockets.add(socket), false));
            self.answer.clear();
            self.begun += 1;
        }
    }
}

/// Packets on their way.
#[derive(Default)]
struct Link {
    received: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
}

impl Device for Link {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        Some((Received(self.received.pop_front()?), Sending(&mut self.sent)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.sent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // A wrong checksum is a difference that should be seen.
        capabilities.checksum.ipv4 = Checksum::Both;
        capabilities.checksum.tcp = Checksum::Both;
        capabilities
    }
}

struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}
