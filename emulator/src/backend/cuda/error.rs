//! Why a fleet can't run on GPUs, and what to do about it.

use super::driver::{CallError, OpenError};
use crate::backend::nvrtc;
use crate::fleet::capacity::size;

/// Why a fleet can't run on GPUs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No driver.
    #[error(transparent)]
    Driver(#[from] OpenError),
    /// No device of that number.
    #[error("there is no GPU {asked}: this machine has {count}, numbered from 0; see `nvidia-smi -L`")]
    NoDevice {
        /// The number.
        asked: u32,
        /// Devices there are.
        count: u32,
    },
    /// A device that is too old.
    #[error("GPU {ordinal}, {name}, is too old (compute capability {}.{}): 7.5 (Turing) or later is needed", .capability.0, .capability.1)]
    TooOld {
        /// Its number.
        ordinal: u32,
        /// Its name.
        name: String,
        /// What it can.
        capability: (u32, u32),
    },
    /// No compiler, or the kernels don't compile.
    #[error(transparent)]
    Compiler(#[from] nvrtc::Error),
    /// The contents don't fit RAM.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
    /// Too many VMs.
    #[error(
        "GPU {ordinal}, {name}, has {} free: {vms} VMs of {} RAM do not fit, {fits} do (counting 1 MiB of RAM written by \
         each); give fewer --vms, or more --gpus",
        size(*free), size(*ram)
    )]
    DoesNotFit {
        /// Its number.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Bytes of memory that are free.
        free: u64,
        /// VMs it was to run.
        vms: u32,
        /// RAM of each.
        ram: u64,
        /// VMs that it could.
        fits: u32,
    },
    /// No memory although it should be there.
    #[error("no memory for {what} ({}): {cause}; another program may use it, or --vms is too high", size(*bytes))]
    NoMemory {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// The driver's words.
        cause: CallError,
    },
    /// The driver refused something.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A mistake in the program; its message was printed.
    #[error("the thread that opens the GPUs has crashed")]
    Crashed,
    /// No randomness.
    #[error("the host's random source does not answer: {0}")]
    Entropy(std::io::Error),
}
