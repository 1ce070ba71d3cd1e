//! What passed and what did not: relaxed atomics that any thread may read while the bridge runs.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::reason::Reason;
use super::record::Direction;
use crate::sync::lock;

const REASONS: usize = Reason::ALL.len();

/// A bridge's counters. Directions are the VMs': *in* is what VMs received, *out* what they sent.
#[derive(Debug, Default)]
pub struct Counters {
    total: Traffic,
    pub(crate) open: AtomicU64,
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) timed_out: AtomicU64,
    pub(crate) reset: AtomicU64,
    drops: [AtomicU64; REASONS],
    vms: Box<[Traffic]>,
    /// Only VMs that lost something have an entry: in, out.
    vm_drops: Mutex<HashMap<u32, Box<[[u64; REASONS]; 2]>>>,
}

#[derive(Debug, Default)]
struct Traffic {
    packets_in: AtomicU64,
    packets_out: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
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
    drops: [u64; REASONS],
}

/// One VM's link at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSnapshot {
    /// Frames delivered to it.
    pub packets_in: u64,
    /// Frames taken from it.
    pub packets_out: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// Their bytes.
    pub bytes_out: u64,
    drops: [[u64; REASONS]; 2],
}

impl Counters {
    /// Counters for so many VMs.
    pub fn new(vms: u32) -> Self {
        Self { vms: (0..vms).map(|_| Traffic::default()).collect(), ..Self::default() }
    }

    /// Adds to a counter.
    pub(crate) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    /// Counts a packet that was dropped: to this VM or from it, if it concerns one.
    pub(crate) fn dropped(&self, vm: Option<u32>, direction: Direction, reason: Reason) {
        Self::add(&self.drops[reason as usize], 1);
        if let Some(vm) = vm {
            let mut drops = lock(&self.vm_drops);
            let drops = drops.entry(vm).or_insert_with(|| Box::new([[0; REASONS]; 2]));
            drops[direction as usize][reason as usize] += 1;
        }
    }

    /// Counts a frame that a VM received.
    pub(crate) fn delivered(&self, vm: u32, bytes: usize) {
        for traffic in [Some(&self.total), self.vms.get(vm as usize)].into_iter().flatten() {
            Self::add(&traffic.packets_in, 1);
            Self::add(&traffic.bytes_in, bytes as u64);
        }
    }

    /// Counts a frame that a VM sent.
    pub(crate) fn taken(&self, vm: u32, bytes: usize) {
        for traffic in [Some(&self.total), self.vms.get(vm as usize)].into_iter().flatten() {
            Self::add(&traffic.packets_out, 1);
            Self::add(&traffic.bytes_out, bytes as u64);
        }
    }

    /// The values now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            packets_in: self.total.packets_in.load(Relaxed),
            packets_out: self.total.packets_out.load(Relaxed),
            bytes_in: self.total.bytes_in.load(Relaxed),
            bytes_out: self.total.bytes_out.load(Relaxed),
            connections_open: self.open.load(Relaxed),
            connections_total: self.accepted.load(Relaxed),
            connections_refused: self.refused.load(Relaxed),
            connections_timed_out: self.timed_out.load(Relaxed),
            connections_reset: self.reset.load(Relaxed),
            drops: std::array::from_fn(|i| self.drops[i].load(Relaxed)),
        }
    }

    /// One VM's values now.
    pub fn vm(&self, vm: u32) -> Option<VmSnapshot> {
        let traffic = self.vms.get(vm as usize)?;
        Some(VmSnapshot {
            packets_in: traffic.packets_in.load(Relaxed),
            packets_out: traffic.packets_out.load(Relaxed),
            bytes_in: traffic.bytes_in.load(Relaxed),
            bytes_out: traffic.bytes_out.load(Relaxed),
            drops: lock(&self.vm_drops).get(&vm).map_or([[0; REASONS]; 2], |drops| **drops),
        })
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

impl VmSnapshot {
    /// Packets to the VM ([`Direction::In`]) or from it that were dropped for this reason.
    pub fn dropped(&self, direction: Direction, reason: Reason) -> u64 {
        self.drops[direction as usize][reason as usize]
    }

    /// All that was dropped on the way to the VM or from it.
    pub fn drops(&self, direction: Direction) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.drops[direction as usize]).filter(|(_, count)| *count > 0)
    }
}
