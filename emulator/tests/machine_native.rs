//! Code that becomes native: it must go on exactly as before, wherever slices end, and start over when there is no room.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::*;
use emulator::backend::Machines;

const RAM: u32 = 0x20_0000;
const DATA: u32 = 0x1_0000;
/// Helpers of the random loops: an address, the base of the data, the count of rounds.
const ADDRESS: Reg = 29;
const BASE: Reg = 30;
const ROUNDS: Reg = 31;

/// One random instruction, or a few that belong together.
fn random_part(random: &mut Random, into: &mut Vec<u32>) {
    let mut any = |below: u32| random.below(below);
    // x1 is the link register
    let (rd, rs1, rs2, imm) = (2 + any(27), any(32), any(29), any(4096) as i32 - 2048);
    match any(16) {
        0 => into.push([add, sub, xor, or, and, sll, srl, sra][any(8) as usize](rd, rs1, rs2)),
        1 => into.push([slt, sltu, mul, mulh, mulhu, mulhsu, divu, rem][any(8) as usize](rd, rs1, rs2)),
        2 => into.push([addi, slti, sltiu, xori, ori, andi][any(6) as usize](any(29) & !1, rs1, imm)),
        3 => into.push([slli, srli, srai][any(3) as usize](rd, rs1, any(32))),
        4 => into.push([lui, auipc][any(2) as usize](rd, (imm as u32).wrapping_mul(0x12345))),
        5 | 6 => {
            into.extend([andi(ADDRESS, rs1, 0x7f8), add(ADDRESS, ADDRESS, BASE)]);
            let offset = any(64) as i32 - 32 & if any(4) == 0 { -1 } else { -4 };
            match any(8) {
                n @ 0..5 => into.push([lw, lb, lbu, lh, lhu][n as usize](rd, ADDRESS, offset)),
                n => into.push([sw, sb, sh][n as usize - 5](rs2, ADDRESS, offset)),
            }
        }
        // prologues and epilogues: runs of words at one base, up and down, also over the end of a page
        7 | 8 => {
            let (offset, step) = (imm & !3, if any(2) == 0 { 4 } else { -4 });
            let loads = any(2) == 0;
            for i in 0..2 + any(6) as i32 {
                let at = (offset + step * i).clamp(-2048, 2044);
                into.push(if loads { lw(2 + any(27), BASE, at) } else { sw(any(29), BASE, at) });
            }
        }
        9..12 => into.push(branch([0, 1, 4, 5, 6, 7][any(6) as usize], rs1, rs2, 4 * (1 + any(9) as i32))),
        12 => into.push(jal(0, 4 * (1 + any(9) as i32))),
        13 => into.push([csrr(rd, SSTATUS), csrr(rd, INSTRET), FENCE_I, NOP][any(4) as usize]),
        14 => into.extend([andi(ADDRESS, rs1, 0x7fc), add(ADDRESS, ADDRESS, BASE), amoadd(rd, ADDRESS, rs2)]),
        _ => into.push(u32::MAX), // a call: see below
    }
}

/// A loop with a function behind it, which it calls.
fn random_loop(random: &mut Random, rounds: u32) -> Vec<u32> {
    let mut program = Vec::new();
    program.extend(li(BASE, DATA + 0x1000));
    program.extend(li(ADDRESS, DATA + 0x1000));
    program.extend(li(ROUNDS, rounds));
    let start = program.len();
    while program.len() < start + 20 + random.below(90) as usize {
        random_part(random, &mut program);
    }
    program.extend([NOP; 10]); // branches lead no further
    program.push(addi(ROUNDS, ROUNDS, -1));
    program.push(bne(ROUNDS, 0, 4 * (start as i32 - program.len() as i32)));
    program.push(SELF);
    let function = program.len();
    program.extend([addi(10, 10, 1), beq(10, 11, 8), xor(12, 12, 10), jalr(0, 1, 0)]);
    for (at, insn) in program.iter_mut().enumerate() {
        if *insn == u32::MAX {
            *insn = jal(1, 4 * (function as i32 - at as i32));
        }
    }
    program
}

#[test]
fn native_code_does_as_decoded_code_and_single_steps() {
    for stream in 0..60 {
        let mut random = Random::seeded(0x6e61_0000 + stream);
        let program = random_loop(&mut random, 200);
        // often over the end of a page
        let start = CODE + 0xc00 + 4 * random.below(0x100);
        let mut benches = [1, 2, 40, 0].map(|jumps| {
            let mut b = Bench::new(RAM, &[]).native_after(jumps);
            b.start(start, &program);
            b.by = if jumps == 0 { By::Step } else { By::Threaded };
            b
        });
        let end = start + 4 * program.iter().position(|insn| *insn == SELF).unwrap() as u32;
        // A branch into the middle of a part may lead to a trap, and from there nowhere.
        while benches[0].hart().pc != end && benches[0].hart().trapped < 100 {
            let budget = u64::from(1 + random.below(3000));
            let states = benches.each_mut().map(|b| {
                b.slice(budget);
                let h = b.hart();
                (h.pc, h.steps, h.trapped, h.x[..32].to_vec(), b.vm().ram.private_frames)
            });
            assert!(
                states.iter().all(|state| *state == states[3]),
                "stream {stream}: {states:x?}\n{program:x?}"
            );
        }
        let memory = benches.each_mut().map(|b| b.read(DATA, 0x3000));
        assert!(memory.iter().all(|bytes| *bytes == memory[3]), "stream {stream}: {program:x?}");
    }
}

/// More native code than there is room for, from code that is written over and over.
#[test]
fn without_room_it_starts_over() {
    const ROUNDS_OF_ALL: u32 = 4000;
    let mut b = Bench::new(RAM, &[]).native_after(1);
    let function = 0x4000;
    // x5: its first instruction; x6: ADDI x10, x10, n; x7: rounds
    let mut program = Vec::new();
    program.extend(li(5, function));
    program.extend(li(6, addi(10, 10, 0)));
    program.extend(li(7, ROUNDS_OF_ALL));
    program.extend(li(8, 1 << 20));
    let again = program.len() as i32;
    program.extend([add(6, 6, 8), sw(6, 5, 0), FENCE_I, jalr(1, 5, 0), jalr(1, 5, 0), addi(7, 7, -1)]);
    program.push(bne(7, 0, 4 * (again - program.len() as i32)));
    program.push(SELF);
    let end = CODE + 4 * (program.len() as u32 - 1);
    b.start(CODE, &program);
    let mut body = vec![addi(10, 10, 0)];
    body.extend((0..60).map(|i| sw(10, 0, 0x600 + 8 * i)));
    body.push(jalr(0, 1, 0));
    b.write(function, &bytes(&body));
    let mut most = 0;
    while b.hart().pc != end {
        b.slice(20_000);
        assert_eq!(b.hart().trapped, 0, "{:x?}", b.hart().last_trap);
        most = most.max(b.machines.memory().overhead_bytes);
    }
    // each round runs it twice; the immediate of 12 bits goes round
    let immediate = |n: u32| ((n << 20) as i32 >> 20) as u32;
    let sum = (1..=ROUNDS_OF_ALL).fold(0u32, |sum, n| sum.wrapping_add(immediate(n).wrapping_mul(2)));
    assert_eq!(b.x(10), sum);
    assert!(most < 4 << 20, "{most} bytes");
}
