//! Opens the back end that was asked for.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use emulator::abi::FRAME_BYTES;
use emulator::backend::cpu::{self, CpuMachines};
use emulator::backend::cuda::{self, CudaMachines};
use emulator::backend::stub::{Page, StubMachines};
use emulator::backend::{Machines, nvrtc};
use emulator::fleet::capacity::{Capacity, available_memory, size};
use emulator::memory::BootMemory;
use miette::{IntoDiagnostic, Report, Result, miette};

use super::{Backend, MachineArgs};

/// Guests' clocks start here when boots are to be repeatable: 2026-01-01.
const FIXED_EPOCH_NS: u64 = 1_767_225_600 * 1_000_000_000;

/// Machines, and what to say of them.
pub struct Opened {
    /// The machines.
    pub machines: Arc<dyn Machines>,
    /// What `--backend auto` chose and why, to follow the back end's name; else empty.
    pub choice: String,
    /// Lines about the devices.
    pub notes: Vec<String>,
    /// The processor that runs the VMs.
    pub device: String,
    /// The GPU driver's newest CUDA version.
    pub driver: Option<String>,
    /// Registers of each GPU thread.
    pub registers: Option<u32>,
    /// Whether decoded code of an earlier start was there.
    pub kept_code: Option<bool>,
}

/// What a guest is taken to write when a fleet is to be as large as it can be, in percent of its RAM: a lean guest that
/// serves has written 35.
const WRITTEN_PERCENT: u64 = 38;

/// As many VMs as there is memory for.
pub fn most_vms(args: &MachineArgs, boot: &BootMemory) -> Result<u32> {
    let on_cpu = || {
        let available = available_memory().ok_or_else(|| {
            miette!("--vms max: this machine does not tell how much memory is free; give a number")
        })?;
        Ok(u32::try_from(Capacity::new(boot.ram_bytes, available).fits()).unwrap_or(u32::MAX))
    };
    let on_gpu = || cuda::most_vms(&args.gpus, boot, boot.ram_bytes / 100 * WRITTEN_PERCENT);
    match args.backend {
        Backend::Cpu | Backend::Stub => on_cpu(),
        Backend::Cuda => on_gpu().map_err(cuda_error),
        Backend::Auto => on_gpu().or_else(|_| on_cpu()),
    }
}

/// Opens the machines; `warn` is called with what the user should know.
pub fn open(args: &MachineArgs, vms: u32, boot: Arc<BootMemory>, warn: impl Fn(String)) -> Result<Opened> {
    match args.backend {
        Backend::Cpu => open_cpu(args, vms, boot, String::new(), warn),
        Backend::Stub => open_stub(args, vms),
        Backend::Cuda => open_cuda(args, vms, boot, warn).map_err(cuda_error),
        Backend::Auto => match open_cuda(args, vms, Arc::clone(&boot), &warn) {
            Ok(opened) => Ok(Opened { choice: " (auto)".into(), ..opened }),
            // The same on the CPU.
            Err(cuda::Error::Memory(error)) => Err(error).into_diagnostic(),
            Err(error) => {
                let text = error.to_string();
                let why = text.split([';', '\n']).next().unwrap_or_default();
                open_cpu(args, vms, boot, format!(" (auto: no GPU: {why})"), warn)
            }
        },
    }
}

/// As many bytes as the guests' page has.
const STUB_PAGE: usize = 180;

fn open_stub(args: &MachineArgs, vms: u32) -> Result<Opened> {
    let threads = threads(args, vms);
    let machines = StubMachines::new(vms, threads, Page::new(STUB_PAGE)).into_diagnostic()?;
    Ok(Opened {
        machines: Arc::new(machines),
        choice: String::new(),
        notes: vec!["No guests run: stubs answer, to measure the network.".into()],
        device: format!("{}, {threads} threads", processor()),
        driver: None,
        registers: None,
        kept_code: None,
    })
}

/// With what to do about it.
pub fn cuda_error(error: cuda::Error) -> Report {
    let help = match &error {
        cuda::Error::Driver(_) | cuda::Error::NoDevice { .. } | cuda::Error::TooOld { .. } => {
            "Or run on the CPU: --backend cpu, or --backend auto, which takes a GPU if there is one."
        }
        cuda::Error::Compiler(nvrtc::Error::NotFound { .. }) => {
            "`cargo xtask doctor` offers to install the compiler. Or run on the CPU: --backend cpu."
        }
        cuda::Error::DoesNotFit { .. } | cuda::Error::NoMemory { .. } => {
            "`nvidia-smi` shows which programs use the GPU's memory."
        }
        _ => return Err::<(), _>(error).into_diagnostic().err().unwrap_or_else(|| miette!("no back end")),
    };
    miette!(help = help, "--backend cuda: {error}")
}

fn open_cuda(
    args: &MachineArgs,
    vms: u32,
    boot: Arc<BootMemory>,
    warn: impl Fn(String),
) -> Result<Opened, cuda::Error> {
    let machines = CudaMachines::new(cuda::Config {
        boot,
        vms,
        gpus: args.gpus.clone(),
        private_frames: None,
        epoch_ns: epoch_ns(args),
        seed: args.seed,
        engine: args.engine,
        engines: args.gpu_queues,
        target: args.gpu_slice.map(|ms| Duration::from_millis(ms.into())),
        registers: args.gpu_registers,
        keep_code: !args.no_code_cache,
        warps_per_block: args.gpu_warps,
        compilers: compiler_environments(),
    })?;
    if let Some(limit) = machines.ram_limit() {
        warn(format!(
            "the GPU's memory is shared by {vms} VMs: if the guests write more than {} on average, the VM that asks for \
             more fails",
            size(limit)
        ));
    }
    let (major, minor) = machines.driver_version();
    Ok(Opened {
        choice: String::new(),
        notes: machines.describe(),
        device: machines.device_name(),
        driver: Some(format!("CUDA {major}.{minor}")),
        registers: Some(machines.registers()),
        kept_code: Some(machines.has_kept_code()),
        machines: Arc::new(machines),
    })
}

/// Python environments that `cargo xtask doctor` and `cargo xtask test` make for the compiler.
pub fn compiler_environments() -> Vec<PathBuf> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    folder("NVRTC_ENVIRONMENT")
        .into_iter()
        .chain(cache.map(|cache| cache.join("linux-on-gpu/nvrtc")))
        .collect()
}

fn open_cpu(
    args: &MachineArgs,
    vms: u32,
    boot: Arc<BootMemory>,
    choice: String,
    warn: impl Fn(String),
) -> Result<Opened> {
    let ram = boot.ram_bytes;
    let private_frames = match available_memory().map(|available| Capacity::new(ram, available)) {
        None => {
            warn(
                "this machine does not tell how much memory is free; the fleet may be too large for it"
                    .into(),
            );
            None
        }
        Some(capacity) if capacity.check(vms, ram).into_diagnostic()? => None,
        Some(capacity) => {
            let pool = capacity.pool_bytes(vms);
            warn(format!(
                "{} of memory can be used for {vms} VMs of {} RAM: if the guests write more than {} on average, the VM \
                 that asks for more fails",
                size(capacity.available),
                size(ram),
                size(pool / u64::from(vms)),
            ));
            Some(u32::try_from(pool / u64::from(FRAME_BYTES)).unwrap_or(u32::MAX))
        }
    };
    let threads = threads(args, vms);
    let config =
        cpu::Config { boot, vms, threads, private_frames, epoch_ns: epoch_ns(args), seed: args.seed };
    Ok(Opened {
        machines: Arc::new(CpuMachines::new(config).into_diagnostic()?),
        choice,
        notes: vec![],
        device: format!("{}, {threads} threads", processor()),
        driver: None,
        registers: None,
        kept_code: None,
    })
}

/// Unix time at the guests' first instruction.
fn epoch_ns(args: &MachineArgs) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    args.seed.map_or(u64::try_from(now).unwrap_or(0), |_| FIXED_EPOCH_NS)
}

/// Threads that run VMs.
pub fn threads(args: &MachineArgs, vms: u32) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    args.threads.unwrap_or(cores).min(vms.max(1))
}

/// The host processor's name.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "CPU".to_owned(), |(_, name)| name.trim().to_owned())
}
