//! Figures of the bridge, with stub responders for VMs. Run in release:
//! `cargo test --release -p emulator --test net_bench -- --ignored --nocapture --test-threads 1`
#![allow(missing_docs)]

mod net_support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use emulator::net::user::{Limits, UserBridge};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use net_support::guest::Behaviour;
use net_support::stub::Stubs;
use net_support::{FakeLinks, Fleet, bind_anywhere};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";

fn answer() -> Vec<u8> {
    let page = vec![b'x'; 400];
    [format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", page.len()).as_bytes(), &page].concat()
}

fn stubs(vms: u32, close: bool) -> (UserBridge, Stubs) {
    let links = FakeLinks::new(vms);
    let mut bridge = bind_anywhere(vms, Limits::default());
    bridge.start(links.clone()).unwrap();
    (bridge, Stubs::start(links, answer(), close))
}

/// Processor time of this whole process, all threads.
fn processor_time() -> Duration {
    let usage = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = usage.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

struct Client {
    stream: TcpStream,
    sent: bool,
    got: usize,
    began: Instant,
}

/// A closed loop of `clients`; each asks, reads the answer, and asks again until all together have asked `total` times.
/// Prints and returns requests per second.
fn load(name: &str, bridge: &UserBridge, clients: usize, total: usize, close: bool) -> f64 {
    let ports = bridge.config().ports;
    let expected = answer().len();
    let mut poll = Poll::new().unwrap();
    let mut events = Events::with_capacity(1024);
    let connect = |poll: &Poll, slot: usize, n: usize| {
        let port = ports.base + (n % ports.vms as usize) as u16;
        let mut stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap();
        let interest = Interest::READABLE | Interest::WRITABLE;
        poll.registry().register(&mut stream, Token(slot), interest).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream, sent: false, got: 0, began: Instant::now() }
    };
    let mut open: Vec<Option<Client>> = (0..clients).map(|slot| Some(connect(&poll, slot, slot))).collect();
    let (mut asked, mut done) = (clients, 0);
    let mut times = Vec::with_capacity(total);
    let (start, processor) = (Instant::now(), processor_time());
    let mut buffer = vec![0; 16 * 1024];
    while done < total {
        poll.poll(&mut events, Some(Duration::from_secs(20))).unwrap();
        assert!(
            !events.is_empty(),
            "nothing for 20 s after {done} answers: {:?}",
            bridge.counters().snapshot()
        );
        for event in &events {
            let slot = event.token().0;
            let Some(client) = &mut open[slot] else { continue };
            if !client.sent {
                match client.stream.write(REQUEST) {
                    Ok(bytes) => assert_eq!(bytes, REQUEST.len()),
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                        continue;
                    }
                    Err(error) => panic!("{error}: {:?}", bridge.counters().snapshot()),
                }
                client.sent = true;
            }
            let ended = loop {
                match client.stream.read(&mut buffer) {
                    Ok(0) => break true,
                    Ok(bytes) => client.got += bytes,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
                    Err(error) => panic!("{error}: {:?}", bridge.counters().snapshot()),
                }
            };
            if (close && !ended) || client.got < expected {
                assert!(!ended, "{} bytes of {expected}", client.got);
                continue;
            }
            assert_eq!(client.got, expected);
            times.push(client.began.elapsed());
            done += 1;
            if asked == total {
                continue;
            }
            asked += 1;
            if close {
                open[slot] = None;
                open[slot] = Some(connect(&poll, slot, asked));
            } else {
                *client = Client {
                    stream: std::mem::replace(&mut client.stream, never()),
                    sent: true,
                    got: 0,
                    began: Instant::now(),
                };
                assert_eq!(client.stream.write(REQUEST).unwrap(), REQUEST.len());
            }
        }
    }
    let took = start.elapsed();
    let processor = processor_time() - processor;
    times.sort_unstable();
    let rate = total as f64 / took.as_secs_f64();
    println!(
        "{name}: {total} requests, {clients} at once, {} VMs: {rate:.0} requests/s, p50 {:?}, p99 {:?}, \
         {:.0} us of processor time each (load generator and stubs included)",
        ports.vms,
        times[total / 2],
        times[total * 99 / 100],
        processor.as_secs_f64() * 1e6 / total as f64,
    );
    rate
}

/// A stream to put in another's place for a moment.
fn never() -> TcpStream {
    let (one, _) = std::os::unix::net::UnixStream::pair().unwrap();
    TcpStream::from_std(std::net::TcpStream::from(std::os::fd::OwnedFd::from(one)))
}

#[test]
#[ignore = "a measurement: run in release"]
fn requests_per_second_with_new_connections() {
    let (bridge, _stubs) = stubs(32, true);
    let rate = load("new connection each", &bridge, 64, 60_000, true);
    assert_eq!(bridge.counters().snapshot().drops_total(), 0, "{:?}", bridge.counters().snapshot());
    assert!(rate > 5000.0);
}

#[test]
#[ignore = "a measurement: run in release"]
fn requests_per_second_on_kept_connections() {
    let (bridge, _stubs) = stubs(32, false);
    assert!(load("kept connections", &bridge, 64, 200_000, false) > 5000.0);
}

#[test]
#[ignore = "a measurement: run in release"]
fn requests_per_second_of_one_vm() {
    let (bridge, _stubs) = stubs(1, true);
    load("new connection each, one VM", &bridge, 64, 30_000, true);
    let (bridge, _stubs) = stubs(1, true);
    load("new connection each, one VM, one client", &bridge, 1, 10_000, true);
}

#[test]
#[ignore = "a measurement: run in release"]
fn a_thousand_connections_at_once() {
    let (bridge, _stubs) = stubs(32, false);
    let rate = load("kept connections", &bridge, 1000, 200_000, false);
    assert_eq!(bridge.counters().snapshot().connections_total, 1000);
    assert!(rate > 5000.0);
    let (bridge, _stubs) = stubs(32, true);
    assert!(load("new connection each", &bridge, 1000, 60_000, true) > 5000.0);
    let (bridge, _stubs) = stubs(4096, true);
    load("new connection each", &bridge, 1000, 60_000, true);
}

#[test]
#[ignore = "a measurement: run in release"]
fn bytes_per_second_of_one_connection() {
    const SIZE: usize = 64 << 20;
    let fleet = Fleet::new(vec![Behaviour::Body(SIZE), Behaviour::Count]);
    let mut client = fleet.connect(0);
    client.write_all(b"x").unwrap();
    let start = Instant::now();
    let mut got = 0;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match client.read(&mut buffer).unwrap() {
            0 => break,
            bytes => got += bytes,
        }
    }
    assert_eq!(got, SIZE);
    println!("down: {:.0} MB/s", SIZE as f64 / 1e6 / start.elapsed().as_secs_f64());

    let mut client = fleet.connect(1);
    let data: Vec<u8> = (0..SIZE).map(net_support::guest::pattern).collect();
    let start = Instant::now();
    client.write_all(&data).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, format!("got {SIZE}"));
    println!("up: {:.0} MB/s", SIZE as f64 / 1e6 / start.elapsed().as_secs_f64());
}

/// What an idle bridge costs: nothing, also with connections open.
#[test]
#[ignore = "a measurement: run in release"]
fn idle_costs_nothing() {
    let (bridge, _stubs) = stubs(4096, false);
    load("kept connections", &bridge, 1000, 1000, false);
    drop(_stubs);
    let before = processor_time();
    std::thread::sleep(Duration::from_secs(5));
    println!("idle: {:?} of processor time in 5 s", processor_time() - before);
}
