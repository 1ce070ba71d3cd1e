//! The same guests on two back ends, compared bit for bit on the way: from the first instruction to READY, and while they
//! answer HTTP requests.
//!
//! Both sides run in virtual time with the same randomness, and frames come and go at the same steps, so nothing may
//! differ but where the engines keep decoded code. Slices have other lengths on both sides: where they end must not matter.

pub mod client;
pub mod difference;

use crate::abi::{
    ETH_FRAME_BYTES, EXIT_BUDGET, EXIT_DRAIN, EXIT_IDLE, NET_SLOTS, SliceRequest, SliceResult, TIME_VIRTUAL,
    Vm,
};
use crate::backend::cpu::CpuMachines;
use crate::backend::cuda::CudaMachines;
use crate::backend::{Engine, EngineError, Machines, Slice};
use client::Client;

/// Steps between two exchanges of frames before READY, and afterwards: few, since in virtual time an idle guest runs ahead
/// from timer to timer until they end.
const BOOT_SYNC: u64 = 1 << 17;
const SERVE_SYNC: u64 = 1 << 12;
/// Slices of the other side while requests are answered.
const SERVE_SLICE: u64 = 2_741;
/// Steps without an answer after which a guest is taken to give none.
const PATIENCE: u64 = 20_000_000;

/// Machines whose VMs can be looked into.
pub trait Inspect: Machines {
    /// The state of a VM that is in no engine.
    fn state(&self, vm: u32) -> Result<Vm, EngineError>;
    /// All RAM of a VM that is in no engine.
    fn ram(&self, vm: u32) -> Result<Vec<u8>, EngineError>;
}

impl Inspect for CpuMachines {
    fn state(&self, vm: u32) -> Result<Vm, EngineError> {
        // SAFETY: no engine runs, and the reference ends here.
        Ok(unsafe { *self.vm(vm) })
    }
    fn ram(&self, vm: u32) -> Result<Vec<u8>, EngineError> {
        let pages = self.state(vm)?.ram.pages;
        let mut ram = vec![0; pages as usize * crate::abi::FRAME_BYTES as usize];
        self.read_ram(vm, 0, &mut ram);
        Ok(ram)
    }
}

impl Inspect for CudaMachines {
    fn state(&self, vm: u32) -> Result<Vm, EngineError> {
        self.vm(vm)
    }
    fn ram(&self, vm: u32) -> Result<Vec<u8>, EngineError> {
        CudaMachines::ram(self, vm)
    }
}

/// Why two sides can't be compared to the end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A back end failed.
    #[error("{0}")]
    Engine(#[from] EngineError),
    /// A VM has no address.
    #[error(transparent)]
    Address(#[from] crate::net::address::NoAddress),
    /// A guest ended.
    #[error("VM {vm} ended on the {side} after {steps} steps (exit {exit}); its console:\n{console}")]
    Ended {
        /// Which.
        vm: u32,
        /// Where.
        side: &'static str,
        /// When.
        steps: u64,
        /// How: one of the `EXIT_*` codes.
        exit: u32,
        /// What it had printed.
        console: String,
    },
    /// A guest does not answer, or something else than its page.
    #[error("VM {vm} after {steps} steps: {what}; {answered} of its requests were answered before")]
    NoAnswer {
        /// Which.
        vm: u32,
        /// When.
        steps: u64,
        /// What is wrong.
        what: String,
        /// Answers it had given.
        answered: u32,
    },
}

/// One side: its engine, and what its VMs have said.
pub struct Side {
    /// `CPU` or `GPU`.
    pub name: &'static str,
    /// The machines.
    pub machines: Box<dyn Inspect>,
    /// All that each VM has printed.
    pub console: Vec<Vec<u8>>,
    engine: Box<dyn Engine>,
    slice: u64,
    last: Vec<SliceResult>,
    steps: Vec<u64>,
    /// Steps that each VM has not taken because it waited for a frame and for nothing else.
    rested: Vec<u64>,
}

impl Side {
    /// Machines that have not run, in slices of `slice` steps.
    pub fn new(name: &'static str, machines: Box<dyn Inspect>, slice: u64) -> Result<Self, EngineError> {
        let vms = machines.vms() as usize;
        let engine = machines.engines()?.into_iter().next();
        let engine = engine.ok_or_else(|| EngineError(format!("the {name} has no engine")))?;
        let (console, last) = (vec![vec![]; vms], vec![SliceResult::default(); vms]);
        Ok(Self { name, machines, console, engine, slice, last, steps: vec![0; vms], rested: vec![0; vms] })
    }

    /// Runs all VMs until each has taken `until` steps, or waits for a frame.
    fn run(&mut self, until: u64) -> Result<(), Error> {
        let (mut list, mut results) = (Vec::new(), Vec::<SliceResult>::new());
        loop {
            list.clear();
            list.extend((0..self.machines.vms()).filter_map(|vm| {
                let left = until - self.steps[vm as usize] - self.rested[vm as usize];
                let budget = self.slice.min(left);
                let request = SliceRequest { budget, now_ticks: 0, time_mode: TIME_VIRTUAL, reserved: 0 };
                (left > 0).then_some(Slice { vm, request })
            }));
            if list.is_empty() {
                return Ok(());
            }
            for part in list.chunks(self.engine.batch().max(1)) {
                results.clear();
                self.engine.run(part, &mut results, None)?;
                for (slice, result) in part.iter().zip(&results) {
                    self.ran(slice.vm, result, until)?;
                }
            }
        }
    }

    fn ran(&mut self, vm: u32, result: &SliceResult, until: u64) -> Result<(), Error> {
        let index = vm as usize;
        self.last[index] = *result;
        self.steps[index] += result.steps;
        let printed = self.machines.mailbox(vm).drain_console(&mut self.console[index]);
        match result.exit {
            EXIT_BUDGET => {}
            // The console has room again.
            EXIT_DRAIN if printed > 0 => {}
            // Until the next exchange of frames.
            EXIT_IDLE | EXIT_DRAIN => self.rested[index] = until - self.steps[index],
            exit => {
                let (side, steps) = (self.name, self.steps[index]);
                let console = String::from_utf8_lossy(&self.console[index]).into_owned();
                return Err(Error::Ended { vm, side, steps, exit, console });
            }
        }
        Ok(())
    }

    /// The frames that a VM has sent.
    fn frames(&self, vm: u32) -> Vec<Vec<u8>> {
        let mailbox = self.machines.mailbox(vm);
        let mut buffer = [0; ETH_FRAME_BYTES as usize];
        std::iter::from_fn(|| mailbox.take_frame(&mut buffer).map(|len| buffer[..len].to_vec())).collect()
    }

    fn is_ready(&self) -> bool {
        self.console.iter().all(|text| text.windows(5).any(|word| word == b"READY"))
    }
}

/// What both sides do together. With one side alone, the same guests do the same.
pub struct Pair {
    /// The side that the other is compared to.
    pub reference: Side,
    /// The side in question.
    pub other: Option<Side>,
    /// Steps that all VMs have taken.
    pub at: u64,
    requests: u32,
    /// Once all VMs are READY.
    clients: Option<Vec<Client>>,
    /// Frames for VMs whose slots are full.
    waiting: Vec<Vec<Vec<u8>>>,
    answers: (u32, u64),
    /// The first VM whose frames were not the same.
    frames_differ: Option<u32>,
}

impl Pair {
    /// Two sides before their first step; each VM is to answer so many requests once all are READY.
    pub fn new(reference: Side, other: Option<Side>, requests: u32) -> Self {
        let waiting = vec![vec![]; reference.steps.len()];
        let (at, clients, frames_differ) = (0, None, None);
        Self { reference, other, at, requests, clients, waiting, answers: (0, 0), frames_differ }
    }

    /// All VMs have printed READY.
    pub fn is_ready(&self) -> bool {
        self.clients.is_some()
    }

    /// READY, and all requests are answered.
    pub fn is_done(&self) -> bool {
        self.clients.as_ref().is_some_and(|clients| clients.iter().all(Client::is_done))
    }

    /// Requests that were answered, of all VMs together.
    pub fn answered(&self) -> u32 {
        self.clients.iter().flatten().map(|client| client.answered).sum()
    }

    /// The first VM that has sent other frames on the other side.
    pub fn frames_differ(&self) -> Option<u32> {
        self.frames_differ
    }

    /// Runs until all VMs have taken `until` steps, all is done, or other frames were sent.
    pub fn advance(&mut self, until: u64) -> Result<(), Error> {
        while self.at < until && !self.is_done() && self.frames_differ.is_none() {
            let every = if self.is_ready() { SERVE_SYNC } else { BOOT_SYNC };
            let exchange = (self.at / every + 1) * every;
            let target = exchange.min(until);
            self.reference.run(target)?;
            if let Some(other) = &mut self.other {
                other.run(target)?;
            }
            self.at = target;
            if target == exchange {
                self.exchange()?;
            }
        }
        Ok(())
    }

    /// Hands the VMs' frames to their clients, and the clients' to the VMs.
    fn exchange(&mut self) -> Result<(), Error> {
        if self.clients.is_none() && self.reference.is_ready() {
            let vms = 0..self.reference.machines.vms();
            self.clients = Some(vms.map(|vm| Client::new(vm, self.requests)).collect::<Result<_, _>>()?);
            self.answers = (0, self.at);
            if let Some(other) = &mut self.other {
                other.slice = other.slice.min(SERVE_SLICE);
            }
        }
        for vm in 0..self.reference.machines.vms() {
            let index = vm as usize;
            let frames = self.reference.frames(vm);
            if self.other.as_ref().is_some_and(|other| other.frames(vm) != frames) {
                self.frames_differ.get_or_insert(vm);
            }
            if let Some(client) = self.clients.as_mut().and_then(|clients| clients.get_mut(index)) {
                frames.iter().for_each(|frame| client.take(frame));
                self.waiting[index].extend(client.run(self.reference.last[index].time_ticks));
                if let Some(what) = client.wrong.clone() {
                    return Err(Error::NoAnswer { vm, steps: self.at, what, answered: client.answered });
                }
            }
            self.give(vm);
        }
        let answered = self.answered();
        if answered > self.answers.0 || !self.is_ready() {
            self.answers = (answered, self.at);
        }
        if self.at - self.answers.1 > PATIENCE
            && let Some(client) = self.clients.iter().flatten().position(|client| !client.is_done())
        {
            let answered = self.clients.iter().flatten().nth(client).map_or(0, |client| client.answered);
            let what = format!("no answer for {PATIENCE} steps");
            return Err(Error::NoAnswer { vm: client as u32, steps: self.at, what, answered });
        }
        Ok(())
    }

    /// Gives a VM the frames that wait for it, as far as it has room on both sides.
    fn give(&mut self, vm: u32) {
        let sides: Vec<_> = [Some(&self.reference), self.other.as_ref()].into_iter().flatten().collect();
        let waiting = &mut self.waiting[vm as usize];
        let mut given = 0;
        for frame in waiting.iter().take(NET_SLOTS as usize) {
            let mailboxes = || sides.iter().map(|side| side.machines.mailbox(vm));
            if mailboxes().any(|mailbox| mailbox.receive_full()) {
                break;
            }
            // All have room, and the client's frames are no longer than the link allows.
            for mailbox in mailboxes() {
                mailbox.send_frame(frame);
            }
            given += 1;
        }
        waiting.drain(..given);
    }
}
