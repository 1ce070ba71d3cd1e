//! Between the VMs' links and the world: addresses, rewriting, switching, and the capture back ends.
//!
//! | module | what | I/O |
//! |---|---|---|
//! | [`address`] | VM number <-> MAC and IPv4 address | none |
//! | [`checksum`], [`packet`] | checked views of packets, checksums | none |
//! | [`rewrite`] | host packet to port P + N <-> frame of VM N | none |
//! | [`switch`] | what becomes of a frame that a VM sent | none |
//! | [`reason`], [`counters`] | why packets are dropped, and how many | none |
//! | [`lan`] | takes, switches and delivers frames; queues before full mailboxes | links |
//! | [`flows`], [`gateway`] | the host side for transports that capture packets | none |
//! | [`policy`], [`rate`] | what the network allows; how much | none |
//! | [`fault`] | what is broken on purpose | none |
//! | [`tap`], [`pcapng`] | copies of all packets, as Wireshark reads them | none |
//! | [`capture`] | the thread of a capturing transport | links, a wire |
//! | [`tun`] | transport: a TUN device (Linux) | packets |
//! | [`divert`], `windivert` | transport: WinDivert (Windows); its thread | packets |
//! | [`ports`] | the host ports of a fleet: all or none | sockets |
//! | [`reach`] | how this program reaches the VMs' web servers: by port, or without one | sockets |
//! | [`user`] | transport: host sockets on loopback, no privileges | sockets, links |
//! | [`load`] | asks over and over, and measures | sockets |
//! | [`probe`] | asks every VM for `GET /` | sockets |

pub mod address;
pub mod bridge;
pub mod capture;
pub mod checksum;
pub mod counters;
pub mod divert;
pub mod fault;
pub mod flows;
pub mod gateway;
pub mod lan;
pub mod load;
pub mod packet;
pub mod pcapng;
pub mod policy;
pub mod ports;
pub mod probe;
pub mod rate;
pub mod reach;
pub mod reason;
pub mod record;
pub mod rewrite;
pub mod switch;
pub mod tap;
#[cfg(target_os = "linux")]
pub mod tun;
pub mod user;
#[cfg(windows)]
pub mod windivert;

use std::sync::Arc;
use std::time::Instant;

/// A full mailbox: the frame was not taken. Try again after the VM has run, or drop and count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The VMs' links, as a bridge sees them. Frames are Ethernet, without FCS, at most 1514 bytes.
///
/// The fleet implements it over the mailboxes; tests implement it over queues.
pub trait Links: Send + Sync {
    /// Number of VMs; they are numbered from 0.
    fn vms(&self) -> u32;
    /// Puts a frame on VM `vm`'s receive ring and wakes the VM.
    fn deliver(&self, vm: u32, frame: &[u8]) -> Result<(), Full>;
    /// Takes the next frame that VM `vm` has sent; returns its length.
    fn take(&self, vm: u32, frame: &mut [u8; 1514]) -> Option<usize>;
    /// Appends the VMs that may have sent frames since the last call, or whose mailbox was full and has room again.
    fn take_dirty(&self, vms: &mut Vec<u32>);
    /// Sets what is called when a VM has sent a frame, or a VM whose mailbox was full has room again. It is called
    /// from worker threads and must return at once (a poller's waker).
    fn set_waker(&self, wake: Arc<dyn Fn() + Send + Sync>);
    /// A packet for a VM came. Until when the bridge should wait for the answer, and for more packets, without sleeping:
    /// answers come soon then, and the host has cores to spare.
    fn attend(&self, _now: Instant) -> Option<Instant> {
        None
    }
    /// Whether the VM will never run again (stopped or failed): connections to it should be refused.
    fn is_down(&self, vm: u32) -> bool;
}
