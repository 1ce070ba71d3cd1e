//! Rate limits: so many packets and so many bytes a second for each VM, in each direction.
//!
//! For each VM and limit only one time is kept: when its next packet would be due if it had kept to the rate (GCRA).

use std::time::{Duration, Instant};

use super::record::Direction;

/// What may be sent in a row before the rate counts: so much time's worth.
const BURST: Duration = Duration::from_millis(250);

/// Limits for one VM and one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Packets a second; 0: no limit.
    pub packets: u64,
    /// Bytes a second; 0: no limit.
    pub bytes: u64,
}

impl Default for Limits {
    /// More than a guest on a CPU can do, and little enough that a few that try can't keep the bridge from the others.
    fn default() -> Self {
        Self { packets: 100_000, bytes: 128 << 20 }
    }
}

/// All VMs' rates.
#[derive(Debug)]
pub struct Rates {
    limits: Limits,
    start: Instant,
    /// Nanoseconds since the start: for packets and bytes, in and out.
    due: Vec<[[u64; 2]; 2]>,
}

impl Rates {
    /// For so many VMs.
    pub fn new(limits: Limits, vms: u32, now: Instant) -> Self {
        Self { limits, start: now, due: vec![[[0; 2]; 2]; vms as usize] }
    }

    /// Whether VM `vm` may send or get a packet now.
    pub fn allow(&mut self, vm: u32, direction: Direction, bytes: usize, now: Instant) -> bool {
        const SECOND: u64 = 1_000_000_000;
        let Some(due) = self.due.get_mut(vm as usize) else { return true };
        let due = &mut due[direction as usize];
        let now = now.saturating_duration_since(self.start).as_nanos() as u64;
        let latest = now + BURST.as_nanos() as u64;
        let cost = |units: u64, rate: u64| (units * SECOND).checked_div(rate).unwrap_or(0);
        let next = [
            due[0].max(now) + cost(1, self.limits.packets),
            due[1].max(now) + cost(bytes as u64, self.limits.bytes),
        ];
        // A packet larger than the whole burst passes when nothing is owed.
        if next.iter().zip(*due).any(|(next, due)| *next > latest && due > now) {
            return false;
        }
        *due = next;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(limits: Limits, bytes: usize, offered: u64, seconds: u64) -> u64 {
        let start = Instant::now();
        let mut rates = Rates::new(limits, 2, start);
        let gap = Duration::from_secs(seconds) / offered as u32;
        (0..offered).filter(|n| rates.allow(1, Direction::Out, bytes, start + gap * *n as u32)).count() as u64
    }

    #[test]
    fn rates_are_kept() {
        let limits = |packets, bytes| Limits { packets, bytes };
        // Below the limit nothing is lost; above, the limit and a burst pass.
        assert_eq!(passed(limits(1000, 0), 100, 9_000, 10), 9_000);
        let most = passed(limits(1000, 0), 100, 100_000, 10);
        assert!((10_000..=10_251).contains(&most), "{most}");
        let most = passed(limits(0, 100_000), 1000, 100_000, 10);
        assert!((1000..=1026).contains(&most), "{most}");
        assert_eq!(passed(limits(0, 0), 1500, 100_000, 1), 100_000);
        assert!(passed(limits(0, 100), 1500, 1000, 60) >= 4);
    }

    #[test]
    fn vms_and_directions_do_not_share() {
        let now = Instant::now();
        let mut rates = Rates::new(Limits { packets: 4, bytes: 0 }, 2, now);
        assert!(rates.allow(0, Direction::Out, 1, now));
        assert!(!rates.allow(0, Direction::Out, 1, now));
        assert!(rates.allow(0, Direction::In, 1, now));
        assert!(rates.allow(1, Direction::Out, 1, now));
    }
}
