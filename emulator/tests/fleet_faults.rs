//! docs/debugging-the-network.md, walked through: each of the talk's four faults is made on purpose in VM 1, seen by the
//! means that the tutorial names, and mended where the guest can mend it. Needs the debug images beside the lean one
//! (`cargo xtask image --profile debug`, also with `--fault arp:1` and `--fault route:1`).
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The folder of images, if the one that is needed is there.
fn image(name: &str) -> Option<PathBuf> {
    let image = std::env::var_os("GUEST_IMAGE").map(|lean| Path::new(&lean).with_file_name(name));
    match image.filter(|image| image.join("manifest.json").is_file()) {
        Some(image) => Some(image),
        None => {
            println!(
                "SKIPPED: no image {name} beside the one that GUEST_IMAGE names (cargo xtask test builds it)"
            );
            None
        }
    }
}

/// Numbers for ports and for lines on consoles.
static NEXT: AtomicU32 = AtomicU32::new(0);

struct Lab {
    fleet: Child,
    folder: tempfile::TempDir,
    port_base: u16,
}

impl Lab {
    fn new(image: &Path, fault: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
        let first = 12_000 + (std::process::id() % 10_000 + NEXT.fetch_add(10, SeqCst)) as u16;
        let port_base = (first..).step_by(2).find(|port| free(*port) && free(port + 1)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_emulator"));
        command.args(["fleet", "--vms", "2", "--backend", "cpu", "--quiet", "--image"]).arg(image);
        command.args(["--port-base", &port_base.to_string(), "--state-dir"]).arg(folder.path());
        command.arg("--pcap").arg(folder.path().join("capture.pcapng"));
        command.args(fault.map(|fault| ["--fault", fault]).into_iter().flatten());
        let fleet = command.stdin(Stdio::null()).spawn().unwrap();
        let lab = Self { fleet, folder, port_base };
        // VM 0 has no fault: it shows when a VM is ready, and that the fault is VM 1's alone.
        let end = Instant::now() + Duration::from_secs(60);
        while lab.get(0, Duration::from_secs(2)).is_none() {
            assert!(Instant::now() < end, "VM 0 does not answer");
        }
        lab
    }

    fn emulator(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_emulator"));
        command.args(words).args(["--port-base", &self.port_base.to_string(), "--state-dir"]);
        command.arg(self.folder.path());
        command
    }

    /// Types a line into VM 1's console; what it prints until it is done.
    fn ask(&self, line: &str) -> String {
        let mut console = self.emulator(&["console", "1"]);
        let mut console = console.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut input, mut output) = (console.stdin.take().unwrap(), console.stdout.take().unwrap());
        // The echo of what was typed must not look like its output, nor must earlier output, which comes first.
        let n = NEXT.fetch_add(1, SeqCst);
        let (begin, end) = (format!("begin{n}\n"), format!("end{n}\n"));
        writeln!(input, "echo be''gin{n}; {line}\necho en''d{n}").unwrap();
        let (sender, receiver) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = output.read(&mut buffer) {
                let _ = sender.send(buffer[..len].to_vec());
            }
        });
        let (mut bytes, limit) = (Vec::new(), Instant::now() + Duration::from_secs(30));
        let text = loop {
            let left = limit.saturating_duration_since(Instant::now());
            let Ok(more) = receiver.recv_timeout(left) else {
                panic!("`{line}` did not end: {}", String::from_utf8_lossy(&bytes));
            };
            bytes.extend(more);
            let text = String::from_utf8_lossy(&bytes).replace('\r', "");
            if let Some((_, text)) = text.split_once(&begin)
                && let Some((text, _)) = text.split_once(&end)
            {
                let lines = text.lines().filter(|line| !line.starts_with("# "));
                break lines.collect::<Vec<_>>().join("\n");
            }
        };
        drop(input);
        console.kill().unwrap();
        console.wait().unwrap();
        reader.join().unwrap();
        println!("VM 1 # {line}\n{text}");
        text
    }

    /// A request to a VM's page, none if it is not answered in time.
    fn get(&self, vm: u16, patience: Duration) -> Option<String> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port_base + vm));
        let mut stream = TcpStream::connect_timeout(&address, patience).ok()?;
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        answer.contains("200 OK").then_some(answer)
    }

    /// The host's counters of VM 1's link.
    fn status(&self, name: &str) -> u64 {
        let output = self.emulator(&["status", "1"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
        let value = line.map_or(0, |value| value.parse().unwrap());
        println!("$ cargo xtask status 1: {name}: {value}");
        value
    }

    /// What everybody sees first: VM 0 answers, VM 1 does not.
    fn only_vm_1_is_silent(&self) {
        self.ask("lg-trace on 80 > /dev/null");
        self.ask("tcpdump -i eth0 -n -e -vv -l 'tcp or arp' > /tmp/dump 2> /dev/null & sleep 1");
        assert!(self.get(0, Duration::from_secs(5)).is_some());
        assert!(self.get(1, Duration::from_secs(3)).is_none());
    }

    /// Packets that the guest's driver has received.
    fn received(&self) -> u64 {
        let text = self.ask("ethtool -S eth0 | grep packets");
        number(&text, "rx_queue_0_packets:")
    }

    /// A counter of /proc/net/snmp by its place in the line.
    fn snmp(&self, protocol: &str, counter: &str) -> u64 {
        let text = self.ask(&format!("grep ^{protocol}: /proc/net/snmp"));
        let mut lines = text.lines().filter(|line| line.starts_with(protocol));
        let names = lines.next().unwrap().split(' ');
        let mut pairs = names.zip(lines.next().unwrap().split(' '));
        pairs.find(|(name, _)| *name == counter).unwrap().1.parse().unwrap()
    }

    /// Packets that passed iptables' raw table.
    fn traced(&self) -> u64 {
        let text = self.ask("iptables -t raw -nvxL PREROUTING | grep TRACE");
        text.lines()
            .find(|line| line.contains("TRACE"))
            .map_or(0, |line| line.split_whitespace().next().unwrap().parse().unwrap())
    }

    fn dump(&self) -> String {
        self.ask("cat /tmp/dump")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.fleet.kill();
        let _ = self.fleet.wait();
    }
}

fn number(text: &str, name: &str) -> u64 {
    let rest = &text[text.find(name).unwrap_or_else(|| panic!("no {name} in {text}")) + name.len()..];
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn the_wrong_mac() {
    let Some(image) = image("debug") else { return };
    let lab = Lab::new(&image, Some("mac:1"));
    lab.only_vm_1_is_silent();
    // Frames arrive, but IP does not see them, and nothing goes out.
    assert!(lab.received() > 0);
    assert_eq!((lab.traced(), lab.snmp("Ip", "InReceives")), (0, 0));
    assert!(lab.status("rx_packets") > 0);
    assert_eq!((lab.status("tx_packets"), lab.status("rx_dropped")), (0, 0));
    // Whom they are for.
    let dump = lab.dump();
    assert!(dump.contains("02:4c:47:ff:ff:ff > 02:4c:47:00:00:81"), "{dump}");
    assert!(lab.ask("cat /sys/class/net/eth0/address").contains("02:4c:47:00:00:01"));
}

#[test]
fn the_missing_arp_entry() {
    let Some(image) = image("debug-fault-arp-1") else { return };
    let lab = Lab::new(&image, Some("arp:1"));
    lab.only_vm_1_is_silent();
    // The SYN goes all the way, but its answer has no address to go to.
    assert!(lab.received() > 0 && lab.traced() > 0);
    let dump = lab.dump();
    assert!(dump.contains("Request who-has 10.77.0.1") && !dump.contains("Reply 10.77.0.1"), "{dump}");
    assert!(!dump.contains("[S.]"), "{dump}");
    assert!(lab.ask("arp -n").contains("incomplete"));
    assert!(lab.status("tx_dropped_fault") > 0);
    // Mended by hand.
    lab.ask("arp -s 10.77.0.1 02:4c:47:ff:ff:ff");
    assert!(lab.get(1, Duration::from_secs(10)).is_some());
}

#[test]
fn the_wrong_checksum() {
    let Some(image) = image("debug") else { return };
    let lab = Lab::new(&image, Some("checksum:1"));
    lab.only_vm_1_is_silent();
    // Packets pass IP, and TCP throws them away.
    assert!(lab.received() > 0 && lab.traced() > 0);
    assert!(lab.snmp("Tcp", "InCsumErrors") > 0);
    let dump = lab.dump();
    // tcpdump says what it should be: the same bytes, swapped.
    let (_, found) = dump.split_once("cksum 0x").unwrap();
    let (is, found) = found.split_once(" (incorrect -> 0x").unwrap_or_else(|| panic!("{dump}"));
    let should = &found[..4];
    assert_eq!(format!("{}{}", &is[2..], &is[..2]), should);
    assert_eq!(lab.status("tx_packets"), 0);
}

#[test]
fn the_empty_routing_table() {
    let Some(image) = image("debug-fault-route-1") else { return };
    let lab = Lab::new(&image, None);
    lab.only_vm_1_is_silent();
    assert!(lab.received() > 0 && lab.traced() > 0);
    assert_eq!(lab.snmp("Tcp", "InCsumErrors"), 0);
    assert!(lab.snmp("Ip", "OutNoRoutes") > 0);
    assert!(!lab.ask("route -n").contains("eth0"));
    let dump = lab.dump();
    assert!(dump.contains("[S]") && !dump.contains("[S.]") && !dump.contains("who-has"), "{dump}");
    lab.ask("route add -net 10.77.0.0 netmask 255.255.0.0 eth0");
    assert!(lab.get(1, Duration::from_secs(10)).is_some());
}
