//! What passed and what did not: relaxed atomics that any thread may read while the bridge runs.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::reason::Reason;

/// A bridge's counters. Directions are the VMs': *in* is what VMs received, *out* what they sent.
#[derive(Debug, Default)]
pub struct Counters {
    pub(crate) packets_in: AtomicU64,
    pub(crate) packets_out: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    pub(crate) open: AtomicU64,
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) timed_out: AtomicU64,
    pub(crate) reset: AtomicU64,
    drops: [AtomicU64; Reason::ALL.len()],
}

/// The counters at one moment. Each value is exact; together they may be a few packets apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Frames delivered to VMs.
    pub packets_in: u64,
    /// Frames taken from VMs.
    pub packets_out: u64,
    /// Bytes of the frames delivered to VMs.
    pub bytes_in: u64,
    /// Bytes of the frames taken from VMs.
    pub bytes_out: u64,
    /// Connections open now, those that still wait for their VM included.
    pub connections_open: u64,
    /// Connections accepted so far.
    pub connections_total: u64,
    /// Connections refused because their VM is down or refused them.
    pub connections_refused: u64,
    /// Connections ended by one of the bridge's time limits.
    pub connections_timed_out: u64,
    /// Connections reset by either side once they were established.
    pub connections_reset: u64,
    drops: [u64; Reason::ALL.len()],
}

impl Counters {
    /// Adds to a counter.
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    /// Counts a dropped packet.
    pub(crate) fn dropped(&self, reason: Reason) {
        Self::add(&self.drops[reason as usize], 1);
    }

    /// Counts a frame that a VM received.
    pub(crate) fn delivered(&self, bytes: usize) {
        Self::add(&self.packets_in, 1);
        Self::add(&self.bytes_in, bytes as u64);
    }

    /// Counts a frame that a VM sent.
    pub(crate) fn taken(&self, bytes: usize) {
        Self::add(&self.packets_out, 1);
        Self::add(&self.bytes_out, bytes as u64);
    }

    /// The values now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            packets_in: self.packets_in.load(Relaxed),
            packets_out: self.packets_out.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            connections_open: self.open.load(Relaxed),
            connections_total: self.accepted.load(Relaxed),
            connections_refused: self.refused.load(Relaxed),
            connections_timed_out: self.timed_out.load(Relaxed),
            connections_reset: self.reset.load(Relaxed),
            drops: std::array::from_fn(|i| self.drops[i].load(Relaxed)),
        }
    }
}

impl Snapshot {
    /// Packets dropped for this reason.
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.drops[reason as usize]
    }

    /// All reasons with their counts, zeroes included.
    pub fn drops(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.drops)
    }

    /// Packets dropped for any reason.
    pub fn drops_total(&self) -> u64 {
        self.drops.iter().sum()
    }
}
