//! The emulator's command line.

pub mod bench;
#[cfg(unix)]
pub mod console;
pub mod fleet;
pub mod gpus;
pub mod live;
pub mod load;
pub mod lockstep;
mod machines;
pub mod pcap;
#[cfg_attr(not(unix), allow(dead_code, reason = "there is no control socket to ask"))]
mod profile;
mod progress;
mod web;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use emulator::backend::cuda::{EngineChoice, Gpus};
use emulator::console::place::{self, Place};

pub use bench::BenchArgs;
#[cfg(unix)]
pub use console::{ActArgs, ConsoleArgs, StatusArgs};
pub use fleet::{FleetArgs, Until};
pub use gpus::GpusArgs;
pub use load::LoadArgs;
pub use lockstep::LockstepArgs;

/// A fleet of RV32IMA Linux virtual machines in one GPU, or on the CPU.
#[derive(Debug, Parser)]
#[command(name = "emulator", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a fleet and serve it until Ctrl-C.
    Fleet(FleetArgs),
    /// Measure fleets of several sizes, one after the other: booting, busy and serving.
    Bench(BenchArgs),
    /// Run the same VMs on the CPU and on a GPU, and compare them bit for bit while they boot and answer requests.
    Lockstep(LockstepArgs),
    /// List the GPUs that can run VMs, or say what is missing.
    Gpus(GpusArgs),
    /// Ask the VMs of a running fleet for their pages, over and over; print rate and times as JSON.
    Load(LoadArgs),
    /// Attach to the console of a VM of a running fleet; Ctrl-] leaves.
    #[cfg(unix)]
    Console(ConsoleArgs),
    /// Print what a running fleet does, as JSON.
    #[cfg(unix)]
    Status(StatusArgs),
    /// Keep VMs of a running fleet from running.
    #[cfg(unix)]
    Pause(ActArgs),
    /// Let paused VMs go on.
    #[cfg(unix)]
    Resume(ActArgs),
    /// Put VMs back to before their first instruction, and boot them; also those that have stopped or failed.
    #[cfg(unix)]
    Reset(ActArgs),
}

/// Where the VMs run, and how.
#[derive(Clone, Debug, Args)]
pub struct MachineArgs {
    /// Where the VMs run; auto takes a GPU if there is one.
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,

    /// CPU threads that run VMs [default: one per core].
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,

    /// GPUs that share the fleet, by their numbers, or all of them.
    #[arg(long, value_name = "N,N...|all", default_value = "0")]
    pub gpus: Gpus,

    /// Make boots repeatable: the guests' randomness comes from this number, and their clocks start at a fixed date.
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,

    /// How many VMs share a warp of the GPU: w: one; auto: by the fleet's size.
    #[arg(long, value_name = "auto|w|l2|l4|l8|l16|l32", default_value = "auto", help_heading = "GPU tuning")]
    pub engine: EngineChoice,

    /// Launch queues of each GPU: while one runs, the host serves the VMs of another [default: by the fleet's size].
    #[arg(long, value_name = "K", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=16))]
    pub gpu_queues: Option<u32>,

    /// How long a launch is to take; one of VMs that boot takes twice as long [default: by the fleet's size].
    #[arg(long, value_name = "MS", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=500))]
    pub gpu_slice: Option<u32>,

    /// Registers of each GPU thread [default: by the fleet's size].
    #[arg(long, value_name = "K", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(32..=255))]
    pub gpu_registers: Option<u32>,

    /// Warps in each block [default: as few as the device takes].
    #[arg(long, value_name = "K", help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=16))]
    pub gpu_warps: Option<u32>,

    /// Begin without the decoded code of earlier starts, and keep none for later ones.
    #[arg(long, help_heading = "GPU tuning")]
    pub no_code_cache: bool,
}

/// Where the VMs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// A GPU if there is one, else the CPU.
    Auto,
    /// An NVIDIA GPU.
    Cuda,
    /// The CPU.
    Cpu,
    /// No machine at all: what answers is a stub, to measure what stands before it.
    #[value(hide = true)]
    Stub,
}

/// `--vms max`.
pub const MAX_VMS: u32 = u32::MAX;

fn vm_count(text: &str) -> Result<u32, String> {
    match text {
        "max" => Ok(MAX_VMS),
        _ => text.parse().map_err(|_| "expected a number of VMs, or max".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.0..=1e9).contains(&seconds) => Ok(seconds),
        _ => Err("expected a number of seconds".into()),
    }
}

/// The folder of the fleet with that port base.
fn find_place(state_dir: Option<&PathBuf>, port_base: u16) -> Place {
    Place::new(&state_dir.cloned().unwrap_or_else(place::default_root), port_base)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["emulator", "fleet", "--image", "x", "--ram", "8M", "--until", "2.5"]);
        let Ok(Cli { command: Command::Fleet(args) }) = cli else { panic!("not parsed: {cli:?}") };
        assert_eq!((args.ram, args.until), (Some(8 << 20), Some(Until::Seconds(2.5))));
        for bad in [
            ["--until", "soon"],
            ["--until", "-1"],
            ["--port-base", "70000"],
            ["--ram", "8X"],
            ["--vms", "-1"],
            ["--web", "here"],
        ] {
            assert!(
                Cli::try_parse_from(["emulator", "fleet", "--image", "x", bad[0], bad[1]]).is_err(),
                "{bad:?}"
            );
        }
    }
}
