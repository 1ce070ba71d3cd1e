//! A bench for the machine: RAM with hand-assembled code, exact steps, and accesses from the driver's side.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "it is part of tests")]

pub mod asm;
pub mod net;

use asm::*;
use emulator::abi::{EXIT_BUDGET, Hart, Mailbox, Pool, SliceRequest, SliceResult, TIME_VIRTUAL, Vm};
use emulator::backend::cpu::{Config, CpuMachines, EngineFunction};
use emulator::backend::cuda::EngineKind;
use emulator::backend::cuda::mapped::{MappedDevice, MappedMachines};
use emulator::backend::{Engine, Machines, Slice};
use emulator::mailbox::MailboxRef;
use emulator::memory::{BootMemory, Piece};
use std::cell::Cell;
use std::sync::{Arc, OnceLock};

/// Where programs start unless a test says otherwise.
pub const CODE: u32 = 0x1000;
/// Instructions that access devices are put here, each kind at a place of its own; tests leave the first page alone.
const STUBS: u32 = 0x0;

pub const MODE_U: u32 = 0;
pub const MODE_S: u32 = 1;
pub const SSTATUS_SIE: u32 = 1 << 1;
pub const SSTATUS_SPIE: u32 = 1 << 5;
pub const SSTATUS_SPP: u32 = 1 << 8;
pub const SSTATUS_SUM: u32 = 1 << 18;
pub const SSTATUS_MXR: u32 = 1 << 19;
pub const SSI: u32 = 1 << 1;
pub const STI: u32 = 1 << 5;
pub const SEI: u32 = 1 << 9;

/// Words as little-endian bytes.
pub fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

unsafe extern "C" {
    /// kernels/tests/step_cpu.cpp
    fn machine_step_run(
        engine: *mut u8,
        vm: *mut Vm,
        pool: *mut Pool,
        mail: *mut Mailbox,
        request: *const SliceRequest,
        result: *mut SliceResult,
    );
    /// kernels/tests/warp_cpu.cpp
    fn machine_warp_run(
        engine: *mut u8,
        vm: *mut Vm,
        pool: *mut Pool,
        mail: *mut Mailbox,
        request: *const SliceRequest,
        result: *mut SliceResult,
    );
    fn machine_warp_forget(pool: *const Pool, vm: u32);
    /// The same with [`SHARED`] VMs in a warp.
    fn machine_warp_share_l4(
        count: u32,
        vms: *const *mut Vm,
        pool: *mut Pool,
        mails: *const *mut Mailbox,
        request: *const SliceRequest,
        results: *mut SliceResult,
    );
    fn machine_warp_forget_l4(pool: *const Pool, vm: u32);
    fn machine_warp_cycles(cycles: u32);
    fn machine_warp_cycles_l4(cycles: u32);
}

/// Slices of this thread end early once somebody has looked at the clock so often; 0: never. False: this engine has no
/// clock.
pub fn slices_last(cycles: u32) -> bool {
    // SAFETY: each sets a variable of this thread.
    unsafe { (machine_warp_cycles(cycles), machine_warp_cycles_l4(cycles)) };
    matches!(By::environment(), By::Warp | By::WarpShared)
}

/// VMs in a warp of [`By::WarpShared`].
const SHARED: usize = 4;

/// What runs the slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The CPU's engine.
    Threaded,
    /// `step`, one instruction at a time.
    Step,
    /// The GPU's engine W, its warp made of fibers.
    Warp,
    /// The GPU's engine L with [`SHARED`] VMs in a warp of fibers.
    WarpShared,
    /// An engine of the GPU on a GPU.
    Cuda(EngineKind),
}

impl By {
    /// As the variable MACHINE_ENGINE says: `step`, `warp`, `warp-l4`, `cuda` or for instance `cuda-l8`, or nothing.
    pub fn environment() -> Self {
        match std::env::var("MACHINE_ENGINE").as_deref() {
            Err(_) | Ok("") => Self::Threaded,
            Ok("step") => Self::Step,
            Ok("warp") => Self::Warp,
            Ok("warp-l4") => Self::WarpShared,
            Ok("cuda") => Self::Cuda(EngineKind::W),
            Ok(other) => {
                let kind = EngineKind::ALL
                    .into_iter()
                    .find(|kind| other.strip_prefix("cuda-").is_some_and(|name| name == kind.name()));
                Self::Cuda(kind.unwrap_or_else(|| {
                    panic!(
                        "MACHINE_ENGINE={other}: expected step, warp, warp-l4, cuda or for instance cuda-l8"
                    )
                }))
            }
        }
    }
    /// Of the engines that are for tests alone, the entry.
    pub fn function(self) -> Option<EngineFunction> {
        match self {
            Self::Threaded | Self::WarpShared | Self::Cuda(_) => None,
            Self::Step => Some(machine_step_run),
            Self::Warp => Some(machine_warp_run),
        }
    }
}

/// The GPU of this process: MACHINE_GPU says which, MACHINE_REGISTERS which of the kernels.
fn gpu(kind: EngineKind) -> &'static Arc<MappedDevice> {
    static GPU: OnceLock<Arc<MappedDevice>> = OnceLock::new();
    GPU.get_or_init(|| {
        let number = |name| std::env::var(name).ok().map(|text| text.parse::<u32>().expect(name));
        let environments = std::env::var_os("NVRTC_ENVIRONMENT").map(Into::into);
        let registers = number("MACHINE_REGISTERS");
        MappedDevice::open(number("MACHINE_GPU").unwrap_or(0), kind, registers, environments.as_slice())
            .unwrap_or_else(|error| panic!("MACHINE_ENGINE=cuda: {error}"))
    })
}

/// A small fleet under test. Methods without a VM number are about VM 0.
pub struct Bench {
    /// The machines' memory on the GPU, once it has run a slice. To be dropped before them.
    gpu: Option<MappedMachines>,
    /// RAM is changed, and VMs are reset, through this bench: what engines keep has to be forgotten then.
    pub machines: CpuMachines,
    engine: Box<dyn Engine>,
    /// Of each VM, what the translations that an engine keeps between slices follow from beside RAM, as the last slice
    /// left it; none if RAM has been changed since.
    kept: Vec<Cell<Option<[u32; 2]>>>,
    /// What runs the slices. Not to be changed after the first one: engines keep decoded code in their own ways.
    pub by: By,
    /// Time mode of the slices.
    pub time_mode: u32,
    /// Host time of the slices in guest ticks, in real time.
    pub now_ticks: u64,
}

impl Bench {
    /// One VM with `ram` bytes and the program at [`CODE`], where it starts in S mode.
    pub fn new(ram: u32, program: &[u32]) -> Self {
        Self::with(1, None, ram, vec![(CODE, bytes(program))], CODE)
    }

    /// Several VMs; `private` limits the frames they may own together.
    pub fn with(vms: u32, private: Option<u32>, ram: u32, pieces: Vec<(u32, Vec<u8>)>, entry: u32) -> Self {
        let pieces =
            pieces.into_iter().map(|(address, bytes)| Piece { name: "test", address, bytes }).collect();
        let boot = Arc::new(BootMemory { ram_bytes: ram.into(), entry, dtb_address: 0, pieces });
        let config = Config {
            boot,
            vms,
            threads: 1,
            private_frames: private,
            epoch_ns: 1_700_000_000_000_000_000,
            seed: Some(7),
        };
        let machines = CpuMachines::new(config).unwrap();
        // Soon, so that code runs in both ways. The variable MACHINE_NATIVE says when; 0: never.
        let native = std::env::var("MACHINE_NATIVE").ok().and_then(|jumps| jumps.parse().ok());
        machines.native_after(native.unwrap_or(3));
        let engine = machines.engines().unwrap().remove(0);
        let kept = (0..vms).map(|_| Cell::new(None)).collect();
        let by = By::environment();
        Self { gpu: None, machines, engine, kept, by, time_mode: TIME_VIRTUAL, now_ticks: 0 }
    }

    /// On an engine that makes code native after so many jumps; 0: never.
    pub fn native_after(mut self, jumps: u8) -> Self {
        self.machines.native_after(jumps);
        self.engine = self.machines.engines().unwrap().remove(0);
        self
    }

    #[allow(clippy::mut_from_ref)]
    pub fn vm_of(&self, vm: u32) -> &mut Vm {
        // SAFETY: `slice_of` takes `&mut self`, and tests use the reference for single accesses in between.
        unsafe { self.machines.vm(vm) }
    }
    #[allow(clippy::mut_from_ref)]
    pub fn vm(&self) -> &mut Vm {
        self.vm_of(0)
    }
    #[allow(clippy::mut_from_ref)]
    pub fn hart(&self) -> &mut Hart {
        &mut self.vm().hart
    }
    pub fn x(&self, register: usize) -> u32 {
        self.hart().x[register]
    }
    pub fn mail(&self) -> MailboxRef<'_> {
        self.machines.mailbox(0)
    }

    /// What a VM's translations follow from beside RAM, mode and SUM: satp, and MXR.
    fn ground(&self, vm: u32) -> [u32; 2] {
        let h = &self.vm_of(vm).hart;
        [h.satp, h.sstatus & SSTATUS_MXR]
    }
    /// One slice of each of these VMs, of at most `budget` steps. GPUs run them all at once.
    pub fn slices(&mut self, vms: &[u32], budget: u64) -> Vec<SliceResult> {
        let request =
            SliceRequest { budget, now_ticks: self.now_ticks, time_mode: self.time_mode, reserved: 0 };
        let slices: Vec<Slice> = vms.iter().map(|vm| Slice { vm: *vm, request }).collect();
        let changed: Vec<u32> = vms
            .iter()
            .copied()
            .filter(|vm| self.kept[*vm as usize].get() != Some(self.ground(*vm)))
            .collect();
        let machines = &self.machines;
        let mut results = Vec::new();
        if let Some(function) = self.by.function() {
            if self.by == By::Warp {
                // SAFETY: the pool is the machines', which number their VMs so, and no engine runs.
                changed.iter().for_each(|vm| unsafe { machine_warp_forget(machines.places().pool, *vm) });
            }
            // SAFETY: it is built from the same headers; `&mut self` is the only user of the VM.
            results.extend(vms.iter().map(|vm| unsafe { machines.run_on(function, *vm, &request) }));
        } else if self.by == By::WarpShared {
            let places = machines.places();
            // SAFETY: the pool is the machines', which number their VMs so, and no engine runs.
            changed.iter().for_each(|vm| unsafe { machine_warp_forget_l4(places.pool, *vm) });
            for some in vms.chunks(SHARED) {
                let mut ran = [SliceResult::default(); SHARED];
                // SAFETY: VMs and mailboxes lie one behind the other, and these are their numbers.
                let at = some.iter().map(|vm| unsafe { places.vms.add(*vm as usize) }).collect::<Vec<_>>();
                // SAFETY: as above.
                let mails = some.iter().map(|vm| unsafe { places.mailboxes.add(*vm as usize) });
                let mails = mails.collect::<Vec<_>>();
                // SAFETY: it is built from the same headers; `&mut self` is the only user of the VMs.
                unsafe {
                    machine_warp_share_l4(
                        some.len() as u32,
                        at.as_ptr(),
                        places.pool,
                        mails.as_ptr(),
                        &request,
                        ran.as_mut_ptr(),
                    );
                }
                results.extend(some.iter().zip(ran).map(|(vm, result)| machines.ran(*vm, result)));
            }
        } else if let By::Cuda(kind) = self.by {
            // SAFETY: as above, and it is dropped before the machines.
            let gpu = self.gpu.get_or_insert_with(|| unsafe { gpu(kind).seat(machines) }.unwrap());
            let ran = gpu.run(&slices, &changed).unwrap();
            results.extend(vms.iter().zip(ran).map(|(vm, result)| machines.ran(*vm, result)));
        } else {
            self.engine.run(&slices, &mut results, None).unwrap();
        }
        vms.iter().for_each(|vm| self.kept[*vm as usize].set(Some(self.ground(*vm))));
        results
    }
    /// One slice of at most `budget` steps.
    pub fn slice_of(&mut self, vm: u32, budget: u64) -> SliceResult {
        self.slices(&[vm], budget)[0]
    }
    pub fn slice(&mut self, budget: u64) -> SliceResult {
        self.slice_of(0, budget)
    }
    /// Exactly `steps` steps; the slice must not end early.
    pub fn step(&mut self, steps: u64) -> SliceResult {
        let result = self.slice(steps);
        assert_eq!((result.exit, result.steps), (EXIT_BUDGET, steps), "at pc {:#x}", self.hart().pc);
        result
    }
    /// Runs so many steps in slices of `budget`. On a GPU, where each slice is a launch, what is too much comes first, in
    /// one slice.
    pub fn steps(&mut self, steps: u64, budget: u64) {
        let slices = if matches!(self.by, By::Cuda(_)) { 10_000 } else { u64::MAX };
        let mut left = steps.min(budget.saturating_mul(slices));
        if left < steps {
            self.step(steps - left);
        }
        while left > 0 {
            left -= self.step(budget.min(left)).steps;
        }
    }
    /// Runs step by step until the hart is at `pc`; panics after `most` steps.
    pub fn run_to(&mut self, pc: u32, most: u64) {
        for _ in 0..most {
            if self.hart().pc == pc {
                return;
            }
            self.slice(1);
        }
        let h = self.hart();
        panic!(
            "pc {:#x} not reached in {most} steps: at {:#x}, last trap {:x?}, {:?}",
            pc, h.pc, h.last_trap, h
        );
    }

    /// Puts a VM back to its first state.
    pub fn reset_of(&self, vm: u32) {
        self.kept[vm as usize].set(None);
        self.machines.reset(vm).unwrap();
    }
    /// Writes RAM; false: some of it is outside, or no frame is left.
    pub fn try_write_of(&self, vm: u32, address: u32, bytes: &[u8]) -> bool {
        self.kept[vm as usize].set(None);
        self.machines.write_ram(vm, address, bytes)
    }
    pub fn write_of(&self, vm: u32, address: u32, bytes: &[u8]) {
        assert!(self.try_write_of(vm, address, bytes), "write of {address:#x}");
    }
    pub fn write(&self, address: u32, bytes: &[u8]) {
        self.write_of(0, address, bytes);
    }
    pub fn write32(&self, address: u32, value: u32) {
        self.write(address, &value.to_le_bytes());
    }
    pub fn write16(&self, address: u32, value: u16) {
        self.write(address, &value.to_le_bytes());
    }
    pub fn read(&self, address: u32, len: usize) -> Vec<u8> {
        let mut into = vec![0; len];
        self.machines.read_ram(0, address, &mut into);
        into
    }
    pub fn read32(&self, address: u32) -> u32 {
        let mut word = [0; 4];
        self.machines.read_ram(0, address, &mut word);
        u32::from_le_bytes(word)
    }
    pub fn read16(&self, address: u32) -> u16 {
        self.read32(address) as u16
    }

    /// Puts code somewhere and sends the hart there in S mode with translation off.
    pub fn start(&mut self, address: u32, program: &[u32]) {
        self.write(address, &bytes(program));
        let h = self.hart();
        h.pc = address;
        h.mode = MODE_S;
        h.waiting = 0;
    }

    /// Runs one instruction of S mode beside what the hart is doing; `Err` is the cause and stval of its trap.
    fn beside(&mut self, insn: u32, address: u32, value: u32) -> Result<u32, (u32, u32)> {
        let saved = *self.hart();
        // by funct3, and what tells loads, stores and SYSTEM apart
        let stub = STUBS + 4 * (insn >> 12 & 7 | (insn >> 5 & 3) << 3);
        loop {
            if self.read32(stub) != insn {
                self.write32(stub, insn);
            }
            let h = self.hart();
            h.pc = stub;
            h.x[5] = address;
            h.x[6] = value;
            (h.mode, h.satp, h.sstatus, h.sie, h.waiting) = (MODE_S, 0, 0, 0, 0);
            let result = self.slice(1);
            assert_eq!(result.steps, 1);
            // a hostile test's device may have written over it
            if self.read32(stub) == insn {
                break;
            }
        }
        let h = self.hart();
        let outcome = if h.pc == stub + 4 { Ok(h.x[6]) } else { Err((h.scause, h.stval)) };
        let sip = h.sip;
        *self.hart() = saved;
        self.hart().sip = sip;
        outcome
    }
    /// A load of `size` bytes, zero-extended.
    pub fn load(&mut self, address: u32, size: u32) -> Result<u32, (u32, u32)> {
        let insn = match size {
            1 => lbu(6, 5, 0),
            2 => lhu(6, 5, 0),
            _ => lw(6, 5, 0),
        };
        self.beside(insn, address, 0)
    }
    pub fn store(&mut self, address: u32, size: u32, value: u32) -> Result<(), (u32, u32)> {
        self.beside(store(size.trailing_zeros(), 6, 5, 0), address, value).map(|_| ())
    }
    /// Reads a device register of 32 bits.
    pub fn get(&mut self, address: u32) -> u32 {
        self.load(address, 4).unwrap()
    }
    pub fn set(&mut self, address: u32, value: u32) {
        self.store(address, 4, value).unwrap();
    }
    /// Writes device registers of 32 bits in this order, all of them in one slice.
    pub fn set_all(&mut self, words: &[(u32, u32)]) {
        const LOOP: u32 = STUBS + 0x200;
        const LIST: u32 = 0x2000; // apart from code: it changes
        let program = [lw(6, 5, 0), lw(7, 5, 4), sw(7, 6, 0), addi(5, 5, 8), addi(8, 8, -1), bne(8, 0, -20)];
        if self.read32(LOOP) != program[0] {
            self.write(LOOP, &bytes(&program));
        }
        self.write(
            LIST,
            &bytes(&words.iter().flat_map(|(address, value)| [*address, *value]).collect::<Vec<_>>()),
        );
        let saved = *self.hart();
        let h = self.hart();
        (h.pc, h.x[5], h.x[8]) = (LOOP, LIST, words.len() as u32);
        (h.mode, h.satp, h.sstatus, h.sie, h.waiting) = (MODE_S, 0, 0, 0, 0);
        self.step(6 * words.len() as u64);
        let h = self.hart();
        assert_eq!(h.pc, LOOP + 4 * program.len() as u32, "a trap: {:x?}", h.last_trap);
        let sip = h.sip;
        *self.hart() = saved;
        self.hart().sip = sip;
    }
    /// `sip` as the guest reads it.
    pub fn sip(&mut self) -> u32 {
        self.beside(csrr(6, SIP), 0, 0).unwrap()
    }
    pub fn external_interrupt(&mut self) -> bool {
        self.sip() & SEI != 0
    }

    /// A hash of a VM's RAM.
    pub fn ram_hash(&self, vm: u32) -> u64 {
        let pages = self.vm_of(vm).ram.pages;
        let mut page = [0; 4096];
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for number in 0..pages {
            self.machines.read_ram(vm, number * 4096, &mut page);
            for word in page.chunks_exact(8) {
                hash = (hash ^ u64::from_le_bytes(word.try_into().unwrap()))
                    .wrapping_mul(0x0000_0100_0000_01b3)
                    .rotate_left(23);
            }
        }
        hash
    }
    /// All architectural state of the hart as words (the sink register is no state).
    pub fn state(&self, vm: u32) -> Vec<u64> {
        let h = &self.vm_of(vm).hart;
        let mut state: Vec<u64> = h.x[..32].iter().map(|x| u64::from(*x)).collect();
        state.extend([h.pc, h.mode, h.sstatus, h.sie, h.sip, h.stvec, h.scounteren].map(u64::from));
        state.extend([h.senvcfg, h.sscratch, h.sepc, h.scause, h.stval, h.satp].map(u64::from));
        state.extend([h.reservation, h.waiting].map(u64::from));
        state.extend([h.steps, h.trapped, h.stimecmp, h.time_base, h.entropy_count]);
        state
    }
}

/// A small deterministic generator (SplitMix64).
#[derive(Clone)]
pub struct Random(pub u64);
impl Random {
    /// The seed of the run: fixed, unless the variable MACHINE_SEED says otherwise.
    pub fn seeded(stream: u64) -> Self {
        let seed = std::env::var("MACHINE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1u64);
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ stream)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn word(&mut self) -> u32 {
        self.next() as u32
    }
    pub fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }
    /// An operand: often at an edge.
    pub fn operand(&mut self) -> u32 {
        match self.below(4) {
            0 => self.pick(&[0, 1, 2, 0xffff_ffff, 0x8000_0000, 0x7fff_ffff, 0x8000_0001, 31, 32, 0xffff]),
            1 => self.below(256).wrapping_sub(128),
            2 => 1 << self.below(32),
            _ => self.word(),
        }
    }
}
