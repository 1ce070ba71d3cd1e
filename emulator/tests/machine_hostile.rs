//! A guest that lies: random rings, registers and code. It may hurt itself and nobody else, and its devices work
//! again after a reset.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::net::*;
use common::*;
use emulator::abi::*;
use emulator::backend::Machines as _;
use proptest::prelude::*;

const RAM: u32 = 0x1_0000;
const PAGES: u32 = RAM / 4096;
const RX_PAGE: u32 = 0x8000;
const TX_PAGE: u32 = 0x9000;

/// A fleet of which VM 0 is hostile and VM 1 watches.
struct Watched {
    b: Bench,
    hash: u64,
    vm: Vec<u64>,
}

impl Watched {
    fn new() -> Self {
        let code: Vec<u8> = (0..512u32).flat_map(|i| addi(5, 5, i as i32 & 7).to_le_bytes()).collect();
        let mut b = Bench::with(2, None, RAM, vec![(CODE, code)], CODE);
        // the bystander owns some pages, has decoded some code and has a device in use
        b.slice_of(1, 100);
        b.write_of(1, 0x5000, &[0xaa; 4096]);
        let hash = b.ram_hash(1);
        let vm = b.state(1);
        Self { b, hash, vm }
    }
    fn bystander_is_well(&self) {
        assert_eq!(self.b.ram_hash(1), self.hash, "another VM's RAM has changed");
        assert_eq!(self.b.state(1), self.vm, "another VM's hart has changed");
        let mail = self.b.machines.mailbox(1);
        assert!(!mail.has_frames() && !mail.has_input());
        let mut out = Vec::new();
        assert_eq!(mail.drain_console(&mut out), 0, "another VM's console has output");
    }
    /// What the machine must never lose control of.
    fn sane(&self) {
        let vm = self.b.vm();
        assert!(vm.ram.private_frames <= PAGES);
        assert_eq!(vm.ram.pages, PAGES);
        for queue in vm.net.queue {
            assert!(queue.num <= VIRTQ_MAX && queue.last_avail <= 0xffff && queue.used_idx <= 0xffff);
        }
        assert!(vm.uart.rx_len <= UART_FIFO && vm.uart.tx_len <= UART_FIFO);
        assert!(vm.hart.mode <= 1 && vm.hart.x[0] == 0);
        let mut frame = [0; ETH_FRAME_BYTES as usize];
        while let Some(len) = self.b.mail().take_frame(&mut frame) {
            assert!((14..=1514).contains(&len));
        }
    }
    fn works_after_reset(&mut self) {
        let b = &mut self.b;
        b.hart().waiting = 0;
        // a packet that waits is taken into a buffer first
        let (mut rx, mut tx) = bring_up(b, 8, RX_PAGE, TX_PAGE);
        let mut waiting = 0;
        b.write(0xa000, &[7; 72]);
        tx.descriptor(b, 3, 0xa000, 72, 0, 0);
        tx.offer(b, 3);
        tx.notify(b);
        assert_eq!(tx.used(b), Some((3, 0)));
        let mut frame = [0; ETH_FRAME_BYTES as usize];
        assert_eq!(b.mail().take_frame(&mut frame), Some(60));
        b.mail().send_frame(&[1; 60]);
        for i in 0..=NET_SLOTS {
            rx.descriptor(b, i % 8, 0xb000, 2000, WRITE, 0);
            rx.offer(b, (i % 8) as u16);
            rx.notify(b);
            while rx.used(b).is_some() {
                waiting += 1;
            }
        }
        assert!(waiting > 0);
        assert_eq!(status(b) & NEEDS_RESET, 0);
        reg(b, 0x070, 0);
    }
}

fn wild(random: &mut Random) -> u64 {
    let near = [0, 0x1000, RX_PAGE, TX_PAGE, RX_PAGE + 0x400, TX_PAGE + 0x800, CODE, RAM - 64, RAM - 1, RAM];
    match random.below(8) {
        0..=3 => u64::from(random.pick(&near)) + u64::from(random.below(64)),
        4 | 5 => u64::from(random.below(RAM)),
        6 => random.next() >> random.below(64),
        _ => u64::from(random.pick(&[NET_BASE, UART_BASE, PLIC_BASE, !0, 0x8000_0000])),
    }
}

/// One case: rings full of garbage at garbage addresses, then a few notifications, packets and steps.
fn attack(w: &mut Watched, random: &mut Random) {
    let b = &mut w.b;
    if random.below(8) == 0 {
        reg(b, 0x070, 0);
        reg(b, 0x070, random.word() & 0xff);
    } else {
        assert!(negotiate(b));
    }
    let mut areas = Vec::new();
    for queue in 0..2 {
        let num = random.pick(&[1u32, 2, 8, 32]);
        let page = if random.below(4) == 0 { random.below(PAGES) * 4096 } else { RX_PAGE + queue * 4096 };
        let mut desc = page + random.pick(&[0, 16, 0x100, 0xe00, 0xff0]);
        let mut avail = page + random.pick(&[0x400, 0, 2, 0xffe, 0x7f0]);
        let mut used = page + random.pick(&[0x800, 0, 4, 0xffc, 0x404]);
        if random.below(10) == 0 {
            desc = wild(random) as u32 & !15;
            avail = wild(random) as u32 & !1;
            used = wild(random) as u32 & !3;
        }
        reg(b, 0x030, queue);
        reg(b, 0x038, num);
        reg(b, 0x080, desc);
        reg(b, 0x090, avail);
        reg(b, 0x0a0, used);
        reg(b, 0x044, 1);
        areas.push((num, desc, avail));
    }
    reg(b, 0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    for (queue, (num, desc, avail)) in areas.into_iter().enumerate() {
        let direction = if queue == 0 { WRITE } else { 0 };
        for i in 0..num.min(8) {
            let mut bytes = wild(random).to_le_bytes().to_vec();
            let some = random.below(3000);
            let len = random.pick(&[0, 1, 12, 26, 72, 1526, 2048, some, 65536, RAM, !0, random_high(some)]);
            let flags = match random.below(8) {
                0 => random.word() as u16,
                1 => INDIRECT | direction,
                2..=4 => NEXT | direction,
                _ => direction,
            };
            let next = random.pick(&[i + 1, 0, i, num, some]) as u16;
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            b.try_write_of(0, desc.wrapping_add(16 * i), &bytes);
        }
        let some = random.below(40) as u16;
        let idx = random.pick(&[1u16, 1, 2, num as u16, some, 0xffff]);
        let mut ring = vec![0, 0];
        ring.extend(idx.to_le_bytes());
        for _ in 0..num {
            ring.extend((random.pick(&[0, 1, u32::from(some)]) as u16).to_le_bytes());
        }
        b.try_write_of(0, avail, &ring);
    }
    for _ in 0..random.below(5) {
        match random.below(6) {
            0 | 1 => reg(b, 0x050, 1),
            2 => reg(b, 0x050, 0),
            3 => {
                let len = random.pick(&[0, 1, 14, 60, 1514]);
                b.mail().send_frame(&vec![random.word() as u8; len]);
            }
            4 => {
                b.slice(3);
            }
            _ => reg(b, random.below(0x100) & !3, random.word()),
        }
    }
    w.sane();
}
fn random_high(some: u32) -> u32 {
    0xffff_f000 + some % 4096
}

#[test]
fn hostile_rings() {
    let mut w = Watched::new();
    let mut random = Random::seeded(11);
    let cases = if cfg!(debug_assertions) { 100_000 } else { 1_000_000 };
    let cases = cases / effort();
    let (mut broken, mut moved) = (0u64, 0);
    for case in 0..cases {
        attack(&mut w, &mut random);
        if case % 64 == 0 {
            broken += u64::from(status(&mut w.b) & NEEDS_RESET != 0);
            w.works_after_reset();
        }
        if case % 1024 == 0 {
            w.bystander_is_well();
        }
        let net = &mut w.b.vm().net;
        moved += net.tx_frames + net.rx_frames;
        (net.tx_frames, net.rx_frames) = (0, 0);
    }
    w.bystander_is_well();
    // both kinds of cases happen: rings that work in part, and rings that break
    assert!(broken > cases / 64 / 10 && moved > cases / 20, "{broken} broken, {moved} packets");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any sequence of accesses to device registers, of any width.
    #[test]
    fn any_register_access(
        accesses in prop::collection::vec((0u32..5, 0u32..0x220, 0u32..3, any::<bool>(), any::<u32>()), 1..60),
        input in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut w = Watched::new();
        w.b.mail().send_console(&input);
        for (device, offset, size, write, value) in accesses {
            let base = [PLIC_BASE, PLIC_BASE + 0x20_0000, UART_BASE, NET_BASE, RTC_BASE][device as usize];
            let size = 1 << size;
            let address = base + (offset & !(size - 1));
            let outcome = if write {
                w.b.store(address, size, value).map(|()| 0)
            } else {
                w.b.load(address, size)
            };
            if let Err((cause, tval)) = outcome {
                prop_assert_eq!((cause, tval), (if write { 7 } else { 5 }, address));
            }
        }
        w.sane();
        w.works_after_reset();
        w.bystander_is_well();
    }
}

/// On fibers all takes thirty times as long, and on a GPU each of the many slices is a launch: so many times fewer cases.
fn effort() -> u64 {
    match By::environment() {
        By::Threaded | By::Step => 1,
        By::Warp | By::WarpShared => 15,
        By::Cuda(_) => 60,
    }
}

/// Random words run as code, in S mode and U mode, with interrupts and translation on whatever tables they are.
#[test]
fn random_code() {
    let mut random = Random::seeded(12);
    for round in 0..400 / effort() {
        let mut w = Watched::new();
        let b = &mut w.b;
        for page in 1..PAGES {
            let mut words: Vec<u32> = (0..1024).map(|_| random.word()).collect();
            for word in &mut words {
                // mostly instructions that exist, with registers that point somewhere
                if random.below(8) != 0 {
                    let opcode = random.pick(&[
                        0x03u32, 0x03, 0x13, 0x13, 0x17, 0x23, 0x23, 0x2f, 0x33, 0x37, 0x63, 0x63, 0x67,
                        0x6f, 0x73, 0x0f,
                    ]);
                    *word = *word & !0x7f | opcode;
                    if opcode == 0x2f {
                        *word = *word & !0x7000 | 0x2000;
                    }
                    if opcode == 0x73 && random.below(2) == 0 {
                        *word =
                            random.pick(&[ECALL, SRET, WFI, sfence_vma(5, 0), csrw(SATP, 6), csrw(STVEC, 7)]);
                    }
                }
                // page tables, in part
                if page == 2 && random.below(2) == 0 {
                    *word = random.below(PAGES + 2) << 10 | random.word() & 0x3ff | 1;
                }
            }
            b.write(page * 4096, &bytes(&words));
        }
        let h = b.hart();
        for i in 1..32 {
            h.x[i] = match random.below(4) {
                0 => random.word(),
                1 => random.pick(&[UART_BASE, NET_BASE, PLIC_BASE, RTC_BASE, NET_BASE + 0x50]),
                _ => random.below(RAM),
            };
        }
        h.x[17] = random.pick(&[0x5449_4d45, 0x4442_434e, 0x73_5049, 0x5246_4e43, 0, 1, 2]);
        (h.mode, h.stvec) = (random.below(2), CODE + 4 * random.below(1024));
        (h.sie, h.sstatus) = (0x222, random.word() & 0xc_0122);
        h.satp = if random.below(2) == 0 { 1 << 31 | 2 } else { 0 };
        h.stimecmp = random.next() % 10_000;
        h.pc = CODE + 4 * random.below(4096);
        for budget in [1, 100, 1000, 20_000] {
            let result = b.slice(budget);
            assert!(result.steps <= budget);
            assert!(result.exit <= EXIT_STOPPED, "round {round}");
            if result.exit == EXIT_BUDGET && b.hart().waiting == 0 {
                assert_eq!(result.steps, budget, "round {round}");
            }
        }
        w.sane();
        w.bystander_is_well();
    }
}

/// Random code again: the state after it is the same whatever the slices. Tables are left alone: when translations
/// are forgotten early, accessed bits that the guest clears without a fence are set again, as on any hart.
#[test]
fn random_code_in_slices() {
    for round in 0..60 / effort() {
        let run = |budget: u64| {
            let mut random = Random::seeded(20_000 + round);
            let mut b = Bench::new(RAM, &[]);
            for page in 1..PAGES {
                let words: Vec<u32> = (0..1024)
                    .map(|_| {
                        let opcode = random.pick(&[
                            0x03u32, 0x13, 0x13, 0x33, 0x23, 0x2f, 0x63, 0x6f, 0x67, 0x17, 0x37, 0x73, 0x0f,
                        ]);
                        let word = random.word() & !0x7f | opcode;
                        match opcode {
                            0x2f => word & !0x7000 | 0x2000,
                            0x73 => random.pick(&[ECALL, EBREAK, csrr(5, TIME), csrrw(6, SSCRATCH, 7), SRET]),
                            _ => word,
                        }
                    })
                    .collect();
                b.write(page * 4096, &bytes(&words));
            }
            let h = b.hart();
            for x in &mut h.x[1..32] {
                *x = random.below(RAM);
            }
            (h.stvec, h.sie, h.sstatus) = (CODE, STI, SSTATUS_SIE);
            (h.stimecmp, h.sepc) = (random.next() % 5000, 0x4000);
            h.x[17] = 0x5449_4d45;
            h.pc = 0x3000;
            let mut guard = 0;
            while b.hart().steps < 20_000 && guard < 40_000 {
                guard += 1;
                let left = 20_000 - b.hart().steps;
                let result = b.slice(budget.min(left));
                let mut out = Vec::new();
                b.mail().drain_console(&mut out);
                if result.exit != EXIT_BUDGET && result.exit != EXIT_DRAIN {
                    break;
                }
            }
            (b.state(0), b.ram_hash(0))
        };
        let whole = run(1_000_000);
        for budget in [1, 13, 1000, 1024] {
            assert_eq!(run(budget), whole, "round {round}, slices of {budget}");
        }
    }
}
