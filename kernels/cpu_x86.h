// x86-64 instructions as bytes (AMD64 Architecture Programmer's Manual, volume 3).
#pragma once
#include "base.cuh"

namespace {

struct X86Code {
    static constexpr u32 BYTES = 16384;
    enum Register : u32 {
        RAX = 0,
        RCX = 1,
        RDX = 2,
        RSI = 6,
        RDI = 7,
        R8 = 8,
        R10 = 10,
        R11 = 11,
        NO_REGISTER = 16
    };

    u8 code[BYTES + 8];
    u32 size = 0;

    // Instructions are written eight bytes at a time, of which `n` count.
    void bytes(u64 value, u32 n) {
        __builtin_memcpy(code + size, &value, 8);
        size += n;
    }
    static u32 rex(u32 reg, u32 base, bool wide = false) {
        return 0x40 | (wide ? 8 : 0) | (reg & 8) >> 1 | (base & 8) >> 3;
    }
    static u32 modrm(u32 mode, u32 reg, u32 rm) { return mode | (reg & 7) << 3 | (rm & 7); }
    // op reg, [base + displacement]; a base of 4 modulo 8 is not used
    void memory(u32 op, u32 reg, u32 base, i32 displacement, bool wide = false) {
        bool is_short = displacement >= -128 && displacement < 128;
        bytes(rex(reg, base, wide) | op << 8 | modrm(is_short ? 0x40 : 0x80, reg, base) << 16 |
                  (u64)(u32)displacement << 24,
              is_short ? 4 : 7);
    }
    // The same for an operation of two bytes, the first of them 0x0f.
    void memory_0f(u32 op, u32 reg, u32 base, i32 displacement) {
        bool is_short = displacement >= -128 && displacement < 128;
        bytes(rex(reg, base) | 0x0f00u | op << 16 | modrm(is_short ? 0x40 : 0x80, reg, base) << 24 |
                  (u64)(u32)displacement << 32,
              is_short ? 5 : 8);
    }
    void registers(u32 op, u32 reg, u32 rm, bool wide = false) {
        bytes(rex(reg, rm, wide) | op << 8 | modrm(0xc0, reg, rm) << 16, 3);
    }
    void registers_0f(u32 op, u32 reg, u32 rm, bool wide = false) {
        bytes(rex(reg, rm, wide) | 0x0f00u | op << 16 | (u64)modrm(0xc0, reg, rm) << 24, 4);
    }
    // add 0, or 1, and 4, sub 5, xor 6, cmp 7
    void immediate(u32 what, u32 reg, u32 value, bool wide = false) {
        bool is_short = (i32)value >= -128 && (i32)value < 128;
        bytes(rex(0, reg, wide) | (is_short ? 0x8300u : 0x8100u) | modrm(0xc0, what, reg) << 16 |
                  (u64)value << 24,
              is_short ? 4 : 7);
    }
    void shift(u32 what, u32 reg, u32 by, bool wide = false) { // shl 4, shr 5, sar 7
        bytes(rex(0, reg, wide) | 0xc100u | modrm(0xc0, what, reg) << 16 | by << 24, 4);
    }
    void constant(u32 reg, u64 value) {
        bytes(rex(0, reg, true) | (0xb8 | (reg & 7)) << 8, 2);
        bytes(value, 8);
    }
};

} // namespace
