//! The host's side of a VM's mailbox: bounded, lock-free, and distrustful of every index that the machine writes.

use std::marker::PhantomData;
use std::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::abi::{CONSOLE_IN_BYTES, CONSOLE_OUT_BYTES, ETH_FRAME_BYTES, Mailbox, NET_SLOTS, SLOT_INTACT};

/// The host's handle on one mailbox. One thread at a time may use each direction of each ring.
#[derive(Clone, Copy)]
pub struct MailboxRef<'a> {
    at: *mut Mailbox,
    life: PhantomData<&'a Mailbox>,
}

// SAFETY: all shared words are accessed atomically; payload bytes are owned by the side that the indices say.
unsafe impl Send for MailboxRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for MailboxRef<'_> {}

macro_rules! word {
    ($self:ident . $field:ident) => {
        // SAFETY: `at` points to a live mailbox (contract of `new`), the field is an aligned u32.
        unsafe { AtomicU32::from_ptr(&raw mut (*$self.at).rings.$field) }
    };
}

impl<'a> MailboxRef<'a> {
    /// # Safety
    /// `at` must point to a mailbox that outlives `'a` and that nobody accesses except through this type and the
    /// machine.
    pub unsafe fn new(at: *mut Mailbox) -> Self {
        Self { at, life: PhantomData }
    }

    /// Appends all pending console output to `into`; returns how many bytes came.
    pub fn drain_console(&self, into: &mut Vec<u8>) -> usize {
        let head = word!(self.out_head).load(Acquire);
        let mut tail = word!(self.out_tail).load(Relaxed);
        let pending = head.wrapping_sub(tail).min(CONSOLE_OUT_BYTES) as usize;
        for _ in 0..pending {
            // SAFETY: the index is masked to the ring.
            into.push(unsafe {
                (&raw const (*self.at).out[(tail % CONSOLE_OUT_BYTES) as usize]).read_volatile()
            });
            tail = tail.wrapping_add(1);
        }
        word!(self.out_tail).store(tail, Release);
        pending
    }

    /// Puts console input on the wire; returns how many bytes found room.
    pub fn send_console(&self, bytes: &[u8]) -> usize {
        let mut head = word!(self.in_head).load(Relaxed);
        let used = head.wrapping_sub(word!(self.in_tail).load(Acquire)).min(CONSOLE_IN_BYTES);
        let room = (CONSOLE_IN_BYTES - used) as usize;
        for &byte in bytes.iter().take(room) {
            // SAFETY: the index is masked to the ring.
            unsafe { (&raw mut (*self.at).input[(head % CONSOLE_IN_BYTES) as usize]).write_volatile(byte) };
            head = head.wrapping_add(1);
        }
        word!(self.in_head).store(head, Release);
        bytes.len().min(room)
    }

    /// Whether a frame or console input waits for the guest.
    pub fn has_input(&self) -> bool {
        word!(self.rx_head).load(Acquire) != word!(self.rx_tail).load(Acquire)
            || word!(self.in_head).load(Acquire) != word!(self.in_tail).load(Acquire)
    }

    /// Whether the guest has sent a frame that was not taken yet.
    pub fn has_frames(&self) -> bool {
        word!(self.tx_head).load(Acquire) != word!(self.tx_tail).load(Relaxed)
    }

    /// Whether all transmit slots hold frames that were not taken yet: the guest can't send.
    pub fn transmit_full(&self) -> bool {
        word!(self.tx_head).load(Acquire).wrapping_sub(word!(self.tx_tail).load(Relaxed)) >= NET_SLOTS
    }

    /// Whether the guest has not taken what fills the receive slots.
    pub fn receive_full(&self) -> bool {
        word!(self.rx_head).load(Relaxed).wrapping_sub(word!(self.rx_tail).load(Acquire)) >= NET_SLOTS
    }

    /// Puts a frame on the receive ring; false if the ring is full or the frame is longer than the link allows.
    pub fn send_frame(&self, frame: &[u8]) -> bool {
        self.send_flagged(frame, 0)
    }

    /// The same for a frame whose checksums were verified: the guest need not do that again.
    pub fn send_intact(&self, frame: &[u8]) -> bool {
        self.send_flagged(frame, SLOT_INTACT)
    }

    fn send_flagged(&self, frame: &[u8], flags: u16) -> bool {
        let head = word!(self.rx_head).load(Relaxed);
        let used = head.wrapping_sub(word!(self.rx_tail).load(Acquire));
        if used >= NET_SLOTS || frame.len() > ETH_FRAME_BYTES as usize {
            return false;
        }
        // SAFETY: the slot at `head` is the host's until `head` is published; the length was checked above.
        unsafe {
            let slot = &raw mut (*self.at).rx[(head % NET_SLOTS) as usize];
            (&raw mut (*slot).len).write_volatile(frame.len() as u16);
            (&raw mut (*slot).flags).write_volatile(flags);
            std::ptr::copy_nonoverlapping(frame.as_ptr(), (&raw mut (*slot).data).cast(), frame.len());
        }
        word!(self.rx_head).store(head.wrapping_add(1), Release);
        true
    }

    /// Takes the next frame that the guest sent. A slot whose length is out of bounds is skipped.
    pub fn take_frame(&self, into: &mut [u8; ETH_FRAME_BYTES as usize]) -> Option<usize> {
        loop {
            let (head, mut tail) = (word!(self.tx_head).load(Acquire), word!(self.tx_tail).load(Relaxed));
            if head == tail {
                return None;
            }
            if head.wrapping_sub(tail) > NET_SLOTS {
                // No machine does this. The ring holds no more than its slots, whatever the index says.
                tail = head.wrapping_sub(NET_SLOTS);
            }
            // SAFETY: the slot at `tail` is the host's until `tail` moves; the length is checked before use.
            let len = unsafe {
                let slot = &raw const (*self.at).tx[(tail % NET_SLOTS) as usize];
                let len = (&raw const (*slot).len).read_volatile() as usize;
                if len <= into.len() {
                    std::ptr::copy_nonoverlapping((&raw const (*slot).data).cast(), into.as_mut_ptr(), len);
                }
                len
            };
            word!(self.tx_tail).store(tail.wrapping_add(1), Release);
            if len <= into.len() {
                return Some(len);
            }
        }
    }
}
