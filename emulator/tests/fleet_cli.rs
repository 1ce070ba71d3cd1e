//! The `emulator` program from outside: ends, errors, report, consoles. Its guests are a few instructions long.
#![allow(clippy::unwrap_used, reason = "these are tests, helpers included")]

#[path = "common/asm.rs"]
#[allow(dead_code)]
mod asm;
#[path = "support/image.rs"]
mod image;
#[path = "support/program.rs"]
mod program;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use program::{Behaviour, PANIC, REBOOT, SHUT_DOWN, write_image};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A folder with an image, a place for the fleet's state, and ports of its own.
struct Lab {
    folder: tempfile::TempDir,
    port_base: u16,
}

impl Lab {
    fn new(how: Behaviour) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("image")).unwrap();
        write_image(&folder.path().join("image"), how);
        // Ports that were free a moment ago, below those that the system gives to connections.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let port_base = loop {
            let n = NEXT.fetch_add(1, SeqCst);
            let port = 10_000 + ((std::process::id() * 1237 + n * 128) % 20_000) as u16;
            if (port..port + 64).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
                break port;
            }
        };
        Self { folder, port_base }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, subcommand: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_emulator"));
        command.arg(subcommand).arg("--state-dir").arg(self.path("state"));
        command.args(["--port-base", &self.port_base.to_string()]).args(args);
        if subcommand == "fleet" {
            command.arg("--image").arg(self.path("image"));
        }
        command.stdin(Stdio::null());
        command
    }

    fn fleet(&self, args: &[&str]) -> Output {
        self.command("fleet", args).output().unwrap()
    }

    /// A fleet that fails; what it says.
    fn error(&self, args: &[&str]) -> String {
        let output = self.fleet(args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// A fleet in the background, all of it ready.
    fn serve(&self, vms: u32, args: &[&str]) -> Serving {
        let mut command = self.command("fleet", args);
        let child = command.args(["--vms", &vms.to_string()]).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut serving = Serving(Some(child.spawn().unwrap()));
        until("all VMs are ready", || {
            if serving.0.as_mut().unwrap().try_wait().unwrap().is_some() {
                panic!("the fleet has ended: {:?}", serving.0.take().unwrap().wait_with_output());
            }
            self.try_status().is_some_and(|status| status["report"]["ready"]["vms"] == vms)
        });
        serving
    }

    fn try_status(&self) -> Option<Value> {
        let output = self.command("status", &[]).output().unwrap();
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    fn state(&self, vm: usize) -> String {
        self.try_status().unwrap()["vm"][vm]["state"].as_str().unwrap().to_owned()
    }

    /// Types into a console; what it prints.
    fn console(&self, vm: &str, input: &[u8]) -> Output {
        let mut command = self.command("console", &[vm, "--linger", "0.3"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    fn report(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.path("report.json")).unwrap()).unwrap()
    }

    fn report_args(&self) -> [String; 2] {
        ["--report".into(), self.path("report.json").display().to_string()]
    }
}

struct Serving(Option<Child>);

impl Serving {
    fn pid(&self) -> Pid {
        Pid::from_child(self.0.as_ref().unwrap())
    }

    /// Sends a signal and waits for the end.
    fn end(mut self, signal: Signal) -> Output {
        kill_process(self.pid(), signal).unwrap();
        self.0.take().unwrap().wait_with_output().unwrap()
    }

    /// Waits for the end.
    fn wait(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_fleet_that_becomes_ready_ends_well_and_reports() {
    let lab = Lab::new(Behaviour::default());
    let [flag, path] = lab.report_args();
    let output = lab.fleet(&["--vms", "12", "--until", "ready", "--seed", "1", &flag, &path]);
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stdout);
    assert!(said.contains(&format!("http://127.0.0.1:{}/", lab.port_base + 11)), "{said}");
    assert!(said.contains("12 of 12 VMs were ready"), "{said}");
    let report = lab.report();
    // The keys that docs/report.md promises.
    for key in [
        "/version",
        "/ready/seconds_first",
        "/ready/seconds_last",
        "/ready/instructions/min",
        "/ready/instructions/median",
        "/ready/instructions/max",
        "/mips/per_vm",
        "/mips/total",
        "/mips/per_engine",
        "/memory/shared_bytes",
        "/memory/private_bytes",
        "/memory/overhead_bytes",
        "/memory/bytes_per_vm",
        "/net/packets_in",
        "/net/packets_out",
        "/net/drops",
    ] {
        let value = report.pointer(key).unwrap_or(&Value::Null);
        assert!(!value.is_null(), "{key} is missing");
    }
    for (key, value) in [
        ("/vms", Value::from(12)),
        ("/ready/vms", 12.into()),
        ("/backend", "cpu".into()),
        ("/engine", "threaded".into()),
        ("/error", Value::Null),
        ("/http", Value::Null),
        ("/failures_total", 0.into()),
        ("/failures", Value::Array(Vec::new())),
        ("/image/manifest_hash", "0123456789abcdef0123".into()),
    ] {
        assert_eq!(report.pointer(key), Some(&value), "{key}");
    }
    // The same guest in virtual time: it differs in the digits of its number only.
    let (min, max) = (&report["ready"]["instructions"]["min"], &report["ready"]["instructions"]["max"]);
    assert_eq!(min, max, "boots are not deterministic");
}

#[test]
fn a_guest_that_panics_is_named_with_its_last_lines() {
    let lab = Lab::new(Behaviour { panics: true, ..Behaviour::default() });
    let [flag, path] = lab.report_args();
    let error = lab.error(&["--vms", "1", "--until", "ready", &flag, &path]);
    assert!(error.contains("VM 0 (failed): Kernel panic - not syncing: on purpose"), "{error}");
    assert!(error.contains("| a guest of few words"), "{error}");
    let report = lab.report();
    assert_eq!(report["failures"][0]["vm"], 0);
    assert_eq!(report["failures"][0]["state"], "failed");
    assert_eq!(report["failures"][0]["console"][0], "a guest of few words");
    assert!(report["error"].as_str().unwrap().contains("on purpose"));
    // Without --until a fleet of which nobody is left ends too.
    let error = lab.error(&["--vms", "2"]);
    assert!(error.contains("no VM runs any more; 2 failed"), "{error}");
    let log = std::fs::read_to_string(lab.path(&format!("state/{}/console/vm-00001.log", lab.port_base)));
    assert!(log.unwrap().contains("on purpose"));
}

#[test]
fn a_guest_with_another_s_number_or_without_a_word_fails() {
    let lab = Lab::new(Behaviour { wrong_by: 1, ..Behaviour::default() });
    let error = lab.error(&["--vms", "1", "--until", "ready"]);
    assert!(error.contains("it said READY 1, but it is VM 0"), "{error}");
    let lab = Lab::new(Behaviour { silent: true, ..Behaviour::default() });
    let error = lab.error(&["--vms", "2", "--until", "ready", "--timeout", "0.3"]);
    assert!(error.contains("0 of 2 VMs were ready in 0.3 s, first VM 0: no READY line yet"), "{error}");
    let output = lab.fleet(&["--vms", "2", "--until", "0.2", "--quiet"]);
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn vms_that_the_limit_of_files_leaves_no_port_are_asked_too() {
    let lab = Lab::new(Behaviour::default());
    let report = lab.path("report.json");
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 420 && exec \"$0\" \"$@\""]).arg(env!("CARGO_BIN_EXE_emulator"));
    limited.args(["fleet", "--backend", "stub", "--vms", "500", "--until", "http", "--timeout", "60"]);
    limited.arg("--state-dir").arg(lab.path("state")).arg("--image").arg(lab.path("image"));
    limited.arg("--report").arg(&report);
    // Below those of the other tests.
    let port_base = (1100..9900)
        .step_by(300)
        .find(|base| (*base..base + 300).all(|port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok()));
    limited.args(["--port-base", &port_base.unwrap().to_string()]).stdin(Stdio::null());
    let output = limited.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(text.contains("to 499 have no port of their own"), "{text}");
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!(report["http"]["vms"], 500);
}

#[test]
fn bad_arguments_are_told_at_once() {
    let lab = Lab::new(Behaviour::default());
    for (args, words) in [
        (&["--vms", "0"][..], &["0 VMs"][..]),
        (&["--until", "http", "--net", "off"], &["--net user"]),
        (&["--ram", "64K"], &["at least", "--ram"]),
        (&["--ram", "1000001"], &["multiple of 4096"]),
        (&["--vms", "100000000"], &["addresses"]),
        (&["--vms", "20000", "--ram", "3G", "--backend", "cpu"], &[" fit ", "fewer --vms or less --ram"]),
        (&["--vms", "2", "--pcap", "x.pcapng:2"], &["--pcap: there is no VM 2", "from 0 to 1"]),
        (&["--vms", "2", "--pcap", "/nowhere/x.pcapng"], &["--pcap", "/nowhere/x.pcapng"]),
        (&["--net", "off", "--pcap", "x.pcapng"], &["there are no packets"]),
        (&["--vms", "2", "--fault", "mac:2"], &["--fault: there is no VM 2"]),
        (&["--service", "1:5", "--service", "2:5"], &["two services for the guests' port 5"]),
        (&["--report", "/nowhere/report.json"], &["--report /nowhere/report.json"]),
    ] {
        let error = lab.error(args);
        assert!(words.iter().all(|word| error.contains(word)), "{args:?}: {error}");
    }
    let high = Lab { port_base: 65_530, ..Lab::new(Behaviour::default()) };
    let error = high.error(&["--vms", "10"]);
    assert!(error.contains("65535"), "{error}");
    std::fs::write(lab.path("image/Image"), b"\x7fELF").unwrap();
    let [flag, path] = lab.report_args();
    assert!(lab.error(&[&flag, &path]).contains("an ELF file"));
    assert!(lab.report()["error"].as_str().unwrap().contains("an ELF file"));
    std::fs::remove_file(lab.path("image/manifest.json")).unwrap();
    assert!(lab.error(&[]).contains("cargo xtask image"));
}

#[test]
fn consoles_reach_their_vms() {
    let lab = Lab::new(Behaviour::default());
    let serving = lab.serve(3, &["--net", "off"]);
    // What was printed before, then what is typed.
    let output = lab.console("2", b"hello there\n");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "a guest of few words\nREADY 0002\nhello there\n");
    assert_eq!(text(&lab.console("1", b"").stdout), "a guest of few words\nREADY 0001\n");
    // More than any buffer on the way holds.
    let long: Vec<u8> =
        (0..40_000u32).map(|n| if n % 50 == 49 { b'\n' } else { b'a' + (n % 13) as u8 }).collect();
    let output = lab.console("0", &long);
    assert!(output.stdout.ends_with(&long), "{} bytes came", output.stdout.len());
    let output = lab.console("3", b"");
    assert!(!output.status.success() && text(&output.stderr).contains("no VM 3"), "{output:?}");

    // Ends of guests.
    lab.console("1", &[REBOOT]);
    until("it has rebooted", || lab.try_status().is_some_and(|status| status["vm"][1]["reboots"] == 1));
    until("it sleeps again", || lab.state(1) == "sleeping");
    let output = lab.console("1", &[PANIC]);
    assert!(text(&output.stdout).contains("[VM 1: Kernel panic - not syncing: as you wish]"), "{output:?}");
    assert_eq!(lab.state(1), "failed");
    lab.console("2", &[SHUT_DOWN]);
    assert_eq!(lab.state(2), "stopped");
    // Attaching to one that has ended shows its last lines, and ends.
    let output = lab.console("1", b"more");
    assert!(text(&output.stdout).contains("as you wish") && output.status.success(), "{output:?}");

    let output = serving.end(Signal::INT);
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("VM 1 failed: Kernel panic"), "{said}");
    assert!(!lab.path("state").join(lab.port_base.to_string()).join("control.sock").exists());
    let output = lab.console("0", b"");
    assert!(text(&output.stderr).contains("no fleet runs on the ports from"), "{output:?}");
}

#[test]
fn a_second_fleet_is_refused_and_a_killed_one_leaves_no_trace() {
    let lab = Lab::new(Behaviour::default());
    let serving = lab.serve(1, &[]);
    let pid = serving.pid().as_raw_pid();
    let error = lab.error(&["--vms", "1", "--until", "ready"]);
    assert!(error.contains(&format!("process {pid}")) && error.contains("--port-base"), "{error}");
    // The same ports from another folder: the bridge finds them taken.
    let other = Lab { port_base: lab.port_base, ..Lab::new(Behaviour::default()) };
    let error = other.error(&["--vms", "1", "--until", "ready"]);
    assert!(error.contains(&lab.port_base.to_string()), "{error}");
    serving.end(Signal::KILL);
    assert!(lab.path("state").join(lab.port_base.to_string()).join("control.sock").exists());
    let output = lab.fleet(&["--vms", "1", "--until", "ready"]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn signals_end_a_fleet_cleanly() {
    let lab = Lab::new(Behaviour::default());
    let [flag, path] = lab.report_args();
    let output = lab.serve(2, &[&flag, &path]).end(Signal::TERM);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(lab.report()["ready"]["vms"], 2);
    // What was waited for has not come: that is no success.
    let output = lab.serve(2, &["--until", "1000", &flag, &path]).end(Signal::INT);
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert_eq!(lab.report()["error"], "interrupted");
}

#[test]
fn a_reader_that_has_gone_ends_no_fleet() {
    let lab = Lab::new(Behaviour::default());
    let mut command = lab.command("fleet", &["--vms", "2", "--until", "0.5", "--net", "off"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_fleet_whose_vms_all_shut_down_ends_well() {
    let lab = Lab::new(Behaviour::default());
    let serving = lab.serve(1, &["--net", "off"]);
    lab.console("0", &[SHUT_DOWN]);
    let output = serving.wait();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_idle_fleet_uses_no_cpu() {
    let lab = Lab::new(Behaviour::default());
    let serving = lab.serve(64, &[]);
    let pid = serving.pid().as_raw_pid();
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(2));
    // 100 a second: 2 s at 10 % of a core are 20.
    let used = ticks() - before;
    assert!(used < 20, "{used} ticks in 2 s");
}

#[test]
fn a_terminal_is_raw_while_attached_and_then_as_before() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};
    let lab = Lab::new(Behaviour::default());
    let _serving = lab.serve(1, &["--net", "off"]);
    for end in [Some(b"\x1d"), None] {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal: OwnedFd = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        let copy = || Stdio::from(terminal.try_clone().unwrap());
        let mut command = lab.command("console", &["0"]);
        let mut child = command.stdin(copy()).stdout(copy()).stderr(copy()).spawn().unwrap();
        until("the terminal is raw", || {
            !tcgetattr(terminal.as_fd()).unwrap().local_modes.contains(LocalModes::ICANON)
        });
        // Ctrl-C is the guest's.
        let mut master = std::fs::File::from(master);
        master.write_all(b"\x03typed").unwrap();
        let mut seen = Vec::new();
        while !text(&seen).contains("\x03typed") {
            let mut bytes = [0; 256];
            let n = master.read(&mut bytes).unwrap();
            seen.extend(&bytes[..n]);
        }
        assert!(text(&seen).contains("READY 0000"), "{}", text(&seen));
        match end {
            Some(keys) => master.write_all(keys).unwrap(),
            None => kill_process(Pid::from_child(&child), Signal::TERM).unwrap(),
        }
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(if end.is_some() { 0 } else { 130 }));
        let after = tcgetattr(&terminal).unwrap();
        assert_eq!(before.local_modes, after.local_modes);
        assert_eq!(before.input_modes, after.input_modes);
        assert_eq!(before.output_modes, after.output_modes);
    }
}
