//! What a benchmark tells: rows of a table, and a JSON document.

use std::io::Write as _;
use std::path::Path;

use serde::Serialize;

/// The JSON document.
#[derive(Serialize)]
pub struct Document {
    /// The GPU, or the processor if no GPU took part.
    pub device: String,
    /// The host's processor and how many cores it has.
    pub host: String,
    pub driver: Option<String>,
    pub commit: Option<String>,
    /// Hash of the image's manifest.
    pub image: String,
    /// Instructions that a guest has executed when it says READY, as our machine counts them.
    pub instructions_to_ready: Option<u64>,
    pub rows: Vec<Row>,
}

/// One phase of one size: medians over the runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// `cuda`, `cpu`, or a peer's name.
    pub backend: String,
    pub engine: String,
    /// `boot`: from the first launch to the last READY; `steady`: every VM's shell in a loop; `http`: page requests.
    pub phase: &'static str,
    /// VMs at once; of peers, processes.
    pub vms: u32,
    pub ram_bytes: u64,
    /// CPU threads that run VMs; none on a GPU.
    pub threads: Option<u32>,
    /// How long a launch was to take, if it was given.
    pub slice_ms: Option<u32>,
    pub registers: Option<u32>,
    /// Whether all runs began with decoded code of an earlier start; none where there is none to keep.
    pub kept_code: Option<bool>,
    pub runs: u32,
    pub mips_per_vm: Option<f64>,
    pub gips_total: Option<f64>,
    /// From the first launch (of peers: from the first process' start) to the last READY.
    pub seconds_to_ready: Option<f64>,
    /// From nothing to machines that can run.
    pub seconds_to_open: Option<f64>,
    /// From nothing until the last VM has answered GET / with 200.
    pub seconds_to_http: Option<f64>,
    pub requests_per_s: Option<f64>,
    pub requests_failed: Option<u64>,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub bytes_per_vm: Option<u64>,
    /// Least and most of the runs: of `requests_per_s` where the phase is `http`, else of `gips_total`.
    pub spread: [f64; 2],
}

/// Heads of the table's columns.
pub const HEAD: &str = "backend  engine        VMs  RAM MiB  phase   s to READY  s to HTTP     GIPS   MIPS/VM    req/s   p50 ms   \
                        p99 ms   KiB/VM";

impl Row {
    /// A line of the table.
    pub fn line(&self) -> String {
        let real = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        format!(
            "{:7}  {:10}  {:5}  {:7}  {:6}  {:>10}  {:>9}  {:>7}  {:>8}  {:>7}  {:>7}  {:>7}  {:>7}",
            self.backend,
            self.engine,
            self.vms,
            self.ram_bytes >> 20,
            self.phase,
            real(self.seconds_to_ready, 3),
            real(self.seconds_to_http, 3),
            real(self.gips_total, 3),
            real(self.mips_per_vm, 3),
            real(self.requests_per_s, 0),
            real(self.p50_ms, 2),
            real(self.p99_ms, 2),
            real(self.bytes_per_vm.map(|bytes| bytes as f64 / 1024.0), 0),
        )
    }
}

impl Document {
    /// Prints a row and keeps it.
    pub fn add(&mut self, row: Row) {
        // A reader that has gone is no reason to stop measuring.
        let _ = writeln!(std::io::stdout(), "{}", row.line());
        self.rows.push(row);
    }

    /// Writes the document, whole or not at all.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        // Plain numbers, strings and lists always have a JSON form.
        writeln!(file, "{}", serde_json::to_string_pretty(self).unwrap_or_default())?;
        #[cfg(unix)]
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.persist(path)?;
        Ok(())
    }
}

/// The middle one, or the mean of the middle two; none of none.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[n / 2]),
        n => Some(f64::midpoint(sorted[n / 2 - 1], sorted[n / 2])),
    }
}

/// Least and most.
pub fn spread(values: &[f64]) -> [f64; 2] {
    let least = values.iter().copied().reduce(f64::min).unwrap_or_default();
    [least, values.iter().copied().reduce(f64::max).unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_spreads() {
        assert_eq!((median(&[]), spread(&[])), (None, [0.0; 2]));
        assert_eq!(median(&[9.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 9.0]), [1.0, 9.0]);
    }

    #[test]
    fn a_line_has_a_place_for_each_column() {
        let row =
            Row { backend: "cuda".into(), engine: "w".into(), phase: "boot", vms: 32_768, ..Row::default() };
        assert_eq!(row.line().split_whitespace().count(), 13);
        assert_eq!(row.line().len(), HEAD.len());
        assert_eq!(
            HEAD.replace("RAM MiB", "RAM").replace(" to ", "-").replace(" ms", "").split_whitespace().count(),
            13
        );
    }
}
