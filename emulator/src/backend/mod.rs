//! What a back end offers to the fleet. The fleet knows no more of a machine than this.

pub mod cpu;
pub mod cuda;
#[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "native code is made on Linux only"))]
pub(crate) mod native;
pub mod nvrtc;
pub mod start;
pub mod stub;

use std::ops::Range;

use crate::abi::{SliceRequest, SliceResult};
use crate::mailbox::MailboxRef;

/// One VM's turn.
#[derive(Clone, Copy, Debug)]
pub struct Slice {
    /// VM number.
    pub vm: u32,
    /// What to run.
    pub request: SliceRequest,
}

/// Runs slices. One engine per worker thread: a core for the CPU back end, a device for a GPU.
pub trait Engine: Send {
    /// The most slices that one call of [`Engine::run`] takes: 1 on a core, the whole fleet on a GPU.
    fn batch(&self) -> usize;

    /// Which of [`Machines::parts`] it runs.
    fn part(&self) -> usize {
        0
    }

    /// Instructions that each slice of the next call had better have, if the engine knows better than the fleet.
    fn budget(&self) -> Option<u64> {
        None
    }

    /// Runs the slices, each of another VM, and appends one result per slice, in order. An engine whose slices take long calls
    /// `watch` again and again meanwhile: there may be something in the VMs' mailboxes already.
    ///
    /// No VM may be in two engines at once: the scheduler sees to that.
    fn run(
        &mut self,
        slices: &[Slice],
        results: &mut Vec<SliceResult>,
        watch: Option<Watch<'_>>,
    ) -> Result<(), EngineError>;
}

/// Looks after VMs while they run.
pub type Watch<'a> = &'a dyn Fn();

/// The machine itself failed (a device error, not a guest's doing).
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(pub String);

/// Memory in use, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Frames that all VMs share: kernel image, initrd, device tree, zeroes.
    pub shared_bytes: u64,
    /// Frames that belong to one VM each.
    pub private_bytes: u64,
    /// Everything else a VM costs: hart and device state, frame tables, mailboxes, decoded instructions,
    /// native code.
    pub overhead_bytes: u64,
}

/// A fleet's worth of machines in one back end.
pub trait Machines: Send + Sync {
    /// `cpu` or `cuda`.
    fn backend(&self) -> &'static str;
    /// The engine's name for reports: `threaded`, `w`, `l8`, ...
    fn engine(&self) -> String;
    /// Whether VMs run on processors of their own, and leave the host's alone.
    fn run_apart(&self) -> bool {
        false
    }
    /// Number of VMs; they are numbered from 0.
    fn vms(&self) -> u32;
    /// The VMs that the same engines run, in order and without gaps: one part for each device.
    fn parts(&self) -> Vec<Range<u32>> {
        std::iter::once(0..self.vms()).collect()
    }
    /// One engine for each worker. Called once.
    fn engines(&self) -> Result<Vec<Box<dyn Engine>>, EngineError>;
    /// The mailbox of a VM.
    fn mailbox(&self, vm: u32) -> MailboxRef<'_>;
    /// Memory in use now.
    fn memory(&self) -> MemoryUse;
    /// Keeps what makes the next start faster, if there is much to keep; VMs may run. Called when all of them have booted,
    /// and at the end. Returns what people should know.
    fn keep(&self) -> Vec<String> {
        Vec::new()
    }
    /// Puts a VM back to its state before the first instruction. The VM must not be in an engine.
    fn reset(&self, vm: u32) -> Result<(), EngineError>;
}
