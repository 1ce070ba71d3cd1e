//! Beside a fleet: where the program's own time goes (`--profile-host`), and what is kept for the next start.

use std::fmt::Write as _;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use emulator::fleet::Fleet;

/// How long each part of the start took.
pub struct Phases {
    last: Instant,
    /// For people.
    pub text: String,
}

impl Phases {
    /// From the start of the program.
    pub fn new(started: Instant) -> Self {
        Self { last: started, text: "Start:".into() }
    }

    /// A part is over.
    pub fn end(&mut self, what: &str) {
        let now = Instant::now();
        // Writing to a string can't fail.
        let _ = write!(self.text, " {what} {:.3} s;", (now - self.last).as_secs_f64());
        self.last = now;
    }
}

/// Where the workers' time went.
pub fn work(fleet: &Fleet) -> String {
    let work = fleet.work();
    format!(
        "{:.3} s; {} calls of engines, {} slices; all workers together waited {:.3} s, prepared {:.3} s, were in engines \
         {:.3} s, settled {:.3} s",
        fleet.started().elapsed().as_secs_f64(),
        work.calls,
        work.slices,
        work.waiting.as_secs_f64(),
        work.preparing.as_secs_f64(),
        work.engine.as_secs_f64(),
        work.settling.as_secs_f64(),
    )
}

/// Keeps what makes the next start faster.
pub fn keep(fleet: &Fleet) {
    for line in fleet.keep() {
        tracing::warn!("{line}");
    }
}

/// The same beside the fleet, which serves meanwhile.
pub fn keep_in_background(fleet: &Arc<Fleet>) -> Option<JoinHandle<()>> {
    let fleet = fleet.clone();
    // Without a thread it is done at the end.
    std::thread::Builder::new().name("keep".into()).spawn(move || keep(&fleet)).ok()
}
