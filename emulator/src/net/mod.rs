//! Between the VMs' links and the world: addresses, rewriting, switching, and the capture back ends.

use std::sync::Arc;

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
    /// Appends the VMs that may have sent frames since the last call.
    fn take_dirty(&self, vms: &mut Vec<u32>);
    /// Sets what is called when a VM has sent a frame, or a VM whose mailbox was full has room again. It is called
    /// from worker threads and must return at once (a poller's waker).
    fn set_waker(&self, wake: Arc<dyn Fn() + Send + Sync>);
    /// Whether the VM will never run again (stopped or failed): connections to it should be refused.
    fn is_down(&self, vm: u32) -> bool;
}
