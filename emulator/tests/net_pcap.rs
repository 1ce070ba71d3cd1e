//! pcapng: what a stream holds, read back block by block, with every checksum computed anew.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;
#[path = "net_support/netns.rs"]
mod netns;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use emulator::net::bridge::Bridge;
use emulator::net::checksum;
use emulator::net::packet::{Carries, Ethernet, Ipv4};
use emulator::net::policy::Policy;
use emulator::net::rewrite::Ports;
use emulator::net::tap::PcapStream;
use emulator::net::tun::TunBridge;
use net_support::guest::{Behaviour, Guest};
use net_support::{FakeLinks, Fleet, run_guests};

/// A packet of the file.
#[derive(Debug)]
struct Packet {
    interface: String,
    inbound: bool,
    bytes: Vec<u8>,
    comment: Option<String>,
}

fn options(mut bytes: &[u8]) -> HashMap<u16, Vec<u8>> {
    let mut found = HashMap::new();
    while bytes.len() >= 4 {
        let code = u16::from_le_bytes([bytes[0], bytes[1]]);
        let len = usize::from(u16::from_le_bytes([bytes[2], bytes[3]]));
        if code == 0 {
            break;
        }
        found.insert(code, bytes[4..4 + len].to_vec());
        bytes = &bytes[4 + len.next_multiple_of(4)..];
    }
    found
}

/// Reads a whole file, strictly.
fn read(mut file: &[u8]) -> Vec<Packet> {
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(word(file, 0), 0x0a0d_0d0a);
    assert_eq!(word(file, 8), 0x1a2b_3c4d);
    let (mut interfaces, mut packets) = (Vec::new(), Vec::new());
    let mut last = 0;
    while !file.is_empty() {
        let len = word(file, 4) as usize;
        assert!(len.is_multiple_of(4) && word(file, len - 4) as usize == len);
        let body = &file[8..len - 4];
        match word(file, 0) {
            1 => {
                let options = options(&body[8..]);
                let name = String::from_utf8(options[&2].clone()).unwrap();
                assert_eq!(options[&9], [9], "nanoseconds");
                let link = u16::from_le_bytes([body[0], body[1]]);
                assert_eq!(link, if name == "host" { 101 } else { 1 });
                interfaces.push(name);
            }
            6 => {
                let size = word(body, 12) as usize;
                assert_eq!(word(body, 16) as usize, size);
                let time = (u64::from(word(body, 4)) << 32) | u64::from(word(body, 8));
                assert!(time >= last, "time runs back");
                last = time;
                let options = options(&body[20 + size.next_multiple_of(4)..]);
                packets.push(Packet {
                    interface: interfaces[word(body, 0) as usize].clone(),
                    inbound: options[&2][0] & 3 == 1,
                    bytes: body[20..20 + size].to_vec(),
                    comment: options.get(&1).map(|text| String::from_utf8(text.clone()).unwrap()),
                });
            }
            0x0a0d_0d0a | 5 => {}
            other => panic!("block of type {other:#x}"),
        }
        file = &file[len..];
    }
    packets
}

/// Reads all that has come.
fn drain(stream: &mut PcapStream) -> Vec<u8> {
    let mut file = Vec::new();
    loop {
        match stream.read(Duration::from_millis(200)) {
            Some(bytes) if bytes.is_empty() && !file.is_empty() => return file,
            Some(bytes) => file.extend(bytes),
            None => return file,
        }
    }
}

fn check_sums(packet: &Packet) {
    let ip = match packet.interface.as_str() {
        "host" => &packet.bytes,
        _ => {
            let ethernet = Ethernet::parse(&packet.bytes).unwrap();
            if ethernet.carries != Carries::Ipv4 {
                return;
            }
            ethernet.payload
        }
    };
    // This checks the header's checksum.
    let ip = Ipv4::parse(ip).unwrap_or_else(|reason| panic!("{packet:?}: {reason}"));
    match ip.segment() {
        Ok(segment) => assert_eq!(ip.verify_segment(&segment), Ok(()), "{packet:?}"),
        Err(_) => assert_eq!(checksum::of(ip.payload()), 0, "ICMP: {packet:?}"),
    }
}

fn get(port: u16) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"));
}

#[test]
fn the_user_bridge_shows_the_vms_links() {
    let page = || Behaviour::Http(b"hello".to_vec());
    let fleet = Fleet::new(vec![page(), page()]);
    let tap = &fleet.bridge.watch().tap;
    let (mut all, mut one) = (tap.stream(None), tap.stream(Some(1)));
    get(fleet.base);
    get(fleet.base + 1);
    // The last acknowledgements are still on their way.
    fleet.settle(Duration::from_secs(5));
    let (all, one) = (read(&drain(&mut all)), read(&drain(&mut one)));
    all.iter().chain(&one).for_each(check_sums);
    for (packets, interface) in [(&all, "vm0"), (&all, "vm1"), (&one, "vm1")] {
        let text = |inbound, text: &str| {
            packets.iter().any(|packet| {
                packet.interface == interface
                    && packet.inbound == inbound
                    && packet.bytes.windows(text.len()).any(|part| part == text.as_bytes())
            })
        };
        assert!(text(true, "GET / HTTP/1.1") && text(false, "hello"), "{interface}: {packets:?}");
    }
    assert!(one.iter().all(|packet| packet.interface == "vm1"), "{one:?}");
}

#[test]
fn the_tun_bridge_shows_both_sides() {
    netns::alone(|| {
        let links = FakeLinks::new(2);
        let ports = Ports { base: 4000, vms: 2, guest: 80 };
        let mut bridge = TunBridge::bind(ports, Policy::default()).unwrap();
        bridge.start(links.clone()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, all) = (stop.clone(), links.clone());
        let guests = std::thread::spawn(move || {
            let page = |vm| Guest::new(vm, Behaviour::Http(b"hello".to_vec()), &all);
            run_guests(&mut [page(0), page(1)], &all, &stopped);
        });
        let (mut all, mut one) = (bridge.watch().tap.stream(None), bridge.watch().tap.stream(Some(1)));
        get(4001);
        assert!(netns::ping(Ipv4Addr::new(10, 77, 0, 3), 1, 56, Duration::from_secs(5)).is_some());
        // A spoofed frame, and one that nobody wants.
        assert!(links.vm_sends(0, &[2; 60]));
        let dropped = || bridge.watch().counters.snapshot().drops_total();
        let end = Instant::now() + Duration::from_secs(5);
        while dropped() == 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        bridge.stop().unwrap();
        stop.store(true, Ordering::Release);
        guests.join().unwrap();

        let whole = read(&drain(&mut all));
        let good: Vec<&Packet> = whole.iter().filter(|packet| packet.comment.is_none()).collect();
        good.iter().for_each(|packet| check_sums(packet));
        let place = |port: u16, interface: &str, inbound: bool, at: usize| {
            good.iter().any(|packet| {
                packet.interface == interface
                    && packet.inbound == inbound
                    && packet.bytes.get(at..at + 2) == Some(&port.to_be_bytes())
                    && packet.bytes.windows(5).any(|part| part == b"GET /" || part == b"hello")
            })
        };
        // The request before and after rewriting, and the answer.
        assert!(place(4001, "host", false, 22) && place(80, "vm1", true, 36));
        assert!(place(80, "vm1", false, 34) && place(4001, "host", true, 20));
        let spoofed = whole.iter().find(|packet| packet.bytes == [2; 60]).unwrap();
        assert_eq!(spoofed.interface, "vm0");
        assert!(spoofed.comment.as_ref().unwrap().contains("dropped"), "{spoofed:?}");
        let one = read(&drain(&mut one));
        assert!(one.iter().any(|packet| packet.interface == "host"));
        assert!(one.iter().all(|packet| packet.interface != "vm0"));
    });
}
