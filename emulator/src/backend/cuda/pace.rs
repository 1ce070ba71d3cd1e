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

    /// For how long a VM runs that may execute so many instructions. None for fewer than [`Self::budget`]: the clock is
    /// looked at too seldom for short slices. They end after [`Self::short`] instructions.
    pub fn time(&self, budget: u64) -> Option<Duration> {
        let nanos = self.time.as_nanos() * u128::from(budget) / u128::from(self.budget());
        let time = Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX));
        (budget >= self.budget()).then_some(time)
    }

    /// The instructions of a short slice with this budget.
    pub fn short(budget: u64) -> u64 {
        (budget / SLACK).max(1)
    }

    /// Learns from a launch that took `took`. Only slices that used up their budget or their time tell how fast the device
    /// is; `budget` was the largest.
    pub fn learn(&mut self, took: Duration, budget: u64, results: &[SliceResult]) {
        let full =
            results.iter().filter(|result| result.exit == EXIT_BUDGET).map(|result| result.steps).max();
        let nanos = took.as_nanos().max(1);
        if full.is_some() && budget >= self.budget() {
            let wanted = self.target.as_nanos() * u128::from(budget) / u128::from(self.budget());
            let time =
                Duration::from_nanos((self.time.as_nanos() * wanted / nanos).try_into().unwrap_or(u64::MAX));
            self.time =
                time.clamp(self.time / 2, self.time * 2).clamp(self.target / SHARE_LEAST, self.target);
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

    /// A launch of as many waves of VMs, each as fast as it says in instructions a microsecond: what it takes, and what it
    /// did.
    fn launch(pace: &Pace, waves: u32, speeds: &[u64]) -> (Duration, Vec<SliceResult>) {
        let budget = pace.budget();
        let time = pace.time(budget).unwrap();
        let of = |speed: &u64| (budget * 1_000 / speed).min(time.as_nanos() as u64);
        let wave = Duration::from_nanos(speeds.iter().map(of).max().unwrap());
        // and 20 us for the launch itself
        let results = speeds.iter().map(|speed| ran(of(speed) * speed / 1_000, EXIT_BUDGET)).collect();
        (wave * waves + Duration::from_micros(20), results)
    }

    #[test]
    fn it_settles_at_the_target_and_vms_end_together() {
        for (waves, speeds) in [(1, [7, 7]), (1, [7, 5]), (3, [6, 7]), (1, [200, 200])] {
            let mut pace = Pace::new(Duration::from_millis(8));
            for _ in 0..30 {
                let (took, results) = launch(&pace, waves, &speeds);
                pace.learn(took, pace.budget(), &results);
            }
            let (took, results) = launch(&pace, waves, &speeds);
            assert!(
                took > Duration::from_micros(7_500) && took < Duration::from_micros(8_100),
                "{waves} of {speeds:?}: {took:?}"
            );
            // Time ends them, not the budget: the slower one has not had longer.
            let each = |i: usize| results[i].steps / speeds[i];
            assert!(each(0).abs_diff(each(1)) < 10 && results[0].steps < pace.budget(), "{speeds:?}");
        }
    }

    #[test]
    fn short_slices_are_not_timed() {
        let mut pace = Pace::new(Duration::from_millis(8));
        let budget = pace.budget();
        assert_eq!(pace.time(budget), Some(Duration::from_millis(8)));
        assert_eq!(pace.time(budget * 2), Some(Duration::from_millis(16)));
        assert_eq!(pace.time(u64::MAX), Some(Duration::from_nanos(u64::MAX)));
        assert_eq!((pace.time(budget - 1), Pace::short(budget / 4), Pace::short(1)), (None, FIRST / 4, 1));
        // Nor do they say for how long others may run; but how fast the device is.
        let took = Duration::from_millis(4);
        pace.learn(took, budget / 4, &[ran(FIRST / 4, EXIT_BUDGET)]);
        assert_eq!((pace.time, pace.budget()), (Duration::from_millis(8), budget / 2));
    }

    #[test]
    fn it_moves_in_steps_and_within_bounds() {
        let first = FIRST * SLACK;
        let mut pace = Pace::new(Duration::from_millis(8));
        pace.learn(Duration::from_secs(1), first, &[ran(FIRST, EXIT_BUDGET)]);
        assert_eq!((pace.budget(), pace.time), (first / 2, Duration::from_millis(4)));
        for _ in 0..30 {
            pace.learn(Duration::from_secs(9), pace.budget(), &[ran(pace.budget(), EXIT_BUDGET)]);
        }
        assert_eq!((pace.budget(), pace.time), (LEAST * SLACK, Duration::from_millis(8) / SHARE_LEAST));
        for _ in 0..30 {
            pace.learn(Duration::ZERO, pace.budget(), &[ran(pace.budget(), EXIT_BUDGET)]);
        }
        assert_eq!((pace.budget(), pace.time), (MOST * SLACK, Duration::from_millis(8)));
    }

    #[test]
    fn idle_guests_teach_nothing_unless_they_are_slow() {
        let first = FIRST * SLACK;
        let mut pace = Pace::new(Duration::from_millis(8));
        for (millis, expected) in [(0, first), (16, first), (80, first / 2)] {
            pace.learn(Duration::from_millis(millis), first, &[ran(10, crate::abi::EXIT_IDLE)]);
            assert_eq!(pace.budget(), expected);
        }
    }
}
