//! How VMs of a fleet come and go.

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use emulator::abi::*;
use emulator::fleet::clock::TimeMode;
use emulator::fleet::{Activity, FleetConfig, Life};
use support::*;

#[test]
fn all_vms_become_ready_and_then_cost_nothing() {
    let machines =
        Fake::machines(50, 3, |vm| boots(vm, 5 + u64::from(vm % 7), |port, _| port.sleep_until(u64::MAX)));
    let fleet = start(&machines, config());
    until_ready(&fleet);
    for vm in 0..50 {
        until("it sleeps", || fleet.status(vm).activity == Activity::Sleeping);
        let ready = fleet.status(vm).ready.unwrap();
        assert_eq!(ready.instructions, 1000 * (5 + u64::from(vm % 7)));
    }
    let before = machines.0.slices.load(SeqCst);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(machines.0.slices.load(SeqCst), before, "idle VMs were run");
    let totals = fleet.totals();
    assert_eq!((totals.ready, totals.failed, totals.steps), (50, 0, 1000 * before));
}

#[test]
fn a_wrong_number_or_a_panic_fails_that_vm_alone() {
    let machines = Fake::machines(4, 2, |vm| match vm {
        1 => boots(2, 3, |_, _| EXIT_BUDGET),
        2 => Box::new(|port, _| {
            port.print(b"Freeing memory\n[    0.1] Kernel panic - not sync");
            port.print(b"ing: No working init found.\n");
            EXIT_BUDGET
        }),
        _ => boots(vm, 3, |port, _| port.sleep_until(u64::MAX)),
    });
    let fleet = start(&machines, config());
    until("two failed", || fleet.totals().failed == 2);
    until("two are ready", || fleet.totals().ready == 2);
    let Life::Failed(why) = fleet.status(1).life else { panic!("VM 1 goes on") };
    assert!(why.contains("READY 2") && why.contains("VM 1"), "{why}");
    let status = fleet.status(2);
    assert_eq!(status.state(), "failed");
    assert_eq!(status.reason(), "Kernel panic - not syncing: No working init found.");
    assert_eq!(fleet.last_lines(2)[0], "Freeing memory");
    assert!(fleet.is_down(2) && fleet.links().is_down(2) && !fleet.links().is_down(0));
}

#[test]
fn every_end_of_a_slice_has_its_state() {
    let ends = [EXIT_SHUTDOWN, EXIT_STOPPED, EXIT_NO_FRAME, EXIT_FAILURE, 77];
    let machines = Fake::machines(ends.len() as u32, 1, move |vm| Box::new(move |_, _| ends[vm as usize]));
    let fleet = start(&machines, config());
    until("all are down", || (0..fleet.vms()).all(|vm| fleet.is_down(vm)));
    let states: Vec<_> = (0..5).map(|vm| fleet.status(vm).state()).collect();
    assert_eq!(states, ["stopped", "stopped", "failed", "failed", "failed"]);
    assert!(fleet.status(2).reason().contains("frame pool exhausted"));
    assert!(fleet.status(4).reason().contains("77"));
}

#[test]
fn a_reboot_starts_over_and_is_counted() {
    let machines = Fake::machines(1, 2, |vm| {
        boots(vm, 3, |port, _| match port.read() {
            Some(b'r') => EXIT_REBOOT,
            _ => port.sleep_until(u64::MAX),
        })
    });
    let fleet = start(&machines, config());
    until_ready(&fleet);
    let first = fleet.status(0).ready;
    for reboots in 1..=5 {
        until("it sleeps", || fleet.status(0).activity == Activity::Sleeping);
        assert_eq!(fleet.type_in(0, b"r"), 1);
        until("it rebooted", || fleet.status(0).counters.reboots == reboots);
        until_ready(&fleet);
    }
    let status = fleet.status(0);
    assert_eq!(status.ready, first, "the first boot is what is reported");
    assert!(status.counters.instructions >= 6 * 4000);
}

#[test]
fn a_guest_that_only_reboots_fails() {
    let machines = Fake::machines(1, 1, |_| Box::new(|_, _| EXIT_REBOOT));
    let fleet = start(&machines, config());
    until("it is down", || fleet.is_down(0));
    assert!(fleet.status(0).reason().contains("rebooted 3 times"), "{}", fleet.status(0).reason());
}

#[test]
fn real_time_follows_the_wall_clock_from_ready_on() {
    const PERIOD: u64 = TIMEBASE_HZ as u64 / 50;
    // After READY the guest prints its time and sleeps 20 ms, ten times.
    let machines = Fake::machines(1, 1, |vm| {
        let mut wake = 0;
        boots(vm, 5, move |port, request| {
            assert_eq!(request.time_mode, TIME_REAL);
            let now = port.result.time_ticks;
            assert!(now >= wake, "woken {} ticks early", wake - now);
            if port.slices > 16 {
                return EXIT_SHUTDOWN;
            }
            port.print(format!("{now}\n").as_bytes());
            wake = now + PERIOD;
            port.sleep_until(wake)
        })
    });
    let begin = Instant::now();
    let fleet = start(&machines, FleetConfig { time: TimeMode::Real, ..config() });
    until("it has ended", || fleet.is_down(0));
    assert_eq!(fleet.status(0).life, Life::Stopped);
    assert!(begin.elapsed() >= Duration::from_millis(200));
    let times: Vec<u64> = fleet.last_lines(0).iter().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(times.len(), 11);
    assert!(times[0] >= 5000, "real time begins where virtual time ended");
    assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= PERIOD));
}

#[test]
fn a_paused_vm_waits_and_goes_on() {
    let machines = Fake::machines(2, 1, |vm| boots(vm, 1, |_, _| EXIT_BUDGET));
    let fleet = start(&machines, config());
    until_ready(&fleet);
    fleet.pause(0);
    until("it is paused", || fleet.status(0).state() == "paused");
    let before = fleet.status(0).counters.instructions;
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(fleet.status(0).counters.instructions, before);
    fleet.resume(0);
    until("it runs", || fleet.status(0).counters.instructions > before);
}

#[test]
fn a_broken_engine_ends_the_fleet_with_a_reason() {
    let machines = Fake::machines(2, 2, |vm| boots(vm, 1, |_, _| EXIT_BUDGET));
    let fleet = start(&machines, config());
    until_ready(&fleet);
    assert_eq!(fleet.fault(), None);
    machines.0.broken.store(true, SeqCst);
    until("the fault is told", || fleet.fault().is_some());
    assert_eq!(fleet.fault().as_deref(), Some("the device is gone"));
    fleet.stop();
}

#[test]
fn a_crashed_worker_is_a_fault_too() {
    let machines = Fake::machines(1, 1, |_| Box::new(|_, _| panic!("a bug, on purpose")));
    let fleet = start(&machines, config());
    until("the fault is told", || fleet.fault().is_some());
    fleet.stop();
}

#[test]
fn waiting_ends_with_news() {
    let machines = Fake::machines(1, 1, |vm| boots(vm, 1, |port, _| port.sleep_until(u64::MAX)));
    let fleet = start(&machines, config());
    let seen = fleet.wait(0, Duration::from_secs(10));
    assert_eq!((seen, fleet.totals().ready), (1, 1));
    let begin = Instant::now();
    assert_eq!(fleet.wait(seen, Duration::from_millis(20)), seen);
    assert!(begin.elapsed() >= Duration::from_millis(20));
    fleet.nudge();
    assert!(fleet.wait(seen, Duration::from_secs(10)) > seen);
}

#[test]
fn a_reset_brings_back_what_runs_what_is_paused_and_what_is_down() {
    let machines = Fake::machines(4, 2, |vm| {
        boots(vm, 2, move |port, _| match (vm, port.read()) {
            (0, _) => EXIT_BUDGET,
            (2, Some(_)) => EXIT_SHUTDOWN,
            _ => port.sleep_until(u64::MAX),
        })
    });
    let fleet = start(&machines, config());
    until_ready(&fleet);
    fleet.pause(1);
    fleet.type_in(2, b"x");
    until("VM 2 is down", || fleet.is_down(2));
    let listener = fleet.subscribe(2);
    assert_eq!(fleet.downs(), 1);
    for vm in 0..3 {
        fleet.reset(vm);
    }
    until("three have started over", || (0..3).all(|vm| fleet.status(vm).counters.reboots == 1));
    until_ready(&fleet);
    assert_eq!((fleet.downs(), fleet.been_ready()), (0, 4));
    assert!(!fleet.is_down(2) && !fleet.links().is_down(2));
    assert_eq!(fleet.status(3).counters.reboots, 0);
    drop(listener);
    // The console of a VM that was down is heard and typed to again.
    assert_eq!(fleet.type_in(2, b"x"), 1);
    until("VM 2 is down again", || fleet.is_down(2));
    assert_eq!(fleet.status(2).state(), "stopped");
}

#[test]
fn resets_at_any_time_leave_a_fleet_that_boots() {
    // The fake engine fails the test if a VM is reset while it runs, or runs in two engines.
    let machines = Fake::machines(8, 3, |vm| {
        boots(vm, 1, move |port, _| match port.slices % 5 {
            0 => EXIT_SHUTDOWN,
            1 => EXIT_REBOOT,
            2 => port.sleep_until(u64::MAX),
            _ => EXIT_BUDGET,
        })
    });
    let fleet = start(&machines, config());
    std::thread::scope(|scope| {
        for thread in 0..3u32 {
            let fleet = &fleet;
            scope.spawn(move || {
                for i in 0..2000u32 {
                    let vm = (i * 7 + thread * 3) % 8;
                    match (i + thread) % 5 {
                        0 => fleet.pause(vm),
                        1 => fleet.resume(vm),
                        _ => fleet.reset(vm),
                    }
                }
            });
        }
    });
    assert_eq!(fleet.fault(), None);
    for vm in 0..8 {
        let before = fleet.status(vm).counters.reboots;
        fleet.reset(vm);
        until("it starts over", || fleet.status(vm).counters.reboots > before);
    }
    until("none counts as down that is not", || {
        fleet.downs() == (0..8).filter(|vm| fleet.is_down(*vm)).count() as u32
    });
    assert_eq!(fleet.fault(), None);
}

#[test]
fn a_survey_tells_what_the_status_tells() {
    let machines = Fake::machines(3, 1, |vm| match vm {
        1 => Box::new(|_, _| EXIT_SHUTDOWN),
        _ => boots(vm, 2, |port, _| port.sleep_until(u64::MAX)),
    });
    let fleet = start(&machines, config());
    until("all have come to rest", || fleet.totals().ready == 2 && fleet.is_down(1));
    until("they sleep", || fleet.status(2).activity == Activity::Sleeping);
    let mut seen = 0;
    fleet.survey(&mut Vec::new(), |glance| {
        let status = fleet.status(glance.vm);
        assert_eq!((glance.vm, glance.stage), (seen, status.life.stage()));
        assert_eq!((glance.activity, glance.counters), (status.activity, status.counters));
        seen += 1;
    });
    assert_eq!(seen, 3);
}
