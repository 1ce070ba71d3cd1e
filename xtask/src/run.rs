//! `cargo xtask run` (an image, the emulator, and what the user said), and the commands that are the emulator's own.

use std::ffi::OsString;

use crate::emulator::{self, Show};
use crate::flags::{EmulatorArgs, RunArgs};
use crate::image::fault::Fault;
use crate::image::profile::{Net, Time};
use crate::image::{self, Options};
use crate::repo;
use crate::xterm;

/// `cargo xtask run`: builds what is missing, then becomes the emulator.
pub fn command(args: &RunArgs) -> miette::Result<()> {
    let root = repo::root()?;
    let fault = args.network.fault.as_deref().map(str::parse::<Fault>).transpose()?;
    let fault_in_image = fault.and_then(|fault| fault.init);
    let (folder, manifest) = match &args.image {
        Some(_) if fault_in_image.is_some() => {
            return Err(miette::miette!(
                help = "Build such an image with `cargo xtask image --fault`, and run that.",
                "--fault arp and --fault route are faults of an image, and --image names one that is finished"
            ));
        }
        Some(dir) => image::given(dir)?,
        None => {
            // An image that is there is good, whoever built it.
            let options = Options { keep: true, fault: fault_in_image, ..Options::from(&args.choice) };
            let image = image::ensure(&root, &args.choice.profile, &options)?;
            (image.dir, image.manifest)
        }
    };
    let show = if args.choice.quiet { Show::Errors } else { Show::Progress };
    // A run that ends by itself serves no page unless it is told to.
    let ends = matches!(args.until.as_deref(), Some("ready" | "http"));
    if args.web.as_deref().map_or(!ends, |web| web != "off")
        && let Err(why) = xterm::ensure(&root, true, args.choice.quiet)
    {
        eprintln!("The page will have no terminal; the rest of it works. {why}");
    }
    let emulator = emulator::build(&root, show)?;
    let defaults = &manifest.defaults;
    let mut words: Vec<OsString> = vec!["fleet".into(), "--image".into(), folder.into()];
    let mut give = |flag: &str, value: &dyn std::fmt::Display| {
        words.push(format!("--{flag}").into());
        words.push(value.to_string().into());
    };
    match &args.vms {
        Some(vms) => give("vms", vms),
        None => give("vms", &defaults.vms),
    }
    give("backend", &args.backend);
    if let Some(gpus) = &args.gpus {
        give("gpus", gpus);
    }
    let tuning = &args.tuning;
    if let Some(engine) = &tuning.engine {
        give("engine", engine);
    }
    for (flag, value) in [
        ("gpu-queues", tuning.gpu_queues),
        ("gpu-slice", tuning.gpu_slice),
        ("gpu-registers", tuning.gpu_registers),
        ("gpu-warps", tuning.gpu_warps),
    ] {
        if let Some(value) = value {
            give(flag, &value);
        }
    }
    let net = match defaults.net {
        Net::User => "user",
        Net::Tun => "tun",
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
    if let Some(web) = &args.web {
        give("web", web);
    }
    if let Some(until) = &args.until {
        give("until", until);
    }
    let network = &args.network;
    for service in defaults.services.iter().chain(&network.services) {
        give("service", service);
    }
    if let Some(packets) = network.rate_packets {
        give("rate-packets", &packets);
    }
    if let Some(time) = network.busy_poll {
        give("busy-poll", &time);
    }
    let bridge_fault = network.fault.as_ref().filter(|_| fault.is_some_and(|fault| fault.bridge));
    for (flag, value) in [
        ("pcap", network.pcap.as_ref()),
        ("rate-bytes", network.rate_bytes.as_ref()),
        ("fault", bridge_fault),
    ] {
        if let Some(value) = value {
            give(flag, value);
        }
    }
    if let Some(seed) = args.seed {
        give("seed", &seed);
    }
    for (flag, path) in [("--report", &args.report), ("--state-dir", &args.state_dir)] {
        if let Some(path) = path {
            words.extend([flag.into(), path.into()]);
        }
    }
    if tuning.no_code_cache {
        words.push("--no-code-cache".into());
    }
    if network.isolate || defaults.isolate {
        words.push("--isolate".into());
    }
    if args.choice.quiet {
        words.push("--quiet".into());
    }
    Err(emulator::become_it(emulator, words).into())
}

/// A command of the emulator's own.
pub fn emulator_s(command: &str, args: EmulatorArgs) -> miette::Result<()> {
    let emulator = emulator::build(&repo::root()?, Show::Errors)?;
    let words = std::iter::once(command.into()).chain(args.words).collect();
    Err(emulator::become_it(emulator, words).into())
}
