//! The comparison of two back ends, without a GPU: engine W on fibers in its place. Needs a guest image: the folder that
//! GUEST_IMAGE names (`cargo xtask test` builds one).

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::By;
use emulator::abi::{SliceResult, Vm};
use emulator::backend::cpu::{Config, CpuMachines};
use emulator::backend::{Engine, EngineError, Machines, MemoryUse, Slice, Watch};
use emulator::guest::GuestImage;
use emulator::lockstep::{Inspect, Pair, Side, difference};
use emulator::mailbox::MailboxRef;
use emulator::memory::BootMemory;

fn boot() -> Option<Arc<BootMemory>> {
    let Some(folder) = std::env::var_os("GUEST_IMAGE") else {
        println!("SKIPPED: no guest image: GUEST_IMAGE is not set (cargo xtask test sets it)");
        return None;
    };
    let image = GuestImage::load(Path::new(&folder), None).unwrap_or_else(|error| panic!("{error}"));
    Some(Arc::new(image.into()))
}

fn machines(boot: &Arc<BootMemory>, vms: u32) -> CpuMachines {
    let boot = Arc::clone(boot);
    let epoch_ns = 1_700_000_000_000_000_000;
    CpuMachines::new(Config { boot, vms, threads: 1, private_frames: None, epoch_ns, seed: Some(3) }).unwrap()
}

/// What goes wrong on purpose: bits of a register of a VM flip after a step.
#[derive(Clone, Copy)]
struct Fault {
    vm: u32,
    step: u64,
    register: usize,
    bits: u32,
}

/// Machines run by an engine for tests.
struct Other {
    machines: Arc<CpuMachines>,
    by: By,
    fault: Option<Fault>,
}

struct OtherEngine {
    machines: Arc<CpuMachines>,
    by: By,
    fault: Option<Fault>,
}

impl Engine for OtherEngine {
    fn batch(&self) -> usize {
        1
    }
    fn run(
        &mut self,
        slices: &[Slice],
        results: &mut Vec<SliceResult>,
        _: Option<Watch<'_>>,
    ) -> Result<(), EngineError> {
        for slice in slices {
            let mut request = slice.request;
            let mut run = |budget| {
                request.budget = budget;
                // SAFETY: built from the same headers; no other engine runs the VM.
                unsafe { self.machines.run_on(self.by.function().unwrap(), slice.vm, &request) }
            };
            let before = self.machines.state(slice.vm)?.hart.steps;
            let mut steps = 0;
            if let Some(fault) = self.fault.filter(|fault| fault.vm == slice.vm)
                && before < fault.step
                && fault.step <= before + slice.request.budget
            {
                steps = run(fault.step - before).steps;
                // SAFETY: no engine runs the VM.
                unsafe { self.machines.vm(slice.vm) }.hart.x[fault.register] ^= fault.bits;
            }
            let mut result = run(slice.request.budget - steps);
            result.steps += steps;
            results.push(result);
        }
        Ok(())
    }
}

impl Machines for Other {
    fn backend(&self) -> &'static str {
        "test"
    }
    fn engine(&self) -> String {
        format!("{:?}", self.by)
    }
    fn vms(&self) -> u32 {
        self.machines.vms()
    }
    fn engines(&self) -> Result<Vec<Box<dyn Engine>>, EngineError> {
        let (machines, by, fault) = (Arc::clone(&self.machines), self.by, self.fault);
        Ok(vec![Box::new(OtherEngine { machines, by, fault })])
    }
    fn mailbox(&self, vm: u32) -> MailboxRef<'_> {
        self.machines.mailbox(vm)
    }
    fn memory(&self) -> MemoryUse {
        self.machines.memory()
    }
    fn reset(&self, vm: u32) -> Result<(), EngineError> {
        self.machines.reset(vm)
    }
}

impl Inspect for Other {
    fn state(&self, vm: u32) -> Result<Vm, EngineError> {
        self.machines.state(vm)
    }
    fn ram(&self, vm: u32) -> Result<Vec<u8>, EngineError> {
        self.machines.ram(vm)
    }
}

fn pair(boot: &Arc<BootMemory>, vms: u32, by: By, fault: Option<Fault>, requests: u32) -> Pair {
    let reference = Side::new("CPU", Box::new(machines(boot, vms)), 1 << 20).unwrap();
    let other = Other { machines: Arc::new(machines(boot, vms)), by, fault };
    Pair::new(reference, Some(Side::new("GPU", Box::new(other), 65_537).unwrap()), requests)
}

#[test]
fn guests_boot_and_answer_alike() {
    let Some(boot) = boot() else { return };
    let mut pair = pair(&boot, 1, By::Warp, None, 4);
    while !pair.is_done() {
        pair.advance(pair.at + 1_000_000).unwrap();
        if let Some(found) = difference::find(&pair).unwrap() {
            panic!("VM {} differs after {} steps: {}", found.vm, pair.at, found.what());
        }
        assert!(pair.is_ready() || pair.at < 40_000_000, "not READY after {} steps", pair.at);
    }
    assert_eq!(pair.answered(), 4);
    println!("4 requests answered, the same after {} steps", pair.at);
}

#[test]
fn the_first_wrong_step_is_found() {
    let Some(boot) = boot() else { return };
    // tp is Linux's current task: nothing writes it before the first switch of tasks, whatever the kernel's build.
    let fault = Fault { vm: 1, step: 1_234_567, register: 4, bits: 0x40 };
    let fresh = || Ok(pair(&boot, 2, By::Step, Some(fault), 0));
    let mut first: Pair = fresh().unwrap();
    first.advance(1_000_000).unwrap();
    assert!(difference::find(&first).unwrap().is_none());
    first.advance(1_400_000).unwrap();
    let found = difference::find(&first).unwrap().unwrap();
    assert_eq!(found.vm, 1);
    let (good, bad, closest) = difference::narrow(fresh, (1_000_000, 1_400_000)).unwrap();
    assert_eq!((good, bad), (fault.step - 1, fault.step));
    let closest = closest.unwrap();
    assert!(closest.what().starts_with("CPU: x4 "), "{}", closest.what());
    let folder = tempfile::tempdir().unwrap();
    closest.write(folder.path()).unwrap();
    for name in ["cpu.txt", "gpu.txt", "cpu.ram", "gpu.ram", "cpu.console", "gpu.console"] {
        assert!(folder.path().join(name).is_file(), "{name}");
    }
    let trace = difference::trace(fresh().unwrap(), 1, bad).unwrap();
    let marked: Vec<&str> = trace.lines().filter(|line| line.contains("<-")).collect();
    assert_eq!(marked.len(), 1, "{trace}");
    assert!(marked[0].trim_start().starts_with(&fault.step.to_string()), "{trace}");
    assert_eq!(trace.lines().count(), 105, "{trace}");
}
