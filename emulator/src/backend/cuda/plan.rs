//! What goes where in a device's memory, and how many VMs fit. Pure arithmetic.

use crate::abi::{FRAME_BYTES, FRAME_MASK, Pool, TEXT_BYTES, TEXTS_MOST, Vm};

/// Decoded code, which all VMs share, takes this share of the memory at most, in percent.
const CODE_PERCENT: u64 = 2;
/// Texts, and bytes of traces for each of them. What booting Linux makes is 350, with 25,000 traces of 512 bytes for a VM
/// and more than 262,144 for 24,576 VMs, which begin new ones wherever an interrupt or the end of a slice finds them.
const TEXTS: std::ops::RangeInclusive<u64> = 512..=TEXTS_MOST as u64;
const TRACES_COST: u64 = 128 * 512;
/// A trace's number has 25 bits where it is noted (`LEARN_OF` in `kernels/serve.cuh`), and a trace 16 bytes at least.
const _: () = assert!(*TEXTS.end() * TRACES_COST / 16 < 1 << 25);
/// Entries of the hash table for each text.
const SLOTS_PER_TEXT: u64 = 4;
/// Left to the driver: stacks of the kernels, other programs' small needs.
const RESERVE_BYTES: u64 = 512 << 20;
/// On a small device, at most this share of what is free, in percent.
const RESERVE_PERCENT: u64 = 10;
/// RAM that a guest is taken to write at least: a fleet that can't have it is refused.
const WRITTEN_LEAST: u64 = 1 << 20;
/// A frame with its entries in the ring and in the code table.
const FRAME_COST: u64 = FRAME_BYTES as u64 + 4 + 4;
/// A text with its traces and its part of the hash table.
const CODE_COST: u64 = TEXT_BYTES as u64 + TRACES_COST + SLOTS_PER_TEXT * 4;

/// What is to go in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// VMs on this device.
    pub vms: u32,
    /// Pages of each VM's RAM.
    pub pages: u32,
    /// Frames that all VMs share.
    pub shared_frames: u32,
    /// Bytes of each trace, which depend on the engine.
    pub trace_bytes: u32,
}

/// How a device's memory is shared out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Frames that the VMs may have for themselves, all together.
    pub private_frames: u32,
    /// Texts there is room for, a power of two.
    pub texts: u32,
    /// Traces there is room for.
    pub traces: u32,
    /// Bytes of device memory in all.
    pub bytes: u64,
}

/// The VMs don't fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DoesNotFit {
    /// VMs that do.
    pub fits: u32,
}

impl Demand {
    /// Shares out `free` bytes; `most_frames` limits the private frames further.
    pub fn plan(&self, free: u64, most_frames: Option<u32>) -> Result<Plan, DoesNotFit> {
        if let Some(plan) = self.try_plan(free, most_frames) {
            return Ok(plan);
        }
        let (mut fits, mut too_many) = (0, self.vms);
        while too_many - fits > 1 {
            let vms = fits + (too_many - fits) / 2;
            match (Self { vms, ..*self }).try_plan(free, most_frames) {
                Some(_) => fits = vms,
                None => too_many = vms,
            }
        }
        Err(DoesNotFit { fits })
    }

    /// The most VMs of this kind, if each is to be able to write `written` bytes of its RAM.
    pub fn most(&self, free: u64, written: u64) -> u32 {
        let frames = written.div_ceil(u64::from(FRAME_BYTES));
        let enough = |vms: u32| {
            (Self { vms, ..*self })
                .try_plan(free, None)
                .is_some_and(|plan| u64::from(plan.private_frames) >= u64::from(vms) * frames)
        };
        let (mut fits, mut too_many) = (0, u32::MAX >> 8);
        while too_many - fits > 1 {
            let vms = fits + (too_many - fits) / 2;
            if enough(vms) { fits = vms } else { too_many = vms }
        }
        fits
    }

    fn try_plan(&self, free: u64, most_frames: Option<u32>) -> Option<Plan> {
        let (vms, pages) = (u64::from(self.vms), u64::from(self.pages));
        let usable = free - RESERVE_BYTES.min(free / 100 * RESERVE_PERCENT);
        // Tables: one for each VM, and the first one.
        // And a frame to align them.
        let fixed = vms * size_of::<Vm>() as u64
            + (vms + 1) * pages * 4
            + size_of::<Pool>() as u64
            + u64::from(FRAME_BYTES);
        let shared = u64::from(self.shared_frames) * FRAME_COST;
        let rest = usable.checked_sub(fixed + shared)?;
        let texts = (usable / 100 * CODE_PERCENT / CODE_COST).clamp(*TEXTS.start(), *TEXTS.end());
        let texts = 1 << texts.ilog2();
        let code = texts * CODE_COST;
        let rest = rest.checked_sub(code)?;
        let numbers = u64::from(FRAME_MASK) - u64::from(self.shared_frames);
        let frames =
            (rest / FRAME_COST).min(vms * pages).min(numbers).min(most_frames.map_or(u64::MAX, u64::from));
        let least = vms * pages.min(WRITTEN_LEAST / u64::from(FRAME_BYTES));
        if most_frames.is_none() && frames < least {
            return None;
        }
        let bytes = fixed + shared + code + frames * FRAME_COST;
        let traces = (texts * TRACES_COST / u64::from(self.trace_bytes)) as u32;
        Some(Plan { private_frames: frames as u32, texts: texts as u32, traces, bytes })
    }
}

impl Plan {
    /// Entries of the hash table of texts, a power of two.
    pub fn slots(&self) -> u32 {
        self.texts * SLOTS_PER_TEXT as u32
    }
}

/// Splits VMs 0..vms into contiguous parts, one a device, in proportion to the devices' free memory.
pub fn split(vms: u32, free: &[u64]) -> Vec<std::ops::Range<u32>> {
    let total: u128 = free.iter().map(|bytes| u128::from(*bytes)).sum::<u128>().max(1);
    let mut sum = 0u128;
    let mut start = 0;
    let mut parts: Vec<_> = free
        .iter()
        .map(|bytes| {
            sum += u128::from(*bytes);
            let end = (u128::from(vms) * sum).div_ceil(total).min(u128::from(vms)) as u32;
            let part = start..end.max(start);
            start = part.end;
            part
        })
        .collect();
    if let Some(last) = parts.last_mut() {
        last.end = vms;
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn demand(vms: u32) -> Demand {
        Demand { vms, pages: 4096, shared_frames: 900, trace_bytes: 512 }
    }

    #[test]
    fn a_small_fleet_gets_all_it_could_ever_use() {
        let plan = demand(64).plan(78 * GIB, None).unwrap();
        assert_eq!(plan.private_frames, 64 * 4096);
        assert_eq!((plan.texts, plan.traces), (4096, 1 << 19));
        let shorter = Demand { trace_bytes: 64, ..demand(64) }.plan(78 * GIB, None).unwrap();
        assert_eq!(shorter, Plan { traces: 1 << 22, ..plan });
        assert!(plan.bytes < 2 * GIB);
    }

    #[test]
    fn a_large_fleet_shares_what_there_is() {
        for vms in [8192, 24_576] {
            let plan = demand(vms).plan(78 * GIB, None).unwrap();
            assert!(plan.private_frames < vms * 4096);
            assert!(plan.bytes <= 78 * GIB - RESERVE_BYTES);
            assert!(plan.bytes > 76 * GIB);
            assert_eq!(plan.texts, 4096);
        }
        assert_eq!(demand(24_576).plan(78 * GIB, Some(500)).unwrap().private_frames, 500);
    }

    #[test]
    fn too_many_are_told_how_many_fit() {
        let DoesNotFit { fits } = demand(200_000).plan(8 * GIB, None).unwrap_err();
        assert!((5_000..8_000).contains(&fits), "{fits}");
        assert!(demand(fits).plan(8 * GIB, None).is_ok());
        assert!(demand(fits + 1).plan(8 * GIB, None).is_err());
        assert_eq!(demand(1).plan(1 << 20, None), Err(DoesNotFit { fits: 0 }));
    }

    #[test]
    fn as_many_as_can_write_so_much() {
        let small = Demand { vms: 0, pages: 2048, shared_frames: 900, trace_bytes: 512 };
        let most = small.most(78 * GIB, 3 << 20);
        assert!((26_000..26_700).contains(&most), "{most}");
        let plan = Demand { vms: most, ..small }.plan(78 * GIB, None).unwrap();
        assert!(plan.private_frames >= most * 768);
        assert_eq!(small.most(1 << 20, 3 << 20), 0);
    }

    #[test]
    fn vms_are_split_by_memory_without_gap_or_overlap() {
        assert_eq!(split(10, &[5]), vec![0..10u32; 1]);
        assert_eq!(split(10, &[5, 5]), [0..5, 5..10]);
        assert_eq!(split(1, &[5, 5, 5]), vec![0..1u32; 1]);
        assert_eq!(split(9, &[80 * GIB, 40 * GIB]), [0..6, 6..9]);
        for vms in [1, 2, 7, 1000, 32_768] {
            let parts = split(vms, &[3, 1, 4, 1, 5]);
            assert_eq!(parts.first().map(|part| part.start), Some(0));
            assert_eq!(parts.last().map(|part| part.end), Some(vms));
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
