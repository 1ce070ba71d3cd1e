//! One live line on the standard error output, and messages that don't garble it.

use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use emulator::fleet::Totals;

/// On a terminal, how often the line is redrawn.
const REDRAW: Duration = Duration::from_millis(200);
/// Elsewhere, how often a line is written.
const PERIOD: Duration = Duration::from_secs(5);
/// Whether a line stands on the terminal that a message has to clear.
static DRAWN: Mutex<bool> = Mutex::new(false);

/// Writes messages above the live line.
pub struct Messages;

impl Write for Messages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut drawn = DRAWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut err = io::stderr().lock();
        if std::mem::take(&mut *drawn) {
            err.write_all(b"\r\x1b[K")?;
        }
        err.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for Messages {
    type Writer = io::LineWriter<Messages>;

    fn make_writer(&'a self) -> Self::Writer {
        io::LineWriter::new(Messages)
    }
}

/// The live line.
pub struct Live {
    quiet: bool,
    terminal: bool,
    last: (Instant, Totals),
    text: String,
}

impl Live {
    /// A line that is not drawn yet; never, if `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self {
            quiet,
            terminal: io::stderr().is_terminal(),
            last: (Instant::now(), Totals::default()),
            text: String::new(),
        }
    }

    /// Whether it is time for [`Live::show`].
    pub fn due(&self) -> bool {
        let period = if self.terminal { REDRAW } else { PERIOD };
        !self.quiet && self.last.0.elapsed() >= period
    }

    /// Shows the fleet as it is now. `http`: how many VMs have answered, if that is asked for.
    pub fn show(&mut self, totals: Totals, http: Option<u32>) {
        if self.quiet {
            return;
        }
        let now = Instant::now();
        let span = now.duration_since(self.last.0).as_secs_f64();
        let mips = (totals.steps - self.last.1.steps) as f64 / span.max(1e-3) / 1e6;
        let mut text = line(&totals, http, mips);
        self.last = (now, totals);
        if self.terminal {
            // A line that wraps could not be drawn over. It is plain ASCII.
            #[cfg(unix)]
            let columns = rustix::termios::tcgetwinsize(io::stderr()).map_or(80, |size| size.ws_col);
            #[cfg(not(unix))]
            let columns = 80_u16;
            text.truncate(usize::from(columns.max(20)) - 1);
        }
        // A line that has not changed is no news in a log.
        if !self.terminal && text == self.text {
            return;
        }
        let mut drawn = DRAWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut err = io::stderr().lock();
        // A terminal that has gone is no reason to end the fleet.
        let _ = match self.terminal {
            true => write!(err, "\r\x1b[K{text}").and_then(|()| err.flush()),
            false => writeln!(err, "{text}"),
        };
        *drawn = self.terminal;
        self.text = text;
    }

    /// Leaves the line as it stands.
    pub fn finish(&self) {
        let mut drawn = DRAWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if std::mem::take(&mut *drawn) {
            // As above.
            let _ = writeln!(io::stderr());
        }
    }
}

fn line(totals: &Totals, http: Option<u32>, mips: f64) -> String {
    use std::fmt::Write;
    let mut text = format!("{}/{} VMs ready", totals.ready, totals.vms);
    let mut add = |part: std::fmt::Arguments<'_>| {
        // Writing to a string can't fail.
        let _ = text.write_fmt(part);
    };
    if let Some(http) = http {
        add(format_args!(", {http} answer"));
    }
    for (n, what) in [(totals.stopped, "stopped"), (totals.failed, "failed")] {
        if n > 0 {
            add(format_args!(", {n} {what}"));
        }
    }
    add(format_args!(" | {mips:.0} MIPS"));
    let counters = &totals.counters;
    add(format_args!(" | packets {} in, {} out", counters.rx_frames, counters.tx_frames));
    text
}
