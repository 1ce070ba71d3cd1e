//! `emulator gpus`: the GPUs that can run VMs, or what is missing.

use std::process::ExitCode;

use emulator::backend::cuda;
use miette::Result;

use super::GpusArgs;
use super::machines::{compiler_environments, cuda_error};

/// `emulator gpus`.
pub fn run(args: &GpusArgs) -> Result<ExitCode> {
    for line in cuda::check(&args.gpus, &compiler_environments()).map_err(cuda_error)? {
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}
