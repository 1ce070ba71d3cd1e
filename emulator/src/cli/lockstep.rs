//! `emulator lockstep`: the same guests on the CPU and on a GPU, compared bit for bit on the way to READY and while they
//! answer HTTP requests.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use emulator::backend::cpu::{self, CpuMachines};
use emulator::backend::cuda::{self, CudaMachines, EngineChoice, Gpus};
use emulator::fleet::capacity::parse_size;
use emulator::guest::GuestImage;
use emulator::lockstep::{Error, Pair, Side, difference};
use emulator::memory::BootMemory;
use miette::{IntoDiagnostic, Result, miette};

use super::machines::{self, compiler_environments};

/// Steps of a slice on the CPU, and on the GPU: of an odd length, since where they end must not matter.
const CPU_SLICE: u64 = 1 << 20;
const GPU_SLICE: u64 = 65_537;
/// Guests' clocks start here: 2026-01-01.
const EPOCH_NS: u64 = 1_767_225_600 * 1_000_000_000;
/// Steps after which a guest is taken never to be READY, unless --steps says otherwise.
const NEVER_READY: u64 = 200_000_000;

/// `emulator lockstep`.
#[derive(Debug, Args)]
pub struct LockstepArgs {
    /// Folder with Image, initrd.cpio, vm.dtb and manifest.json.
    #[arg(long, value_name = "DIR")]
    pub image: PathBuf,

    /// Number of VMs.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub vms: u32,

    /// RAM of each VM, as in 16M [default: what the image was made for].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub ram: Option<u64>,

    /// HTTP requests that each VM answers once all are READY.
    #[arg(long, value_name = "K", default_value_t = 100)]
    pub requests: u32,

    /// End after so many steps of each VM [default: when all requests are answered].
    #[arg(long, value_name = "STEPS")]
    pub steps: Option<u64>,

    /// Steps between two comparisons.
    #[arg(long, value_name = "STEPS", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub every: u64,

    /// The guests' randomness comes from this number.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    pub seed: u64,

    /// GPUs that share the VMs, by their numbers, or all of them.
    #[arg(long, value_name = "N,N...|all", default_value = "0")]
    pub gpus: Gpus,

    /// How many VMs share a warp of the GPU: w: one; auto: by the fleet's size.
    #[arg(long, value_name = "auto|w|l2|l4|l8|l16|l32", default_value = "auto")]
    pub engine: EngineChoice,

    /// Registers of each GPU thread [default: by the fleet's size].
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(32..=255))]
    pub gpu_registers: Option<u32>,

    /// Begin without the decoded code of earlier starts, and keep none for later ones.
    #[arg(long)]
    pub no_code_cache: bool,

    /// Where both states go if they differ.
    #[arg(long, value_name = "DIR", default_value = "lockstep-mismatch")]
    pub mismatch: PathBuf,
}

/// `emulator lockstep`.
pub fn run(args: &LockstepArgs) -> Result<ExitCode> {
    let image = GuestImage::load(&args.image, args.ram).into_diagnostic()?;
    let boot = Arc::new(BootMemory::from(image));
    let gpu = open_gpu(args, &boot)?;
    for line in gpu.describe() {
        println!("{line}");
    }
    let mut pair = pair(args, &boot, gpu)?;
    let (mut compared, mut good) = (0u64, 0);
    loop {
        let until = (pair.at / args.every + 1) * args.every;
        pair.advance(args.steps.map_or(until, |steps| until.min(steps))).into_diagnostic()?;
        let found = difference::find(&pair).into_diagnostic()?;
        compared += u64::from(args.vms);
        if let Some(found) = found {
            return Err(differs(args, &boot, &found, (good, pair.at)));
        }
        println!("{} VMs are the same after {} steps, {} requests", args.vms, pair.at, pair.answered());
        good = pair.at;
        if pair.is_done() || args.steps.is_some_and(|steps| pair.at >= steps) {
            break;
        }
        if !pair.is_ready() && pair.at >= NEVER_READY {
            return Err(miette!("the guests are not READY after {} steps", pair.at));
        }
    }
    for line in pair.other.iter().flat_map(|gpu| gpu.machines.keep()) {
        tracing::warn!("{line}");
    }
    println!(
        "{compared} states compared, hart, devices and all RAM: no difference; {}, {} HTTP requests answered",
        if pair.is_ready() { "all VMs READY" } else { "not all VMs READY" },
        pair.answered()
    );
    Ok(ExitCode::SUCCESS)
}

fn open_gpu(args: &LockstepArgs, boot: &Arc<BootMemory>) -> Result<CudaMachines> {
    let machines = CudaMachines::new(cuda::Config {
        boot: Arc::clone(boot),
        vms: args.vms,
        gpus: args.gpus.clone(),
        private_frames: None,
        epoch_ns: EPOCH_NS,
        seed: Some(args.seed),
        engine: args.engine,
        engines: Some(1),
        target: None,
        registers: args.gpu_registers,
        warps_per_block: None,
        keep_code: !args.no_code_cache,
        compilers: compiler_environments(),
    });
    machines.map_err(machines::cuda_error)
}

fn pair(args: &LockstepArgs, boot: &Arc<BootMemory>, gpu: CudaMachines) -> Result<Pair> {
    let reference = CpuMachines::new(cpu::Config {
        boot: Arc::clone(boot),
        vms: args.vms,
        threads: 1,
        private_frames: None,
        epoch_ns: EPOCH_NS,
        seed: Some(args.seed),
    })
    .into_diagnostic()?;
    let cpu = Side::new("CPU", Box::new(reference), CPU_SLICE).into_diagnostic()?;
    let gpu = Side::new("GPU", Box::new(gpu), GPU_SLICE).into_diagnostic()?;
    Ok(Pair::new(cpu, Some(gpu), args.requests))
}

/// Writes what differs, narrows it down, and says where all of it is.
fn differs(
    args: &LockstepArgs,
    boot: &Arc<BootMemory>,
    found: &difference::Difference,
    (good, bad): (u64, u64),
) -> miette::Report {
    let folder = &args.mismatch;
    let fresh = || {
        let again = open_gpu(args, boot).and_then(|gpu| pair(args, boot, gpu));
        again.map_err(|error| Error::Engine(emulator::backend::EngineError(error.to_string())))
    };
    let mut notes = String::new();
    let mut note = |why: &dyn std::fmt::Display| notes += &format!("; {why}");
    if let Err(error) = found.write(folder) {
        note(&error);
    }
    eprintln!("VM {} differs after {bad} steps; looking for the first step that does", found.vm);
    let (mut good, mut bad, mut closest) = (good, bad, None);
    match difference::narrow(fresh, (good, bad)) {
        Ok(narrowed) => (good, bad, closest) = narrowed,
        Err(error) => note(&format!("it could not be narrowed down: {error}")),
    }
    let first = closest.as_ref().unwrap_or(found);
    let command = command(args, bad, bad - good);
    let trace = fresh().and_then(|pair| difference::trace(pair, first.vm, bad));
    let written = match trace {
        Ok(text) => difference::write_file(folder, "trace.txt", text.as_bytes()),
        Err(error) => {
            note(&format!("no trace: {error}"));
            Ok(())
        }
    };
    let written = written
        .and_then(|()| closest.as_ref().map_or(Ok(()), |closest| closest.write(folder)))
        .and_then(|()| difference::write_file(folder, "command", format!("{command}\n").as_bytes()));
    if let Err(error) = written {
        note(&error);
    }
    let what = first.what();
    let (vm, folder) = (first.vm, folder.display());
    miette!(
        help = format!(
            "{command}\nleads there again; both states, RAM, the trace (trace.txt) and the command are in {folder}"
        ),
        "VM {vm} is the same after {good} steps and differs after {bad}: {what}{notes}"
    )
}

/// The command that finds it again.
fn command(args: &LockstepArgs, steps: u64, every: u64) -> String {
    let mut words = format!(
        "emulator lockstep --image {} --vms {} --seed {} --requests {} --steps {steps} --every {}",
        args.image.display(),
        args.vms,
        args.seed,
        args.requests,
        every.max(1)
    );
    if let Some(ram) = args.ram {
        words += &format!(" --ram {ram}");
    }
    if let cuda::EngineChoice::Only(engine) = args.engine {
        words += &format!(" --engine {}", engine.name());
    }
    if args.no_code_cache {
        words += " --no-code-cache";
    }
    if let Some(registers) = args.gpu_registers {
        words += &format!(" --gpu-registers {registers}");
    }
    words
}
