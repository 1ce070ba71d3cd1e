//! Other emulators on the same host with the same guest: from a process' start to READY on its console. One process, and
//! one for each core. Their instructions are those that our machine counts for this guest; theirs differ a little, as timer
//! interrupts come at other moments.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use serde::Deserialize;

use super::table::{Row, median, spread};

/// What a guest says when it serves.
const READY: &[u8] = b"READY";
/// Of a console that never says it, so many bytes are shown.
const SHOWN: usize = 800;

/// A peer, as `cargo xtask bench` describes it.
#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    pub name: String,
    /// A path, or the name of a program; a path that is not absolute begins at `folder`.
    pub program: PathBuf,
    pub args: Vec<String>,
    /// Where it runs: relative to the file that says all this.
    pub folder: PathBuf,
    pub ram_bytes: u64,
}

/// The peers that a file describes.
pub fn read(path: &Path) -> Result<Vec<Peer>> {
    let text =
        std::fs::read(path).into_diagnostic().wrap_err_with(|| format!("--peers {}", path.display()))?;
    let mut peers: Vec<Peer> = serde_json::from_slice(&text)
        .into_diagnostic()
        .wrap_err_with(|| format!("--peers {}", path.display()))?;
    let base = path.parent().unwrap_or(Path::new("."));
    let base = std::path::absolute(base).into_diagnostic()?;
    for peer in &mut peers {
        peer.folder = base.join(&peer.folder);
        if peer.program.components().count() > 1 {
            peer.program = peer.folder.join(&peer.program);
        }
    }
    Ok(peers)
}

/// Boots `count` of them at once, `runs` times.
pub fn measure(peer: &Peer, count: u32, runs: u32, instructions: u64, patience: Duration) -> Result<Row> {
    let mut seconds = Vec::new();
    for _ in 0..runs {
        let took = boot(peer, count, patience)
            .wrap_err_with(|| format!("--peer {}: {count} at once, {}", peer.name, peer.program.display()))?;
        seconds.push(took.as_secs_f64());
    }
    let all = instructions as f64 * f64::from(count) / 1e9;
    let gips: Vec<f64> = seconds.iter().map(|seconds| all / seconds).collect();
    Ok(Row {
        backend: peer.name.clone(),
        engine: "process".into(),
        phase: "boot",
        vms: count,
        ram_bytes: peer.ram_bytes,
        threads: Some(count),
        runs,
        mips_per_vm: median(&gips).map(|gips| gips * 1000.0 / f64::from(count)),
        gips_total: median(&gips),
        seconds_to_ready: median(&seconds),
        spread: spread(&gips),
        ..Row::default()
    })
}

/// Processes that are ended on drop, whatever happens.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has ended by itself can't be killed, and needs not.
            let _ = child.kill();
        }
        for child in &mut self.0 {
            let _ = child.wait();
        }
    }
}

/// From the first process' start until all have said READY.
fn boot(peer: &Peer, count: u32, patience: Duration) -> Result<Duration> {
    let mut processes = Processes(Vec::new());
    let (send, receive) = mpsc::channel();
    let began = Instant::now();
    for n in 0..count as usize {
        let mut command = Command::new(&peer.program);
        // The input is open, and silent: at its end, some believe that there is always something to read.
        command.args(&peer.args).current_dir(&peer.folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::null());
        let mut child = command.spawn().into_diagnostic().wrap_err("it can't be started")?;
        if let Some(output) = child.stdout.take() {
            let send = send.clone();
            std::thread::spawn(move || watch(output, n, &send));
        }
        processes.0.push(child);
    }
    drop(send);
    let mut ready = 0;
    while ready < count {
        match receive.recv_timeout(patience.saturating_sub(began.elapsed())) {
            Ok((_, None)) => ready += 1,
            Ok((n, Some(console))) => {
                return Err(miette!("process {n} ended before it said READY; it said last:\n{console}"));
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(miette!("{ready} of {count} said READY within {} s", patience.as_secs()));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(miette!("{ready} of {count} said READY")),
        }
    }
    Ok(began.elapsed())
}

/// Reads a console to its end; tells when READY was said, or else what was said last.
fn watch(mut output: impl Read, n: usize, send: &mpsc::Sender<(usize, Option<String>)>) {
    let (mut console, mut buffer, mut ready) = (Vec::new(), [0; 4096], false);
    while let Ok(len @ 1..) = output.read(&mut buffer) {
        if ready {
            continue;
        }
        let from = console.len().saturating_sub(READY.len());
        console.extend_from_slice(&buffer[..len]);
        ready = console[from..].windows(READY.len()).any(|word| word == READY);
        if ready {
            // Nobody listens once all is known.
            let _ = send.send((n, None));
        }
    }
    if !ready {
        let last = String::from_utf8_lossy(&console[console.len().saturating_sub(SHOWN)..]).into_owned();
        let _ = send.send((n, Some(last)));
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn peer(program: &str, script: &str) -> Peer {
        let args = vec!["-c".to_owned(), script.to_owned()];
        Peer { name: "test".into(), program: program.into(), args, folder: "/".into(), ram_bytes: 1 << 20 }
    }

    #[test]
    fn a_boot_ends_with_the_last_ready() {
        let script = "sleep 0.2; printf 'hello\\nREA'; sleep 0.1; echo 'DY 0'; exec sleep 60";
        let row = measure(&peer("sh", script), 3, 2, 1_000_000, Duration::from_secs(20)).unwrap();
        let seconds = row.seconds_to_ready.unwrap();
        assert!((0.3..10.0).contains(&seconds), "{row:?}");
        assert!((row.gips_total.unwrap() * seconds - 0.003).abs() < 1e-3, "{row:?}");
        assert_eq!((row.vms, row.runs), (3, 2));
    }

    #[test]
    fn what_does_not_boot_is_told() {
        let say = |peer: &Peer, seconds| {
            format!("{:?}", measure(peer, 2, 1, 1, Duration::from_millis(seconds)).unwrap_err())
        };
        assert!(say(&peer("sh", "echo panic; exit 1"), 9000).contains("panic"));
        assert!(say(&peer("sh", "exec sleep 60"), 300).contains("0 of 2 said READY"));
        assert!(say(&peer("/no/such/program", ""), 300).contains("can't be started"));
    }

    #[test]
    fn peers_are_read_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("peers.json");
        let text = r#"[{"name":"a","program":"./x","args":["-k"],"folder":"a","ram_bytes":1},
            {"name":"b","program":"qemu","args":[],"folder":".","ram_bytes":2}]"#;
        std::fs::write(&file, text).unwrap();
        let peers = read(&file).unwrap();
        assert_eq!(peers[0].program, folder.path().join("a/./x"));
        assert_eq!(peers[1].program, Path::new("qemu"));
        assert!(read(&folder.path().join("none")).is_err());
    }
}
