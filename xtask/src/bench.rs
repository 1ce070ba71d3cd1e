//! `cargo xtask bench`: fleets of several sizes, measured by the emulator; other emulators beside them, with the same guest
//! on the same machine.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use miette::{IntoDiagnostic, WrapErr, miette};
use serde::Serialize;

use crate::emulator::{self, Show};
use crate::flags::{BenchArgs, Peer};
use crate::image::direct::host;
use crate::image::try_it::{Guest, Prepared};
use crate::image::{self, ImageDir, Options};
use crate::repo;

/// A peer as the emulator reads it.
#[derive(Serialize)]
struct Described {
    name: String,
    program: PathBuf,
    args: Vec<String>,
    folder: String,
    ram_bytes: u64,
}

/// Builds what is missing, then becomes the emulator.
pub fn command(args: &BenchArgs) -> miette::Result<()> {
    let root = repo::root()?;
    // What is missing is told before anything is built.
    let programs = args.peers.iter().map(program).collect::<miette::Result<Vec<_>>>()?;
    let options = Options { keep: true, ..Options::default() };
    let image = image::ensure(&root, &args.profile, &options)?;
    let emulator = emulator::build(&root, Show::Progress)?;
    let mut words: Vec<OsString> = vec!["bench".into(), "--image".into(), image.dir.clone().into()];
    if !programs.is_empty() {
        let folder = root.join("out/bench");
        describe(&root, &image, &args.peers, programs, &folder)?;
        words.extend(["--peers".into(), folder.join("peers.json").into()]);
    }
    let mut give = |flag: &str, value: &str| words.extend([format!("--{flag}").into(), value.into()]);
    for (flag, value) in [
        ("vms", &args.vms),
        ("cpu-vms", &args.cpu_vms),
        ("ram", &args.ram),
        ("gpus", &args.gpus),
        ("engines", &args.engine),
        ("slices", &args.slice),
        ("threads", &args.threads),
        ("runs", &args.runs),
        ("steady", &args.steady),
        ("http", &args.http),
        ("timeout", &args.timeout),
    ] {
        if let Some(value) = value {
            give(flag, value);
        }
    }
    give("backend", &args.backend);
    if let Some(commit) = commit(&root) {
        give("commit", &commit);
    }
    let json = args.json.clone().map_or_else(|| default_json(&root), Ok)?;
    eprintln!("Results go to {}.", json.display());
    words.extend(["--json".into(), json.into()]);
    Err(emulator::become_it(emulator, words).into())
}

/// The peer's program, which is there and can be run.
fn program(peer: &Peer) -> miette::Result<PathBuf> {
    let path = std::path::absolute(&peer.path).into_diagnostic()?;
    let found =
        if peer.path.components().count() == 1 { host::find(&peer.path.to_string_lossy()) } else { None };
    let path = found.unwrap_or(path);
    let what = match fs::metadata(&path) {
        Err(error) => error.to_string(),
        Ok(metadata) if !metadata.is_file() => "it is no file".into(),
        Ok(_) if rustix::fs::access(&path, rustix::fs::Access::EXEC_OK).is_err() => {
            "it is not executable".into()
        }
        Ok(_) => return Ok(path),
    };
    let help = match peer.name.as_str() {
        "qemu" => "`sudo apt-get install qemu-system-misc`, then --peer qemu=qemu-system-riscv32",
        _ => "Build semu from its source, and name the program.",
    };
    Err(miette!(help = help, "--peer {}={}: {what}", peer.name, peer.path.display()))
}

/// Writes the peers' guests, each into a folder, and the file that tells the emulator how to start them.
fn describe(
    root: &Path,
    image: &ImageDir,
    peers: &[Peer],
    programs: Vec<PathBuf>,
    folder: &Path,
) -> miette::Result<()> {
    let failed = || format!("{} can't be written", folder.display());
    let guest = Guest { root, image: &image.dir, profile: &image.profile, manifest: &image.manifest };
    let mut described = Vec::new();
    for (n, (peer, program)) in peers.iter().zip(programs).enumerate() {
        let own = format!("{n}-{}", peer.name);
        let dir = folder.join(&own);
        fs::create_dir_all(&dir).into_diagnostic().wrap_err_with(failed)?;
        let Prepared { program, args, ram_bytes } = match peer.name.as_str() {
            "qemu" => guest.qemu(Some(program), None, &dir)?,
            _ => guest.semu(Some(program), &dir)?,
        };
        let args = args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
        described.push(Described { name: peer.name.clone(), program, args, folder: own, ram_bytes });
    }
    let text = serde_json::to_string_pretty(&described).into_diagnostic()?;
    fs::write(folder.join("peers.json"), text + "\n").into_diagnostic().wrap_err_with(failed)
}

/// What is measured; none outside a Git checkout. Changes that were not committed are marked.
fn commit(root: &Path) -> Option<String> {
    let output = Command::new("git")
        .current_dir(root)
        .args(["describe", "--always", "--dirty", "--abbrev=40"])
        .output();
    let output = output.ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// bench/results/DATE-bench.json, or with a number if that is there.
fn default_json(root: &Path) -> miette::Result<PathBuf> {
    let output =
        Command::new("date").arg("+%Y-%m-%d").output().into_diagnostic().wrap_err("date can't be run")?;
    let date = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let folder = root.join("bench/results");
    let name = |n: u32| if n == 1 { format!("{date}-bench.json") } else { format!("{date}-bench-{n}.json") };
    let free = (1..).map(|n| folder.join(name(n))).find(|path| !path.exists());
    free.ok_or_else(|| miette!("{} is full", folder.display()))
}
