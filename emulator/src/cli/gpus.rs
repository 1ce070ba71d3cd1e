//! `emulator gpus`: the GPUs that can run VMs, or what is missing.

use std::process::ExitCode;

use clap::Args;
use emulator::backend::cuda::{self, Gpus};
use miette::Result;

use super::machines::{compiler_environments, cuda_error};

/// `emulator gpus`.
#[derive(Debug, Args)]
pub struct GpusArgs {
    /// Which, by their numbers, or all of them.
    #[arg(long, value_name = "N,N...|all", default_value = "all")]
    pub gpus: Gpus,
}

/// `emulator gpus`.
pub fn run(args: &GpusArgs) -> Result<ExitCode> {
    for line in cuda::check(&args.gpus, &compiler_environments()).map_err(cuda_error)? {
        println!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}
