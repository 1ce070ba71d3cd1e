//! Engines of the GPU: how many VMs share a warp, and which engine is taken.

use std::str::FromStr;

use crate::abi::{TRACE_BYTES, VM_SLOT_BYTES};

/// Engines that the kernels have.
const MADE: &[EngineKind] = &EngineKind::ALL;
/// What `auto` takes: the VMs per multiprocessor up to which an engine is the fastest, least first.
const AUTO: &[(u32, EngineKind)] = &[(u32::MAX, EngineKind::W)];

/// An engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// A warp for each VM.
    W,
    /// 2 VMs share a warp.
    L2,
    /// 4 VMs share a warp.
    L4,
    /// 8 VMs share a warp.
    L8,
    /// 16 VMs share a warp.
    L16,
    /// 32 VMs share a warp: a lane for each.
    L32,
}

impl EngineKind {
    /// All that can be asked for.
    pub const ALL: [Self; 6] = [Self::W, Self::L2, Self::L4, Self::L8, Self::L16, Self::L32];

    /// VMs that share a warp; the kernels get it as `VMS_PER_WARP`.
    pub const fn vms_per_warp(self) -> u32 {
        match self {
            Self::W => 1,
            Self::L2 => 2,
            Self::L4 => 4,
            Self::L8 => 8,
            Self::L16 => 16,
            Self::L32 => 32,
        }
    }

    /// As in `--engine` and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::W => "w",
            Self::L2 => "l2",
            Self::L4 => "l4",
            Self::L8 => "l8",
            Self::L16 => "l16",
            Self::L32 => "l32",
        }
    }

    /// Warps that run `vms` VMs.
    pub const fn warps(self, vms: u32) -> u32 {
        vms.div_ceil(self.vms_per_warp())
    }

    /// Bytes of one trace: 16 for each lane that a VM has.
    pub const fn trace_bytes(self) -> u32 {
        TRACE_BYTES / self.vms_per_warp()
    }
}

/// Translations that each VM has at hand, in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translations {
    /// Of loads and stores, a power of two.
    pub data: u32,
    /// Of instruction fetches, a power of two.
    pub fetch: u32,
}

impl Translations {
    /// Most first.
    const SIZES: [Self; 4] = [
        Self { data: 512, fetch: 256 },
        Self { data: 256, fetch: 128 },
        Self { data: 128, fetch: 64 },
        Self { data: 64, fetch: 32 },
    ];

    /// As many as half of a multiprocessor's shared memory has for the VMs that are on it; the other half is its L1 cache.
    pub fn pick(vms: u32, multiprocessors: u32, shared_bytes: u32) -> Self {
        let each = vms.div_ceil(multiprocessors.max(1)).max(1);
        let fits = |size: &&Self| each.saturating_mul(size.shared_bytes()) <= shared_bytes / 2;
        *Self::SIZES.iter().find(fits).unwrap_or(&Self::SIZES[3])
    }

    /// Bytes of shared memory of a VM.
    pub const fn shared_bytes(self) -> u32 {
        8 * (self.data + self.fetch) + VM_SLOT_BYTES
    }

    /// Bytes in which they are kept between slices.
    pub const fn saved_bytes(self) -> u32 {
        8 * (self.data + self.fetch + 1)
    }
}

/// Which engine is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The fastest for the fleet's size and the device.
    #[default]
    Auto,
    /// This one.
    Only(EngineKind),
}

impl EngineChoice {
    /// The engine for so many VMs on a device with so many multiprocessors.
    pub fn pick(self, vms: u32, multiprocessors: u32) -> EngineKind {
        let each = vms.div_ceil(multiprocessors.max(1));
        match self {
            Self::Only(kind) => kind,
            Self::Auto => {
                AUTO.iter().find(|(most, _)| each <= *most).map_or(EngineKind::W, |(_, kind)| *kind)
            }
        }
    }
}

impl FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let made = MADE.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        match EngineKind::ALL.into_iter().find(|kind| kind.name() == text) {
            Some(kind) if MADE.contains(&kind) => Ok(Self::Only(kind)),
            Some(_) => Err(format!("the kernels of this version have no engine {text}; there is: {made}")),
            None => Err(format!("expected auto, or an engine: {made}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_read_by_name() {
        assert_eq!("auto".parse(), Ok(EngineChoice::Auto));
        for kind in EngineKind::ALL {
            match kind.name().parse::<EngineChoice>() {
                Ok(choice) => assert_eq!(choice, EngineChoice::Only(kind)),
                Err(why) => assert!(!MADE.contains(&kind) && why.contains(kind.name()), "{why}"),
            }
        }
        for bad in ["", "W", "l1", "l3", "l64", "x"] {
            assert!(bad.parse::<EngineChoice>().unwrap_err().contains("auto"), "{bad}");
        }
    }

    #[test]
    fn lanes_traces_and_shared_memory_are_divided_without_rest() {
        for (n, kind) in EngineKind::ALL.into_iter().enumerate() {
            let k = kind.vms_per_warp();
            assert_eq!(k, 1 << n);
            assert_eq!(kind.trace_bytes() * k, TRACE_BYTES);
            assert_eq!(kind.trace_bytes(), 32 / k * 16);
            assert_eq!((kind.warps(0), kind.warps(1), kind.warps(k), kind.warps(k + 1)), (0, 1, 1, 2));
        }
    }

    #[test]
    fn auto_takes_only_what_is_there() {
        for (vms, multiprocessors) in [(1, 132), (1024, 132), (32_768, 132), (1, 0), (100_000, 1)] {
            assert!(MADE.contains(&EngineChoice::Auto.pick(vms, multiprocessors)));
        }
        assert!(AUTO.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!(EngineChoice::Only(EngineKind::W).pick(1 << 20, 1), EngineKind::W);
    }

    #[test]
    fn few_vms_have_many_translations() {
        let most = |vms| Translations::pick(vms, 132, 227 << 10).data;
        assert_eq!((most(1), most(1024), most(4096), most(8192), most(65536)), (512, 512, 256, 128, 64));
        assert!(
            Translations::SIZES
                .iter()
                .all(|size| size.data.is_power_of_two() && size.fetch.is_power_of_two())
        );
    }
}
