//! Both builders make the same guest: their images are compared and booted. Takes as long as building them; runs only
//! where BUILDROOT_DIR names a tree.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::buildroot::release::VARIABLE;
use super::*;
use crate::emulator::{self, Show};

/// Settings of a kernel's .config that may differ: how it was made, not what it does.
const MADE: &[&str] = &["CONFIG_CC_VERSION_TEXT", "CONFIG_BUILD_SALT", "CONFIG_LOCALVERSION"];

/// What the guest says of its own programs, on the console.
const PROFILE: &str = r#"description: says what it has
extends: debug
init:
  - run sh -c "nginx -v 2>&1 | sed 's/^/SAME /'"
  - run sh -c "busybox 2>&1 | head -n 1 | cut -d' ' -f1,2 | sed 's/^/SAME /'"
  - run sh -c "tcpdump --version 2>&1 | head -n 2 | sed 's/^/SAME /'"
  - run sh -c "ethtool --version 2>&1 | sed 's/^/SAME /'"
  - run sh -c "iptables -V 2>&1 | sed 's/^/SAME /'"
  - run sh -c "ethtool -i eth0 2>&1 | grep -E 'driver|bus' | sed 's/^/SAME /'"
  - run sh -c "ethtool -S eth0 2>&1 | head -n 1 | sed 's/^/SAME /'"
  - run sh -c "lg-trace on 80 && iptables -t raw -S | sed 's/^/SAME /'"
  - run sh -c "tcpdump -i eth0 -n --immediate-mode -c 1 icmp 2> /dev/null | cut -d' ' -f2-6 | sed 's/^/SAME /' & sleep 1; ping -c 1 -W 1 10.77.0.1 > /dev/null; wait"
  - run sh -c "wc -l < /proc/kallsyms | sed 's/^/SAME kernel symbols /'"
  - run sh -c "busybox --list | wc -l | sed 's/^/SAME applets /'"
"#;

/// An image by one of the builders.
struct Made {
    dir: PathBuf,
    manifest: Manifest,
    parts: Parts,
    config: BTreeSet<String>,
}

fn make(root: &Path, profile: &str, builder: BuilderName) -> Made {
    let options = Options { builder: Some(builder), quiet: true, ..Options::default() };
    let image = ensure(root, profile, &options).unwrap_or_else(|e| panic!("{profile} by {builder:?}: {e}"));
    let cache = Cache::open().unwrap();
    let wanted = Wanted::find(root, &image.profile).unwrap();
    let parts = wanted.build(root, &cache, builder, true, &options.buildroot).unwrap();
    let folder = parts.image_path.parent().unwrap();
    let config = ["config", "config-linux"].iter().find_map(|n| std::fs::read_to_string(folder.join(n)).ok());
    let lines = config.unwrap();
    let config = lines.lines().filter(|l| l.starts_with("CONFIG_")).map(str::to_owned).collect();
    Made { dir: image.dir, manifest: image.manifest, parts, config }
}

/// Boots one VM until it serves its page; the report, and what was on the console.
fn boot(emulator: &Path, dir: &Path, port: &str) -> (serde_json::Value, String) {
    let state = tempfile::tempdir().unwrap();
    let report = state.path().join("report.json");
    let output = Command::new(emulator)
        .args([
            "fleet",
            "--vms",
            "1",
            "--backend",
            "cpu",
            "--seed",
            "1",
            "--until",
            "http",
            "--timeout",
            "120",
        ])
        .args(["--port-base", port, "--quiet", "--image"])
        .arg(dir)
        .arg("--state-dir")
        .arg(state.path())
        .arg("--report")
        .arg(&report)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    (report, logs(state.path()))
}

/// All console logs below a folder.
fn logs(folder: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            text.push_str(&logs(&path));
        } else if path.to_string_lossy().contains("console") {
            text.push_str(&String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default()));
        }
    }
    text
}

#[test]
fn both_builders_make_the_same_guest() {
    if std::env::var_os(VARIABLE).is_none_or(|v| v.is_empty()) {
        println!("SKIPPED: {VARIABLE} names no Buildroot tree");
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let emulator = emulator::build(root, Show::Errors).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let same = dir.path().join("same.yaml");
    std::fs::write(&same, PROFILE).unwrap();
    let same = same.to_str().unwrap().to_owned();
    for (profile, port) in [("lean", "24100"), ("debug", "24110"), (same.as_str(), "24120")] {
        let both = [BuilderName::Direct, BuilderName::Buildroot].map(|builder| make(root, profile, builder));
        let [direct, buildroot] = &both;
        let paths = |made: &Made| -> Vec<(String, u32, String)> {
            let shown = |node: &tree::Node| match &node.kind {
                Kind::File(_) => "file".to_owned(),
                Kind::Link(target) => format!("link to {target}"),
                _ => "folder".to_owned(),
            };
            let all = made.parts.tree.iter().filter(|(_, n)| !n.is_folder());
            all.map(|(path, node)| (path.clone(), node.mode, shown(node))).collect()
        };
        assert_eq!(paths(direct), paths(buildroot), "{profile}: other programs");
        let made = |line: &&String| !MADE.iter().any(|m| line.starts_with(m));
        let differ: Vec<&String> =
            direct.config.symmetric_difference(&buildroot.config).filter(made).collect();
        assert!(differ.is_empty(), "{profile}: other settings of the kernel: {differ:?}");
        let booted = both.iter().map(|made| boot(&emulator, &made.dir, port)).collect::<Vec<_>>();
        for (made, (report, _)) in both.iter().zip(&booted) {
            assert_eq!(report["ready"]["vms"], 1, "{profile}: {report}");
            assert_eq!(report["http"]["vms"], 1, "{profile}: {report}");
            let instructions = report["ready"]["instructions"]["max"].as_u64().unwrap();
            println!(
                "{profile} by {:?}: Image {}, initrd {}, READY after {instructions} instructions",
                made.manifest.builder,
                made.manifest.files["Image"].bytes,
                made.manifest.files["initrd.cpio"].bytes
            );
            if profile == "lean" {
                assert!(made.manifest.files["Image"].bytes <= 2_800_000);
                assert!(made.manifest.files["initrd.cpio"].bytes <= 1_200_000);
                assert!(instructions <= 15_000_000, "{instructions}");
                assert_eq!(made.manifest.layout.ram_bytes, 8 << 20);
            }
        }
        if profile == same {
            let told = |console: &str| -> Vec<String> {
                console.lines().filter(|l| l.contains("SAME ")).map(|l| l.trim().to_owned()).collect()
            };
            let [one, two] = [told(&booted[0].1), told(&booted[1].1)];
            assert!(one.iter().any(|l| l.contains("TRACE")), "{one:#?}");
            assert!(one.iter().any(|l| l.contains("virtio_net")), "{one:#?}");
            assert_eq!(one, two);
            assert!(one.iter().any(|l| l.contains("IP 10.77.0.2 > 10.77.0.1: ICMP")), "{one:#?}");
            // The page was asked for: iptables' TRACE and its LOG have seen that.
            for (_, console) in &booted {
                for seen in ["TRACE: raw:PREROUTING", "lg-trace: "] {
                    assert!(console.contains(seen), "{seen} is not on the console:\n{console}");
                }
            }
            println!("{one:#?}");
        }
    }
}
