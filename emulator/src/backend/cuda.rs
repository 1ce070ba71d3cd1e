//! The CUDA back end: the machine of `kernels/`, compiled at start for the device at hand. Each VM lives on one device,
//! with its hart, devices and RAM; the host keeps mailboxes in memory that both reach.

mod choice;
mod cubin;
mod device;
mod driver;
mod engine;
mod error;
mod kept;
#[doc(hidden)]
pub mod mapped;
mod pace;
mod plan;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::nvrtc::Compiler;
use super::{Engine, EngineError, Machines, MemoryUse};
use crate::abi::{FRAME_BYTES, Mailbox, TEXT_BYTES, Vm};
use crate::fleet::capacity::size;
use crate::mailbox::MailboxRef;
use crate::memory::{BootMemory, SharedFrames};

use choice::Translations;
use device::Device;
use driver::{Context, Driver};
use engine::CudaEngine;
use plan::Demand;

pub use choice::{EngineChoice, EngineKind};
pub use driver::{CallError, OpenError, Resources};
pub use error::Error;

/// The oldest architecture that the kernels are made for: Turing.
const OLDEST: (u32, u32) = (7, 5);
/// Launch queues, how long a launch is to take, and the VMs per multiprocessor up to which that is the best. The host is
/// seldom needed more often, and a display driver allows 2 s. With many VMs the host needs longer to look after a queue's
/// VMs than the GPU for those of another.
const LAUNCHES: [(u32, u32, Duration); 2] =
    [(32, 2, Duration::from_millis(8)), (u32::MAX, 4, Duration::from_millis(20))];

/// Launch queues for so many VMs, and how long a launch is to take.
fn launches(vms: u32, multiprocessors: u32) -> (u32, Duration) {
    let each = vms.div_ceil(multiprocessors.max(1));
    let fit = LAUNCHES.iter().find(|(most, ..)| each <= *most).unwrap_or(&LAUNCHES[0]);
    (fit.1, fit.2)
}

/// Which devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gpus {
    /// All that the driver shows.
    All,
    /// These.
    List(Vec<u32>),
}

impl std::str::FromStr for Gpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let bad = || format!("'{text}': expected all, or numbers of GPUs as in 0,1");
        let mut list = text
            .split(',')
            .map(|number| number.trim().parse().map_err(|_| bad()))
            .collect::<Result<Vec<u32>, _>>()?;
        list.sort_unstable();
        if list.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(format!("'{text}' names a GPU twice"));
        }
        Ok(Self::List(list))
    }
}

/// How many VMs, with what, on which devices.
#[derive(Clone, Debug)]
pub struct Config {
    /// RAM at the first instruction.
    pub boot: Arc<BootMemory>,
    /// VMs, numbered from 0.
    pub vms: u32,
    /// Devices to use.
    pub gpus: Gpus,
    /// Frames that the VMs of each device may have for themselves, all together. `None`: what fits.
    pub private_frames: Option<u32>,
    /// Unix time in nanoseconds at guest tick 0.
    pub epoch_ns: u64,
    /// Seed of the VMs' entropy. `None`: drawn from the host for each VM.
    pub seed: Option<u64>,
    /// How many VMs share a warp.
    pub engine: EngineChoice,
    /// Launch queues of each device. `None`: by the fleet's size.
    pub engines: Option<u32>,
    /// How long a launch is to take. `None`: by the fleet's size.
    pub target: Option<Duration>,
    /// Registers of each thread. `None`: by the fleet's size.
    pub registers: Option<u32>,
    /// Warps in each block. `None`: as few as the device takes.
    pub warps_per_block: Option<u32>,
    /// Use decoded code of earlier starts, and keep it for later ones.
    pub keep_code: bool,
    /// Environments in which NVRTC may be installed, besides the usual places.
    pub compilers: Vec<PathBuf>,
}

/// All VMs of a fleet on GPUs.
#[derive(Debug)]
pub struct CudaMachines {
    devices: Vec<Arc<Device>>,
    config: Config,
    driver: Driver,
    shared_frames: u32,
    pages: u32,
}

/// The driver, the devices, and the bytes that are free on each.
type Opened = (Driver, Vec<Arc<Context>>, Vec<u64>);

fn open_devices(gpus: &Gpus) -> Result<Opened, Error> {
    let driver = Driver::open()?;
    let count = driver.devices()?;
    let list = match gpus {
        Gpus::All => (0..count).collect(),
        Gpus::List(list) => list.clone(),
    };
    if let Some(&asked) = list.iter().find(|ordinal| **ordinal >= count).or(list.is_empty().then_some(&0)) {
        return Err(Error::NoDevice { asked, count });
    }
    let mut contexts = Vec::new();
    let mut free = Vec::new();
    for ordinal in list {
        let context = Context::open(&driver, ordinal)?;
        let properties = context.properties();
        if properties.capability < OLDEST {
            let (name, capability) = (properties.name.clone(), properties.capability);
            return Err(Error::TooOld { ordinal, name, capability });
        }
        free.push(context.memory()?.0);
        contexts.push(context);
    }
    Ok((driver, contexts, free))
}

/// What each of the devices is, a line each, once the kernels are there for it.
pub fn check(gpus: &Gpus, compilers: &[PathBuf]) -> Result<Vec<String>, Error> {
    let compiler = Compiler::find(compilers)?;
    let (driver, contexts, free) = open_devices(gpus)?;
    let (major, minor) = driver.version();
    let (nvrtc, cache) = (compiler.version(), cubin::cache_folder());
    let mut lines = Vec::new();
    for (context, free) in contexts.iter().zip(free) {
        let properties = context.properties();
        let translations = Translations::pick(1, properties.multiprocessors, properties.shared_bytes);
        let (arch, cache) = (properties.arch(), cache.as_deref());
        let code = cubin::kernels(&compiler, &arch, EngineKind::W, translations, 128, cache)?;
        lines.push(format!(
            "GPU {}: {} ({}), {} multiprocessors, {} free; driver for CUDA {major}.{minor}, NVRTC {}.{}; kernels {} in \
             {:.3} s",
            properties.ordinal,
            properties.name,
            properties.arch(),
            properties.multiprocessors,
            size(free),
            nvrtc.0,
            nvrtc.1,
            if code.cached { "read from the cache" } else { "compiled" },
            code.took.as_secs_f64(),
        ));
        lines.extend(code.cache_trouble);
    }
    Ok(lines)
}

/// VMs that fit on the devices if each may write `written` bytes of its RAM.
pub fn most_vms(gpus: &Gpus, boot: &BootMemory, written: u64) -> Result<u32, Error> {
    let shared = SharedFrames::new(boot)?;
    // Decoded code takes the same room in every engine.
    let trace_bytes = EngineKind::W.trace_bytes();
    let demand =
        Demand { vms: 0, pages: shared.table.len() as u32, shared_frames: shared.count, trace_bytes };
    let (_, _, free) = open_devices(gpus)?;
    Ok(free.iter().map(|free| demand.most(*free, written)).sum())
}

impl CudaMachines {
    /// Sets up the VMs, none of them started.
    pub fn new(config: Config) -> Result<Self, Error> {
        let folder = config.keep_code.then(kept::folder).flatten();
        // Starting the driver takes longer than all the rest.
        let (opened, (shared, compiler, kept)) = std::thread::scope(|scope| {
            let opened = scope.spawn(|| open_devices(&config.gpus));
            let shared = SharedFrames::new(&config.boot);
            let compiler = Compiler::find(&config.compilers);
            let kept = folder.map(|folder| (folder, kept::image_hash(&config.boot)));
            (opened.join(), (shared, compiler, kept))
        });
        let shared = shared?;
        // Who has no driver needs no compiler.
        let (driver, contexts, free) = opened.map_err(|_| Error::Crashed)??;
        let compiler = compiler?;
        let cache = cubin::cache_folder();
        let kept = kept.as_ref().map(|(folder, image)| (folder.as_path(), image.as_str()));
        let devices = contexts
            .into_iter()
            .zip(plan::split(config.vms, &free))
            .map(|(context, range)| {
                Device::new(context, range, &config, &shared, &compiler, cache.as_deref(), kept).map(Arc::new)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { devices, config, driver, shared_frames: shared.count, pages: shared.table.len() as u32 })
    }

    /// What runs where, for people: a line for each device, then what they should know.
    pub fn describe(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for device in &self.devices {
            let (properties, code, plan) = (device.context.properties(), &device.code, &device.plan);
            let mut line = format!(
                "GPU {}: {} ({}), VMs {} to {}; kernels ",
                properties.ordinal,
                properties.name,
                properties.arch(),
                device.range.start,
                device.range.end - 1
            );
            let seconds = code.took.as_secs_f64();
            // Writing to a string can't fail.
            let _ = match code.cached {
                true => write!(line, "read from the cache in {seconds:.3} s"),
                false => write!(line, "compiled in {seconds:.1} s, and kept for the next start"),
            };
            let _ = write!(
                line,
                "; engine {}, {} registers, {} bytes of stack; {} for RAM; {} of the host's memory for mailboxes; room for {} \
                 pages of decoded code",
                device.kind.name(),
                device.resources.registers,
                device.resources.local_bytes,
                size(u64::from(plan.private_frames) * u64::from(FRAME_BYTES)),
                size(device.mail.count() as u64 * size_of::<Mailbox>() as u64),
                plan.texts,
            );
            let loaded = &device.loaded;
            let _ = match loaded.counts {
                _ if !self.config.keep_code => write!(line, ", none of it kept from before"),
                Some((texts, traces)) => write!(
                    line,
                    ", of which {texts} with {traces} traces were read from the cache in {:.3} s",
                    loaded.took.as_secs_f64()
                ),
                None => write!(line, ", all of it to be made"),
            };
            lines.push(line);
            lines.extend(code.cache_trouble.clone());
            lines.extend(loaded.trouble.clone());
        }
        lines
    }

    /// RAM that each VM may write on average, if that is less than all of it.
    pub fn ram_limit(&self) -> Option<u64> {
        let each = |device: &Arc<Device>| {
            u64::from(device.plan.private_frames) / u64::from(device.range.len() as u32).max(1)
        };
        let least = self.devices.iter().map(each).min()?;
        (least < u64::from(self.pages)).then_some(least * u64::from(FRAME_BYTES))
    }

    /// Whether the first device began with decoded code of an earlier start.
    pub fn has_kept_code(&self) -> bool {
        self.devices.first().is_some_and(|device| device.loaded.counts.is_some())
    }

    /// Registers of each thread of the first device's kernel.
    pub fn registers(&self) -> u32 {
        self.devices.first().map_or(0, |device| device.registers)
    }

    /// The newest CUDA version that the driver knows, as in (13, 0).
    pub fn driver_version(&self) -> (i32, i32) {
        self.driver.version()
    }

    /// The first device's name.
    pub fn device_name(&self) -> String {
        self.devices.first().map_or_else(String::new, |device| device.context.properties().name.clone())
    }

    /// The state of a VM that is in no engine, for tests and debuggers.
    pub fn vm(&self, vm: u32) -> Result<Vm, EngineError> {
        let (device, index) = self.device(vm);
        device.state(index).map_err(|error| EngineError(error.to_string()))
    }

    /// All RAM of a VM that is in no engine.
    pub fn ram(&self, vm: u32) -> Result<Vec<u8>, EngineError> {
        let (device, index) = self.device(vm);
        device.ram(index).map_err(|error| EngineError(error.to_string()))
    }

    fn device(&self, vm: u32) -> (&Device, u32) {
        assert!(vm < self.config.vms, "VM {vm} of {}", self.config.vms);
        let at = self.devices.partition_point(|device| device.range.end <= vm);
        let device = &self.devices[at];
        (device, vm - device.range.start)
    }
}

impl Machines for CudaMachines {
    fn backend(&self) -> &'static str {
        "cuda"
    }

    fn run_apart(&self) -> bool {
        true
    }

    fn engine(&self) -> String {
        let mut names: Vec<&str> = self.devices.iter().map(|device| device.kind.name()).collect();
        names.dedup();
        names.join("+")
    }

    fn vms(&self) -> u32 {
        self.config.vms
    }

    fn parts(&self) -> Vec<Range<u32>> {
        self.devices.iter().map(|device| device.range.clone()).collect()
    }

    fn engines(&self) -> Result<Vec<Box<dyn Engine>>, EngineError> {
        let mut engines: Vec<Box<dyn Engine>> = Vec::new();
        for (part, device) in self.devices.iter().enumerate() {
            let vms = device.range.len() as u32;
            let (count, target) = launches(vms, device.context.properties().multiprocessors);
            let count = self.config.engines.unwrap_or(count).clamp(1, vms.max(1));
            let target = self.config.target.unwrap_or(target);
            for _ in 0..count {
                let batch = vms.div_ceil(count);
                let engine = CudaEngine::new(Arc::clone(device), part, batch, target)
                    .map_err(|error| EngineError(format!("no engine on the GPU: {error}")))?;
                engines.push(Box::new(engine));
            }
        }
        Ok(engines)
    }

    fn mailbox(&self, vm: u32) -> MailboxRef<'_> {
        let (device, index) = self.device(vm);
        // SAFETY: in bounds; the mailbox lives as long as `self`; only machine and `MailboxRef` access it.
        unsafe { MailboxRef::new(device.mail.as_ptr().add(index as usize)) }
    }

    fn memory(&self) -> MemoryUse {
        let frame = u64::from(FRAME_BYTES);
        let mut sum = MemoryUse::default();
        for device in &self.devices {
            let vms = device.range.len() as u64;
            let mut frames = 0;
            for known in &device.known {
                frames += u64::from(known.private_frames.load(Relaxed));
            }
            let fixed = (size_of::<Vm>() + size_of::<Mailbox>()) as u64 + u64::from(self.pages) * 4;
            sum.shared_bytes += u64::from(self.shared_frames) * frame;
            sum.private_bytes += frames * frame;
            let code = u64::from(device.plan.texts) * u64::from(TEXT_BYTES)
                + u64::from(device.plan.traces) * u64::from(device.kind.trace_bytes());
            sum.overhead_bytes += vms * fixed + code;
        }
        sum
    }

    fn keep(&self) -> Vec<String> {
        // Devices of one kind share a file, and their VMs run the same programs: one of them will do.
        let mut files = BTreeSet::new();
        let firsts = self.devices.iter().filter(|device| files.insert(device.kept_file()));
        firsts.filter_map(|device| device.keep_code()).collect()
    }

    fn reset(&self, vm: u32) -> Result<(), EngineError> {
        let (device, index) = self.device(vm);
        device.reset(&self.config, index).map_err(|error| EngineError(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_gpus_are_read() {
        assert_eq!("all".parse(), Ok(Gpus::All));
        assert_eq!("0".parse(), Ok(Gpus::List(vec![0])));
        assert_eq!("2, 0".parse(), Ok(Gpus::List(vec![0, 2])));
        for bad in ["", "0,", "a", "-1", "1,1", "0;1"] {
            assert!(bad.parse::<Gpus>().is_err(), "{bad}");
        }
    }

    #[test]
    fn large_fleets_have_more_queues() {
        let ms = Duration::from_millis;
        assert_eq!([1, 1024, 4224].map(|vms| launches(vms, 132)), [(2, ms(8)); 3]);
        assert_eq!([4225, 24_576].map(|vms| launches(vms, 132)), [(4, ms(20)); 2]);
    }

    #[test]
    fn without_a_driver_the_error_says_what_is_missing() {
        let config = Config {
            boot: Arc::new(BootMemory { ram_bytes: 4096, entry: 0, dtb_address: 0, pieces: vec![] }),
            vms: 1,
            gpus: Gpus::List(vec![4_000_000]),
            private_frames: None,
            epoch_ns: 0,
            seed: Some(1),
            engine: EngineChoice::Auto,
            engines: None,
            target: None,
            registers: None,
            warps_per_block: None,
            keep_code: false,
            compilers: vec![],
        };
        // With a driver: there is no such device.
        let error = CudaMachines::new(config).unwrap_err().to_string();
        assert!(error.contains("install the driver") || error.contains("nvidia-smi"), "{error}");
    }
}
