//! The SBI: every extension and function, with parameters good and bad.

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
const OK: i32 = 0;
const FAILED: i32 = -1;
const NOT_SUPPORTED: i32 = -2;
const INVALID_PARAM: i32 = -3;
const ALREADY_AVAILABLE: i32 = -6;

const BASE: u32 = 0x10;
const TIMER: u32 = 0x5449_4d45;
const IPI: u32 = 0x73_5049;
const RFENCE: u32 = 0x5246_4e43;
const HSM: u32 = 0x48_534d;
const SRST: u32 = 0x5352_5354;
const DBCN: u32 = 0x4442_434e;

fn bench() -> Bench {
    Bench::new(RAM, &[])
}

/// One call; all registers but a0 and a1 must survive. Returns the slice's result and (error, value).
fn call_with(b: &mut Bench, extension: u32, function: u32, a: &[u32]) -> (SliceResult, i32, u32) {
    b.start(CODE, &[ECALL, SELF]);
    let h = b.hart();
    for (i, x) in h.x.iter_mut().enumerate().take(32).skip(1) {
        *x = 0x0101_0101 * i as u32;
    }
    for (i, value) in a.iter().enumerate() {
        h.x[10 + i] = *value;
    }
    (h.x[16], h.x[17]) = (function, extension);
    let before = h.x;
    let result = b.slice(1);
    let h = b.hart();
    assert_eq!((h.pc, h.trapped), (CODE + 4, 0));
    assert_eq!(before[1..10], h.x[1..10]);
    assert_eq!(before[12..32], h.x[12..32]);
    (result, h.x[10] as i32, h.x[11])
}
fn call(b: &mut Bench, extension: u32, function: u32, a: &[u32]) -> (i32, u32) {
    let (_, error, value) = call_with(b, extension, function, a);
    (error, value)
}
/// A legacy call: a0 alone is changed.
fn legacy(b: &mut Bench, number: u32, a: &[u32]) -> (SliceResult, i32) {
    let a1 = a.get(1).copied().unwrap_or(0x0b0b_0b0b);
    let (result, error, value) = call_with(b, number, 0x7777, a);
    assert_eq!(value, a1, "legacy call {number} changed a1");
    (result, error)
}

#[test]
fn base() {
    let mut b = bench();
    assert_eq!(call(&mut b, BASE, 0, &[]), (OK, 0x0200_0000), "SBI 2.0");
    for function in [1, 2, 4, 5, 6] {
        assert_eq!(call(&mut b, BASE, function, &[]).0, OK);
    }
    for extension in [BASE, TIMER, IPI, RFENCE, HSM, SRST, DBCN] {
        assert_ne!(call(&mut b, BASE, 3, &[extension]).1, 0, "{extension:#x}");
    }
    for extension in [9, 15, 0x11, 0x50_4d55, 0x4e41_434c, 0x53_5441, 0x5355_5350, 0x0a00_0000, !0] {
        assert_eq!(call(&mut b, BASE, 3, &[extension]), (OK, 0), "{extension:#x}");
    }
    for function in [7, 100, !0] {
        assert_eq!(call(&mut b, BASE, function, &[]).0, NOT_SUPPORTED);
    }
}

/// What `probe` says holds for each call.
#[test]
fn probing_tells_the_truth() {
    for extension in (0..32).chain([TIMER, IPI, RFENCE, HSM, SRST, DBCN, 0x1234_5678]) {
        let mut b = bench();
        let there = call(&mut b, BASE, 3, &[extension]).1 != 0;
        let mut b = bench();
        b.start(CODE, &[ECALL, SELF]);
        b.hart().x[17] = extension;
        b.slice(1);
        assert_eq!(b.x(10) as i32 != NOT_SUPPORTED, there, "extension {extension:#x}");
    }
}

#[test]
fn unknown_functions() {
    let mut b = bench();
    for (extension, functions) in [
        (TIMER, 1..5),
        (IPI, 1..5),
        (RFENCE, 3..9),
        (HSM, 4..9),
        (SRST, 1..5),
        (DBCN, 3..9),
        (0x1234_5678, 0..3),
        (9, 0..2),
    ] {
        for function in functions.chain([0x7fff_ffff, !0]) {
            for a in [&[][..], &[0, 0, 0], &[!0, !0, !0]] {
                assert_eq!(
                    call(&mut b, extension, function, a).0,
                    NOT_SUPPORTED,
                    "{extension:#x} {function}"
                );
            }
        }
    }
}

#[test]
fn timer() {
    let mut b = bench();
    assert_eq!(call(&mut b, TIMER, 0, &[0x1234_5678, 0x9a]).0, OK);
    assert_eq!(b.hart().stimecmp, 0x9a_1234_5678);
    assert_eq!(legacy(&mut b, 0, &[7, 8]).1, 0);
    assert_eq!(b.hart().stimecmp, 0x8_0000_0007);
    // it makes STIP pending, and a later deadline takes that back
    call(&mut b, TIMER, 0, &[0, 0]);
    assert_eq!(b.sip(), STI);
    call(&mut b, TIMER, 0, &[!0, !0]);
    assert_eq!(b.sip(), 0);
    // and it is delivered before the next instruction
    let mut b = bench();
    (b.hart().stvec, b.hart().sie, b.hart().sstatus) = (0x3000, STI, SSTATUS_SIE);
    b.write(0x3000, &bytes(&[SELF]));
    b.start(CODE, &[ECALL, addi(5, 0, 1)]);
    (b.hart().x[17], b.hart().x[10], b.hart().x[11]) = (TIMER, 0, 0);
    b.step(3);
    assert_eq!((b.hart().sepc, b.hart().scause, b.x(5)), (CODE + 4, 0x8000_0005, 0));
}

/// Which harts a mask names: hart 0 is all there is.
const MASKS: [(u32, u32, i32); 9] = [
    (1, 0, OK),
    (0, 0, OK),
    (0, !0, OK), // base -1: all harts, whatever the mask
    (5, !0, OK),
    (2, 0, INVALID_PARAM),
    (3, 0, INVALID_PARAM),
    (1, 1, INVALID_PARAM),
    (1, 0x8000_0000, INVALID_PARAM),
    (!0, 0, INVALID_PARAM),
];

#[test]
fn ipi() {
    for (mask, base, error) in MASKS {
        let mut b = bench();
        assert_eq!(call(&mut b, IPI, 0, &[mask, base]).0, error, "{mask:#x}, {base:#x}");
        assert_eq!(b.sip() & SSI != 0, error == OK && (mask != 0 || base == !0), "{mask:#x}, {base:#x}");
    }
    let mut b = bench();
    call(&mut b, IPI, 0, &[1, 0]);
    assert_eq!(legacy(&mut b, 3, &[]).1, 0);
    assert_eq!(b.sip(), 0, "legacy clear_ipi");
}

#[test]
fn remote_fences() {
    for function in 0..3 {
        for (mask, base, error) in MASKS {
            let mut b = bench();
            let a = [mask, base, 0x1000, 0x2000, 7];
            assert_eq!(call(&mut b, RFENCE, function, &a).0, error, "{function}: {mask:#x}, {base:#x}");
        }
    }
    let mut b = bench();
    for number in [5, 6, 7] {
        assert_eq!(legacy(&mut b, number, &[]).1, 0);
    }
}

#[test]
fn hart_states() {
    let mut b = bench();
    assert_eq!(call(&mut b, HSM, 0, &[0, 0x1000, 0]).0, ALREADY_AVAILABLE);
    assert_eq!(call(&mut b, HSM, 0, &[1, 0x1000, 0]).0, INVALID_PARAM);
    assert_eq!(call(&mut b, HSM, 2, &[0]), (OK, 0), "started");
    for hart in [1, 0x8000_0000, !0] {
        assert_eq!(call(&mut b, HSM, 2, &[hart]).0, INVALID_PARAM);
    }
    for kind in [1, 0x0fff_ffff, 0x1000_0000, 0x7fff_ffff, 0x8000_0001, 0x8fff_ffff, 0x9000_0000, !0] {
        assert_eq!(call(&mut b, HSM, 3, &[kind, 0, 0]).0, INVALID_PARAM, "suspend {kind:#x}");
    }
    assert_eq!(call(&mut b, HSM, 3, &[0x8000_0000, 0, 0]).0, NOT_SUPPORTED);
    // the default retentive suspend is a WFI
    let (result, error, _) = call_with(&mut b, HSM, 3, &[0, 0, 0]);
    assert_eq!((result.exit, error), (EXIT_IDLE, OK));
    let (result, ..) = call_with(&mut b, HSM, 1, &[]);
    assert_eq!(result.exit, EXIT_STOPPED);
}

#[test]
fn system_reset() {
    for (kind, reason, exit) in [
        (0, 0, EXIT_SHUTDOWN),
        (1, 0, EXIT_REBOOT),
        (2, 0, EXIT_REBOOT),
        (0, 1, EXIT_FAILURE),
        (1, 1, EXIT_FAILURE),
        (2, 1, EXIT_FAILURE),
    ] {
        let mut b = bench();
        let (result, ..) = call_with(&mut b, SRST, 0, &[kind, reason]);
        assert_eq!((result.exit, result.steps), (exit, 1), "{kind}, {reason}");
    }
    let mut b = bench();
    for (kind, reason) in
        [(3, 0), (0xefff_ffff, 0), (0, 2), (!0, 0), (0, !0), (0xf000_0000, 0), (0, 0xe000_0000)]
    {
        let (result, error, _) = call_with(&mut b, SRST, 0, &[kind, reason]);
        assert_eq!((result.exit, error), (EXIT_BUDGET, INVALID_PARAM), "{kind:#x}, {reason:#x}");
    }
    let (result, _) = legacy(&mut b, 8, &[]);
    assert_eq!(result.exit, EXIT_SHUTDOWN);
}

fn drained(b: &Bench) -> Vec<u8> {
    let mut out = Vec::new();
    b.mail().drain_console(&mut out);
    out
}

#[test]
fn debug_console_writes() {
    let mut b = bench();
    b.write(0x4ffe, b"hello over a page");
    assert_eq!(call(&mut b, DBCN, 0, &[17, 0x4ffe, 0]), (OK, 17));
    assert_eq!(drained(&b), b"hello over a page");
    assert_eq!(call(&mut b, DBCN, 0, &[0, 0x4000, 0]), (OK, 0));
    assert_eq!(call(&mut b, DBCN, 2, &[0x1_00 | b'x' as u32]).0, OK);
    assert_eq!(drained(&b), b"x");
    for (len, low, high) in
        [(1, RAM, 0), (2, RAM - 1, 0), (RAM + 1, 0, 0), (!0, 0, 0), (1, !0, 0), (1, 0, 1), (8, 0x4000, !0)]
    {
        for function in [0, 1] {
            let (error, _) = call(&mut b, DBCN, function, &[len, low, high]);
            assert_eq!(error, INVALID_PARAM, "{function}: {len:#x} at {high:#x}_{low:08x}");
        }
    }
    assert!(drained(&b).is_empty());
    assert_eq!(call(&mut b, DBCN, 0, &[1, RAM - 1, 0]), (OK, 1));
}

/// All of a long text arrives, whatever part each call takes, and though the host reads only now and then.
#[test]
fn debug_console_back_pressure() {
    let mut b = bench();
    let text: Vec<u8> = (0..9000u32).map(|i| (i % 251) as u8).collect();
    b.write(0x4000, &text);
    let mut seen = Vec::new();
    let mut done = 0;
    let mut full = 0;
    while done < text.len() as u32 {
        let (result, error, taken) =
            call_with(&mut b, DBCN, 0, &[text.len() as u32 - done, 0x4000 + done, 0]);
        assert_eq!(error, OK);
        done += taken;
        if result.exit == EXIT_DRAIN {
            full += 1;
            b.mail().drain_console(&mut seen);
        } else {
            assert!(taken > 0);
        }
    }
    b.mail().drain_console(&mut seen);
    assert!(full >= 3);
    assert!(seen == text);
}

#[test]
fn debug_console_reads() {
    let mut b = bench();
    assert_eq!(call(&mut b, DBCN, 1, &[10, 0x4000, 0]), (OK, 0), "nothing there: no wait");
    b.mail().send_console(b"some input");
    assert_eq!(call(&mut b, DBCN, 1, &[4, 0x4ffe, 0]), (OK, 4));
    assert_eq!(b.read(0x4ffe, 5), b"some\0");
    assert_eq!(call(&mut b, DBCN, 1, &[100, 0x5100, 0]), (OK, 6));
    assert_eq!(b.read(0x5100, 6), b" input");
}

/// The calls that put one byte wait for the host; no byte is lost, none is sent twice.
#[test]
fn putting_a_byte_blocks() {
    for extension in [1, DBCN] {
        let mut b = bench();
        // t0 counts bytes; a0 is reloaded from it for each
        let program = [addi(10, 5, 0), ECALL, addi(5, 5, 1), bne(5, 6, -12), SELF];
        b.start(CODE, &program);
        (b.hart().x[16], b.hart().x[17], b.hart().x[6]) = (2, extension, 3 * CONSOLE_OUT_BYTES);
        let mut seen = Vec::new();
        let mut stalls = 0;
        while b.hart().pc != CODE + 16 {
            if b.slice(100_000).exit == EXIT_DRAIN {
                stalls += 1;
            }
            b.mail().drain_console(&mut seen);
            assert!(stalls < 100);
        }
        b.mail().drain_console(&mut seen);
        assert!(stalls >= 2);
        assert_eq!(seen.len(), 3 * CONSOLE_OUT_BYTES as usize, "extension {extension:#x}");
        assert!(seen.iter().enumerate().all(|(i, byte)| *byte == i as u8));
    }
    let mut b = bench();
    assert_eq!(call(&mut b, DBCN, 2, &[65]).0, OK);
    assert_ne!(FAILED, OK);
}

#[test]
fn legacy_console_input() {
    let mut b = bench();
    assert_eq!(legacy(&mut b, 2, &[]).1, -1);
    b.mail().send_console(b"ab");
    assert_eq!(legacy(&mut b, 2, &[]).1, i32::from(b'a'));
    assert_eq!(legacy(&mut b, 2, &[]).1, i32::from(b'b'));
    assert_eq!(legacy(&mut b, 2, &[]).1, -1);
}

/// U mode has no SBI: its calls trap.
#[test]
fn user_mode_does_not_reach_it() {
    let mut b = bench();
    b.start(CODE, &[ECALL]);
    (b.hart().mode, b.hart().x[17], b.hart().stvec) = (MODE_U, 8, 0x3000);
    assert_eq!(b.slice(1).exit, EXIT_BUDGET);
    assert_eq!((b.hart().scause, b.hart().pc), (8, 0x3000));
}
