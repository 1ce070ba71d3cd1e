//! The unprivileged instructions against QEMU's user-mode emulator: one program file runs in both.
//!
//! The file is a chain of small random programs. Each loads 31 registers from a block of its own, runs 24 to 60
//! random instructions (integer, multiply and divide, loads and stores of any alignment within the block, AMO,
//! LR and SC, branches both ways, jumps, AUIPC), stores its registers to the block and falls into the next one.
//! Afterwards the blocks must be equal. MACHINE_SEED explores other programs, MACHINE_PROGRAMS more of them.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use std::io::Read as _;
use std::process::{Command, Stdio};

use common::asm::*;
use common::*;

const TEXT: u32 = 0x0010_0000;
const BLOCKS: u32 = 0x0080_0000;
/// VMs that run the programs, each a part of them: a GPU takes no longer for many VMs than for one.
const VMS: usize = 16;
/// Initial registers, final registers, 256 bytes for loads and stores.
const BLOCK: u32 = 512;
const SCRATCH: i32 = 256;

/// One program being written. Register `base` holds its block's address throughout; `address` and `counter` are
/// its helpers.
struct Program<'a> {
    random: &'a mut Random,
    words: Vec<u32>,
    base: Reg,
    address: Reg,
    counter: Reg,
}

impl Program<'_> {
    /// Any register that may be written.
    fn rd(&mut self) -> Reg {
        loop {
            let rd = self.random.below(32);
            if rd != self.base && rd != self.counter {
                return rd;
            }
        }
    }
    fn rs(&mut self) -> Reg {
        self.random.below(32)
    }
    fn push(&mut self, insn: u32) {
        self.words.push(insn);
    }
    /// Points `address` somewhere into the scratch area, aligned to `align`.
    fn point(&mut self, align: u32) {
        let (address, from) = (self.address, self.rs());
        self.push(andi(address, from, (0xf8 & !(align as i32 - 1)) | (align == 1) as i32 * 7));
        self.push(add(address, address, self.base));
    }
    fn integer(&mut self) {
        let (rd, rs1, rs2) = (self.rd(), self.rs(), self.rs());
        let imm = self.random.below(4096) as i32 - 2048;
        let shamt = self.random.below(32);
        let insn = match self.random.below(30) {
            0 => add(rd, rs1, rs2),
            1 => sub(rd, rs1, rs2),
            2 => sll(rd, rs1, rs2),
            3 => slt(rd, rs1, rs2),
            4 => sltu(rd, rs1, rs2),
            5 => xor(rd, rs1, rs2),
            6 => srl(rd, rs1, rs2),
            7 => sra(rd, rs1, rs2),
            8 => or(rd, rs1, rs2),
            9 => and(rd, rs1, rs2),
            10 => mul(rd, rs1, rs2),
            11 => mulh(rd, rs1, rs2),
            12 => mulhsu(rd, rs1, rs2),
            13 => mulhu(rd, rs1, rs2),
            14 => div(rd, rs1, rs2),
            15 => divu(rd, rs1, rs2),
            16 => rem(rd, rs1, rs2),
            17 => remu(rd, rs1, rs2),
            18 => addi(rd, rs1, imm),
            19 => slti(rd, rs1, imm),
            20 => sltiu(rd, rs1, imm),
            21 => xori(rd, rs1, imm),
            22 => ori(rd, rs1, imm),
            23 => andi(rd, rs1, imm),
            24 => slli(rd, rs1, shamt),
            25 => srli(rd, rs1, shamt),
            26 => srai(rd, rs1, shamt),
            27 => lui(rd, self.random.word()),
            28 => auipc(rd, self.random.word()),
            _ => {
                // the pairs that engines fuse, and those that only look alike
                let same = self.random.below(2) == 0 && rd != 0;
                let first =
                    if rs2 & 1 == 0 { lui(rd, self.random.word()) } else { auipc(rd, self.random.word()) };
                self.push(first);
                addi(if same { rd } else { self.rd() }, rd, imm)
            }
        };
        self.push(insn);
    }
    fn memory(&mut self) {
        self.point(1);
        let (rd, rs2, address) = (self.rd(), self.rs(), self.address);
        let offset = SCRATCH - self.random.below(5) as i32 * 4;
        let insn = match self.random.below(8) {
            0 => lb(rd, address, offset),
            1 => lh(rd, address, offset),
            2 => lw(rd, address, offset),
            3 => lbu(rd, address, offset),
            4 => lhu(rd, address, offset),
            5 => sb(rs2, address, offset - 12),
            6 => sh(rs2, address, offset - 12),
            _ => sw(rs2, address, offset - 12),
        };
        self.push(insn);
    }
    fn atomic(&mut self) {
        self.point(4);
        let (address, rs2) = (self.address, self.rs());
        let mut rd = self.rd();
        self.push(addi(address, address, SCRATCH - 8));
        let order = self.random.below(4);
        match self.random.below(5) {
            0 => {
                // LR, a little work, SC: to the same word, another one, or twice
                if rd == address {
                    rd = 0;
                }
                self.push(amo(LR, order, rd, address, 0));
                if self.random.below(2) == 0 {
                    let (rd, rs1) = (self.rd(), self.rs());
                    if rd != address {
                        self.push(addi(rd, rs1, 3));
                    }
                }
                if self.random.below(4) == 0 {
                    self.push(addi(address, address, -4));
                }
                rd = self.rd();
                self.push(amo(SC, order, rd, address, rs2));
                if self.random.below(3) == 0 && rd != address {
                    let again = self.rd();
                    self.push(amo(SC, order, again, address, rs2));
                }
            }
            _ => {
                let (f5, _) = self.random.pick(&AMOS);
                self.push(amo(f5, order, rd, address, rs2));
            }
        }
    }
    fn jump(&mut self) {
        let skipped = 1 + self.random.below(4);
        let target = 4 * (skipped as i32 + 1);
        match self.random.below(5) {
            0 => {
                let rd = self.rd();
                self.push(jal(rd, target));
            }
            1 => {
                let (rd, address) = (self.rd(), self.address);
                let odd = self.random.below(2) as i32; // bit 0 of the target is dropped
                self.push(auipc(address, 0));
                self.push(jalr(rd, address, target + 4 + odd));
            }
            _ => {
                let f3 = self.random.pick(&[0, 1, 4, 5, 6, 7]);
                let (rs1, rs2) = (self.rs(), self.rs());
                self.push(branch(f3, rs1, rs2, target));
            }
        }
        for _ in 0..skipped {
            let (rd, rs1) = (self.rd(), self.rs());
            let imm = self.random.below(64) as i32;
            self.push(addi(rd, rs1, imm));
        }
    }
    /// A loop of a few rounds.
    fn repeat(&mut self) {
        let (counter, rounds) = (self.counter, 2 + self.random.below(4) as i32);
        self.push(addi(counter, 0, rounds));
        let start = self.words.len();
        for _ in 0..1 + self.random.below(4) {
            match self.random.below(3) {
                0 => self.memory(),
                _ => self.integer(),
            }
        }
        self.push(addi(counter, counter, -1));
        let back = -4 * (self.words.len() - start) as i32;
        let f3 = self.random.pick(&[1, 4]); // bne counter, x0 or blt x0, counter
        self.push(if f3 == 1 { bne(counter, 0, back) } else { blt(0, counter, back) });
    }
}

fn program(random: &mut Random, block: u32) -> Vec<u32> {
    let base = 1 + random.below(31);
    let other = |random: &mut Random, taken: &[Reg]| loop {
        let r = 1 + random.below(31);
        if !taken.contains(&r) {
            return r;
        }
    };
    let address = other(random, &[base]);
    let counter = other(random, &[base, address]);
    let mut p = Program { random, words: li(base, block).to_vec(), base, address, counter };
    for r in (1..32).filter(|r| *r != base) {
        p.push(lw(r, base, 4 * r as i32));
    }
    let length = p.words.len() as u32 + 24 + p.random.below(36);
    while (p.words.len() as u32) < length {
        match p.random.below(12) {
            0..6 => p.integer(),
            6..8 => p.memory(),
            8 => p.atomic(),
            9 | 10 => p.jump(),
            _ => p.repeat(),
        }
    }
    for r in 1..32 {
        p.push(sw(r, base, 128 + 4 * r as i32));
    }
    p.words
}

/// A minimal ELF executable with one segment for code and one for data.
fn elf(text: &[u8], data: &[u8]) -> Vec<u8> {
    let mut out = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |out: &mut Vec<u8>, v: u16| out.extend(v.to_le_bytes());
    let word = |out: &mut Vec<u8>, v: u32| out.extend(v.to_le_bytes());
    half(&mut out, 2); // executable
    half(&mut out, 243); // RISC-V
    for v in [1, TEXT, 52, 0, 0] {
        word(&mut out, v);
    }
    for v in [52, 32, 2, 40, 0, 0] {
        half(&mut out, v);
    }
    let text_at = 4096;
    let data_at = text_at + text.len().next_multiple_of(4096);
    for (at, address, len, flags) in [(text_at, TEXT, text.len(), 5), (data_at, BLOCKS, data.len(), 6)] {
        for v in [1, at as u32, address, address, len as u32, len as u32, flags, 4096] {
            word(&mut out, v);
        }
    }
    out.resize(text_at, 0);
    out.extend(text);
    out.resize(data_at, 0);
    out.extend(data);
    out
}

struct Chain {
    programs: Vec<Vec<u32>>,
    /// Where in the text each starts.
    starts: Vec<usize>,
    text: Vec<u32>,
    /// Instructions that do nothing, behind the parts for each VM: the machine stops there.
    stops: Vec<usize>,
    data: Vec<u8>,
}

fn chain(random: &mut Random, count: u32) -> Chain {
    let (programs, starts, text) = (Vec::new(), Vec::new(), Vec::new());
    let mut chain = Chain { programs, starts, text, stops: Vec::new(), data: Vec::new() };
    let part = count.div_ceil(VMS as u32);
    for number in 0..count {
        for i in 0..BLOCK / 4 {
            let word = match i {
                0..32 => random.operand(),
                32..64 => 0,
                _ => random.word(),
            };
            chain.data.extend(word.to_le_bytes());
        }
        let words = program(random, BLOCKS + number * BLOCK);
        chain.starts.push(chain.text.len());
        chain.text.extend(&words);
        chain.programs.push(words);
        if (number + 1) % part == 0 || number + 1 == count {
            chain.stops.push(chain.text.len());
            chain.text.push(NOP);
        }
    }
    // write(1, blocks, length); exit(0)
    chain.text.push(addi(10, 0, 1));
    chain.text.extend(li(11, BLOCKS));
    chain.text.extend(li(12, count * BLOCK));
    chain.text.extend([addi(17, 0, 64), ECALL, addi(10, 0, 0), addi(17, 0, 93), ECALL]);
    chain
}

fn reference(chain: &Chain) -> Vec<u8> {
    let file = tempfile();
    std::fs::write(&file, elf(&bytes(&chain.text), &chain.data)).unwrap();
    let mut child = Command::new("qemu-riscv32").arg(&file).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
    let status = child.wait().unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(status.success(), "qemu-riscv32: {status}");
    out
}

fn tempfile() -> std::path::PathBuf {
    use std::os::unix::fs::OpenOptionsExt as _;
    let path = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("differential-{}.elf", std::process::id()));
    let _ = std::fs::remove_file(&path);
    std::fs::OpenOptions::new().create_new(true).write(true).mode(0o755).open(&path).unwrap();
    path
}

/// Runs the chain in the machine, in slices of the given sizes in turn.
fn machine(chain: &Chain, budgets: &[u64]) -> Vec<u8> {
    let mut text = chain.text.clone();
    chain.stops.iter().for_each(|stop| text[*stop] = SELF);
    let vms = chain.stops.len() as u32;
    let ram = (BLOCKS + chain.data.len() as u32).next_multiple_of(4096);
    let frames = (ram - BLOCKS) / 4096 + 2 * vms; // each writes to its own blocks alone
    let pieces = vec![(TEXT, bytes(&text)), (BLOCKS, chain.data.clone())];
    let mut b = Bench::with(vms, Some(frames), ram, pieces, TEXT);
    let at = |word: usize| TEXT + 4 * word as u32;
    for vm in 1..vms {
        b.vm_of(vm).hart.pc = at(chain.stops[vm as usize - 1] + 1);
    }
    let mut running: Vec<u32> = (0..vms).collect();
    for i in 0.. {
        running.retain(|vm| b.vm_of(*vm).hart.pc != at(chain.stops[*vm as usize]));
        if running.is_empty() {
            break;
        }
        let budget = budgets[i % budgets.len()];
        let results = b.slices(&running, budget);
        for (vm, result) in running.iter().zip(results) {
            let h = &b.vm_of(*vm).hart;
            assert_eq!(result.steps, budget, "a slice of {budget} ended early");
            assert_eq!(h.trapped, 0, "a trap: {:x?}", h.last_trap);
            assert!(h.steps < 2_000 * (1 + chain.programs.len() as u64), "lost at {:#x}", h.pc);
        }
    }
    let mut data = vec![0; chain.data.len()];
    let part = chain.programs.len().div_ceil(VMS) * BLOCK as usize;
    for (vm, blocks) in data.chunks_mut(part).enumerate() {
        b.machines.read_ram(vm as u32, BLOCKS + (vm * part) as u32, blocks);
    }
    data
}

fn compare(chain: &Chain, ours: &[u8], theirs: &[u8], name: &str) {
    assert_eq!(ours.len(), theirs.len());
    let block = BLOCK as usize;
    for (number, words) in chain.programs.iter().enumerate() {
        let at = number * block;
        let (a, b) = (&ours[at..at + block], &theirs[at..at + block]);
        if a == b {
            continue;
        }
        let start = TEXT + 4 * chain.starts[number] as u32;
        let mut message = format!("program {number} differs\n{}", listing(start, words));
        for i in (0..block).step_by(4).filter(|i| a[*i..*i + 4] != b[*i..*i + 4]) {
            let value = |from: &[u8]| u32::from_le_bytes(from[i..i + 4].try_into().unwrap());
            let place = if i < SCRATCH as usize {
                format!("x{}", i / 4 - 32)
            } else {
                format!("scratch {:#x}", i - SCRATCH as usize)
            };
            let before = u32::from_le_bytes(chain.data[at + i..at + i + 4].try_into().unwrap());
            message += &format!(
                "{place}: machine {:08x}, {name} {:08x} (at first {before:08x})\n",
                value(a),
                value(b)
            );
        }
        panic!("{message}");
    }
}

#[test]
fn random_programs_against_qemu() {
    if !Command::new("qemu-riscv32")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
    {
        println!("SKIPPED: qemu-riscv32 is not installed (Debian: apt-get install qemu-user)");
        return;
    }
    let count =
        std::env::var("MACHINE_PROGRAMS").ok().and_then(|count| count.parse().ok()).unwrap_or(12_000u32);
    let mut random = Random::seeded(3);
    let chain = chain(&mut random, count);
    let theirs = reference(&chain);
    let ours = machine(&chain, &[8192]); // what is full is cleared between slices
    compare(&chain, &ours, &theirs, "qemu");
    assert_ne!(ours, chain.data);
}

/// The same programs, cut into slices of any size, end in the same state.
#[test]
fn slices_change_nothing() {
    let mut random = Random::seeded(4);
    let chain = chain(&mut random, 1_000);
    let whole = machine(&chain, &[1_000_000]);
    for budgets in [&[1][..], &[7], &[1000], &[1, 2, 3, 5, 8, 13, 1023, 1024, 1025, 4096]] {
        let parts = machine(&chain, budgets);
        compare(&chain, &parts, &whole, "one slice");
    }
}
