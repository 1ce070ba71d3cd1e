//! virtio-net with a driver that behaves: negotiation, queues, chains of any shape, back-pressure, errors, reset.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::net::*;
use common::*;
use emulator::abi::*;

const RAM: u32 = 0x4_0000;
const RX_PAGE: u32 = 0x1_0000;
const TX_PAGE: u32 = 0x1_1000;
const BUFFERS: u32 = 0x2_0000;

fn bench() -> Bench {
    Bench::new(RAM, &[asm::SELF])
}
fn taken(b: &Bench) -> Option<Vec<u8>> {
    let mut frame = [0; ETH_FRAME_BYTES as usize];
    b.mail().take_frame(&mut frame).map(|len| frame[..len].to_vec())
}
fn noise(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len).map(|_| random.word() as u8).collect()
}
fn claim(b: &mut Bench) -> u32 {
    b.get(PLIC_BASE + 0x20_0004)
}
fn complete(b: &mut Bench) {
    b.set(PLIC_BASE + 0x20_0004, NET_IRQ);
}

#[test]
fn identification() {
    let mut b = bench();
    assert_eq!(b.get(NET_BASE), 0x7472_6976);
    assert_eq!(b.get(NET_BASE + 4), 2);
    assert_eq!(b.get(NET_BASE + 8), 1);
    for queue in 0..4 {
        reg(&mut b, 0x030, queue);
        assert_eq!(b.get(NET_BASE + 0x034), if queue < 2 { VIRTQ_MAX } else { 0 });
        assert_eq!(b.get(NET_BASE + 0x044), 0);
    }
    // configuration space: MAC and MTU, in any width
    let mac: Vec<u32> = (0..6).map(|i| b.load(NET_BASE + 0x100 + i, 1).unwrap()).collect();
    assert_eq!(mac, [2, 0x4c, 0x47, 0, 0, 0]);
    assert_eq!(b.get(NET_BASE + 0x100), 0x0047_4c02);
    assert_eq!(b.load(NET_BASE + 0x10a, 2), Ok(1500));
    b.store(NET_BASE + 0x100, 1, 0xff).unwrap();
    assert_eq!(b.load(NET_BASE + 0x100, 1), Ok(2), "read-only");
    // registers answer words alone
    for size in [1, 2] {
        assert_eq!(b.load(NET_BASE + 0x70, size), Err((5, NET_BASE + 0x70)));
        assert_eq!(b.store(NET_BASE + 0x70, size, 1), Err((7, NET_BASE + 0x70)));
    }
    // no shared memory, and write-only registers read as 0
    for offset in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(b.get(NET_BASE + offset), !0);
    }
    for offset in [0x14, 0x20, 0x24, 0x38, 0x50, 0x64, 0x80, 0x90, 0xa0] {
        assert_eq!(b.get(NET_BASE + offset), 0);
    }
    let other = Bench::with(300, None, RAM, vec![], 0);
    assert_eq!(other.vm_of(299).net.mac, [2, 0x4c, 0x47, 0, 1, 43]);
}

#[test]
fn feature_negotiation() {
    let mut b = bench();
    let offered: Vec<u32> = (0..4)
        .map(|word| {
            reg(&mut b, 0x014, word);
            b.get(NET_BASE + 0x010)
        })
        .collect();
    assert_eq!(offered, [1 << 1 | 1 << 3 | 1 << 5, 1, 0, 0]);
    for (low, high, ok) in [
        (0, 1, true),
        (1 << 5, 1, true),
        (offered[0], 1, true),
        (offered[0], 0, false), // VERSION_1 must be accepted
        (0, 0, false),
        (1 << 0, 1, false),  // checksum offload was not offered
        (1 << 28, 1, false), // nor were indirect descriptors
        (0, 3, false),
        (!0, !0, false),
    ] {
        reg(&mut b, 0x070, 0);
        reg(&mut b, 0x070, ACKNOWLEDGE | DRIVER);
        for (word, value) in [(0, low), (1, high)] {
            reg(&mut b, 0x024, word);
            reg(&mut b, 0x020, value);
        }
        reg(&mut b, 0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(status(&mut b) & FEATURES_OK != 0, ok, "{low:#x}, {high:#x}");
        if ok {
            // settled: later writes change nothing
            reg(&mut b, 0x020, !0);
            assert_eq!(b.vm().net.driver_features, [low, high]);
        }
    }
}

#[test]
fn queue_setup_is_checked() {
    let good = (8, RX_PAGE, RX_PAGE + 0x400, RX_PAGE + 0x800);
    let mut cases = vec![(good, true)];
    for num in [0, 3, 33, 64, 0x8000, !0] {
        cases.push(((num, good.1, good.2, good.3), false));
    }
    for num in [1, 2, 4, 16, 32] {
        cases.push(((num, good.1, good.2, good.3), true));
    }
    // alignment and ends of RAM
    for (desc, avail, used) in [
        (RX_PAGE + 8, good.2, good.3),
        (good.1, good.2 + 1, good.3),
        (good.1, good.2, good.3 + 2),
        (RAM, good.2, good.3),
        (RAM - 64, good.2, good.3),
        (good.1, RAM, good.3),
        (good.1, RAM - 20, good.3),
        (good.1, good.2, RAM - 64),
        (good.1, good.2, 0xffff_fffc),
        (0xf410_0000, good.2, good.3),
    ] {
        cases.push(((8, desc, avail, used), false));
    }
    cases.push(((8, RAM - 128, RAM - 256, RAM - 512), true));
    cases.push(((8, good.1, RAM - 22, RAM - 128), true));
    for ((num, desc, avail, used), ok) in cases {
        let mut b = bench();
        assert!(negotiate(&mut b));
        reg(&mut b, 0x030, 0);
        reg(&mut b, 0x038, num);
        reg(&mut b, 0x080, desc);
        reg(&mut b, 0x090, avail);
        reg(&mut b, 0x0a0, used);
        reg(&mut b, 0x044, 1);
        let what = format!("{num} at {desc:#x}, {avail:#x}, {used:#x}");
        assert_eq!(b.get(NET_BASE + 0x044), u32::from(ok), "{what}");
        assert_eq!(status(&mut b) & NEEDS_RESET != 0, !ok, "{what}");
    }
    for high in [0x084, 0x094, 0x0a4] {
        let mut b = bench();
        assert!(negotiate(&mut b));
        reg(&mut b, 0x038, 8);
        reg(&mut b, 0x080, good.1);
        reg(&mut b, 0x090, good.2);
        reg(&mut b, 0x0a0, good.3);
        reg(&mut b, high, 1);
        reg(&mut b, 0x044, 1);
        assert_eq!(b.get(NET_BASE + 0x044), 0, "beyond 4 GiB through {high:#x}");
    }
    // a queue that does not exist, and one that is ready
    let mut b = bench();
    let (rx, _) = bring_up(&mut b, 8, RX_PAGE, TX_PAGE);
    reg(&mut b, 0x030, 7);
    reg(&mut b, 0x038, 8);
    reg(&mut b, 0x044, 1);
    assert_eq!(b.get(NET_BASE + 0x044), 0);
    reg(&mut b, 0x030, 0);
    reg(&mut b, 0x080, 0x3000);
    reg(&mut b, 0x038, 2);
    assert_eq!((b.vm().net.queue[0].desc, b.vm().net.queue[0].num), (rx.desc.into(), 8));
    reg(&mut b, 0x044, 0);
    assert_eq!(b.get(NET_BASE + 0x044), 0);
}

/// Packets out, cut into descriptors in every way.
#[test]
fn transmit_any_shape() {
    let mut b = bench();
    let (_, mut tx) = bring_up(&mut b, 32, RX_PAGE, TX_PAGE);
    let mut random = Random::seeded(8);
    for round in 0..3000 {
        let any = 14 + random.below(1501);
        let len = random.pick(&[14, 15, 60, 64, 1513, 1514, any]);
        let frame = noise(&mut random, len as usize);
        let bytes = [noise(&mut random, HEADER as usize), frame.clone()].concat();
        // cut points, zero-length pieces too
        let pieces = 1 + random.below(8);
        let mut cuts: Vec<usize> =
            (1..pieces).map(|_| random.below(bytes.len() as u32 + 1) as usize).collect();
        if random.below(3) == 0 {
            cuts.push(HEADER as usize);
        }
        cuts.push(0);
        cuts.push(bytes.len());
        cuts.sort();
        let mut order: Vec<u32> = (0..32).collect();
        for i in 0..32 {
            order.swap(i, i + random.below(32 - i as u32) as usize);
        }
        for (i, cut) in cuts.windows(2).enumerate() {
            let addr = BUFFERS + 0x800 * i as u32 + random.below(600);
            b.write(addr, &bytes[cut[0]..cut[1]]);
            let last = i + 2 == cuts.len();
            let flags = if last { 0 } else { NEXT };
            let next = if last { random.word() as u16 } else { order[i + 1] as u16 };
            tx.descriptor(&b, order[i], addr.into(), (cut[1] - cut[0]) as u32, flags, next);
        }
        tx.offer(&b, order[0] as u16);
        assert_eq!(taken(&b), None);
        tx.notify(&mut b);
        assert_eq!(taken(&b), Some(frame), "round {round}, cuts {cuts:?}");
        assert_eq!(tx.used(&b), Some((order[0], 0)));
        assert_eq!(interrupt_status(&mut b), 1);
        assert!(b.external_interrupt());
        assert_eq!(claim(&mut b), NET_IRQ);
        reg(&mut b, 0x064, 1);
        assert_eq!(interrupt_status(&mut b), 0);
        complete(&mut b);
        assert!(!b.external_interrupt());
    }
    assert_eq!((b.vm().net.tx_frames, b.vm().net.errors, b.vm().net.tx_dropped), (3000, 0, 0));
}

/// Packets in, into chains of every shape; nothing beyond the packet is touched.
#[test]
fn receive_any_shape() {
    let mut b = bench();
    let (mut rx, _) = bring_up(&mut b, 32, RX_PAGE, TX_PAGE);
    let mut random = Random::seeded(9);
    for round in 0..3000 {
        let any = 14 + random.below(1501);
        let len = random.pick(&[14, 60, 1514, any]);
        let frame = noise(&mut random, len as usize);
        let mut room = HEADER + len + random.pick(&[0, 0, 1, 500]);
        let mut pieces = Vec::new();
        while room > 0 {
            let piece = if pieces.len() == 7 {
                room
            } else {
                {
                    let some = random.below(room + 1);
                    random.pick(&[room, some, 12, 1]).min(room)
                }
            };
            pieces.push(piece);
            room -= piece;
        }
        for (i, piece) in pieces.iter().enumerate() {
            let addr = BUFFERS + 0x1000 * i as u32 + 0x200;
            b.write(addr - 8, &vec![0xa5; *piece as usize + 16]);
            let last = i + 1 == pieces.len();
            rx.descriptor(
                &b,
                i as u32,
                addr.into(),
                *piece,
                if last { WRITE } else { WRITE | NEXT },
                i as u16 + 1,
            );
        }
        rx.offer(&b, 0);
        assert!(b.mail().send_frame(&frame));
        b.step(1);
        let total = HEADER + len;
        assert_eq!(rx.used(&b), Some((0, total)), "round {round}");
        let mut bytes = Vec::new();
        let mut left = total;
        for (i, piece) in pieces.iter().enumerate() {
            let addr = BUFFERS + 0x1000 * i as u32 + 0x200;
            let used = left.min(*piece);
            bytes.extend(b.read(addr, used as usize));
            left -= used;
            assert_eq!(b.read(addr - 8, 8), [0xa5; 8]);
            let rest = (*piece - used) as usize + 8;
            assert_eq!(b.read(addr + used, rest), vec![0xa5; rest], "beyond the packet");
        }
        assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "header, one buffer");
        assert!(bytes[12..] == frame, "round {round}");
        assert_eq!(interrupt_status(&mut b), 1);
        reg(&mut b, 0x064, 1);
    }
    assert_eq!((b.vm().net.rx_frames, b.vm().net.errors), (3000, 0));
}

/// The guest is told which checksums were verified, if it has said that it understands that.
#[test]
fn verified_checksums_are_marked() {
    const GUEST_CSUM: u32 = 1 << 1;
    const DATA_VALID: u8 = 2;
    for (unknown, marked) in [(0, DATA_VALID), (GUEST_CSUM, 0)] {
        let mut b = bench();
        let (mut rx, _) = bring_up_but(&mut b, unknown, 8, RX_PAGE, TX_PAGE);
        rx.descriptor(&b, 0, BUFFERS.into(), 2048, WRITE, 0);
        for (intact, flags) in [(true, marked), (false, 0), (true, marked)] {
            rx.offer(&b, 0);
            let mail = b.mail();
            assert!(if intact { mail.send_intact(&[7; 60]) } else { mail.send_frame(&[7; 60]) });
            b.step(1);
            assert_eq!(rx.used(&b), Some((0, HEADER + 60)));
            assert_eq!(b.read(BUFFERS, 12), [flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "{unknown:#x}");
        }
    }
}

/// Rings go round: more packets than 16-bit indices, with several per notification.
#[test]
fn indices_wrap() {
    let mut b = bench();
    let (_, mut tx) = bring_up(&mut b, 8, RX_PAGE, TX_PAGE);
    b.write(BUFFERS, &noise(&mut Random::seeded(10), 80));
    // no interrupts wanted: that flag is honoured
    b.write16(tx.avail, 1);
    for i in 0..8 {
        tx.descriptor(&b, i, BUFFERS.into(), 60 + i, 0, 0);
    }
    let mut count = 0u32;
    while count < 70_000 {
        let burst = 1 + count % 8;
        for i in 0..burst {
            tx.offer(&b, ((count + i) % 8) as u16);
        }
        tx.notify(&mut b);
        for i in 0..burst {
            assert_eq!(tx.used(&b), Some(((count + i) % 8, 0)));
            assert_eq!(taken(&b).map(|f| f.len()), Some(60 + (count as usize + i as usize) % 8 - 12));
        }
        assert_eq!(tx.used(&b), None);
        count += burst;
    }
    assert_eq!(interrupt_status(&mut b), 0);
    assert_eq!((b.vm().net.tx_frames, b.vm().net.errors), (count.into(), 0));
}

/// The mailbox is full: the device waits, and goes on when the host has taken a packet; none is lost or reordered.
#[test]
fn transmit_back_pressure() {
    let mut b = bench();
    let (_, mut tx) = bring_up(&mut b, 32, RX_PAGE, TX_PAGE);
    for i in 0..32 {
        b.write(BUFFERS + 64 * i, &[i as u8; 64]);
        tx.descriptor(&b, i, (BUFFERS + 64 * i).into(), 64, 0, 0);
        tx.offer(&b, i as u16);
    }
    tx.notify(&mut b);
    let mut used = 0;
    let mut seen = 0u8;
    while seen < 32 {
        while tx.used(&b).is_some() {
            used += 1;
        }
        assert_eq!(used, (u32::from(seen) + NET_SLOTS).min(32), "{seen} taken");
        // a VM that sleeps with packets to send asks the host to drain
        if used < 32 {
            b.start(CODE, &[asm::WFI]);
            assert_eq!(b.slice(10).exit, EXIT_DRAIN);
        }
        assert_eq!(taken(&b), Some(vec![seen; 52]));
        seen += 1;
        b.hart().waiting = 0;
        b.start(CODE, &[asm::SELF]);
        b.step(1);
    }
    assert_eq!(taken(&b), None);
    assert_eq!((b.vm().net.tx_stalled, b.vm().net.tx_frames), (0, 32));
}

/// No buffers: packets wait in the mailbox in order; a buffer too small drops the packet and keeps the buffer.
#[test]
fn receive_back_pressure() {
    let mut b = bench();
    let (mut rx, _) = bring_up(&mut b, 8, RX_PAGE, TX_PAGE);
    for i in 0..NET_SLOTS {
        assert!(b.mail().send_frame(&[i as u8; 60]));
    }
    assert!(!b.mail().send_frame(&[9; 60]), "full");
    b.step(5);
    assert_eq!(rx.used(&b), None);
    for i in 0..NET_SLOTS {
        rx.descriptor(&b, 0, BUFFERS.into(), 2000, WRITE, 0);
        rx.offer(&b, 0);
        rx.notify(&mut b);
        assert_eq!(rx.used(&b), Some((0, 72)));
        assert_eq!(b.read(BUFFERS + 12, 60), [i as u8; 60]);
        assert_eq!(rx.used(&b), None);
    }
    // too small
    rx.descriptor(&b, 1, BUFFERS.into(), 71, WRITE, 0);
    rx.offer(&b, 1);
    assert!(b.mail().send_frame(&[1; 60]));
    assert!(b.mail().send_frame(&[2; 59]));
    b.step(1);
    assert_eq!(rx.used(&b), Some((1, 71)));
    assert_eq!(b.read(BUFFERS + 12, 59), [2; 59]);
    assert_eq!(b.vm().net.rx_dropped, 1);
}

#[test]
fn packets_of_wrong_size_are_dropped() {
    let mut b = bench();
    let (_, mut tx) = bring_up(&mut b, 8, RX_PAGE, TX_PAGE);
    for (i, len) in [0, 1, 11, 12, 25, 12 + 1515, 4096, 60_000].into_iter().enumerate() {
        tx.descriptor(&b, 0, BUFFERS.into(), len, 0, 0);
        tx.offer(&b, 0);
        tx.notify(&mut b);
        assert_eq!(tx.used(&b), Some((0, 0)), "the buffer comes back");
        assert_eq!(taken(&b), None);
        assert_eq!(b.vm().net.tx_dropped, i as u64 + 1);
    }
    tx.descriptor(&b, 0, BUFFERS.into(), 26, 0, 0);
    tx.offer(&b, 0);
    tx.notify(&mut b);
    assert_eq!(taken(&b).map(|f| f.len()), Some(14));
}

/// What a driver must not do: the device stops, says so with an interrupt, and works again after a reset.
#[test]
fn broken_chains_need_a_reset() {
    type Break = fn(&mut Bench, &mut Queue, &mut Queue);
    let cases: [(&str, Break); 16] = [
        ("a loop", |b, _, tx| {
            tx.descriptor(b, 0, BUFFERS.into(), 10, NEXT, 1);
            tx.descriptor(b, 1, BUFFERS.into(), 10, NEXT, 0);
            tx.offer(b, 0);
        }),
        ("a loop to itself", |b, _, tx| {
            tx.descriptor(b, 0, BUFFERS.into(), 10, NEXT, 0);
            tx.offer(b, 0);
        }),
        ("next beyond the table", |b, _, tx| {
            tx.descriptor(b, 0, BUFFERS.into(), 10, NEXT, 8);
            tx.offer(b, 0);
        }),
        ("head beyond the table", |b, _, tx| tx.offer(b, 8)),
        ("head far beyond the table", |b, _, tx| tx.offer(b, 0xffff)),
        ("indirect", |b, _, tx| {
            tx.descriptor(b, 0, BUFFERS.into(), 64, INDIRECT, 0);
            tx.offer(b, 0);
        }),
        ("an address beyond RAM", |b, _, tx| {
            tx.descriptor(b, 0, RAM.into(), 64, 0, 0);
            tx.offer(b, 0);
        }),
        ("over the end of RAM", |b, _, tx| {
            tx.descriptor(b, 0, (RAM - 63).into(), 64, 0, 0);
            tx.offer(b, 0);
        }),
        ("a device's address", |b, _, tx| {
            tx.descriptor(b, 0, UART_BASE.into(), 64, 0, 0);
            tx.offer(b, 0);
        }),
        ("an address of 64 bits", |b, _, tx| {
            tx.descriptor(b, 0, 1 << 32 | u64::from(BUFFERS), 64, 0, 0);
            tx.offer(b, 0);
        }),
        ("address plus length wraps", |b, _, tx| {
            tx.descriptor(b, 0, u64::MAX - 10, 64, 0, 0);
            tx.offer(b, 0);
        }),
        ("a huge length", |b, _, tx| {
            tx.descriptor(b, 0, BUFFERS.into(), !0, 0, 0);
            tx.offer(b, 0);
        }),
        ("the available index jumps", |b, _, tx| b.write16(tx.avail + 2, 9)),
        ("the available index runs backwards", |b, _, tx| b.write16(tx.avail + 2, 0xffff)),
        ("a buffer to write, in the transmit queue", |b, _, tx| {
            tx.descriptor(b, 0, BUFFERS.into(), 64, WRITE, 0);
            tx.offer(b, 0);
        }),
        ("a buffer to read, in the receive queue", |b, rx, _| {
            rx.descriptor(b, 0, BUFFERS.into(), 2000, 0, 0);
            rx.offer(b, 0);
        }),
    ];
    for (what, provoke) in cases {
        let mut b = bench();
        let (mut rx, mut tx) = bring_up(&mut b, 8, RX_PAGE, TX_PAGE);
        b.mail().send_frame(&[1; 60]);
        provoke(&mut b, &mut rx, &mut tx);
        tx.notify(&mut b);
        rx.notify(&mut b);
        assert_eq!(status(&mut b) & NEEDS_RESET, NEEDS_RESET, "{what}");
        assert_eq!(interrupt_status(&mut b), 2, "{what}: configuration change");
        assert!(b.external_interrupt());
        assert_eq!(b.vm().net.errors, 1, "{what}");
        // dead until reset; writing the status does not help
        reg(&mut b, 0x070, 15);
        assert_eq!(status(&mut b) & NEEDS_RESET, NEEDS_RESET);
        tx.notify(&mut b);
        assert_eq!((rx.used(&b), tx.used(&b), b.vm().net.errors), (None, None, 1), "{what}");
        assert_eq!(taken(&b), None, "{what}");
        // then all is well
        let (mut rx, mut tx) = bring_up(&mut b, 8, RX_PAGE, TX_PAGE);
        assert_eq!(interrupt_status(&mut b), 0);
        b.write(BUFFERS, &[7; 72]);
        tx.descriptor(&b, 3, BUFFERS.into(), 72, 0, 0);
        tx.offer(&b, 3);
        tx.notify(&mut b);
        assert_eq!((tx.used(&b), taken(&b)), (Some((3, 0)), Some(vec![7; 60])), "{what}");
        rx.descriptor(&b, 5, BUFFERS.into(), 2000, WRITE, 0);
        rx.offer(&b, 5);
        rx.notify(&mut b);
        assert_eq!(rx.used(&b), Some((5, 72)), "{what}");
    }
}

/// Before DRIVER_OK, with a queue that is not ready, or after a reset nothing moves.
#[test]
fn nothing_moves_before_its_time() {
    let mut b = bench();
    assert!(negotiate(&mut b));
    let (mut rx, mut tx) = (Queue::at(RX, 8, RX_PAGE), Queue::at(TX, 8, TX_PAGE));
    rx.setup(&mut b);
    tx.setup(&mut b);
    tx.descriptor(&b, 0, BUFFERS.into(), 72, 0, 0);
    rx.descriptor(&b, 0, BUFFERS.into(), 2000, WRITE, 0);
    tx.offer(&b, 0);
    rx.offer(&b, 0);
    b.mail().send_frame(&[1; 60]);
    tx.notify(&mut b);
    rx.notify(&mut b);
    b.step(3);
    assert_eq!((rx.used(&b), tx.used(&b), taken(&b)), (None, None, None));
    reg(&mut b, 0x070, 15);
    b.step(1);
    assert_eq!(rx.used(&b), Some((0, 72)), "what waited is delivered");
    for queue in [2, 3, 0xffff, !0] {
        reg(&mut b, 0x050, queue); // no such queue
    }
    reg(&mut b, 0x070, 0);
    tx.notify(&mut b);
    assert_eq!((status(&mut b), taken(&b)), (0, None));
}
