//! `cargo xtask test --backend cuda`: the machine's tests by the GPU's engines on a GPU, and guests that boot and answer
//! requests in lockstep with the CPU; or a folder that does all of that elsewhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, WrapErr, miette};

use super::{NVRTC, Tally, Tools, check, counted, machine};
use crate::doctor;
use crate::emulator::{self, Show};
use crate::flags::TestArgs;

/// VMs in lockstep, and the requests that each answers.
const VMS: &str = "4";
const REQUESTS: &str = "100";
/// How long a test program may take. With the GPU's engine on two CPU cores, all of them together take some 130 s.
const LIMIT: Duration = Duration::from_secs(600);
/// What runs in the folder of --archive.
const SCRIPT: &str = include_str!("run.sh");

/// All tests on a GPU.
pub fn command(args: &TestArgs, root: &Path, tools: &Tools) -> miette::Result<()> {
    let start = Instant::now();
    let mut tally = Tally::default();
    let emulator = emulator::build(root, Show::Progress)?;
    if let Some(folder) = &args.archive {
        return archive(args, root, &emulator, folder);
    }
    let mut nvrtc = None;
    if doctor::library_of_nvrtc().is_none() {
        match tools.python("nvidia/cu13/lib/libnvrtc.so.13", NVRTC) {
            Ok(path) => nvrtc = Some(path),
            Err(why) => println!("note    {why}"),
        }
    }
    let on_gpu = |mut command: Command| {
        if let Some(path) = &nvrtc {
            command.env("NVRTC_LIBRARY", path);
        }
        command
    };
    let gpus = on_gpu(Command::new(&emulator)).arg("gpus").stdin(Stdio::null()).output().into_diagnostic()?;
    if !gpus.status.success() {
        let why = String::from_utf8_lossy(&gpus.stderr).trim().to_owned();
        return Err(miette!(
            help = "On a machine with a GPU but without Rust: cargo xtask test --backend cuda --archive DIR makes a folder \
                    that runs there.",
            "no GPU to test on.\n{why}"
        ));
    }
    print!("{}", String::from_utf8_lossy(&gpus.stdout));
    let programs = test_programs(root)?;
    for engine in &args.engine {
        for (name, path) in &programs {
            let mut tests = on_gpu(Command::new(path));
            tests.current_dir(root.join("emulator")).arg("--show-output");
            tests.env("MACHINE_ENGINE", format!("cuda-{engine}"));
            counted(&mut tally, &format!("{name} on the GPU, engine {engine}"), tests, Some(LIMIT));
        }
    }
    if args.no_guest {
        tally.skip("lockstep of CPU and GPU", "--no-guest was given");
    } else if lean_image(&mut tally, root) {
        for engine in &args.engine {
            let mut lockstep = on_gpu(Command::new(&emulator));
            lockstep.arg("lockstep").arg("--image").arg(root.join("out/lean"));
            lockstep.args(["--vms", VMS, "--requests", REQUESTS, "--engine", engine, "--mismatch"]);
            lockstep.arg(root.join(format!("out/lockstep-{engine}")));
            let what =
                format!("{VMS} VMs boot and answer {REQUESTS} requests each as on the CPU, engine {engine}");
            check(&mut tally, &what, lockstep);
        }
    }
    tally.print_times();
    tally.end(start)
}

fn lean_image(tally: &mut Tally, root: &Path) -> bool {
    let what = "cargo xtask image";
    let failed = tally.failed.len();
    check(tally, what, {
        let mut image = super::xtask(root);
        image.arg("image");
        image
    });
    tally.failed.len() == failed
}

/// A folder with all that the tests need, for machines without Rust.
fn archive(args: &TestArgs, root: &Path, emulator: &Path, folder: &Path) -> miette::Result<()> {
    let mut tally = Tally::default();
    if !args.no_guest && !lean_image(&mut tally, root) {
        return Err(miette!("the guest image was not built"));
    }
    let tests = test_programs(root)?;
    let written = || -> Result<(), std::io::Error> {
        fs::create_dir_all(folder.join("tests"))?;
        copy(emulator, &folder.join("emulator"))?;
        for (name, path) in &tests {
            copy(path, &folder.join("tests").join(name))?;
        }
        if !args.no_guest {
            fs::create_dir_all(folder.join("guest"))?;
            for name in ["Image", "initrd.cpio", "vm.dtb", "manifest.json"] {
                fs::copy(root.join("out/lean").join(name), folder.join("guest").join(name))?;
            }
        }
        fs::write(folder.join("run.sh"), SCRIPT)
    };
    written().into_diagnostic().wrap_err_with(|| format!("--archive {}", folder.display()))?;
    println!(
        "{}: the emulator, {} test programs{}; on the GPU machine: sh run.sh",
        folder.display(),
        tests.len(),
        if args.no_guest { "" } else { ", the lean guest" }
    );
    Ok(())
}

/// Builds the machine's tests; names and paths of the programs.
fn test_programs(root: &Path) -> miette::Result<Vec<(String, PathBuf)>> {
    let mut build = machine(root);
    build.args(["--no-run", "--message-format=json-render-diagnostics"]);
    let output = build.stdin(Stdio::null()).stderr(Stdio::inherit()).output().into_diagnostic()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let tests: Vec<(String, PathBuf)> = text.lines().filter_map(test_program).collect();
    if !output.status.success() || tests.is_empty() {
        return Err(miette!("the tests do not build; cargo says why above"));
    }
    Ok(tests)
}

/// A program without what debuggers want, if there is a `strip`.
fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let stripped = Command::new("strip").arg("-o").arg(to).arg(from).stderr(Stdio::null()).status();
    match stripped {
        Ok(status) if status.success() => Ok(()),
        _ => fs::copy(from, to).map(drop),
    }
}

/// Name and path of a test program, if this message of cargo's tells them.
fn test_program(line: &str) -> Option<(String, PathBuf)> {
    let message: serde_json::Value = serde_json::from_str(line).ok()?;
    let is_test = message["reason"] == "compiler-artifact" && message["target"]["kind"][0] == "test";
    let name = message["target"]["name"].as_str().filter(|_| is_test)?;
    Some((name.to_owned(), message["executable"].as_str()?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_tells_where_tests_are() {
        let line = |kind, path| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"machine_net"}},"executable":{path}}}"#
            )
        };
        let found = test_program(&line("test", "\"/t/debug/deps/machine_net-1\""));
        assert_eq!(found, Some(("machine_net".into(), "/t/debug/deps/machine_net-1".into())));
        assert_eq!(test_program(&line("lib", "\"/t/x\"")), None);
        assert_eq!(test_program(&line("test", "null")), None);
        assert_eq!(test_program("Compiling"), None);
    }
}
