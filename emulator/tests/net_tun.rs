//! The `tun` bridge against fake VMs, in network namespaces of the tests' own.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;
#[path = "net_support/netns.rs"]
mod netns;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use emulator::net::Links;
use emulator::net::address::ip_of;
use emulator::net::bridge::{Bridge, Error};
use emulator::net::policy::{Policy, Service, Services};
use emulator::net::ports::PortsError;
use emulator::net::reason::Reason;
use emulator::net::rewrite::Ports;
use emulator::net::tun::{TunBridge, TunError};
use net_support::guest::{Behaviour, Guest};
use net_support::{FakeLinks, run_guests};
use netns::{alone, ping};

const PORTS: u16 = 4000;

fn ports(vms: u32) -> Ports {
    Ports { base: PORTS, vms, guest: 80 }
}

/// Fake VMs and a bridge in front of them.
struct Lab {
    links: Arc<FakeLinks>,
    bridge: TunBridge,
    stop: Arc<AtomicBool>,
    guests: Option<std::thread::JoinHandle<Vec<Guest>>>,
}

impl Lab {
    fn new(behaviours: Vec<Behaviour>, services: &[Service]) -> Self {
        let links = FakeLinks::new(behaviours.len() as u32);
        let services = Services::new(services).unwrap();
        let mut bridge =
            TunBridge::bind(ports(links.vms()), Policy { services, ..Policy::default() }).unwrap();
        bridge.start(links.clone()).unwrap();
        let guests = behaviours.into_iter().enumerate().map(|(vm, how)| Guest::new(vm as u32, how, &links));
        let mut guests: Vec<Guest> = guests.collect();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, all) = (stop.clone(), links.clone());
        let guests = std::thread::spawn(move || {
            run_guests(&mut guests, &all, &stopped);
            guests
        });
        Self { links, bridge, stop, guests: Some(guests) }
    }

    fn pages(vms: usize) -> Self {
        let page = |vm| Behaviour::Http(format!("page of VM {vm}").into_bytes());
        Self::new((0..vms).map(page).collect(), &[])
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.guests.take().map(std::thread::JoinHandle::join);
    }
}

fn connect(address: Ipv4Addr, port: u16) -> std::io::Result<TcpStream> {
    let to = SocketAddrV4::new(address, port);
    let stream = TcpStream::connect_timeout(&to.into(), Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    Ok(stream)
}

fn get(address: Ipv4Addr, port: u16) -> String {
    let mut stream = connect(address, port).unwrap_or_else(|error| panic!("{address}:{port}: {error}"));
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn rules() -> String {
    let output = std::process::Command::new("ip").args(["-4", "rule"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn vms_are_reached_at_the_hosts_ports_and_at_their_own_addresses() {
    alone(|| {
        let lab = Lab::pages(3);
        for vm in 0..3 {
            let page = format!("page of VM {vm}");
            assert!(get(Ipv4Addr::LOCALHOST, PORTS + vm as u16).ends_with(&page));
            assert!(get(ip_of(vm).unwrap(), 80).ends_with(&page));
            assert!(ping(ip_of(vm).unwrap(), vm as u16, 56, Duration::from_secs(5)).is_some());
            assert!(ping(ip_of(vm).unwrap(), vm as u16, 1472, Duration::from_secs(5)).is_some());
        }
        let counters = lab.bridge.watch().counters.snapshot();
        assert_eq!(counters.dropped(Reason::NoConnection), 0, "{counters:?}");
        assert_eq!(counters.dropped(Reason::Checksum), 0, "{counters:?}");
        // What is not for VMs goes where it went before.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORTS + 3)).unwrap();
        assert!(connect(Ipv4Addr::LOCALHOST, PORTS + 3).is_ok());
        drop(listener);
    });
}

#[test]
fn many_bytes_go_both_ways() {
    alone(|| {
        const SIZE: usize = 4 << 20;
        let _lab = Lab::new(vec![Behaviour::Body(SIZE), Behaviour::Count], &[]);
        let mut client = connect(Ipv4Addr::LOCALHOST, PORTS).unwrap();
        client.write_all(b"x").unwrap();
        let mut body = Vec::new();
        client.read_to_end(&mut body).unwrap();
        assert_eq!(body.len(), SIZE);
        assert!(body.iter().enumerate().all(|(at, byte)| *byte == net_support::guest::pattern(at)));

        let mut client = connect(ip_of(1).unwrap(), 80).unwrap();
        let data: Vec<u8> = (0..SIZE).map(net_support::guest::pattern).collect();
        client.write_all(&data).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("got {SIZE}"));
    });
}

/// One port number of the client's, used for the host's port and for the VM's address at once.
#[test]
fn connections_that_look_alike_to_the_vm_are_kept_apart() {
    alone(|| {
        use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
        let _lab = Lab::new(vec![Behaviour::Echo], &[]);
        let open = |from: Ipv4Addr, to: Ipv4Addr, port: u16| {
            let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
            bind(&socket, &SocketAddrV4::new(from, 33_333)).unwrap();
            connect(&socket, &SocketAddrV4::new(to, port)).unwrap();
            TcpStream::from(socket)
        };
        let mut one = open(Ipv4Addr::new(10, 77, 0, 1), ip_of(0).unwrap(), 80);
        let mut two = open(Ipv4Addr::LOCALHOST, Ipv4Addr::LOCALHOST, PORTS);
        for (stream, text) in [(&mut one, "one"), (&mut two, "two")] {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            stream.write_all(text.as_bytes()).unwrap();
            let mut answer = [0; 3];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, text.as_bytes());
        }
    });
}

#[test]
fn nobody_there_is_told_at_once() {
    alone(|| {
        let lab = Lab::new(vec![Behaviour::NoServer, Behaviour::Silent], &[]);
        let refused = |address, port| {
            let start = Instant::now();
            assert_eq!(connect(address, port).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert!(start.elapsed() < Duration::from_secs(1));
        };
        // The fake VM loses what it answers before it has asked for the host side's address.
        assert!(connect(Ipv4Addr::LOCALHOST, PORTS).is_err());
        refused(Ipv4Addr::LOCALHOST, PORTS);
        refused(ip_of(0).unwrap(), 80);
        refused(ip_of(2).unwrap(), 80);
        lab.links.take_down(1);
        refused(Ipv4Addr::LOCALHOST, PORTS + 1);
        let counters = lab.bridge.watch().counters.snapshot();
        assert_eq!(counters.dropped(Reason::UnknownDestination), 1);
        assert_eq!(counters.dropped(Reason::Down), 1);
    });
}

/// Of the host, VMs reach what was listed, and nothing else.
#[test]
fn services_of_the_host() {
    alone(|| {
        use emulator::net::address::{HOST_IP, HOST_MAC, mac_of};
        let listed = TcpListener::bind((Ipv4Addr::LOCALHOST, 5432)).unwrap();
        let unlisted = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 5433)).unwrap();
        unlisted.set_nonblocking(true).unwrap();
        let lab = Lab::new(vec![Behaviour::Silent], &[Service { host: 5432, guest: 15432 }]);
        let syn = |port: u16| {
            let mut packet = Vec::new();
            etherparse::PacketBuilder::ipv4(ip_of(0).unwrap().octets(), HOST_IP.octets(), 64)
                .tcp(1025, port, 7, 1000)
                .syn()
                .write(&mut packet, &[])
                .unwrap();
            let frame = [&HOST_MAC[..], &mac_of(0).unwrap(), &[8, 0], &packet].concat();
            assert!(lab.links.vm_sends(0, &frame));
            loop {
                let frame = lab.links.vm_waits(0, Duration::from_secs(5)).unwrap();
                let parsed = etherparse::PacketHeaders::from_ethernet_slice(&frame).unwrap();
                if let Some(etherparse::TransportHeader::Tcp(tcp)) = parsed.transport {
                    assert_eq!((&frame[26..30], tcp.source_port), (&HOST_IP.octets()[..], port));
                    assert_eq!((tcp.acknowledgment_number, tcp.destination_port), (8, 1025));
                    break (tcp.syn, tcp.rst);
                }
            }
        };
        assert_eq!(syn(15432), (true, false));
        drop(listed);
        for port in [5432, 5433, 22, PORTS] {
            assert_eq!(syn(port), (false, true), "port {port}");
        }
        assert_eq!(unlisted.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(lab.bridge.watch().counters.snapshot().dropped(Reason::NoConnection), 4);
    });
}

#[test]
fn rules_and_ports_are_given_back() {
    alone(|| {
        let before = rules();
        let mut lab = Lab::pages(2);
        assert_ne!(rules(), before);
        assert!(matches!(
            TunBridge::bind(Ports { base: 6000, ..ports(1) }, Policy::default()),
            Err(Error::Tun(TunError::Busy))
        ));
        assert!(matches!(
            TunBridge::bind(ports(2), Policy::default()),
            Err(Error::Ports(PortsError::Taken { port: PORTS, .. }))
        ));
        assert!(get(Ipv4Addr::LOCALHOST, PORTS).ends_with("page of VM 0"));
        lab.bridge.stop().unwrap();
        assert_eq!(rules(), before);
        drop(lab);
        // Bound, but never started.
        drop(TunBridge::bind(ports(2), Policy::default()).unwrap());
        assert_eq!(rules(), before);
        let _listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORTS)).unwrap();
        assert!(connect(Ipv4Addr::LOCALHOST, PORTS).is_ok());
    });
}

#[test]
fn a_device_that_is_taken_away_is_told() {
    alone(|| {
        let before = rules();
        let mut lab = Lab::pages(1);
        assert!(!lab.bridge.has_failed());
        assert!(std::process::Command::new("ip").args(["link", "del", "lg0"]).status().unwrap().success());
        let end = Instant::now() + Duration::from_secs(5);
        while !lab.bridge.has_failed() {
            assert!(Instant::now() < end, "it goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(lab.bridge.stop().is_err());
        assert_eq!(rules(), before);
    });
}

#[test]
fn routes_of_others_are_an_error() {
    alone(|| {
        let ip = |words: &str| {
            assert!(std::process::Command::new("ip").args(words.split(' ')).status().unwrap().success());
        };
        ip("tuntap add dev other mode tun");
        ip("addr add 10.77.3.1/24 dev other");
        ip("link set other up");
        let before = rules();
        let Err(error) = TunBridge::bind(ports(1), Policy::default()) else { panic!("bound") };
        let text = error.to_string();
        assert!(text.contains("10.77.3.0/24") && text.contains("other"), "{text}");
        assert_eq!(rules(), before);
    });
}
