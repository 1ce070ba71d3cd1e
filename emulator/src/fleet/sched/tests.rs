use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

fn whole(vms: u32) -> Scheduler {
    Scheduler::new(std::slice::from_ref(&(0..vms)))
}

fn next(s: &Scheduler) -> u32 {
    let mut turns = Vec::new();
    assert!(s.take(0, 1, &mut turns));
    turns[0].vm
}

#[test]
fn runs_in_order_and_skips_sleepers() {
    let s = whole(3);
    assert_eq!([next(&s), next(&s)], [0, 1]);
    s.requeue(0, Class::Bulk);
    s.park(1, None);
    let mut others = [next(&s), next(&s)];
    others.sort_unstable();
    assert_eq!(others, [0, 2]);
    s.wake(1);
    assert_eq!(next(&s), 1);
}

#[test]
fn parts_keep_to_themselves() {
    let s = Scheduler::new(&[0..2, 2..5]);
    let mut turns = Vec::new();
    assert!(s.take(1, 9, &mut turns));
    assert_eq!(turns.iter().map(|turn| turn.vm).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(s.activity(1), Activity::Queued);
    for vm in 2..5 {
        s.park(vm, None);
    }
    s.wake(3);
    assert!(s.take(0, 9, &mut turns));
    assert_eq!(turns.iter().map(|turn| turn.vm).collect::<Vec<_>>(), [0, 1]);
    assert!(s.take(1, 9, &mut turns));
    assert_eq!(turns.iter().map(|turn| turn.vm).collect::<Vec<_>>(), [3]);
    s.stop();
    assert!(!s.take(0, 1, &mut turns) && !s.take(1, 1, &mut turns));
}

#[test]
fn boots_go_one_after_the_other_but_none_keeps_the_core() {
    let s = whole(3);
    for vm in [0, 1] {
        for _ in 0..10 {
            assert_eq!(next(&s), vm);
            s.requeue(vm, Class::Boot);
        }
        assert_eq!(next(&s), vm);
        s.park(vm, None);
    }
    let hangs = next(&s);
    assert_eq!(hangs, 2);
    s.requeue(hangs, Class::Boot);
    // Others compute and answer meanwhile.
    s.wake(0);
    s.wake(1);
    let mut slices = [0; 3];
    for _ in 0..400 {
        let vm = next(&s);
        slices[vm as usize] += 1;
        match vm {
            0 => s.requeue(vm, Class::Bulk),
            1 => {
                s.park(vm, None);
                s.wake(vm);
            }
            _ => s.requeue(vm, Class::Boot),
        }
    }
    assert!(slices[0] >= 50 && slices[1] >= 290 && slices[2] >= 50, "{slices:?}");
}

#[test]
fn boots_that_hang_take_turns() {
    let s = whole(2);
    let mut slices = [0; 2];
    for _ in 0..10 * BOOT_SLICES {
        let vm = next(&s);
        slices[vm as usize] += 1;
        s.requeue(vm, Class::Boot);
    }
    assert!(slices.iter().all(|n| *n >= 4 * BOOT_SLICES), "{slices:?}");
}

#[test]
fn a_wake_up_during_the_slice_is_another_turn() {
    let s = whole(1);
    let vm = next(&s);
    s.wake(vm);
    s.park(vm, None);
    assert_eq!(s.activity(vm), Activity::Queued);
    assert_eq!(next(&s), vm);
    s.park(vm, None);
    assert_eq!(s.activity(vm), Activity::Sleeping);
}

#[test]
fn timers_fire_and_leave_no_trace() {
    let s = whole(2);
    let start = Instant::now();
    for _ in 0..2 {
        next(&s);
    }
    s.park(0, Some(start + Duration::from_millis(40)));
    s.park(1, Some(start + Duration::from_millis(10)));
    assert_eq!([next(&s), next(&s)], [1, 0]);
    assert!(start.elapsed() >= Duration::from_millis(40));
    // Woken early a thousand times with a far timer: still one timer a VM.
    for _ in 0..1000 {
        s.park(0, Some(start + Duration::from_secs(1000)));
        s.wake(0);
        assert_eq!(next(&s), 0);
    }
    assert!(lock(&s.queues[0].1.inner).timers.len() <= 2);
}

#[test]
fn paused_vms_keep_their_wake_ups() {
    let s = whole(1);
    let vm = next(&s);
    s.pause(vm);
    s.park(vm, None);
    s.wake(vm);
    assert_eq!(s.activity(vm), Activity::Paused);
    s.resume(vm);
    assert_eq!(next(&s), vm);
    s.pause(vm);
    s.requeue(vm, Class::Bulk);
    assert_eq!(s.activity(vm), Activity::Paused);
    s.resume(vm);
    assert_eq!(next(&s), vm);
}

#[test]
fn busy_vms_do_not_starve_woken_ones_nor_the_other_way_round() {
    let s = whole(40);
    let mut seen = vec![0u32; 40];
    for _ in 0..4000 {
        let mut turns = Vec::new();
        assert!(s.take(0, 1, &mut turns));
        let vm = turns[0].vm;
        seen[vm as usize] += 1;
        // Half of the fleet computes, half of it sleeps and is woken at once.
        if vm < 20 {
            s.requeue(vm, Class::Bulk);
        } else {
            s.park(vm, None);
            s.wake(vm);
        }
    }
    let (least, most) = (seen[..20].iter().min(), seen[..20].iter().max());
    assert!(least >= Some(&40) && most <= Some(&60), "computing: {seen:?}");
    let (least, most) = (seen[20..].iter().min(), seen[20..].iter().max());
    assert!(least >= Some(&140) && most <= Some(&170), "woken: {seen:?}");
}

/// How long it takes `change` to end a take that found nothing, and whether it brought a turn.
fn ended_by(s: &Arc<Scheduler>, change: impl FnOnce(&Scheduler)) -> (bool, Duration) {
    let worker = s.clone();
    let worker = std::thread::spawn(move || (worker.take(0, 1, &mut Vec::new()), Instant::now()));
    while !lock(&s.queues[0].1.inner).polled {
        std::thread::yield_now();
    }
    let began = Instant::now();
    change(s);
    let (goes_on, at) = worker.join().unwrap();
    (goes_on, at.saturating_duration_since(began))
}

#[test]
fn a_worker_that_polls_takes_what_comes() {
    const LONG: Duration = Duration::from_secs(60);
    let s = Arc::new(whole(1));
    let vm = next(&s);
    s.park(vm, None);
    s.stay_awake(Instant::now() + LONG);
    let (goes_on, took) = ended_by(&s, |s| s.wake(vm));
    assert!(goes_on && took < LONG, "{took:?}");
    // A timer.
    s.park(vm, Some(Instant::now() + Duration::from_millis(50)));
    let (goes_on, took) = ended_by(&s, |_| ());
    assert!(goes_on && took < LONG, "{took:?}");
    s.park(vm, None);
    let (goes_on, took) = ended_by(&s, Scheduler::stop);
    assert!(!goes_on && took < LONG, "{took:?}");
}

#[test]
fn a_worker_sleeps_when_it_has_polled_long_enough() {
    let s = Arc::new(whole(1));
    let vm = next(&s);
    s.park(vm, None);
    s.stay_awake(Instant::now() + Duration::from_millis(20));
    let (goes_on, _) = ended_by(&s, |s| {
        while lock(&s.queues[0].1.inner).idle == 0 {
            std::thread::yield_now();
        }
        s.wake(vm);
    });
    assert!(goes_on);
}

#[test]
fn no_wake_up_is_lost_under_stress() {
    no_wake_up_is_lost(&Arc::new(whole(8)));
    let s = Arc::new(whole(8));
    s.stay_awake(Instant::now() + Duration::from_secs(60));
    no_wake_up_is_lost(&s);
}

fn no_wake_up_is_lost(s: &Arc<Scheduler>) {
    // Producers bump a VM's counter and wake it; the worker reads the counter at the start of the slice and parks.
    // If a wake-up is lost, the last value is never seen.
    const VMS: u32 = 8;
    const ROUNDS: u64 = 20_000;
    let sent: Arc<Vec<AtomicU64>> = Arc::new((0..VMS).map(|_| AtomicU64::new(0)).collect());
    let seen: Arc<Vec<AtomicU64>> = Arc::new((0..VMS).map(|_| AtomicU64::new(0)).collect());
    let inside: Arc<Vec<AtomicBool>> = Arc::new((0..VMS).map(|_| AtomicBool::new(false)).collect());
    let workers: Vec<_> = (0..3)
        .map(|_| {
            let (s, sent, seen, inside) = (s.clone(), sent.clone(), seen.clone(), inside.clone());
            std::thread::spawn(move || {
                let mut turns = Vec::new();
                while s.take(0, 2, &mut turns) {
                    for turn in turns.drain(..) {
                        let vm = turn.vm as usize;
                        assert!(!inside[vm].swap(true, SeqCst), "VM {vm} in two engines");
                        seen[vm].store(sent[vm].load(SeqCst), SeqCst);
                        inside[vm].store(false, SeqCst);
                        s.park(turn.vm, Some(Instant::now() + Duration::from_secs(3600)));
                    }
                }
            })
        })
        .collect();
    let producers: Vec<_> = (0..2)
        .map(|p| {
            let (s, sent) = (s.clone(), sent.clone());
            std::thread::spawn(move || {
                for i in 0..ROUNDS {
                    let vm = ((i * 7 + p) % u64::from(VMS)) as u32;
                    sent[vm as usize].fetch_add(1, SeqCst);
                    s.wake(vm);
                    if i % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    for p in producers {
        p.join().unwrap();
    }
    let end = Instant::now() + Duration::from_secs(20);
    while (0..VMS as usize).any(|vm| seen[vm].load(SeqCst) != sent[vm].load(SeqCst)) {
        assert!(Instant::now() < end, "a wake-up was lost");
        std::thread::sleep(Duration::from_millis(1));
    }
    s.stop();
    for w in workers {
        w.join().unwrap();
    }
}
