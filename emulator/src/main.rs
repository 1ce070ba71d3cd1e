//! `emulator`: runs a fleet, attaches to consoles, tells its status. `cargo xtask` starts it with an image.

mod cli;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

fn main() -> ExitCode {
    // All times of a run count from here.
    let started = Instant::now();
    let cli = cli::Cli::parse();
    report_style();
    tracing_subscriber::fmt()
        .with_writer(cli::live::Messages)
        .with_ansi(std::io::stderr().is_terminal())
        .without_time()
        .with_target(false)
        .init();
    let result = match &cli.command {
        cli::Command::Fleet(args) => cli::fleet::run(args, started),
        cli::Command::Bench(args) => cli::bench::run(args),
        cli::Command::Lockstep(args) => cli::lockstep::run(args),
        cli::Command::Gpus(args) => cli::gpus::run(args),
        cli::Command::Load(args) => cli::load::run(args),
        #[cfg(unix)]
        cli::Command::Console(args) => cli::console::console(args),
        #[cfg(unix)]
        cli::Command::Status(args) => cli::console::status(args),
        #[cfg(unix)]
        cli::Command::Pause(args) => cli::console::act(args, "pause"),
        #[cfg(unix)]
        cli::Command::Resume(args) => cli::console::act(args, "resume"),
        #[cfg(unix)]
        cli::Command::Reset(args) => cli::console::act(args, "reset"),
    };
    match result {
        Ok(code) => code,
        Err(report) => {
            eprintln!("{report:?}");
            ExitCode::FAILURE
        }
    }
}

/// Errors are drawn as wide as the terminal; in a file or a pipe, a sentence stays on one line.
fn report_style() {
    let terminal = std::io::stderr().is_terminal();
    let hook = miette::set_hook(Box::new(move |_| {
        let options = miette::MietteHandlerOpts::new().terminal_links(false);
        let options = if terminal { options } else { options.width(4096).unicode(false) };
        Box::new(options.build())
    }));
    // Fails only if a hook is there already, which would draw errors too.
    drop(hook);
}
