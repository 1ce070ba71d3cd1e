//! Code that changes: by itself, by a device, by eviction; with FENCE.I the change is seen, without it nothing breaks.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::*;

const RAM: u32 = 0x20_0000;

/// A store into the line that runs, right behind itself, for every distance and place in the page.
#[test]
fn code_overwrites_itself() {
    let mut b = Bench::new(RAM, &[]);
    for start in [CODE, CODE + 0x800, CODE + 0xfe0, CODE + 0xff0, CODE + 0xff8, CODE + 0xffc] {
        for distance in 1..24 {
            for fence in [true, false] {
                for budget in [1, 3, 10_000u64] {
                    let target = start + 4 * (3 + distance);
                    let mut program = vec![sw(6, 5, 0), if fence { FENCE_I } else { NOP }, NOP];
                    program.extend(vec![addi(10, 10, 1); 30]);
                    program.push(SELF);
                    b.reset_of(0);
                    b.start(start, &program);
                    b.hart().x[5] = target;
                    b.hart().x[6] = addi(10, 10, 100);
                    let end = start + 4 * (program.len() as u32 - 1);
                    while b.hart().pc != end {
                        b.slice(budget.min(33));
                    }
                    // one hart in order: the change is seen at once even without the fence
                    assert_eq!(b.x(10), 129, "start {start:#x}, distance {distance}, budget {budget}");
                }
            }
        }
    }
}

/// A loop whose body it changes in every round: single words, halves and bytes, the second of a pair, a jump's target.
#[test]
fn loops_that_change_their_body() {
    for slot in 0..6 {
        for size in [1, 2, 4] {
            // x7 counts down; each round the immediate of one ADDI is set to x7
            let mut body = vec![addi(10, 10, 0); 6];
            body[slot] = addi(11, 11, 0);
            let at = CODE + 4 * 7 + 4 * slot as u32;
            let mut program = Vec::new();
            program.extend(li(5, at));
            program.extend(li(6, addi(11, 11, 0)));
            program.extend([addi(7, 0, 40), NOP, NOP]);
            let loop_at = program.len();
            program.extend(&body);
            program.push(slli(8, 7, 20));
            program.push(or(8, 8, 6));
            match size {
                4 => program.push(sw(8, 5, 0)),
                2 => program.extend([srli(9, 8, 16), sh(9, 5, 2)]),
                // imm[11:4] lies in the top byte
                _ => program.extend([srli(9, 8, 24), sb(9, 5, 3)]),
            }
            program.push(FENCE_I);
            program.push(addi(7, 7, -1));
            program.push(bne(7, 0, 4 * (loop_at as i32 - program.len() as i32)));
            program.push(SELF);
            let mut b = Bench::new(RAM, &program);
            let end = CODE + 4 * (program.len() as u32 - 1);
            b.slice(10_000);
            assert_eq!(b.hart().pc, end, "{:?}", b.hart().last_trap);
            // the sum of what each round had set: 40, 39, ... 2 (the byte holds bits 11:4 of it)
            let expected: u32 = (2..=40).map(|v| if size == 1 { v & !15 } else { v }).sum();
            assert_eq!(b.x(11), expected, "slot {slot}, size {size}");
        }
    }
}

/// Two pages that rewrite each other, over and over.
#[test]
fn pages_that_rewrite_each_other() {
    let (a, c) = (0x4000u32, 0x5000u32);
    // at a: x10 += n; store the next n into c's ADDI; jump to c — and the same at c
    let part = |other: u32| {
        let target = li(5, other);
        [
            addi(10, 10, 1),
            addi(11, 11, 1),
            target[0],
            target[1],
            andi(6, 11, 0x3f),
            slli(6, 6, 20),
            or(6, 6, 12),
            sw(6, 5, 0),
            FENCE_I,
            jalr(0, 5, 0),
        ]
    };
    let mut b = Bench::new(RAM, &[]);
    b.write(a, &bytes(&part(c)));
    b.write(c, &bytes(&part(a)));
    b.hart().pc = a;
    b.hart().x[12] = addi(10, 10, 0);
    let rounds = 5000;
    b.slice(rounds * 10);
    let expected: u64 = 1 + (1..rounds).map(|i| i & 0x3f).sum::<u64>();
    assert_eq!(u64::from(b.x(10)), expected);
}

/// More code pages of its own than a VM can have decoded: 300 pages in a ring, each also rewritten now and then.
#[test]
fn more_code_than_code_pages() {
    const PAGES: u32 = 300;
    let base = 0x2_0000;
    let mut b = Bench::new(RAM, &[]);
    for i in 0..PAGES {
        let next = base + (i + 1) % PAGES * 4096;
        let target = li(5, next);
        // a page's own word is written (so that it is private), then it counts and goes on
        b.write(base + i * 4096, &bytes(&[addi(10, 10, 1), target[0], target[1], jalr(0, 5, 0)]));
    }
    b.hart().pc = base;
    for budget in [4 * 1000, 1, 4 * 3000 - 1] {
        b.step(budget);
    }
    assert_eq!(b.x(10), 4000);
    assert_eq!(b.hart().pc, base + 4000 % PAGES * 4096);
    // change one in the middle of all that
    b.write32(base + 7 * 4096, addi(10, 10, 1000));
    b.step(4 * u64::from(PAGES));
    assert_eq!(b.x(10), 4000 + PAGES + 999);
    assert!(b.slice(1).code_pages <= emulator::abi::CODE_PAGES_PER_VM);
}

/// Two VMs with more different pages than there is room for their decoded code, which is cleared between slices then; and
/// a page that runs between all others, so that what is known of it is old when that happens.
#[test]
fn decoded_code_is_cleared() {
    const PAGES: u32 = 800;
    let (hub, base) = (CODE, 0x2_0000);
    let pieces = vec![(hub, bytes(&[addi(11, 11, 1), jalr(0, 12, 0)]))];
    let mut b = Bench::with(2, None, 0x40_0000, pieces, hub);
    for vm in 0..2 {
        for i in 0..PAGES {
            let next = li(12, base + (i + 1) % PAGES * 4096);
            let code = [addi(10, 10, i as i32), addi(0, 0, vm as i32), next[0], next[1], jalr(0, 5, 0)];
            b.write_of(vm, base + i * 4096, &bytes(&code));
        }
        let h = &mut b.vm_of(vm).hart;
        (h.x[5], h.x[12]) = (hub, base);
    }
    let mut passed = 0;
    for pages in [50, 1, 7, 2, 90].into_iter().cycle() {
        b.slices(&[0, 1], 7 * pages);
        passed += pages as u32;
        let whole = passed / PAGES * (PAGES * (PAGES - 1) / 2);
        let part = passed % PAGES;
        for vm in 0..2 {
            let h = &b.vm_of(vm).hart;
            let expected = (whole + part * part.saturating_sub(1) / 2, passed, hub);
            assert_eq!((h.x[10], h.x[11], h.pc), expected, "VM {vm}, {passed} pages");
        }
        if passed > 2 * PAGES {
            break;
        }
    }
}

/// Code that runs over a page boundary, into a page that faults, and comes back.
#[test]
fn over_the_end_of_a_page() {
    for count in [1u32, 2, 3, 5, 1023, 1024, 1025, 2500] {
        let start = 0x8000 - 4 * count.min(1000);
        let mut program = vec![addi(10, 10, 1); count as usize + 8];
        program.push(SELF);
        for budget in [1, 2, 100_000u64] {
            let mut b = Bench::new(RAM, &[]);
            b.start(start, &program);
            let steps = u64::from(count) + 8;
            while b.hart().steps < steps {
                b.step(budget.min(steps - b.hart().steps));
            }
            assert_eq!((b.x(10), b.hart().pc), (count + 8, start + 4 * (count + 8)));
        }
    }
}

/// A frame received by the network device over code that has run.
#[test]
fn a_device_overwrites_code() {
    use common::net::*;
    let code = 0x6000 + 12 + 14; // after the device's header and an Ethernet header: 0x601a is not aligned
    let code = (code + 3) & !3;
    let mut b = Bench::new(RAM, &[]);
    let (mut rx, _) = bring_up(&mut b, 8, 0x10000, 0x11000);
    b.write(code, &bytes(&[addi(10, 10, 1), jal(0, -4)]));
    b.hart().pc = code;
    b.step(10);
    assert_eq!(b.x(10), 5);
    rx.descriptor(&b, 0, 0x6000, 2048, WRITE, 0);
    rx.offer(&b, 0);
    b.start(code, &[addi(10, 10, 1), jal(0, -4)]);
    b.step(10);
    assert_eq!(b.x(10), 10);
    let mut frame = vec![0; (code - 0x6000 - 12) as usize];
    frame.extend(bytes(&[addi(10, 10, 100), jal(0, -4)]));
    assert!(b.mail().send_frame(&frame));
    b.step(10);
    assert_eq!(rx.used(&b), Some((0, 12 + frame.len() as u32)));
    assert_eq!(b.x(10), 510);
}

/// A jump into the second of two instructions that engines like to join.
#[test]
fn jumps_between_joined_instructions() {
    let joins: Vec<[u32; 2]> = vec![
        li(10, 0x1234_5678),
        [auipc(10, 0x5000), addi(10, 10, 4)],
        [lw(10, 5, 0), addi(10, 10, 1)],
        [lw(10, 5, 0), lw(11, 5, 4)],
        [sw(10, 5, 0), sw(10, 5, 4)],
        [addi(10, 10, 1), addi(10, 10, 2)],
        [slli(10, 10, 16), srli(10, 10, 16)],
        [addi(10, 10, 1), bne(0, 0, 8)],
    ];
    for pair in joins {
        let at_second = |through_first: bool| {
            let mut b = Bench::new(RAM, &[pair[0], pair[1], SELF]);
            b.write(0x8000, &bytes(&[3, 4]));
            (b.hart().x[5], b.hart().x[10]) = (0x8000, 0x77);
            if through_first {
                b.slice(10); // decoded, and joined if at all
                let h = b.hart();
                (h.pc, h.x[10]) = (CODE + 4, 0x77);
                b.slice(10);
            } else {
                b.hart().pc = CODE + 4;
                b.slice(1);
            }
            b.x(10)
        };
        assert_eq!(at_second(true), at_second(false), "{}; {}", disassemble(pair[0]), disassemble(pair[1]));
    }
}

/// Runs of loads and stores at one base, in all orders and over page ends, where the base is replaced on the way.
#[test]
fn runs_of_words() {
    let mut random = Random::seeded(5);
    let mut b = Bench::new(0x10000, &[]);
    for round in 0..3000 {
        let length = 2 + random.below(5);
        let load = random.below(2) == 0;
        let base = 0x9000 + random.below(3) * 4 + random.pick(&[0, 0xff0, 0xff4, 0xffc, 0x800]);
        let base = base + if random.below(8) == 0 { random.below(4) } else { 0 };
        let step = random.pick(&[4i32, -4, 8, 0, 12]);
        let mut offset = random.below(64) as i32 * 4 - 128;
        let mut program = Vec::new();
        let mut x: Vec<u32> = (0..33).map(|i| i * 0x0101).collect();
        x[0] = 0;
        x[5] = base;
        let mut memory: Vec<u8> = (0..0x3000u32).map(|i| (i * 7 + 3) as u8).collect();
        let start = x.clone();
        for _ in 0..length {
            let register = if load { random.pick(&[0, 5, 6, 7, 8, 9]) } else { random.pick(&[0, 5, 6, 7]) };
            let off = if random.below(6) == 0 { random.below(16) as i32 * 4 } else { offset };
            offset += step;
            program.push(if load { lw(register, 5, off) } else { sw(register, 5, off) });
            // the model
            let address = x[5].wrapping_add(off as u32).wrapping_sub(0x8000) as usize;
            if address + 4 > memory.len() {
                program.pop();
                continue;
            }
            if load {
                let value = u32::from_le_bytes(memory[address..address + 4].try_into().unwrap());
                if register != 0 {
                    x[register as usize] = value;
                }
            } else {
                memory[address..address + 4].copy_from_slice(&x[register as usize].to_le_bytes());
            }
        }
        b.reset_of(0);
        b.start(CODE, &program);
        let initial: Vec<u8> = (0..0x3000u32).map(|i| (i * 7 + 3) as u8).collect();
        b.write(0x8000, &initial);
        b.hart().x[..32].copy_from_slice(&start[..32]);
        // cold, or with the translations in place
        if random.below(4) != 0 {
            let warm: Vec<u32> = (21..24).flat_map(|page| [lw(20, page, 0), sw(20, page, 0)]).collect();
            for page in 0..3 {
                b.hart().x[21 + page] = 0x8000 + 0x1000 * page as u32;
                x[21 + page] = b.x(21 + page);
            }
            x[20] = u32::from_le_bytes(initial[0x2000..0x2004].try_into().unwrap());
            b.start(CODE, &[warm, program.clone()].concat());
            b.step(6 + program.len() as u64);
        } else {
            b.slice(program.len() as u64);
        }
        let what = format!("round {round}\n{}", listing(CODE, &program));
        assert_eq!(b.hart().trapped, 0, "{what}");
        assert_eq!(b.hart().x[..32], x[..32], "{what}");
        assert!(b.read(0x8000, 0x3000) == memory, "{what}");
    }
}
