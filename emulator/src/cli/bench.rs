//! `emulator bench`: boots fleets of several sizes, keeps them busy, has them serve, and measures; other emulators beside
//! them. docs/performance.md has results.

mod http;
mod peer;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use emulator::backend::cuda::{self, EngineChoice};
use emulator::fleet::capacity::parse_size;
use emulator::fleet::clock::TimeMode;
use emulator::fleet::{Budget, Fleet, FleetConfig};
use emulator::guest::GuestImage;
use emulator::memory::BootMemory;
use emulator::net::load::Outcome;
use emulator::net::user::UserBridge;
use miette::{IntoDiagnostic, Result, WrapErr, miette};

use super::machines::{self, Opened};
use super::{Backend, MAX_VMS, MachineArgs, seconds, vm_count};
use table::{Document, Row, median, spread};

/// What keeps a guest busy: its shell, and the kernel with it.
const LOAD: &[u8] = b"while :; do echo x > /dev/null; done\n";
/// After typing it, until it is measured.
const SETTLE: Duration = Duration::from_millis(500);
/// How often a boot is looked at.
const TICK: Duration = Duration::from_millis(20);

/// `emulator bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Folder with Image, initrd.cpio, vm.dtb and manifest.json.
    #[arg(long, value_name = "DIR")]
    pub image: PathBuf,

    /// Sizes of the fleets; max: as many as memory allows. What does not fit is left out.
    #[arg(long, value_name = "N,N...", value_delimiter = ',', value_parser = vm_count,
        default_value = "1,64,256,1024,4096,8192,16384,32768")]
    pub vms: Vec<u32>,

    /// Sizes of fleets on the CPU, to compare with.
    #[arg(long, value_name = "N,N...", value_delimiter = ',', value_parser = vm_count)]
    pub cpu_vms: Vec<u32>,

    /// RAM of each VM, as in 8M,16M [default: what the image was made for].
    #[arg(long, value_name = "SIZE,SIZE...", value_delimiter = ',', value_parser = parse_size)]
    pub ram: Vec<u64>,

    /// Where the VMs run.
    #[command(flatten)]
    pub machine: MachineArgs,

    /// Engines of the GPU to measure one after the other [default: --engine].
    #[arg(long, value_name = "NAME,NAME...", value_delimiter = ',', help_heading = "GPU tuning")]
    pub engines: Vec<EngineChoice>,

    /// Lengths of launches to measure one after the other [default: --gpu-slice].
    #[arg(long, value_name = "MS,MS...", value_delimiter = ',', help_heading = "GPU tuning",
        value_parser = clap::value_parser!(u32).range(1..=500))]
    pub slices: Vec<u32>,

    /// Runs of each size; medians are shown.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,

    /// After the boot, keep every VM's shell busy for so many seconds and measure; 0: don't.
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub steady: f64,

    /// Boot once more with a network, and ask all VMs for their page for so many seconds; 0: don't.
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub http: f64,

    /// Other emulators to measure beside: a file that `cargo xtask bench --peer` writes.
    #[arg(long, value_name = "FILE")]
    pub peers: Option<PathBuf>,

    /// Give up on a boot after so many seconds.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub timeout: f64,

    /// Write the figures as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// The commit that is measured, for the JSON.
    #[arg(long, value_name = "HASH")]
    pub commit: Option<String>,
}

/// What is measured at once.
#[derive(Clone)]
struct Case {
    machine: MachineArgs,
    boot: Arc<BootMemory>,
    vms: u32,
}

/// What one boot gave, and what came after it.
struct Run {
    open: f64,
    ready: f64,
    gips: f64,
    instructions: u64,
    steady_gips: Option<f64>,
    bytes_per_vm: u64,
    facts: Facts,
}

/// What one fleet that served gave.
struct Served {
    first_answers: f64,
    outcome: Outcome,
    bytes_per_vm: u64,
    facts: Facts,
}

/// What rows of one case have in common.
#[derive(Clone)]
struct Facts {
    backend: &'static str,
    engine: String,
    device: String,
    driver: Option<String>,
    registers: Option<u32>,
    kept_code: Option<bool>,
}

/// `emulator bench`.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    let peers = args.peers.as_deref().map(peer::read).transpose()?.unwrap_or_default();
    let rams: Vec<Option<u64>> =
        if args.ram.is_empty() { vec![None] } else { args.ram.iter().copied().map(Some).collect() };
    let mut document = Document {
        device: machines::processor(),
        host: format!("{}, {} cores", machines::processor(), cores()),
        driver: None,
        commit: args.commit.clone(),
        image: String::new(),
        instructions_to_ready: None,
        rows: vec![],
    };
    println!("{}", table::HEAD);
    for ram in rams {
        let image = GuestImage::load(&args.image, ram).into_diagnostic()?;
        document.image.clone_from(&image.manifest_hash);
        let boot = Arc::new(BootMemory::from(image));
        for case in cases(args, &boot)? {
            measure_case(args, &case, &mut document)?;
            write(args, &document)?;
        }
    }
    if !peers.is_empty() {
        let instructions = match document.instructions_to_ready {
            Some(instructions) => instructions,
            None => count_instructions(args)?,
        };
        document.instructions_to_ready = Some(instructions);
        let patience = Duration::from_secs_f64(args.timeout);
        let mut counts = vec![1, cores()];
        counts.dedup();
        for peer in &peers {
            for &count in &counts {
                document.add(peer::measure(peer, count, args.runs, instructions, patience)?);
                write(args, &document)?;
            }
        }
    }
    if document.rows.is_empty() {
        return Err(miette!("nothing was measured: none of the sizes fits, and there are no peers"));
    }
    Ok(ExitCode::SUCCESS)
}

fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// After each size: a later one that fails does not take the earlier ones along.
fn write(args: &BenchArgs, document: &Document) -> Result<()> {
    let Some(path) = &args.json else { return Ok(()) };
    document.write(path).into_diagnostic().wrap_err_with(|| format!("--json {}", path.display()))
}

/// Everything to measure with this guest, in order. Sizes that don't fit are told, and left out.
fn cases(args: &BenchArgs, boot: &Arc<BootMemory>) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    let add = |machine: &MachineArgs, sizes: &[u32], list: &mut Vec<Case>| -> Result<()> {
        if sizes.is_empty() {
            return Ok(());
        }
        let most = machines::most_vms(machine, boot)?;
        let mut sizes: Vec<u32> =
            sizes.iter().map(|size| if *size == MAX_VMS { most } else { *size }).collect();
        sizes.dedup();
        for vms in sizes {
            if vms > most || vms == 0 {
                eprintln!("{vms} VMs of {} MiB are left out: {most} fit", boot.ram_bytes >> 20);
                continue;
            }
            list.push(Case { machine: machine.clone(), boot: Arc::clone(boot), vms });
        }
        Ok(())
    };
    let engines = if args.engines.is_empty() { vec![args.machine.engine] } else { args.engines.clone() };
    let slices = match args.slices.as_slice() {
        [] => vec![args.machine.gpu_slice],
        list => list.iter().copied().map(Some).collect(),
    };
    // Where there is no GPU, engines and slices say nothing.
    let no_gpu = || cuda::most_vms(&args.machine.gpus, boot, 0).is_err();
    let on_cpu = match args.machine.backend {
        Backend::Cuda => false,
        Backend::Auto => no_gpu(),
        Backend::Cpu | Backend::Stub => true,
    };
    for &engine in if on_cpu { &[EngineChoice::Auto][..] } else { &engines } {
        for &gpu_slice in if on_cpu { &slices[..1] } else { &slices } {
            let machine = MachineArgs { engine, gpu_slice, ..args.machine.clone() };
            add(&machine, &args.vms, &mut cases)?;
        }
    }
    let machine = MachineArgs { backend: Backend::Cpu, ..args.machine.clone() };
    add(&machine, &args.cpu_vms, &mut cases)?;
    Ok(cases)
}

fn measure_case(args: &BenchArgs, case: &Case, document: &mut Document) -> Result<()> {
    let mut runs = Vec::new();
    for _ in 0..args.runs {
        runs.push(measure(args, case).wrap_err_with(|| format!("{} VMs", case.vms))?);
    }
    let of = |get: fn(&Run) -> f64| runs.iter().map(get).collect::<Vec<f64>>();
    if let Some(first) = runs.first() {
        if first.facts.backend == "cuda" {
            document.device.clone_from(&first.facts.device);
            document.driver.clone_from(&first.facts.driver);
        }
        let each: Vec<f64> = runs.iter().map(|run| run.instructions as f64 / f64::from(case.vms)).collect();
        document.instructions_to_ready = median(&each).map(|instructions| instructions as u64);
        document.add(Row {
            seconds_to_ready: median(&of(|run| run.ready)),
            seconds_to_open: median(&of(|run| run.open)),
            bytes_per_vm: Some(first.bytes_per_vm),
            kept_code: first
                .facts
                .kept_code
                .map(|_| runs.iter().all(|run| run.facts.kept_code == Some(true))),
            ..case.speeds("boot", &first.facts, &of(|run| run.gips))
        });
        let steady: Vec<f64> = runs.iter().filter_map(|run| run.steady_gips).collect();
        if !steady.is_empty() {
            document.add(Row {
                bytes_per_vm: Some(first.bytes_per_vm),
                ..case.speeds("steady", &first.facts, &steady)
            });
        }
    }
    if args.http > 0.0 {
        let mut runs = Vec::new();
        for _ in 0..args.runs {
            runs.push(serve(args, case).wrap_err_with(|| format!("{} VMs that serve", case.vms))?);
        }
        document.add(case.served(&runs));
    }
    Ok(())
}

impl Case {
    fn row(&self, phase: &'static str, facts: &Facts, runs: usize) -> Row {
        let on_gpu = facts.backend == "cuda";
        Row {
            backend: facts.backend.into(),
            engine: facts.engine.clone(),
            phase,
            vms: self.vms,
            ram_bytes: self.boot.ram_bytes,
            threads: (!on_gpu).then(|| machines::threads(&self.machine, self.vms)),
            slice_ms: self.machine.gpu_slice.filter(|_| on_gpu),
            registers: facts.registers,
            kept_code: facts.kept_code,
            runs: runs as u32,
            ..Row::default()
        }
    }

    fn speeds(&self, phase: &'static str, facts: &Facts, gips: &[f64]) -> Row {
        Row {
            mips_per_vm: median(gips).map(|gips| gips * 1000.0 / f64::from(self.vms)),
            gips_total: median(gips),
            spread: spread(gips),
            ..self.row(phase, facts, gips.len())
        }
    }

    fn served(&self, runs: &[Served]) -> Row {
        let of = |get: fn(&Served) -> f64| runs.iter().map(get).collect::<Vec<f64>>();
        let Some(first) = runs.first() else { return Row::default() };
        let rates = of(|run| run.outcome.requests_per_second);
        Row {
            seconds_to_http: median(&of(|run| run.first_answers)),
            requests_per_s: median(&rates),
            requests_failed: Some(runs.iter().map(|run| run.outcome.failed).sum()),
            p50_ms: median(&of(|run| run.outcome.milliseconds.p50)),
            p99_ms: median(&of(|run| run.outcome.milliseconds.p99)),
            bytes_per_vm: Some(first.bytes_per_vm),
            spread: spread(&rates),
            ..self.row("http", &first.facts, runs.len())
        }
    }
}

/// A fleet that has been started, what is known of it, and the seconds that opening it took.
fn open(case: &Case, bridge: Option<&mut UserBridge>, started: Instant) -> Result<(Fleet, Facts, f64)> {
    let boot = Arc::clone(&case.boot);
    let Opened { machines, choice, notes, device, driver, registers, kept_code } =
        machines::open(&case.machine, case.vms, boot, |text| tracing::warn!("{text}"))?;
    let open = started.elapsed().as_secs_f64();
    for note in notes.iter().chain((!choice.is_empty()).then_some(&choice)) {
        eprintln!("{}", note.trim_start());
    }
    let time = if bridge.is_some() { TimeMode::Real } else { TimeMode::Virtual };
    let config = FleetConfig {
        time,
        started,
        epoch: started,
        budget: Budget::CORE,
        bridged: bridge.is_some(),
        busy_poll: Duration::ZERO,
    };
    let fleet = Fleet::new(machines, config, None);
    let facts =
        Facts { backend: fleet.backend(), engine: fleet.engine(), device, driver, registers, kept_code };
    if let Some(bridge) = bridge {
        bridge.start(fleet.links()).into_diagnostic()?;
    }
    fleet.start().into_diagnostic()?;
    Ok((fleet, facts, open))
}

/// Keeps decoded code for the next start.
fn keep(fleet: &Fleet) {
    for line in fleet.keep() {
        tracing::warn!("{line}");
    }
}

fn bytes_per_vm(fleet: &Fleet) -> u64 {
    let memory = fleet.memory();
    (memory.shared_bytes + memory.private_bytes + memory.overhead_bytes) / u64::from(fleet.vms())
}

fn measure(args: &BenchArgs, case: &Case) -> Result<Run> {
    let started = Instant::now();
    let (fleet, facts, open) = open(case, None, started)?;
    let began = Duration::from_secs_f64(open);
    let mut seen = 0;
    while fleet.been_ready() < case.vms {
        seen = fleet.wait(seen, TICK);
        if let Some(why) = fleet.fault() {
            return Err(miette!("the machine failed: {why}"));
        }
        if fleet.downs() > 0 || (started.elapsed() - began).as_secs_f64() > args.timeout {
            return Err(lost(&fleet, started));
        }
    }
    let readies: Vec<_> = (0..case.vms).filter_map(|vm| fleet.status(vm).ready).collect();
    let last = readies.iter().map(|ready| ready.after).max();
    let ready = last.unwrap_or_default().saturating_sub(began).as_secs_f64();
    // Steps are counted at the ends of slices; those to READY are known exactly.
    let instructions: u64 = readies.iter().map(|ready| ready.instructions).sum();
    let bytes_per_vm = bytes_per_vm(&fleet);
    let steady_gips = if args.steady > 0.0 { Some(steady(args, &fleet)?) } else { None };
    fleet.stop();
    keep(&fleet);
    let gips = instructions as f64 / ready.max(1e-9) / 1e9;
    Ok(Run { open, ready, gips, instructions, steady_gips, bytes_per_vm, facts })
}

/// Billions of instructions a second with every shell busy.
fn steady(args: &BenchArgs, fleet: &Fleet) -> Result<f64> {
    for vm in 0..fleet.vms() {
        if fleet.type_all(vm, LOAD, Duration::from_secs(10)) < LOAD.len() {
            return Err(miette!("VM {vm} does not take what is typed"));
        }
    }
    std::thread::sleep(SETTLE);
    let (before, began) = (fleet.steps(), Instant::now());
    std::thread::sleep(Duration::from_secs_f64(args.steady));
    let (after, took) = (fleet.steps(), began.elapsed().as_secs_f64());
    match fleet.fault() {
        Some(why) => Err(miette!("the machine failed: {why}")),
        None if fleet.downs() > 0 => Err(lost(fleet, began)),
        None => Ok((after - before) as f64 / took / 1e9),
    }
}

/// A fleet that serves: from nothing to the last first answer, then under load.
fn serve(args: &BenchArgs, case: &Case) -> Result<Served> {
    let started = Instant::now();
    let mut bridge = http::bridge(case.vms)?;
    let (fleet, facts, _) = open(case, Some(&mut bridge), started)?;
    let first_answers = http::first_answers(&fleet, &bridge, started, args.timeout)?;
    let outcome = http::load(&bridge, args.http)?;
    let bytes_per_vm = bytes_per_vm(&fleet);
    if let Some(why) = fleet.fault() {
        return Err(miette!("the machine failed: {why}"));
    }
    bridge.stop().into_diagnostic()?;
    fleet.stop();
    keep(&fleet);
    if outcome.answered == 0 {
        let why = outcome.failures.keys().next().cloned().unwrap_or_else(|| "none was asked".into());
        return Err(miette!("no request was answered: {why}"));
    }
    Ok(Served { first_answers, outcome, bytes_per_vm, facts })
}

/// Instructions to READY of one VM, where no fleet was measured.
fn count_instructions(args: &BenchArgs) -> Result<u64> {
    let image = GuestImage::load(&args.image, args.ram.first().copied()).into_diagnostic()?;
    let machine = MachineArgs { backend: Backend::Cpu, ..args.machine.clone() };
    let case = Case { machine, boot: Arc::new(image.into()), vms: 1 };
    let only_boot = BenchArgs { steady: 0.0, ..args.clone() };
    measure(&only_boot, &case).map(|run| run.instructions)
}

/// Why not all VMs are ready.
fn lost(fleet: &Fleet, began: Instant) -> miette::Report {
    let mut text = format!(
        "{} VMs were ready after {:.1} s, and {} ended",
        fleet.been_ready(),
        began.elapsed().as_secs_f64(),
        fleet.downs()
    );
    let late = |vm: &u32| fleet.is_down(*vm) || fleet.status(*vm).ready.is_none();
    if let Some(vm) = (0..fleet.vms()).find(late) {
        let status = fleet.status(vm);
        text += &format!(
            "\nVM {vm} {}: {}; pc {:#010x}, last trap {:#x?}, {} instructions",
            status.state(),
            status.reason(),
            status.pc,
            status.last_trap,
            status.counters.instructions
        );
        for line in fleet.last_lines(vm) {
            text += &format!("\n  | {line}");
        }
    }
    miette!("{text}")
}
