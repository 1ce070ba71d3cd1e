//! The CPU back end: the machine of `kernels/`, compiled by the host's compiler, one engine per thread.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};

use super::native::{Native, NativeCode};
use super::start::{self, Identity};
use super::{Engine, EngineError, Machines, MemoryUse, Slice, Watch};
use crate::abi::{
    CODE_PAGE_BYTES, CODE_PAGES_PER_VM, FRAME_BYTES, FRAME_MASK, FRAME_PRIVATE, Mailbox, Pool, SliceRequest,
    SliceResult, Vm,
};
use crate::mailbox::MailboxRef;
use crate::memory::map::Mapping;
use crate::memory::{BootMemory, SharedFrames};

unsafe extern "C" {
    fn machine_cpu_bytes() -> u64;
    fn machine_cpu_run(
        engine: *mut u8,
        vm: *mut Vm,
        pool: *mut Pool,
        mail: *mut Mailbox,
        request: *const SliceRequest,
        result: *mut SliceResult,
    );
    fn machine_cpu_native(engine: *mut u8, native: *const NativeCode);
    fn machine_cpu_write(vm: *mut Vm, pool: *mut Pool, pa: u32, from: *const u8, bytes: u32) -> bool;
}

/// An engine's entry: state of its own, VM, pool, mailbox, what to run, what came of it.
#[doc(hidden)]
pub type EngineFunction =
    unsafe extern "C" fn(*mut u8, *mut Vm, *mut Pool, *mut Mailbox, *const SliceRequest, *mut SliceResult);

/// How many VMs, with what, on how many threads.
#[derive(Debug)]
pub struct Config {
    /// RAM at the first instruction.
    pub boot: Arc<BootMemory>,
    /// VMs, numbered from 0.
    pub vms: u32,
    /// Engines; one per core is best.
    pub threads: u32,
    /// Frames that the VMs may have for themselves, all together. `None`: as many as all their RAM.
    pub private_frames: Option<u32>,
    /// Unix time in nanoseconds at guest tick 0.
    pub epoch_ns: u64,
    /// Seed of the VMs' entropy. `None`: drawn from the host for each VM.
    pub seed: Option<u64>,
}

/// Where the VMs and what belongs to them lie in the host's memory.
#[doc(hidden)]
#[derive(Debug)]
pub struct Places {
    /// The VMs, one behind the other.
    pub vms: *mut Vm,
    /// Their mailboxes.
    pub mailboxes: *mut Mailbox,
    /// The pool.
    pub pool: *mut Pool,
    /// Frames in it, the shared ones included.
    pub frames: u32,
    /// All mappings that an engine for GPUs may reach from there.
    pub regions: [(*mut u8, usize); 7],
}

/// Why the fleet could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The contents don't fit RAM.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
    /// More frames than frame numbers.
    #[error("{vms} VMs of {pages} pages each need more than {FRAME_MASK} frames; use fewer VMs or less RAM")]
    TooMany {
        /// VMs asked for.
        vms: u32,
        /// Pages of each.
        pages: u32,
    },
    /// The host has no memory for the tables.
    #[error("the host gives no memory for {what} ({bytes} bytes): {cause}")]
    Host {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: usize,
        /// The system's reason.
        cause: std::io::Error,
    },
    /// No randomness.
    #[error("the host's random source does not answer: {0}")]
    Entropy(std::io::Error),
}

/// All VMs of a CPU fleet.
#[derive(Debug)]
pub struct CpuMachines {
    inner: Arc<Inner>,
    threads: u32,
}

#[derive(Debug)]
struct Inner {
    config: Config,
    shared: SharedFrames,
    vms: Mapping,
    mailboxes: Mapping,
    tables: Mapping,
    pool: Mapping,
    code_of: Mapping,
    frames: u32,
    native: Option<Native>,
    private_frames: Vec<AtomicU32>,
    code_pages: Vec<AtomicU32>,
    // these are reached through `pool` alone
    _memory: [Mapping; 4],
}

fn map(what: &'static str, bytes: usize) -> Result<Mapping, Error> {
    Mapping::new(bytes).map_err(|cause| Error::Host { what, bytes, cause })
}
fn map_large(what: &'static str, bytes: usize) -> Result<Mapping, Error> {
    Mapping::large(bytes).map_err(|cause| Error::Host { what, bytes, cause })
}

impl CpuMachines {
    /// Sets up the VMs, none of them started. Memory is taken from the host as guests use it.
    pub fn new(config: Config) -> Result<Self, Error> {
        let shared = SharedFrames::new(&config.boot)?;
        let (pages, vms) = (shared.table.len() as u32, config.vms);
        let private = config.private_frames.map_or(u64::from(pages) * u64::from(vms), u64::from);
        let frames = private + u64::from(shared.count);
        let code_pages = u64::from(vms) * u64::from(CODE_PAGES_PER_VM) + u64::from(shared.count);
        if frames > u64::from(FRAME_MASK) || code_pages > u64::from(u32::MAX) {
            return Err(Error::TooMany { vms, pages });
        }
        let threads = config.threads.max(1);
        let base = map_large("guest RAM", frames as usize * FRAME_BYTES as usize)?;
        let ring = map("the free list", private as usize * 4)?;
        let code_of = map("the code table", frames as usize * 4)?;
        let code_frame = map("the code pages' frames", code_pages as usize * 4)?;
        let code = map_large("code pages", code_pages as usize * CODE_PAGE_BYTES as usize)?;
        let pool = map("the pool", size_of::<Pool>())?;
        let inner = Inner {
            vms: map("the VMs", vms as usize * size_of::<Vm>())?,
            mailboxes: map("mailboxes", vms as usize * size_of::<Mailbox>())?,
            tables: map("frame tables", vms as usize * pages as usize * 4)?,
            private_frames: (0..vms).map(|_| AtomicU32::new(0)).collect(),
            code_pages: (0..vms).map(|_| AtomicU32::new(0)).collect(),
            pool,
            code_of,
            frames: frames as u32,
            native: Native::new(vms, code_pages as usize * CODE_PAGE_BYTES as usize),
            _memory: [base, ring, code_frame, code],
            shared,
            config,
        };
        let [base, ring, code_frame, code] = &inner._memory;
        let shared_frames = inner.shared.count;
        // SAFETY: all mappings are fresh, large enough by construction, and nobody else has them yet.
        unsafe {
            let bytes = shared_frames as usize * FRAME_BYTES as usize;
            inner.shared.fill(&inner.config.boot, std::slice::from_raw_parts_mut(base.as_ptr(), bytes));
            for i in 0..private as u32 {
                ring.as_ptr().cast::<u32>().add(i as usize).write(shared_frames + i);
            }
            // Shared frames own the code pages after those of the VMs, one each, for good.
            for frame in 0..shared_frames {
                let page = vms * CODE_PAGES_PER_VM + frame;
                inner.code_of.as_ptr().cast::<u32>().add(frame as usize).write(page + 1);
                code_frame.as_ptr().cast::<u32>().add(page as usize).write(frame);
            }
            inner.pool.as_ptr().cast::<Pool>().write(Pool {
                base_ptr: base.as_ptr() as u64,
                ring_ptr: ring.as_ptr() as u64,
                head: 0,
                tail: private,
                capacity: (private as u32).max(1),
                shared_frames,
                code_of_ptr: inner.code_of.as_ptr() as u64,
                code_frame_ptr: code_frame.as_ptr() as u64,
                code_ptr: code.as_ptr() as u64,
                code_pages_per_vm: CODE_PAGES_PER_VM,
                text_count: 0,
                text_ptr: 0,
                text_table_ptr: 0,
                trace_ptr: 0,
                text_capacity: 0,
                text_slots: 0,
                trace_capacity: 0,
                trace_count: 0,
                saved_ptr: 0,
                code_epoch: 0,
                reserved: 0,
            });
        }
        for vm in 0..vms {
            inner.start(vm)?;
        }
        Ok(Self { inner: Arc::new(inner), threads })
    }

    /// The state of a VM, for tests and debuggers. The VM must not be in an engine.
    ///
    /// # Safety
    /// No engine may run the VM while the reference lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn vm(&self, vm: u32) -> &mut Vm {
        // SAFETY: in bounds (checked), initialised by `start`; exclusive by the caller's promise.
        unsafe { &mut *self.inner.vm(vm) }
    }

    /// Runs a slice on another engine than the back end's own, in tests that compare engines.
    ///
    /// # Safety
    /// `engine` must be an engine of the same machine, and no other one may run the VM.
    #[doc(hidden)]
    pub unsafe fn run_on(&self, engine: EngineFunction, vm: u32, request: &SliceRequest) -> SliceResult {
        let mut result = SliceResult::default();
        let (at, pool, mail) = (self.inner.vm(vm), self.inner.pool(), self.inner.mailbox(vm));
        // SAFETY: VM and mailbox are in bounds (checked); the rest is the caller's promise.
        unsafe { engine(std::ptr::null_mut(), at, pool, mail, request, &mut result) };
        self.ran(vm, result)
    }

    /// Notes what came of a slice that another engine ran.
    #[doc(hidden)]
    pub fn ran(&self, vm: u32, result: SliceResult) -> SliceResult {
        self.inner.private_frames[vm as usize].store(result.private_frames, Relaxed);
        result
    }

    /// Where things are, for an engine of another kind in tests.
    #[doc(hidden)]
    pub fn places(&self) -> Places {
        let inner = &self.inner;
        let [base, ring, ..] = &inner._memory;
        let all = [&inner.vms, &inner.mailboxes, &inner.tables, &inner.pool, &inner.code_of, base, ring];
        Places {
            vms: inner.vm(0),
            mailboxes: inner.mailbox(0),
            pool: inner.pool(),
            frames: inner.frames,
            regions: all.map(|mapping| (mapping.as_ptr(), mapping.bytes())),
        }
    }

    /// How many jumps to an instruction make the code from there on native, for engines taken from now on; 0: it
    /// never becomes so. For tests that compare.
    #[doc(hidden)]
    pub fn native_after(&self, jumps: u8) {
        if let Some(native) = &self.inner.native {
            native.warm_up_after(jumps);
        }
    }

    /// Writes guest-physical memory of a VM that is not in an engine. False: outside RAM, or no frame is left.
    pub fn write_ram(&self, vm: u32, address: u32, bytes: &[u8]) -> bool {
        let Ok(len) = u32::try_from(bytes.len()) else { return false };
        // SAFETY: the VM is in bounds (checked) and in no engine; the machine bounds the address.
        unsafe { machine_cpu_write(self.inner.vm(vm), self.inner.pool(), address, bytes.as_ptr(), len) }
    }

    /// Reads guest-physical memory of a VM that is not in an engine; zeroes beyond its RAM.
    pub fn read_ram(&self, vm: u32, address: u32, bytes: &mut [u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = address.wrapping_add(done as u32);
            let run = (FRAME_BYTES - at % FRAME_BYTES) as usize;
            let run = run.min(bytes.len() - done);
            let to = &mut bytes[done..done + run];
            match self.inner.ram_at(vm, at) {
                // SAFETY: `ram_at` returns an address within a frame of the pool, good to the frame's end.
                Some(from) => unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), run) },
                None => to.fill(0),
            }
            done += run;
        }
    }
}

impl Inner {
    fn pool(&self) -> *mut Pool {
        self.pool.as_ptr().cast()
    }

    fn vm(&self, vm: u32) -> *mut Vm {
        assert!(vm < self.config.vms, "VM {vm} of {}", self.config.vms);
        // SAFETY: in bounds of the mapping.
        unsafe { self.vms.as_ptr().cast::<Vm>().add(vm as usize) }
    }

    fn table(&self, vm: u32) -> *mut u32 {
        // SAFETY: in bounds of the mapping: `vm` was checked by every caller through `vm()`.
        unsafe { self.tables.as_ptr().cast::<u32>().add(vm as usize * self.shared.table.len()) }
    }

    fn mailbox(&self, vm: u32) -> *mut Mailbox {
        assert!(vm < self.config.vms, "VM {vm} of {}", self.config.vms);
        // SAFETY: in bounds of the mapping.
        unsafe { self.mailboxes.as_ptr().cast::<Mailbox>().add(vm as usize) }
    }

    fn ram_at(&self, vm: u32, address: u32) -> Option<*const u8> {
        self.vm(vm);
        let page = (address / FRAME_BYTES) as usize;
        if page >= self.shared.table.len() {
            return None;
        }
        // SAFETY: the page is within the table, and the table holds frames of the pool only.
        unsafe {
            let frame = self.table(vm).add(page).read() & FRAME_MASK;
            Some(
                ((*self.pool()).base_ptr as *const u8)
                    .add(frame as usize * FRAME_BYTES as usize + (address % FRAME_BYTES) as usize),
            )
        }
    }

    /// State before the first instruction; frames of the VM's own must have been given back.
    fn start(&self, vm: u32) -> Result<(), Error> {
        let keys = start::entropy_keys(self.config.seed, vm..vm + 1).map_err(Error::Entropy)?;
        let boot = &self.config.boot;
        let at = self.vm(vm);
        // SAFETY: the VM and its table are in bounds, and no engine has the VM.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.shared.table.as_ptr(),
                self.table(vm),
                self.shared.table.len(),
            );
            let identity = Identity { number: vm, index: vm, table: self.table(vm) as u64, key: keys[0] };
            at.write(start::vm(boot, self.shared.table.len() as u32, self.config.epoch_ns, identity));
        }
        self.private_frames[vm as usize].store(0, Relaxed);
        self.code_pages[vm as usize].store(0, Relaxed);
        if let Some(native) = &self.native {
            native.reset(vm);
        }
        Ok(())
    }

    /// Gives the frames of a VM back to the pool.
    fn free(&self, vm: u32) {
        let table = self.table(vm);
        let pool = self.pool();
        // SAFETY: the VM is not in an engine, so its table and code bits are ours; the ring's tail is moved by the
        // host alone (`reset` holds the lock of the scheduler, one at a time), with the frames written before it.
        unsafe {
            let tail = AtomicU64::from_ptr(&raw mut (*pool).tail);
            for page in 0..self.shared.table.len() {
                let entry = table.add(page).read();
                if entry & FRAME_PRIVATE != 0 {
                    let frame = entry & FRAME_MASK;
                    self.code_of.as_ptr().cast::<u32>().add(frame as usize).write(0);
                    let slot = tail.load(Acquire) % u64::from((*pool).capacity);
                    ((*pool).ring_ptr as *mut u32).add(slot as usize).write(frame);
                    tail.fetch_add(1, AcqRel);
                }
            }
        }
    }
}

struct CpuEngine {
    inner: Arc<Inner>,
    state: Mapping,
}

impl Engine for CpuEngine {
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
            if slice.vm >= self.inner.config.vms {
                return Err(EngineError(format!("VM {} of {}", slice.vm, self.inner.config.vms)));
            }
            let mut result = SliceResult::default();
            // SAFETY: `state` has the size that the machine asked for and is this thread's; VM and mailbox are in
            // bounds, and the scheduler gives a VM to one engine at a time.
            unsafe {
                machine_cpu_run(
                    self.state.as_ptr(),
                    self.inner.vm(slice.vm),
                    self.inner.pool(),
                    self.inner.mailbox(slice.vm),
                    &slice.request,
                    &mut result,
                );
            }
            self.inner.private_frames[slice.vm as usize].store(result.private_frames, Relaxed);
            self.inner.code_pages[slice.vm as usize].store(result.code_pages, Relaxed);
            results.push(result);
        }
        Ok(())
    }
}

impl Machines for CpuMachines {
    fn backend(&self) -> &'static str {
        "cpu"
    }

    fn engine(&self) -> String {
        "threaded".into()
    }

    fn vms(&self) -> u32 {
        self.inner.config.vms
    }

    fn engines(&self) -> Result<Vec<Box<dyn Engine>>, EngineError> {
        // SAFETY: a constant.
        let bytes = unsafe { machine_cpu_bytes() } as usize;
        (0..self.threads)
            .map(|_| {
                let state = Mapping::new(bytes)
                    .map_err(|cause| EngineError(format!("no memory for an engine: {cause}")))?;
                if let Some(native) = &self.inner.native {
                    // SAFETY: the engine's state is fresh, and keeps `inner` alive, which has `native`.
                    unsafe { machine_cpu_native(state.as_ptr(), native.code()) };
                }
                Ok(Box::new(CpuEngine { inner: Arc::clone(&self.inner), state }) as Box<dyn Engine>)
            })
            .collect()
    }

    fn mailbox(&self, vm: u32) -> MailboxRef<'_> {
        // SAFETY: the mailbox lives as long as `self`; only machine and `MailboxRef` access it.
        unsafe { MailboxRef::new(self.inner.mailbox(vm)) }
    }

    fn memory(&self) -> MemoryUse {
        let inner = &self.inner;
        let frame = u64::from(FRAME_BYTES);
        let sum =
            |counts: &[AtomicU32]| counts.iter().map(|count| u64::from(count.load(Relaxed))).sum::<u64>();
        let code_pages = sum(&inner.code_pages) + u64::from(inner.shared.count);
        let vms = u64::from(inner.config.vms);
        let fixed = (size_of::<Vm>() + size_of::<Mailbox>() + inner.shared.table.len() * 4) as u64;
        MemoryUse {
            shared_bytes: u64::from(inner.shared.count) * frame,
            private_bytes: sum(&inner.private_frames) * frame,
            overhead_bytes: vms * fixed
                + code_pages * u64::from(CODE_PAGE_BYTES)
                + inner.native.as_ref().map_or(0, Native::used),
        }
    }

    fn reset(&self, vm: u32) -> Result<(), EngineError> {
        self.inner.free(vm);
        self.inner.start(vm).map_err(|error| EngineError(error.to_string()))
    }
}
