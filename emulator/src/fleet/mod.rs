//! The fleet: which VM runs when, what it prints, what it sends, and how it ends.

pub mod capacity;
pub mod clock;
mod links;
mod poll;
pub mod sched;
mod vm;
mod worker;

use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Relaxed, SeqCst},
};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::abi::FRAME_BYTES;
use crate::backend::{EngineError, Machines, MemoryUse};
use crate::console::hub::{self, Subscription};
use crate::console::log::Logs;
use crate::fleet::clock::TimeMode;
use crate::fleet::sched::Scheduler;
use crate::net::Links;
use crate::sync::lock;

pub use sched::Activity;
pub use vm::{Counters, Glance, Life, ReadyAt, Stage, VmStatus};

/// Instructions that a VM may run in one slice.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Just woken: others may wait for an answer too.
    pub fresh: u64,
    /// Used up its last budget: throughput counts.
    pub bulk: u64,
}

impl Budget {
    /// For one VM at a time on a core: 1 to 3 ms.
    pub const CORE: Budget = Budget { fresh: 200_000, bulk: 1_000_000 };
}

/// What a fleet is to do.
#[derive(Clone, Copy, Debug)]
pub struct FleetConfig {
    /// How guest time passes after the boot.
    pub time: TimeMode,
    /// When the program started: READY times count from here.
    pub started: Instant,
    /// When it is tick 0 of guest time.
    pub epoch: Instant,
    /// Slice lengths.
    pub budget: Budget,
    /// A bridge will take the guests' frames; otherwise they are dropped and counted.
    pub bridged: bool,
    /// For so long after a packet its answer and the next packet are waited for without sleeping, in fleets of few VMs
    /// whose machines leave the host's cores alone. Takes two cores meanwhile.
    pub busy_poll: Duration,
}

pub(crate) struct Shared {
    machines: Arc<dyn Machines>,
    config: FleetConfig,
    sched: Scheduler,
    vms: Vec<vm::Vm>,
    logs: Option<Logs>,
    /// VMs that may have sent frames since the bridge last asked; each at most once.
    dirty: Mutex<Vec<u32>>,
    bridge: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    /// VMs that have said READY at least once, and VMs that are down.
    been_ready: AtomicU32,
    downs: AtomicU32,
    steps: AtomicU64,
    spent: Spent,
    news: Mutex<News>,
    told: Condvar,
    /// Held while a VM is reset: back ends do that for one VM at a time.
    resetting: Mutex<()>,
}

/// What the workers have done, and how long it took, in nanoseconds over all of them.
#[derive(Default)]
struct Spent {
    calls: AtomicU64,
    slices: AtomicU64,
    waiting: AtomicU64,
    preparing: AtomicU64,
    engine: AtomicU64,
    settling: AtomicU64,
}

/// What the workers have done, and how long it took them all together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Calls of engines: launches, on a GPU.
    pub calls: u64,
    /// Slices that they ran.
    pub slices: u64,
    /// Until a VM was runnable.
    pub waiting: Duration,
    /// Making lists of slices.
    pub preparing: Duration,
    /// In engines.
    pub engine: Duration,
    /// Looking after what the VMs left behind.
    pub settling: Duration,
}

#[derive(Default)]
struct News {
    /// Counts changes of VMs' lives.
    changes: u64,
    fault: Option<String>,
}

impl Shared {
    /// A VM has become ready or has ended.
    fn changed(&self) {
        lock(&self.news).changes += 1;
        self.told.notify_all();
    }

    /// The machine itself failed: nothing can go on.
    fn fault(&self, why: String) {
        {
            let mut news = lock(&self.news);
            news.changes += 1;
            news.fault.get_or_insert(why);
        }
        self.sched.stop();
        self.told.notify_all();
    }
}

/// Totals over the fleet.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// VMs.
    pub vms: u32,
    /// VMs that have said READY and still run.
    pub ready: u32,
    /// VMs that still boot.
    pub booting: u32,
    /// VMs that have shut down.
    pub stopped: u32,
    /// VMs that have failed.
    pub failed: u32,
    /// Sums of the counters.
    pub counters: Counters,
    /// Steps of all engines.
    pub steps: u64,
    /// Time spent in all engines.
    pub engine_time: Duration,
    /// Memory in use.
    pub memory: MemoryUse,
}

/// A fleet of VMs.
pub struct Fleet {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Fleet {
    /// A fleet that has not started yet. Console output goes to `logs`, if given.
    pub fn new(machines: Arc<dyn Machines>, config: FleetConfig, logs: Option<Logs>) -> Self {
        let vms = machines.vms();
        let shared = Shared {
            sched: Scheduler::new(&machines.parts()),
            machines,
            config,
            vms: (0..vms).map(|_| vm::Vm::new()).collect(),
            logs,
            dirty: Mutex::default(),
            bridge: Mutex::new(None),
            been_ready: AtomicU32::new(0),
            downs: AtomicU32::new(0),
            steps: AtomicU64::new(0),
            spent: Spent::default(),
            news: Mutex::default(),
            told: Condvar::new(),
            resetting: Mutex::new(()),
        };
        Self { shared: Arc::new(shared), workers: Mutex::default() }
    }

    /// Starts one worker thread per engine.
    pub fn start(&self) -> Result<(), EngineError> {
        for (n, engine) in self.shared.machines.engines()?.into_iter().enumerate() {
            let shared = self.shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("engine-{n}"))
                .spawn(move || worker::work(&shared, engine));
            match worker {
                Ok(worker) => lock(&self.workers).push(worker),
                Err(error) => {
                    self.stop();
                    return Err(EngineError(format!("no thread for an engine: {error}")));
                }
            }
        }
        Ok(())
    }

    /// Ends the workers after their current slices, and writes the logs.
    pub fn stop(&self) {
        self.shared.sched.stop();
        for worker in std::mem::take(&mut *lock(&self.workers)) {
            // A panic was printed and reported as a fault.
            let _ = worker.join();
        }
        if let Some(logs) = &self.shared.logs {
            logs.close();
        }
    }

    /// The links, for a bridge.
    pub fn links(&self) -> Arc<dyn Links> {
        self.shared.clone()
    }

    /// Number of VMs.
    pub fn vms(&self) -> u32 {
        self.shared.machines.vms()
    }

    /// `cpu` or `cuda`.
    pub fn backend(&self) -> &'static str {
        self.shared.machines.backend()
    }

    /// The engine's name.
    pub fn engine(&self) -> String {
        self.shared.machines.engine()
    }

    /// When the program started.
    pub fn started(&self) -> Instant {
        self.shared.config.started
    }

    /// One VM.
    pub fn status(&self, vm: u32) -> VmStatus {
        let activity = self.shared.sched.activity(vm);
        let record = lock(&self.shared.vms[vm as usize].record);
        VmStatus {
            vm,
            life: record.life.clone(),
            activity,
            ready: record.ready,
            counters: record.counters(),
            private_bytes: u64::from(record.last.private_frames) * u64::from(FRAME_BYTES),
            pc: record.last.pc,
            last_trap: record.last.last_trap,
        }
    }

    /// How far a VM has come.
    pub fn stage(&self, vm: u32) -> Stage {
        lock(&self.shared.vms[vm as usize].record).life.stage()
    }

    /// What the workers have done so far.
    pub fn work(&self) -> Work {
        let spent = &self.shared.spent;
        let time = |nanos: &AtomicU64| Duration::from_nanos(nanos.load(Relaxed));
        Work {
            calls: spent.calls.load(Relaxed),
            slices: spent.slices.load(Relaxed),
            waiting: time(&spent.waiting),
            preparing: time(&spent.preparing),
            engine: time(&spent.engine),
            settling: time(&spent.settling),
        }
    }

    /// The whole fleet.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals {
            vms: self.vms(),
            steps: self.shared.steps.load(Relaxed),
            engine_time: self.work().engine,
            memory: self.shared.machines.memory(),
            ..Totals::default()
        };
        for vm in &self.shared.vms {
            let record = lock(&vm.record);
            match record.life {
                Life::Booting => totals.booting += 1,
                Life::Ready => totals.ready += 1,
                Life::Stopped => totals.stopped += 1,
                Life::Failed(_) => totals.failed += 1,
            }
            totals.counters.add(&record.counters());
        }
        totals
    }

    /// The last lines of a VM's console, printable.
    pub fn last_lines(&self, vm: u32) -> Vec<String> {
        self.shared.vms[vm as usize].console.last_lines()
    }

    /// Listens to a VM's console.
    pub fn subscribe(&self, vm: u32) -> Subscription {
        self.shared.vms[vm as usize].console.subscribe()
    }

    /// Types into a VM's console; returns how much found room.
    pub fn type_in(&self, vm: u32, bytes: &[u8]) -> usize {
        let taken = self.shared.vms[vm as usize].console.type_in(bytes, self.shared.machines.mailbox(vm));
        if taken > 0 {
            self.shared.sched.wake(vm);
        }
        taken
    }

    /// Types into a VM's console, waiting until the guest takes it; returns how much found room in time.
    pub fn type_all(&self, vm: u32, bytes: &[u8], timeout: Duration) -> usize {
        let console = &self.shared.vms[vm as usize].console;
        hub::write_all(console, bytes, timeout, |bytes| self.type_in(vm, bytes))
    }

    /// Whether the VM will never run again.
    pub fn is_down(&self, vm: u32) -> bool {
        self.shared.vms[vm as usize].down.load(SeqCst)
    }

    /// VMs that have said READY at least once.
    pub fn been_ready(&self) -> u32 {
        self.shared.been_ready.load(SeqCst)
    }

    /// VMs that will never run again.
    pub fn downs(&self) -> u32 {
        self.shared.downs.load(SeqCst)
    }

    /// Keeps a VM from running.
    pub fn pause(&self, vm: u32) {
        self.shared.sched.pause(vm);
    }

    /// Lets a paused VM go on.
    pub fn resume(&self, vm: u32) {
        self.shared.sched.resume(vm);
    }

    /// Puts the VM back to before its first instruction and boots it, soon; also one that is paused or down.
    pub fn reset(&self, vm: u32) {
        self.shared.sched.reset(vm);
    }

    /// Looks at all VMs, in order, fast enough for once a second at any size. `activities` is kept from call to call.
    pub fn survey(&self, activities: &mut Vec<Activity>, mut each: impl FnMut(&Glance)) {
        self.shared.sched.activities(activities);
        for (n, (vm, activity)) in self.shared.vms.iter().zip(activities.iter()).enumerate() {
            let record = lock(&vm.record);
            let glance = Glance {
                vm: n as u32,
                stage: record.life.stage(),
                activity: *activity,
                counters: record.counters(),
            };
            drop(record);
            each(&glance);
        }
    }

    /// Bytes that the VM has printed so far: a cheap way to see whether there is news.
    pub fn printed(&self, vm: u32) -> u64 {
        self.shared.vms[vm as usize].console.printed()
    }

    /// Memory in use.
    pub fn memory(&self) -> MemoryUse {
        self.shared.machines.memory()
    }

    /// Keeps what makes the next start faster; returns what people should know.
    pub fn keep(&self) -> Vec<String> {
        if self.fault().is_some() {
            return Vec::new();
        }
        self.shared.machines.keep()
    }

    /// Steps of all engines so far.
    pub fn steps(&self) -> u64 {
        self.shared.steps.load(Relaxed)
    }

    /// Why the machine itself failed, if it did.
    pub fn fault(&self) -> Option<String> {
        lock(&self.shared.news).fault.clone()
    }

    /// Waits until a VM becomes ready or ends, or the machine fails; `seen` is what the last call returned (first: 0).
    pub fn wait(&self, seen: u64, timeout: Duration) -> u64 {
        let news = lock(&self.shared.news);
        let (news, _) = self
            .shared
            .told
            .wait_timeout_while(news, timeout, |news| news.changes == seen)
            .unwrap_or_else(PoisonError::into_inner);
        news.changes
    }

    /// Ends a [`Fleet::wait`] under way.
    pub fn nudge(&self) {
        self.shared.changed();
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.stop();
    }
}
