//! `emulator lockstep`: the same boot on the CPU and on another back end, compared bit for bit on the way.
//!
//! Both run in virtual time with the same randomness, so nothing may differ but where the decoded code is kept. The
//! GPU's slices are of an odd length: where they end must not matter.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use emulator::abi::{EXIT_BUDGET, EXIT_DRAIN, FRAME_BYTES, SliceRequest, SliceResult, TIME_VIRTUAL, Vm};
use emulator::backend::cpu::{self, CpuMachines};
use emulator::backend::cuda::{self, CudaMachines};
use emulator::backend::{Engine, Machines, Slice};
use emulator::guest::GuestImage;
use emulator::memory::BootMemory;
use miette::{IntoDiagnostic, Result, WrapErr, miette};

use super::LockstepArgs;
use super::machines::{self, compiler_environments};

/// Steps of a slice on the GPU.
const GPU_SLICE: u64 = 65_537;
/// Guests' clocks start here: 2026-01-01.
const EPOCH_NS: u64 = 1_767_225_600 * 1_000_000_000;

/// One side: its engines, and what the VMs have printed.
struct Side<'a> {
    name: &'static str,
    machines: &'a dyn Machines,
    engine: Box<dyn Engine>,
    slice: u64,
    steps: Vec<u64>,
    console: Vec<Vec<u8>>,
}

impl<'a> Side<'a> {
    fn new(name: &'static str, machines: &'a dyn Machines, slice: u64) -> Result<Self> {
        let vms = machines.vms() as usize;
        let engine = machines.engines().into_diagnostic()?.into_iter().next();
        let engine = engine.ok_or_else(|| miette!("the {name} has no engine"))?;
        Ok(Self { name, machines, engine, slice, steps: vec![0; vms], console: vec![vec![]; vms] })
    }

    /// Runs all VMs until each has taken `until` steps.
    fn run(&mut self, until: u64) -> Result<()> {
        let (mut list, mut results) = (Vec::new(), Vec::<SliceResult>::new());
        loop {
            list.clear();
            let waiting = self.steps.iter().zip(0..).filter(|(steps, _)| **steps < until);
            list.extend(waiting.map(|(steps, vm)| {
                let budget = self.slice.min(until - steps);
                Slice {
                    vm,
                    request: SliceRequest { budget, now_ticks: 0, time_mode: TIME_VIRTUAL, reserved: 0 },
                }
            }));
            if list.is_empty() {
                return Ok(());
            }
            for part in list.chunks(self.engine.batch().max(1)) {
                results.clear();
                self.engine.run(part, &mut results).into_diagnostic()?;
                for (slice, result) in part.iter().zip(&results) {
                    let vm = slice.vm as usize;
                    self.steps[vm] += result.steps;
                    let mailbox = self.machines.mailbox(slice.vm);
                    mailbox.drain_console(&mut self.console[vm]);
                    while mailbox.take_frame(&mut [0; 1514]).is_some() {}
                    if !matches!(result.exit, EXIT_BUDGET | EXIT_DRAIN) {
                        let text = String::from_utf8_lossy(&self.console[vm]);
                        return Err(miette!(
                            "VM {vm} ended on the {} after {} steps (exit {}); its console:\n{text}",
                            self.name,
                            self.steps[vm],
                            result.exit
                        ));
                    }
                }
            }
        }
    }
}

/// All of a VM that both sides must agree on, a line each.
fn state(vm: &Vm) -> String {
    let h = &vm.hart;
    let mut out = String::new();
    // Writing to a string can't fail.
    let _ = writeln!(out, "pc {:#010x}", h.pc);
    for (i, x) in h.x[..32].iter().enumerate() {
        let _ = writeln!(out, "x{i} {x:#010x}");
    }
    let mut hart = *h;
    (hart.x, hart.pc) = ([0; 33], 0);
    let _ = writeln!(out, "{hart:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}", vm.plic, vm.uart, vm.net, vm.rtc);
    out
}

/// `emulator lockstep`.
pub fn run(args: &LockstepArgs) -> Result<ExitCode> {
    let image = GuestImage::load(&args.image, args.ram).into_diagnostic()?;
    let boot = machines::boot(image);
    let seed = Some(args.seed);
    let reference = CpuMachines::new(cpu::Config {
        boot: Arc::clone(&boot),
        vms: args.vms,
        threads: 1,
        private_frames: None,
        epoch_ns: EPOCH_NS,
        seed,
    })
    .into_diagnostic()?;
    let other = CudaMachines::new(cuda::Config {
        boot: Arc::clone(&boot),
        vms: args.vms,
        gpus: args.gpus.clone(),
        private_frames: None,
        epoch_ns: EPOCH_NS,
        seed,
        engine: args.engine,
        engines: Some(1),
        target: None,
        registers: args.gpu_registers,
        warps_per_block: None,
        keep_code: !args.no_code_cache,
        compilers: compiler_environments(),
    })
    .into_diagnostic()?;
    for line in other.describe() {
        println!("{line}");
    }
    let mut cpu = Side::new("CPU", &reference, args.every)?;
    let mut gpu = Side::new("GPU", &other, GPU_SLICE)?;
    let mut compared = 0u64;
    let mut until = 0;
    while until < args.steps {
        until = args.steps.min(until + args.every);
        cpu.run(until)?;
        gpu.run(until)?;
        for vm in 0..args.vms {
            compare(args, until, vm, &boot, &reference, &other, (&cpu, &gpu))?;
            compared += 1;
        }
        println!("{} VMs are the same after {until} steps", args.vms);
    }
    for line in other.keep() {
        tracing::warn!("{line}");
    }
    let ready = cpu.console.iter().filter(|text| text.windows(5).any(|word| word == b"READY")).count();
    println!(
        "{compared} states compared, hart, devices and RAM: no difference; {ready} of {} VMs READY",
        args.vms
    );
    Ok(ExitCode::SUCCESS)
}

#[allow(clippy::too_many_arguments, reason = "both sides, and where to write what differs")]
fn compare(
    args: &LockstepArgs,
    until: u64,
    vm: u32,
    boot: &BootMemory,
    reference: &CpuMachines,
    other: &CudaMachines,
    (cpu, gpu): (&Side, &Side),
) -> Result<()> {
    // SAFETY: the engines are idle, and the reference ends here.
    let expected = unsafe { state(reference.vm(vm)) };
    let found = state(&other.vm(vm).into_diagnostic()?);
    let mut ram = vec![0; boot.ram_bytes as usize];
    reference.read_ram(vm, 0, &mut ram);
    let other_ram = other.ram(vm).into_diagnostic()?;
    let index = vm as usize;
    let same = expected == found && ram == other_ram && cpu.console[index] == gpu.console[index];
    if same {
        return Ok(());
    }
    let page = FRAME_BYTES as usize;
    let pages: Vec<usize> =
        (0..ram.len() / page).filter(|p| ram[p * page..][..page] != other_ram[p * page..][..page]).collect();
    let write = |name: &str, bytes: &[u8]| write_file(&args.mismatch, name, bytes);
    fs::create_dir_all(&args.mismatch)
        .into_diagnostic()
        .wrap_err_with(|| format!("{}: cannot be made", args.mismatch.display()))?;
    write("cpu.txt", expected.as_bytes())?;
    write("gpu.txt", found.as_bytes())?;
    write("cpu.ram", &ram)?;
    write("gpu.ram", &other_ram)?;
    write("cpu.console", &cpu.console[index])?;
    write("gpu.console", &gpu.console[index])?;
    let every = args.every;
    let command = format!(
        "emulator lockstep --image {} --vms {} --seed {} --steps {until} --every {}\n",
        args.image.display(),
        args.vms,
        args.seed,
        (every / 10).max(1)
    );
    write("command", command.as_bytes())?;
    let line = expected.lines().zip(found.lines()).find(|(a, b)| a != b);
    Err(miette!(
        help = "`command` in that folder finds where it began, in steps ten times as fine",
        "VM {vm} differs after {until} steps: {}; pages of RAM that differ: {:?}; both states are in {}",
        line.map_or("its registers agree".into(), |(a, b)| format!("CPU {a}, GPU {b}")),
        &pages[..pages.len().min(8)],
        args.mismatch.display()
    ))
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, bytes)
        .into_diagnostic()
        .wrap_err_with(|| format!("{}: cannot be written", path.display()))
}
