//! Progress from Buildroot's build-time.log: which package is at which step, and about how long the rest takes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::super::step::clock;

/// A line: when, start or end, step, package.
#[derive(Clone, Debug, PartialEq)]
struct Line {
    time: f64,
    start: bool,
    step: String,
    package: String,
}

/// What is known of a build under way.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Package and step that began last and did not end.
    pub current: Option<(String, String)>,
    /// When that was, in seconds since 1970.
    pub since: f64,
    /// Packages that began, in order.
    pub begun: Vec<String>,
    /// Seconds that each package took.
    pub took: BTreeMap<String, f64>,
}

/// Follows a log.
#[derive(Debug)]
pub struct Timing {
    path: PathBuf,
    /// What was in it before this build.
    skip: usize,
    /// About how many seconds each package takes on two cores, the expensive ones.
    weights: BTreeMap<String, u64>,
    /// How many packages there will be.
    packages: usize,
}

impl Timing {
    /// Follows the log of an output folder, from its present end on.
    pub fn new(output: &Path, weights: BTreeMap<String, u64>, packages: usize) -> Self {
        let path = output.join("build/build-time.log");
        let skip = fs::read(&path).map_or(0, |b| b.len());
        Self { path, skip, weights, packages }
    }

    /// What the log tells now.
    pub fn state(&self) -> State {
        let bytes = fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(bytes.get(self.skip..).unwrap_or_default()).into_owned();
        state(&text)
    }

    /// In words, for the line that moves.
    pub fn tell(&self) -> Option<String> {
        let state = self.state();
        let (package, step) = state.current.as_ref()?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let running = if now > state.since { now - state.since } else { 0.0 };
        let left: u64 = self
            .weights
            .iter()
            .filter(|(name, _)| !state.took.contains_key(*name) || *name == package)
            .map(|(name, seconds)| {
                let before = state.took.get(name).copied().unwrap_or(0.0);
                seconds.saturating_sub(if name == package { (before + running) as u64 } else { 0 })
            })
            .sum();
        let count = state.begun.len();
        let of = self.packages.max(count);
        // Slower than thought: better no number than a wrong one.
        let rest = if left == 0 {
            String::new()
        } else {
            format!(", about {} left", clock(Duration::from_secs(left)))
        };
        Some(format!("{package} ({step}), package {count} of {of}{rest}"))
    }

    /// The packages that took longest, for the end.
    pub fn longest(&self, most: usize) -> String {
        let mut all: Vec<(String, f64)> = self.state().took.into_iter().filter(|(_, s)| *s >= 1.0).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        let words: Vec<String> =
            all.iter().take(most).map(|(name, seconds)| format!("{name} {seconds:.0} s")).collect();
        words.join(", ")
    }
}

fn parse(line: &str) -> Option<Line> {
    let mut parts = line.splitn(4, ':').map(str::trim);
    let time = parts.next()?.parse().ok()?;
    let start = match parts.next()? {
        "start" => true,
        "end" => false,
        _ => return None,
    };
    let (step, package) = (parts.next()?.to_owned(), parts.next()?.to_owned());
    Some(Line { time, start, step, package })
}

fn state(text: &str) -> State {
    let mut state = State::default();
    let mut began: Option<Line> = None;
    for line in text.lines().filter_map(parse) {
        if line.start {
            if !state.begun.contains(&line.package) {
                state.begun.push(line.package.clone());
            }
            state.current = Some((line.package.clone(), line.step.clone()));
            state.since = line.time;
            began = Some(line);
        } else if let Some(from) = began.take().filter(|b| b.package == line.package && b.step == line.step) {
            *state.took.entry(line.package).or_default() += (line.time - from.time).max(0.0);
            state.current = None;
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
1000.5:start:extract             : busybox
1002.5:end  :extract             : busybox
1003.0:start:build               : busybox
1063.0:end  :build               : busybox
1064.0:start:configure           : linux
1066.0:end  :configure           : linux
1066.0:start:build               : linux
half a li";

    #[test]
    fn the_log_tells_package_step_and_times() {
        let state = state(LOG);
        assert_eq!(state.current, Some(("linux".to_owned(), "build".to_owned())));
        assert_eq!(state.begun, ["busybox", "linux"]);
        assert_eq!(state.took.get("busybox"), Some(&62.0));
    }

    #[test]
    fn what_was_there_before_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("build")).unwrap();
        let path = dir.path().join("build/build-time.log");
        fs::write(&path, "1.0:start:build : old\n").unwrap();
        let weights =
            [("busybox".to_owned(), 60), ("linux".to_owned(), 200), ("nginx".to_owned(), 45)].into();
        let timing = Timing::new(dir.path(), weights, 9);
        assert_eq!(timing.tell(), None);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let log = LOG.replace("1066.0:start", &format!("{now}.0:start"));
        fs::write(&path, format!("1.0:start:build : old\n{log}")).unwrap();
        let told = timing.tell().unwrap();
        assert!(
            told.starts_with("linux (build), package 2 of 9, about 4 min left") || told.contains("5 min"),
            "{told}"
        );
        // Long over its time.
        fs::write(&path, format!("1.0:start:build : old\n{LOG}")).unwrap();
        assert_eq!(timing.tell().unwrap(), "linux (build), package 2 of 9, about 45 s left");
        assert_eq!(timing.longest(1), "busybox 62 s");
    }
}
