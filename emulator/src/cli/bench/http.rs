//! Fleets that serve: how long until all answer, then how many requests a second, and how long one takes.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use emulator::fleet::Fleet;
use emulator::net::bridge::Bridge;
use emulator::net::load::{Load, Outcome};
use emulator::net::ports;
use emulator::net::probe::{Probe, Target};
use emulator::net::user::{Config, UserBridge};
use miette::{IntoDiagnostic, Result, miette};

use super::lost;

/// VMs asked at once for their first answer.
const FIRST_AT_ONCE: usize = 256;
/// Connections of the load, at most; and threads that make it.
const CONNECTIONS: usize = 256;
const THREADS: usize = 4;
/// For one answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// The bridge for a fleet, on ports that are free now.
pub fn bridge(vms: u32) -> Result<UserBridge> {
    let last = 65_536 - i64::from(vms);
    let mut why = None;
    for base in [4000, 20_000, 28_000, 10_000, 1024].into_iter().filter(|base| i64::from(*base) <= last) {
        match UserBridge::bind(Config::new(base, vms)) {
            Ok(bridge) => return Ok(bridge),
            Err(error) => why = Some(error),
        }
    }
    Err(why.map_or_else(|| miette!("there are no ports for {vms} VMs"), |why| miette!("no ports: {why}")))
}

/// Waits until every VM has answered GET / with 200; the seconds since `started`.
pub fn first_answers(fleet: &Fleet, bridge: &UserBridge, started: Instant, limit: f64) -> Result<f64> {
    let deadline = started + Duration::from_secs_f64(limit);
    let (reach, at_once) = (bridge.reach(), FIRST_AT_ONCE);
    let probe = Probe { reach, at_once, patience: PATIENCE, deadline: Some(deadline) };
    let target = |vm| match fleet.is_down(vm) {
        true => Target::Down,
        false if fleet.status(vm).ready.is_some() => Target::Ready,
        false => Target::NotReady,
    };
    let outcome = probe.run(target, &AtomicBool::new(false), |_, _| ()).into_diagnostic()?;
    if let Some(why) = fleet.fault() {
        return Err(miette!("the machine failed: {why}"));
    }
    match (outcome.failures.first(), outcome.last) {
        (None, Some(last)) => Ok((last - started).as_secs_f64()),
        (Some((vm, why)), _) if fleet.been_ready() == fleet.vms() => {
            Err(miette!("{} of {} VMs answered; VM {vm}: {why}", outcome.answered, fleet.vms()))
        }
        _ => Err(lost(fleet, started)),
    }
}

/// Asks all VMs that have a port in turn for `seconds`, each connection again as soon as it was answered.
pub fn load(bridge: &UserBridge, seconds: f64) -> Result<Outcome> {
    let reach = bridge.reach();
    // All that have a port: beyond the limit of open files they have none.
    let targets: Vec<_> = (0..reach.vms())
        .filter_map(|vm| reach.port_of(vm))
        .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        .collect();
    let connections = (targets.len() * 4).min(CONNECTIONS);
    let connections =
        ports::allow_files(0, connections).into_diagnostic()?.connections.clamp(1, connections.max(1));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let load = Load {
        targets,
        connections,
        keep_alive: false,
        rate: None,
        span: Duration::from_secs_f64(seconds),
        patience: PATIENCE,
    };
    load.run_on(THREADS.min(cores.div_ceil(4))).into_diagnostic()
}
