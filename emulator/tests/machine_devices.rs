//! PLIC, UART and clock from the driver's side, register by register.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::*;
use emulator::abi::*;

const RAM: u32 = 0x1_0000;
const PENDING: u32 = PLIC_BASE + 0x1000;
const ENABLE: u32 = PLIC_BASE + 0x2000;
const THRESHOLD: u32 = PLIC_BASE + 0x20_0000;
const CLAIM: u32 = PLIC_BASE + 0x20_0004;

fn bench() -> Bench {
    Bench::new(RAM, &[SELF])
}

// -- PLIC: its sources are made pending as a gateway would

/// Sets the level of a source as its device would, by hand.
fn line(b: &mut Bench, source: u32, high: bool) {
    let p = &mut b.vm().plic;
    if high {
        p.level |= 1 << source;
        if p.claimed & 1 << source == 0 {
            p.pending |= 1 << source;
        }
    } else {
        p.level &= !(1 << source);
    }
}

#[test]
fn plic_registers() {
    let mut b = bench();
    for source in 0..32 {
        b.set(PLIC_BASE + 4 * source, 0xffff_ffff);
        assert_eq!(b.get(PLIC_BASE + 4 * source), if source == 0 { 0 } else { 7 }, "priority of {source}");
    }
    b.set(ENABLE, !0);
    assert_eq!(b.get(ENABLE), !1, "source 0 does not exist");
    b.set(THRESHOLD, !0);
    assert_eq!(b.get(THRESHOLD), 7);
    b.set(PENDING, !0);
    assert_eq!(b.get(PENDING), 0, "read-only");
    for offset in [0x80, 0xffc, 0x1004, 0x2004, 0x2080, 0x20_0008, 0x20_1000, 0x20_1ffc] {
        b.set(PLIC_BASE + offset, !0);
        assert_eq!(b.get(PLIC_BASE + offset), 0, "reserved {offset:#x}");
    }
    for size in [1, 2] {
        assert_eq!(b.load(PLIC_BASE + 4, size), Err((5, PLIC_BASE + 4)));
        assert_eq!(b.store(PLIC_BASE + 4, size, 1), Err((7, PLIC_BASE + 4)));
    }
    assert_eq!(b.load(PLIC_BASE + PLIC_BYTES, 4), Err((5, PLIC_BASE + PLIC_BYTES)));
}

#[test]
fn plic_priorities_and_claims() {
    let mut b = bench();
    let mut random = Random::seeded(6);
    for round in 0..2000 {
        let priorities: Vec<u32> =
            (0..32).map(|source| if source == 0 { 0 } else { random.below(8) }).collect();
        let words = (0..32).map(|source| (PLIC_BASE + 4 * source as u32, priorities[source]));
        b.set_all(&words.skip(1).collect::<Vec<_>>());
        let enable = random.word() & random.word() & !1;
        let pending = random.word() & random.word() & !1;
        let threshold = random.below(8);
        b.set(ENABLE, enable);
        b.set(THRESHOLD, threshold);
        let p = &mut b.vm().plic;
        (p.level, p.pending, p.claimed) = (0, pending, 0);
        assert_eq!(b.get(PENDING), pending);
        let best = |pending: u32, above: u32| {
            let mut order: Vec<u32> = (1..32)
                .filter(|s| pending & enable & 1 << s != 0 && priorities[*s as usize] > above)
                .collect();
            order.sort_by_key(|s| (std::cmp::Reverse(priorities[*s as usize]), *s));
            order.first().copied()
        };
        let mut left = pending;
        for _ in 0..33 {
            assert_eq!(b.external_interrupt(), best(left, threshold).is_some(), "round {round}");
            // claiming pays no attention to the threshold
            let expected = best(left, 0);
            assert_eq!(b.get(CLAIM), expected.unwrap_or(0));
            let Some(source) = expected else { break };
            left &= !(1 << source);
            assert_eq!(b.get(PENDING), left);
        }
        // nothing claimed completes twice; completing leaves nothing pending while lines are low
        b.set_all(&(0..40).map(|source| (CLAIM, source)).collect::<Vec<_>>());
        assert_eq!(b.vm().plic.claimed & enable, 0);
        assert_eq!(b.get(PENDING), left);
    }
}

/// A source that is still high when its handler completes is pending again; not before, and not if it went low.
#[test]
fn plic_gateways() {
    let mut b = bench();
    b.set(PLIC_BASE + 4 * 5, 3);
    b.set(ENABLE, 1 << 5);
    line(&mut b, 5, true);
    assert!(b.external_interrupt());
    assert_eq!(b.get(CLAIM), 5);
    assert!(!b.external_interrupt());
    line(&mut b, 5, true);
    assert_eq!(b.get(PENDING), 0, "the gateway waits for the completion");
    assert_eq!(b.get(CLAIM), 0);
    b.set(CLAIM, 5);
    assert_eq!(b.get(PENDING), 1 << 5);
    assert_eq!(b.get(CLAIM), 5);
    line(&mut b, 5, false);
    b.set(CLAIM, 5);
    assert_eq!(b.get(PENDING), 0);
    // a request that was latched stays, though the line went low
    line(&mut b, 5, true);
    line(&mut b, 5, false);
    assert_eq!(b.get(CLAIM), 5);
    // completion of a source that is not enabled is ignored
    line(&mut b, 5, true);
    b.set(ENABLE, 0);
    b.set(CLAIM, 5);
    assert_eq!(b.get(PENDING), 0);
    b.set(ENABLE, 1 << 5);
    for nonsense in [0, 32, 37, 0x8000_0005, !0] {
        b.set(CLAIM, nonsense);
    }
    assert_eq!(b.get(PENDING), 0);
    b.set(CLAIM, 5);
    assert_eq!(b.get(PENDING), 1 << 5);
    // priority 0 never interrupts
    b.set(PLIC_BASE + 4 * 5, 0);
    assert!(!b.external_interrupt());
    assert_eq!(b.get(CLAIM), 0);
}

// -- UART

const RBR: u32 = 0;
const IER: u32 = 1;
const IIR: u32 = 2;
const FCR: u32 = 2;
const LCR: u32 = 3;
const MCR: u32 = 4;
const LSR: u32 = 5;
const MSR: u32 = 6;
const SCR: u32 = 7;

fn inb(b: &mut Bench, reg: u32) -> u32 {
    b.load(UART_BASE + reg, 1).unwrap()
}
fn outb(b: &mut Bench, reg: u32, value: u32) {
    b.store(UART_BASE + reg, 1, value).unwrap();
}
fn sent(b: &Bench) -> Vec<u8> {
    let mut out = Vec::new();
    b.mail().drain_console(&mut out);
    out
}

#[test]
fn uart_after_reset() {
    let mut b = bench();
    assert_eq!(inb(&mut b, IER), 0);
    assert_eq!(inb(&mut b, IIR), 1);
    assert_eq!(inb(&mut b, LCR), 0);
    assert_eq!(inb(&mut b, MCR), 0);
    assert_eq!(inb(&mut b, LSR), 0x60);
    assert_eq!(inb(&mut b, MSR) & 0x0f, 0);
}

#[test]
fn uart_plain_registers() {
    let mut b = bench();
    for value in 0..256 {
        outb(&mut b, SCR, value);
        assert_eq!(inb(&mut b, SCR), value);
        outb(&mut b, LCR, value & 0x7f);
        assert_eq!(inb(&mut b, LCR), value & 0x7f);
        outb(&mut b, IER, value);
        assert_eq!(inb(&mut b, IER), value & 15);
        outb(&mut b, MCR, value);
        assert_eq!(inb(&mut b, MCR), value & 31);
    }
    outb(&mut b, IER, 5);
    outb(&mut b, LCR, 0x83);
    outb(&mut b, 0, 0x34);
    outb(&mut b, 1, 0x12);
    assert_eq!((inb(&mut b, 0), inb(&mut b, 1)), (0x34, 0x12), "divisor latch");
    outb(&mut b, LCR, 3);
    assert_eq!(inb(&mut b, IER), 5, "the divisor is not IER");
    assert!(sent(&b).is_empty(), "nor is it THR");
    outb(&mut b, LSR, 0xff);
    outb(&mut b, MSR, 0xff);
    assert_eq!(inb(&mut b, LSR), 0x60, "read-only");
    // wider accesses reach the same registers; beyond them there is nothing
    outb(&mut b, SCR, 0x5a);
    assert_eq!(b.load(UART_BASE + 4, 4), Ok(31));
    for offset in [8, 0x100, 0xffc] {
        assert_eq!(b.load(UART_BASE + offset, 4), Ok(0));
        b.store(UART_BASE + offset, 4, 0x55).unwrap();
    }
    assert_eq!(b.load(UART_BASE + UART_BYTES, 1), Err((5, UART_BASE + UART_BYTES)));
}

/// Interrupt identification by priority, FIFO trigger levels and the character time-out.
#[test]
fn uart_receives() {
    for (trigger, level) in [(0, 1), (0x40, 4), (0x80, 8), (0xc0, 14)] {
        let mut b = bench();
        outb(&mut b, FCR, 1 | trigger);
        outb(&mut b, IER, 1);
        assert_eq!(inb(&mut b, IIR), 0xc1);
        let text: Vec<u8> = (1..=16).collect();
        for (count, byte) in text.iter().enumerate() {
            b.mail().send_console(&[*byte]);
            b.step(1);
            let expected = if count + 1 >= level { 0xc4 } else { 0xcc };
            assert_eq!(inb(&mut b, IIR), expected, "{} bytes, trigger {level}", count + 1);
            assert_eq!(inb(&mut b, LSR), 0x61);
        }
        for left in (0..16usize).rev() {
            assert_eq!(inb(&mut b, RBR), 16 - left as u32);
            let expected = match left {
                0 => 0xc1,
                _ if left >= level => 0xc4,
                _ => 0xcc,
            };
            assert_eq!(inb(&mut b, IIR), expected);
        }
        assert_eq!(inb(&mut b, LSR), 0x60);
    }
}

/// Input waits on the wire until the driver listens, and none of it is lost however it comes.
#[test]
fn uart_input_waits_for_the_driver() {
    let mut b = bench();
    let text: Vec<u8> = (0..100).collect();
    assert_eq!(b.mail().send_console(&text), 100);
    b.step(10);
    assert_eq!(inb(&mut b, LSR), 0x60);
    outb(&mut b, FCR, 7); // a driver clears the FIFOs as it starts
    outb(&mut b, FCR, 0);
    outb(&mut b, FCR, 1);
    outb(&mut b, MCR, 3);
    let mut seen = Vec::new();
    while inb(&mut b, LSR) & 1 != 0 {
        seen.push(inb(&mut b, RBR) as u8);
    }
    assert_eq!(seen, text);
    // without FIFOs one byte at a time
    let mut b = bench();
    outb(&mut b, IER, 1);
    b.mail().send_console(b"abc");
    b.step(1);
    for byte in b"abc" {
        assert_eq!(inb(&mut b, IIR), 4);
        assert_eq!(inb(&mut b, RBR), u32::from(*byte));
    }
    assert_eq!(inb(&mut b, IIR), 1);
    // FCR bit 1 clears what was received
    outb(&mut b, FCR, 1);
    b.mail().send_console(b"abc");
    b.step(1);
    outb(&mut b, FCR, 3);
    assert_eq!(inb(&mut b, LSR) & 1, 0);
    // and so does a change of mode
    b.mail().send_console(b"abc");
    b.step(1);
    outb(&mut b, FCR, 0);
    assert_eq!(inb(&mut b, LSR) & 1, 0);
}

#[test]
fn uart_interrupt_reaches_the_plic() {
    let mut b = bench();
    b.set(PLIC_BASE + 4 * UART_IRQ, 1);
    b.set(ENABLE, 1 << UART_IRQ);
    outb(&mut b, IER, 1);
    assert!(!b.external_interrupt());
    b.mail().send_console(b"x");
    b.step(1);
    assert!(b.external_interrupt());
    assert_eq!(b.get(CLAIM), UART_IRQ);
    assert_eq!(inb(&mut b, RBR), u32::from(b'x'));
    b.set(CLAIM, UART_IRQ);
    assert!(!b.external_interrupt());
    // the interrupt wakes a hart that waits
    b.start(CODE, &[WFI, addi(5, 5, 1), SELF]);
    b.hart().sie = SEI;
    b.hart().x[5] = 0;
    assert_eq!(b.slice(100).exit, EXIT_IDLE);
    b.mail().send_console(b"y");
    b.slice(100);
    assert_eq!(b.x(5), 1);
}

#[test]
fn uart_transmits() {
    let mut b = bench();
    outb(&mut b, IER, 2);
    assert_eq!(inb(&mut b, IIR), 2, "enabling it with an empty THR interrupts");
    assert_eq!(inb(&mut b, IIR), 1, "reading IIR clears it");
    outb(&mut b, RBR, u32::from(b'A'));
    assert_eq!(inb(&mut b, IIR), 2, "THR is empty again");
    outb(&mut b, RBR, u32::from(b'B'));
    outb(&mut b, IER, 0);
    assert_eq!(inb(&mut b, IIR), 1);
    outb(&mut b, IER, 2);
    assert_eq!(inb(&mut b, IIR), 2);
    assert_eq!(sent(&b), b"AB");
    // a receive interrupt goes first, and reading IIR then does not clear the other
    outb(&mut b, RBR, u32::from(b'C'));
    outb(&mut b, IER, 3);
    b.mail().send_console(b"z");
    b.step(1);
    assert_eq!(inb(&mut b, IIR), 4);
    assert_eq!(inb(&mut b, IIR), 4);
    assert_eq!(inb(&mut b, RBR), u32::from(b'z'));
    assert_eq!(inb(&mut b, IIR), 2);
    assert_eq!(inb(&mut b, IIR), 1);
}

/// A host that is slow to read the console: nothing is lost as long as the driver waits for THRE.
#[test]
fn uart_back_pressure() {
    let mut b = bench();
    let mut expected = Vec::new();
    let mut seen = Vec::new();
    let mut random = Random::seeded(7);
    outb(&mut b, FCR, 1);
    outb(&mut b, IER, 2);
    let mut stalls = 0;
    for i in 0..20_000u32 {
        if inb(&mut b, LSR) & 0x20 == 0 {
            stalls += 1;
            assert_eq!(inb(&mut b, LSR) & 0x60, 0);
            assert_eq!(inb(&mut b, IIR) & 15, 1, "no THRE interrupt while it is full");
            b.mail().drain_console(&mut seen);
            b.step(1);
            assert_eq!(inb(&mut b, LSR) & 0x60, 0x60);
            assert_eq!(inb(&mut b, IIR) & 15, 2, "and one when there is room again");
        }
        let byte = random.word() as u8;
        expected.push(byte);
        outb(&mut b, RBR, u32::from(byte));
        if i % 3000 == 0 {
            b.mail().drain_console(&mut seen);
        }
    }
    b.mail().drain_console(&mut seen);
    b.step(1);
    b.mail().drain_console(&mut seen);
    assert!(stalls > 3);
    assert_eq!(seen.len(), expected.len());
    assert!(seen == expected);
    // the slice that meets the full ring ends, so that the host looks
    b.start(CODE, &[sb(6, 5, 0), jal(0, -4)]);
    b.hart().x[5] = UART_BASE;
    let result = b.slice(10_000);
    assert_eq!((result.exit, result.steps), (EXIT_DRAIN, 2 * u64::from(CONSOLE_OUT_BYTES) + 1));
    // asleep with something to send: the host must drain, not wait
    b.start(CODE, &[WFI]);
    assert_eq!(b.slice(10).exit, EXIT_DRAIN);
}

/// Loopback: the transmitter feeds the receiver, the modem outputs are its inputs, and their changes interrupt.
#[test]
fn uart_loopback() {
    let mut b = bench();
    outb(&mut b, MCR, 0x10);
    inb(&mut b, MSR);
    for mcr in 0..16 {
        outb(&mut b, MCR, 0x10 | mcr);
        let lines = (mcr >> 1 & 1) << 4 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4;
        assert_eq!(inb(&mut b, MSR) & 0xf0, lines, "MCR {mcr:#x}");
    }
    // deltas: CTS, DSR and DCD at any change, RI at its trailing edge; reading clears them
    for old in 0..16 {
        for new in 0..16 {
            outb(&mut b, MCR, 0x10 | old);
            inb(&mut b, MSR);
            outb(&mut b, MCR, 0x10 | new);
            let changed = old ^ new;
            let deltas = (changed >> 1 & 1) | (changed & 1) << 1 | (old & !new & 4) | (changed & 8);
            assert_eq!(inb(&mut b, MSR) & 15, deltas, "MCR from {old:#x} to {new:#x}");
            assert_eq!(inb(&mut b, MSR) & 15, 0);
        }
    }
    outb(&mut b, MCR, 0x10);
    inb(&mut b, MSR);
    outb(&mut b, IER, 8);
    assert_eq!(inb(&mut b, IIR), 1);
    outb(&mut b, MCR, 0x11);
    assert_eq!(inb(&mut b, IIR), 0, "modem status");
    inb(&mut b, MSR);
    assert_eq!(inb(&mut b, IIR), 1);
    // data, with overrun: with FIFOs the new byte is lost, without them the old one
    outb(&mut b, IER, 4);
    for fifo in [false, true] {
        outb(&mut b, FCR, u32::from(fifo));
        let depth = if fifo { 16 } else { 1 };
        for byte in 0..=depth {
            assert_eq!(inb(&mut b, LSR) & 2, 0);
            outb(&mut b, RBR, 0x40 + byte);
        }
        assert_eq!(inb(&mut b, IIR) & 15, 6, "receiver line status");
        assert_eq!(inb(&mut b, LSR) & 0x0f, 3, "overrun, and data");
        assert_eq!(inb(&mut b, LSR) & 0x0f, 1, "reading clears it");
        assert_eq!(inb(&mut b, IIR) & 15, 1);
        if fifo {
            for byte in 0..16 {
                assert_eq!(inb(&mut b, RBR), 0x40 + byte);
            }
        } else {
            assert_eq!(inb(&mut b, RBR), 0x41);
        }
        assert_eq!(inb(&mut b, LSR) & 1, 0);
    }
    assert!(sent(&b).is_empty(), "loopback leaks to the wire");
    // the wire's input waits meanwhile
    b.mail().send_console(b"q");
    outb(&mut b, FCR, 1);
    outb(&mut b, MCR, 0x12);
    b.step(1);
    assert_eq!(inb(&mut b, LSR) & 1, 0);
    outb(&mut b, MCR, 2);
    assert_eq!(inb(&mut b, RBR), u32::from(b'q'));
}

/// FCR bits other than 0 count only if bit 0 is written as 1 (PC16550D, 8.4).
#[test]
fn uart_fifo_control_needs_its_enable() {
    let mut b = bench();
    outb(&mut b, FCR, 1 | 0x80);
    outb(&mut b, IER, 1);
    b.mail().send_console(b"abc");
    b.step(1);
    assert_eq!(inb(&mut b, IIR), 0xcc);
    outb(&mut b, FCR, 0x42); // turns the FIFOs off, which clears them; the trigger is not programmed
    assert_eq!(inb(&mut b, IIR), 1);
    b.mail().send_console(b"d");
    b.step(1);
    assert_eq!(inb(&mut b, IIR), 4);
    outb(&mut b, FCR, 2);
    assert_eq!(inb(&mut b, RBR), u32::from(b'd'), "not cleared: FCR bit 0 was 0");
}

// -- The clock

const EPOCH: u64 = 1_700_000_000_000_000_000;

fn clock(b: &mut Bench) -> u64 {
    let low = b.get(RTC_BASE);
    u64::from(low) | u64::from(b.get(RTC_BASE + 4)) << 32
}
fn set_alarm(b: &mut Bench, at: u64) {
    b.set(RTC_BASE + 0xc, (at >> 32) as u32);
    b.set(RTC_BASE + 8, at as u32);
}

#[test]
fn clock_reads_and_sets() {
    let mut b = bench();
    assert_eq!(clock(&mut b), EPOCH);
    b.hart().time_base = 65_000_000 * 3;
    assert_eq!(clock(&mut b), EPOCH + 3_000_000_000);
    // the high word is that of the time when the low word was read
    let before = EPOCH | 0xffff_ffff;
    b.hart().time_base = (before - EPOCH) * 13 / 200;
    let low = b.get(RTC_BASE);
    assert_eq!(low >> 16, 0xffff);
    b.hart().time_base += 65_000;
    let high = b.get(RTC_BASE + 4);
    assert_eq!(u64::from(high), before >> 32);
    assert_eq!(clock(&mut b) >> 32, (before >> 32) + 1);
    // setting: high word first, then low
    b.set(RTC_BASE + 4, 0x1234);
    b.set(RTC_BASE, 0x5678_9abc);
    assert_eq!(clock(&mut b), 0x1234_5678_9abc);
    b.hart().time_base += 65;
    assert_eq!(clock(&mut b), 0x1234_5678_9abc + 1000);
    for size in [1, 2] {
        assert_eq!(b.load(RTC_BASE, size), Err((5, RTC_BASE)));
    }
    assert_eq!(b.load(RTC_BASE + 0x20, 4), Ok(0));
}

#[test]
fn clock_alarm() {
    let mut b = bench();
    b.set(PLIC_BASE + 4 * RTC_IRQ, 1);
    b.set(ENABLE, 1 << RTC_IRQ);
    b.set(RTC_BASE + 0x10, 1);
    assert_eq!(b.get(RTC_BASE + 0x18), 0);
    let at = EPOCH + 1_000_000;
    set_alarm(&mut b, at);
    assert_eq!(b.get(RTC_BASE + 0x18), 1);
    assert_eq!((b.get(RTC_BASE + 8), b.get(RTC_BASE + 12)), (at as u32, (at >> 32) as u32));
    assert!(!b.external_interrupt());
    // 1 ms is 65,000 ticks: exactly then
    let steps = 65_000 - b.hart().steps;
    b.step(steps - 1);
    assert!(!b.external_interrupt());
    b.step(1);
    // the line rises at the step that reaches the time
    b.step(1);
    assert!(b.external_interrupt());
    assert_eq!(b.get(RTC_BASE + 0x18), 0, "it rings once");
    assert_eq!(b.get(CLAIM), RTC_IRQ);
    b.set(RTC_BASE + 0x1c, 1);
    b.set(CLAIM, RTC_IRQ);
    assert!(!b.external_interrupt());
    // in the past: at once
    set_alarm(&mut b, EPOCH - 1);
    assert!(b.external_interrupt());
    b.set(RTC_BASE + 0x1c, 1);
    assert_eq!(b.get(CLAIM), RTC_IRQ);
    b.set(CLAIM, RTC_IRQ);
    // cleared before it rings; and masked
    set_alarm(&mut b, EPOCH + 2_000_000);
    b.set(RTC_BASE + 0x14, 1);
    assert_eq!(b.get(RTC_BASE + 0x18), 0);
    b.step(200_000);
    assert!(!b.external_interrupt());
    b.set(RTC_BASE + 0x10, 0);
    set_alarm(&mut b, 5);
    assert!(!b.external_interrupt());
    b.set(RTC_BASE + 0x10, 1);
    assert!(b.external_interrupt(), "the interrupt was only masked");
}

/// The alarm wakes a hart in WFI: virtual time jumps there. Far alarms overflow nothing.
#[test]
fn clock_alarm_wakes() {
    let mut b = bench();
    b.set(PLIC_BASE + 4 * RTC_IRQ, 1);
    b.set(ENABLE, 1 << RTC_IRQ);
    b.set(RTC_BASE + 0x10, 1);
    set_alarm(&mut b, EPOCH + 10_000_000_000);
    b.start(CODE, &[WFI, addi(5, 5, 1), SELF]);
    b.hart().sie = SEI;
    let result = b.slice(10);
    assert_eq!(result.time_ticks, 650_000_000 + 9);
    assert_eq!(b.x(5), 1);
    for at in [u64::MAX, u64::MAX - 1, EPOCH + u64::MAX / 13, EPOCH + u64::MAX / 13 - 5, 1 << 63] {
        let mut b = bench();
        b.set(PLIC_BASE + 4 * RTC_IRQ, 1);
        b.set(ENABLE, 1 << RTC_IRQ);
        b.set(RTC_BASE + 0x10, 1);
        set_alarm(&mut b, at);
        assert!(!b.external_interrupt(), "alarm at {at:#x} rings now");
        b.step(1000);
        assert!(!b.external_interrupt(), "alarm at {at:#x} rings at once");
    }
}
