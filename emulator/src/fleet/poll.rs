//! Busy polling: for a while after a packet came, threads look for the next one instead of sleeping. To wake a thread
//! takes some 50 us, and several are between a packet and its answer.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Until when threads do not sleep. Any thread may ask, and put it off.
pub(crate) struct BusyPoll {
    origin: Instant,
    /// Nanoseconds from `origin` on; 0 at first.
    until: AtomicU64,
}

impl Default for BusyPoll {
    fn default() -> Self {
        Self { origin: Instant::now(), until: AtomicU64::new(0) }
    }
}

impl BusyPoll {
    /// Nobody sleeps before `until`.
    pub fn extend(&self, until: Instant) {
        let nanos = until.saturating_duration_since(self.origin).as_nanos();
        self.until.fetch_max(nanos.try_into().unwrap_or(u64::MAX), Relaxed);
    }

    /// Until when, if that is after `now`.
    pub fn until(&self, now: Instant) -> Option<Instant> {
        let until = self.origin.checked_add(Duration::from_nanos(self.until.load(Relaxed)))?;
        (until > now).then_some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_end_holds() {
        let poll = BusyPoll::default();
        let now = Instant::now();
        assert_eq!(poll.until(now), None);
        poll.extend(now + Duration::from_secs(3));
        poll.extend(now + Duration::from_secs(2));
        assert_eq!(poll.until(now), Some(now + Duration::from_secs(3)));
        assert_eq!(poll.until(now + Duration::from_secs(3)), None);
    }
}
