//! Steps of a build: child processes with a log each, one live line about how long it will take, and an error that
//! says what the child said last.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::error::Error;

/// Lines of a log that an error repeats.
const LAST_LINES: usize = 15;
/// How often a step without a terminal says that it is still there.
const HEARTBEAT: Duration = Duration::from_secs(60);

/// Tells a person what goes on, on standard error.
#[derive(Debug)]
pub struct Progress {
    quiet: bool,
    terminal: bool,
    steps: usize,
    done: usize,
}

/// A step under way.
#[derive(Debug)]
pub struct Step {
    title: String,
    log: PathBuf,
    start: Instant,
    beat: std::cell::Cell<Instant>,
    /// Where there is no terminal to draw on.
    plain: bool,
    head: String,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `quiet`: only errors and warnings are said.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, terminal: std::io::stderr().is_terminal(), steps: 0, done: 0 }
    }

    /// About how many steps there will be.
    pub fn expect(&mut self, steps: usize) {
        self.steps = steps;
    }

    /// How many steps there are still to come.
    pub fn remaining(&mut self, steps: usize) {
        self.steps = self.done + steps;
    }

    /// A line for the person.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    /// Does a step. `expected` is about how long it takes; what its children say goes to `log`.
    pub fn step<T>(
        &mut self,
        title: &str,
        expected: Duration,
        log: &Path,
        work: impl FnOnce(&Step) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.done += 1;
        self.steps = self.steps.max(self.done);
        let head = format!("[{}/{}] {title}", self.done, self.steps);
        if let Some(folder) = log.parent() {
            std::fs::create_dir_all(folder).map_err(|e| Error::io("make the folder", folder, e))?;
        }
        File::create(log).map_err(|e| Error::io("make", log, e))?;
        let start = Instant::now();
        let plain = !self.quiet && !self.terminal;
        let about = format!("about {}", clock(expected));
        let bar = (!self.quiet && self.terminal).then(|| live(&head, &about));
        let step = Step {
            title: title.to_owned(),
            log: log.to_owned(),
            start,
            beat: start.into(),
            plain,
            head: head.clone(),
            bar: bar.clone(),
        };
        if plain {
            eprintln!("{head}: {about}");
        }
        let result = work(&step);
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        if result.is_ok() {
            self.say(&format!("{head}: {:.1} s", start.elapsed().as_secs_f64()));
        }
        result
    }
}

/// The line that moves.
fn live(head: &str, about: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}: {elapsed} of {prefix}") {
        bar.set_style(style);
    }
    bar.set_message(head.to_owned());
    bar.set_prefix(about.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A duration as a person says it.
pub fn clock(time: Duration) -> String {
    match time.as_secs() {
        s if s < 90 => format!("{s} s"),
        s => format!("{} min", s.div_ceil(60)),
    }
}

impl Step {
    /// Runs a child to its end; `what` says in words what it does.
    pub fn run(&self, what: &str, child: duct::Expression) -> Result<(), Error> {
        let log = self.open_log(what)?;
        let copy = log.try_clone().map_err(|e| Error::io("use", &self.log, e))?;
        let child = child.stdin_null().stdout_file(log).stderr_file(copy).unchecked();
        self.wait(what, &child, &|| None).map(drop)
    }

    /// As [`Step::run`]; `tell` is asked now and then for what is going on.
    pub fn watch(
        &self,
        what: &str,
        child: duct::Expression,
        tell: &dyn Fn() -> Option<String>,
    ) -> Result<(), Error> {
        let log = self.open_log(what)?;
        let copy = log.try_clone().map_err(|e| Error::io("use", &self.log, e))?;
        let child = child.stdin_null().stdout_file(log).stderr_file(copy).unchecked();
        self.wait(what, &child, tell).map(drop)
    }

    /// Runs a child to its end and gives its standard output.
    pub fn read(&self, what: &str, child: duct::Expression) -> Result<String, Error> {
        let log = self.open_log(what)?;
        let child = child.stdin_null().stderr_file(log).stdout_capture().unchecked();
        let output = self.wait(what, &child, &|| None)?;
        String::from_utf8(output)
            .map_err(|_| Error::plain(format!("{what}: its output is not UTF-8"), self.help()))
    }

    fn open_log(&self, what: &str) -> Result<File, Error> {
        let failed = |e| Error::io("write", &self.log, e);
        let mut log = OpenOptions::new().append(true).create(true).open(&self.log).map_err(failed)?;
        writeln!(log, "--- {what}").map_err(failed)?;
        Ok(log)
    }

    fn wait(
        &self,
        what: &str,
        child: &duct::Expression,
        tell: &dyn Fn() -> Option<String>,
    ) -> Result<Vec<u8>, Error> {
        let handle = child.start().map_err(|e| self.not_started(what, &e))?;
        let output = loop {
            match handle.wait_timeout(Duration::from_millis(500)) {
                Ok(Some(output)) => break output,
                Ok(None) => self.heartbeat(tell),
                Err(e) => return Err(self.not_started(what, &e)),
            }
        };
        match output.status.success() {
            true => Ok(output.stdout.clone()),
            false => Err(self.failed(what, &output.status.to_string())),
        }
    }

    fn heartbeat(&self, tell: &dyn Fn() -> Option<String>) {
        if let Some(bar) = &self.bar
            && let Some(told) = tell()
        {
            bar.set_message(format!("{}: {told}", self.head));
        }
        if self.plain && self.beat.get().elapsed() >= HEARTBEAT {
            self.beat.set(Instant::now());
            let told = tell().map_or_else(|| self.title.clone(), |told| format!("{}: {told}", self.title));
            eprintln!("  {told}, after {}", clock(self.start.elapsed()));
        }
    }

    fn not_started(&self, what: &str, error: &std::io::Error) -> Error {
        Error::plain(format!("{}: cannot {what}: {error}", self.title), self.help())
    }

    /// The error for a child that ended badly.
    pub fn failed(&self, what: &str, status: &str) -> Error {
        let last = last_lines(&self.log, LAST_LINES);
        let mut text = format!("{}: could not {what} ({status})", self.title);
        if !last.is_empty() {
            text.push_str("; it said last:");
            for line in &last {
                text.push_str("\n  | ");
                text.push_str(line);
            }
        }
        let help = if last.iter().any(|l| l.contains("No space left on device")) {
            format!(
                "The disk is full: free some space, or set XDG_CACHE_HOME to a folder on another disk. Nothing \
                 half-made is kept. The whole log: {}",
                self.log.display()
            )
        } else {
            self.help()
        };
        Error::plain(text, help)
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    fn help(&self) -> String {
        format!("The whole log: {}", self.log.display())
    }
}

/// The last lines of a file that may be long, without empty ones.
pub fn last_lines(path: &Path, most: usize) -> Vec<String> {
    const ENOUGH: u64 = 16 * 1024;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(ENOUGH)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty() && !l.starts_with("--- ")).collect();
    lines.iter().skip(lines.len().saturating_sub(most)).map(|l| l.chars().take(300).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use duct::cmd;

    fn try_step(work: impl FnOnce(&Step) -> Result<String, Error>) -> Result<String, Error> {
        let dir = tempfile::tempdir().unwrap();
        Progress::new(true).step("the step", Duration::from_secs(1), &dir.path().join("logs/x.log"), work)
    }

    #[test]
    fn output_is_read_and_logged() {
        let text = try_step(|step| {
            step.run("speak", cmd!("sh", "-c", "echo one; echo two >&2"))?;
            assert_eq!(last_lines(&step.log, 9), ["one", "two"]);
            step.read("count", cmd!("sh", "-c", "echo three; echo four >&2"))
        });
        assert_eq!(text.unwrap(), "three\n");
    }

    #[test]
    fn a_failure_tells_step_task_status_and_last_lines() {
        let script = "for i in $(seq 40); do echo line $i; done; exit 7";
        let error = try_step(|step| step.run("count", cmd!("sh", "-c", script)).map(|()| String::new()));
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("the step: could not count (exit status: 7)"), "{text}");
        assert!(
            text.contains("| line 40") && text.contains("| line 26") && !text.contains("| line 25"),
            "{text}"
        );
    }

    #[test]
    fn a_missing_program_is_named_as_such() {
        let error =
            try_step(|step| step.read("dance", cmd!("/nonexistent/program"))).unwrap_err().to_string();
        assert!(error.contains("the step: cannot dance"), "{error}");
    }

    #[test]
    fn durations_are_round() {
        assert_eq!(clock(Duration::from_secs(45)), "45 s");
        assert_eq!(clock(Duration::from_secs(185)), "4 min");
    }
}
