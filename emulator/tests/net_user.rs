//! The user bridge against fake VMs: every way a connection can go.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use emulator::net::user::Limits;
use net_support::Fleet;
use net_support::guest::{Behaviour, pattern};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

fn page(text: &str) -> Behaviour {
    Behaviour::Http(text.as_bytes().to_vec())
}

fn get(fleet: &Fleet, vm: u32) -> Vec<u8> {
    let mut client = fleet.connect(vm);
    client.write_all(REQUEST).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    answer
}

fn assert_reset(client: &mut TcpStream) {
    let mut rest = Vec::new();
    match client.read_to_end(&mut rest) {
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        Ok(_) => panic!("an orderly end after {} bytes", rest.len()),
    }
}

#[test]
fn every_vm_serves_its_page() {
    let fleet = Fleet::new((0..8).map(|vm| page(&format!("I am {vm}"))).collect());
    for vm in (0..8).rev() {
        let answer = get(&fleet, vm);
        assert!(answer.ends_with(format!("I am {vm}").as_bytes()), "{}", String::from_utf8_lossy(&answer));
    }
    fleet.settle(Duration::from_secs(2));
    let counters = fleet.bridge.counters().snapshot();
    assert_eq!(counters.connections_total, 8);
    assert_eq!(counters.connections_reset + counters.connections_timed_out + counters.connections_refused, 0);
    assert!(counters.packets_in >= 8 * 4 && counters.packets_out >= 8 * 3, "{counters:?}");
    assert_eq!(counters.drops_total(), 0, "{counters:?}");
}

#[test]
fn megabytes_both_ways_at_once() {
    const SIZE: usize = 3 << 20;
    let fleet = Fleet::new(vec![Behaviour::Echo]);
    let client = fleet.connect(0);
    let mut writer = client.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let data: Vec<u8> = (0..SIZE).map(pattern).collect();
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut got = Vec::new();
    (&client).read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    assert_eq!(got.len(), SIZE);
    assert!(got.iter().enumerate().all(|(at, byte)| *byte == pattern(at)));
    fleet.settle(Duration::from_secs(2));
}

#[test]
fn half_closed_clients_get_their_answer() {
    let fleet = Fleet::new(vec![Behaviour::Count]);
    for size in [0, 1, 1460, 100_000, 2 << 20] {
        let mut client = fleet.connect(0);
        let data: Vec<u8> = (0..size).map(pattern).collect();
        client.write_all(&data).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("got {size}"));
    }
    fleet.settle(Duration::from_secs(2));
    // The VM's end was acknowledged before the connection was forgotten: it does not say it again.
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(fleet.bridge.counters().snapshot().drops_total(), 0);
}

#[test]
fn acknowledgements_go_with_the_next_request() {
    const REQUESTS: u64 = 20;
    let fleet = Fleet::new(vec![Behaviour::Echo]);
    let mut client = fleet.connect(0);
    let mut packets = || {
        let before = fleet.bridge.counters().snapshot().packets_in;
        for _ in 0..REQUESTS {
            client.write_all(b"hello").unwrap();
            client.read_exact(&mut [0; 5]).unwrap();
        }
        fleet.bridge.counters().snapshot().packets_in - before
    };
    // Where the machine is busy, a request may come too late for that.
    assert!(
        (0..10).any(|_| packets() < REQUESTS + 5),
        "each answer is acknowledged with a packet of its own"
    );
}

#[test]
fn slow_readers_of_close_delimited_bodies_get_everything() {
    const SIZE: usize = 2 << 20;
    let fleet = Fleet::new(vec![Behaviour::Body(SIZE)]);
    let mut client = fleet.connect(0);
    client.write_all(b"x").unwrap();
    // Long enough for all buffers on the way to fill.
    std::thread::sleep(Duration::from_millis(500));
    let mut got = 0;
    let mut data = vec![0; 64 * 1024];
    loop {
        let bytes = client.read(&mut data).unwrap();
        if bytes == 0 {
            break;
        }
        assert!(data[..bytes].iter().enumerate().all(|(at, byte)| *byte == pattern(got + at)));
        got += bytes;
        if got < SIZE / 4 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!(got, SIZE);
    drop(client);
    fleet.settle(Duration::from_secs(2));
}

#[test]
fn hundreds_of_clients_at_a_vm_with_few_slots() {
    let fleet = Fleet::new(vec![page("busy"), page("other")]);
    std::thread::scope(|scope| {
        for _ in 0..300 {
            scope.spawn(|| assert!(get(&fleet, 0).ends_with(b"busy")));
        }
        scope.spawn(|| {
            let start = Instant::now();
            assert!(get(&fleet, 1).ends_with(b"other"));
            assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        });
    });
    fleet.settle(Duration::from_secs(5));
}

#[test]
fn silent_vms_end_with_a_reset() {
    let limits = Limits { connect: Duration::from_millis(600), ..Limits::default() };
    let fleet = Fleet::with_limits(vec![Behaviour::Silent], limits);
    // More than may shake hands at once: the limit holds for those that wait, too.
    let mut clients: Vec<TcpStream> = (0..40).map(|_| fleet.connect(0)).collect();
    let start = Instant::now();
    for client in &mut clients {
        assert_reset(client);
    }
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    fleet.settle(Duration::from_secs(1));
    assert_eq!(fleet.bridge.counters().snapshot().connections_timed_out, 40);
}

#[test]
fn clients_wait_for_a_vm_that_boots() {
    let boot = Duration::from_millis(2300);
    let fleet = Fleet::new(vec![Behaviour::Late(boot, b"awake".to_vec())]);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..30 {
            scope.spawn(|| assert!(get(&fleet, 0).ends_with(b"awake")));
        }
    });
    let took = start.elapsed();
    assert!(took >= boot && took < boot + Duration::from_millis(2500), "{took:?}");
    fleet.settle(Duration::from_secs(2));
}

#[test]
fn vms_that_are_down_refuse() {
    let fleet = Fleet::new(vec![Behaviour::Mute, page("up")]);
    let mut open = fleet.connect(0);
    open.write_all(REQUEST).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    fleet.links.take_down(0);
    let start = Instant::now();
    assert_reset(&mut open);
    assert_reset(&mut fleet.connect(0));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(get(&fleet, 1).ends_with(b"up"));
    fleet.settle(Duration::from_secs(2));
    let counters = fleet.bridge.counters().snapshot();
    assert_eq!((counters.connections_reset, counters.connections_refused), (1, 1));
}

#[test]
fn a_vm_without_a_server_refuses() {
    let fleet = Fleet::new(vec![Behaviour::NoServer]);
    let start = Instant::now();
    assert_reset(&mut fleet.connect(0));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    fleet.settle(Duration::from_secs(1));
    assert_eq!(fleet.bridge.counters().snapshot().connections_refused, 1);
}

#[test]
fn resets_go_through_from_the_vm() {
    let fleet = Fleet::new(vec![Behaviour::Abort]);
    let mut client = fleet.connect(0);
    client.write_all(REQUEST).unwrap();
    assert_reset(&mut client);
    fleet.settle(Duration::from_secs(1));
    assert_eq!(fleet.bridge.counters().snapshot().connections_reset, 1);
}

#[test]
fn resets_go_through_from_the_client() {
    let fleet = Fleet::new(vec![Behaviour::Mute]);
    for _ in 0..20 {
        let mut client = fleet.connect(0);
        client.write_all(REQUEST).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    }
    fleet.settle(Duration::from_secs(2));
    let guests = fleet.finish();
    assert_eq!(guests[0].resets, 20);
}

#[test]
fn a_vm_may_close_first() {
    let fleet = Fleet::new(vec![Behaviour::CloseEarly]);
    let mut client = fleet.connect(0);
    let mut nothing = Vec::new();
    assert_eq!(client.read_to_end(&mut nothing).unwrap(), 0);
    drop(client);
    fleet.settle(Duration::from_secs(2));
    assert_eq!(fleet.bridge.counters().snapshot().connections_reset, 0);
}

#[test]
fn idle_and_half_closed_connections_have_limits() {
    let limits = Limits {
        idle: Duration::from_millis(700),
        half_closed: Duration::from_millis(300),
        ..Limits::default()
    };
    let fleet = Fleet::with_limits(vec![Behaviour::Mute, Behaviour::CloseEarly], limits);
    let mut idle = fleet.connect(0);
    let lazy = fleet.connect(1);
    let start = Instant::now();
    assert_reset(&mut idle);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(600) && took < Duration::from_secs(2), "{took:?}");
    fleet.settle(Duration::from_secs(2));
    assert_eq!(fleet.bridge.counters().snapshot().connections_timed_out, 2);
    drop(lazy);
}

#[test]
fn a_vm_that_vanishes_is_given_up() {
    let limits = Limits { silence: Duration::from_millis(800), ..Limits::default() };
    let fleet = Fleet::with_limits(vec![Behaviour::Vanish], limits);
    let mut client = fleet.connect(0);
    client.write_all(&[7; 4096]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    client.write_all(&[7; 4096]).unwrap();
    let start = Instant::now();
    assert_reset(&mut client);
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(600) && took < Duration::from_secs(3), "{took:?}");
    assert_eq!(fleet.bridge.counters().snapshot().connections_timed_out, 1);
    // The reset to the VM may find no room there: even then the connection is forgotten in the end.
    fleet.settle(Duration::from_secs(25));
}

#[test]
fn loss_and_disorder_cost_time_but_no_bytes() {
    const SIZE: usize = 256 * 1024;
    let fleet = Fleet::new(vec![Behaviour::Count, Behaviour::Body(SIZE), page("x")]);
    fleet.links.faults.store(40, std::sync::atomic::Ordering::Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = fleet.connect(0);
            client.write_all(&(0..SIZE).map(pattern).collect::<Vec<u8>>()).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, format!("got {SIZE}"));
        });
        scope.spawn(|| {
            let mut client = fleet.connect(1);
            client.write_all(b"x").unwrap();
            let mut got = Vec::new();
            client.read_to_end(&mut got).unwrap();
            assert_eq!(got.len(), SIZE);
            assert!(got.iter().enumerate().all(|(at, byte)| *byte == pattern(at)));
        });
        for _ in 0..30 {
            scope.spawn(|| assert!(get(&fleet, 2).ends_with(b"x")));
        }
    });
    fleet.settle(Duration::from_secs(40));
}

#[test]
fn more_connections_than_allowed_wait_for_their_turn() {
    let limits = Limits { connections: 10, connections_per_vm: 3, handshakes_per_vm: 2, ..Limits::default() };
    let fleet = Fleet::with_limits(vec![page("a"), page("b")], limits);
    std::thread::scope(|scope| {
        for n in 0..60_u32 {
            let fleet = &fleet;
            scope.spawn(move || assert!(get(fleet, n % 2).ends_with(if n % 2 == 0 { b"a" } else { b"b" })));
        }
    });
    fleet.settle(Duration::from_secs(2));
}

#[cfg(target_os = "linux")]
#[test]
fn stopping_closes_everything_and_frees_the_ports() {
    let fleet = Fleet::new(vec![Behaviour::Mute; 4]);
    let mut clients: Vec<TcpStream> = (0..4).map(|vm| fleet.connect(vm)).collect();
    for client in &mut clients {
        client.write_all(REQUEST).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    let base = fleet.base;
    fleet.finish();
    for client in &mut clients {
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
        assert!(rest.is_empty());
    }
    let again = emulator::net::user::UserBridge::bind(emulator::net::user::Config::new(base, 4));
    assert!(again.is_ok());
}
