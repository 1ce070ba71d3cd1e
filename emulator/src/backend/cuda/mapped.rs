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
use crate::abi::{CODE_FIRST, GpuSlice, LESSONS_OFTEN, Mailbox, Pool, SliceResult, TEXT_BYTES, Vm};
use crate::backend::cpu::CpuMachines;
use crate::backend::nvrtc::Compiler;
use crate::backend::{EngineError, Machines as _, Slice};

/// Registers of each thread, unless told otherwise: those of a small fleet.
const REGISTERS: u32 = 128;
/// Room for decoded code of each set of VMs, the traces in bytes. Little, so that tests that make much of it fill it.
const TEXTS: u32 = 512;
const TRACES: u32 = 8 << 20;
/// Entries of the hash table of texts, a power of two.
const SLOTS: u32 = 4 * TEXTS;
/// VMs of a set, at most.
const VMS_MOST: u32 = 1024;
/// Threads that clear decoded code: blocks, and of each block.
const CLEARERS: (u32, u32) = (16, 128);
/// Marks a result that no warp has written.
const NOT_WRITTEN: u32 = u32::MAX;

/// A device that runs VMs in host memory.
#[derive(Debug)]
pub struct MappedDevice {
    context: Arc<Context>,
    kind: EngineKind,
    translations: Translations,
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
    results: Pinned<SliceResult>,
    texts: Buffer,
    table: Buffer,
    traces: Buffer,
    /// What the VMs keep from slice to slice.
    saved: Buffer,
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
        run.allow_shared(translations.shared_bytes() * kind.vms_per_warp())?;
        Ok(Arc::new(Self { context, kind, translations, run, forget_code, free: Mutex::default() }))
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
    ///
    /// # Panics
    /// If there are more VMs than a set may have.
    pub unsafe fn seat(self: &Arc<Self>, machines: &CpuMachines) -> Result<MappedMachines, Error> {
        assert!(machines.vms() <= VMS_MOST, "{} VMs, and a set has {VMS_MOST} at most", machines.vms());
        self.context.make_current()?;
        let places = machines.places();
        let mut regions = Vec::new();
        for (at, bytes) in places.regions {
            // SAFETY: the regions are the machines' mappings, which outlive `regions` by the caller's promise.
            regions.push(unsafe { Registered::new(&self.context, at.cast::<c_void>(), bytes) }?);
        }
        let free = crate::sync::lock(&self.free).pop();
        let seat = free.map_or_else(|| Seat::new(&self.context, self.translations), Ok)?;
        seat.table.zero(&seat.stream, 0, seat.table.bytes())?;
        // What lanes read that have none.
        seat.texts.zero(&seat.stream, 0, TEXT_BYTES.into())?;
        seat.traces.zero(&seat.stream, 0, self.kind.trace_bytes().into())?;
        seat.saved.zero(&seat.stream, 0, seat.saved.bytes())?;
        seat.stream.wait()?;
        // SAFETY: pool and code table are the machines', and no engine runs.
        let frames = unsafe {
            let pool = &mut *places.pool;
            (pool.text_ptr, pool.text_capacity) = (seat.texts.address(), TEXTS);
            (pool.text_table_ptr, pool.text_slots) = (seat.table.address(), SLOTS);
            (pool.trace_ptr, pool.trace_capacity) = (seat.traces.address(), TRACES / self.kind.trace_bytes());
            (pool.text_count, pool.trace_count) = (CODE_FIRST, CODE_FIRST);
            pool.saved_ptr = seat.saved.address();
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
            count: machines.vms(),
            vms,
            mail,
            pool,
            frames,
        })
    }
}

impl Seat {
    fn new(context: &Arc<Context>, translations: Translations) -> Result<Self, CallError> {
        Ok(Self {
            stream: Stream::new(context)?,
            list: Pinned::new(context, VMS_MOST as usize)?,
            results: Pinned::new(context, VMS_MOST as usize)?,
            texts: Buffer::new(context, u64::from(TEXTS) * u64::from(TEXT_BYTES))?,
            table: Buffer::new(context, u64::from(SLOTS) * 4)?,
            traces: Buffer::new(context, TRACES.into())?,
            saved: Buffer::new(context, u64::from(VMS_MOST) * u64::from(translations.saved_bytes()))?,
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
    count: u32,
    vms: *mut Vm,
    mail: *mut Mailbox,
    pool: *mut Pool,
    frames: u32,
}

impl MappedMachines {
    /// Runs slices of different VMs, all at once. Translations that the VMs in `changed` have kept from earlier slices no
    /// longer hold: they were reset, or their RAM or satp was changed by other hands.
    pub fn run(&mut self, slices: &[Slice], changed: &[u32]) -> Result<Vec<SliceResult>, EngineError> {
        let Some(seat) = &self.seat else { return Err(EngineError("no seat on the device".into())) };
        let list = list(slices, self.count).map_err(EngineError)?;
        if list.is_empty() {
            return Ok(Vec::new());
        }
        let failed = |why: &dyn std::fmt::Display| {
            let (name, vms) = (self.device.name(), slices.iter().map(|slice| slice.vm).collect::<Vec<_>>());
            EngineError(format!("{name}: slices of VMs {vms:?}: {why}"))
        };
        let results = self.go(seat, &list, changed).map_err(|error| failed(&error))?;
        match results.iter().position(|result| result.exit == NOT_WRITTEN) {
            None => Ok(results),
            Some(i) => Err(failed(&format!("the device left out that of VM {}", slices[i].vm))),
        }
    }

    fn go(&self, seat: &Seat, list: &[GpuSlice], changed: &[u32]) -> Result<Vec<SliceResult>, CallError> {
        let device = &self.device;
        device.context.make_current()?;
        for vm in changed {
            let (offset, bytes) = epoch_word(device.translations, *vm);
            seat.saved.zero(&seat.stream, offset, bytes)?;
        }
        for (i, entry) in list.iter().enumerate() {
            // SAFETY: each has room for VMS_MOST, there are no more VMs, and no launch of this seat runs.
            unsafe {
                seat.list.as_ptr().add(i).write_volatile(*entry);
                (&raw mut (*seat.results.as_ptr().add(i)).exit).write_volatile(NOT_WRITTEN);
            }
        }
        let mut arguments = [
            Argument::Address(self.vms as u64),
            Argument::Address(self.pool as u64),
            Argument::Address(self.mail as u64),
            Argument::Address(seat.list.address()),
            Argument::Word(list.len() as u32),
            Argument::Address(seat.results.address()),
            Argument::Word(LESSONS_OFTEN),
        ];
        let blocks = device.kind.warps(list.len() as u32);
        let shared_bytes = device.translations.shared_bytes() * device.kind.vms_per_warp();
        seat.stream.launch(&device.run, blocks, 32, shared_bytes, &mut arguments)?;
        seat.stream.wait()?;
        // SAFETY: in bounds, and the launch has ended.
        let result = |i| unsafe { seat.results.as_ptr().add(i).read_volatile() };
        let results: Vec<SliceResult> = (0..list.len()).map(result).collect();
        if results.iter().any(|result| result.exit != NOT_WRITTEN && result.code_full != 0) {
            let mut arguments = [Argument::Address(self.pool as u64), Argument::Word(self.frames)];
            seat.stream.launch(&device.forget_code, CLEARERS.0, CLEARERS.1, 0, &mut arguments)?;
            seat.stream.wait()?;
        }
        Ok(results)
    }
}

/// The device's list of slices; an error if a VM does not exist or is there twice, for a VM is in one warp at a time.
fn list(slices: &[Slice], vms: u32) -> Result<Vec<GpuSlice>, String> {
    let mut taken = vec![false; vms as usize];
    let entry = |slice: &Slice| match taken.get_mut(slice.vm as usize) {
        None => Err(format!("VM {} of {vms}", slice.vm)),
        Some(true) => Err(format!("VM {} twice in a launch", slice.vm)),
        Some(taken) => {
            *taken = true;
            Ok(GpuSlice { vm: slice.vm, cycles: 0, request: slice.request })
        }
    };
    slices.iter().map(entry).collect()
}

/// Where the translations that a VM keeps say for which epoch they hold, and how many bytes that is. It is the last of
/// their words (`translations_save` in kernels/translations.cuh).
fn epoch_word(translations: Translations, vm: u32) -> (u64, u64) {
    let each = u64::from(translations.saved_bytes());
    (u64::from(vm) * each + each - 8, 8)
}

impl Drop for MappedMachines {
    fn drop(&mut self) {
        if let Some(seat) = self.seat.take() {
            crate::sync::lock(&self.device.free).push(seat);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::SliceRequest;

    #[test]
    fn a_launch_has_each_vm_once() {
        let request = SliceRequest { budget: 5, now_ticks: 0, time_mode: 0, reserved: 0 };
        let slices = |vms: &[u32]| vms.iter().map(|vm| Slice { vm: *vm, request }).collect::<Vec<_>>();
        let made = list(&slices(&[2, 0]), 3).unwrap();
        assert_eq!(
            made.iter().map(|entry| (entry.vm, entry.request.budget)).collect::<Vec<_>>(),
            [(2, 5), (0, 5)]
        );
        assert!(list(&[], 3).unwrap().is_empty());
        assert!(list(&slices(&[0, 3]), 3).unwrap_err().contains("VM 3 of 3"));
        assert!(list(&slices(&[1, 0, 1]), 3).unwrap_err().contains("VM 1 twice"));
    }

    #[test]
    fn the_epoch_is_the_last_word_of_a_vms_translations() {
        let translations = Translations { data: 64, fetch: 32 };
        assert_eq!(epoch_word(translations, 0), (96 * 8, 8));
        assert_eq!(epoch_word(translations, 2), ((2 * 97 + 96) * 8, 8));
    }
}
