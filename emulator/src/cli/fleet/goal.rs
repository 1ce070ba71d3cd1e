//! When a run is over: its goal reached, or out of reach, and what is said of VMs that ended.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use emulator::console::log::log_path;
use emulator::console::place::Claim;
use emulator::fleet::{Fleet, Life};
use emulator::net::bridge::Bridge;
use emulator::report::Failure;
use miette::miette;

use super::super::live::Live;
use super::super::progress::Progress;
use super::super::{FleetArgs, Until, find_place, profile};
use super::say;

/// How often signals and times are looked at when the fleet tells no news.
const TICK: Duration = Duration::from_millis(100);
/// VMs that an error describes with their consoles; so many more are named while serving.
const SHOWN: usize = 3;
const NAMED: u32 = 20;

/// How a run ended.
pub enum End {
    /// What was waited for has come, or all VMs have ended by themselves.
    Done,
    /// By that signal.
    Interrupted(i32),
    /// The bridge has ended by itself.
    Unbridged,
    /// It can't reach its goal any more.
    Failed(miette::Report),
}

/// Waits until the run is over, and shows meanwhile how it goes. The thread, if there is one, keeps decoded code.
pub fn wait(
    args: &FleetArgs,
    progress: &Progress,
    claim: &Claim,
    bridge: Option<&dyn Bridge>,
    signal: &AtomicI32,
) -> (End, Option<JoinHandle<()>>) {
    let fleet = &progress.fleet;
    let mut live = Live::new(args.quiet);
    let mut downs = Downs { known: vec![false; fleet.vms() as usize], known_down: 0, told: 0 };
    let (mut seen, mut keeper) = (0, None);
    let end = loop {
        seen = fleet.wait(seen, TICK);
        if progress.note_boot() {
            if args.profile_host {
                say(format_args!("\nAt READY: {}", profile::work(fleet)));
            }
            keeper = profile::keep_in_background(fleet);
        }
        if live.due() {
            live.show(fleet.totals(), progress.http.as_ref().map(|answers| answers.vms()));
        }
        // With --until the error tells.
        if args.until.is_none() && fleet.downs() != downs.known_down {
            downs.tell(fleet, claim);
        }
        match signal.load(SeqCst) {
            0 => {}
            signal => break End::Interrupted(signal),
        }
        if bridge.is_some_and(|bridge| bridge.has_failed()) {
            break End::Unbridged;
        }
        if let Some(why) = fleet.fault() {
            break End::Failed(miette!("the machine failed: {why}"));
        }
        if let Some(end) = check_goal(args, progress) {
            break end;
        }
    };
    if !args.quiet {
        live.show(fleet.totals(), progress.http.as_ref().map(|answers| answers.vms()));
    }
    live.finish();
    (end, keeper)
}

/// Whether what was waited for has come, or can't come any more.
fn check_goal(args: &FleetArgs, progress: &Progress) -> Option<End> {
    let fleet = &progress.fleet;
    let seconds = fleet.started().elapsed().as_secs_f64();
    let down = fleet.downs();
    let all_down = || {
        let failed = fleet.totals().failed;
        match failed {
            0 => End::Done,
            _ => End::Failed(failed_error(args, progress, format!("no VM runs any more; {failed} failed"))),
        }
    };
    let fail = |what: String| Some(End::Failed(failed_error(args, progress, what)));
    match args.until {
        None if down == fleet.vms() => Some(all_down()),
        None => None,
        Some(Until::Seconds(end)) => match seconds >= end || down == fleet.vms() {
            false => None,
            true if fleet.totals().failed > 0 => fail(format!("{} VMs failed", fleet.totals().failed)),
            true => Some(End::Done),
        },
        Some(Until::Ready) if down > 0 => fail(format!("{down} of {} VMs ended", fleet.vms())),
        Some(Until::Ready) if fleet.been_ready() == fleet.vms() => Some(End::Done),
        Some(Until::Ready) if seconds >= args.timeout => {
            fail(format!("{} of {} VMs were ready in {} s", fleet.been_ready(), fleet.vms(), args.timeout))
        }
        Some(Until::Ready) => None,
        Some(Until::Http) if down > 0 => fail(format!("{down} of {} VMs ended", fleet.vms())),
        Some(Until::Http) => match progress.http.as_ref()?.take_outcome()? {
            Ok(outcome) if outcome.failures.is_empty() => Some(End::Done),
            Ok(outcome) => {
                let (vm, why) = &outcome.failures[0];
                fail(format!(
                    "{} of {} VMs answered GET / with 200 in {seconds:.0} s; VM {vm}: {why}",
                    outcome.answered,
                    fleet.vms(),
                ))
            }
            Err(error) => fail(format!("the VMs could not be asked: {error}")),
        },
    }
}

/// VMs that kept the run from its goal: those that are down, else those that are not ready.
pub fn laggards(args: &FleetArgs, progress: &Progress) -> Vec<Failure> {
    let fleet = &progress.fleet;
    let any_down = fleet.downs() > 0;
    let late = |life: &Life| match args.until {
        _ if any_down => life.is_down(),
        Some(Until::Ready | Until::Http) => *life != Life::Ready,
        _ => false,
    };
    let statuses = (0..fleet.vms()).map(|vm| fleet.status(vm)).filter(|status| late(&status.life));
    statuses.take(64).map(|status| Failure::of(fleet, &status)).collect()
}

/// An error that shows the first VMs that failed, with their last console lines.
fn failed_error(args: &FleetArgs, progress: &Progress, what: String) -> miette::Report {
    let failures = laggards(args, progress);
    let mut text = what;
    if let Some(first) = failures.first() {
        // Writing to a string can't fail.
        let _ = write!(text, ", first VM {}: {}", first.vm, first.reason);
    }
    for failure in failures.iter().take(SHOWN) {
        let _ = write!(text, "\nVM {} ({}): {}", failure.vm, failure.state, failure.reason);
        for line in &failure.console {
            let _ = write!(text, "\n  | {line}");
        }
    }
    if failures.len() > SHOWN {
        let _ = write!(text, "\nand {} more", failures.len() - SHOWN);
    }
    let logs = find_place(args.state_dir.as_ref(), args.port_base).console();
    miette!(help = format!("Whole consoles: {}", logs.display()), "{text}")
}

/// Tells which VMs have ended while the others go on.
struct Downs {
    known: Vec<bool>,
    /// Those of them that are true. A reset takes a VM from this list.
    known_down: u32,
    told: u32,
}

impl Downs {
    fn tell(&mut self, fleet: &Fleet, claim: &Claim) {
        for vm in 0..fleet.vms() {
            let down = fleet.is_down(vm);
            match (std::mem::replace(&mut self.known[vm as usize], down), down) {
                (true, true) | (false, false) => continue,
                (true, false) => {
                    self.known_down -= 1;
                    continue;
                }
                (false, true) => self.known_down += 1,
            }
            self.told += 1;
            let status = fleet.status(vm);
            match self.told {
                n if n < NAMED => {
                    let log = log_path(&claim.place.console(), vm);
                    tracing::warn!("VM {vm} {}: {} ({})", status.state(), status.reason(), log.display());
                }
                NAMED => tracing::warn!("VM {vm} {}, and perhaps more: see the status", status.state()),
                _ => {}
            }
        }
    }
}
