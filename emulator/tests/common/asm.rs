//! RV32IMA encoder, written from the tables of the specification and used by tests alone.

pub type Reg = u32;

fn r_type(opcode: u32, f3: u32, f7: u32, rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    f7 << 25 | (rs2 & 31) << 20 | (rs1 & 31) << 15 | f3 << 12 | (rd & 31) << 7 | opcode
}
fn i_type(opcode: u32, f3: u32, rd: Reg, rs1: Reg, imm: i32) -> u32 {
    assert!((-2048..2048).contains(&imm), "immediate {imm}");
    (imm as u32) << 20 | (rs1 & 31) << 15 | f3 << 12 | (rd & 31) << 7 | opcode
}

macro_rules! register_ops {
    ($($name:ident $f3:literal $f7:literal)*) => {$(
        pub fn $name(rd: Reg, rs1: Reg, rs2: Reg) -> u32 { r_type(0x33, $f3, $f7, rd, rs1, rs2) }
    )*};
}
register_ops! {
    add 0 0  sub 0 0x20  sll 1 0  slt 2 0  sltu 3 0  xor 4 0  srl 5 0  sra 5 0x20  or 6 0  and 7 0
    mul 0 1  mulh 1 1  mulhsu 2 1  mulhu 3 1  div 4 1  divu 5 1  rem 6 1  remu 7 1
}

macro_rules! immediate_ops {
    ($($name:ident $opcode:literal $f3:literal)*) => {$(
        pub fn $name(rd: Reg, rs1: Reg, imm: i32) -> u32 { i_type($opcode, $f3, rd, rs1, imm) }
    )*};
}
immediate_ops! {
    addi 0x13 0  slti 0x13 2  sltiu 0x13 3  xori 0x13 4  ori 0x13 6  andi 0x13 7
    lb 0x03 0  lh 0x03 1  lw 0x03 2  lbu 0x03 4  lhu 0x03 5
    jalr 0x67 0
}

pub fn slli(rd: Reg, rs1: Reg, shamt: u32) -> u32 {
    r_type(0x13, 1, 0, rd, rs1, shamt)
}
pub fn srli(rd: Reg, rs1: Reg, shamt: u32) -> u32 {
    r_type(0x13, 5, 0, rd, rs1, shamt)
}
pub fn srai(rd: Reg, rs1: Reg, shamt: u32) -> u32 {
    r_type(0x13, 5, 0x20, rd, rs1, shamt)
}

/// A store of `1 << f3` bytes.
pub fn store(f3: u32, rs2: Reg, rs1: Reg, imm: i32) -> u32 {
    assert!((-2048..2048).contains(&imm), "immediate {imm}");
    let imm = imm as u32;
    r_type(0x23, f3, imm >> 5 & 0x7f, imm & 31, rs1, rs2)
}
pub fn sb(rs2: Reg, rs1: Reg, imm: i32) -> u32 {
    store(0, rs2, rs1, imm)
}
pub fn sh(rs2: Reg, rs1: Reg, imm: i32) -> u32 {
    store(1, rs2, rs1, imm)
}
pub fn sw(rs2: Reg, rs1: Reg, imm: i32) -> u32 {
    store(2, rs2, rs1, imm)
}

/// A conditional branch; `offset` may be any even number, so that misaligned targets can be written.
pub fn branch(f3: u32, rs1: Reg, rs2: Reg, offset: i32) -> u32 {
    assert!(offset % 2 == 0 && (-4096..4096).contains(&offset), "offset {offset}");
    let o = offset as u32;
    r_type(0x63, f3, (o >> 12 & 1) << 6 | (o >> 5 & 0x3f), (o >> 1 & 15) << 1 | (o >> 11 & 1), rs1, rs2)
}
pub fn beq(rs1: Reg, rs2: Reg, offset: i32) -> u32 {
    branch(0, rs1, rs2, offset)
}
pub fn bne(rs1: Reg, rs2: Reg, offset: i32) -> u32 {
    branch(1, rs1, rs2, offset)
}
pub fn blt(rs1: Reg, rs2: Reg, offset: i32) -> u32 {
    branch(4, rs1, rs2, offset)
}
pub fn bltu(rs1: Reg, rs2: Reg, offset: i32) -> u32 {
    branch(6, rs1, rs2, offset)
}
pub fn jal(rd: Reg, offset: i32) -> u32 {
    assert!(offset % 2 == 0 && (-(1 << 20)..1 << 20).contains(&offset), "offset {offset}");
    let o = offset as u32;
    (o >> 20 & 1) << 31
        | (o >> 1 & 0x3ff) << 21
        | (o >> 11 & 1) << 20
        | (o >> 12 & 0xff) << 12
        | (rd & 31) << 7
        | 0x6f
}
pub fn lui(rd: Reg, value: u32) -> u32 {
    (value & 0xffff_f000) | (rd & 31) << 7 | 0x37
}
pub fn auipc(rd: Reg, value: u32) -> u32 {
    (value & 0xffff_f000) | (rd & 31) << 7 | 0x17
}
/// Two instructions that load any constant.
pub fn li(rd: Reg, value: u32) -> [u32; 2] {
    let low = ((value as i32) << 20) >> 20;
    [lui(rd, value.wrapping_sub(low as u32)), addi(rd, rd, low)]
}

pub const FENCE: u32 = 0x0ff0_000f;
pub const FENCE_I: u32 = 0x0000_100f;
pub const ECALL: u32 = 0x0000_0073;
pub const EBREAK: u32 = 0x0010_0073;
pub const SRET: u32 = 0x1020_0073;
pub const WFI: u32 = 0x1050_0073;
pub const NOP: u32 = 0x0000_0013;
/// `j .`
pub const SELF: u32 = 0x0000_006f;
pub fn sfence_vma(rs1: Reg, rs2: Reg) -> u32 {
    r_type(0x73, 0, 9, 0, rs1, rs2)
}

/// An atomic memory operation; `f5` selects which (see [`AMOS`]), `order` is aq and rl.
pub fn amo(f5: u32, order: u32, rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    r_type(0x2f, 2, f5 << 2 | (order & 3), rd, rs1, rs2)
}
pub const LR: u32 = 2;
pub const SC: u32 = 3;
pub const AMOS: [(u32, &str); 9] = [
    (1, "amoswap"),
    (0, "amoadd"),
    (4, "amoxor"),
    (12, "amoand"),
    (8, "amoor"),
    (16, "amomin"),
    (20, "amomax"),
    (24, "amominu"),
    (28, "amomaxu"),
];
pub fn lr(rd: Reg, rs1: Reg) -> u32 {
    amo(LR, 0, rd, rs1, 0)
}
pub fn sc(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    amo(SC, 0, rd, rs1, rs2)
}
pub fn amoadd(rd: Reg, rs1: Reg, rs2: Reg) -> u32 {
    amo(0, 0, rd, rs1, rs2)
}

/// A CSR instruction: f3 is 1 (RW), 2 (RS), 3 (RC), or 4 more for the immediate forms.
pub fn csr(f3: u32, rd: Reg, number: u32, rs1: Reg) -> u32 {
    number << 20 | (rs1 & 31) << 15 | f3 << 12 | (rd & 31) << 7 | 0x73
}
pub fn csrrw(rd: Reg, number: u32, rs1: Reg) -> u32 {
    csr(1, rd, number, rs1)
}
pub fn csrrs(rd: Reg, number: u32, rs1: Reg) -> u32 {
    csr(2, rd, number, rs1)
}
pub fn csrrc(rd: Reg, number: u32, rs1: Reg) -> u32 {
    csr(3, rd, number, rs1)
}
pub fn csrr(rd: Reg, number: u32) -> u32 {
    csrrs(rd, number, 0)
}
pub fn csrw(number: u32, rs1: Reg) -> u32 {
    csrrw(0, number, rs1)
}

pub const SSTATUS: u32 = 0x100;
pub const SIE: u32 = 0x104;
pub const STVEC: u32 = 0x105;
pub const SCOUNTEREN: u32 = 0x106;
pub const SENVCFG: u32 = 0x10a;
pub const SSCRATCH: u32 = 0x140;
pub const SEPC: u32 = 0x141;
pub const SCAUSE: u32 = 0x142;
pub const STVAL: u32 = 0x143;
pub const SIP: u32 = 0x144;
pub const SATP: u32 = 0x180;
pub const SEED: u32 = 0x015;
pub const CYCLE: u32 = 0xc00;
pub const TIME: u32 = 0xc01;
pub const INSTRET: u32 = 0xc02;

/// The instruction as text, for messages.
pub fn disassemble(insn: u32) -> String {
    let (opcode, rd, f3, rs1, rs2, f7) =
        (insn & 0x7f, insn >> 7 & 31, insn >> 12 & 7, insn >> 15 & 31, insn >> 20 & 31, insn >> 25);
    let imm_i = (insn as i32) >> 20;
    let imm_s = (imm_i & !31) | rd as i32;
    let imm_b = ((insn as i32) >> 31 << 12)
        | ((insn >> 7 & 1) << 11 | (insn >> 25 & 0x3f) << 5 | (insn >> 8 & 15) << 1) as i32;
    let imm_j = ((insn as i32) >> 31 << 20)
        | ((insn & 0xff000) | (insn >> 20 & 1) << 11 | (insn >> 21 & 0x3ff) << 1) as i32;
    let of = |names: [&'static str; 8]| names[f3 as usize];
    match opcode {
        0x37 => format!("lui x{rd}, {:#x}", insn >> 12),
        0x17 => format!("auipc x{rd}, {:#x}", insn >> 12),
        0x6f => format!("jal x{rd}, .{imm_j:+}"),
        0x67 if f3 == 0 => format!("jalr x{rd}, {imm_i}(x{rs1})"),
        0x63 => format!(
            "{} x{rs1}, x{rs2}, .{imm_b:+}",
            of(["beq", "bne", "b?", "b?", "blt", "bge", "bltu", "bgeu"])
        ),
        0x03 => {
            format!("{} x{rd}, {imm_i}(x{rs1})", of(["lb", "lh", "lw", "l?", "lbu", "lhu", "l?", "l?"]))
        }
        0x23 => format!("{} x{rs2}, {imm_s}(x{rs1})", of(["sb", "sh", "sw", "s?", "s?", "s?", "s?", "s?"])),
        0x13 if f3 == 1 || f3 == 5 => format!(
            "{} x{rd}, x{rs1}, {rs2}",
            if f3 == 1 {
                "slli"
            } else if f7 == 0 {
                "srli"
            } else {
                "srai"
            }
        ),
        0x13 => format!(
            "{} x{rd}, x{rs1}, {imm_i}",
            of(["addi", "", "slti", "sltiu", "xori", "", "ori", "andi"])
        ),
        0x33 => {
            let name = match f7 {
                1 => of(["mul", "mulh", "mulhsu", "mulhu", "div", "divu", "rem", "remu"]),
                0x20 if f3 == 0 => "sub",
                0x20 if f3 == 5 => "sra",
                0 => of(["add", "sll", "slt", "sltu", "xor", "srl", "or", "and"]),
                _ => "op?",
            };
            format!("{name} x{rd}, x{rs1}, x{rs2}")
        }
        0x2f => {
            let f5 = insn >> 27;
            let name = AMOS.iter().find(|(number, _)| *number == f5).map_or("amo?", |(_, name)| name);
            let name = if f5 == LR {
                "lr"
            } else if f5 == SC {
                "sc"
            } else {
                name
            };
            format!("{name}.w x{rd}, x{rs2}, (x{rs1})")
        }
        0x73 if f3 != 0 => format!(
            "{} x{rd}, {:#x}, {rs1}",
            of(["", "csrrw", "csrrs", "csrrc", "", "csrrwi", "csrrsi", "csrrci"]),
            insn >> 20
        ),
        0x73 => match insn {
            ECALL => "ecall".into(),
            EBREAK => "ebreak".into(),
            SRET => "sret".into(),
            WFI => "wfi".into(),
            _ => format!("system {insn:#010x}"),
        },
        0x0f => if f3 == 0 { "fence" } else { "fence.i" }.into(),
        _ => format!(".word {insn:#010x}"),
    }
}

/// A listing with addresses.
pub fn listing(at: u32, words: &[u32]) -> String {
    words
        .iter()
        .enumerate()
        .map(|(i, word)| format!("{:08x}: {word:08x}  {}\n", at + 4 * i as u32, disassemble(*word)))
        .collect()
}
