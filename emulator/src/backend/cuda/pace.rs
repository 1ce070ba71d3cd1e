//! How many instructions each VM of the next launch runs at most, and for how long, so that it takes about as long as
//! wanted. Time is the limit that counts: a launch ends with the last of its VMs, and VMs that run the same number of
//! instructions end far apart. Instructions are one for VMs that never come to where they could look at the clock.

use std::time::Duration;

use crate::abi::{EXIT_BUDGET, SliceResult};

/// The first launch: short on the slowest device.
const FIRST: u64 = 20_000;
/// Never less: a launch costs some 10 us.
const LEAST: u64 = 2_000;
/// Never more: a VM whose neighbours sleep may run far faster than it did among them.
const MOST: u64 = 4_000_000;

/// The budget is for so many times the time.
const SLACK: u64 = 2;
/// A VM's time is never less than this part of the launch's.
const SHARE_LEAST: u32 = 64;

/// The pace of one engine.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Instructions that take as long as wanted.
    fitting: u64,
    target: Duration,
    /// For how long VMs run: as long as a launch, if they all run at once.
    time: Duration,
}

impl Pace {
    /// Launches are to take about `target`.
    pub fn new(target: Duration) -> Self {
        Self { fitting: FIRST, target, time: target }
    }

    /// Instructions for the next launch.
    pub fn budget(&self) -> u64 {
        self.fitting * SLACK
    }

    /// For how long a VM runs that may execute so many instructions.
    pub fn time(&self, budget: u64) -> Duration {
        let nanos = self.time.as_nanos() * u128::from(budget) / u128::from(self.budget());
        Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX))
    }

    /// Learns from a launch that took `took`. Only slices that used up their budget or their time tell how fast the device
    /// is; `budget` was the largest.
    pub fn learn(&mut self, took: Duration, budget: u64, results: &[SliceResult]) {
        let full =
            results.iter().filter(|result| result.exit == EXIT_BUDGET).map(|result| result.steps).max();
        let nanos = took.as_nanos().max(1);
        if full.is_some() {
            let wanted = self.target.as_nanos() * u128::from(budget) / u128::from(self.budget());
            let time = Duration::from_nanos(
                (self.time.as_nanos() * wanted / nanos).try_into().unwrap_or(u64::MAX),
            );
            self.time = time.clamp(self.time / 2, self.time * 2).clamp(self.target / SHARE_LEAST, self.target);
        }
        let goal = match full {
            Some(steps) => u128::from(steps) * self.target.as_nanos() / nanos,
            // Rare operations alone took too long.
            None if took > self.target * 2 => u128::from(self.fitting) * self.target.as_nanos() / nanos,
            None => return,
        };
        // At most twice or half of the last: one odd launch does not throw it off.
        let goal = u64::try_from(goal).unwrap_or(MOST).clamp(self.fitting / 2, self.fitting * 2);
        self.fitting = goal.clamp(LEAST, MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(steps: u64, exit: u32) -> SliceResult {
        SliceResult { steps, exit, ..SliceResult::default() }
    }

    #[test]
    fn it_settles_at_the_target() {
        let mut pace = Pace::new(Duration::from_millis(8));
        // 7 million instructions a second, and 20 us for the launch itself
        let time = |steps: u64| Duration::from_nanos(steps * 1_000 / 7 + 20_000);
        for _ in 0..20 {
            let budget = pace.budget();
            pace.learn(time(budget), budget, &[ran(budget, EXIT_BUDGET), ran(5, crate::abi::EXIT_IDLE)]);
        }
        let took = time(pace.budget());
        assert!(took > Duration::from_micros(7_500) && took < Duration::from_micros(8_100), "{took:?}");
    }

    #[test]
    fn it_moves_in_steps_and_within_bounds() {
        let mut pace = Pace::new(Duration::from_millis(8));
        pace.learn(Duration::from_secs(1), &[ran(FIRST, EXIT_BUDGET)]);
        assert_eq!(pace.budget(), FIRST / 2);
        for _ in 0..30 {
            pace.learn(Duration::from_secs(9), &[ran(pace.budget(), EXIT_BUDGET)]);
        }
        assert_eq!(pace.budget(), LEAST);
        for _ in 0..30 {
            pace.learn(Duration::ZERO, &[ran(pace.budget(), EXIT_BUDGET)]);
        }
        assert_eq!(pace.budget(), MOST);
    }

    #[test]
    fn idle_guests_teach_nothing_unless_they_are_slow() {
        let mut pace = Pace::new(Duration::from_millis(8));
        pace.learn(Duration::from_micros(50), &[ran(10, crate::abi::EXIT_IDLE)]);
        assert_eq!(pace.budget(), FIRST);
        pace.learn(Duration::from_millis(16), &[ran(10, crate::abi::EXIT_IDLE)]);
        assert_eq!(pace.budget(), FIRST);
        pace.learn(Duration::from_millis(80), &[ran(10, crate::abi::EXIT_IDLE)]);
        assert_eq!(pace.budget(), FIRST / 2);
    }
}
