//! The command line of Linux on GPU: parse, dispatch, report. One file per subcommand.

mod bench;
mod doctor;
mod emulator;
mod flags;
mod image;
mod repo;
mod run;
mod test;
mod tools;
mod xterm;

use std::process::ExitCode;

use clap::Parser;

use flags::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    report_style();
    let result = match cli.command {
        Command::Image(args) => image::command(&args),
        Command::Run(args) => run::command(&args),
        Command::Console(args) => run::emulator_s("console", args),
        Command::Status(args) => run::emulator_s("status", args),
        Command::Load(args) => run::emulator_s("load", args),
        Command::Pause(args) => run::emulator_s("pause", args),
        Command::Resume(args) => run::emulator_s("resume", args),
        Command::Reset(args) => run::emulator_s("reset", args),
        Command::Doctor(args) => doctor::command(&args),
        Command::Bench(args) => bench::command(&args),
        Command::Test(args) => test::command(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(report) => {
            eprintln!("{report:?}");
            ExitCode::FAILURE
        }
    }
}

/// Errors are drawn as wide as the terminal; in a file or a pipe, a sentence stays on one line.
fn report_style() {
    use std::io::IsTerminal;
    let terminal = std::io::stderr().is_terminal();
    let hook = miette::set_hook(Box::new(move |_| {
        let options = miette::MietteHandlerOpts::new().context_lines(1).terminal_links(false);
        let options = if terminal { options } else { options.width(4096).unicode(false) };
        Box::new(options.build())
    }));
    // A hook that is there already draws errors too.
    drop(hook);
}
