//! What a policy allows and refuses, on the `user` bridge: services of the host, isolation, rates.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use emulator::net::Links;
use emulator::net::address::{HOST_IP, HOST_MAC, ip_of, mac_of};
use emulator::net::policy::{Policy, Service, Services};
use emulator::net::rate;
use emulator::net::reason::Reason;
use emulator::net::record::Direction;
use emulator::net::user::{Limits, UserBridge};
use etherparse::{PacketBuilder, PacketHeaders, TcpHeader, TransportHeader};
use net_support::{FakeLinks, bind_anywhere_with};

const PATIENCE: Duration = Duration::from_secs(5);

fn bridge(vms: u32, policy: Policy) -> (Arc<FakeLinks>, UserBridge) {
    let links = FakeLinks::new(vms);
    let mut bridge = bind_anywhere_with(vms, Limits::default(), policy);
    bridge.start(links.clone()).unwrap();
    (links, bridge)
}

/// A VM's TCP, as little of it as a test needs: nothing is lost here.
struct Tcp<'a> {
    links: &'a FakeLinks,
    vm: u32,
    port: u16,
    to: u16,
    seq: u32,
    ack: u32,
    inbox: VecDeque<u8>,
    ended: bool,
}

impl<'a> Tcp<'a> {
    fn send(&mut self, syn: bool, fin: bool, data: &[u8]) {
        let builder = PacketBuilder::ethernet2(mac_of(self.vm).unwrap(), HOST_MAC)
            .ipv4(ip_of(self.vm).unwrap().octets(), HOST_IP.octets(), 64)
            .tcp(self.port, self.to, self.seq, 60_000);
        let builder = if syn { builder.syn() } else { builder.ack(self.ack) };
        let builder = if fin { builder.fin() } else { builder };
        let mut frame = Vec::new();
        builder.write(&mut frame, data).unwrap();
        assert!(self.links.vm_sends(self.vm, &frame));
        self.seq = self.seq.wrapping_add(data.len() as u32 + u32::from(syn) + u32::from(fin));
    }

    /// The next segment, acknowledged if there is anything to acknowledge.
    fn receive(&mut self) -> TcpHeader {
        let frame = self.links.vm_waits(self.vm, PATIENCE).expect("no segment in time");
        let parsed = PacketHeaders::from_ethernet_slice(&frame).unwrap();
        let Some(TransportHeader::Tcp(tcp)) = parsed.transport else { panic!("{parsed:?}") };
        assert_eq!((tcp.source_port, tcp.destination_port), (self.to, self.port));
        let data = parsed.payload.slice();
        if tcp.syn {
            self.ack = tcp.sequence_number.wrapping_add(1);
        } else if tcp.sequence_number == self.ack && !tcp.rst {
            self.inbox.extend(data);
            self.ack = self.ack.wrapping_add(data.len() as u32 + u32::from(tcp.fin));
            self.ended |= tcp.fin;
        }
        if tcp.syn || tcp.fin || !data.is_empty() {
            self.send(false, false, b"");
        }
        tcp
    }

    /// Connects from a port of VM `vm` to a port of the host side; none if it is refused.
    fn connect(links: &'a FakeLinks, vm: u32, port: u16, to: u16) -> Option<Self> {
        let mut tcp = Self { links, vm, port, to, seq: 77, ack: 0, inbox: VecDeque::new(), ended: false };
        tcp.send(true, false, b"");
        let answer = tcp.receive();
        assert_eq!(answer.acknowledgment_number, 78);
        assert_ne!(answer.syn, answer.rst, "{answer:?}");
        answer.syn.then_some(tcp)
    }

    fn read(&mut self, len: usize) -> Vec<u8> {
        while self.inbox.len() < len {
            self.receive();
        }
        self.inbox.drain(..len).collect()
    }
}

/// Sends back what it gets, on a port of its own, until its client ends.
fn echo_service() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            std::thread::spawn(move || {
                let mut client = client.unwrap();
                let mut buffer = [0; 4096];
                while let Ok(len @ 1..) = client.read(&mut buffer) {
                    client.write_all(&buffer[..len]).unwrap();
                }
            });
        }
    });
    port
}

#[test]
fn vms_use_listed_services_and_nothing_else() {
    let port = echo_service();
    let closed = {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.local_addr().unwrap().port()
    };
    let services = [Service { host: port, guest: 7 }, Service { host: closed, guest: 8 }];
    let policy = Policy { services: Services::new(&services).unwrap(), ..Policy::default() };
    let (links, bridge) = bridge(2, policy);

    // Two VMs with the same port, at once, and a second connection of one of them.
    let mut all: Vec<Tcp<'_>> = [(0, 1024), (1, 1024), (0, 1025)]
        .map(|(vm, from)| Tcp::connect(&links, vm, from, 7).expect("refused"))
        .into();
    for (n, tcp) in all.iter_mut().enumerate() {
        let data: Vec<u8> = (0..1000).map(|at| (at * 7 + n) as u8).collect();
        tcp.send(false, false, &data);
        assert_eq!(tcp.read(1000), data);
    }
    // Each side's end is passed on.
    for tcp in &mut all {
        tcp.send(false, true, b"");
        while !tcp.ended {
            tcp.receive();
        }
    }
    let end = Instant::now() + PATIENCE;
    while bridge.counters().snapshot().connections_open > 0 {
        assert!(Instant::now() < end, "{:?}", bridge.counters().snapshot());
        std::thread::sleep(Duration::from_millis(5));
    }
    // Nobody there, and not listed.
    assert!(Tcp::connect(&links, 0, 2000, 8).is_none());
    assert!(Tcp::connect(&links, 0, 2001, port).is_none());
    assert!(Tcp::connect(&links, 0, 2002, 9).is_none());
    assert_eq!(bridge.counters().snapshot().connections_refused, 1);
}

/// Segments come in the wrong order, the last one with a FIN, as when one was lost. What comes again ends the connection.
#[test]
fn a_fin_behind_a_gap_is_not_lost() {
    let port = echo_service();
    let services = Services::new(&[Service { host: port, guest: 7 }]).unwrap();
    let (links, _bridge) = bridge(1, Policy { services, ..Policy::default() });
    let mut tcp = Tcp::connect(&links, 0, 1024, 7).expect("refused");
    let first = tcp.seq;
    tcp.seq = first + 3;
    tcp.send(false, true, b"def");
    tcp.seq = first;
    tcp.send(false, false, b"abc");
    // All of the data is acknowledged now, but not the FIN, which came too early to be taken.
    while tcp.receive().acknowledgment_number != first + 6 {}
    tcp.seq = first + 3;
    tcp.send(false, true, b"def");
    while tcp.receive().acknowledgment_number != first + 7 {}
    while !tcp.ended {
        tcp.receive();
    }
    assert_eq!(tcp.inbox, *b"abcdef");
}

#[test]
fn by_default_there_are_no_services() {
    let port = echo_service();
    let (links, bridge) = bridge(1, Policy::default());
    assert!(Tcp::connect(&links, 0, 2001, port).is_none());
    assert_eq!(bridge.counters().snapshot().dropped(Reason::NoConnection), 1);
}

fn to_vm(from: u32, to: u32, text: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac_of(from).unwrap(), mac_of(to).unwrap())
        .ipv4(ip_of(from).unwrap().octets(), ip_of(to).unwrap().octets(), 64)
        .udp(1, 2)
        .write(&mut frame, text)
        .unwrap();
    frame
}

#[test]
fn isolated_vms_do_not_reach_one_another() {
    let (links, bridge) = bridge(2, Policy { isolated: true, ..Policy::default() });
    assert!(links.vm_sends(0, &to_vm(0, 1, b"hello")));
    assert_eq!(links.vm_waits(1, Duration::from_millis(200)), None);
    let counters = bridge.counters();
    assert_eq!(counters.snapshot().dropped(Reason::Isolated), 1);
    assert_eq!(counters.vm(0).unwrap().dropped(Direction::Out, Reason::Isolated), 1);
    assert_eq!(counters.vm(1).unwrap().drops(Direction::In).count(), 0);
}

#[test]
fn a_flooding_vm_is_held_to_its_rate_and_others_are_not() {
    let limits = rate::Limits { packets: 100, bytes: 0 };
    let (links, bridge) = bridge(4, Policy { limits, ..Policy::default() });
    // Ten times as many as pass at once.
    let mut sent = 0;
    while sent < 250 {
        if links.vm_sends(0, &to_vm(0, 1, b"flood")) {
            sent += 1;
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
        while links.vm_receives(1).is_some() {}
    }
    assert!(links.vm_sends(2, &to_vm(2, 3, b"calm")));
    assert!(links.vm_waits(3, PATIENCE).unwrap().ends_with(b"calm"));
    let counters = bridge.counters();
    let (flooding, calm) = (counters.vm(0).unwrap(), counters.vm(2).unwrap());
    assert_eq!(flooding.packets_out, 250);
    assert!(flooding.dropped(Direction::Out, Reason::RateLimit) > 100, "{flooding:?}");
    assert_eq!(calm.drops(Direction::Out).count(), 0);
}

/// However many VMs there are, a broadcast is one frame, and ARP is answered for all.
#[test]
fn broadcasts_are_not_multiplied() {
    const VMS: u32 = 32_768;
    let links = FakeLinks::new(VMS);
    let mut lan =
        emulator::net::lan::Lan::new(links.clone(), emulator::net::lan::Watch::new(VMS), &Policy::default());
    let mut frame = [0; 1514];
    let mut arp = vec![0xff; 6];
    arp.extend(mac_of(5).unwrap());
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(mac_of(5).unwrap());
    arp.extend(ip_of(5).unwrap().octets());
    arp.extend([0; 6]);
    arp.extend(ip_of(VMS - 1).unwrap().octets());
    assert!(links.vm_sends(5, &arp));
    let dhcp = [&[0xff; 6][..], &mac_of(5).unwrap(), &[8, 0], &to_vm(5, 6, b"x")[14..]].concat();
    assert!(links.vm_sends(5, &dhcp));
    while lan.take(5, &mut frame, Instant::now()).is_ok() {}
    // One answer, to the one that asked, and nothing else.
    let answer = links.vm_receives(5).unwrap();
    assert_eq!((&answer[..6], &answer[6..12]), (&mac_of(5).unwrap()[..], &mac_of(VMS - 1).unwrap()[..]));
    assert!(links.vm_receives(5).is_none());
    assert!((0..links.vms()).all(|vm| links.vm_receives(vm).is_none()));
    assert_eq!(lan.counters().snapshot().dropped(Reason::Broadcast), 1);
}
