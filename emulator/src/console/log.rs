//! Console logs of all VMs: one thread writes them, few files are open at a time, each is bounded.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::sync::lock;

/// Limits of the logs.
#[derive(Clone, Copy, Debug)]
pub struct LogLimits {
    /// Bytes of one file; then it becomes `.old` (which replaces the one before) and a new one begins.
    pub file_bytes: u64,
    /// Files open at a time.
    pub open_files: usize,
    /// Bytes of one VM that wait to be written; more are dropped, and the log says so.
    pub waiting_bytes: usize,
    /// How long output waits at most before it is written.
    pub delay: Duration,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self {
            file_bytes: 512 * 1024,
            open_files: 64,
            waiting_bytes: 64 * 1024,
            delay: Duration::from_millis(200),
        }
    }
}

/// Where the logs go. Dropping it writes what is left.
pub struct Logs {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    more: Condvar,
    limits: LogLimits,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u32, Waiting>,
    closing: bool,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    dropped: u64,
}

impl Logs {
    /// Logs in `folder`, which is created; logs of an earlier fleet in it are removed before anything is written.
    pub fn create(folder: &Path, limits: LogLimits) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        // Removing thousands of logs takes its time: the thread does it, and what can be told now is whether it may look.
        let earlier = fs::read_dir(folder)?;
        let shared = Arc::new(Shared { state: Mutex::default(), more: Condvar::new(), limits });
        let files = Files { folder: folder.to_owned(), limits, open: VecDeque::new(), warned: false };
        let writer = {
            let shared = shared.clone();
            std::thread::Builder::new().name("logs".into()).spawn(move || {
                remove_logs(earlier);
                shared.write(files);
            })?
        };
        Ok(Self { shared, writer: Mutex::new(Some(writer)) })
    }

    /// Writes what is left. What comes later is lost.
    pub fn close(&self) {
        lock(&self.shared.state).closing = true;
        self.shared.more.notify_one();
        if let Some(writer) = lock(&self.writer).take() {
            // A panic of the writer has been printed; there is nothing to add.
            let _ = writer.join();
        }
    }

    /// Appends to a VM's log, soon.
    pub fn append(&self, vm: u32, bytes: &[u8]) {
        let mut state = lock(&self.shared.state);
        if state.closing {
            return;
        }
        let was_empty = state.waiting.is_empty();
        let waiting = state.waiting.entry(vm).or_default();
        let room = self.shared.limits.waiting_bytes.saturating_sub(waiting.bytes.len());
        let taken = bytes.len().min(room);
        waiting.bytes.extend_from_slice(&bytes[..taken]);
        waiting.dropped += (bytes.len() - taken) as u64;
        if was_empty {
            self.shared.more.notify_one();
        }
    }
}

/// Removes all logs that are there.
fn remove_logs(entries: fs::ReadDir) {
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("vm-")
            && (name.ends_with(".log") || name.ends_with(".log.old"))
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::warn!("{}: a log of an earlier fleet can't be removed: {error}", path.display());
        }
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn write(&self, mut files: Files) {
        loop {
            let idle = |s: &mut State| s.waiting.is_empty() && !s.closing;
            let state = self.more.wait_while(lock(&self.state), idle).unwrap_or_else(PoisonError::into_inner);
            // Let output gather, so that a chatty fleet costs few writes.
            let (mut state, _) = self
                .more
                .wait_timeout_while(state, self.limits.delay, |s| !s.closing)
                .unwrap_or_else(PoisonError::into_inner);
            let waiting = std::mem::take(&mut state.waiting);
            let closing = state.closing;
            drop(state);
            for (vm, waiting) in waiting {
                files.append(vm, &waiting);
            }
            if closing {
                return;
            }
        }
    }
}

/// The open files, least recently used first.
struct Files {
    folder: PathBuf,
    limits: LogLimits,
    open: VecDeque<(u32, File, u64)>,
    warned: bool,
}

impl Files {
    fn append(&mut self, vm: u32, waiting: &Waiting) {
        let result = self.try_append(vm, waiting);
        if let Err(error) = result {
            // The file may hold half a write, or none: open it afresh next time.
            self.open.retain(|(n, ..)| *n != vm);
            if !std::mem::replace(&mut self.warned, true) {
                tracing::warn!(
                    "console log {}: {error}; console output is lost until it can be written, the fleet goes on",
                    self.path(vm).display()
                );
            }
        }
    }

    fn try_append(&mut self, vm: u32, waiting: &Waiting) -> io::Result<()> {
        self.write(vm, &waiting.bytes)?;
        if waiting.dropped > 0 {
            self.write(vm, format!("\n[{} bytes not logged]\n", waiting.dropped).as_bytes())?;
        }
        Ok(())
    }

    fn write(&mut self, vm: u32, bytes: &[u8]) -> io::Result<()> {
        let (_, mut file, mut len) = match self.open.iter().position(|(n, ..)| *n == vm) {
            Some(at) => self.open.remove(at).ok_or(io::ErrorKind::NotFound)?,
            None => self.open_log(vm)?,
        };
        if len > 0 && len + bytes.len() as u64 > self.limits.file_bytes {
            let path = self.path(vm);
            fs::rename(&path, path.with_extension("log.old"))?;
            (_, file, len) = self.open_log(vm)?;
        }
        file.write_all(bytes)?;
        len += bytes.len() as u64;
        while self.open.len() >= self.limits.open_files.max(1) {
            self.open.pop_front();
        }
        self.open.push_back((vm, file, len));
        Ok(())
    }

    fn open_log(&self, vm: u32) -> io::Result<(u32, File, u64)> {
        let mut options = OpenOptions::new();
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.append(true).create(true).open(self.path(vm))?;
        let len = file.metadata()?.len();
        Ok((vm, file, len))
    }

    fn path(&self, vm: u32) -> PathBuf {
        log_path(&self.folder, vm)
    }
}

/// The log of a VM in the logs' folder.
pub fn log_path(folder: &Path, vm: u32) -> PathBuf {
    folder.join(format!("vm-{vm:05}.log"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> LogLimits {
        LogLimits { file_bytes: 1000, open_files: 2, waiting_bytes: 400, delay: Duration::ZERO }
    }

    #[test]
    fn many_vms_few_open_files() {
        let folder = tempfile::tempdir().unwrap();
        let mut files =
            Files { folder: folder.path().into(), limits: limits(), open: VecDeque::new(), warned: false };
        for round in 0..3 {
            for vm in 0..10 {
                let bytes = format!("vm {vm} round {round}\n").into_bytes();
                files.append(vm, &Waiting { bytes, dropped: 0 });
                assert!(files.open.len() <= 2);
            }
        }
        for vm in 0..10 {
            let text = fs::read_to_string(log_path(folder.path(), vm)).unwrap();
            assert_eq!(text, format!("vm {vm} round 0\nvm {vm} round 1\nvm {vm} round 2\n"));
        }
    }

    #[test]
    fn a_log_is_bounded_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let mut files =
            Files { folder: folder.path().into(), limits: limits(), open: VecDeque::new(), warned: false };
        for i in 0..100 {
            files.append(7, &Waiting { bytes: format!("{i:099}\n").into_bytes(), dropped: 0 });
        }
        let new = fs::read_to_string(log_path(folder.path(), 7)).unwrap();
        let old = fs::read_to_string(folder.path().join("vm-00007.log.old")).unwrap();
        assert!(new.len() <= 1000 && old.len() <= 1000);
        assert!(new.ends_with("99\n"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn earlier_logs_go_and_bursts_are_cut_with_a_note() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(log_path(folder.path(), 99), "stale").unwrap();
        fs::write(folder.path().join("notes.txt"), "mine").unwrap();
        let slow = LogLimits { delay: Duration::from_secs(60), ..limits() };
        let logs = Logs::create(folder.path(), slow).unwrap();
        logs.append(1, &[b'x'; 300]);
        logs.append(1, &[b'y'; 300]);
        logs.append(2, b"hello\n");
        drop(logs);
        let text = fs::read_to_string(log_path(folder.path(), 1)).unwrap();
        assert!(text.contains(&"y".repeat(100)) && !text.contains(&"y".repeat(101)));
        assert!(text.ends_with("\n[200 bytes not logged]\n"), "{text}");
        assert_eq!(fs::read_to_string(log_path(folder.path(), 2)).unwrap(), "hello\n");
        assert!(!log_path(folder.path(), 99).exists());
        assert!(folder.path().join("notes.txt").exists());
    }

    #[test]
    fn a_log_that_cannot_be_written_stops_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::create(folder.path(), limits()).unwrap();
        fs::create_dir(log_path(folder.path(), 3)).unwrap();
        logs.append(3, b"lost");
        logs.append(4, b"kept");
        drop(logs);
        assert_eq!(fs::read_to_string(log_path(folder.path(), 4)).unwrap(), "kept");
    }
}
