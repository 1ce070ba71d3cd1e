//! A back end whose guests are closures, so that the fleet can be tested without a machine.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "it is part of tests")]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use emulator::abi::*;
use emulator::backend::{Engine, EngineError, Machines, MemoryUse, Slice, Watch};
use emulator::fleet::clock::TimeMode;
use emulator::fleet::{Budget, Fleet, FleetConfig, Life};
use emulator::mailbox::MailboxRef;

/// What a guest does in one slice.
pub type Guest = Box<dyn FnMut(&mut Port, &SliceRequest) -> u32 + Send>;

/// The guest's side of its mailbox, and what its slice reports.
pub struct Port {
    at: *mut Mailbox,
    pub result: SliceResult,
    /// Slices since the reset.
    pub slices: u64,
}

// SAFETY: the fake engine uses a port under its VM's lock only, one thread at a time.
unsafe impl Send for Port {}

macro_rules! word {
    ($self:ident . $field:ident) => {
        // SAFETY: the mailbox lives as long as the fake machines.
        unsafe { AtomicU32::from_ptr(&raw mut (*$self.at).rings.$field) }
    };
}

impl Port {
    /// Prints what finds room.
    pub fn print(&mut self, bytes: &[u8]) -> usize {
        let (mut head, tail) = (word!(self.out_head).load(SeqCst), word!(self.out_tail).load(SeqCst));
        let room = (CONSOLE_OUT_BYTES - head.wrapping_sub(tail)) as usize;
        for &byte in bytes.iter().take(room) {
            // SAFETY: as above; the index is masked.
            unsafe { (*self.at).out[(head % CONSOLE_OUT_BYTES) as usize] = byte };
            head = head.wrapping_add(1);
            if byte == b'\n' {
                self.result.newline_instret = self.result.instret;
            }
        }
        word!(self.out_head).store(head, SeqCst);
        bytes.len().min(room)
    }

    /// The next typed byte.
    pub fn read(&mut self) -> Option<u8> {
        let (head, tail) = (word!(self.in_head).load(SeqCst), word!(self.in_tail).load(SeqCst));
        (head != tail).then(|| {
            // SAFETY: as above; the index is masked.
            let byte = unsafe { (*self.at).input[(tail % CONSOLE_IN_BYTES) as usize] };
            word!(self.in_tail).store(tail.wrapping_add(1), SeqCst);
            byte
        })
    }

    /// Sends a frame if a slot is free.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        let (head, tail) = (word!(self.tx_head).load(SeqCst), word!(self.tx_tail).load(SeqCst));
        if head.wrapping_sub(tail) >= NET_SLOTS {
            return false;
        }
        // SAFETY: as above; the index is masked and the slot is the guest's.
        unsafe {
            let slot = &mut (*self.at).tx[(head % NET_SLOTS) as usize];
            slot.len = frame.len() as u16;
            slot.data[..frame.len()].copy_from_slice(frame);
        }
        word!(self.tx_head).store(head.wrapping_add(1), SeqCst);
        self.result.tx_frames += 1;
        true
    }

    /// The next frame that came.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        let (head, tail) = (word!(self.rx_head).load(SeqCst), word!(self.rx_tail).load(SeqCst));
        (head != tail).then(|| {
            // SAFETY: as above; the index is masked and the slot is the guest's.
            let frame = unsafe {
                let slot = &(*self.at).rx[(tail % NET_SLOTS) as usize];
                slot.data[..slot.len as usize].to_vec()
            };
            word!(self.rx_tail).store(tail.wrapping_add(1), SeqCst);
            self.result.rx_frames += 1;
            frame
        })
    }

    /// Sleeps until `ticks`, `u64::MAX` for ever.
    pub fn sleep_until(&mut self, ticks: u64) -> u32 {
        self.result.wake_ticks = ticks;
        EXIT_IDLE
    }
}

struct FakeVm {
    port: Port,
    guest: Guest,
    time: u64,
}

/// The fake machines.
pub struct Fake {
    vms: Vec<Mutex<FakeVm>>,
    mailboxes: Vec<*mut Mailbox>,
    make: Box<dyn Fn(u32) -> Guest + Send + Sync>,
    inside: Vec<AtomicBool>,
    workers: usize,
    /// Slices run in all.
    pub slices: AtomicU64,
    /// An engine fails when it is set.
    pub broken: AtomicBool,
    /// Watched slices end when nothing is left of what their VMs have sent.
    pub lingers: AtomicBool,
}

// SAFETY: mailboxes are accessed through `MailboxRef` and `Port`, which use atomics.
unsafe impl Send for Fake {}
// SAFETY: as above.
unsafe impl Sync for Fake {}

impl Fake {
    pub fn machines(
        vms: u32,
        workers: usize,
        make: impl Fn(u32) -> Guest + Send + Sync + 'static,
    ) -> Arc<FakeMachines> {
        // SAFETY: a mailbox is plain integers; all zero is its empty state.
        let mailbox = || Box::into_raw(Box::new(unsafe { std::mem::zeroed::<Mailbox>() }));
        let mailboxes: Vec<_> = (0..vms).map(|_| mailbox()).collect();
        let vm = |n: u32| FakeVm {
            port: Port { at: mailboxes[n as usize], result: SliceResult::default(), slices: 0 },
            guest: make(n),
            time: 0,
        };
        let fake = Fake {
            vms: (0..vms).map(|n| Mutex::new(vm(n))).collect(),
            inside: (0..vms).map(|_| AtomicBool::new(false)).collect(),
            mailboxes,
            make: Box::new(make),
            workers,
            slices: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            lingers: AtomicBool::new(false),
        };
        Arc::new(FakeMachines(Arc::new(fake)))
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        for mailbox in &self.mailboxes {
            // SAFETY: made by Box::into_raw in `new`, and freed once.
            drop(unsafe { Box::from_raw(*mailbox) });
        }
    }
}

/// Shares the fake with its engines.
pub struct FakeMachines(pub Arc<Fake>);

struct FakeEngine(Arc<Fake>);

impl Engine for FakeEngine {
    fn batch(&self) -> usize {
        1
    }

    fn run(
        &mut self,
        slices: &[Slice],
        results: &mut Vec<SliceResult>,
        watch: Option<Watch<'_>>,
    ) -> Result<(), EngineError> {
        if self.0.broken.load(SeqCst) {
            return Err(EngineError("the device is gone".into()));
        }
        for slice in slices {
            let n = slice.vm as usize;
            assert!(!self.0.inside[n].swap(true, SeqCst), "VM {n} in two engines");
            self.0.slices.fetch_add(1, SeqCst);
            let mut vm = self.0.vms[n].lock().unwrap();
            let vm = &mut *vm;
            vm.port.slices += 1;
            vm.port.result.steps = 1000;
            vm.port.result.instret += 1000;
            vm.time = match slice.request.time_mode {
                TIME_REAL => vm.time.max(slice.request.now_ticks),
                _ => vm.time + 1000,
            };
            vm.port.result.time_ticks = vm.time;
            vm.port.result.wake_ticks = u64::MAX;
            vm.port.result.exit = (vm.guest)(&mut vm.port, &slice.request);
            results.push(vm.port.result);
            self.0.inside[n].store(false, SeqCst);
        }
        // SAFETY: the mailboxes are freed when the fake is dropped.
        let sent =
            |slice: &Slice| unsafe { MailboxRef::new(self.0.mailboxes[slice.vm as usize]) }.has_frames();
        let began = Instant::now();
        while let Some(watch) = watch
            && self.0.lingers.load(SeqCst)
            && began.elapsed() < Duration::from_secs(20)
            && slices.iter().any(sent)
        {
            watch();
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Machines for FakeMachines {
    fn backend(&self) -> &'static str {
        "fake"
    }

    fn engine(&self) -> String {
        "closures".into()
    }

    fn vms(&self) -> u32 {
        self.0.vms.len() as u32
    }

    fn engines(&self) -> Result<Vec<Box<dyn Engine>>, EngineError> {
        let engine = || Box::new(FakeEngine(self.0.clone())) as Box<dyn Engine>;
        Ok((0..self.0.workers).map(|_| engine()).collect())
    }

    fn mailbox(&self, vm: u32) -> MailboxRef<'_> {
        // SAFETY: the mailbox is freed when the fake is dropped.
        unsafe { MailboxRef::new(self.0.mailboxes[vm as usize]) }
    }

    fn memory(&self) -> MemoryUse {
        let vms = self.0.vms.len() as u64;
        MemoryUse { shared_bytes: 1000, private_bytes: 300 * vms, overhead_bytes: 50 * vms }
    }

    fn reset(&self, vm: u32) -> Result<(), EngineError> {
        assert!(!self.0.inside[vm as usize].load(SeqCst), "reset while it runs");
        let mut state = self.0.vms[vm as usize].lock().unwrap();
        state.guest = (self.0.make)(vm);
        state.port.result = SliceResult::default();
        state.port.slices = 0;
        state.time = 0;
        Ok(())
    }
}

/// Boots for `slices` slices, says READY, then does `then`.
pub fn boots(
    vm: u32,
    slices: u64,
    mut then: impl FnMut(&mut Port, &SliceRequest) -> u32 + Send + 'static,
) -> Guest {
    Box::new(move |port, request| match port.slices {
        n if n < slices => EXIT_BUDGET,
        n if n == slices => {
            port.print(format!("READY {vm}\r\n").as_bytes());
            EXIT_BUDGET
        }
        _ => then(port, request),
    })
}

pub fn config() -> FleetConfig {
    FleetConfig {
        time: TimeMode::Virtual,
        started: Instant::now(),
        epoch: Instant::now(),
        budget: Budget::CORE,
        bridged: false,
        busy_poll: Duration::ZERO,
    }
}

/// A fleet of the fake machines that runs, without logs.
pub fn start(machines: &Arc<FakeMachines>, config: FleetConfig) -> Arc<Fleet> {
    let fleet = Arc::new(Fleet::new(machines.clone(), config, None));
    fleet.start().unwrap();
    fleet
}

/// Waits until `done`, at most 10 s.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn until_ready(fleet: &Fleet) {
    until("all VMs ready", || (0..fleet.vms()).all(|vm| fleet.status(vm).life == Life::Ready));
}
