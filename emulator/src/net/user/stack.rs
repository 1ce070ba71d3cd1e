//! The host side's TCP: one smoltcp interface for the whole LAN, and one socket set per connection.
//!
//! smoltcp walks a whole socket set for each packet; with one socket to a set, and sets found by port, a packet costs
//! the same whether one connection is open or ten thousand, and idle connections cost nothing.

use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::Instant as Ticks;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpEndpoint};

use crate::net::address::{HOST_IP, PREFIX_LEN, ip_of};
use crate::net::lan::Lan;
use crate::net::packet::{FRAME_MAX, FrameBuf, Ipv4, MTU};
use crate::net::record::Direction;
use crate::net::rewrite::{PacketBuf, frame_to_vm, only_fin};

/// Ports from here up are used for connections to VMs.
const FIRST_PORT: u16 = 1024;
/// How long an acknowledgement waits for data or an end to go with it. Each packet wakes a guest and costs it some
/// thousand instructions; TCP allows 500 ms, and a second full segment is acknowledged at once.
const ACK_DELAY: Duration = Duration::from_millis(10);
/// Packets that one connection may send in a row before others get their turn.
const BURST: usize = 64;

/// One connection's TCP.
pub struct Tcp {
    set: SocketSet<'static>,
    handle: SocketHandle,
    /// The last acknowledgement sent.
    acked: u32,
}

impl Tcp {
    /// The socket.
    pub fn socket(&mut self) -> &mut Socket<'static> {
        self.set.get_mut(self.handle)
    }
}

/// smoltcp failed on a packet or a timer: the connection can't go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crashed;

/// What a round of sending did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Packets sent.
    pub packets: usize,
    /// There is more to send, but the VM has no room.
    pub starved: bool,
}

/// The host side's TCP/IP.
pub struct Stack {
    interface: Interface,
    no_sockets: SocketSet<'static>,
    next_port: Vec<u16>,
    window: usize,
    start: Instant,
}

impl Stack {
    /// TCP towards `vms` VMs, with buffers of `window` bytes in each direction of a connection.
    pub fn new(vms: u32, window: usize, now: Instant) -> Self {
        let seed = RandomState::new().hash_one(vms);
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut NoDevice, Ticks::ZERO);
        interface.update_ip_addrs(|addresses| {
            // The list has room for two.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(HOST_IP), PREFIX_LEN));
        });
        // Another run on the same VMs should not meet the ports that the last one left behind.
        let first = FIRST_PORT + (seed % u64::from(u16::MAX - FIRST_PORT)) as u16;
        Self {
            interface,
            no_sockets: SocketSet::new(Vec::new()),
            next_port: vec![first; vms as usize],
            window,
            start: now,
        }
    }

    /// The next port for a connection to VM `vm`. Each VM's ports go round, so that one is used again as late as
    /// possible: the VM may still hold its last connection in TIME-WAIT. None if all are taken.
    pub fn port(&mut self, vm: u32, taken: impl Fn(u16) -> bool) -> Option<u16> {
        let next = self.next_port.get_mut(vm as usize)?;
        for _ in FIRST_PORT..=u16::MAX {
            let port = *next;
            *next = if port == u16::MAX { FIRST_PORT } else { port + 1 };
            if !taken(port) {
                return Some(port);
            }
        }
        None
    }

    /// Starts a connection from `port` to VM `vm`. Its first packet goes with [`Stack::send`].
    ///
    /// Sockets are made anew each time: smoltcp's reset leaves parts of the last connection's state behind.
    pub fn connect(&mut self, vm: u32, port: u16, guest_port: u16) -> Option<Tcp> {
        let to = IpEndpoint::new(IpAddress::Ipv4(ip_of(vm).ok()?), guest_port);
        let from = (IpAddress::Ipv4(HOST_IP), port);
        let buffer = || SocketBuffer::new(vec![0; self.window]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY.into()));
        socket.connect(self.interface.context(), to, from).ok()?;
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Some(Tcp { set, handle, acked: 0 })
    }

    /// Waits for a connection from a VM to `port` of the host side. Its first packet comes with [`Stack::receive`].
    pub fn listen(&mut self, port: u16) -> Option<Tcp> {
        let buffer = || SocketBuffer::new(vec![0; self.window]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY.into()));
        socket.listen((IpAddress::Ipv4(HOST_IP), port)).ok()?;
        let mut set = SocketSet::new(Vec::with_capacity(1));
        let handle = set.add(socket);
        Some(Tcp { set, handle, acked: 0 })
    }

    /// Hands a packet from VM `vm` to its connection.
    pub fn receive(
        &mut self,
        tcp: &mut Tcp,
        vm: u32,
        packet: &[u8],
        lan: &mut Lan,
        now: Instant,
    ) -> Result<(), Crashed> {
        let time = self.time(now);
        // smoltcp ignores a FIN that comes with data that it has: it would wait for that FIN for ever.
        let mut trimmed: PacketBuf = [0; MTU];
        let fin = Ipv4::parse(packet).ok().and_then(|ip| only_fin(&ip, tcp.acked, &mut trimmed));
        let packet = fin.map_or(packet, |len| &trimmed[..len]);
        let acked = Some(&mut tcp.acked);
        let mut port = Port { rx: Some(packet), acked, ..Port::new(vm, lan, now) };
        guard(|| {
            self.interface.poll_ingress_single(time, &mut port, &mut tcp.set);
        })
    }

    /// Answers a packet that belongs to no connection, as TCP wants it: with a reset, unless it is one.
    pub fn reject(&mut self, vm: u32, packet: &[u8], lan: &mut Lan, now: Instant) -> Result<(), Crashed> {
        let time = self.time(now);
        let mut port = Port { rx: Some(packet), ..Port::new(vm, lan, now) };
        guard(|| {
            self.interface.poll_ingress_single(time, &mut port, &mut self.no_sockets);
        })
    }

    /// Sends what a connection has to send. With `copy`, the last packet's frame is kept there.
    pub fn send(
        &mut self,
        tcp: &mut Tcp,
        vm: u32,
        lan: &mut Lan,
        now: Instant,
        copy: Option<&mut Option<Box<[u8]>>>,
    ) -> Result<Sent, Crashed> {
        let time = self.time(now);
        let mut port = Port { copy, acked: Some(&mut tcp.acked), ..Port::new(vm, lan, now) };
        let mut packets = 0;
        guard(|| {
            while packets < BURST {
                match self.interface.poll_egress(time, &mut port, &mut tcp.set) {
                    PollResult::None => break,
                    PollResult::SocketStateChanged => packets += 1,
                }
            }
        })?;
        Ok(Sent { packets, starved: port.starved })
    }

    /// When [`Stack::send`] has something to do without another event.
    pub fn next_send(&mut self, tcp: &Tcp, now: Instant) -> Result<Option<Instant>, Crashed> {
        let time = self.time(now);
        let at = guard(|| self.interface.poll_at(time, &tcp.set))?;
        Ok(at.map(|at| if at > time { now + (at - time).into() } else { now }))
    }

    fn time(&self, now: Instant) -> Ticks {
        Ticks::from_micros(now.saturating_duration_since(self.start).as_micros() as i64)
    }
}

/// Runs smoltcp. Should a guest's packet ever make it panic, only that guest's connection is lost.
fn guard<T>(run: impl FnOnce() -> T) -> Result<T, Crashed> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|_| Crashed)
}

fn capabilities() -> DeviceCapabilities {
    let mut capabilities = DeviceCapabilities::default();
    capabilities.medium = Medium::Ip;
    capabilities.max_transmission_unit = MTU;
    // What arrives was checked, and counted if it was wrong, before it came here.
    capabilities.checksum.ipv4 = Checksum::Tx;
    capabilities.checksum.tcp = Checksum::Tx;
    capabilities
}

/// One VM's link as smoltcp's device: at most one packet to receive, and sending into the VM's mailbox.
struct Port<'a> {
    vm: u32,
    lan: &'a mut Lan,
    now: Instant,
    rx: Option<&'a [u8]>,
    starved: bool,
    copy: Option<&'a mut Option<Box<[u8]>>>,
    acked: Option<&'a mut u32>,
}

impl<'a> Port<'a> {
    fn new(vm: u32, lan: &'a mut Lan, now: Instant) -> Self {
        Self { vm, lan, now, rx: None, starved: false, copy: None, acked: None }
    }
}

impl Device for Port<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Sending<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Ticks) -> Option<(Received<'_>, Sending<'_>)> {
        let packet = self.rx.take()?;
        let Self { vm, lan, now, acked, .. } = self;
        let acked = acked.as_deref_mut();
        Some((Received(packet), Sending { vm: *vm, lan, now: *now, copy: None, acked }))
    }

    fn transmit(&mut self, _: Ticks) -> Option<Sending<'_>> {
        if !self.lan.has_room(self.vm) {
            self.starved = true;
            return None;
        }
        Some(Sending {
            vm: self.vm,
            lan: self.lan,
            now: self.now,
            copy: self.copy.as_deref_mut(),
            acked: self.acked.as_deref_mut(),
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}

struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Sending<'a> {
    vm: u32,
    lan: &'a mut Lan,
    now: Instant,
    copy: Option<&'a mut Option<Box<[u8]>>>,
    acked: Option<&'a mut u32>,
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = [0; MTU];
        let result = f(&mut packet[..len]);
        // Without options, an IPv4 header has 20 bytes; the stack makes no others.
        if let (Some(acked), Some(field)) =
            (self.acked, packet[..len].get(28..32).and_then(|f| f.first_chunk()))
        {
            *acked = u32::from_be_bytes(*field);
        }
        let mut frame: FrameBuf = [0; FRAME_MAX];
        match frame_to_vm(&packet[..len], self.vm, &mut frame) {
            Ok(len) => {
                self.lan.send(self.vm, &frame[..len], self.now);
                if let Some(copy) = self.copy {
                    *copy = Some(frame[..len].into());
                }
            }
            Err(reason) => self.lan.counters().dropped(Some(self.vm), Direction::In, reason),
        }
        result
    }
}

/// Stands for the device while the interface is made: smoltcp only asks for its capabilities.
struct NoDevice;

impl Device for NoDevice {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Ticks) -> Option<(Received<'_>, Sending<'_>)> {
        None
    }

    fn transmit(&mut self, _: Ticks) -> Option<Sending<'_>> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities()
    }
}
