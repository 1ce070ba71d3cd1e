//! What goes in and out of the VMs of a fleet: frames and console.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use emulator::abi::*;
use emulator::console::hub::Output;
use emulator::console::log::{LogLimits, Logs, log_path};
use emulator::fleet::{Activity, Fleet, FleetConfig};
use support::*;

fn bridged() -> FleetConfig {
    FleetConfig { bridged: true, ..config() }
}

/// Prints what is typed.
fn echo() -> impl FnMut(&mut Port, &SliceRequest) -> u32 + Send + 'static {
    let mut held: Option<u8> = None;
    move |port, _| {
        while let Some(byte) = held.take().or_else(|| port.read()) {
            if port.print(&[byte]) == 0 {
                held = Some(byte);
                return EXIT_DRAIN;
            }
        }
        port.sleep_until(u64::MAX)
    }
}

#[test]
fn no_frame_and_no_wake_up_is_lost_between_two_ends() {
    // A bridge that sends numbered frames to VMs which send them back, as fast as both can.
    const VMS: u32 = 6;
    const FRAMES: u32 = 4000;
    let machines = Fake::machines(VMS, 3, |vm| {
        let mut held: Option<Vec<u8>> = None;
        boots(vm, 1, move |port, _| {
            loop {
                let Some(frame) = held.take().or_else(|| port.receive()) else {
                    return port.sleep_until(u64::MAX);
                };
                if !port.send(&frame) {
                    held = Some(frame);
                    return EXIT_DRAIN;
                }
            }
        })
    });
    let fleet = start(&machines, bridged());
    let links = fleet.links();
    let (wake, woken) = std::sync::mpsc::sync_channel::<()>(1);
    links.set_waker(Arc::new(move || {
        // Full is as good: the bridge will wake.
        let _ = wake.try_send(());
    }));
    let mut sent = [0u32; VMS as usize];
    let mut got = [0u32; VMS as usize];
    let mut frame = [0; 1514];
    let mut dirty = Vec::new();
    while got.iter().any(|n| *n < FRAMES) {
        for vm in 0..VMS {
            let n = &mut sent[vm as usize];
            while *n < FRAMES && links.deliver(vm, &n.to_be_bytes()).is_ok() {
                *n += 1;
            }
        }
        links.take_dirty(&mut dirty);
        let took = !dirty.is_empty();
        for vm in dirty.drain(..) {
            while let Some(len) = links.take(vm, &mut frame) {
                let n = &mut got[vm as usize];
                assert_eq!(frame[..len], n.to_be_bytes(), "VM {vm}");
                *n += 1;
            }
        }
        if !took && got.iter().any(|n| *n < FRAMES) {
            // Nothing to do until the fleet calls. If it never does, a wake-up was lost.
            woken.recv_timeout(Duration::from_secs(10)).expect("the fleet called");
        }
    }
    until("all are counted", || fleet.totals().counters.rx_frames == u64::from(VMS * FRAMES));
    until("all sleep", || (0..VMS).all(|vm| fleet.status(vm).activity == Activity::Sleeping));
}

/// On engines that run VMs for long, an answer goes out before the slice ends.
#[test]
fn what_a_woken_guest_sends_is_seen_while_it_runs() {
    let machines = Fake::machines(1, 1, |vm| {
        boots(vm, 1, |port, _| {
            while let Some(frame) = port.receive() {
                assert!(port.send(&frame));
            }
            port.sleep_until(u64::MAX)
        })
    });
    let fleet = start(&machines, bridged());
    until("it sleeps", || fleet.status(0).activity == Activity::Sleeping);
    let links = fleet.links();
    let (wake, woken) = std::sync::mpsc::sync_channel::<()>(1);
    links.set_waker(Arc::new(move || {
        let _ = wake.try_send(());
    }));
    machines.0.lingers.store(true, SeqCst);
    let (mut frame, mut dirty) = ([0; 1514], Vec::new());
    for n in 0..20u32 {
        links.deliver(0, &n.to_be_bytes()).unwrap();
        let taken = loop {
            // Its slice goes on until the frame is taken: nobody calls at its end.
            woken.recv_timeout(Duration::from_secs(10)).expect("the fleet called");
            links.take_dirty(&mut dirty);
            if dirty.drain(..).count() > 0 {
                break links.take(0, &mut frame);
            }
        };
        assert_eq!(taken.map(|len| &frame[..len]), Some(&n.to_be_bytes()[..]));
        until("it sleeps again", || fleet.status(0).activity == Activity::Sleeping);
    }
}

#[test]
fn a_guest_whose_frames_nobody_takes_waits_without_spinning() {
    let machines = Fake::machines(1, 1, |vm| {
        boots(vm, 1, |port, _| {
            while port.send(b"frame") {}
            EXIT_DRAIN
        })
    });
    let fleet = start(&machines, bridged());
    until("it waits", || fleet.status(0).counters.tx_frames == 8);
    std::thread::sleep(Duration::from_millis(50));
    let slices = machines.0.slices.load(SeqCst);
    assert!(slices < 10, "{slices} slices");
    let mut frame = [0; 1514];
    assert_eq!(fleet.links().take(0, &mut frame), Some(5));
    until("it has sent the next", || fleet.status(0).counters.tx_frames == 9);
}

#[test]
fn without_a_bridge_frames_are_dropped_and_counted() {
    let machines = Fake::machines(1, 1, |vm| {
        let mut left = 100;
        boots(vm, 1, move |port, _| {
            while left > 0 {
                if !port.send(b"frame") {
                    return EXIT_DRAIN;
                }
                left -= 1;
            }
            port.sleep_until(u64::MAX)
        })
    });
    let fleet = start(&machines, config());
    until("all are dropped", || fleet.totals().counters.dropped == 100);
}

#[test]
fn room_in_a_full_mailbox_is_told() {
    // The guest takes frames only when it is told to.
    let machines = Fake::machines(1, 1, |vm| {
        boots(vm, 1, |port, _| {
            if port.read().is_some() {
                port.receive();
            }
            port.sleep_until(u64::MAX)
        })
    });
    let fleet = start(&machines, bridged());
    let links = fleet.links();
    let calls = Arc::new(AtomicU64::new(0));
    let counter = calls.clone();
    links.set_waker(Arc::new(move || {
        counter.fetch_add(1, SeqCst);
    }));
    until_ready(&fleet);
    while links.deliver(0, b"x").is_ok() {}
    let before = calls.load(SeqCst);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(calls.load(SeqCst), before);
    fleet.type_in(0, b".");
    until("the bridge is called", || calls.load(SeqCst) > before);
    let mut dirty = Vec::new();
    links.take_dirty(&mut dirty);
    assert_eq!(dirty, [0]);
    assert!(links.deliver(0, b"x").is_ok());
    assert!(links.deliver(0, b"x").is_err());
    assert!(links.deliver(7, b"x").is_err(), "there is no VM 7");
}

#[test]
fn more_console_input_than_fits_comes_in_order() {
    let machines = Fake::machines(1, 2, |vm| boots(vm, 1, echo()));
    let fleet = start(&machines, config());
    until_ready(&fleet);
    let listener = fleet.subscribe(0);
    let text: Vec<u8> = (0..30_000u32).map(|n| b'a' + (n % 23) as u8).collect();
    let typist = {
        let (fleet, text) = (fleet.clone(), text.clone());
        std::thread::spawn(move || fleet.type_all(0, &text, Duration::from_secs(10)))
    };
    let mut got = Vec::new();
    until("everything is echoed", || {
        if let Output::Bytes { bytes, lost } = listener.receive(Duration::from_millis(10)) {
            assert_eq!(lost, 0);
            got.extend(bytes);
        }
        got.len() >= text.len()
    });
    assert_eq!(typist.join().unwrap(), text.len());
    assert_eq!(got, text);
}

#[test]
fn a_guest_that_reads_nothing_holds_its_typist_only() {
    let machines = Fake::machines(2, 1, |vm| match vm {
        0 => boots(vm, 1, |port, _| port.sleep_until(u64::MAX)),
        _ => boots(vm, 1, echo()),
    });
    let fleet = start(&machines, config());
    until_ready(&fleet);
    let typed = fleet.type_all(0, &[b'x'; 100_000], Duration::from_millis(50));
    assert!((4096..5000).contains(&typed), "{typed}");
    assert_eq!(fleet.type_in(0, b"x"), 0);
    let listener = fleet.subscribe(1);
    assert_eq!(fleet.type_in(1, b"still here"), 10);
    until(
        "it answers",
        || matches!(listener.receive(Duration::ZERO), Output::Bytes { bytes, .. } if bytes == b"still here"),
    );
    // And the one that reads nothing is not run for what it can't take.
    let slices = machines.0.slices.load(SeqCst);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(machines.0.slices.load(SeqCst), slices);
}

#[test]
fn logs_hold_what_was_printed_raw() {
    let folder = tempfile::tempdir().unwrap();
    let machines = Fake::machines(3, 2, |vm| {
        let mut text: Vec<u8> = (0..500).flat_map(|n| format!("\x1b[1m{vm} {n:03}\n").into_bytes()).collect();
        boots(vm, 1, move |port, _| {
            let printed = port.print(&text);
            text.drain(..printed);
            if text.is_empty() { EXIT_SHUTDOWN } else { EXIT_DRAIN }
        })
    });
    let limits = LogLimits { delay: Duration::from_millis(5), ..LogLimits::default() };
    let logs = Logs::create(folder.path(), limits).unwrap();
    let fleet = Arc::new(Fleet::new(machines.clone(), config(), Some(logs)));
    fleet.start().unwrap();
    until("all have ended", || (0..3).all(|vm| fleet.is_down(vm)));
    fleet.stop();
    drop(fleet);
    for vm in 0..3 {
        let text = std::fs::read_to_string(log_path(folder.path(), vm)).unwrap();
        let lines: String = (0..500).map(|n| format!("\x1b[1m{vm} {n:03}\n")).collect();
        assert_eq!(text, format!("READY {vm}\r\n{lines}"));
    }
}
