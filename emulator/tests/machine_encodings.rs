//! Which instruction words exist: the whole opcode, funct3 and funct7 space, all CSR numbers and all SYSTEM
//! encodings, against tables of masks and matches written from the instruction listings.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::*;

/// (bits that are fixed, their value) of every RV32IMA_Zicsr_Zifencei instruction outside SYSTEM.
const LEGAL: &[(u32, u32)] = &[
    (0x0000_007f, 0x0000_0037), // lui
    (0x0000_007f, 0x0000_0017), // auipc
    (0x0000_007f, 0x0000_006f), // jal
    (0x0000_707f, 0x0000_0067), // jalr
    (0x0000_707f, 0x0000_0063), // beq
    (0x0000_707f, 0x0000_1063), // bne
    (0x0000_707f, 0x0000_4063), // blt
    (0x0000_707f, 0x0000_5063), // bge
    (0x0000_707f, 0x0000_6063), // bltu
    (0x0000_707f, 0x0000_7063), // bgeu
    (0x0000_707f, 0x0000_0003), // lb
    (0x0000_707f, 0x0000_1003), // lh
    (0x0000_707f, 0x0000_2003), // lw
    (0x0000_707f, 0x0000_4003), // lbu
    (0x0000_707f, 0x0000_5003), // lhu
    (0x0000_707f, 0x0000_0023), // sb
    (0x0000_707f, 0x0000_1023), // sh
    (0x0000_707f, 0x0000_2023), // sw
    (0x0000_707f, 0x0000_0013), // addi
    (0x0000_707f, 0x0000_2013), // slti
    (0x0000_707f, 0x0000_3013), // sltiu
    (0x0000_707f, 0x0000_4013), // xori
    (0x0000_707f, 0x0000_6013), // ori
    (0x0000_707f, 0x0000_7013), // andi
    (0xfe00_707f, 0x0000_1013), // slli
    (0xfe00_707f, 0x0000_5013), // srli
    (0xfe00_707f, 0x4000_5013), // srai
    (0xfe00_707f, 0x0000_0033), // add
    (0xfe00_707f, 0x4000_0033), // sub
    (0xfe00_707f, 0x0000_1033), // sll
    (0xfe00_707f, 0x0000_2033), // slt
    (0xfe00_707f, 0x0000_3033), // sltu
    (0xfe00_707f, 0x0000_4033), // xor
    (0xfe00_707f, 0x0000_5033), // srl
    (0xfe00_707f, 0x4000_5033), // sra
    (0xfe00_707f, 0x0000_6033), // or
    (0xfe00_707f, 0x0000_7033), // and
    (0xfe00_007f, 0x0200_0033), // M: mul, mulh, mulhsu, mulhu, div, divu, rem, remu
    (0x0000_707f, 0x0000_000f), // fence; reserved fields are ignored (2.7)
    (0x0000_707f, 0x0000_100f), // fence.i; reserved fields are ignored (3)
    (0xf9f0_707f, 0x1000_202f), // lr.w
    (0xf800_707f, 0x1800_202f), // sc.w
    (0xf800_707f, 0x0800_202f), // amoswap.w
    (0xf800_707f, 0x0000_202f), // amoadd.w
    (0xf800_707f, 0x2000_202f), // amoxor.w
    (0xf800_707f, 0x6000_202f), // amoand.w
    (0xf800_707f, 0x4000_202f), // amoor.w
    (0xf800_707f, 0x8000_202f), // amomin.w
    (0xf800_707f, 0xa000_202f), // amomax.w
    (0xf800_707f, 0xc000_202f), // amominu.w
    (0xf800_707f, 0xe000_202f), // amomaxu.w
];

const TRAP: u32 = 0x3000;
const DATA: u32 = 0x8000;

/// Words to run, each with every register at a harmless address.
#[derive(Clone, Copy)]
struct Word {
    insn: u32,
    mode: u32,
    scounteren: u32,
}

/// Runs words, many at once, each in a VM of its own: a GPU takes no longer for many than for one. `check` gets each with
/// the cause of its trap, if it trapped.
fn execute_all(words: &[Word], check: impl Fn(Word, Option<u32>)) {
    // On fibers every VM takes its time.
    let vms = if matches!(By::environment(), By::Cuda(_)) { 128 } else { 4 };
    let vms: Vec<u32> = (0..vms).collect();
    let mut b = Bench::with(vms.len() as u32, None, 0x20000, vec![], CODE);
    for words in words.chunks(vms.len()) {
        for (vm, word) in vms.iter().zip(words) {
            prepare(&b, *vm, *word);
        }
        b.slices(&vms[..words.len()], 1);
        for (vm, word) in vms.iter().zip(words) {
            check(*word, outcome(&b, *vm, word.insn));
        }
    }
}

/// Runs one word.
fn execute(b: &mut Bench, insn: u32, mode: u32) -> Option<u32> {
    prepare(b, 0, Word { insn, mode, scounteren: 0 });
    b.slice(1);
    outcome(b, 0, insn)
}

fn prepare(b: &Bench, vm: u32, word: Word) {
    b.write_of(vm, CODE, &word.insn.to_le_bytes());
    let h = &mut b.vm_of(vm).hart;
    (h.pc, h.mode, h.stvec, h.satp, h.waiting) = (CODE, word.mode, TRAP, 0, 0);
    (h.sie, h.sip, h.stimecmp) = (0, 0, u64::MAX);
    (h.scause, h.stval, h.sepc, h.scounteren) = (!0, !0, !0, word.scounteren);
    h.x = [DATA; 33];
    h.x[0] = 0;
}

fn outcome(b: &Bench, vm: u32, insn: u32) -> Option<u32> {
    let h = &b.vm_of(vm).hart;
    if h.pc != TRAP || h.scause == !0 {
        return None;
    }
    assert_eq!(h.sepc, CODE, "sepc of {}", disassemble(insn));
    if h.scause == 2 {
        assert_eq!(h.stval, insn, "stval of {}", disassemble(insn));
        assert_eq!(h.x[1..32], [DATA; 31], "an illegal instruction changed a register");
    }
    Some(h.scause)
}

#[test]
fn opcodes_and_functions() {
    let mut random = Random::seeded(1);
    let mut words = Vec::new();
    for code in 0..1u32 << 17 {
        // Not a parcel of 32 bits: covered below. SYSTEM: covered below.
        let (opcode, f3, f7) = (code & 0x7f, code >> 7 & 7, code >> 10);
        if opcode & 3 != 3 || opcode == 0x73 {
            continue;
        }
        for _ in 0..3 {
            let insn = f7 << 25 | f3 << 12 | opcode | (random.word() & 0x01ff_8f80);
            words.push(Word { insn, mode: MODE_S, scounteren: 0 });
        }
    }
    let legal = |insn: u32| LEGAL.iter().any(|(mask, value)| insn & mask == *value);
    execute_all(&words, |Word { insn, .. }, cause| {
        assert_eq!(cause != Some(2), legal(insn), "{insn:#010x} {}: cause {cause:?}", disassemble(insn));
    });
    let illegal = words.iter().filter(|word| !legal(word.insn)).count();
    assert!(illegal > 60_000, "{illegal}");
}

/// Every LR with a nonzero rs2 field is reserved; every hint is a no-op.
#[test]
fn reserved_fields_and_hints() {
    let mut b = Bench::new(0x20000, &[]);
    for rs2 in 0..32 {
        for order in 0..4 {
            let cause = execute(&mut b, amo(LR, order, 1, 2, rs2), MODE_S);
            assert_eq!(cause, (rs2 != 0).then_some(2), "lr.w with rs2 {rs2}");
        }
    }
    let hints = [
        lui(0, 0x1234_5000),
        auipc(0, 0x1000),
        addi(0, 5, 1),
        slti(0, 5, 1),
        sltiu(0, 5, 1),
        andi(0, 5, -1),
        ori(0, 5, 7),
        xori(0, 5, 7),
        slli(0, 0, 0x1f),
        srai(0, 0, 7),
        add(0, 5, 5),
        sub(0, 5, 6),
        mul(0, 5, 5),
        div(0, 5, 0),
        sltu(0, 0, 5),
        FENCE,
        0x8330_000f, // fence.tso
        0x0100_000f, // pause
        0x0000_000f,
        0xffff_8f8f, // fence, all reserved fields set
        0xffff_9f8f, // fence.i, all reserved fields set
    ];
    for insn in hints {
        assert_eq!(execute(&mut b, insn, MODE_S), None, "{}", disassemble(insn));
        let h = b.hart();
        assert_eq!(h.pc, CODE + 4);
        assert_eq!(h.x[0], 0);
        assert_eq!(h.x[1..32], [DATA; 31], "{} is not a no-op", disassemble(insn));
    }
}

/// A 16-bit parcel is illegal without C, and stval holds that parcel: the faulting instruction, right-justified
/// (Privileged 1.12, 4.1.9).
#[test]
fn short_parcels() {
    let mut b = Bench::new(0x20000, &[]);
    let mut random = Random::seeded(2);
    for low in (0..0x1_0000u32).step_by(7).filter(|low| low & 3 != 3) {
        let word = low | random.word() << 16;
        b.write32(CODE, word);
        let h = b.hart();
        (h.pc, h.mode, h.stvec, h.scause) = (CODE, MODE_S, TRAP, 0);
        b.step(1);
        let h = b.hart();
        assert_eq!((h.pc, h.scause, h.stval, h.sepc), (TRAP, 2, low, CODE), "{word:#010x}");
    }
}

#[test]
fn system_encodings() {
    let mut words = Vec::new();
    for f12 in 0..4096u32 {
        for (rd, rs1) in [(0, 0), (1, 0), (0, 1), (31, 31)] {
            let insn = f12 << 20 | rs1 << 15 | rd << 7 | 0x73;
            for mode in [MODE_S, MODE_U] {
                words.push(Word { insn, mode, scounteren: 0 });
                words.push(Word { insn: insn | 4 << 12, mode, scounteren: 0 });
            }
        }
    }
    execute_all(&words, |Word { insn, mode, .. }, cause| {
        let (f12, rd, rs1) = (insn >> 20, insn >> 7 & 31, insn >> 15 & 31);
        let sfence = f12 >> 5 == 9 && rd == 0;
        let plain = rd == 0 && rs1 == 0;
        let expected = match f12 {
            // funct3 = 4 is reserved without the hypervisor extension
            _ if insn >> 12 & 7 == 4 => Some(2),
            0x000 if plain => (mode == MODE_U).then_some(8), // S: to the SBI
            0x001 if plain => Some(3),
            0x102 | 0x105 if plain && mode == MODE_S => None,
            _ if sfence && mode == MODE_S => None,
            _ => Some(2),
        };
        assert_eq!(cause, expected, "{insn:#010x} in mode {mode}");
    });
}

/// Whether an access to the CSR is legal: which exist, who may reach them, which may be written.
fn csr_legal(number: u32, mode: u32, writes: bool, scounteren: u32) -> bool {
    match number {
        0x100 | 0x104..=0x106 | 0x10a | 0x140..=0x144 | 0x180 => mode == MODE_S,
        0xc00..=0xc02 | 0xc80..=0xc82 => {
            !writes && (mode == MODE_S || scounteren & 1 << (number & 0x1f) != 0)
        }
        0x015 => writes, // seed must be written to be read
        _ => false,
    }
}

#[test]
fn csr_numbers() {
    let mut words = Vec::new();
    for number in 0..4096 {
        for f3 in [1, 2, 3, 5, 6, 7] {
            for (rd, rs1) in [(0, 0), (1, 0), (0, 1), (2, 31)] {
                for mode in [MODE_S, MODE_U] {
                    let scounteren = (number ^ f3 ^ rd) & 7;
                    words.push(Word { insn: csr(f3, rd, number, rs1), mode, scounteren });
                }
            }
        }
    }
    assert_eq!(words.len(), 4096 * 48);
    execute_all(&words, |Word { insn, mode, scounteren }, cause| {
        let writes = insn >> 12 & 3 == 1 || insn >> 15 & 31 != 0;
        let legal = csr_legal(insn >> 20, mode, writes, scounteren);
        assert_eq!(
            cause,
            (!legal).then_some(2),
            "{} in mode {mode}, scounteren {scounteren}",
            disassemble(insn)
        );
    });
}
