//! Guest time: virtual until READY, then, if asked, along the wall clock.
//!
//! While VMs wait for their turn to boot, the world's time goes on and theirs does not. At READY a VM's time takes one
//! step ahead, to where it would be had it followed the wall clock since the fleet started: its clock is right from then
//! on. To the guest that is a long sleep.

use std::time::{Duration, Instant};

use crate::abi::{TIME_REAL, TIME_VIRTUAL, TIMEBASE_HZ};

/// How guest time passes once a VM has booted. Boots are always in virtual time: they are deterministic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeMode {
    /// With retired instructions, jumping over idle stretches.
    Virtual,
    /// With the wall clock, from READY on.
    Real,
}

/// Ticks of the guest's timer in `span`, rounded down.
pub fn ticks(span: Duration) -> u64 {
    u64::try_from(span.as_nanos() * u128::from(TIMEBASE_HZ) / 1_000_000_000).unwrap_or(u64::MAX)
}

/// The shortest span that has `ticks` ticks.
pub fn span(ticks: u64) -> Duration {
    let nanos = (u128::from(ticks) * 1_000_000_000).div_ceil(u128::from(TIMEBASE_HZ));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// One VM's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// Since when guest time follows the wall clock, and the guest time at that moment.
    real_since: Option<(Instant, u64)>,
}

impl Clock {
    /// From `now`, when guest time is `at_ticks`, guest time follows the wall clock; tick 0 was at `epoch`.
    pub fn follow_wall(&mut self, epoch: Instant, now: Instant, at_ticks: u64) {
        let wall = ticks(now.saturating_duration_since(epoch));
        self.real_since.get_or_insert((now, at_ticks.max(wall)));
    }

    /// `time_mode` and `now_ticks` of a slice request.
    pub fn request(&self, now: Instant) -> (u32, u64) {
        match self.real_since {
            None => (TIME_VIRTUAL, 0),
            Some((since, base)) => {
                (TIME_REAL, base.saturating_add(ticks(now.saturating_duration_since(since))))
            }
        }
    }

    /// When to wake a VM that sleeps until `wake_ticks`; none if no timer is set, or it is too far to count.
    pub fn wake_at(&self, wake_ticks: u64) -> Wake {
        if wake_ticks == u64::MAX {
            return Wake::Never;
        }
        match self.real_since {
            // Virtual time jumps inside the machine; what is left to do there needs no wait.
            None => Wake::Now,
            Some((since, base)) => {
                since.checked_add(span(wake_ticks.saturating_sub(base))).map_or(Wake::Never, Wake::At)
            }
        }
    }
}

/// What ends a VM's sleep besides frames and console input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Nothing.
    Never,
    /// It need not sleep.
    Now,
    /// A timer.
    At(Instant),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_spans_agree() {
        assert_eq!(ticks(Duration::from_secs(1)), 65_000_000);
        for n in [0, 1, 2, 64, 65, 999_999, 65_000_001, 1 << 40] {
            assert!(ticks(span(n)) >= n, "a timer of {n} ticks would be early");
            assert!(ticks(span(n)) <= n + 1);
        }
        assert_eq!(span(u64::MAX - 1), Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn real_time_starts_at_the_wall_clock_but_never_goes_back() {
        let mut clock = Clock::default();
        let start = Instant::now();
        assert_eq!(clock.request(start), (TIME_VIRTUAL, 0));
        assert_eq!(clock.wake_at(5), Wake::Now);
        assert_eq!(clock.wake_at(u64::MAX), Wake::Never);
        clock.follow_wall(start, start, 1000);
        assert_eq!(clock.request(start), (TIME_REAL, 1000));
        let later = start + Duration::from_secs(2);
        assert_eq!(clock.request(later), (TIME_REAL, 1000 + 130_000_000));
        assert_eq!(clock.wake_at(1000 + 65_000_000), Wake::At(start + Duration::from_secs(1)));
        // A second READY does not turn the clock back.
        clock.follow_wall(start, later, 7);
        assert_eq!(clock.request(later), (TIME_REAL, 1000 + 130_000_000));
        assert_eq!(clock.wake_at(u64::MAX), Wake::Never);
        // A VM that came late to its turn.
        let mut clock = Clock::default();
        clock.follow_wall(start, later, 1000);
        assert_eq!(clock.request(later), (TIME_REAL, 130_000_000));
        assert_eq!(clock.wake_at(130_000_000 + 65_000_000), Wake::At(start + Duration::from_secs(3)));
    }
}
