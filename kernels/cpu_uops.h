// The CPU engine's micro-ops: those that all engines share, and those that only this one has. They lie in
// code pages, one for each instruction of a frame.
#pragma once
#include "memory.cuh"

namespace {

// Instructions that may run between two comparisons with the limit: those of a page.
#define WINDOW 1024

// clang-format off: it takes these lists for expressions
// Jumps backwards, accesses of sstatus, runs of words stored or loaded at one base, and three for native code: to
// enter it, to leave it near the limit, and to leave it by a jump that counts.
#define CPU_ONLY_OPS(X) \
    X(BEQ_BACK) X(BNE_BACK) X(BLT_BACK) X(BGE_BACK) X(BLTU_BACK) X(BGEU_BACK) X(JAL_BACK) X(SSTATUS) \
    X(SW_RUN2) X(SW_RUN3) X(SW_RUN4) X(LW_RUN2) X(LW_RUN3) X(LW_RUN4) X(NATIVE) X(TO_EXACT) X(TO_COUNTED)

// Pairs of neighbours that run with one dispatch: the most frequent ones of a Linux boot.
#define PAIRS(X) \
    X(ADDI, ADDI) X(ADDI, SW) X(ADDI, JAL_BACK) X(ADDI, JALR) X(ADDI, BLTU_BACK) X(ADDI, JAL_FAR) X(ADDI, LW) \
    X(ADDI, LI) X(ADDI, SLLI) X(ADDI, ADD) X(ADDI, BEQ) X(ADDI, BNE) X(ADDI, BNE_BACK) X(ADDI, ANDI) X(ADDI, JAL) \
    X(LW, ADDI) X(LW, LI) X(LW, ANDI) X(LW, ADD) X(LW, SW) X(LW, BNE) X(LW, BEQ) X(LW, SLLI) X(LW, LW) X(LW, JALR) \
    X(SW, ADDI) X(SW, LW) X(SW, JAL_BACK) X(SW, LI) X(SW, SW) X(SW, JAL_FAR) X(SW, JAL) \
    X(LI, ADDI) X(LI, LI) X(LI, AND) X(LI, LW) X(LI, SW) X(LI, BNE) X(LI, BEQ) X(LI, JAL_FAR) X(LI, JAL) X(LI, ADD) \
    X(SLLI, ADD) X(SLLI, OR) X(SLLI, SRAI) X(SLLI, SRLI) X(SRLI, SLLI) X(SRLI, OR) X(SRLI, ANDI) \
    X(ADD, LW) X(ADD, XOR) X(ADD, ADD) X(ADD, ADDI) X(ADD, LBU) X(ADD, JALR) X(ADD, SW) X(ADD, SLLI) \
    X(LBU, BNE) X(LBU, BEQ) X(LBU, LBU) X(LBU, ADDI) X(LBU, ANDI) X(LBU, SLLI) X(LBU, SB) \
    X(ANDI, BEQ) X(ANDI, BNE) X(ANDI, ADDI) X(OR, ADD) X(OR, SLLI) X(OR, SW) X(OR, OR) X(XOR, SRLI) X(XOR, SLLI) \
    X(AND, BEQ) X(AND, BNE) X(AND, SUB) X(AND, BGE) X(AUIPC, JALR) X(AUIPC, ADDI) X(AUIPC, LW) X(SB, ADDI) \
    X(SUB, ADDI) X(SRAI, ADDI) X(LH, LI) X(LHU, SLLI) X(SLTU, ADD)
// clang-format on

enum CpuOp : u32 {
    OP_CPU_BASE = OP_COUNT - 1,
#define X(name) OP_##name,
    CPU_ONLY_OPS(X)
#undef X
#define X(first, second) OP_##first##_##second,
        PAIRS(X)
#undef X
            OP_CPU_COUNT
};
static_assert(OP_CPU_COUNT <= 256, "a micro-op's code is one byte");

struct PairTable {
    u8 of[OP_SW_RUN2][OP_SW_RUN2]; // the pair's code, or that of its first operation
    u8 first[256];                 // the first operation of a pair or run; other codes lead to themselves
    constexpr PairTable() : of(), first() {
        for (u32 i = 0; i < 256; i++) first[i] = (u8)i;
        for (u32 i = 0; i < OP_SW_RUN2; i++)
            for (u8 &code : of[i]) code = (u8)i;
#define X(a, b) of[OP_##a][OP_##b] = OP_##a##_##b, first[OP_##a##_##b] = OP_##a;
        PAIRS(X)
#undef X
        for (u32 i = 0; i < 3; i++) first[OP_SW_RUN2 + i] = OP_SW, first[OP_LW_RUN2 + i] = OP_LW;
    }
};
constexpr PairTable PAIR;

} // namespace
