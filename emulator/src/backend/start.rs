//! The state of a VM before its first instruction: the same in every back end.

use crate::abi::{MAC_PREFIX, Vm};
use crate::memory::BootMemory;

/// What tells a VM from its siblings.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Number in the fleet.
    pub number: u32,
    /// Number in the back end's arrays: the VMs of one device are numbered from 0.
    pub index: u32,
    /// Address of its frame table.
    pub table: u64,
    /// Key of its entropy source.
    pub key: [u64; 2],
}

/// Keys of the entropy sources of VMs `numbers`: made from `seed`, or drawn from the host.
pub fn entropy_keys(seed: Option<u64>, numbers: std::ops::Range<u32>) -> std::io::Result<Vec<[u64; 2]>> {
    if let Some(seed) = seed {
        return Ok(numbers.map(|number| [seed, u64::from(number)]).collect());
    }
    let mut bytes = vec![0u8; numbers.len() * 16];
    getrandom::fill(&mut bytes).map_err(std::io::Error::from)?;
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    Ok(bytes.chunks_exact(16).map(|key| [word(&key[..8]), word(&key[8..])]).collect())
}

/// The VM before its first instruction.
pub fn vm(boot: &BootMemory, pages: u32, epoch_ns: u64, identity: Identity) -> Vm {
    // SAFETY: a `Vm` is integers and arrays of them; all zero is a state of it.
    let mut vm: Vm = unsafe { std::mem::zeroed() };
    vm.number = identity.index;
    vm.ram.table_ptr = identity.table;
    vm.ram.pages = pages;
    vm.hart.mode = 1;
    vm.hart.pc = boot.entry;
    vm.hart.x[11] = boot.dtb_address;
    vm.hart.reservation = u32::MAX;
    vm.hart.stimecmp = u64::MAX;
    vm.hart.entropy_key = identity.key;
    vm.net.mac[..3].copy_from_slice(&MAC_PREFIX);
    vm.net.mac[3..].copy_from_slice(&identity.number.to_be_bytes()[1..]);
    vm.net.mtu = 1500;
    vm.rtc.epoch_ns = epoch_ns;
    vm
}
