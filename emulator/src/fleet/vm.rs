//! What the fleet knows of one VM.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::abi::SliceResult;
use crate::console::hub::Console;
use crate::fleet::clock::Clock;
use crate::fleet::sched::Activity;

/// How far a VM has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    /// From the first instruction to READY.
    Booting,
    /// /init has said READY.
    Ready,
    /// The guest has shut down.
    Stopped,
    /// It can't go on.
    Failed(String),
}

impl Life {
    /// Whether it does not run again, unless it is reset.
    pub fn is_down(&self) -> bool {
        matches!(self, Life::Stopped | Life::Failed(_))
    }

    /// The same without the reason.
    pub fn stage(&self) -> Stage {
        match self {
            Life::Booting => Stage::Booting,
            Life::Ready => Stage::Ready,
            Life::Stopped => Stage::Stopped,
            Life::Failed(_) => Stage::Failed,
        }
    }
}

/// [`Life`] without the reason of a failure: cheap to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Until READY.
    Booting,
    /// READY was said.
    Ready,
    /// Shut down.
    Stopped,
    /// It can't go on.
    Failed,
}

/// What [`crate::fleet::Fleet::survey`] tells of a VM.
#[derive(Clone, Copy, Debug)]
pub struct Glance {
    /// VM number.
    pub vm: u32,
    /// How far it has come.
    pub stage: Stage,
    /// What it is doing.
    pub activity: Activity,
    /// Its counters.
    pub counters: Counters,
}

/// When and where a VM said READY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyAt {
    /// Since the start of the program.
    pub after: Duration,
    /// Instructions retired.
    pub instructions: u64,
}

/// Counters of one VM over all its reboots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Instructions retired.
    pub instructions: u64,
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// Frames dropped at the VM's device, or because nothing was attached to it.
    pub dropped: u64,
    /// Times it has started over, by its own wish or by a reset.
    pub reboots: u64,
}

impl Counters {
    fn of(result: &SliceResult) -> Self {
        Self {
            instructions: result.instret,
            rx_frames: result.rx_frames,
            tx_frames: result.tx_frames,
            dropped: result.net_dropped,
            reboots: 0,
        }
    }

    /// Sums.
    pub fn add(&mut self, other: &Counters) {
        self.instructions += other.instructions;
        self.rx_frames += other.rx_frames;
        self.tx_frames += other.tx_frames;
        self.dropped += other.dropped;
        self.reboots += other.reboots;
    }
}

/// One VM.
pub(crate) struct Vm {
    pub record: Mutex<Record>,
    pub console: Console,
    /// Held while a frame is put on the receive ring: the mailbox has room for one producer.
    pub receive: Mutex<()>,
    /// Held while a frame is taken from the transmit ring.
    pub transmit: Mutex<()>,
    /// The bridge has found the receive ring full.
    pub wants_room: AtomicBool,
    /// The VM waits until the bridge has taken frames.
    pub tx_blocked: AtomicBool,
    /// It is on the list of VMs that may have sent frames.
    pub dirty: AtomicBool,
    /// It never runs again.
    pub down: AtomicBool,
}

pub(crate) struct Record {
    pub life: Life,
    pub ready: Option<ReadyAt>,
    pub clock: Clock,
    /// From the resets before.
    pub earlier: Counters,
    /// Since the last reset.
    pub last: SliceResult,
    /// Reboots without READY in between.
    pub futile_boots: u32,
}

impl Vm {
    pub fn new() -> Self {
        Self {
            record: Mutex::new(Record {
                life: Life::Booting,
                ready: None,
                clock: Clock::default(),
                earlier: Counters::default(),
                last: SliceResult::default(),
                futile_boots: 0,
            }),
            console: Console::default(),
            receive: Mutex::new(()),
            transmit: Mutex::new(()),
            wants_room: AtomicBool::new(false),
            tx_blocked: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            down: AtomicBool::new(false),
        }
    }
}

impl Record {
    pub fn counters(&self) -> Counters {
        let mut sum = self.earlier;
        sum.add(&Counters::of(&self.last));
        sum
    }

    /// The machine is as before its first instruction.
    pub fn restart(&mut self) {
        self.earlier = self.counters();
        self.earlier.reboots += 1;
        self.last = SliceResult::default();
        self.clock = Clock::default();
        if self.life == Life::Booting {
            self.futile_boots += 1;
        } else {
            self.futile_boots = 0;
        }
        self.life = Life::Booting;
    }

    /// READY was said; true if for the first time, which is what is measured.
    pub fn is_ready(&mut self, started: Instant, instructions: u64) -> bool {
        self.life = Life::Ready;
        let first = self.ready.is_none();
        self.ready.get_or_insert(ReadyAt { after: started.elapsed(), instructions });
        first
    }
}

/// A VM as others see it.
#[derive(Clone, Debug)]
pub struct VmStatus {
    /// VM number.
    pub vm: u32,
    /// How far it has come.
    pub life: Life,
    /// What it is doing.
    pub activity: Activity,
    /// Its first READY.
    pub ready: Option<ReadyAt>,
    /// Its counters.
    pub counters: Counters,
    /// Bytes of RAM that belong to it alone.
    pub private_bytes: u64,
    /// Program counter at the end of the last slice.
    pub pc: u32,
    /// Cause, epc and tval of its last trap.
    pub last_trap: [u32; 3],
}

impl VmStatus {
    /// One word: `booting`, `running`, `sleeping`, `paused`, `stopped` or `failed`.
    pub fn state(&self) -> &'static str {
        match (&self.life, self.activity) {
            (Life::Failed(_), _) => "failed",
            (Life::Stopped, _) => "stopped",
            (_, Activity::Paused) => "paused",
            (Life::Booting, _) => "booting",
            (Life::Ready, Activity::Sleeping) => "sleeping",
            (Life::Ready, _) => "running",
        }
    }

    /// Why it does not run any more, or how far it has come.
    pub fn reason(&self) -> String {
        match &self.life {
            Life::Failed(why) => why.clone(),
            Life::Stopped => "the guest has shut down".into(),
            Life::Booting => "no READY line yet".into(),
            Life::Ready => "ready".into(),
        }
    }
}
