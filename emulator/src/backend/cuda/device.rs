//! The VMs of one device: their memory there, and the kernels that set them up and put them back.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use super::Config;
use super::choice::{EngineKind, Translations};
use super::cubin::{self, Code};
use super::driver::{Argument, Buffer, CallError, Context, Function, Module, Pinned, Resources, Stream};
use super::error::Error;
use super::kept::{self, Cleared, Decoded, Format, InFile, Loaded};
use super::plan::{Demand, DoesNotFit, Plan};
use crate::abi::{
    CODE_FIRST, FRAME_BYTES, FRAME_MASK, LESSONS_OFTEN, LESSONS_SELDOM, Mailbox, Pool, SliceResult,
    TEXT_BYTES, Vm,
};
use crate::backend::nvrtc::Compiler;
use crate::backend::start::{self, Identity};
use crate::memory::SharedFrames;

/// Register budgets, and the warps per multiprocessor up to which each is the best: with few, each thread may have what
/// it likes; with many, more of them have to fit.
const REGISTERS: [(u32, u32); 3] = [(12, 128), (20, 96), (u32::MAX, 64)];
/// Threads that set up one VM.
const SETUP_THREADS: u32 = 128;
/// Decoded code is not cleared more often.
const CLEAR_AT_MOST_EVERY: Duration = Duration::from_secs(5);
/// Decoded code is written once more if there are so many times as many texts, in percent,
const KEEP_AGAIN_AT: u64 = 110;
/// or if so many times as many steps have been executed with it: its traces go the guests' ways the better.
const LEARNED_AGAIN_AT: u64 = 2;
/// Entries written at once to large tables.
const CHUNK: u32 = 1 << 20;

/// What the host has last heard of a VM.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub private_frames: AtomicU32,
    /// Steps that it has executed here, resets or not.
    steps: AtomicU64,
    pub pc: AtomicU32,
    pub cause: AtomicU32,
    pub epc: AtomicU32,
}

impl Known {
    pub fn update(&self, result: &SliceResult) {
        self.private_frames.store(result.private_frames, Relaxed);
        self.steps.store(self.steps.load(Relaxed).wrapping_add(result.steps), Relaxed); // nobody else writes it
        self.pc.store(result.pc, Relaxed);
        self.cause.store(result.last_trap[0], Relaxed);
        self.epc.store(result.last_trap[1], Relaxed);
    }
}

/// The VMs of one device.
#[derive(Debug)]
pub(super) struct Device {
    /// Numbers of its VMs in the fleet; on the device they count from 0.
    pub range: Range<u32>,
    pub context: Arc<Context>,
    pub run: Function,
    pub vms: Buffer,
    pub pool: Buffer,
    pub mail: Pinned<Mailbox>,
    pub known: Vec<Known>,
    /// Launches share it; a reset, which gives frames back, has it alone.
    pub gate: RwLock<()>,
    pub plan: Plan,
    pub kind: EngineKind,
    pub warps_per_block: u32,
    /// Bytes of shared memory of a warp.
    pub shared_bytes: u32,
    pub registers: u32,
    pub resources: Resources,
    pub code: Code,
    /// Decoded code of an earlier start.
    pub loaded: Loaded,
    /// How often traces are learned from: [`LESSONS_OFTEN`] or [`LESSONS_SELDOM`].
    pub lessons: AtomicU32,
    /// Where decoded code is kept, if it is.
    kept: Option<PathBuf>,
    /// What that file has; held while it is written.
    in_file: Mutex<InFile>,
    reset: Function,
    forget_code: Function,
    code_cleared: Mutex<Cleared>,
    control: Mutex<Stream>,
    tables: Buffer,
    first_table: Buffer,
    pages: u32,
    /// Where in its memory the frames begin.
    first_frame: u64,
    // reached through the pool alone
    _memory: [Buffer; 7],
}

fn take(context: &Arc<Context>, what: &'static str, bytes: u64) -> Result<Buffer, Error> {
    Buffer::new(context, bytes).map_err(|cause| no_memory(what, bytes, cause))
}

fn no_memory(what: &'static str, bytes: u64, cause: CallError) -> Error {
    if cause.is_out_of_memory() { Error::NoMemory { what, bytes, cause } } else { Error::Call(cause) }
}

/// What a file with decoded code has to agree on.
fn format(plan: &Plan, kind: EngineKind) -> Format {
    let trace_bytes = kind.trace_bytes();
    let traces = plan.traces.min(kept::TRACE_BYTES_MOST / trace_bytes);
    let lane_text = kept::LANE_TEXT;
    let trace_used = kept::TRACE_USED;
    Format {
        trace_bytes,
        slots: plan.slots(),
        texts: plan.texts,
        traces,
        room: plan.traces,
        lane_text,
        trace_used,
    }
}

/// The register budget for so many warps.
fn registers(warps: u32, multiprocessors: u32) -> u32 {
    let each = warps.div_ceil(multiprocessors.max(1));
    REGISTERS.iter().find(|(most, _)| each <= *most).map_or(64, |(_, registers)| *registers)
}

/// Warps that a multiprocessor runs at once with so many registers a thread: it has 65,536.
fn warps_at_once(registers: u32) -> u32 {
    (65536 / 32 / registers.max(1)).clamp(1, 64)
}

/// Warps in each block where a multiprocessor is to run so many at once, in at most so many blocks. The smaller the
/// blocks, the more evenly they are spread, and the earlier another one can take the place of one that has ended.
fn warps_per_block(at_once: u32, blocks: u32) -> u32 {
    at_once.div_ceil(blocks.max(1)).max(1)
}

impl Device {
    pub fn new(
        context: Arc<Context>,
        range: Range<u32>,
        config: &Config,
        shared: &SharedFrames,
        compiler: &Compiler,
        cache: Option<&Path>,
        kept: Option<(&Path, &str)>,
    ) -> Result<Self, Error> {
        context.make_current()?;
        let properties = context.properties().clone();
        let (vms, pages) = (range.len() as u32, shared.table.len() as u32);
        let kind = config.engine.pick(vms, properties.multiprocessors);
        let warps = kind.warps(vms);
        let registers = config.registers.unwrap_or(registers(warps, properties.multiprocessors));
        let warps_each = warps.div_ceil(properties.multiprocessors.max(1)).min(warps_at_once(registers));
        // What is not on the device at once needs no shared memory.
        let at_once = vms.min(properties.multiprocessors.saturating_mul(warps_each * kind.vms_per_warp()));
        let translations = Translations::pick(at_once, properties.multiprocessors, properties.shared_bytes);
        let shared_bytes = translations.shared_bytes() * kind.vms_per_warp();
        let code = cubin::kernels(compiler, &properties.arch(), kind, translations, registers, cache)?;
        let module = Module::load(&context, &code.cubin)?;
        let (setup, run, reset, forget_code) = (
            module.function(c"machine_setup")?,
            module.function(c"machine_run_w")?,
            module.function(c"machine_reset")?,
            module.function(c"machine_forget_code")?,
        );
        let resources = run.resources()?;
        let fit = (properties.shared_bytes / shared_bytes).clamp(1, 32);
        let wanted = config.warps_per_block.unwrap_or(warps_per_block(warps_each, properties.blocks));
        let warps_per_block = wanted.clamp(1, fit);
        run.allow_shared(warps_per_block * shared_bytes)?;

        let demand = Demand { vms, pages, shared_frames: shared.count, trace_bytes: kind.trace_bytes() };
        let (free, _) = context.memory()?;
        let plan = demand.plan(free, config.private_frames).map_err(|DoesNotFit { fits }| {
            let (ordinal, name) = (properties.ordinal, properties.name.clone());
            Error::DoesNotFit { ordinal, name, free, vms, ram: config.boot.ram_bytes, fits }
        })?;
        let kept = kept.map(|(folder, image)| kept::file(folder, image, &properties.arch(), kind));
        let found = kept.as_ref().map(|file| kept::read(file, format(&plan, kind))).unwrap_or_default();
        let frames = u64::from(plan.private_frames) + u64::from(shared.count);
        let words = |count: u64| count * 4;
        // Engine W puts addresses together from a frame's and the offset in it.
        let base = take(&context, "guest RAM", (frames + 1) * u64::from(FRAME_BYTES))?;
        let first_frame = base.address().next_multiple_of(FRAME_BYTES.into()) - base.address();
        let ring = take(&context, "the free list", words(plan.private_frames.into()))?;
        let code_of = take(&context, "the code table", words(frames))?;
        let texts = take(&context, "texts", u64::from(plan.texts) * u64::from(TEXT_BYTES))?;
        let text_table = take(&context, "the texts' table", words(plan.slots().into()))?;
        let traces = take(&context, "traces", u64::from(plan.traces) * u64::from(kind.trace_bytes()))?;
        let saved = take(&context, "translations", u64::from(vms) * u64::from(translations.saved_bytes()))?;
        let mail = Pinned::<Mailbox>::new(&context, vms as usize)
            .map_err(|cause| no_memory("mailboxes", vms as u64 * size_of::<Mailbox>() as u64, cause))?;
        for vm in 0..vms as usize {
            // SAFETY: in bounds; nobody else has the mailboxes yet. The indices alone make a mailbox empty.
            unsafe {
                let at = mail.as_ptr().add(vm).cast::<u8>();
                at.write_bytes(0, size_of::<crate::abi::Rings>());
            }
        }
        let loaded = Loaded::from(&found);
        let device = Self {
            vms: take(&context, "the VMs", u64::from(vms) * size_of::<Vm>() as u64)?,
            pool: take(&context, "the pool", size_of::<Pool>() as u64)?,
            tables: take(&context, "frame tables", words(u64::from(vms) * u64::from(pages)))?,
            first_table: take(&context, "the first frame table", words(pages.into()))?,
            control: Mutex::new(Stream::new(&context)?),
            known: (0..vms).map(|_| Known::default()).collect(),
            gate: RwLock::new(()),
            range,
            context,
            run,
            reset,
            forget_code,
            code_cleared: Mutex::new(Cleared { earlier_steps: loaded.steps, ..Cleared::default() }),
            mail,
            plan,
            kind,
            warps_per_block,
            shared_bytes,
            registers,
            resources,
            code,
            lessons: AtomicU32::new(if loaded.counts.is_some() { LESSONS_SELDOM } else { LESSONS_OFTEN }),
            in_file: Mutex::new(InFile {
                texts: loaded.counts.map_or(0, |(texts, _)| texts.into()),
                steps: loaded.steps,
            }),
            loaded,
            kept,
            pages,
            first_frame,
            _memory: [base, ring, code_of, texts, text_table, traces, saved],
        };
        device.fill(config, shared, found.decoded.as_ref())?;
        device.set_up(config, &setup)?;
        Ok(device)
    }

    /// Writes what all VMs share.
    fn fill(&self, config: &Config, shared: &SharedFrames, kept: Option<&Decoded>) -> Result<(), Error> {
        let [base, ring, code_of, texts, text_table, traces, saved] = &self._memory;
        let stream = crate::sync::lock(&self.control);
        let mut frames = vec![0u8; shared.count as usize * FRAME_BYTES as usize];
        shared.fill(&config.boot, &mut frames);
        base.write(&stream, self.first_frame, &frames)?;
        for start in (0..self.plan.private_frames).step_by(CHUNK as usize) {
            let end = self.plan.private_frames.min(start.saturating_add(CHUNK));
            let numbers: Vec<u32> = (start..end).map(|i| shared.count + i).collect();
            ring.write(&stream, u64::from(start) * 4, &numbers)?;
        }
        code_of.zero(&stream, 0, code_of.bytes())?;
        // What lanes read that have none.
        texts.zero(&stream, 0, TEXT_BYTES.into())?;
        traces.zero(&stream, 0, self.kind.trace_bytes().into())?;
        let (mut text_count, mut trace_count) = (CODE_FIRST, CODE_FIRST);
        match kept {
            Some(decoded) => {
                text_table.write(&stream, 0, &decoded.table())?;
                texts.write(&stream, 0, &decoded.words)?;
                traces.write(&stream, 0, decoded.traces())?;
                text_count = text_count.max(decoded.texts());
                trace_count = trace_count.max(decoded.trace_count());
            }
            None => text_table.zero(&stream, 0, text_table.bytes())?,
        }
        self.first_table.write(&stream, 0, &shared.table)?;
        let pool = Pool {
            base_ptr: base.address() + self.first_frame,
            ring_ptr: ring.address(),
            head: 0,
            tail: self.plan.private_frames.into(),
            capacity: self.plan.private_frames.max(1),
            shared_frames: shared.count,
            code_of_ptr: code_of.address(),
            code_frame_ptr: 0,
            code_ptr: 0,
            code_pages_per_vm: 0,
            text_count,
            text_ptr: texts.address(),
            text_table_ptr: text_table.address(),
            trace_ptr: traces.address(),
            text_capacity: self.plan.texts,
            text_slots: self.plan.slots(),
            trace_capacity: self.plan.traces,
            trace_count,
            saved_ptr: saved.address(),
            code_epoch: 0,
            reserved: 0,
        };
        Ok(self.pool.write(&stream, 0, &[pool])?)
    }

    /// Writes the VMs' first states and tables.
    fn set_up(&self, config: &Config, setup: &Function) -> Result<(), Error> {
        let keys = start::entropy_keys(config.seed, self.range.clone()).map_err(Error::Entropy)?;
        let vms: Vec<Vm> =
            keys.into_iter().zip(0..).map(|(key, index)| self.first_state(config, index, key)).collect();
        let stream = crate::sync::lock(&self.control);
        self.vms.write(&stream, 0, &vms)?;
        let count = vms.len() as u32;
        let mut arguments = [
            Argument::Address(self.vms.address()),
            Argument::Address(self.tables.address()),
            Argument::Address(self.first_table.address()),
            Argument::Address(self.pool.address()),
            Argument::Word(0),
            Argument::Word(count),
        ];
        stream.launch(setup, count, SETUP_THREADS, 0, &mut arguments)?;
        Ok(stream.wait()?)
    }

    fn first_state(&self, config: &Config, index: u32, key: [u64; 2]) -> Vm {
        let table = self.tables.address() + u64::from(index) * u64::from(self.pages) * 4;
        let identity = Identity { number: self.range.start + index, index, table, key };
        start::vm(&config.boot, self.pages, config.epoch_ns, identity)
    }

    /// Puts a VM, which is in no launch, back to its state before the first instruction.
    pub fn reset(&self, config: &Config, index: u32) -> Result<(), Error> {
        let number = self.range.start + index;
        let keys = start::entropy_keys(config.seed, number..number + 1).map_err(Error::Entropy)?;
        let state = self.first_state(config, index, keys[0]);
        let _alone = self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.context.make_current()?;
        let stream = crate::sync::lock(&self.control);
        let mut arguments = [
            Argument::Address(self.vms.address()),
            Argument::Address(self.pool.address()),
            Argument::Address(self.first_table.address()),
            Argument::Word(index),
        ];
        stream.launch(&self.reset, 1, SETUP_THREADS, 0, &mut arguments)?;
        self.vms.write(&stream, u64::from(index) * size_of::<Vm>() as u64, &[state])?;
        self.known[index as usize].update(&SliceResult::default());
        Ok(())
    }
}

impl Device {
    /// Clears the decoded code, when a launch found no room for more. Not too often: guests that make ever new code
    /// must not slow down the others.
    pub fn clear_code(&self) -> Result<(), CallError> {
        let mut cleared = crate::sync::lock(&self.code_cleared);
        if cleared.at.is_some_and(|at| at.elapsed() < CLEAR_AT_MOST_EVERY) {
            return Ok(());
        }
        let _alone = self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.context.make_current()?;
        let stream = crate::sync::lock(&self.control);
        let frames = self._memory[2].bytes() / 4;
        let mut arguments = [Argument::Address(self.pool.address()), Argument::Word(frames as u32)];
        stream.launch(&self.forget_code, 256, SETUP_THREADS, 0, &mut arguments)?;
        stream.wait()?;
        self.lessons.store(LESSONS_OFTEN, Relaxed);
        *cleared = Cleared { at: Some(Instant::now()), earlier_steps: 0, but_for: self.steps() };
        Ok(())
    }

    /// Where decoded code is kept, if it is.
    pub fn kept_file(&self) -> Option<&Path> {
        self.kept.as_deref()
    }

    /// Steps that its VMs have executed.
    fn steps(&self) -> u64 {
        self.known.iter().fold(0, |sum, vm| sum.wrapping_add(vm.steps.load(Relaxed)))
    }

    /// Writes the decoded code to its file, unless the file has nearly as much and has learned nearly as much; launches
    /// may run. Returns why it could not.
    pub fn keep_code(&self) -> Option<String> {
        let file = self.kept.as_ref()?;
        let trouble = |why: &dyn std::fmt::Display| {
            Some(format!("{}: decoded code can't be kept for the next start: {why}", file.display()))
        };
        let mut in_file = crate::sync::lock(&self.in_file);
        let decoded = match self.decoded(&in_file) {
            Ok(Some(decoded)) => decoded,
            Ok(None) => return None,
            Err(error) => return trouble(&error),
        };
        match kept::write(file, &decoded) {
            // Too much of it is no failure, and won't become less.
            Ok(_) => *in_file = InFile { texts: decoded.texts().into(), steps: decoded.steps },
            Err(error) => return trouble(&error),
        }
        None
    }

    /// The decoded code, if there is much more than in its file.
    fn decoded(&self, in_file: &InFile) -> Result<Option<Decoded>, CallError> {
        let [_, _, _, texts, text_table, traces, _] = &self._memory;
        let steps = {
            let cleared = crate::sync::lock(&self.code_cleared);
            cleared.earlier_steps.saturating_add(self.steps().wrapping_sub(cleared.but_for))
        };
        // Launches add to it, which does no harm; but nobody may clear it meanwhile.
        let _shared = self.gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.context.make_current()?;
        let stream = Stream::new(&self.context)?;
        // SAFETY: a `Pool` is integers; `fill` has written it.
        let pool = unsafe {
            let mut pool = [std::mem::zeroed::<Pool>()];
            self.pool.read(&stream, 0, &mut pool)?;
            pool[0]
        };
        let made = u64::from(pool.text_count.min(self.plan.texts));
        if made * 100 <= in_file.texts * KEEP_AGAIN_AT && steps / LEARNED_AGAIN_AT < in_file.steps {
            return Ok(None);
        }
        let mut table = vec![0u32; self.plan.slots() as usize];
        // SAFETY: plain integers, all of which `fill` has written.
        unsafe { text_table.read(&stream, 0, &mut table)? };
        let mut decoded = Decoded::gather(
            format(&self.plan, self.kind),
            &table,
            |count| {
                let mut words = vec![0u32; count * TEXT_BYTES as usize / 4];
                // SAFETY: plain integers; whatever they are, they are looked at with care.
                unsafe { texts.read(&stream, 0, &mut words)? };
                Ok::<_, CallError>(words)
            },
            |count| {
                let mut bytes = vec![0u8; count * self.kind.trace_bytes() as usize];
                // SAFETY: as above.
                unsafe { traces.read(&stream, 0, &mut bytes)? };
                Ok(bytes)
            },
        )?;
        decoded.steps = steps;
        Ok((decoded.texts() > 0).then_some(decoded))
    }

    /// The state of a VM that is in no launch.
    pub fn state(&self, index: u32) -> Result<Vm, CallError> {
        self.context.make_current()?;
        let stream = crate::sync::lock(&self.control);
        // SAFETY: a `Vm` is integers and arrays of them; the array was filled by `set_up`.
        unsafe {
            let mut vm = [std::mem::zeroed::<Vm>()];
            self.vms.read(&stream, u64::from(index) * size_of::<Vm>() as u64, &mut vm)?;
            Ok(vm[0])
        }
    }

    /// All RAM of a VM that is in no launch.
    pub fn ram(&self, index: u32) -> Result<Vec<u8>, CallError> {
        self.context.make_current()?;
        let stream = crate::sync::lock(&self.control);
        let mut table = vec![0u32; self.pages as usize];
        let mut ram = vec![0u8; self.pages as usize * FRAME_BYTES as usize];
        // SAFETY: plain integers; the tables were filled by `set_up`, and frames that they name by `fill` or a guest.
        unsafe {
            self.tables.read(&stream, u64::from(index) * u64::from(self.pages) * 4, &mut table)?;
            for (entry, page) in table.iter().zip(ram.chunks_exact_mut(FRAME_BYTES as usize)) {
                let at = u64::from(entry & FRAME_MASK) * u64::from(FRAME_BYTES);
                self._memory[0].read(&stream, self.first_frame + at, page)?;
            }
        }
        Ok(ram)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_fleets_get_fewer_registers() {
        assert_eq!([1, 132, 1024, 1584].map(|vms| registers(vms, 132)), [128; 4]);
        assert_eq!([1585, 2640].map(|vms| registers(vms, 132)), [96; 2]);
        assert_eq!([2641, 4096, 32_768].map(|vms| registers(vms, 132)), [64; 3]);
        assert_eq!(registers(1024, 20), 64);
        assert_eq!(registers(1, 0), 128);
    }

    #[test]
    fn blocks_are_as_small_as_fits() {
        assert_eq!(
            [(0, 32), (1, 32), (32, 32), (33, 32), (64, 32)].map(|(w, b)| warps_per_block(w, b)),
            [1, 1, 1, 2, 2]
        );
        assert_eq!(
            [(16, 16), (17, 16), (48, 16), (48, 24), (8, 0)].map(|(w, b)| warps_per_block(w, b)),
            [1, 2, 3, 2, 8]
        );
    }
}
