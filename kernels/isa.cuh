// RV32IMA_Zicsr_Zifencei: from an instruction word to a micro-op (RISC-V Unprivileged 20191213).
#pragma once
#include "base.cuh"

// Integer operations whose result depends on two operands alone.
// clang-format off: it takes these lists for expressions
#define ALU_OPS(X) \
    X(ADD) X(SUB) X(SLL) X(SLT) X(SLTU) X(XOR) X(SRL) X(SRA) X(OR) X(AND) \
    X(MUL) X(MULH) X(MULHSU) X(MULHU) X(DIV) X(DIVU) X(REM) X(REMU)
#define ALU_IMM_OPS(X) X(ADDI) X(SLLI) X(SLTI) X(SLTIU) X(XORI) X(SRLI) X(SRAI) X(ORI) X(ANDI)
#define BRANCH_OPS(X) X(BEQ) X(BNE) X(BLT) X(BGE) X(BLTU) X(BGEU)
#define LOAD_OPS(X) X(LB) X(LH) X(LW) X(LBU) X(LHU)
#define STORE_OPS(X) X(SB) X(SH) X(SW)
#define AMO_OPS(X) X(AMOSWAP) X(AMOADD) X(AMOXOR) X(AMOAND) X(AMOOR) X(AMOMIN) X(AMOMAX) X(AMOMINU) X(AMOMAXU)

// All micro-ops. OP_DECODE is 0, so that a page of zeroes is a page of undecoded instructions. JAL and the plain branches
// lead to the same page, the FAR ones anywhere.
#define ALL_OPS(X) \
    X(DECODE) X(NEXT_PAGE) X(ILLEGAL) \
    ALU_OPS(X) ALU_IMM_OPS(X) X(LI) X(AUIPC) LOAD_OPS(X) STORE_OPS(X) BRANCH_OPS(X) X(JAL) \
    X(BEQ_FAR) X(BNE_FAR) X(BLT_FAR) X(BGE_FAR) X(BLTU_FAR) X(BGEU_FAR) X(JAL_FAR) \
    X(JALR) X(FENCE) X(FENCE_I) X(LR) X(SC) AMO_OPS(X) X(CSR) X(SYSTEM)
// clang-format on

enum Op : u8 {
#define X(name) OP_##name,
    ALL_OPS(X)
#undef X
        OP_COUNT
};

// A decoded instruction: 8 bytes, written and read whole.
struct Uop {
    u8 op;
    u8 rd;   // 0-31, or SINK for x0
    u8 rs1;  // 0-31
    u8 rs2;  // 0-31
    u32 imm; // immediate; byte displacement for jumps; the instruction word for CSR, SYSTEM and ILLEGAL
};
static_assert(sizeof(Uop) == 8, "a micro-op is one 64-bit word");

#define SINK 32 // writes to x0 land here

FN constexpr Uop uop(u32 op, u32 rd, u32 rs1, u32 rs2, u32 imm) {
    return Uop{(u8)op, (u8)(rd ? rd : SINK), (u8)rs1, (u8)rs2, imm};
}

// Decodes the word at `offset` (bytes) within its page. Reserved encodings become OP_ILLEGAL; hints are
// no-ops.
FN constexpr Uop decode(u32 insn, u32 offset) {
    u32 opcode = insn & 0x7f, rd = insn >> 7 & 31, f3 = insn >> 12 & 7, rs1 = insn >> 15 & 31,
        rs2 = insn >> 20 & 31;
    u32 f7 = insn >> 25;
    u32 imm_i = (u32)((i32)insn >> 20);
    // stval gets the faulting instruction: of a 16-bit parcel, its 16 bits
    Uop illegal = uop(OP_ILLEGAL, 0, 0, 0, (insn & 3) == 3 ? insn : insn & 0xffff);
    switch (opcode) {
    case 0x37: return uop(OP_LI, rd, 0, 0, insn & 0xfffff000);
    case 0x17: return uop(OP_AUIPC, rd, 0, 0, (insn & 0xfffff000) + offset); // relative to the page
    case 0x6f: {
        u32 imm = (u32)((i32)insn >> 31) << 20 | (insn & 0xff000) | (insn >> 20 & 1) << 11 |
                  (insn >> 21 & 0x3ff) << 1;
        bool near = offset + imm < FRAME_BYTES && (imm & 3) == 0;
        return uop(near ? OP_JAL : OP_JAL_FAR, rd, 0, 0, imm);
    }
    case 0x67: return f3 == 0 ? uop(OP_JALR, rd, rs1, 0, imm_i) : illegal;
    case 0x63: {
        u32 imm = (u32)((i32)insn >> 31) << 12 | (insn >> 7 & 1) << 11 | (insn >> 25 & 0x3f) << 5 |
                  (insn >> 8 & 15) << 1;
        if (f3 == 2 || f3 == 3) return illegal;
        u32 kind = f3 < 2 ? f3 : f3 - 2;
        bool near = offset + imm < FRAME_BYTES && (imm & 3) == 0;
        return uop((near ? OP_BEQ : OP_BEQ_FAR) + kind, 0, rs1, rs2, imm);
    }
    case 0x03: {
        if (f3 == 3 || f3 > 5) return illegal;
        return uop(f3 < 3 ? OP_LB + f3 : OP_LBU + f3 - 4, rd, rs1, 0, imm_i);
    }
    case 0x23: {
        if (f3 > 2) return illegal;
        return uop(OP_SB + f3, 0, rs1, rs2, (imm_i & ~31u) | rd);
    }
    case 0x13:
        switch (f3) {
        case 1: return f7 == 0 ? uop(OP_SLLI, rd, rs1, 0, rs2) : illegal;
        case 5:
            return f7 == 0      ? uop(OP_SRLI, rd, rs1, 0, rs2)
                   : f7 == 0x20 ? uop(OP_SRAI, rd, rs1, 0, rs2)
                                : illegal;
        case 0: return rs1 ? uop(OP_ADDI, rd, rs1, 0, imm_i) : uop(OP_LI, rd, 0, 0, imm_i);
        case 2: return uop(OP_SLTI, rd, rs1, 0, imm_i);
        case 3: return uop(OP_SLTIU, rd, rs1, 0, imm_i);
        case 4: return uop(OP_XORI, rd, rs1, 0, imm_i);
        case 6: return uop(OP_ORI, rd, rs1, 0, imm_i);
        default: return uop(OP_ANDI, rd, rs1, 0, imm_i);
        }
    case 0x33:
        if (f7 == 1) return uop(OP_MUL + f3, rd, rs1, rs2, 0);
        if (f7 == 0x20)
            return f3 == 0 ? uop(OP_SUB, rd, rs1, rs2, 0) : f3 == 5 ? uop(OP_SRA, rd, rs1, rs2, 0) : illegal;
        if (f7 != 0) return illegal;
        switch (f3) {
        case 0: return uop(OP_ADD, rd, rs1, rs2, 0);
        case 1: return uop(OP_SLL, rd, rs1, rs2, 0);
        case 2: return uop(OP_SLT, rd, rs1, rs2, 0);
        case 3: return uop(OP_SLTU, rd, rs1, rs2, 0);
        case 4: return uop(OP_XOR, rd, rs1, rs2, 0);
        case 5: return uop(OP_SRL, rd, rs1, rs2, 0);
        case 6: return uop(OP_OR, rd, rs1, rs2, 0);
        default: return uop(OP_AND, rd, rs1, rs2, 0);
        }
    case 0x0f: // other fields of FENCE and FENCE.I are reserved for finer fences and are ignored (2.7, 3)
        return f3 == 0 ? uop(OP_FENCE, 0, 0, 0, 0) : f3 == 1 ? uop(OP_FENCE_I, 0, 0, 0, 0) : illegal;
    case 0x2f: {
        if (f3 != 2) return illegal;
        u32 op = OP_ILLEGAL;
        switch (f7 >> 2) { // aq and rl are implied: one hart, in order
        case 0x02:
            if (rs2) return illegal;
            op = OP_LR;
            break;
        case 0x03: op = OP_SC; break;
        case 0x01: op = OP_AMOSWAP; break;
        case 0x00: op = OP_AMOADD; break;
        case 0x04: op = OP_AMOXOR; break;
        case 0x0c: op = OP_AMOAND; break;
        case 0x08: op = OP_AMOOR; break;
        case 0x10: op = OP_AMOMIN; break;
        case 0x14: op = OP_AMOMAX; break;
        case 0x18: op = OP_AMOMINU; break;
        case 0x1c: op = OP_AMOMAXU; break;
        default: return illegal;
        }
        return uop(op, rd, rs1, rs2, insn);
    }
    case 0x73:
        if (f3 == 4) return illegal;
        if (f3) return uop(OP_CSR, rd, rs1, 0, insn);
        if (insn == 0x00000073 || insn == 0x00100073 || insn == 0x10200073 || insn == 0x10500073 ||
            (f7 == 9 && rd == 0))
            return uop(OP_SYSTEM, 0, rs1, rs2, insn);
        return illegal;
    default: return illegal;
    }
}

// The integer operations (Unprivileged 2.4, 7.1 and 7.2). Immediate forms share the function of their
// register form.
template <u32 OP> FN u32 alu(u32 a, u32 b) {
    switch (OP) {
    case OP_ADD:
    case OP_ADDI: return a + b;
    case OP_SUB: return a - b;
    case OP_SLL:
    case OP_SLLI: return a << (b & 31);
    case OP_SLT:
    case OP_SLTI: return (i32)a < (i32)b;
    case OP_SLTU:
    case OP_SLTIU: return a < b;
    case OP_XOR:
    case OP_XORI: return a ^ b;
    case OP_SRL:
    case OP_SRLI: return a >> (b & 31);
    case OP_SRA:
    case OP_SRAI: return (u32)((i32)a >> (b & 31));
    case OP_OR:
    case OP_ORI: return a | b;
    case OP_AND:
    case OP_ANDI: return a & b;
    case OP_MUL: return a * b;
    case OP_MULH: return (u32)(((i64)(i32)a * (i64)(i32)b) >> 32);
    case OP_MULHSU: return (u32)(((i64)(i32)a * (i64)(u64)b) >> 32);
    case OP_MULHU: return (u32)(((u64)a * (u64)b) >> 32);
    case OP_DIV: return b == 0 ? ~0u : (a == 0x80000000u && b == ~0u) ? a : (u32)((i32)a / (i32)b);
    case OP_DIVU: return b == 0 ? ~0u : a / b;
    case OP_REM: return b == 0 ? a : (a == 0x80000000u && b == ~0u) ? 0 : (u32)((i32)a % (i32)b);
    case OP_REMU: return b == 0 ? a : a % b;
    default: return 0;
    }
}

template <u32 OP> FN bool branch_taken(u32 a, u32 b) {
    switch (OP) {
    case OP_BEQ: return a == b;
    case OP_BNE: return a != b;
    case OP_BLT: return (i32)a < (i32)b;
    case OP_BGE: return (i32)a >= (i32)b;
    case OP_BLTU: return a < b;
    default: return a >= b;
    }
}

// What an AMO writes, from the old value and rs2 (Unprivileged 8.4).
template <u32 OP> FN u32 amo(u32 old, u32 b) {
    switch (OP) {
    case OP_AMOSWAP: return b;
    case OP_AMOADD: return old + b;
    case OP_AMOXOR: return old ^ b;
    case OP_AMOAND: return old & b;
    case OP_AMOOR: return old | b;
    case OP_AMOMIN: return (i32)old < (i32)b ? old : b;
    case OP_AMOMAX: return (i32)old > (i32)b ? old : b;
    case OP_AMOMINU: return old < b ? old : b;
    default: return old > b ? old : b;
    }
}
FN u32 amo_of(u32 op, u32 old, u32 b) {
    switch (op) {
#define X(name)                                                                                              \
    case OP_##name: return amo<OP_##name>(old, b);
        AMO_OPS(X)
#undef X
    default: return old;
    }
}

// Extends a loaded value.
template <u32 OP> FN u32 extend(u32 value) {
    switch (OP) {
    case OP_LB: return (u32)(i32)(signed char)value;
    case OP_LH: return (u32)(i32)(short)value;
    case OP_LBU: return value & 0xff;
    case OP_LHU: return value & 0xffff;
    default: return value;
    }
}
FN constexpr u32 access_bytes(u32 op) {
    return op == OP_LW || op == OP_SW ? 4 : op == OP_LH || op == OP_LHU || op == OP_SH ? 2 : 1;
}
