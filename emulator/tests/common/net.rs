//! The driver's side of virtio-net: rings laid out in guest RAM by hand.

use super::Bench;
use emulator::abi::{NET_BASE, NET_IRQ, PLIC_BASE};

pub const RX: u32 = 0;
pub const TX: u32 = 1;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
pub const HEADER: u32 = 12;

/// One queue as the driver keeps it.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    pub index: u32,
    pub num: u32,
    pub desc: u32,
    pub avail: u32,
    pub used: u32,
    pub avail_idx: u16,
    pub used_seen: u16,
}

impl Queue {
    /// A queue whose three areas lie in one page.
    pub fn at(index: u32, num: u32, base: u32) -> Self {
        Self { index, num, desc: base, avail: base + 0x400, used: base + 0x800, avail_idx: 0, used_seen: 0 }
    }
    pub fn setup(&self, b: &mut Bench) {
        reg(b, 0x030, self.index);
        reg(b, 0x038, self.num);
        reg(b, 0x080, self.desc);
        reg(b, 0x084, 0);
        reg(b, 0x090, self.avail);
        reg(b, 0x094, 0);
        reg(b, 0x0a0, self.used);
        reg(b, 0x0a4, 0);
        reg(b, 0x044, 1);
    }
    pub fn descriptor(&self, b: &Bench, i: u32, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        b.write(self.desc + 16 * i, &bytes);
    }
    /// Makes the chain that starts at `head` available, without a notification.
    pub fn offer(&mut self, b: &Bench, head: u16) {
        b.write16(self.avail + 4 + 2 * (u32::from(self.avail_idx) % self.num), head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        b.write16(self.avail + 2, self.avail_idx);
    }
    pub fn notify(&self, b: &mut Bench) {
        reg(b, 0x050, self.index);
    }
    /// The next used element, if the device has returned one: descriptor and length.
    pub fn used(&mut self, b: &Bench) -> Option<(u32, u32)> {
        if b.read16(self.used + 2) == self.used_seen {
            return None;
        }
        let at = self.used + 4 + 8 * (u32::from(self.used_seen) % self.num);
        self.used_seen = self.used_seen.wrapping_add(1);
        Some((b.read32(at), b.read32(at + 4)))
    }
}

pub fn reg(b: &mut Bench, offset: u32, value: u32) {
    b.set(NET_BASE + offset, value);
}
pub fn status(b: &mut Bench) -> u32 {
    b.get(NET_BASE + 0x070)
}
pub fn interrupt_status(b: &mut Bench) -> u32 {
    b.get(NET_BASE + 0x060)
}

/// Negotiates up to FEATURES_OK with all that is offered; true if the device agrees.
pub fn negotiate(b: &mut Bench) -> bool {
    negotiate_but(b, 0)
}

/// The same by a driver that knows nothing of some features of the first word.
pub fn negotiate_but(b: &mut Bench, unknown: u32) -> bool {
    reg(b, 0x070, 0);
    assert_eq!(status(b), 0);
    reg(b, 0x070, ACKNOWLEDGE);
    reg(b, 0x070, ACKNOWLEDGE | DRIVER);
    for word in 0..2 {
        reg(b, 0x014, word);
        let offered = b.get(NET_BASE + 0x010);
        reg(b, 0x024, word);
        reg(b, 0x020, if word == 0 { offered & !unknown } else { offered });
    }
    reg(b, 0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    status(b) & FEATURES_OK != 0
}

/// Brings the device up with both queues in the given pages, and lets its interrupt through the PLIC.
pub fn bring_up(b: &mut Bench, num: u32, rx_page: u32, tx_page: u32) -> (Queue, Queue) {
    bring_up_but(b, 0, num, rx_page, tx_page)
}

/// The same by a driver that knows nothing of some features of the first word.
pub fn bring_up_but(b: &mut Bench, unknown: u32, num: u32, rx_page: u32, tx_page: u32) -> (Queue, Queue) {
    assert!(negotiate_but(b, unknown));
    let (rx, tx) = (Queue::at(RX, num, rx_page), Queue::at(TX, num, tx_page));
    for page in [rx_page, tx_page] {
        b.write(page, &[0; 4096]);
    }
    rx.setup(b);
    tx.setup(b);
    reg(b, 0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(status(b), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    b.set(PLIC_BASE + 4 * NET_IRQ, 1);
    b.set(PLIC_BASE + 0x2000, 1 << NET_IRQ);
    b.set(PLIC_BASE + 0x20_0000, 0);
    (rx, tx)
}
