//! `emulator bench`: boots fleets of several sizes and measures. docs/performance.md has results.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use emulator::fleet::clock::TimeMode;
use emulator::fleet::{Budget, Fleet, FleetConfig};
use emulator::guest::GuestImage;
use emulator::memory::BootMemory;
use miette::{IntoDiagnostic, Result, WrapErr, miette};
use serde::Serialize;
use std::process::ExitCode;

use super::BenchArgs;
use super::machines::{self, Opened};

/// What keeps a guest busy: its shell, and the kernel with it.
const LOAD: &[u8] = b"while :; do echo x > /dev/null; done\n";
/// After typing it, until it is measured.
const SETTLE: Duration = Duration::from_millis(500);
/// How often a boot is looked at.
const TICK: Duration = Duration::from_millis(20);

/// The JSON document.
#[derive(Serialize)]
struct Document {
    device: String,
    driver: Option<String>,
    commit: Option<String>,
    image: String,
    rows: Vec<Row>,
}

/// One phase of one size: medians over the runs.
#[derive(Clone, Serialize)]
struct Row {
    backend: &'static str,
    engine: String,
    registers: Option<u32>,
    /// Whether all runs began with decoded code of an earlier start; null where there is none to keep.
    kept_code: Option<bool>,
    phase: &'static str,
    vms: u32,
    ram_bytes: u64,
    runs: u32,
    mips_per_vm: f64,
    gips_total: f64,
    /// From the first launch to the last READY.
    seconds_to_ready: Option<f64>,
    /// From nothing to machines that can run.
    seconds_to_open: Option<f64>,
    bytes_per_vm: u64,
    /// Least and most of `gips_total`.
    spread: [f64; 2],
}

/// What one run of one size gave.
struct Run {
    backend: &'static str,
    engine: String,
    open: f64,
    ready: f64,
    boot_gips: f64,
    steady_gips: Option<f64>,
    bytes_per_vm: u64,
    device: String,
    driver: Option<String>,
    registers: Option<u32>,
    kept_code: Option<bool>,
}

/// `emulator bench`.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    let image = GuestImage::load(&args.image, args.ram).into_diagnostic()?;
    let hash = image.manifest_hash.clone();
    let boot = machines::boot(image);
    let mut document = Document {
        device: String::new(),
        driver: None,
        commit: args.commit.clone(),
        image: hash,
        rows: vec![],
    };
    println!("   VMs  phase   engine      s to open  s to READY     GIPS  MIPS/VM  KiB/VM");
    for &vms in &args.vms {
        let mut runs = Vec::new();
        for _ in 0..args.runs {
            let run = measure(args, vms, &boot).wrap_err_with(|| format!("{vms} VMs"))?;
            document.device.clone_from(&run.device);
            document.driver.clone_from(&run.driver);
            runs.push(run);
        }
        for row in rows(args, vms, boot.ram_bytes, &runs) {
            println!("{}", line(&row));
            document.rows.push(row);
        }
        if let Some(path) = &args.json {
            // After each size: a later one that fails does not take the earlier ones along.
            write(path, &document)
                .into_diagnostic()
                .wrap_err_with(|| format!("--json {}", path.display()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(args: &BenchArgs, vms: u32, boot: &Arc<BootMemory>) -> Result<Run> {
    let started = Instant::now();
    let Opened { machines, choice, notes, device, driver, registers, kept_code } =
        machines::open(&args.machine, vms, Arc::clone(boot), |text| tracing::warn!("{text}"))?;
    let open = started.elapsed().as_secs_f64();
    for note in notes.iter().chain((!choice.is_empty()).then_some(&choice)) {
        eprintln!("{}", note.trim_start());
    }
    let config = FleetConfig {
        time: TimeMode::Virtual,
        started,
        epoch: started,
        budget: Budget::CORE,
        bridged: false,
    };
    let fleet = Fleet::new(machines, config, None);
    let began = Instant::now();
    fleet.start().into_diagnostic()?;
    let mut seen = 0;
    while fleet.been_ready() < vms {
        seen = fleet.wait(seen, TICK);
        if let Some(why) = fleet.fault() {
            return Err(miette!("the machine failed: {why}"));
        }
        if fleet.downs() > 0 || began.elapsed().as_secs_f64() > args.timeout {
            return Err(lost(&fleet, began));
        }
    }
    let totals = fleet.totals();
    let last = (0..vms).filter_map(|vm| fleet.status(vm).ready).map(|ready| ready.after).max();
    let ready = last.unwrap_or_default().saturating_sub(began.duration_since(started)).as_secs_f64();
    // Steps are counted at the ends of slices; those to READY are known exactly.
    let instructions: u64 =
        (0..vms).filter_map(|vm| fleet.status(vm).ready).map(|ready| ready.instructions).sum();
    let memory = totals.memory;
    let bytes = memory.shared_bytes + memory.private_bytes + memory.overhead_bytes;
    let steady_gips = if args.steady > 0.0 { Some(steady(args, &fleet)?) } else { None };
    let (backend, engine) = (fleet.backend(), fleet.engine());
    fleet.stop();
    for line in fleet.keep() {
        tracing::warn!("{line}");
    }
    Ok(Run {
        backend,
        engine,
        open,
        ready,
        boot_gips: instructions as f64 / ready.max(1e-9) / 1e9,
        steady_gips,
        bytes_per_vm: bytes / u64::from(vms),
        device,
        driver,
        registers,
        kept_code,
    })
}

/// Billions of instructions a second with every shell busy.
fn steady(args: &BenchArgs, fleet: &Fleet) -> Result<f64> {
    for vm in 0..fleet.vms() {
        if fleet.type_all(vm, LOAD, Duration::from_secs(10)) < LOAD.len() {
            return Err(miette!("VM {vm} does not take what is typed"));
        }
    }
    std::thread::sleep(SETTLE);
    let (before, began) = (fleet.totals().steps, Instant::now());
    std::thread::sleep(Duration::from_secs_f64(args.steady));
    let (after, took) = (fleet.totals().steps, began.elapsed().as_secs_f64());
    match fleet.fault() {
        Some(why) => Err(miette!("the machine failed: {why}")),
        None if fleet.downs() > 0 => Err(lost(fleet, began)),
        None => Ok((after - before) as f64 / took / 1e9),
    }
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

fn rows(args: &BenchArgs, vms: u32, ram_bytes: u64, runs: &[Run]) -> Vec<Row> {
    let Some(first) = runs.first() else { return vec![] };
    let row = |phase, gips: Vec<f64>| Row {
        backend: first.backend,
        engine: first.engine.clone(),
        registers: first.registers,
        kept_code: first.kept_code.map(|_| runs.iter().all(|run| run.kept_code == Some(true))),
        phase,
        vms,
        ram_bytes,
        runs: args.runs,
        gips_total: median(&gips),
        mips_per_vm: median(&gips) * 1000.0 / f64::from(vms),
        seconds_to_ready: None,
        seconds_to_open: None,
        bytes_per_vm: first.bytes_per_vm,
        spread: [
            gips.iter().copied().fold(f64::INFINITY, f64::min),
            gips.iter().copied().fold(0.0, f64::max),
        ],
    };
    let of = |get: fn(&Run) -> f64| runs.iter().map(get).collect::<Vec<f64>>();
    let boot = Row {
        seconds_to_ready: Some(median(&of(|run| run.ready))),
        seconds_to_open: Some(median(&of(|run| run.open))),
        ..row("boot", of(|run| run.boot_gips))
    };
    let steady: Vec<f64> = runs.iter().filter_map(|run| run.steady_gips).collect();
    std::iter::once(boot).chain((!steady.is_empty()).then(|| row("steady", steady))).collect()
}

/// The middle one, or the mean of the middle two.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

fn line(row: &Row) -> String {
    let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    let engine = format!("{} {}", row.backend, row.engine);
    format!(
        "{:6}  {:6}  {engine:10}  {:>9}  {:>10}  {:7.3}  {:7.3}  {:6}",
        row.vms,
        row.phase,
        seconds(row.seconds_to_open),
        seconds(row.seconds_to_ready),
        row.gips_total,
        row.mips_per_vm,
        row.bytes_per_vm / 1024,
    )
}

fn write(path: &std::path::Path, document: &Document) -> std::io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(std::path::Path::new(".")))?;
    // Plain numbers, strings and lists always have a JSON form.
    writeln!(file, "{}", serde_json::to_string_pretty(document).unwrap_or_default())?;
    #[cfg(unix)]
    file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 3.0]), 3.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
    }
}
