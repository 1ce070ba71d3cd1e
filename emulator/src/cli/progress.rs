//! What a run has come to so far: for the report, for `status`, for the live line.

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use emulator::fleet::{Fleet, Stage};
use emulator::net::counters::Counters;
use emulator::net::ports;
use emulator::net::probe::{Outcome, Probe, Target};
use emulator::net::reach::Reach;
use emulator::net::record::Direction;
use emulator::report::{Boot, Http, Report};
use serde::Serialize;

/// VMs asked over HTTP at once, if there are files for so many. A guest needs many slices for an answer, so that it is
/// the number of guests at work that counts.
const AT_ONCE: u64 = 1024;
/// For one answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A run under way.
pub struct Progress {
    /// The fleet.
    pub fleet: Arc<Fleet>,
    /// What the report says whatever comes.
    pub head: Report,
    /// When the first slice ran, at the earliest.
    pub began: Instant,
    /// The bridge's counters.
    pub bridge: Option<Arc<Counters>>,
    /// Answers over HTTP, if they are waited for.
    pub http: Option<Arc<Answers>>,
    /// Set once all VMs have been ready.
    pub boot: Mutex<Option<Boot>>,
    /// How the VMs are reached, if there is a bridge.
    pub reach: Option<Reach>,
}

/// Answers over HTTP.
#[derive(Default)]
pub struct Answers {
    inner: Mutex<Answered>,
    /// Ends the asking.
    pub stop: AtomicBool,
}

#[derive(Default)]
struct Answered {
    vms: u32,
    first: Option<Instant>,
    last: Option<Instant>,
    outcome: Option<io::Result<Outcome>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Answers {
    /// VMs that have answered.
    pub fn vms(&self) -> u32 {
        lock(&self.inner).vms
    }

    /// How the asking ended, once.
    pub fn take_outcome(&self) -> Option<io::Result<Outcome>> {
        lock(&self.inner).outcome.take()
    }

    /// Asks all VMs of the fleet, in a thread of its own.
    pub fn ask(
        self: &Arc<Self>,
        fleet: &Arc<Fleet>,
        reach: Reach,
        deadline: Instant,
    ) -> io::Result<JoinHandle<()>> {
        // Each takes two files: the bridge's and ours.
        let at_once = (ports::spare_files() / 3).clamp(16, AT_ONCE) as usize;
        let probe = Probe { reach, at_once, patience: PATIENCE, deadline: Some(deadline) };
        let (answers, fleet) = (self.clone(), fleet.clone());
        std::thread::Builder::new().name("http".into()).spawn(move || {
            let target = |vm| match fleet.stage(vm) {
                Stage::Booting => Target::NotReady,
                Stage::Ready => Target::Ready,
                Stage::Stopped | Stage::Failed => Target::Down,
            };
            let answered = |_, at: Instant| {
                let mut inner = lock(&answers.inner);
                inner.vms += 1;
                inner.first = Some(inner.first.map_or(at, |first| first.min(at)));
                inner.last = Some(inner.last.map_or(at, |last| last.max(at)));
            };
            let outcome = probe.run(target, &answers.stop, answered);
            lock(&answers.inner).outcome = Some(outcome);
            fleet.nudge();
        })
    }
}

impl Progress {
    /// Notes when the boot was over, for the speed; true if it is over since the last call.
    pub fn note_boot(&self) -> bool {
        let mut boot = lock(&self.boot);
        let over = boot.is_none() && self.fleet.been_ready() == self.fleet.vms();
        if over {
            *boot = Some(self.so_far());
        }
        over
    }

    fn so_far(&self) -> Boot {
        let totals = self.fleet.totals();
        Boot { took: self.began.elapsed(), steps: totals.steps, engine_time: totals.engine_time }
    }

    /// The report as of now.
    pub fn report(&self) -> Report {
        let mut report = self.head.clone();
        let boot = lock(&self.boot).unwrap_or_else(|| self.so_far());
        let bridge = self.bridge.as_ref().map(|counters| counters.snapshot()).unwrap_or_default();
        report.add_fleet(&self.fleet, boot, &bridge);
        report.http = self.http.as_ref().map(|answers| {
            let inner = lock(&answers.inner);
            let seconds = |at: Option<Instant>| {
                at.map(|at| at.saturating_duration_since(self.fleet.started()).as_secs_f64())
            };
            Http { vms: inner.vms, seconds_first: seconds(inner.first), seconds_last: seconds(inner.last) }
        });
        report
    }

    /// The document of `emulator status`.
    pub fn status(&self) -> String {
        let vm = |n| {
            let status = self.fleet.status(n);
            VmLine {
                vm: n,
                state: status.state(),
                reason: status.life.is_down().then(|| status.reason()),
                port: self.reach.as_ref().and_then(|reach| reach.port_of(n)),
                instructions: status.counters.instructions,
                private_bytes: status.private_bytes,
                packets_in: status.counters.rx_frames,
                packets_out: status.counters.tx_frames,
                reboots: status.counters.reboots,
            }
        };
        let status = Status {
            pid: std::process::id(),
            seconds: self.fleet.started().elapsed().as_secs_f64(),
            report: self.report(),
            vm: (0..self.fleet.vms()).map(vm).collect(),
        };
        // Plain numbers, strings and lists always have a JSON form.
        serde_json::to_string_pretty(&status).unwrap_or_default() + "\n"
    }

    /// The counters of a VM's link, as the guest's `ethtool -S` would count: rx is what the VM gets.
    pub fn link(&self, vm: u32) -> String {
        let mut text = format!("Link statistics of VM {vm}:\n");
        let mut line = |name: &str, value: u64| {
            // Writing to a string can't fail.
            let _ = writeln!(text, "     {name}: {value}");
        };
        let device = self.fleet.status(vm).counters;
        line("device_rx_packets", device.rx_frames);
        line("device_tx_packets", device.tx_frames);
        line("device_dropped", device.dropped);
        let Some(link) = self.bridge.as_ref().and_then(|counters| counters.vm(vm)) else { return text };
        line("rx_packets", link.packets_in);
        line("rx_bytes", link.bytes_in);
        line("tx_packets", link.packets_out);
        line("tx_bytes", link.bytes_out);
        for (way, direction) in [("rx", Direction::In), ("tx", Direction::Out)] {
            line(&format!("{way}_dropped"), link.drops(direction).map(|(_, count)| count).sum());
            for (reason, count) in link.drops(direction) {
                line(&format!("{way}_dropped_{}", reason.name()), count);
            }
        }
        text
    }

    /// Ends what runs beside the fleet.
    pub fn stop_asking(&self) {
        if let Some(answers) = &self.http {
            answers.stop.store(true, SeqCst);
        }
    }
}

#[derive(Serialize)]
struct Status {
    pid: u32,
    seconds: f64,
    report: Report,
    vm: Vec<VmLine>,
}

#[derive(Serialize)]
struct VmLine {
    vm: u32,
    state: &'static str,
    reason: Option<String>,
    port: Option<u16>,
    instructions: u64,
    private_bytes: u64,
    packets_in: u64,
    packets_out: u64,
    reboots: u64,
}
