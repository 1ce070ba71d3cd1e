//! One queue of launches on a device. Each device has two: while one half of its VMs runs, the host looks after what
//! the other half has left in its mailboxes.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::device::Device;
use super::driver::{Argument, CallError, Pinned, Stream};
use super::pace::Pace;
use crate::abi::{GpuSlice, LESSONS_OFTEN, SliceRequest, SliceResult};
use crate::backend::{Engine, EngineError, Slice, Watch};

/// How long a launch is waited for without sleeping, and one whose VMs are watched.
const SPIN: Duration = Duration::from_micros(200);
const SPIN_WATCHED: Duration = Duration::from_millis(4);
/// Between two looks at a longer one.
const NAP: Duration = Duration::from_micros(50);
/// A slice lasts no more cycles, some 1 s: the clock that it looks at has 32 bits, and starts over after twice as many.
const CYCLES_MOST: u32 = 1 << 31;
/// Marks a result that no warp has written.
const NOT_WRITTEN: u32 = u32::MAX;
/// VMs that the message about a fault names.
const NAMED: usize = 8;

/// One queue of launches.
pub(super) struct CudaEngine {
    device: Arc<Device>,
    part: usize,
    stream: Stream,
    list: Pinned<GpuSlice>,
    results: Pinned<SliceResult>,
    batch: u32,
    pace: Pace,
}

impl CudaEngine {
    pub fn new(device: Arc<Device>, part: usize, batch: u32, target: Duration) -> Result<Self, CallError> {
        device.context.make_current()?;
        Ok(Self {
            stream: Stream::new(&device.context)?,
            list: Pinned::new(&device.context, batch as usize)?,
            results: Pinned::new(&device.context, batch as usize)?,
            device,
            part,
            batch,
            pace: Pace::new(target),
        })
    }

    /// A slice's request as the kernel gets it, and how long it may last, in cycles of the multiprocessor; 0 for any time.
    fn limits(&self, mut request: SliceRequest) -> (SliceRequest, u32) {
        if request.reserved != 0 {
            return (request, 0); // it has to end at a certain step
        }
        let Some(time) = self.pace.time(request.budget) else {
            request.budget = Pace::short(request.budget);
            return (request, 0);
        };
        let kilohertz = u128::from(self.device.context.properties().kilohertz);
        let cycles = time.as_nanos() * kilohertz / 1_000_000;
        (request, cycles.clamp(1, CYCLES_MOST.into()) as u32)
    }

    fn write_list(&self, slices: &[Slice]) -> Result<(), EngineError> {
        let range = &self.device.range;
        for (i, slice) in slices.iter().enumerate() {
            if i >= self.list.count() || !range.contains(&slice.vm) {
                let (vm, batch) = (slice.vm, self.batch);
                return Err(EngineError(format!("VM {vm} in a list of {batch} for VMs {range:?}")));
            }
            let (request, cycles) = self.limits(slice.request);
            let entry = GpuSlice { vm: slice.vm - range.start, cycles, request };
            // SAFETY: in bounds, and no launch reads the list now.
            unsafe {
                self.list.as_ptr().add(i).write_volatile(entry);
                (&raw mut (*self.results.as_ptr().add(i)).exit).write_volatile(NOT_WRITTEN);
            }
        }
        Ok(())
    }

    fn launch(&self, count: u32, lessons: u32) -> Result<(), CallError> {
        self.device.context.make_current()?;
        let device = &self.device;
        let mut arguments = [
            Argument::Address(device.vms.address()),
            Argument::Address(device.pool.address()),
            Argument::Address(device.mail.address()),
            Argument::Address(self.list.address()),
            Argument::Word(count),
            Argument::Address(self.results.address()),
            Argument::Word(lessons),
        ];
        let warps = device.warps_per_block;
        let blocks = device.kind.warps(count).div_ceil(warps);
        let shared = warps * device.shared_bytes;
        self.stream.launch(&device.run, blocks, warps * 32, shared, &mut arguments)
    }

    /// Waits without a core of its own: a launch takes milliseconds, and the host has mailboxes to look after. Except when
    /// somebody is to learn at once what the VMs send.
    fn wait(&self, began: Instant, watch: Option<Watch<'_>>) -> Result<(), CallError> {
        let spin = if watch.is_some() { SPIN_WATCHED } else { SPIN };
        while !self.stream.is_done()? {
            if let Some(watch) = watch {
                watch();
            }
            if began.elapsed() < spin { std::hint::spin_loop() } else { std::thread::sleep(NAP) }
        }
        Ok(())
    }

    fn result(&self, i: usize) -> SliceResult {
        debug_assert!(i < self.results.count());
        // SAFETY: in bounds; the launch has ended, or has faulted and writes no more.
        unsafe { self.results.as_ptr().add(i).read_volatile() }
    }

    /// What is known of a launch that the device could not finish.
    fn fault(&self, slices: &[Slice], error: &CallError) -> EngineError {
        let properties = self.device.context.properties();
        let mut text = format!("GPU {} ({}): {error}", properties.ordinal, properties.name);
        let unfinished: Vec<u32> = (0..slices.len().min(self.results.count()))
            .filter(|i| self.result(*i).exit == NOT_WRITTEN)
            .map(|i| slices[i].vm)
            .collect();
        // Writing to a string can't fail.
        let _ = write!(text, "; {} of {} slices were not finished", unfinished.len(), slices.len());
        for vm in unfinished.iter().take(NAMED) {
            let known = &self.device.known[(vm - self.device.range.start) as usize];
            let _ = write!(
                text,
                "; VM {vm} began at pc {:#010x}, its last trap had cause {:#x} at {:#010x}",
                known.pc.load(Relaxed),
                known.cause.load(Relaxed),
                known.epc.load(Relaxed),
            );
        }
        EngineError(text)
    }
}

impl Engine for CudaEngine {
    fn batch(&self) -> usize {
        self.batch as usize
    }

    fn part(&self) -> usize {
        self.part
    }

    fn budget(&self) -> Option<u64> {
        Some(self.pace.budget())
    }

    fn run(
        &mut self,
        slices: &[Slice],
        results: &mut Vec<SliceResult>,
        watch: Option<Watch<'_>>,
    ) -> Result<(), EngineError> {
        if slices.is_empty() {
            return Ok(());
        }
        self.write_list(slices)?;
        let device = Arc::clone(&self.device);
        let launching = device.gate.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let began = Instant::now();
        // A few VMs that answer go ways of their own, seldom, and somebody waits: that is to be learned soon.
        let lessons = if watch.is_some() { LESSONS_OFTEN } else { device.lessons.load(Relaxed) };
        let ran = self.launch(slices.len() as u32, lessons).and_then(|()| self.wait(began, watch));
        let took = began.elapsed();
        ran.map_err(|error| self.fault(slices, &error))?;
        let first = results.len();
        for (i, slice) in slices.iter().enumerate() {
            let result = self.result(i);
            if result.exit == NOT_WRITTEN {
                return Err(EngineError(format!("the device left out the slice of VM {}", slice.vm)));
            }
            self.device.known[(slice.vm - self.device.range.start) as usize].update(&result);
            results.push(result);
        }
        let budget = slices.iter().map(|slice| slice.request.budget).max().unwrap_or(0);
        self.pace.learn(took, budget, &results[first..]);
        drop(launching);
        if results[first..].iter().any(|result| result.code_full != 0) {
            device.clear_code().map_err(|error| self.fault(slices, &error))?;
        }
        Ok(())
    }
}
