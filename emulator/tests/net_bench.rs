//! Figures of the bridge, with stub responders for VMs. Run in release:
//! `cargo test --release -p emulator --test net_bench -- --ignored --nocapture --test-threads 1`
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use emulator::backend::stub::Page;
use emulator::net::user::{Limits, UserBridge};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use net_support::guest::Behaviour;
use net_support::stub::Stubs;
use net_support::{FakeLinks, Fleet, bind_anywhere};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";

/// Microseconds of the bridge's processor time per request, at most: 5,000 requests/s take one core.
const MOST: f64 = 200.0;

fn page() -> Page {
    Page::new(400)
}

fn stubs(vms: u32, close: bool) -> (UserBridge, Stubs) {
    let links = FakeLinks::new(vms);
    let mut bridge = bind_anywhere(vms, Limits::default());
    bridge.start(links.clone()).unwrap();
    (bridge, Stubs::start(links, page(), close))
}

/// Processor time of this process's threads: of the bridge's, and of all.
fn processor_time() -> (Duration, Duration) {
    let (mut bridge, mut all) = (Duration::ZERO, Duration::ZERO);
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        // Nanoseconds on a processor come first in schedstat.
        let Ok(times) = std::fs::read_to_string(task.path().join("schedstat")) else { continue };
        let nanos = times.split_whitespace().next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0);
        all += Duration::from_nanos(nanos);
        if std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "net-user") {
            bridge += Duration::from_nanos(nanos);
        }
    }
    (bridge, all)
}

struct Client {
    stream: TcpStream,
    sent: bool,
    got: usize,
    began: Instant,
}

/// A closed loop of `clients`; each asks, reads the answer, and asks again until all together have asked `total` times.
/// Prints the rate; returns the bridge's processor time per request in microseconds, which depends less than the rate on
/// what else runs on the machine.
fn load(name: &str, bridge: &UserBridge, clients: usize, total: usize, close: bool) -> f64 {
    let ports = bridge.config().ports;
    let expected = page().answer().len();
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
    let (bridge_time, all_time) = processor_time();
    let each = |time: Duration| time.as_secs_f64() * 1e6 / total as f64;
    times.sort_unstable();
    let rate = total as f64 / took.as_secs_f64();
    println!(
        "{name}: {total} requests, {clients} at once, {} VMs: {rate:.0} requests/s, p50 {:.1?}, p99 {:.1?}; \
         processor time each: bridge {:.1} us, with load generator and stubs {:.1} us",
        ports.vms,
        times[total / 2],
        times[total * 99 / 100],
        each(bridge_time - processor.0),
        each(all_time - processor.1),
    );
    each(bridge_time - processor.0)
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
    let each = load("new connection each", &bridge, 64, 60_000, true);
    assert_eq!(bridge.counters().snapshot().drops_total(), 0, "{:?}", bridge.counters().snapshot());
    assert!(each < MOST);
}

#[test]
#[ignore = "a measurement: run in release"]
fn requests_per_second_on_kept_connections() {
    let (bridge, _stubs) = stubs(32, false);
    assert!(load("kept connections", &bridge, 64, 200_000, false) < MOST);
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
    let each = load("kept connections", &bridge, 1000, 200_000, false);
    assert_eq!(bridge.counters().snapshot().connections_total, 1000);
    assert!(each < MOST);
    let (bridge, _stubs) = stubs(32, true);
    assert!(load("new connection each", &bridge, 1000, 60_000, true) < MOST);
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
    println!("idle: {:?} of the bridge's processor time in 5 s", processor_time().0 - before.0);
}
