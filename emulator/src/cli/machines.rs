//! Opens the back end that was asked for.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use emulator::abi::FRAME_BYTES;
use emulator::backend::Machines;
use emulator::backend::cpu::{Config, CpuMachines};
use emulator::fleet::capacity::{Capacity, available_memory, size};
use emulator::guest::GuestImage;
use emulator::memory::{BootMemory, Piece};
use miette::{IntoDiagnostic, Result, miette};

use super::{Backend, FleetArgs};

/// Guests' clocks start here when boots are to be repeatable: 2026-01-01.
const FIXED_EPOCH_NS: u64 = 1_767_225_600 * 1_000_000_000;

/// What was found out before anything was opened.
pub struct Plan {
    /// Frames that the VMs may have for themselves, all together; none for no limit.
    private_frames: Option<u32>,
}

/// Checks that the back end exists and that the VMs fit; `warn` is called with what the user should know.
pub fn plan(args: &FleetArgs, ram: u64, warn: impl Fn(String)) -> Result<Plan> {
    match args.backend {
        // The place of the CUDA back end.
        Backend::Cuda => {
            return Err(miette!(
                help = "Give --backend cpu, or leave it out.",
                "this build has no CUDA back end: the machine runs on the CPU only"
            ));
        }
        Backend::Auto | Backend::Cpu => {}
    }
    let Some(available) = available_memory() else {
        warn("this machine does not tell how much memory is free; the fleet may be too large for it".into());
        return Ok(Plan { private_frames: None });
    };
    let capacity = Capacity::new(ram, available);
    if capacity.check(args.vms, ram).into_diagnostic()? {
        return Ok(Plan { private_frames: None });
    }
    let pool = capacity.pool_bytes(args.vms);
    warn(format!(
        "{} of memory can be used for {} VMs of {} RAM: if the guests write more than {} on average, the VM that asks \
         for more fails",
        size(capacity.available),
        args.vms,
        size(ram),
        size(pool / u64::from(args.vms)),
    ));
    Ok(Plan { private_frames: Some(u32::try_from(pool / u64::from(FRAME_BYTES)).unwrap_or(u32::MAX)) })
}

/// What `--backend auto` chose, for people.
pub fn choice(args: &FleetArgs) -> &'static str {
    match args.backend {
        Backend::Auto => " (auto: this build has no CUDA back end)",
        Backend::Cuda | Backend::Cpu => "",
    }
}

/// Opens the machines.
pub fn open(args: &FleetArgs, image: GuestImage, plan: Plan) -> Result<Arc<dyn Machines>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let config = Config {
        boot: Arc::new(BootMemory {
            ram_bytes: image.ram_bytes.into(),
            entry: 0,
            dtb_address: image.dtb_addr,
            pieces: vec![
                Piece { name: "the kernel", address: 0, bytes: image.kernel },
                Piece { name: "the initrd", address: image.initrd_addr, bytes: image.initrd },
                Piece { name: "the device tree", address: image.dtb_addr, bytes: image.dtb },
            ],
        }),
        vms: args.vms,
        threads: threads(args),
        private_frames: plan.private_frames,
        epoch_ns: args.seed.map_or(u64::try_from(now).unwrap_or(0), |_| FIXED_EPOCH_NS),
        seed: args.seed,
    };
    Ok(Arc::new(CpuMachines::new(config).into_diagnostic()?))
}

/// Threads that run VMs.
fn threads(args: &FleetArgs) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    args.threads.unwrap_or(cores).min(args.vms.max(1))
}
