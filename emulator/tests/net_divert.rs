//! The transport over a driver that diverts packets, as WinDivert does, with a driver of the test's own.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use emulator::net::address::{HOST_IP, HOST_MAC, ip_of, mac_of};
use emulator::net::capture::{Capture, Wire};
use emulator::net::divert::{Divert, DivertWire};
use emulator::net::lan::Watch;
use emulator::net::packet::{Ethernet, Ipv4};
use emulator::net::policy::Policy;
use emulator::net::reason::Reason;
use emulator::net::rewrite::{Ports, fill_checksums};
use etherparse::{PacketBuilder, TcpHeaderSlice};
use net_support::FakeLinks;

const PATIENCE: Duration = Duration::from_secs(5);
const PORTS: Ports = Ports { base: 4000, vms: 2, guest: 80 };

/// A stack that diverts what the test puts into it.
#[derive(Default)]
struct Stack {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    diverted: VecDeque<(Vec<u8>, u32)>,
    injected: Vec<(Vec<u8>, u32)>,
    fails: bool,
    down: bool,
}

struct Driver(Arc<Stack>);

impl Divert for Driver {
    type Address = u32;

    fn receive(&self, packet: &mut [u8]) -> io::Result<Option<(usize, u32)>> {
        let mut state = self.0.state.lock().unwrap();
        loop {
            if state.fails {
                return Err(io::Error::other("the driver was unloaded"));
            }
            if let Some((bytes, address)) = state.diverted.pop_front() {
                packet[..bytes.len()].copy_from_slice(&bytes);
                return Ok(Some((bytes.len(), address)));
            }
            if state.down {
                return Ok(None);
            }
            state = self.0.moved.wait(state).unwrap();
        }
    }

    fn send(&self, packet: &[u8], address: &u32) -> io::Result<()> {
        self.0.state.lock().unwrap().injected.push((packet.to_vec(), *address));
        self.0.moved.notify_all();
        Ok(())
    }

    fn answer(address: &u32) -> u32 {
        address + 1000
    }

    fn shut_down(&self) {
        self.0.state.lock().unwrap().down = true;
        self.0.moved.notify_all();
    }
}

impl Stack {
    fn divert(&self, packet: &[u8], address: u32) {
        self.state.lock().unwrap().diverted.push_back((packet.to_vec(), address));
        self.moved.notify_all();
    }

    /// Waits for the packet that was injected next.
    fn injected(&self) -> (Vec<u8>, u32) {
        let until = Instant::now() + PATIENCE;
        let mut state = self.state.lock().unwrap();
        while state.injected.is_empty() {
            assert!(Instant::now() < until, "nothing was injected");
            state = self.moved.wait_timeout(state, Duration::from_millis(50)).unwrap().0;
        }
        state.injected.remove(0)
    }
}

fn start() -> (Arc<Stack>, Arc<FakeLinks>, Capture, Watch) {
    let (stack, links, watch) = (Arc::new(Stack::default()), FakeLinks::new(2), Watch::new(2));
    let wire = Box::new(DivertWire::new(Driver(stack.clone())).unwrap());
    let capture =
        Capture::start("net-test", wire, &Policy::default(), PORTS, links.clone(), watch.clone()).unwrap();
    (stack, links, capture, watch)
}

fn packet(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), syn: bool, text: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.0.octets(), to.0.octets(), 128).tcp(from.1, to.1, 7, 1000);
    let builder = if syn { builder.syn() } else { builder.ack(8) };
    let mut packet = Vec::new();
    builder.write(&mut packet, text).unwrap();
    packet
}

const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;

#[test]
fn requests_and_answers_are_rewritten_and_injected() {
    let (stack, links, capture, watch) = start();
    // As a card would get it that computes checksums: they are missing.
    let mut request = packet((HERE, 50_000), (HERE, 4001), true, b"");
    request[10..12].fill(0);
    request[36..38].copy_from_slice(&[0xab, 0xcd]);
    stack.divert(&request, 7);
    let frame = links.vm_waits(1, PATIENCE).expect("no frame came");
    let ethernet = Ethernet::parse(&frame).unwrap();
    assert_eq!((ethernet.dst, ethernet.src), (mac_of(1).unwrap(), HOST_MAC));
    let ip = Ipv4::parse(ethernet.payload).unwrap();
    let segment = ip.segment().unwrap();
    assert_eq!(ip.verify_segment(&segment), Ok(()));
    assert_eq!((ip.src(), ip.dst()), (HOST_IP, ip_of(1).unwrap()));
    assert_eq!((segment.src_port, segment.dst_port), (50_000, 80));

    let answer = packet((ip_of(1).unwrap(), 80), (HOST_IP, 50_000), false, b"hello");
    assert!(links.vm_sends(1, &[&HOST_MAC[..], &mac_of(1).unwrap(), &[8, 0], &answer].concat()));
    let (injected, address) = stack.injected();
    assert_eq!(address, 1007, "the way back of the way that the request came");
    let ip = Ipv4::parse(&injected).unwrap();
    let segment = ip.segment().unwrap();
    assert_eq!(ip.verify_segment(&segment), Ok(()));
    let ends = (SocketAddrV4::new(ip.src(), segment.src_port), SocketAddrV4::new(ip.dst(), segment.dst_port));
    assert_eq!(ends, (SocketAddrV4::new(HERE, 4001), SocketAddrV4::new(HERE, 50_000)));
    assert!(injected.ends_with(b"hello"));
    capture.stop().unwrap();
    assert_eq!(watch.counters.snapshot().drops_total(), 0);
    assert!(stack.state.lock().unwrap().down, "the driver was not shut down");
}

#[test]
fn clients_of_vms_that_are_down_are_refused() {
    let (stack, links, capture, watch) = start();
    links.take_down(0);
    stack.divert(&packet((HERE, 50_000), (HERE, 4000), true, b""), 1);
    let (reset, _) = stack.injected();
    let ip = Ipv4::parse(&reset).unwrap();
    assert!(TcpHeaderSlice::from_slice(ip.payload()).unwrap().rst());
    assert_eq!((ip.src(), ip.dst()), (HERE, HERE));
    capture.stop().unwrap();
    assert_eq!(watch.counters.snapshot().dropped(Reason::Down), 1);
}

#[test]
fn what_the_driver_should_not_have_diverted_is_dropped() {
    let (stack, _links, capture, watch) = start();
    stack.divert(&[], 1);
    stack.divert(&[0x60; 60], 1);
    stack.divert(&packet((HERE, 1), (HERE, 4002), true, b""), 1);
    stack.divert(&packet((HERE, 1), (HERE, 4000), false, &[0; 60_000]), 1);
    let until = Instant::now() + PATIENCE;
    while watch.counters.snapshot().drops_total() < 4 {
        assert!(Instant::now() < until, "{:?}", watch.counters.snapshot());
        std::thread::sleep(Duration::from_millis(5));
    }
    let counters = watch.counters.snapshot();
    for reason in [Reason::Truncated, Reason::EtherType, Reason::Port, Reason::Oversized] {
        assert_eq!(counters.dropped(reason), 1, "{reason}: {counters:?}");
    }
    capture.stop().unwrap();
}

#[test]
fn it_stops_under_load_and_tells_when_the_driver_fails() {
    let (stack, _links, capture, _) = start();
    for n in 0..5000_u32 {
        stack.divert(&packet((HERE, n as u16), (HERE, 4000), true, b""), 1);
    }
    capture.stop().unwrap();

    let (stack, _links, capture, _) = start();
    stack.state.lock().unwrap().fails = true;
    stack.moved.notify_all();
    let until = Instant::now() + PATIENCE;
    while capture.is_running() {
        assert!(Instant::now() < until, "it still runs");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(capture.stop().is_err());
}

#[test]
fn wakers_end_a_wait() {
    let mut wire = DivertWire::new(Driver(Arc::default())).unwrap();
    let wake = wire.waker();
    let start = Instant::now();
    wire.wait(Some(Duration::from_millis(50))).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(50));
    std::thread::spawn(move || wake());
    wire.wait(None).unwrap();
    assert_eq!(wire.capture(&mut [0; 1500]).unwrap(), None);
}

#[test]
fn checksums_are_filled_in() {
    for text in [&b""[..], b"x", b"hello, world"] {
        let good = packet((HERE, 5), (HERE, 6), false, text);
        let mut bad = good.clone();
        bad[10..12].copy_from_slice(&[1, 2]);
        bad[36..38].copy_from_slice(&[3, 4]);
        fill_checksums(&mut bad);
        assert_eq!(bad, good);
    }
    for len in 0..60 {
        // What is no packet does no harm.
        fill_checksums(&mut vec![0x45; len]);
        fill_checksums(&mut vec![0xff; len]);
    }
}
