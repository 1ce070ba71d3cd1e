//! The HTTP probe behind `--until http`.
#![allow(clippy::unwrap_used, missing_docs)]

mod net_support;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use emulator::net::probe::{Failure, Probe, Target};
use emulator::net::user::Limits;
use net_support::Fleet;
use net_support::guest::Behaviour;

fn probe(fleet: &Fleet, deadline: Duration) -> Probe {
    Probe {
        reach: emulator::net::bridge::Bridge::reach(&fleet.bridge),
        at_once: 64,
        patience: Duration::from_secs(5),
        deadline: Some(Instant::now() + deadline),
    }
}

fn page() -> Behaviour {
    Behaviour::Http(b"hello".to_vec())
}

#[test]
fn all_answer_some_late() {
    let late = |ms| Behaviour::Late(Duration::from_millis(ms), b"late".to_vec());
    let mut behaviours = vec![page(); 100];
    behaviours[7] = late(700);
    behaviours[93] = late(1300);
    let fleet = Fleet::new(behaviours);
    let start = Instant::now();
    let mut seen = Vec::new();
    let outcome = probe(&fleet, Duration::from_secs(20))
        .run(|_| Target::Ready, &AtomicBool::new(false), |vm, _| seen.push(vm))
        .unwrap();
    assert_eq!((outcome.answered, outcome.failures), (100, vec![]));
    seen.sort_unstable();
    assert_eq!(seen, (0..100).collect::<Vec<_>>());
    let (first, last) = (outcome.first.unwrap() - start, outcome.last.unwrap() - start);
    assert!(first < Duration::from_millis(700), "{first:?}");
    assert!(last >= Duration::from_millis(1200) && last < Duration::from_millis(3000), "{last:?}");
    fleet.settle(Duration::from_secs(2));
    assert_eq!(fleet.bridge.counters().snapshot().connections_reset, 0);
}

#[test]
fn vms_that_are_not_ready_are_not_asked() {
    let fleet = Fleet::new(vec![page(); 3]);
    let start = Instant::now();
    let target = |vm| {
        if vm == 1 && start.elapsed() < Duration::from_millis(400) { Target::NotReady } else { Target::Ready }
    };
    let outcome =
        probe(&fleet, Duration::from_secs(10)).run(target, &AtomicBool::new(false), |_, _| ()).unwrap();
    assert_eq!(outcome.answered, 3);
    assert!(outcome.last.unwrap() - start >= Duration::from_millis(400));
    assert_eq!(fleet.bridge.counters().snapshot().connections_total, 3);
}

#[cfg(unix)]
#[test]
fn vms_without_a_port_are_reached_through_the_door() {
    use std::net::{Ipv4Addr, TcpStream};
    let limits = Limits { listeners: 2, connections: 3, ..Limits::default() };
    let mut behaviours = vec![page(); 40];
    behaviours[30] = Behaviour::NoServer;
    behaviours[31] = Behaviour::CloseEarly;
    let fleet = Fleet::with_limits(behaviours, limits);
    let ports = fleet.bridge.config().ports;
    let connect = |vm| TcpStream::connect((Ipv4Addr::LOCALHOST, ports.port_of(vm).unwrap()));
    assert!(connect(1).is_ok() && connect(2).is_err());
    let reach = emulator::net::bridge::Bridge::reach(&fleet.bridge);
    assert_eq!(
        (reach.listening(), reach.vms(), reach.port_of(1), reach.port_of(2)),
        (2, 40, ports.port_of(1), None)
    );
    assert!(reach.connect(40).is_err());

    let target = |vm| if vm == 31 { Target::Down } else { Target::Ready };
    let probe = probe(&fleet, Duration::from_millis(2500));
    let outcome = probe.run(target, &AtomicBool::new(false), |_, _| ()).unwrap();
    assert_eq!(outcome.answered, 38);
    assert_eq!(outcome.failures, vec![(30, Failure::Refused), (31, Failure::Down)]);
    fleet.settle(Duration::from_secs(2));
    let mut fleet = fleet;
    fleet.bridge.stop().unwrap();
    assert_eq!(reach.connect(5).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn every_failure_keeps_its_reason() {
    let limits = Limits { connect: Duration::from_millis(300), ..Limits::default() };
    let not_http = Behaviour::Body(20);
    let behaviours = vec![
        page(),
        Behaviour::Silent,
        Behaviour::NoServer,
        Behaviour::Abort,
        not_http,
        Behaviour::CloseEarly,
        Behaviour::Mute,
        page(),
        page(),
    ];
    let fleet = Fleet::with_limits(behaviours, limits);
    let target = |vm| match vm {
        7 => Target::Down,
        8 => Target::NotReady,
        _ => Target::Ready,
    };
    let mut probe = probe(&fleet, Duration::from_millis(2000));
    probe.patience = Duration::from_millis(700);
    let start = Instant::now();
    let outcome = probe.run(target, &AtomicBool::new(false), |_, _| ()).unwrap();
    assert!(start.elapsed() < Duration::from_millis(2300), "{:?}", start.elapsed());
    assert_eq!(outcome.answered, 1);
    assert_eq!(
        outcome.failures,
        vec![
            (1, Failure::Refused),
            (2, Failure::Refused),
            (3, Failure::Refused),
            (4, Failure::NotHttp),
            (5, Failure::Incomplete),
            (6, Failure::TimedOut),
            (7, Failure::Down),
            (8, Failure::NotReady),
        ]
    );
}

#[test]
fn it_ends_when_all_others_are_down_or_it_is_stopped() {
    let fleet = Fleet::new(vec![page(), Behaviour::Silent]);
    let asked = AtomicU32::new(0);
    let target = |vm| {
        if vm == 1 && asked.fetch_add(1, Ordering::Relaxed) < 5 {
            Target::NotReady
        } else if vm == 1 {
            Target::Down
        } else {
            Target::Ready
        }
    };
    let outcome =
        probe(&fleet, Duration::from_secs(20)).run(target, &AtomicBool::new(false), |_, _| ()).unwrap();
    assert_eq!((outcome.answered, outcome.failures), (1, vec![(1, Failure::Down)]));

    let stop = AtomicBool::new(false);
    let endless = Probe { deadline: None, ..probe(&fleet, Duration::ZERO) };
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| endless.run(|_| Target::Ready, &stop, |_, _| ()).unwrap());
        std::thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Release);
        let outcome = asking.join().unwrap();
        assert_eq!(outcome.answered, 1);
    });
}
