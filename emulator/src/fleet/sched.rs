//! Which VM runs next: queues of runnable VMs, timers of sleeping ones, and no lost wake-ups.
//!
//! All transitions happen under one lock. A wake-up that comes while a VM runs is remembered in `pending`, and the
//! end of that slice turns it into another turn, so nothing is lost between "the guest went idle" and "the VM sleeps".

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Condvar, Mutex};
use std::time::Instant;

use crate::fleet::poll::BusyPoll;
use crate::sync::lock;

/// Of so many turns, the last goes to a VM that boots or computes, even if freshly woken ones wait.
const BULK_SHARE: u32 = 4;
/// Slices in a row that a booting VM may have. On a core a whole boot takes fewer; one that hangs must not keep it.
const BOOT_SLICES: u32 = 64;

/// Why a VM is runnable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It was woken: somebody may wait for an answer.
    Fresh,
    /// It used up its budget and goes to the end of the queue.
    Bulk,
    /// It boots. One boot after the other keeps caches warm, and the first VMs serve early.
    Boot,
}

/// What a VM is doing, as the scheduler sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Waits for a timer, a frame or console input.
    Sleeping,
    /// Runnable, waits for an engine.
    Queued,
    /// In an engine.
    Running,
    /// Held by [`Scheduler::pause`].
    Paused,
    /// Never runs again.
    Down,
}

/// One VM's turn in an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// VM number.
    pub vm: u32,
    /// Why it is runnable.
    pub class: Class,
    /// It is to be reset instead of run: [`Scheduler::reset`] was called.
    pub reset: bool,
}

#[derive(Clone)]
struct Entry {
    activity: Activity,
    class: Class,
    /// Slices in a row as [`Class::Boot`].
    boot_slices: u32,
    pending: bool,
    paused: bool,
    reset: bool,
    deadline: Option<Instant>,
}

struct Inner {
    vms: Vec<Entry>,
    /// VMs that were woken from sleep: their first slice is short, and they go first.
    fresh: VecDeque<u32>,
    /// VMs that used up their budget.
    bulk: VecDeque<u32>,
    /// VMs that boot.
    boot: VecDeque<u32>,
    /// At most one entry a VM, so guests can't make it grow.
    timers: BTreeSet<(Instant, u32)>,
    /// Workers that sleep until there is work.
    idle: usize,
    /// A worker polls for work.
    polled: bool,
    /// The timer that an idle worker watches.
    watched: Option<Instant>,
    turns: u32,
    stopping: bool,
}

/// The run queues of a fleet: one for the VMs of each part of the machines, whose engines run no others.
pub struct Scheduler {
    /// Each with the number of its first VM; within, VMs are numbered from 0.
    queues: Vec<(u32, Queue)>,
    poll: BusyPoll,
}

impl Scheduler {
    /// A scheduler of VMs that are all to be booted. `parts` follow each other from VM 0 on.
    pub fn new(parts: &[Range<u32>]) -> Self {
        Self {
            queues: parts.iter().map(|part| (part.start, Queue::new(part.len() as u32))).collect(),
            poll: BusyPoll::default(),
        }
    }

    /// Until then one worker of each part looks for work without sleeping. It takes a core each.
    pub fn stay_awake(&self, until: Instant) {
        self.poll.extend(until);
    }

    fn queue(&self, vm: u32) -> (&Queue, u32) {
        let (first, queue) = &self.queues[self.queues.partition_point(|(first, _)| *first <= vm) - 1];
        (queue, vm - first)
    }

    /// Waits until VMs of a part are runnable and takes up to `max` of them; false when the fleet stops.
    pub fn take(&self, part: usize, max: usize, turns: &mut Vec<Turn>) -> bool {
        let (first, queue) = &self.queues[part];
        turns.clear();
        let goes_on = queue.take(max, turns, &self.poll);
        for turn in turns {
            turn.vm += first;
        }
        goes_on
    }

    /// Something came for the VM: it becomes runnable, or stays so for one more slice.
    pub fn wake(&self, vm: u32) {
        let (queue, vm) = self.queue(vm);
        queue.wake(vm);
    }

    /// The VM's slice ended in idleness: it sleeps until `deadline` or a wake-up, unless one has come meanwhile.
    pub fn park(&self, vm: u32, deadline: Option<Instant>) {
        let (queue, vm) = self.queue(vm);
        queue.park(vm, deadline);
    }

    /// The VM's slice ended with work left.
    pub fn requeue(&self, vm: u32, class: Class) {
        let (queue, vm) = self.queue(vm);
        queue.requeue(vm, class);
    }

    /// The VM never runs again. Only for a VM that is running, or in the tests.
    pub fn retire(&self, vm: u32) {
        let (queue, vm) = self.queue(vm);
        queue.retire(vm);
    }

    /// Keeps the VM from running; a slice under way is finished first.
    pub fn pause(&self, vm: u32) {
        let (queue, vm) = self.queue(vm);
        queue.pause(vm);
    }

    /// Lets a paused VM go on.
    pub fn resume(&self, vm: u32) {
        let (queue, vm) = self.queue(vm);
        queue.resume(vm);
    }

    /// Gives the VM a turn in which its worker resets it, also if it is paused or down.
    pub fn reset(&self, vm: u32) {
        let (queue, vm) = self.queue(vm);
        queue.reset(vm);
    }

    /// What all VMs are doing, in order; one lock for each part.
    pub fn activities(&self, all: &mut Vec<Activity>) {
        all.clear();
        for (_, queue) in &self.queues {
            queue.activities(all);
        }
    }

    /// What the VM is doing.
    pub fn activity(&self, vm: u32) -> Activity {
        let (queue, vm) = self.queue(vm);
        queue.activity(vm)
    }

    /// Ends every [`Scheduler::take`], now and later.
    pub fn stop(&self) {
        for (_, queue) in &self.queues {
            queue.stop();
        }
    }
}

/// The run queue of one part.
struct Queue {
    inner: Mutex<Inner>,
    work: Condvar,
    /// Calls of the worker that polls.
    calls: AtomicU32,
}

impl Queue {
    fn new(vms: u32) -> Self {
        let entry = Entry {
            activity: Activity::Queued,
            class: Class::Boot,
            boot_slices: 0,
            pending: false,
            paused: false,
            reset: false,
            deadline: None,
        };
        Self {
            inner: Mutex::new(Inner {
                vms: vec![entry; vms as usize],
                fresh: VecDeque::new(),
                bulk: VecDeque::new(),
                boot: (0..vms).collect(),
                timers: BTreeSet::new(),
                idle: 0,
                polled: false,
                watched: None,
                turns: 0,
                stopping: false,
            }),
            work: Condvar::new(),
            calls: AtomicU32::new(0),
        }
    }

    /// Has an idle worker look at the queues.
    fn call(&self, inner: &Inner) {
        if inner.polled {
            self.calls.fetch_add(1, Relaxed);
        } else if inner.idle > 0 {
            self.work.notify_one();
        }
    }

    /// Waits for a call, without the lock.
    fn poll(&self, calls: u32, until: Instant) {
        while self.calls.load(Relaxed) == calls && Instant::now() < until {
            std::hint::spin_loop();
        }
    }

    fn take(&self, max: usize, turns: &mut Vec<Turn>, poll: &BusyPoll) -> bool {
        let mut inner = lock(&self.inner);
        loop {
            if inner.stopping {
                return false;
            }
            let now = Instant::now();
            inner.fire(now);
            inner.pick(max, turns);
            if !turns.is_empty() {
                // Others may have to take the rest, or the watch over the next timer.
                if inner.has_work() || inner.unwatched().is_some() {
                    self.call(&inner);
                }
                return true;
            }
            if let Some(until) = poll.until(now).filter(|_| !inner.polled) {
                inner.polled = true;
                let timer = inner.timers.first().map_or(until, |timer| timer.0);
                let calls = self.calls.load(Relaxed);
                drop(inner);
                self.poll(calls, until.min(timer));
                inner = lock(&self.inner);
                inner.polled = false;
                continue;
            }
            inner.idle += 1;
            if let Some(at) = inner.unwatched() {
                inner.watched = Some(at);
                let wait = at.saturating_duration_since(now);
                inner =
                    self.work.wait_timeout(inner, wait).unwrap_or_else(std::sync::PoisonError::into_inner).0;
                if inner.watched == Some(at) {
                    inner.watched = None;
                }
            } else {
                inner = self.work.wait(inner).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            inner.idle -= 1;
        }
    }

    fn wake(&self, vm: u32) {
        let mut inner = lock(&self.inner);
        if inner.wake(vm) {
            self.call(&inner);
        }
    }

    fn park(&self, vm: u32, deadline: Option<Instant>) {
        let mut inner = lock(&self.inner);
        let entry = &mut inner.vms[vm as usize];
        debug_assert_eq!(entry.activity, Activity::Running);
        if std::mem::take(&mut entry.pending) {
            inner.enqueue(vm, Class::Fresh);
        } else {
            entry.activity = Activity::Sleeping;
            inner.set_timer(vm, deadline);
        }
    }

    fn requeue(&self, vm: u32, class: Class) {
        let mut inner = lock(&self.inner);
        inner.vms[vm as usize].pending = false;
        inner.enqueue(vm, class);
    }

    fn retire(&self, vm: u32) {
        let mut inner = lock(&self.inner);
        inner.set_timer(vm, None);
        if inner.vms[vm as usize].reset {
            inner.enqueue(vm, Class::Boot);
        } else {
            inner.vms[vm as usize].activity = Activity::Down;
        }
    }

    fn pause(&self, vm: u32) {
        lock(&self.inner).vms[vm as usize].paused = true;
    }

    fn resume(&self, vm: u32) {
        let mut inner = lock(&self.inner);
        let entry = &mut inner.vms[vm as usize];
        entry.paused = false;
        if entry.activity == Activity::Sleeping && std::mem::take(&mut entry.pending) {
            inner.enqueue(vm, Class::Fresh);
            self.call(&inner);
        }
    }

    fn reset(&self, vm: u32) {
        let mut inner = lock(&self.inner);
        let entry = &mut inner.vms[vm as usize];
        entry.reset = true;
        entry.paused = false;
        match entry.activity {
            Activity::Sleeping | Activity::Paused | Activity::Down => {
                entry.pending = false;
                entry.boot_slices = 0;
                inner.set_timer(vm, None);
                inner.enqueue(vm, Class::Boot);
                self.call(&inner);
            }
            Activity::Running => entry.pending = true,
            Activity::Queued => {}
        }
    }

    fn activities(&self, all: &mut Vec<Activity>) {
        all.extend(lock(&self.inner).vms.iter().map(Entry::shown));
    }

    fn activity(&self, vm: u32) -> Activity {
        lock(&self.inner).vms[vm as usize].shown()
    }

    fn stop(&self) {
        lock(&self.inner).stopping = true;
        self.calls.fetch_add(1, Relaxed);
        self.work.notify_all();
    }
}

impl Entry {
    fn shown(&self) -> Activity {
        match self.activity {
            Activity::Sleeping | Activity::Queued if self.paused => Activity::Paused,
            other => other,
        }
    }
}

impl Inner {
    fn has_work(&self) -> bool {
        !(self.fresh.is_empty() && self.bulk.is_empty() && self.boot.is_empty())
    }

    /// The next timer, unless an idle worker watches it or an earlier one.
    fn unwatched(&self) -> Option<Instant> {
        let next = self.timers.first()?.0;
        self.watched.is_none_or(|at| next < at).then_some(next)
    }

    fn fire(&mut self, now: Instant) {
        while let Some(&(at, vm)) = self.timers.first() {
            if at > now {
                break;
            }
            self.timers.pop_first();
            self.vms[vm as usize].deadline = None;
            if self.vms[vm as usize].activity == Activity::Sleeping {
                self.wake(vm);
            }
        }
    }

    fn wake(&mut self, vm: u32) -> bool {
        let entry = &mut self.vms[vm as usize];
        match entry.activity {
            Activity::Sleeping => {
                self.enqueue(vm, Class::Fresh);
                true
            }
            Activity::Running => {
                entry.pending = true;
                false
            }
            Activity::Queued | Activity::Paused | Activity::Down => false,
        }
    }

    fn enqueue(&mut self, vm: u32, class: Class) {
        let entry = &mut self.vms[vm as usize];
        if entry.paused {
            entry.activity = Activity::Sleeping;
            entry.pending = true;
            return;
        }
        entry.activity = Activity::Queued;
        entry.class = class;
        match class {
            Class::Fresh => self.fresh.push_back(vm),
            Class::Bulk => self.bulk.push_back(vm),
            Class::Boot if entry.boot_slices < BOOT_SLICES => {
                entry.boot_slices += 1;
                self.boot.push_front(vm);
            }
            Class::Boot => {
                entry.boot_slices = 0;
                self.boot.push_back(vm);
            }
        }
    }

    fn next(&mut self) -> Option<u32> {
        self.turns = self.turns.wrapping_add(1);
        if !self.turns.is_multiple_of(BULK_SHARE)
            && let Some(vm) = self.fresh.pop_front()
        {
            return Some(vm);
        }
        // Those that compute and those that boot share what is left.
        let (first, second) = match self.turns / BULK_SHARE % 2 {
            0 => (&mut self.bulk, &mut self.boot),
            _ => (&mut self.boot, &mut self.bulk),
        };
        first.pop_front().or_else(|| second.pop_front()).or_else(|| self.fresh.pop_front())
    }

    fn pick(&mut self, max: usize, turns: &mut Vec<Turn>) {
        while turns.len() < max {
            let Some(vm) = self.next() else { break };
            let entry = &mut self.vms[vm as usize];
            if entry.paused {
                entry.activity = Activity::Sleeping;
                entry.pending = true;
                continue;
            }
            entry.activity = Activity::Running;
            turns.push(Turn { vm, class: entry.class, reset: std::mem::take(&mut entry.reset) });
        }
    }

    fn set_timer(&mut self, vm: u32, deadline: Option<Instant>) {
        if let Some(old) = self.vms[vm as usize].deadline.take() {
            self.timers.remove(&(old, vm));
        }
        if let Some(at) = deadline {
            self.timers.insert((at, vm));
            self.vms[vm as usize].deadline = Some(at);
        }
    }
}

#[cfg(test)]
mod tests;
