//! The load generator against a fleet of stubs, as `emulator load` and `emulator fleet --backend stub`.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "common/asm.rs"]
#[allow(dead_code)]
mod asm;
#[path = "support/image.rs"]
mod image;
#[path = "support/program.rs"]
#[allow(dead_code)]
mod program;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use emulator::net::load::Load;
use program::{Behaviour, write_image};
use serde_json::Value;

/// A VM takes 96 connections at once.
const VMS: u32 = 16;

struct Lab {
    fleet: Child,
    folder: tempfile::TempDir,
    port_base: u16,
}

impl Lab {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("image")).unwrap();
        // No guest runs; the fleet wants an image all the same.
        write_image(&folder.path().join("image"), Behaviour::default());
        let free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        let port_base = loop {
            let port = 10_000 + ((std::process::id() * 911 + NEXT.fetch_add(64, SeqCst)) % 20_000) as u16;
            if (port..port + VMS as u16).all(free) {
                break port;
            }
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_emulator"));
        command.args(["fleet", "--backend", "stub", "--quiet", "--vms", &VMS.to_string()]);
        command.args(["--port-base", &port_base.to_string(), "--state-dir"]).arg(folder.path());
        let fleet = command.arg("--image").arg(folder.path().join("image")).spawn().unwrap();
        let lab = Self { fleet, folder, port_base };
        let end = Instant::now() + Duration::from_secs(20);
        while free(port_base) {
            assert!(Instant::now() < end, "the fleet does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        lab
    }

    fn load(&self, args: &[&str]) -> (Output, Value) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_emulator"));
        command.args(["load", "--port-base", &self.port_base.to_string()]);
        if !args.contains(&"--vms") {
            command.args(["--vms", &VMS.to_string()]);
        }
        let output = command.args(args).output().unwrap();
        let document = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (output, document)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.fleet.kill();
        let _ = self.fleet.wait();
        assert!(self.folder.path().exists());
    }
}

#[test]
fn a_thousand_connections_are_open_at_once_and_answered() {
    let lab = Lab::new();
    for more in [&["--keep-alive"][..], &[]] {
        let args = [&["--connections", "1000", "--threads", "2", "--seconds", "1"], more].concat();
        let (output, document) = lab.load(&args);
        assert!(output.status.success(), "{output:?}");
        assert!(document["answered"].as_u64().unwrap() >= 1000, "{document}");
        assert_eq!(document["failed"], 0, "{document}");
        let times = &document["milliseconds"];
        assert!(times["p50"].as_f64().unwrap() <= times["p99"].as_f64().unwrap(), "{document}");
        println!("{args:?}: {document}");
    }
}

#[test]
fn a_rate_is_kept() {
    let lab = Lab::new();
    let (output, document) = lab.load(&["--rate", "100", "--seconds", "2"]);
    assert!(output.status.success(), "{output:?}");
    let answered = document["answered"].as_u64().unwrap();
    assert!((195..=201).contains(&answered), "{document}");
}

#[test]
fn what_is_not_answered_is_told() {
    let lab = Lab::new();
    // Nobody listens behind the fleet's last port.
    let (output, document) = lab.load(&["--vms", "17", "--connections", "2", "--seconds", "0.3"]);
    if output.status.code() == Some(2) {
        panic!("{output:?}");
    }
    assert!(!output.status.success());
    assert!(
        document["failed"].as_u64().unwrap() > 0 && document["answered"].as_u64().unwrap() > 0,
        "{document}"
    );
}

/// With a rate, time counts from when a request was due: a server that stops for a while can't hide it.
#[test]
fn waiting_counts() {
    use std::io::{Read, Write};
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (n, client) in listener.incoming().enumerate() {
            if n == 0 {
                std::thread::sleep(Duration::from_millis(500));
            }
            let mut client = client.unwrap();
            let mut request = [0; 512];
            let _ = client.read(&mut request).unwrap();
            client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").unwrap();
        }
    });
    let load = Load {
        targets: vec![address],
        connections: 1,
        keep_alive: false,
        rate: Some(20.0),
        span: Duration::from_secs(1),
        patience: Duration::from_secs(5),
    };
    let outcome = load.run().unwrap();
    assert_eq!((outcome.answered, outcome.failed), (20, 0), "{outcome:?}");
    // Ten requests fell due while the first one waited.
    let slow = outcome.times.iter().filter(|time| **time > 50_000).count();
    assert!((8..=12).contains(&slow), "{:?}", outcome.times);
}

/// A server may end a kept connection with an answer that says so: nginx does after 1,000 requests.
#[test]
fn an_announced_end_of_a_kept_connection_is_no_failure() {
    use std::io::{Read, Write};
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            for end in ["keep-alive", "keep-alive", "close"] {
                let mut request = [0; 512];
                let read = client.read(&mut request).unwrap();
                assert!(read > 0);
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: {end}\r\n\r\nok");
                client.write_all(answer.as_bytes()).unwrap();
            }
            // The end comes later than the next request would.
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let load = Load {
        targets: vec![address],
        connections: 1,
        keep_alive: true,
        rate: None,
        span: Duration::from_millis(300),
        patience: Duration::from_secs(5),
    };
    let outcome = load.run().unwrap();
    assert!(outcome.answered > 3, "{outcome:?}");
    assert_eq!(outcome.failed, 0, "{outcome:?}");
}
