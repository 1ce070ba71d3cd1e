//! The JSON report of a run. Keys are stable; docs/report.md says what they mean.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::fleet::{Fleet, Life, VmStatus};
use crate::net::counters::Snapshot;

/// Failures that are listed at most; `failures_total` counts all.
const FAILURES: usize = 64;

/// The report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Version of the emulator.
    pub version: &'static str,
    /// Why the run ended with a non-zero status; null if it didn't.
    pub error: Option<String>,
    /// VMs asked for.
    pub vms: u32,
    /// `cpu` or `cuda`; null if none was opened.
    pub backend: Option<&'static str>,
    /// The engine.
    pub engine: Option<String>,
    /// READY lines.
    pub ready: Ready,
    /// Answers to HTTP requests; null if none were made.
    pub http: Option<Http>,
    /// Speed while booting.
    pub mips: Mips,
    /// Memory at the end.
    pub memory: Memory,
    /// Frames.
    pub net: Net,
    /// The guest image.
    pub image: Image,
    /// VMs that failed or stopped in all.
    pub failures_total: u32,
    /// The first of them.
    pub failures: Vec<Failure>,
}

/// READY lines.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Ready {
    /// VMs that became ready.
    pub vms: u32,
    /// When the first did.
    pub seconds_first: Option<f64>,
    /// When the last did.
    pub seconds_last: Option<f64>,
    /// Instructions retired up to READY.
    pub instructions: Option<Spread>,
}

/// The spread of a figure over the VMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// Least.
    pub min: u64,
    /// Median; of an even number of VMs the lower of the middle two.
    pub median: u64,
    /// Most.
    pub max: u64,
}

/// HTTP answers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Http {
    /// VMs that answered with status 200.
    pub vms: u32,
    /// When the first did.
    pub seconds_first: Option<f64>,
    /// When the last did.
    pub seconds_last: Option<f64>,
}

/// Speed.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Mips {
    /// Of one VM on average.
    pub per_vm: f64,
    /// Of the fleet.
    pub total: f64,
    /// Of one engine while it runs.
    pub per_engine: f64,
}

/// Memory.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Memory {
    /// What all VMs share.
    pub shared_bytes: u64,
    /// RAM that belongs to one VM each.
    pub private_bytes: u64,
    /// Everything else.
    pub overhead_bytes: u64,
    /// All of it, divided by the VMs.
    pub bytes_per_vm: u64,
}

/// Frames.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Net {
    /// Given to guests.
    pub packets_in: u64,
    /// Taken from guests.
    pub packets_out: u64,
    /// Dropped on the way.
    pub drops: u64,
    /// Those of them that the bridge dropped, by reason (docs/network.md).
    pub drops_by_reason: BTreeMap<&'static str, u64>,
}

/// The image.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Image {
    /// Hash of its manifest; null if it could not be loaded.
    pub manifest_hash: Option<String>,
}

/// A VM that does not run any more, or did not reach what was waited for.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// VM number.
    pub vm: u32,
    /// As in `status`.
    pub state: &'static str,
    /// Why.
    pub reason: String,
    /// The last lines of its console.
    pub console: Vec<String>,
}

impl Failure {
    /// Of a VM of the fleet.
    pub fn of(fleet: &Fleet, status: &VmStatus) -> Self {
        Self {
            vm: status.vm,
            state: status.state(),
            reason: status.reason(),
            console: fleet.last_lines(status.vm),
        }
    }
}

/// When booting was over and what had been done by then, for `mips`.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// From the first slice to the last READY, or to the end.
    pub took: Duration,
    /// Steps of the fleet in that time.
    pub steps: u64,
    /// Time spent in all engines by then.
    pub engine_time: Duration,
}

impl Report {
    /// A report of a run that has only begun.
    pub fn new(vms: u32) -> Self {
        Self { version: env!("CARGO_PKG_VERSION"), vms, ..Self::default() }
    }

    /// Adds what the fleet has come to.
    pub fn add_fleet(&mut self, fleet: &Fleet, boot: Boot, bridge: &Snapshot) {
        let totals = fleet.totals();
        self.backend = Some(fleet.backend());
        self.engine = Some(fleet.engine());
        let mut seconds: Vec<f64> = Vec::new();
        let mut instructions: Vec<u64> = Vec::new();
        for vm in 0..fleet.vms() {
            let status = fleet.status(vm);
            if let Some(ready) = status.ready {
                seconds.push(ready.after.as_secs_f64());
                instructions.push(ready.instructions);
            }
            if matches!(status.life, Life::Failed(_) | Life::Stopped) {
                self.failures_total += 1;
                if self.failures.len() < FAILURES {
                    self.failures.push(Failure::of(fleet, &status));
                }
            }
        }
        self.ready = Ready {
            vms: fleet.been_ready(),
            seconds_first: seconds.iter().copied().reduce(f64::min),
            seconds_last: seconds.iter().copied().reduce(f64::max),
            instructions: spread(&mut instructions),
        };
        let rate = |span: Duration| match span.as_secs_f64() {
            0.0 => 0.0,
            seconds => boot.steps as f64 / seconds / 1e6,
        };
        let vms = fleet.vms().max(1);
        self.mips = Mips {
            total: rate(boot.took),
            per_vm: rate(boot.took) / f64::from(vms),
            per_engine: rate(boot.engine_time),
        };
        let memory = totals.memory;
        self.memory = Memory {
            shared_bytes: memory.shared_bytes,
            private_bytes: memory.private_bytes,
            overhead_bytes: memory.overhead_bytes,
            bytes_per_vm: (memory.shared_bytes + memory.private_bytes + memory.overhead_bytes)
                / u64::from(vms),
        };
        self.net = Net {
            packets_in: totals.counters.rx_frames,
            packets_out: totals.counters.tx_frames,
            drops: totals.counters.dropped + bridge.drops_total(),
            drops_by_reason: bridge
                .drops()
                .filter(|(_, count)| *count > 0)
                .map(|(reason, count)| (reason.name(), count))
                .collect(),
        };
    }

    /// Adds a VM that did not reach what was waited for, unless it is listed already.
    pub fn add_failure(&mut self, failure: Failure) {
        if self.failures.iter().any(|known| known.vm == failure.vm) {
            return;
        }
        self.failures_total += 1;
        if self.failures.len() < FAILURES {
            self.failures.push(failure);
        }
    }

    /// The document.
    pub fn to_json(&self) -> String {
        // Plain numbers, strings and lists always have a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Writes the document; `path` holds the old one or the new one, never a part.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let mut file = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))?;
        file.write_all(self.to_json().as_bytes())?;
        file.as_file().sync_all()?;
        #[cfg(unix)]
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.persist(path)?;
        Ok(())
    }
}

fn spread(values: &mut [u64]) -> Option<Spread> {
    values.sort_unstable();
    let (&min, &max) = (values.first()?, values.last()?);
    Some(Spread { min, median: values[(values.len() - 1) / 2], max })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(spread(&mut []), None);
        assert_eq!(spread(&mut [5]), Some(Spread { min: 5, median: 5, max: 5 }));
        assert_eq!(spread(&mut [9, 1, 4, 2]), Some(Spread { min: 1, median: 2, max: 9 }));
    }

    #[test]
    fn a_report_replaces_the_old_one_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        std::fs::write(&path, "x".repeat(100_000)).unwrap();
        Report::new(3).write(&path).unwrap();
        let value: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(value["vms"], 3);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(Report::new(3).write(&folder.path().join("none/report.json")).is_err());
    }
}
