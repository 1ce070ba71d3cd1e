//! `emulator load`: asks a running fleet's VMs for their page, and prints how fast they answer.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use emulator::net::address::ip_of;
use emulator::net::load::{Load, Outcome};
use emulator::net::ports;
use emulator::net::rewrite::Ports;
use miette::{IntoDiagnostic, Result};
use serde::Serialize;

use super::seconds;

/// `emulator load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// The fleet's first port.
    #[arg(long, value_name = "BASE", default_value_t = 4000)]
    pub port_base: u16,

    /// VMs to ask, from VM 0 on.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..))]
    pub vms: u32,

    /// Connections at once.
    #[arg(long, value_name = "K", default_value_t = 64)]
    pub connections: usize,

    /// Threads that share them.
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub threads: usize,

    /// For how long to ask.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub seconds: f64,

    /// Requests a second [default: each connection asks again as soon as it was answered].
    #[arg(long, value_name = "K", value_parser = rate)]
    pub rate: Option<f64>,

    /// Ask again on the same connection instead of a new one.
    #[arg(long)]
    pub keep_alive: bool,

    /// Ask the VMs at their own addresses; needs --net tun.
    #[arg(long)]
    pub direct: bool,
}

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
    let text = serde_json::to_string_pretty(&document).into_diagnostic()?;
    writeln!(std::io::stdout(), "{text}").into_diagnostic()?;
    Ok(if document.outcome.answered > 0 && document.outcome.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.001..=1e7).contains(&rate) => Ok(rate),
        _ => Err("expected a number of requests a second".into()),
    }
}
