//! The bridge at the level of frames: switching between VMs, full mailboxes, hostile guests, ports.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use emulator::net::address::{HOST_IP, HOST_MAC, ip_of, mac_of};
use emulator::net::counters::Snapshot;
use emulator::net::ports::PortsError;
use emulator::net::reason::Reason;
use emulator::net::user::{Config, Error, Limits, UserBridge};
use etherparse::PacketBuilder;
use net_support::guest::Behaviour;
use net_support::{FakeLinks, Fleet, RING, bind_anywhere};

const PATIENCE: Duration = Duration::from_secs(2);

fn bridge(vms: u32) -> (Arc<FakeLinks>, UserBridge) {
    let links = FakeLinks::new(vms);
    let mut bridge = bind_anywhere(vms, Limits::default());
    bridge.start(links.clone()).unwrap();
    (links, bridge)
}

fn udp(from: u32, to: u32, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(mac_of(from).unwrap(), mac_of(to).unwrap())
        .ipv4(ip_of(from).unwrap().octets(), ip_of(to).unwrap().octets(), 64)
        .udp(1000, 2000);
    let mut frame = Vec::new();
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn tcp_to_host(from: u32, src_port: u16, dst_port: u16, seq: u32, ack: Option<u32>, flags: u8) -> Vec<u8> {
    let mut builder = PacketBuilder::ethernet2(mac_of(from).unwrap(), HOST_MAC)
        .ipv4(ip_of(from).unwrap().octets(), HOST_IP.octets(), 64)
        .tcp(src_port, dst_port, seq, 1000);
    if let Some(ack) = ack {
        builder = builder.ack(ack);
    }
    for (bit, set) in [(1, 0), (2, 1), (4, 2), (8, 3)] {
        if flags & bit != 0 {
            builder = match set {
                0 => builder.fin(),
                1 => builder.syn(),
                2 => builder.rst(),
                _ => builder.psh(),
            };
        }
    }
    let mut frame = Vec::new();
    builder.write(&mut frame, b"").unwrap();
    frame
}

fn wait_for(bridge: &UserBridge, condition: impl Fn(&Snapshot) -> bool) -> Snapshot {
    let counters = bridge.counters();
    for _ in 0..2000 {
        let snapshot = counters.snapshot();
        if condition(&snapshot) {
            return snapshot;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{:?}", counters.snapshot());
}

#[test]
fn frames_between_vms_are_switched() {
    let (links, bridge) = bridge(3);
    let frame = udp(0, 2, b"hello");
    assert!(links.vm_sends(0, &frame));
    assert_eq!(links.vm_waits(2, PATIENCE), Some(frame.clone()));
    assert_eq!(links.vm_receives(1), None);
    let counters = bridge.counters().snapshot();
    assert_eq!((counters.packets_out, counters.packets_in), (1, 1));
    assert_eq!((counters.bytes_out, counters.bytes_in), (frame.len() as u64, frame.len() as u64));

    // Spoofed, to nobody, and to a VM that is down.
    assert!(links.vm_sends(1, &frame));
    let mut nobody = frame.clone();
    nobody[5] = 77;
    assert!(links.vm_sends(0, &nobody));
    links.take_down(2);
    assert!(links.vm_sends(0, &frame));
    let counters = wait_for(&bridge, |now| now.drops_total() == 3);
    for reason in [Reason::WrongSourceMac, Reason::UnknownDestination, Reason::Down] {
        assert_eq!(counters.dropped(reason), 1, "{reason}");
    }
    assert_eq!(links.vm_receives(2), None);
}

#[test]
fn a_vm_that_takes_nothing_costs_a_bounded_queue() {
    let (links, bridge) = bridge(3);
    let mut sent: u64 = 0;
    while sent < 500 {
        if links.vm_sends(0, &udp(0, 1, &(sent as u32).to_be_bytes())) {
            sent += 1;
        } else {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    let counters = wait_for(&bridge, |now| now.packets_out == sent);
    let dropped = wait_for(&bridge, |now| now.dropped(Reason::QueueFull) > 400).dropped(Reason::QueueFull);
    assert_eq!(counters.packets_in, RING as u64);
    // Others are not concerned.
    let other = udp(0, 2, b"x");
    assert!(links.vm_sends(0, &other));
    assert_eq!(links.vm_waits(2, PATIENCE), Some(other));
    // The thread does not spin meanwhile: tries become rare.
    std::thread::sleep(Duration::from_millis(500));
    let before = links.deliveries.load(Ordering::Relaxed);
    std::thread::sleep(Duration::from_millis(1000));
    let tries = links.deliveries.load(Ordering::Relaxed) - before;
    assert!(tries <= 10, "{tries} tries in a second");
    // When it takes again, it gets what was kept, in order.
    let kept = sent - dropped;
    for expected in 0..kept as u32 {
        let frame = links.vm_waits(1, PATIENCE).unwrap();
        assert_eq!(frame[42..46], expected.to_be_bytes());
    }
    assert_eq!(links.vm_receives(1), None);
}

#[test]
fn what_waits_for_a_vm_is_dropped_when_it_goes_down() {
    let (links, bridge) = bridge(2);
    for _ in 0..2 {
        for _ in 0..RING {
            assert!(links.vm_sends(0, &udp(0, 1, b"x")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    links.take_down(1);
    let counters = wait_for(&bridge, |now| now.drops_total() > 0);
    assert_eq!(counters.dropped(Reason::Down), RING as u64);
}

#[test]
fn tcp_outside_any_connection_is_reset() {
    let (links, bridge) = bridge(1);
    assert!(links.vm_sends(0, &tcp_to_host(0, 80, 3000, 100, Some(555), 0)));
    let answer = links.vm_waits(0, PATIENCE).unwrap();
    assert_eq!(answer[..6], mac_of(0).unwrap());
    let tcp = etherparse::TcpHeader::from_slice(&answer[34..]).unwrap().0;
    assert!(tcp.rst);
    assert_eq!((tcp.source_port, tcp.destination_port, tcp.sequence_number), (3000, 80, 555));
    // A reset is not answered with a reset, and UDP finds nobody.
    assert!(links.vm_sends(0, &tcp_to_host(0, 80, 3000, 100, Some(555), 4)));
    let udp = PacketBuilder::ethernet2(mac_of(0).unwrap(), HOST_MAC)
        .ipv4(ip_of(0).unwrap().octets(), HOST_IP.octets(), 64)
        .udp(1000, 53);
    let mut frame = Vec::new();
    udp.write(&mut frame, b"x").unwrap();
    assert!(links.vm_sends(0, &frame));
    // Nor is anything with a wrong checksum.
    let mut damaged = tcp_to_host(0, 80, 3000, 100, Some(555), 0);
    damaged[50] ^= 1;
    assert!(links.vm_sends(0, &damaged));
    let counters = wait_for(&bridge, |now| now.drops_total() == 4);
    assert_eq!(counters.dropped(Reason::NoConnection), 2);
    assert_eq!(counters.dropped(Reason::Protocol), 1);
    assert_eq!(counters.dropped(Reason::Checksum), 1);
    assert_eq!(links.vm_receives(0), None);
}

/// A VM that answers a connection with arbitrary TCP hurts only itself.
#[test]
fn hostile_tcp_hurts_only_its_own_connection() {
    let behaviours = vec![Behaviour::Silent, Behaviour::Http(b"fine".to_vec())];
    let limits = Limits { connect: Duration::from_secs(2), ..Limits::default() };
    let fleet = Fleet::with_limits(behaviours, limits);
    let mut state = 0x1234_5678_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u32
    };
    for round in 0..60 {
        let mut client = fleet.connect(0);
        client.write_all(b"hello").unwrap();
        let Some(syn) = fleet.links.vm_waits(0, PATIENCE) else { panic!("no SYN in round {round}") };
        let header = etherparse::TcpHeader::from_slice(&syn[34..]).unwrap().0;
        if !header.syn {
            continue; // The end of an earlier round.
        }
        let (port, iss) = (header.source_port, header.sequence_number);
        let mine = random();
        let send = |frame: &[u8]| {
            while !fleet.links.vm_sends(0, frame) {
                std::thread::sleep(Duration::from_micros(50));
            }
            while fleet.links.vm_receives(0).is_some() {}
        };
        if round % 4 != 0 {
            send(&tcp_to_host(0, 80, port, mine, Some(iss.wrapping_add(1)), 2));
        }
        for _ in 0..200 {
            let near = |base: u32, n: u32| match n % 4 {
                0 => base.wrapping_add(n >> 4 & 3),
                1 => base.wrapping_sub(n >> 4 & 3),
                2 => base.wrapping_add(n >> 12),
                _ => n,
            };
            let flags = (random() & 0xb) as u8 | if random() % 64 == 0 { 4 } else { 0 };
            let ack = (random() % 8 != 0).then(|| near(iss.wrapping_add(1), random()));
            let mut frame = tcp_to_host(0, 80, port, near(mine.wrapping_add(1), random()), ack, flags);
            let extra = random() as usize % 1400;
            frame.extend((0..extra).map(|n| n as u8));
            let len = (frame.len() - 14) as u16;
            frame[16..18].copy_from_slice(&len.to_be_bytes());
            // Window, urgent pointer and data offset (options made of payload) as they come.
            frame[48..50].copy_from_slice(&random().to_be_bytes()[..2]);
            if extra > 40 && random() % 2 == 0 {
                frame[46] = (5 + (random() % 11) as u8) << 4;
            }
            repair(&mut frame);
            send(&frame);
        }
        drop(client);
    }
    let mut client = fleet.connect(1);
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert!(answer.ends_with(b"fine"));
    let counters = fleet.bridge.counters().snapshot();
    assert_eq!(counters.dropped(Reason::Stack), 0, "{counters:?}");
}

/// Makes both checksums right again.
fn repair(frame: &mut [u8]) {
    use emulator::net::checksum;
    frame[24..26].copy_from_slice(&[0, 0]);
    let sum = checksum::of(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame[50..52].copy_from_slice(&[0, 0]);
    let sum = checksum::of_segment(ip_of(0).unwrap(), HOST_IP, 6, &frame[34..]);
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn a_taken_port_is_named_with_its_owner_and_nothing_stays_bound() {
    let base = bind_anywhere(5, Limits::default()).config().ports.base + 1;
    let mut first = UserBridge::bind(Config::new(base, 4)).unwrap();
    let error = UserBridge::bind(Config::new(base - 1, 4)).err().unwrap();
    assert!(matches!(error, Error::Ports(PortsError::Taken { vm: 1, port, .. }) if port == base), "{error}");
    let text = error.to_string();
    assert!(text.contains("--port-base"), "{text}");
    if cfg!(target_os = "linux") {
        assert!(text.contains(&format!("(process {})", std::process::id())), "{text}");
    }
    // Neither the ports below the taken one, nor those of the bridge that is stopped.
    assert!(TcpListener::bind(SocketAddrV4::new([127, 0, 0, 1].into(), base - 1)).is_ok());
    first.stop().unwrap();
    assert!(UserBridge::bind(Config::new(base, 4)).is_ok());
}

#[test]
fn a_bridge_starts_once_and_only_for_its_fleet() {
    let links = FakeLinks::new(2);
    let mut bridge = bind_anywhere(3, Limits::default());
    assert!(matches!(bridge.start(links), Err(Error::Vms { ports: 3, vms: 2 })));
    let links = FakeLinks::new(3);
    assert!(!bridge.is_serving());
    bridge.start(links.clone()).unwrap();
    assert!(bridge.is_serving());
    assert!(matches!(bridge.start(links.clone()), Err(Error::Started)));
    bridge.stop().unwrap();
    assert!(!bridge.is_serving());
    bridge.stop().unwrap();
    assert!(matches!(bridge.start(links.clone()), Err(Error::Started)));
    drop(bridge);
    // Nobody but the test holds the links any more: the thread is gone.
    assert_eq!(Arc::strong_count(&links), 1);
}

/// Runs one of this file's ignored tests in a process of its own that may open so many files.
#[cfg(unix)]
fn with_files(limit: u32, test: &str) {
    let status = std::process::Command::new("sh")
        .args(["-c", &format!("ulimit -n {limit} && exec \"$0\" --exact --ignored {test}")])
        .arg(std::env::current_exe().unwrap())
        .status()
        .unwrap();
    assert!(status.success(), "{test}: {status}");
}

#[cfg(unix)]
#[test]
fn files_are_limited() {
    with_files(300, "child_too_few_files");
    with_files(760, "child_out_of_files");
}

#[cfg(unix)]
#[test]
#[ignore = "run by files_are_limited"]
fn child_too_few_files() {
    let error = UserBridge::bind(Config::new(20_000, 500)).err().unwrap();
    assert!(matches!(error, Error::Ports(PortsError::Files { vms: 500, limit: 300, .. })), "{error}");
}

/// The clients are in the same process here, so that its files run out before the bridge's own limit holds.
#[cfg(unix)]
#[test]
#[ignore = "run by files_are_limited"]
fn child_out_of_files() {
    let fleet = Fleet::new(vec![Behaviour::Http(b"fine".to_vec()); 500]);
    let mut clients = Vec::new();
    while let Ok(client) = std::net::TcpStream::connect(("127.0.0.1", fleet.base)) {
        clients.push(client);
    }
    assert!(clients.len() > 100, "{}", clients.len());
    std::thread::sleep(Duration::from_millis(300));
    assert!(fleet.bridge.is_serving());
    drop(clients);
    fleet.settle(Duration::from_secs(10));
    for vm in [0, 499] {
        let mut client = fleet.connect(vm);
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert!(answer.ends_with(b"fine"));
    }
}
