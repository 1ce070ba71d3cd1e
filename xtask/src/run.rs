//! `cargo xtask run`, `console` and `status`: an image, the emulator, and what the user said.

use std::ffi::OsString;

use crate::emulator::{self, Show};
use crate::flags::{ConsoleArgs, FleetChoice, RunArgs, StatusArgs};
use crate::image::profile::{Net, Time};
use crate::image::{self, Options};
use crate::repo;

/// `cargo xtask run`: builds what is missing, then becomes the emulator.
pub fn command(args: &RunArgs) -> miette::Result<()> {
    let root = repo::root()?;
    let (folder, manifest) = match &args.image {
        Some(dir) => image::given(dir)?,
        None => {
            // An image that is there is good, whoever built it.
            let options = Options { keep: true, ..Options::from(&args.choice) };
            let image = image::ensure(&root, &args.choice.profile, &options)?;
            (image.dir, image.manifest)
        }
    };
    let show = if args.choice.quiet { Show::Errors } else { Show::Progress };
    let emulator = emulator::build(&root, show)?;
    let defaults = &manifest.defaults;
    let mut words: Vec<OsString> = vec!["fleet".into(), "--image".into(), folder.into()];
    let mut give = |flag: &str, value: &dyn std::fmt::Display| {
        words.push(format!("--{flag}").into());
        words.push(value.to_string().into());
    };
    give("vms", &args.vms.unwrap_or(defaults.vms));
    give("backend", &args.backend);
    let net = match defaults.net {
        Net::User => "user",
        Net::Off => "off",
    };
    give("net", &args.net.as_deref().unwrap_or(net));
    let time = match defaults.time {
        Time::Real => "real",
        Time::Virtual => "virtual",
    };
    give("time", &args.time.as_deref().unwrap_or(time));
    give("port-base", &args.port_base);
    give("timeout", &args.timeout);
    if let Some(threads) = args.threads {
        give("threads", &threads);
    }
    if let Some(until) = &args.until {
        give("until", until);
    }
    if let Some(seed) = args.seed {
        give("seed", &seed);
    }
    for (flag, path) in [("--report", &args.report), ("--state-dir", &args.state_dir)] {
        if let Some(path) = path {
            words.extend([flag.into(), path.into()]);
        }
    }
    if args.choice.quiet {
        words.push("--quiet".into());
    }
    Err(emulator::become_it(emulator, words).into())
}

/// `cargo xtask console N`.
pub fn console(args: &ConsoleArgs) -> miette::Result<()> {
    attach(vec!["console".into(), args.vm.to_string().into()], &args.fleet)
}

/// `cargo xtask status`.
pub fn status(args: &StatusArgs) -> miette::Result<()> {
    attach(vec!["status".into()], &args.fleet)
}

fn attach(mut words: Vec<OsString>, fleet: &FleetChoice) -> miette::Result<()> {
    let emulator = emulator::build(&repo::root()?, Show::Errors)?;
    words.extend(["--port-base".into(), fleet.port_base.to_string().into()]);
    if let Some(path) = &fleet.state_dir {
        words.extend(["--state-dir".into(), path.into()]);
    }
    Err(emulator::become_it(emulator, words).into())
}
