//! `emulator console`, `status`, `pause`, `resume` and `reset`.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use emulator::console::client::{self, Ended};
use miette::{IntoDiagnostic, Result, WrapErr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{find_place, seconds};

/// Which fleet is meant.
#[derive(Debug, Args)]
pub struct FleetChoice {
    /// The fleet's first port.
    #[arg(long, value_name = "BASE", default_value_t = 4000)]
    pub port_base: u16,

    /// The fleet's --state-dir, if it was given one.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `emulator console`.
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// Number of the VM.
    #[arg(value_name = "N")]
    pub vm: u32,

    /// Which fleet.
    #[command(flatten)]
    pub fleet: FleetChoice,

    /// With input from a pipe: leave when nothing was printed for so many seconds after the input's end.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub linger: f64,
}

/// `emulator status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Only the counters of VM N's network link, as `ethtool -S` shows them.
    #[arg(value_name = "N")]
    pub vm: Option<u32>,

    /// Which fleet.
    #[command(flatten)]
    pub fleet: FleetChoice,
}

/// `emulator pause`, `resume` and `reset`.
#[derive(Debug, Args)]
pub struct ActArgs {
    /// Numbers and ranges, as in 0-9,20, or all.
    #[arg(value_name = "VMS")]
    pub vms: String,

    /// Which fleet.
    #[command(flatten)]
    pub fleet: FleetChoice,
}

/// `emulator status`.
pub fn status(args: &StatusArgs) -> Result<ExitCode> {
    let place = find_place(args.fleet.state_dir.as_ref(), args.fleet.port_base);
    let text = client::status(&place, args.vm).into_diagnostic()?;
    std::io::stdout().write_all(text.as_bytes()).into_diagnostic()?;
    Ok(ExitCode::SUCCESS)
}

/// `emulator pause`, `resume` and `reset`.
pub fn act(args: &ActArgs, action: &str) -> Result<ExitCode> {
    let place = find_place(args.fleet.state_dir.as_ref(), args.fleet.port_base);
    client::act(&place, &args.vms, action).into_diagnostic()?;
    Ok(ExitCode::SUCCESS)
}

/// `emulator console`.
pub fn console(args: &ConsoleArgs) -> Result<ExitCode> {
    let place = find_place(args.fleet.state_dir.as_ref(), args.fleet.port_base);
    let attachment = client::attach(&place, args.vm).into_diagnostic()?;
    // Signals end the attachment through this pipe, so that the terminal is restored. Ctrl-C itself goes to the VM.
    let (signal, sender) = UnixStream::pair().into_diagnostic()?;
    for number in [SIGHUP, SIGINT, SIGTERM] {
        let sender = sender.try_clone().into_diagnostic()?;
        signal_hook::low_level::pipe::register(number, sender).into_diagnostic()?;
    }
    let input: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned().into_diagnostic()?;
    let terminal = std::io::IsTerminal::is_terminal(&input);
    if terminal {
        eprintln!("[VM {}: Ctrl-] leaves]", args.vm);
    }
    let linger = Duration::from_secs_f64(args.linger);
    let ended = attachment.run(&input, &mut std::io::stdout(), signal.as_fd(), linger);
    if terminal {
        // The VM's line may be unfinished.
        eprintln!();
    }
    match ended.into_diagnostic().wrap_err_with(|| format!("console of VM {}", args.vm))? {
        Ended::Left => Ok(ExitCode::SUCCESS),
        Ended::Signal => Ok(ExitCode::from(130)),
        Ended::Closed => {
            eprintln!("[VM {}: the console has ended]", args.vm);
            Ok(ExitCode::SUCCESS)
        }
    }
}
