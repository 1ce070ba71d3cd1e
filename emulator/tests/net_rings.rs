//! The host's side of a mailbox against a machine that writes anything: `HOSTILE_CASES` sets the number of cases.
#![allow(clippy::unwrap_used, missing_docs)]

use emulator::abi::{CONSOLE_OUT_BYTES, ETH_FRAME_BYTES, Mailbox, NET_SLOTS};
use emulator::mailbox::MailboxRef;

/// xorshift64*: the same numbers each time.
struct Dice(u64);

impl Dice {
    fn throw(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// Something near the bounds, or anything.
    fn index(&mut self, near: u32) -> u32 {
        match self.throw() % 4 {
            0 => self.throw(),
            1 => near.wrapping_add(self.throw() % (2 * NET_SLOTS)),
            2 => near.wrapping_sub(self.throw() % (2 * NET_SLOTS)),
            _ => near,
        }
    }
}

/// Nothing is read or written beyond the mailbox, no frame is longer than the link allows, and no index makes the host
/// take more than the ring holds.
#[test]
fn hostile_indices_and_lengths_do_no_harm() {
    let cases =
        std::env::var("HOSTILE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(20_000_u64);
    let mut dice = Dice(0x4c47);
    // Guards around the mailbox show what runs off its ends.
    #[repr(C)]
    struct Guarded {
        before: [u64; 512],
        mailbox: Mailbox,
        after: [u64; 512],
    }
    const GUARD: u64 = 0x5a5a_5a5a_5a5a_5a5a;
    // SAFETY: plain integers; all zero is a valid value.
    let mut guarded: Box<Guarded> = unsafe { Box::new(std::mem::zeroed()) };
    guarded.before.fill(GUARD);
    guarded.after.fill(GUARD);
    let at = &raw mut guarded.mailbox;
    let mut frame = [0; ETH_FRAME_BYTES as usize];
    let mut text = Vec::new();
    for _ in 0..cases {
        // SAFETY: the mailbox is alive, and nobody else uses it now.
        unsafe {
            (*at).rings.tx_head = dice.index((*at).rings.tx_tail);
            (*at).rings.rx_tail = dice.index((*at).rings.rx_head);
            (*at).rings.out_head = dice.index((*at).rings.out_tail);
            (*at).rings.in_tail = dice.index((*at).rings.in_head);
            let slot = (dice.throw() % NET_SLOTS) as usize;
            (*at).tx[slot].len = match dice.throw() % 3 {
                0 => dice.throw(),
                1 => ETH_FRAME_BYTES - 2 + dice.throw() % 5,
                _ => dice.throw() % ETH_FRAME_BYTES,
            } as u16;
        }
        // SAFETY: as above; the reference is gone before the next case.
        let mailbox = unsafe { MailboxRef::new(at) };
        let mut taken = 0;
        while let Some(len) = mailbox.take_frame(&mut frame) {
            assert!(len <= frame.len());
            taken += 1;
        }
        assert!(taken <= NET_SLOTS, "{taken} frames from a ring of {NET_SLOTS}");
        assert!(!mailbox.has_frames() && !mailbox.transmit_full());
        let mut sent = 0;
        while mailbox.send_frame(&frame[..(dice.throw() % (ETH_FRAME_BYTES + 1)) as usize]) {
            sent += 1;
            assert!(sent <= 2 * NET_SLOTS, "the ring takes without end");
        }
        assert!(!mailbox.send_frame(&[0; ETH_FRAME_BYTES as usize + 1]));
        text.clear();
        assert!(mailbox.drain_console(&mut text) <= CONSOLE_OUT_BYTES as usize);
        let _ = mailbox.send_console(&frame[..(dice.throw() % 64) as usize]);
    }
    assert!(guarded.before.iter().chain(&guarded.after).all(|word| *word == GUARD));
}
