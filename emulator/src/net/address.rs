//! Who is who on the guest LAN: VM number <-> MAC and IPv4 address.
//!
//! | | IPv4 | MAC |
//! |---|---|---|
//! | host side | 10.77.0.1/16 | 02:4c:47:ff:ff:ff |
//! | VM n | 10.77.0.0 + 2 + n | 02:4c:47, then n in three bytes, big endian |

use std::net::Ipv4Addr;

use crate::abi::MAC_PREFIX;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The guest LAN, 10.77.0.0/16.
pub const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 0);
/// Bits of the network prefix.
pub const PREFIX_LEN: u8 = 16;
/// The host side's address: the VMs' default gateway and the only neighbour they need.
pub const HOST_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The host side's MAC. No VM can have it: 0xffffff is no VM number.
pub const HOST_MAC: Mac = [MAC_PREFIX[0], MAC_PREFIX[1], MAC_PREFIX[2], 0xff, 0xff, 0xff];
/// The Ethernet broadcast address.
pub const BROADCAST_MAC: Mac = [0xff; 6];
/// The most VMs that the LAN has addresses for: host parts 2 to 65534 (65535 is the broadcast address).
pub const MAX_VMS: u32 = 65_533;

const FIRST_HOST_PART: u32 = 2;

/// A VM number that has no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VM {vm} has no address: the guest LAN {NETWORK}/{PREFIX_LEN} holds VMs 0 to {}", MAX_VMS - 1)]
pub struct NoAddress {
    /// The VM number asked for.
    pub vm: u32,
}

/// The IPv4 address of VM `vm`.
pub fn ip_of(vm: u32) -> Result<Ipv4Addr, NoAddress> {
    if vm >= MAX_VMS {
        return Err(NoAddress { vm });
    }
    Ok(Ipv4Addr::from_bits(NETWORK.to_bits() + FIRST_HOST_PART + vm))
}

/// The MAC address of VM `vm`.
pub fn mac_of(vm: u32) -> Result<Mac, NoAddress> {
    if vm >= MAX_VMS {
        return Err(NoAddress { vm });
    }
    let [_, a, b, c] = vm.to_be_bytes();
    Ok([MAC_PREFIX[0], MAC_PREFIX[1], MAC_PREFIX[2], a, b, c])
}

/// The VM that has this IPv4 address, whether or not it exists in this fleet.
pub fn vm_of_ip(ip: Ipv4Addr) -> Option<u32> {
    let vm = ip.to_bits().checked_sub(NETWORK.to_bits() + FIRST_HOST_PART)?;
    (vm < MAX_VMS).then_some(vm)
}

/// The VM that has this MAC address, whether or not it exists in this fleet.
pub fn vm_of_mac(mac: Mac) -> Option<u32> {
    if mac[..3] != MAC_PREFIX {
        return None;
    }
    let vm = u32::from_be_bytes([0, mac[3], mac[4], mac[5]]);
    (vm < MAX_VMS).then_some(vm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_designed() {
        assert_eq!(ip_of(0), Ok(Ipv4Addr::new(10, 77, 0, 2)));
        assert_eq!(ip_of(254), Ok(Ipv4Addr::new(10, 77, 1, 0)));
        assert_eq!(mac_of(0x0102), Ok([0x02, 0x4c, 0x47, 0, 1, 2]));
        assert_eq!(ip_of(MAX_VMS - 1), Ok(Ipv4Addr::new(10, 77, 255, 254)));
        assert_eq!(ip_of(MAX_VMS), Err(NoAddress { vm: MAX_VMS }));
        assert_eq!(mac_of(u32::MAX), Err(NoAddress { vm: u32::MAX }));
    }

    #[test]
    fn every_vm_is_found_by_its_addresses() {
        for vm in 0..MAX_VMS {
            assert_eq!(vm_of_ip(ip_of(vm).unwrap()), Some(vm));
            assert_eq!(vm_of_mac(mac_of(vm).unwrap()), Some(vm));
        }
    }

    #[test]
    fn nobody_else_is_a_vm() {
        for ip in [NETWORK, HOST_IP, Ipv4Addr::new(10, 77, 255, 255), Ipv4Addr::LOCALHOST] {
            assert_eq!(vm_of_ip(ip), None, "{ip}");
        }
        for mac in [HOST_MAC, BROADCAST_MAC, [0; 6], [0x02, 0x4c, 0x48, 0, 0, 0]] {
            assert_eq!(vm_of_mac(mac), None, "{mac:x?}");
        }
    }
}
