//! `emulator fleet`: boots a fleet, serves it, and reports.

mod args;
mod goal;
mod signals;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::time::{Duration, Instant};

use emulator::backend::Machines;
use emulator::console::log::{LogLimits, Logs};
use emulator::console::place::Claim;
use emulator::fleet::capacity::size;
use emulator::fleet::clock::TimeMode;
use emulator::fleet::{Budget, Fleet, FleetConfig};
use emulator::guest::GuestImage;
use emulator::memory::BootMemory;
use emulator::net::bridge::Bridge;
use emulator::net::ports;
use emulator::net::reach::Reach;
use emulator::net::rewrite::Ports;
#[cfg(target_os = "linux")]
use emulator::net::tun::TunBridge;
use emulator::net::user::{Config as UserConfig, UserBridge};
#[cfg(windows)]
use emulator::net::windivert::WinDivertBridge;
use emulator::report::Report;
use emulator::web::Network;
use miette::{IntoDiagnostic, Result, WrapErr, miette};

use super::MAX_VMS;
use super::machines::Opened;
use super::pcap::Pcap;
use super::profile::{self, Phases};
use super::progress::Progress;
use super::{find_place, machines, web};
pub use args::{FleetArgs, NetMode, Time, Until};
use goal::End;

/// URLs that are printed one by one.
const URLS: u32 = 8;
/// `--vms max` goes no further: the fleet's address space and the page are made for so many.
const MOST_VMS: u32 = 32_768;

/// `emulator fleet`.
pub fn run(args: &FleetArgs, started: Instant) -> Result<ExitCode> {
    let signal = signals::watch()?;
    if let Some(path) = &args.report {
        check_report_path(path)?;
    }
    let args = &FleetArgs { vms: count(args)?, ..args.clone() };
    let mut report = Report::new(args.vms);
    let result = serve(args, started, &signal, &mut report);
    report.error = match &result {
        Err(error) => Some(chain(error)),
        Ok(code) if *code != ExitCode::SUCCESS => Some("interrupted".into()),
        Ok(_) => None,
    };
    if let Some(path) = &args.report {
        let written = report.write(path).into_diagnostic();
        let written = written.wrap_err_with(|| format!("the report {} can't be written", path.display()));
        // The first error is the one to tell.
        return result.and_then(|code| written.map(|()| code));
    }
    result
}

/// The number of VMs, `max` worked out: what memory allows, and ports.
fn count(args: &FleetArgs) -> Result<u32> {
    if args.vms != MAX_VMS {
        return Ok(args.vms);
    }
    let image = GuestImage::load(&args.image, args.ram).into_diagnostic()?;
    let memory = machines::most_vms(&args.machine, &image.into())?;
    let ports = if args.net == NetMode::Off { u32::MAX } else { 65_536 - u32::from(args.port_base) };
    match memory.min(ports).min(MOST_VMS) {
        0 => Err(miette!("--vms max: not even one VM fits into the memory that is free")),
        most => Ok(most),
    }
}

/// Better now than after the run.
fn check_report_path(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(miette!("--report {}: this is a folder; give a file name", path.display()));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::NamedTempFile::new_in(folder)
        .map(drop)
        .into_diagnostic()
        .wrap_err_with(|| format!("--report {}: no file can be written there", path.display()))
}

/// An error with its causes on one line; consoles, which follow on further lines, have their own place in the report.
fn chain(error: &miette::Report) -> String {
    let causes: Vec<String> = error.chain().map(|cause| cause.to_string()).collect();
    causes.join(": ").lines().next().unwrap_or_default().to_owned()
}

fn serve(args: &FleetArgs, started: Instant, signal: &AtomicI32, report: &mut Report) -> Result<ExitCode> {
    if args.vms == 0 {
        return Err(miette!("a fleet of 0 VMs has nothing to run: give --vms 1 or more"));
    }
    if args.until == Some(Until::Http) && args.net == NetMode::Off {
        return Err(miette!(
            "--until http asks the VMs through the bridge: it needs --net user or --net tun"
        ));
    }
    let mut phases = Phases::new(started);
    phases.end("arguments");
    let image = GuestImage::load(&args.image, args.ram).into_diagnostic()?;
    phases.end("image");
    report.image.manifest_hash = Some(image.manifest_hash.clone());
    let facts = (u64::from(image.ram_bytes), image.manifest_hash.clone());
    let heading = format!("{} of RAM each, image {:.16}", size(image.ram_bytes.into()), image.manifest_hash);
    let claim = find_place(args.state_dir.as_ref(), args.port_base).claim().into_diagnostic()?;
    let ports = UserConfig::new(args.port_base, args.vms).ports;
    if args.net != NetMode::Off {
        ports::check(&ports).into_diagnostic()?;
    }
    // A page that can't be served is known before the machines are opened, too.
    let page = web::bind(args)?;
    let epoch = Instant::now();
    // Thousands of ports take as long as a GPU. If both fail, the machines are what matters.
    let (opened, bridge) = std::thread::scope(|scope| {
        let bridge = scope.spawn(|| bind(args, ports));
        let boot = Arc::new(BootMemory::from(image));
        let opened = machines::open(&args.machine, args.vms, boot, |text| tracing::warn!("{text}"));
        phases.end("machines");
        (opened, bridge.join())
    });
    let Opened { machines, choice, notes, .. } = opened?;
    let mut bridge = bridge.map_err(|_| miette!("the thread that takes the ports has crashed"))??;
    phases.end("ports");
    let pcap = match (&args.network.pcap, &bridge) {
        (Some(wanted), Some(bridge)) => Some(Pcap::start(wanted, args.vms, &bridge.watch().tap)?),
        (Some(_), None) => return Err(miette!("--pcap: with --net off there are no packets")),
        (None, _) => None,
    };
    let fleet = Arc::new(make_fleet(args, [started, epoch], &claim, machines)?);
    phases.end("fleet, logs");
    let progress = Arc::new(Progress {
        fleet: fleet.clone(),
        head: report.clone(),
        began: Instant::now(),
        bridge: bridge.as_ref().map(|bridge| bridge.watch().counters.clone()),
        http: (args.until == Some(Until::Http)).then(Arc::default),
        boot: None.into(),
        reach: bridge.as_ref().map(|bridge| bridge.reach()),
    });
    if let Some(bridge) = &mut bridge {
        bridge.start(fleet.links()).into_diagnostic()?;
    }
    let net = bridge.as_ref().map(|bridge| Network { reach: bridge.reach(), watch: bridge.watch().clone() });
    let server = web::serve(page, &claim, &progress, net, facts)?;
    phases.end("bridge, page");
    fleet.start().into_diagnostic()?;
    phases.end("engines");
    if args.profile_host {
        say(format_args!("{}", phases.text));
    }
    if !args.quiet {
        say(format_args!("{} VMs, {heading}, {}{choice}", args.vms, fleet.backend()));
        for note in notes {
            say(format_args!("{note}"));
        }
        if let Some(reach) = &progress.reach {
            print_urls(args, reach);
        }
        if let Some(url) = &server.url {
            say(format_args!("All VMs on one page: {url}"));
        }
        say(format_args!("Console logs: {}", claim.place.console().display()));
    }
    let asking = match (&progress.http, &bridge) {
        (Some(answers), Some(bridge)) => {
            let deadline = started + Duration::from_secs_f64(args.timeout);
            Some(answers.ask(&fleet, bridge.reach(), deadline).into_diagnostic()?)
        }
        _ => None,
    };

    let (end, keeper) = goal::wait(args, &progress, &claim, bridge.as_deref(), signal);

    progress.stop_asking();
    if let Some(asking) = asking {
        // A panic was printed; the outcome is missing then, which has been dealt with.
        let _ = asking.join();
    }
    if args.profile_host {
        say(format_args!("At the end: {}", profile::work(&fleet)));
    }
    let bridge_end = bridge.as_mut().map_or(Ok(()), |bridge| bridge.stop());
    if let Some(pcap) = pcap {
        pcap.finish();
    }
    fleet.stop();
    if let Some(keeper) = keeper {
        // As above.
        let _ = keeper.join();
    }
    profile::keep(&fleet);
    *report = progress.report();
    drop(server);
    match end {
        End::Failed(error) => {
            // VMs that run but did not reach the goal are failures too.
            for failure in goal::laggards(args, &progress) {
                report.add_failure(failure);
            }
            return Err(error);
        }
        End::Interrupted(signal) if args.until.is_some() => {
            return Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(130)));
        }
        End::Unbridged => {
            bridge_end.into_diagnostic().wrap_err("the network has failed")?;
            return Err(miette!("the network has failed"));
        }
        End::Interrupted(_) | End::Done => {}
    }
    bridge_end.into_diagnostic()?;
    if !args.quiet {
        say(format_args!("{}", summary(report)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes what the network needs of the host.
fn bind(args: &FleetArgs, ports: Ports) -> Result<Option<Box<dyn Bridge>>> {
    let policy = args.network.policy().map_err(|why| miette!("--service: {why}"))?;
    if let Some(vm) = policy.fault.and_then(|fault| fault.vm).filter(|vm| *vm >= args.vms) {
        return Err(miette!("--fault: there is no VM {vm}: the fleet has {}, numbered from 0", args.vms));
    }
    Ok(match args.net {
        NetMode::Off => None,
        NetMode::User => {
            let config = UserConfig::new(ports.base, ports.vms);
            Some(Box::new(UserBridge::bind_with(config, policy).into_diagnostic()?))
        }
        #[cfg(target_os = "linux")]
        NetMode::Tun => Some(Box::new(TunBridge::bind(ports, policy).into_diagnostic()?)),
        #[cfg(windows)]
        NetMode::Windivert => Some(Box::new(WinDivertBridge::bind(ports, policy).into_diagnostic()?)),
    })
}

fn make_fleet(
    args: &FleetArgs,
    [started, epoch]: [Instant; 2],
    claim: &Claim,
    machines: Arc<dyn Machines>,
) -> Result<Fleet> {
    let folder = claim.place.console();
    let logs = Logs::create(&folder, LogLimits::default())
        .into_diagnostic()
        .wrap_err_with(|| format!("console logs in {}", folder.display()))?;
    let time = match args.time {
        Time::Real => TimeMode::Real,
        Time::Virtual => TimeMode::Virtual,
    };
    let bridged = args.net != NetMode::Off;
    let busy_poll = args.network.busy_poll();
    let config = FleetConfig { time, started, epoch, budget: Budget::CORE, bridged, busy_poll };
    Ok(Fleet::new(machines, config, Some(logs)))
}

/// Prints a line. A reader that has gone is no reason to end the fleet.
fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn print_urls(args: &FleetArgs, reach: &Reach) {
    let (listening, vms) = (reach.listening(), reach.vms());
    let url = |vm: u32| format!("http://127.0.0.1:{}/", u32::from(args.port_base) + vm);
    #[cfg(target_os = "linux")]
    if args.net == NetMode::Tun {
        say(format_args!("VM n is also 10.77.0.0 + 2 + n: VM 0 is 10.77.0.2"));
    }
    if listening <= URLS {
        for vm in 0..listening {
            say(format_args!("VM {vm}: {}", url(vm)));
        }
    } else {
        let last = listening - 1;
        say(format_args!("VM 0: {}  VM 1: {} ... VM {last}: {}", url(0), url(1), url(last)));
    }
    if listening < vms {
        say(format_args!(
            "VMs {listening} to {} have no port of their own, the limit of open files (`ulimit -Hn`) is too low: the page \
             reaches them at /vm/N/",
            vms - 1
        ));
    }
}

/// One line about a run that reached its end.
fn summary(report: &Report) -> String {
    let mut text = format!("{} of {} VMs were ready", report.ready.vms, report.vms);
    let mut add = |part: std::fmt::Arguments<'_>| {
        // Writing to a string can't fail.
        let _ = text.write_fmt(part);
    };
    if let (Some(first), Some(last)) = (report.ready.seconds_first, report.ready.seconds_last) {
        add(format_args!(" after {first:.2} to {last:.2} s"));
    }
    if let Some(spread) = report.ready.instructions {
        add(format_args!(" and {:.2} M instructions", spread.median as f64 / 1e6));
    }
    if let Some(http) = &report.http {
        add(format_args!("; {} answered GET / with 200", http.vms));
        if let Some(last) = http.seconds_last {
            add(format_args!(", the last after {last:.2} s"));
        }
    }
    add(format_args!(
        "; {:.0} MIPS while booting; {} of memory a VM",
        report.mips.total,
        size(report.memory.bytes_per_vm)
    ));
    text
}
