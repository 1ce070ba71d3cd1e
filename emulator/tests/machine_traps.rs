//! Exceptions, interrupts, CSRs, WFI and time: causes, values and exact steps.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::*;
use emulator::abi::{EXIT_BUDGET, EXIT_IDLE, TIME_REAL};

const HANDLER: u32 = 0x3000;
const RAM: u32 = 0x1_0000;

/// Runs one instruction and returns the hart after it; the handler is at [`HANDLER`].
fn one(insn: u32, prepare: impl FnOnce(&mut Bench)) -> Bench {
    let mut b = Bench::new(RAM, &[insn]);
    b.hart().stvec = HANDLER;
    prepare(&mut b);
    b.step(1);
    b
}
#[track_caller]
fn trapped(b: &Bench, cause: u32, tval: u32) {
    let h = b.hart();
    assert_eq!((h.pc, h.scause, h.stval, h.sepc, h.mode), (HANDLER, cause, tval, CODE, MODE_S));
    assert_eq!((h.steps, h.trapped), (1, 1));
    assert_eq!(h.last_trap, [cause, CODE, tval]);
}

#[test]
fn ecall_and_ebreak() {
    trapped(&one(ECALL, |b| b.hart().mode = MODE_U), 8, 0);
    for mode in [MODE_U, MODE_S] {
        trapped(&one(EBREAK, |b| b.hart().mode = mode), 3, CODE);
    }
}

/// A jump to a misaligned target traps at the jump, which writes no register; a branch not taken does not trap.
#[test]
fn misaligned_jumps() {
    let far = |b: &mut Bench| b.hart().x[5] = 0x2000;
    for (insn, target) in [
        (jal(6, 6), CODE + 6),
        (jal(6, -2), CODE - 2),
        (jal(6, 0x4002), CODE + 0x4002),
        (jalr(6, 5, 2), 0x2002),
        (jalr(6, 5, 3), 0x2002), // bit 0 is dropped first
        (jalr(5, 5, -2), 0x1ffe),
        (beq(0, 0, 10), CODE + 10),
        (beq(0, 0, -6), CODE - 6),
        (bne(5, 0, 0xffe), CODE + 0xffe),
    ] {
        let b = one(insn, far);
        trapped(&b, 0, target);
        assert_eq!((b.x(5), b.x(6)), (0x2000, 0), "{} wrote a register", disassemble(insn));
    }
    for insn in [bne(0, 0, 10), beq(5, 0, -6), blt(5, 0, 0xffe)] {
        let b = one(insn, far);
        assert_eq!((b.hart().pc, b.hart().trapped), (CODE + 4, 0));
    }
    let b = one(jalr(6, 5, 1), far);
    assert_eq!((b.hart().pc, b.x(6)), (0x2000, CODE + 4));
}

#[test]
fn accesses_outside_ram() {
    for address in [RAM, RAM + 4, 0x7fff_fffc, 0x8000_0000, 0xefff_fffc, 0xf100_0000, 0xffff_fffc] {
        let at = |b: &mut Bench| b.hart().x[5] = address;
        for insn in [lw(6, 5, 0), lh(6, 5, 0), lbu(6, 5, 0), lr(6, 5)] {
            trapped(&one(insn, at), 5, address);
        }
        for insn in [sw(6, 5, 0), sh(6, 5, 0), sb(6, 5, 0), amoadd(7, 5, 6), sc(7, 5, 6)] {
            trapped(&one(insn, at), 7, address);
        }
        let mut b = one(jalr(6, 5, 0), at);
        b.step(1);
        let h = b.hart();
        assert_eq!((h.scause, h.stval, h.sepc, h.x[6]), (1, address, address, CODE + 4));
    }
    // over the end of RAM: nothing is stored
    for before in 1..4 {
        let b = one(sw(6, 5, 0), |b| {
            b.hart().x[5] = RAM - before;
            b.hart().x[6] = !0;
        });
        trapped(&b, 7, RAM);
        assert_eq!(b.read32(RAM - 4), 0);
        trapped(&one(lw(6, 5, 0), |b| b.hart().x[5] = RAM - before), 5, RAM);
    }
    // the end of the address space is followed by its start
    let b = one(lw(6, 5, 0), |b| b.hart().x[5] = 0xffff_ffff);
    trapped(&b, 5, 0xffff_ffff);
    // code that runs out of RAM
    let mut b = Bench::new(RAM, &[]);
    b.write32(RAM - 4, NOP);
    b.hart().stvec = HANDLER;
    b.hart().pc = RAM - 4;
    b.step(2);
    assert_eq!((b.hart().scause, b.hart().stval, b.hart().sepc), (1, RAM, RAM));
}

/// Devices answer naturally aligned accesses alone.
#[test]
fn misaligned_device_accesses() {
    for device in [0xf000_0000u32, 0xf400_0000, 0xf410_0100, 0xf500_0000] {
        for (insn, cause) in [(lw(6, 5, 0), 5), (lh(6, 5, 0), 5), (sw(6, 5, 0), 7), (sh(6, 5, 0), 7)] {
            trapped(&one(insn, |b| b.hart().x[5] = device + 1), cause, device + 1);
        }
    }
}

#[test]
fn misaligned_atomics() {
    for low in 1..4 {
        let at = |b: &mut Bench| b.hart().x[5] = 0x4000 + low;
        trapped(&one(lr(6, 5), at), 4, 0x4000 + low);
        trapped(&one(sc(6, 5, 7), at), 6, 0x4000 + low);
        for (f5, _) in AMOS {
            trapped(&one(amo(f5, 3, 6, 5, 7), at), 6, 0x4000 + low);
        }
    }
}

#[test]
fn user_mode_has_no_privileged_instructions() {
    for insn in [SRET, WFI, sfence_vma(0, 0), sfence_vma(5, 6), csrr(6, SSTATUS), csrw(SATP, 0)] {
        let b = one(insn, |b| b.hart().mode = MODE_U);
        trapped(&b, 2, insn);
        assert_eq!(b.hart().sstatus & SSTATUS_SPP, 0);
        assert_eq!(b.hart().waiting, 0);
    }
}

/// The stack of SIE and SPP over trap and return, from every state.
#[test]
fn the_interrupt_stack() {
    for sstatus in
        (0..8).map(|i| (i & 1) * SSTATUS_SIE | (i >> 1 & 1) * SSTATUS_SPIE | (i >> 2) * SSTATUS_SPP)
    {
        for mode in [MODE_U, MODE_S] {
            let b = one(EBREAK, |b| (b.hart().mode, b.hart().sstatus) = (mode, sstatus | SSTATUS_SUM));
            let spie = if sstatus & SSTATUS_SIE != 0 { SSTATUS_SPIE } else { 0 };
            let spp = if mode == MODE_S { SSTATUS_SPP } else { 0 };
            assert_eq!(b.hart().sstatus, spie | spp | SSTATUS_SUM);
        }
        let b = one(SRET, |b| (b.hart().sstatus, b.hart().sepc) = (sstatus | SSTATUS_MXR, 0x2000));
        let h = b.hart();
        assert_eq!(h.pc, 0x2000);
        assert_eq!(h.mode, if sstatus & SSTATUS_SPP != 0 { MODE_S } else { MODE_U });
        let sie = if sstatus & SSTATUS_SPIE != 0 { SSTATUS_SIE } else { 0 };
        assert_eq!(h.sstatus, sie | SSTATUS_SPIE | SSTATUS_MXR, "SPIE is set, SPP cleared");
    }
}

/// What sticks when all ones and all zeroes are written to each CSR, and what each form returns.
#[test]
fn csr_fields() {
    for (number, mask) in [
        (SSTATUS, SSTATUS_SIE | SSTATUS_SPIE | SSTATUS_SPP | SSTATUS_SUM | SSTATUS_MXR),
        (SIE, SSI | STI | SEI),
        (SIP, SSI),
        (STVEC, !2),
        (SCOUNTEREN, 7),
        (SENVCFG, 1),
        (SSCRATCH, !0),
        (SEPC, !3),
        (STVAL, !0),
        (SATP, 0x7fff_ffff), // mode Sv32 would need tables
    ] {
        let mut b = Bench::new(RAM, &[]);
        let mut run = |insn: u32, value: u32| {
            b.start(CODE, &[insn]);
            b.hart().x[5] = value;
            b.hart().x[6] = 0xdead;
            b.step(1);
            assert_eq!(b.hart().trapped, 0, "{}", disassemble(insn));
            b.x(6)
        };
        let ones = if number == SATP { 0x7fff_ffff } else { !0 };
        run(csrrw(6, number, 5), ones);
        assert_eq!(run(csrrs(6, number, 0), 0), mask, "{number:#x}");
        assert_eq!(run(csrrc(6, number, 5), ones), mask);
        assert_eq!(run(csrrs(6, number, 5), ones), 0, "{number:#x}");
        assert_eq!(run(csrrw(6, number, 0), 0), mask);
        assert_eq!(run(csr(5, 6, number, 0x12), 0), 0); // csrrwi
        assert_eq!(run(csr(6, 6, number, 1), 0), 0x12 & mask); // csrrsi
        assert_eq!(run(csr(7, 6, number, 3), 0), 0x13 & mask); // csrrci
        assert_eq!(run(csrrs(6, number, 0), 0), 0x10 & mask);
    }
}

/// CSRRS and CSRRC with x0 don't write: reading a read-only CSR that way is legal; and a register of value 0 does.
#[test]
fn csr_reads_do_not_write() {
    let b = one(csrr(6, CYCLE), |_| {});
    assert_eq!(b.hart().trapped, 0);
    trapped(&one(csrrs(6, CYCLE, 5), |_| {}), 2, csrrs(6, CYCLE, 5));
    trapped(&one(csr(6, 6, TIME, 1), |_| {}), 2, csr(6, 6, TIME, 1));
    trapped(&one(csrrw(0, INSTRET, 0), |_| {}), 2, csrrw(0, INSTRET, 0));
}

#[test]
fn counters() {
    let program = [csrr(5, CYCLE), csrr(6, INSTRET), csrr(7, TIME), EBREAK, csrr(8, CYCLE), csrr(9, INSTRET)];
    let mut b = Bench::new(RAM, &program);
    b.hart().stvec = CODE + 16;
    b.step(6);
    assert_eq!((b.x(5), b.x(6), b.x(7)), (0, 1, 2));
    // the trapped instruction takes its time but does not retire
    assert_eq!((b.x(8), b.x(9)), (4, 4));
    let result = b.step(1);
    assert_eq!(result.instret, b.hart().steps - b.hart().trapped);
    // the high halves, over the boundary
    let mut b =
        Bench::new(RAM, &[csrr(5, CYCLE), csrr(6, 0xc80), csrr(7, CYCLE), csrr(8, 0xc81), csrr(9, 0xc82)]);
    b.hart().steps = 0xffff_fffe;
    b.step(5);
    assert_eq!((b.x(5), b.x(6), b.x(7), b.x(8), b.x(9)), (0xffff_fffe, 0, 0, 1, 1));
}

/// The whole table of which interrupt is taken when.
#[test]
fn interrupt_priorities() {
    for mode in [MODE_U, MODE_S] {
        for enabled in [false, true] {
            for (pending, sie) in (0..64).map(|i| {
                let bits = |i: u32| (i & 1) * SSI | (i >> 1 & 1) * STI | (i >> 2 & 1) * SEI;
                (bits(i & 7), bits(i >> 3))
            }) {
                for vectored in [0, 1] {
                    let mut b = Bench::new(RAM, &[NOP]);
                    b.set(0xf000_0000 + 4 * 3, 1); // the clock's alarm is source 3
                    b.set(0xf000_2000, 1 << 3);
                    if pending & SEI != 0 {
                        b.vm().plic.pending = 1 << 3;
                    }
                    let h = b.hart();
                    (h.mode, h.sie, h.stvec) = (mode, sie, HANDLER | vectored);
                    h.sstatus = if enabled { SSTATUS_SIE } else { 0 };
                    h.sip = pending & SSI;
                    h.stimecmp = if pending & STI != 0 { 0 } else { u64::MAX };
                    b.write(HANDLER, &bytes(&[SELF; 16]));
                    b.slice(1);
                    let ready = pending & sie;
                    let taken = ready != 0 && (mode == MODE_U || enabled);
                    let h = b.hart();
                    if !taken {
                        assert_eq!((h.pc, h.scause), (CODE + 4, 0));
                        continue;
                    }
                    let code = if ready & SEI != 0 {
                        9
                    } else if ready & SSI != 0 {
                        1
                    } else {
                        5
                    };
                    let entry = HANDLER + if vectored == 1 { 4 * code } else { 0 };
                    assert_eq!((h.scause, h.sepc, h.stval), (1 << 31 | code, CODE, 0));
                    // an interrupt is no step: the step was the handler's first instruction
                    assert_eq!((h.pc, h.steps, h.trapped), (entry, 1, 0));
                }
            }
        }
    }
}

/// Exceptions go to the base of stvec also when it is vectored.
#[test]
fn exceptions_are_not_vectored() {
    let b = one(EBREAK, |b| b.hart().stvec = HANDLER | 1);
    assert_eq!(b.hart().pc, HANDLER);
}

/// A timer interrupt comes before exactly the instruction at whose step time reaches the deadline, in all ways of
/// cutting the run into slices.
#[test]
fn the_timer_is_exact() {
    let loop_ = [addi(5, 5, 1), addi(6, 6, 1), addi(7, 7, 1), jal(0, -12)];
    for deadline in [0, 1, 2, 3, 5, 100, 1023, 1024, 1025, 4096, 5000, 100_003] {
        for budget in [1, 3, 1000, 1_000_000u64] {
            let mut b = Bench::new(RAM, &loop_);
            b.write(HANDLER, &bytes(&[csrr(10, TIME), SELF]));
            let h = b.hart();
            (h.stvec, h.sie, h.sstatus, h.stimecmp) = (HANDLER, STI, SSTATUS_SIE, deadline);
            b.steps(deadline + 10, budget);
            let h = b.hart();
            assert_eq!(h.scause, 0x8000_0005);
            assert_eq!(h.x[10], deadline as u32, "deadline {deadline}, budget {budget}");
            assert_eq!(h.sepc, CODE + 4 * (deadline % 4) as u32);
            assert_eq!(u64::from(h.x[5]), deadline.div_ceil(4));
        }
    }
}

/// Enabling what is pending delivers it before the next instruction, whichever write enables it.
#[test]
fn interrupts_come_at_once_when_enabled() {
    for (insn, value) in [
        (csrrs(0, SSTATUS, 5), SSTATUS_SIE),
        (csrrw(0, SSTATUS, 5), SSTATUS_SIE),
        (csr(6, 0, SSTATUS, 2), 0),
        (csrrs(0, SIE, 5), SSI),
        (csrrs(0, SIP, 5), SSI),
        (csr(6, 0, SIP, 2), 0),
    ] {
        let mut b = Bench::new(RAM, &[NOP, insn, addi(10, 0, 1), addi(10, 0, 2)]);
        let h = b.hart();
        (h.stvec, h.sie, h.sstatus, h.sip, h.x[5]) = (HANDLER, SSI, SSTATUS_SIE, SSI, value);
        match insn >> 20 {
            SSTATUS => h.sstatus = 0,
            SIE => h.sie = 0,
            _ => h.sip = 0,
        }
        b.write(HANDLER, &bytes(&[SELF]));
        b.slice(10);
        let h = b.hart();
        assert_eq!((h.scause, h.sepc, h.x[10]), (0x8000_0001, CODE + 8, 0), "{}", disassemble(insn));
    }
    // SRET enables too
    let mut b = Bench::new(RAM, &[SRET]);
    let h = b.hart();
    (h.stvec, h.sie, h.sip, h.sepc) = (HANDLER, SSI, SSI, 0x2000);
    b.write(HANDLER, &bytes(&[SELF]));
    b.slice(5);
    assert_eq!((b.hart().scause, b.hart().sepc), (0x8000_0001, 0x2000), "in U mode interrupts are on");
}

/// sip shows what is pending; SSIP alone can be written, and setting it does not copy the others into it.
#[test]
fn sip_shows_and_takes() {
    let mut b = Bench::new(RAM, &[csrrs(6, SIP, 5), csrr(7, SIP), csrrc(8, SIP, 5), csrr(9, SIP)]);
    b.hart().stimecmp = 0;
    b.hart().x[5] = !0;
    b.step(4);
    assert_eq!((b.x(6), b.x(7), b.x(8), b.x(9)), (STI, STI | SSI, STI | SSI, STI));
}

#[test]
fn wfi() {
    // with an interrupt pending and enabled in sie, it is a no-op whatever sstatus says
    let mut b = Bench::new(RAM, &[WFI, addi(5, 5, 1), SELF]);
    (b.hart().sie, b.hart().sip) = (SSI, SSI);
    b.step(2);
    assert_eq!((b.x(5), b.hart().scause), (1, 0));
    // with one that is pending but not enabled it waits; nothing can come: the VM is idle
    let mut b = Bench::new(RAM, &[WFI, addi(5, 5, 1), SELF]);
    (b.hart().sie, b.hart().sip) = (SEI, SSI);
    let result = b.slice(100);
    assert_eq!((result.exit, result.steps, result.wake_ticks), (EXIT_IDLE, 1, u64::MAX));
    assert_eq!((b.hart().pc, b.hart().waiting), (CODE + 4, 1));
    let result = b.slice(100);
    assert_eq!((result.exit, result.steps), (EXIT_IDLE, 0), "it stays asleep");
    b.hart().sip = SSI;
    b.hart().sie = SSI;
    b.step(1);
    assert_eq!((b.x(5), b.hart().waiting), (1, 0));
    // the timer in virtual time: the wait takes no step
    let mut b = Bench::new(RAM, &[WFI, csrr(5, TIME), csrr(6, CYCLE), SELF]);
    (b.hart().sie, b.hart().stimecmp) = (STI, 1_000_000);
    let result = b.step(3);
    assert_eq!((b.x(5), b.x(6)), (1_000_000, 2));
    assert_eq!((result.time_ticks, result.exit), (1_000_002, EXIT_BUDGET));
    // and with interrupts on it is taken, with sepc after the WFI
    let mut b = Bench::new(RAM, &[WFI, addi(5, 5, 1)]);
    b.write(HANDLER, &bytes(&[SELF]));
    let h = b.hart();
    (h.sie, h.stimecmp, h.sstatus, h.stvec) = (STI, 1_000, SSTATUS_SIE, HANDLER);
    b.step(2);
    assert_eq!((b.hart().sepc, b.hart().scause, b.x(5)), (CODE + 4, 0x8000_0005, 0));
    // the timer without STIE wakes nobody
    let mut b = Bench::new(RAM, &[WFI, SELF]);
    b.hart().stimecmp = 1_000;
    let result = b.slice(100);
    assert_eq!((result.exit, result.wake_ticks), (EXIT_IDLE, u64::MAX));
}

/// In real time the host's clock rules: idle until it reaches the deadline, never backwards, never far ahead of the
/// work done.
#[test]
fn real_time() {
    let mut b = Bench::new(RAM, &[WFI, csrr(5, TIME), addi(6, 6, 1), jal(0, -8)]);
    b.time_mode = TIME_REAL;
    (b.hart().sie, b.hart().stimecmp) = (STI, 50_000);
    let result = b.slice(1000);
    assert_eq!((result.exit, result.wake_ticks), (EXIT_IDLE, 50_000));
    b.now_ticks = 49_999;
    assert_eq!(b.slice(1000).exit, EXIT_IDLE);
    b.now_ticks = 60_000;
    let result = b.slice(1000);
    assert_eq!(result.exit, EXIT_BUDGET);
    assert!(result.time_ticks >= 60_000);
    assert_eq!(b.x(6), 333);
    b.now_ticks = 10;
    let later = b.slice(1000);
    assert!(later.time_ticks >= result.time_ticks, "time goes backwards");
    b.now_ticks = 1 << 50;
    let much = b.slice(1000);
    assert!(much.time_ticks - later.time_ticks < 1000 * 65, "a busy guest is not flooded");
    // switching to virtual time keeps the clock
    b.time_mode = emulator::abi::TIME_VIRTUAL;
    let after = b.slice(10);
    assert!(after.time_ticks - much.time_ticks <= 11);
}

/// A trap handler that traps for ever uses up its budget and no more.
#[test]
fn endless_traps_end_the_slice() {
    for stvec in [0x4000, 0x9000_0000, 0xf400_0000] {
        let mut b = Bench::new(RAM, &[EBREAK]);
        b.hart().stvec = stvec;
        let result = b.step(10_000);
        assert_eq!(result.instret, 0);
    }
    let mut b = Bench::new(RAM, &[SELF]);
    (b.hart().stvec, b.hart().sie, b.hart().stimecmp) = (0x9000_0000, STI, 5);
    b.hart().sstatus = SSTATUS_SIE;
    b.step(10_000);
}

/// No budget is too large.
#[test]
fn endless_budgets() {
    for budget in [u64::MAX, u64::MAX - 5, 1 << 63, 1 << 62] {
        let mut b = Bench::new(RAM, &[addi(5, 5, 1), addi(5, 5, 1), WFI, SELF]);
        assert_eq!(b.slice(budget).exit, EXIT_IDLE);
        assert_eq!(b.x(5), 2);
        b.hart().waiting = 0;
        b.start(CODE, &[addi(5, 5, 1), WFI]);
        assert_eq!((b.slice(budget).exit, b.x(5)), (EXIT_IDLE, 3));
    }
}

/// LR and SC: what ends a reservation.
#[test]
fn reservations() {
    let outcome = |between: &[u32]| {
        let program = [&[lr(6, 5)], between, &[sc(7, 5, 8)]].concat();
        let mut b = Bench::new(RAM, &program);
        b.write(0x4000, &bytes(&[1, 2]));
        (b.hart().x[5], b.hart().x[8], b.hart().x[9]) = (0x4000, 99, 0x4004);
        b.hart().stvec = CODE + 8;
        b.hart().sepc = CODE + 8;
        b.hart().sstatus = SSTATUS_SPP;
        b.step(program.len() as u64);
        let stored = b.read32(0x4000) == 99;
        assert_eq!(b.x(7), u32::from(!stored));
        assert_eq!(b.hart().reservation, u32::MAX, "SC ends it either way");
        stored
    };
    assert!(outcome(&[]));
    assert!(outcome(&[addi(10, 10, 1)]));
    assert!(!outcome(&[sc(10, 9, 8)]), "an SC to another word ends it");
    assert!(!outcome(&[lr(10, 9)]), "another LR moves it");
    assert!(!outcome(&[EBREAK]), "a trap ends it");
    assert!(!outcome(&[SRET]), "a return ends it");
    let mut b = Bench::new(RAM, &[sc(7, 5, 8)]);
    b.hart().x[5] = 0x4000;
    b.step(1);
    assert_eq!((b.x(7), b.read32(0x4000)), (1, 0), "SC without LR");
}

/// `seed` gives fresh bits, different for each VM and each draw, and the same for the same key.
#[test]
fn entropy() {
    let program: Vec<u32> = (0..8).map(|i| csrrw(10 + i, SEED, 0)).collect();
    let draw = |vm: u32| {
        let mut b = Bench::with(3, None, RAM, vec![(CODE, bytes(&program))], CODE);
        b.slice_of(vm, 8);
        b.vm_of(vm).hart.x[10..18].to_vec()
    };
    let (first, second) = (draw(0), draw(1));
    for value in first.iter().chain(&second) {
        assert_eq!(value >> 16, 0x8000, "OPST is ES16 and the rest reads as zero");
    }
    let mut all = [first.clone(), second].concat();
    all.sort();
    all.dedup();
    assert!(all.len() > 13, "draws repeat");
    assert_eq!(first, draw(0));
    // without a fixed seed two fleets differ
    let fresh = || {
        let boot =
            emulator::memory::BootMemory { ram_bytes: RAM.into(), entry: 0, dtb_address: 0, pieces: vec![] };
        let config = emulator::backend::cpu::Config {
            boot: boot.into(),
            vms: 2,
            threads: 1,
            private_frames: None,
            epoch_ns: 0,
            seed: None,
        };
        let machines = emulator::backend::cpu::CpuMachines::new(config).unwrap();
        // SAFETY: no engine runs.
        [0, 1].map(|vm| unsafe { machines.vm(vm) }.hart.entropy_key)
    };
    let (a, b) = (fresh(), fresh());
    assert!(a[0] != a[1] && a[0] != b[0] && a[1] != b[1]);
}

/// A program with timer interrupts, traps, U mode, WFI and a device ends in the same state, step for step,
/// whatever the slices.
#[test]
fn slices_are_invisible() {
    let set_timer = |rd: Reg, ahead: i32| {
        [
            csrr(10, TIME),
            addi(10, 10, ahead),
            addi(11, 0, 0),
            addi(16, 0, 0),
            li(17, 0x5449_4d45)[0],
            li(17, 0x5449_4d45)[1],
            ECALL,
            addi(rd, rd, 1),
        ]
    };
    // main: set a timer, work, drop to U mode, which traps with ecall; now and then wait
    let mut main = set_timer(5, 700).to_vec();
    main.extend([addi(20, 0, 100), mul(21, 20, 20), addi(20, 20, -1), bne(20, 0, -8)]);
    main.extend([sw(21, 9, 0), lw(22, 9, 1), amoadd(23, 9, 20)]); // misaligned too
    main.extend([andi(24, 5, 3), bne(24, 0, 8), WFI]);
    let user = CODE + 4 * (main.len() as u32 + 5);
    let low = li(25, user);
    main.extend([low[0], low[1], csrw(SEPC, 25), csrrc(0, SSTATUS, 26), SRET]);
    main.extend([addi(27, 27, 1), xor(28, 28, 27), ECALL]);
    // the handler: interrupts re-arm the timer; an ecall of U mode goes back to main
    let handler = [
        csrr(29, SCAUSE),
        blt(29, 0, 4 * 5),
        li(30, CODE)[0],
        li(30, CODE)[1],
        csrw(SEPC, 30),
        csrrs(0, SSTATUS, 26), // stay in S mode
        add(31, 31, 29),
        csrr(10, TIME),
        addi(10, 10, 333),
        addi(11, 0, 0),
        addi(16, 0, 0),
        li(17, 0x5449_4d45)[0],
        li(17, 0x5449_4d45)[1],
        ECALL,
        SRET,
    ];
    let begin = || {
        let b = Bench::new(RAM, &main);
        b.write(HANDLER, &bytes(&handler));
        let h = b.hart();
        (h.stvec, h.sie, h.sstatus, h.x[9], h.x[26]) = (HANDLER, STI, SSTATUS_SIE, 0x4ffe & !3, SSTATUS_SPP);
        b
    };
    let run = |budget: u64, until: u64| {
        let mut b = begin();
        b.steps(until, budget);
        (b.state(0), b.ram_hash(0))
    };
    for until in [1, 500, 1_024, 20_000, 20_001, 99_999] {
        let whole = run(1_000_000, until);
        for budget in [1, 7, 1000, 1023, 1025] {
            assert_eq!(run(budget, until), whole, "slices of {budget}, after {until} steps");
        }
        // Those that end because they have lasted long enough, too.
        if slices_last(40) {
            let (mut b, mut steps, mut slices) = (begin(), 0, 0);
            while steps < until {
                let result = b.slice(until - steps);
                assert_eq!(result.exit, EXIT_BUDGET);
                (steps, slices) = (steps + result.steps, slices + 1);
            }
            assert_eq!((b.state(0), b.ram_hash(0)), whole, "{slices} short slices, after {until} steps");
            assert!(slices > until / 20_000, "{slices} slices for {until} steps");
        }
        slices_last(0);
    }
}
