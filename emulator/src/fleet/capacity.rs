//! How many VMs fit into the memory that this machine can give.
//!
//! A VM costs what it has written, and that is known only afterwards. A booted guest that serves has written about
//! 40 % of a small RAM. So half of the RAM is counted as needed: a fleet that needs more than there is on that count is
//! refused; one that could run out only if its guests wrote all of their RAM is started, with a warning. When frames do
//! run out, the VM that asks for one fails and the others go on.

use std::fs;
use std::path::Path;

use crate::abi::{CODE_PAGE_BYTES, CODE_PAGES_PER_VM, FRAME_BYTES, Mailbox, Vm};
use crate::backend::native::VM_BYTES as NATIVE_VM_BYTES;

/// Host memory a VM needs apart from its RAM and the ABI's structures: console tail, scheduler entry, log buffers.
const HOST_BYTES: u64 = 16 * 1024;
/// Memory left to the operating system and to this program, in percent.
const LEFT_PERCENT: u64 = 10;

/// Memory needs of a fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes that this process may come to use.
    pub available: u64,
    /// Bytes per VM apart from its RAM.
    pub overhead_per_vm: u64,
    /// Bytes per VM, with half of its RAM written.
    pub expected_per_vm: u64,
    /// Bytes per VM, with all of its RAM written.
    pub worst_per_vm: u64,
}

/// The fleet does not fit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{vms} VMs of {} RAM need about {} of memory, and {} can be used: {fits} fit (counting half of each VM's RAM as \
     written); give fewer --vms or less --ram",
    size(*ram), size(*needed), size(*available)
)]
pub struct TooMany {
    /// VMs asked for.
    pub vms: u32,
    /// RAM of each.
    pub ram: u64,
    /// Bytes they need.
    pub needed: u64,
    /// Bytes there are.
    pub available: u64,
    /// VMs that fit.
    pub fits: u64,
}

impl Capacity {
    /// For VMs of `ram` bytes, with `available` bytes of memory.
    pub fn new(ram: u64, available: u64) -> Self {
        let structures = size_of::<Vm>() as u64 + size_of::<Mailbox>() as u64;
        let table = ram / u64::from(FRAME_BYTES) * 4;
        let code = u64::from(CODE_PAGES_PER_VM) * u64::from(CODE_PAGE_BYTES) + NATIVE_VM_BYTES as u64;
        let overhead = structures + table + code + HOST_BYTES;
        Self {
            available,
            overhead_per_vm: overhead,
            expected_per_vm: overhead + ram / 2,
            worst_per_vm: overhead + ram,
        }
    }

    /// VMs that fit.
    pub fn fits(&self) -> u64 {
        self.available / self.expected_per_vm
    }

    /// What `vms` VMs may use for RAM, all together.
    pub fn pool_bytes(&self, vms: u32) -> u64 {
        self.available.saturating_sub(u64::from(vms) * self.overhead_per_vm)
    }

    /// Whether `vms` VMs of `ram` bytes fit; if so, whether they do even in the worst case.
    pub fn check(&self, vms: u32, ram: u64) -> Result<bool, TooMany> {
        let needed = u64::from(vms) * self.expected_per_vm;
        if needed > self.available {
            return Err(TooMany { vms, ram, needed, available: self.available, fits: self.fits() });
        }
        Ok(u64::from(vms).saturating_mul(self.worst_per_vm) <= self.available)
    }
}

/// Bytes that this process may use: what is free, or what the control group leaves, less a reserve.
pub fn available_memory() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let free = meminfo_bytes(&meminfo, "MemAvailable:")?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = cgroup_room(&groups, Path::new("/sys/fs/cgroup"));
    let least = group.map_or(free, |room| room.min(free));
    Some(least / 100 * (100 - LEFT_PERCENT))
}

fn meminfo_bytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// What the tightest control group on the way to the root leaves (versions 2 and 1).
fn cgroup_room(groups: &str, root: &Path) -> Option<u64> {
    let mut room: Option<u64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next(), fields.next()?, fields.next()?);
        let (base, limit, used) = match controllers {
            "" => (root.to_path_buf(), "memory.max", "memory.current"),
            c if c.split(',').any(|c| c == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        let inside = path.trim_start_matches('/');
        // In a container the path may be the host's: then only the mount's root is there to read.
        for folder in Path::new(inside).ancestors().map(|part| base.join(part)) {
            let number = |name| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
            if let (Some(limit), Some(used)) = (number(limit), number(used)) {
                let left = limit.saturating_sub(used);
                room = Some(room.map_or(left, |room| room.min(left)));
            }
        }
    }
    room
}

/// A size for people: `512 KiB`, `8 MiB`, `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 {
        format!("{value} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// Reads a size: a number with K, M or G (powers of 1024; `MB` and `MiB` are the same), or plain bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim().find(|c: char| !c.is_ascii_digit()).unwrap_or(text.trim().len());
    let (number, unit) = text.trim().split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        other => return Err(format!("unknown unit '{other}': write for example 8M, 512K or 1G")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("'{text}' is not a size: write for example 8M, 512K or 1G"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in
            [("8M", 8 << 20), ("8 MiB", 8 << 20), ("512k", 512 << 10), ("1G", 1 << 30), ("7", 7)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for bad in ["", "M", "8X", "-1", "1.5M", "99999999999G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(size(8 << 20), "8 MiB");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(0), "0 B");
    }

    #[test]
    fn a_fleet_beyond_memory_is_told_how_many_fit() {
        let capacity = Capacity::new(8 << 20, 1 << 30);
        let fits = capacity.fits();
        assert!((150..256).contains(&fits), "{fits}");
        assert_eq!(capacity.check(fits as u32, 8 << 20), Ok(false));
        assert_eq!(capacity.check(100, 8 << 20), Ok(true));
        let error = capacity.check(fits as u32 + 1, 8 << 20).unwrap_err();
        assert!(error.to_string().contains(&format!(": {fits} fit")), "{error}");
        assert!(capacity.check(u32::MAX, 8 << 20).is_err());
    }

    #[test]
    fn memory_is_what_the_system_and_the_group_leave() {
        let text = "MemTotal:  100 kB\nMemAvailable:   64 kB\n";
        assert_eq!(meminfo_bytes(text, "MemAvailable:"), Some(65536));
        assert!(available_memory().is_some_and(|bytes| bytes > 1 << 20));
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("a/b");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("memory.max"), "max\n").unwrap();
        fs::write(group.join("memory.current"), "5\n").unwrap();
        assert_eq!(cgroup_room("0::/a/b\n", root.path()), None);
        fs::write(root.path().join("a/memory.max"), "1000\n").unwrap();
        fs::write(root.path().join("a/memory.current"), "300\n").unwrap();
        assert_eq!(cgroup_room("0::/a/b\n", root.path()), Some(700));
        fs::write(group.join("memory.max"), "100\n").unwrap();
        assert_eq!(cgroup_room("0::/a/b\n", root.path()), Some(95));
    }
}
