//! A fleet of real guests on the `tun` bridge, as a user has it. Needs a guest image (GUEST_IMAGE) and root.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "net_support/netns.rs"]
mod netns;

use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use emulator::net::address::ip_of;
use netns::{alone, ping};

const VMS: u32 = 3;

struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn fleet(state: &std::path::Path, more: &[&str]) -> Command {
    let image = std::env::var_os("GUEST_IMAGE").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_emulator"));
    command.args(["fleet", "--net", "tun", "--backend", "cpu", "--port-base", "4000"]);
    command.args(["--vms", &VMS.to_string()]).arg("--image").arg(image).arg("--state-dir").arg(state);
    command.args(more).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The page's text as a program of the host's gets it: curl or wget, whichever is there.
fn fetch(url: &str) -> String {
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if there("curl") {
        output("curl", &["-sS", "-m", "10", url])
    } else {
        output("wget", &["-q", "-T", "10", "-O", "-", url])
    }
}

#[test]
fn real_guests_answer_at_all_their_addresses() {
    if std::env::var_os("GUEST_IMAGE").is_none() {
        println!("SKIPPED: no guest image: GUEST_IMAGE is not set (cargo xtask test sets it)");
        return;
    }
    let there = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !there("curl") && !there("wget") {
        println!("SKIPPED: there is neither curl nor wget");
        return;
    }
    alone(|| {
        let state = tempfile::tempdir().unwrap();
        let rules = || output("ip", &["-4", "rule"]);
        let before = rules();
        assert!(fleet(state.path(), &["--until", "http", "--timeout", "120"]).status().unwrap().success());
        assert_eq!(rules(), before);

        let mut serving = Serving(fleet(state.path(), &["--quiet"]).spawn().unwrap());
        let end = Instant::now() + Duration::from_secs(60);
        for vm in 0..VMS {
            let address = ip_of(vm).unwrap();
            let urls = [format!("http://127.0.0.1:{}/", 4000 + vm), format!("http://{address}/")];
            for url in urls {
                let page = loop {
                    let page = fetch(&url);
                    if page.contains("<html") || Instant::now() > end {
                        break page;
                    }
                    std::thread::sleep(Duration::from_millis(100));
                };
                assert!(page.contains("<html") && page.contains(&format!("VM {vm}")), "{url}: {page}");
            }
            let times: Vec<_> =
                (0..20).filter_map(|n| ping(address, n, 56, Duration::from_secs(2))).collect();
            assert_eq!(times.len(), 20);
            println!("ping {address}: best {:?}", times.iter().min().unwrap());
        }
        // The gateway is the host itself.
        assert!(ping(Ipv4Addr::new(10, 77, 0, 1), 1, 56, Duration::from_secs(2)).is_some());

        // Killed, it leaves a rule behind, which does no harm and which the next fleet takes away.
        serving.0.kill().unwrap();
        serving.0.wait().unwrap();
        assert_ne!(rules(), before);
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 4000)).unwrap();
        assert!(std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, 4000)).is_ok());
        drop(listener);
        assert!(fleet(state.path(), &["--until", "http", "--timeout", "120"]).status().unwrap().success());
        assert_eq!(rules(), before);
    });
}
