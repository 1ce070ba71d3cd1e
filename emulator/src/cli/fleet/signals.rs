//! Signals that ask for the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering::SeqCst};

use miette::{IntoDiagnostic, Result};
#[cfg(unix)]
use signal_hook::consts::SIGHUP;
use signal_hook::consts::{SIGINT, SIGTERM};

/// How often they are looked at where they can't be waited for.
#[cfg(not(unix))]
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// The number of the signal that asked for the end, or 0. A second signal ends the program at once.
#[cfg(unix)]
pub fn watch() -> Result<Arc<AtomicI32>> {
    let seen = Arc::new(AtomicI32::new(0));
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).into_diagnostic()?;
    let watcher = seen.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if watcher.swap(signal, SeqCst) != 0 {
                    signal_hook::low_level::exit(128 + signal);
                }
            }
        })
        .into_diagnostic()?;
    Ok(seen)
}

/// The number of the signal that asked for the end, or 0.
#[cfg(not(unix))]
pub fn watch() -> Result<Arc<AtomicI32>> {
    use std::sync::atomic::AtomicBool;
    let seen = Arc::new(AtomicI32::new(0));
    for signal in [SIGINT, SIGTERM] {
        let flag = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(signal, flag.clone()).into_diagnostic()?;
        let seen = seen.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                while !flag.load(SeqCst) {
                    std::thread::sleep(PAUSE);
                }
                seen.store(signal, SeqCst);
            })
            .into_diagnostic()?;
    }
    Ok(seen)
}
