//! `emulator load`: asks a running fleet's VMs for their page, and prints how fast they answer.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use emulator::net::address::ip_of;
use emulator::net::load::{Load, Outcome};
use emulator::net::ports;
use emulator::net::rewrite::Ports;
use miette::{IntoDiagnostic, Result};
use serde::Serialize;

use super::LoadArgs;

#[derive(Serialize)]
struct Document {
    vms: u32,
    connections: usize,
    threads: usize,
    keep_alive: bool,
    rate: Option<f64>,
    #[serde(flatten)]
    outcome: Outcome,
}

/// `emulator load`.
pub fn run(args: &LoadArgs) -> Result<ExitCode> {
    let ports = Ports { base: args.port_base, vms: args.vms, guest: 80 };
    ports::check(&ports).into_diagnostic()?;
    let mut targets = Vec::with_capacity(args.vms as usize);
    for vm in 0..args.vms {
        targets.push(match args.direct {
            true => SocketAddr::from((ip_of(vm).into_diagnostic()?, ports.guest)),
            false => SocketAddr::from((Ipv4Addr::LOCALHOST, ports.port_of(vm).unwrap_or(ports.base))),
        });
    }
    ports::allow_files(0, args.connections).into_diagnostic()?;
    let threads = args.threads.min(args.connections).max(1);
    let load = Load {
        targets,
        connections: args.connections,
        keep_alive: args.keep_alive,
        rate: args.rate,
        span: Duration::from_secs_f64(args.seconds),
        patience: Duration::from_secs(20),
    };
    let outcome = load.run_on(threads).into_diagnostic()?;
    let document = Document {
        vms: args.vms,
        connections: args.connections,
        threads,
        keep_alive: args.keep_alive,
        rate: args.rate,
        outcome,
    };
    println!("{}", serde_json::to_string_pretty(&document).into_diagnostic()?);
    Ok(if document.outcome.answered > 0 && document.outcome.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
