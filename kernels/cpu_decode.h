// How a frame's instructions become the CPU engine's micro-ops: block by block, when first reached.
#pragma once
#include "csr.cuh"
#include "cpu_uops.h"

namespace {

// How to take an instruction apart without branches: which of its bits must be zero (with the two lowest
// inverted), and what is taken for the immediate and the registers.
enum Format : u8 { FORMAT_OTHER, FORMAT_R, FORMAT_I, FORMAT_S, FORMAT_LUI, FORMAT_SHIFT };
struct FormatMasks {
    u32 zero, imm, rd_in_imm, upper;
    u32 rs1, rd, rs2, reserved;
};
constexpr FormatMasks FORMATS[6] = {
    {~0u, 0, 0, 0, 0, 0, 0, 0},         {0xbc000003, 0, 0, 0, 31, 31, 31, 0},
    {3, ~0u, 0, 0, 31, 31, 0, 0},       {3, ~31u, 31, 0, 31, 0, 31, 0},
    {3, 0, 0, 0xfffff000, 0, 31, 0, 0}, {0xbc000003, 31, 0, 0, 31, 31, 0, 0},
};
// Index: opcode, funct3, and bits 30 and 25, which tell most of what funct7 does.
constexpr u32 decode_index(u32 insn) {
    return (insn >> 2 & 31) | (insn >> 7 & 0xe0) | (insn >> 22 & 0x100) | (insn >> 16 & 0x200);
}
struct DecodeTable {
    struct Entry {
        u8 op = OP_ILLEGAL, format = FORMAT_OTHER;
    } of[1024];
    constexpr DecodeTable() : of() {
        for (u32 i = 0; i < 1024; i++) {
            u32 opcode = (i & 31) << 2 | 3, f3 = i >> 5 & 7;
            u32 meaning = decode(opcode | f3 << 12 | (i & 0x100) << 22 | (i & 0x200) << 16 | 1 << 15, 0).op;
            bool shift = opcode == 0x13 && (f3 & 3) == 1;
            u8 format = opcode == 0x33                                       ? FORMAT_R
                        : shift                                              ? FORMAT_SHIFT
                        : opcode == 0x03 || opcode == 0x13 || opcode == 0x67 ? FORMAT_I
                        : opcode == 0x23                                     ? FORMAT_S
                        : opcode == 0x37                                     ? FORMAT_LUI
                                                                             : FORMAT_OTHER;
            of[i].op = (u8)meaning, of[i].format = meaning == OP_ILLEGAL ? (u8)FORMAT_OTHER : format;
        }
    }
};
constexpr DecodeTable DECODE;

__attribute__((noinline)) Uop decode_other(u32 insn, u32 offset) {
    Uop u = decode(insn, offset);
    if (u.op >= OP_BEQ && u.op <= OP_JAL && (i32)u.imm <= 0) u.op = (u8)(u.op - OP_BEQ + OP_BEQ_BACK);
    if (u.op == OP_CSR && insn >> 20 == CSR_SSTATUS) u.op = OP_SSTATUS;
    return u;
}

// A micro-op as the word in memory that it is: put together of bytes it would wait for the store buffer.
inline u64 packed(u32 op, u32 rd, u32 rs1, u32 rs2, u32 imm) {
    return op | rd << 8 | rs1 << 16 | rs2 << 24 | (u64)imm << 32;
}
inline Uop unpacked(u64 word) {
    Uop u;
    __builtin_memcpy(&u, &word, 8);
    return u;
}
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "as the guest's memory");

inline u64 decode_single(u32 insn, u32 offset) {
    u32 opcode = insn & 0x7f, f3 = insn >> 12 & 7;
    if (opcode == 0x63 && (f3 & 6) != 2) {
        u32 imm =
            (u32)((i32)insn >> 31) << 12 | (insn << 4 & 0x800) | (insn >> 20 & 0x7e0) | (insn >> 7 & 0x1e);
        bool near = offset + imm < FRAME_BYTES && !(imm & 3);
        u32 op = near ? (i32)imm <= 0 ? (u32)OP_BEQ_BACK : (u32)OP_BEQ : (u32)OP_BEQ_FAR;
        return packed(op + f3 - (f3 & 4) / 2, SINK, insn >> 15 & 31, insn >> 20 & 31, imm);
    }
    DecodeTable::Entry e = DECODE.of[decode_index(insn)];
    const FormatMasks &f = FORMATS[e.format];
    if (UNLIKELY((insn ^ 3) & f.zero)) {
        Uop u = decode_other(insn, offset);
        return packed(u.op, u.rd, u.rs1, u.rs2, u.imm);
    }
    u32 rd = insn >> 7 & f.rd, rs1 = insn >> 15 & f.rs1;
    u32 op = e.op == OP_ADDI && !rs1 ? (u32)OP_LI : e.op;
    u32 imm = ((u32)((i32)insn >> 20) & f.imm) | (insn >> 7 & f.rd_in_imm) | (insn & f.upper);
    return packed(op, rd ? rd : (u32)SINK, rs1, insn >> 20 & f.rs2, imm);
}

inline void put(const Uop *at, u64 word) { __atomic_store_n((u64 *)at, word, __ATOMIC_RELEASE); }

// Where decoded instructions come from: the frame of a code page, and the index of a micro-op in it.
struct CodePlace {
    const u32 *words;
    u32 page, index;
};
inline CodePlace place_of(const Machine &m, const Uop *at) {
    u64 place = (u64)(uintptr_t)at - m.pool->code_ptr;
    u32 page = (u32)(place / CODE_PAGE_BYTES), index = (u32)(place % CODE_PAGE_BYTES) / 8;
    u32 frame = ((const u32 *)(uintptr_t)m.pool->code_frame_ptr)[page];
    return {(const u32 *)(m.frames + (u64)frame * FRAME_BYTES), page, index};
}

#define BLOCK 32

// Decodes from `at` to the next unconditional jump, the end of the page or a micro-op already decoded, BLOCK
// at most, and joins neighbours where one dispatch can do for all of them. Each keeps its own slot and
// operands: a jump may lead there.
__attribute__((noinline)) void decode_block(const Machine &m, const Uop *at) {
    CodePlace place = place_of(m, at);
    u32 index = place.index;
    const u32 *words = place.words;
    if (index >= 1024) return put(at, packed(OP_NEXT_PAGE, SINK, 0, 0, 0));
    for (u32 i = 8; i < BLOCK; i += 8) __builtin_prefetch(at + i, 1);
    __builtin_prefetch(words + index + 16);
    u64 block[BLOCK + 1];
    u32 length = 0;
    while (length < BLOCK && index + length < 1024 && (length == 0 || at[length].op == OP_DECODE)) {
        u64 u = decode_single(words[index + length], 4 * (index + length));
        block[length++] = u;
        u32 op = (u8)u;
        if (op == OP_JALR || op == OP_JAL || op == OP_JAL_FAR || op == OP_JAL_BACK || op == OP_ILLEGAL) break;
    }
    // Words at ascending or descending addresses of one base that follow each other, which no load of the run
    // but the last replaces.
    u32 up = 1, down = 1;
    u64 next = OP_DECODE;
    for (u32 i = length; i-- > 0;) { // backwards: what a joined micro-op needs is in place before it
        u64 u = block[i];
        u32 op = (u8)u, code = PAIR.of[op][(u8)next];
        if (op == OP_LW || op == OP_SW) {
            u32 base = (u8)(u >> 16);
            i32 distance = (i32)((u32)(next >> 32) - (u32)(u >> 32));
            bool run = (u8)next == op && (u8)(next >> 16) == base && !(distance & 3) && (u8)(u >> 8) != base;
            up = run && distance > 0 ? up + 1 : 1, down = run && distance <= 0 ? down + 1 : 1;
            u32 words_at_once = up > down ? up : down;
            if (words_at_once > 4) words_at_once = 4;
            if (run) code = (op == OP_SW ? (u32)OP_SW_RUN2 : (u32)OP_LW_RUN2) + words_at_once - 2;
        }
        put(at + i, (u & ~0xffull) | code);
        next = u;
    }
}

} // namespace
