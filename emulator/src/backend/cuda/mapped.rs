//! Slices of VMs that live in host memory. Tests of the machine build VMs there by hand, look into them and change them
//! between slices; here a device runs them in place, by the engine that runs fleets. The device reaches the host's memory
//! over the bus, so this is for tests: nothing is fast.

use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::choice::{EngineKind, Translations};
use super::cubin;
use super::driver::{Argument, Buffer, CallError, Context, Function, Module, Pinned, Registered, Stream};
use super::error::Error;
use super::{Gpus, open_devices};
use crate::abi::{GpuSlice, Mailbox, Pool, SliceRequest, SliceResult, TEXT_BYTES, Vm};
use crate::backend::EngineError;
use crate::backend::cpu::CpuMachines;
use crate::backend::nvrtc::Compiler;

/// Registers of each thread, unless told otherwise: those of a small fleet.
const REGISTERS: u32 = 128;
/// Room for decoded code of each set of VMs, the traces in bytes. Little, so that tests that make much of it fill it.
const TEXTS: u32 = 512;
const TRACES: u32 = 8 << 20;
/// Entries of the hash table of texts, a power of two.
const SLOTS: u32 = 4 * TEXTS;
/// Threads that clear decoded code: blocks, and of each block.
const CLEARERS: (u32, u32) = (16, 128);
/// Marks a result that no warp has written.
const NOT_WRITTEN: u32 = u32::MAX;

/// A device that runs VMs in host memory.
#[derive(Debug)]
pub struct MappedDevice {
    context: Arc<Context>,
    kind: EngineKind,
    shared_bytes: u32,
    run: Function,
    forget_code: Function,
    /// Seats that no set of VMs has now.
    free: Mutex<Vec<Seat>>,
}

/// What one set of VMs needs of the device.
#[derive(Debug)]
struct Seat {
    stream: Stream,
    list: Pinned<GpuSlice>,
    result: Pinned<SliceResult>,
    texts: Buffer,
    table: Buffer,
    traces: Buffer,
}

impl MappedDevice {
    /// Opens device `ordinal` and compiles an engine for it, with at most `registers` registers a thread.
    pub fn open(
        ordinal: u32,
        kind: EngineKind,
        registers: Option<u32>,
        compilers: &[PathBuf],
    ) -> Result<Arc<Self>, Error> {
        let compiler = Compiler::find(compilers)?;
        let (_, contexts, _) = open_devices(&Gpus::List(vec![ordinal]))?;
        let context = contexts.into_iter().next().ok_or(Error::NoDevice { asked: ordinal, count: 0 })?;
        let arch = context.properties().arch();
        let cache = cubin::cache_folder();
        // Few translations at hand, so that tests need more.
        let translations = Translations::pick(u32::MAX, 1, 0);
        let code = cubin::kernels(
            &compiler,
            &arch,
            kind,
            translations,
            registers.unwrap_or(REGISTERS),
            cache.as_deref(),
        )?;
        let module = Module::load(&context, &code.cubin)?;
        let (run, forget_code) =
            (module.function(c"machine_run_w")?, module.function(c"machine_forget_code")?);
        let shared_bytes = translations.shared_bytes() * kind.vms_per_warp();
        run.allow_shared(shared_bytes)?;
        Ok(Arc::new(Self { context, kind, shared_bytes, run, forget_code, free: Mutex::default() }))
    }

    /// The device's name and architecture, for people.
    pub fn name(&self) -> String {
        let properties = self.context.properties();
        format!("{} ({})", properties.name, properties.arch())
    }

    /// Gives the device access to the VMs' memory and decoded code of its own kind.
    ///
    /// # Safety
    /// From now on no other engine may run the VMs, and `machines` must outlive what is returned.
    pub unsafe fn seat(self: &Arc<Self>, machines: &CpuMachines) -> Result<MappedMachines, Error> {
        self.context.make_current()?;
        let places = machines.places();
        let mut regions = Vec::new();
        for (at, bytes) in places.regions {
            // SAFETY: the regions are the machines' mappings, which outlive `regions` by the caller's promise.
            regions.push(unsafe { Registered::new(&self.context, at.cast::<c_void>(), bytes) }?);
        }
        let free = crate::fleet::lock(&self.free).pop();
        let seat = free.map_or_else(|| Seat::new(&self.context), Ok)?;
        seat.table.zero(&seat.stream, 0, seat.table.bytes())?;
        // Lanes without a VM run trace 0 for nothing: it has to be one.
        seat.traces.zero(&seat.stream, 0, self.kind.trace_bytes().into())?;
        seat.stream.wait()?;
        // SAFETY: pool and code table are the machines', and no engine runs.
        let frames = unsafe {
            let pool = &mut *places.pool;
            (pool.text_ptr, pool.text_capacity) = (seat.texts.address(), TEXTS);
            (pool.text_table_ptr, pool.text_slots) = (seat.table.address(), SLOTS);
            (pool.trace_ptr, pool.trace_capacity) = (seat.traces.address(), TRACES / self.kind.trace_bytes());
            (pool.text_count, pool.trace_count) = (0, 0);
            let frames = places.frames;
            // The CPU engine's code pages mean nothing here.
            std::slice::from_raw_parts_mut(pool.code_of_ptr as *mut u32, frames as usize).fill(0);
            frames
        };
        let (vms, mail, pool) = (places.vms, places.mailboxes, places.pool);
        Ok(MappedMachines {
            device: Arc::clone(self),
            seat: Some(seat),
            _regions: regions,
            vms,
            mail,
            pool,
            frames,
        })
    }
}

impl Seat {
    fn new(context: &Arc<Context>) -> Result<Self, CallError> {
        Ok(Self {
            stream: Stream::new(context)?,
            list: Pinned::new(context, 1)?,
            result: Pinned::new(context, 1)?,
            texts: Buffer::new(context, u64::from(TEXTS) * u64::from(TEXT_BYTES))?,
            table: Buffer::new(context, u64::from(SLOTS) * 4)?,
            traces: Buffer::new(context, TRACES.into())?,
        })
    }
}

/// VMs in host memory that a device can run.
#[derive(Debug)]
pub struct MappedMachines {
    device: Arc<MappedDevice>,
    /// Taken on drop.
    seat: Option<Seat>,
    _regions: Vec<Registered>,
    vms: *mut Vm,
    mail: *mut Mailbox,
    pool: *mut Pool,
    frames: u32,
}

impl MappedMachines {
    /// Runs a slice of VM `vm`, which exists.
    pub fn run(&mut self, vm: u32, request: &SliceRequest) -> Result<SliceResult, EngineError> {
        let Some(seat) = &self.seat else { return Err(EngineError("no seat on the device".into())) };
        let failed = |why: &dyn std::fmt::Display| {
            EngineError(format!("{}: a slice of VM {vm}: {why}", self.device.name()))
        };
        match self.go(seat, vm, request) {
            Ok(Some(result)) => Ok(result),
            Ok(None) => Err(failed(&"the device left it out")),
            Err(error) => Err(failed(&error)),
        }
    }

    fn go(&self, seat: &Seat, vm: u32, request: &SliceRequest) -> Result<Option<SliceResult>, CallError> {
        let device = &self.device;
        device.context.make_current()?;
        // SAFETY: each has room for one, and no launch of this seat runs.
        unsafe {
            seat.list.as_ptr().write_volatile(GpuSlice { vm, reserved: 0, request: *request });
            (&raw mut (*seat.result.as_ptr()).exit).write_volatile(NOT_WRITTEN);
        }
        let mut arguments = [
            Argument::Address(self.vms as u64),
            Argument::Address(self.pool as u64),
            Argument::Address(self.mail as u64),
            Argument::Address(seat.list.address()),
            Argument::Word(1),
            Argument::Address(seat.result.address()),
        ];
        seat.stream.launch(&device.run, 1, 32, device.shared_bytes, &mut arguments)?;
        seat.stream.wait()?;
        // SAFETY: in bounds, and the launch has ended.
        let result = unsafe { seat.result.as_ptr().read_volatile() };
        if result.exit == NOT_WRITTEN {
            return Ok(None);
        }
        if result.code_full != 0 {
            let mut arguments = [Argument::Address(self.pool as u64), Argument::Word(self.frames)];
            seat.stream.launch(&device.forget_code, CLEARERS.0, CLEARERS.1, 0, &mut arguments)?;
            seat.stream.wait()?;
        }
        Ok(Some(result))
    }
}

impl Drop for MappedMachines {
    fn drop(&mut self) {
        if let Some(seat) = self.seat.take() {
            crate::fleet::lock(&self.device.free).push(seat);
        }
    }
}
