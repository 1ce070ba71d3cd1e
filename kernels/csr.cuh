// Control and status registers that S and U mode can reach (Zicsr; Privileged 1.12, 4.1; Zicntr; Zkr's seed).
#pragma once
#include "mmu.cuh"

enum CsrNumber : u32 {
    CSR_SEED = 0x015,
    CSR_SSTATUS = 0x100,
    CSR_SIE = 0x104,
    CSR_STVEC = 0x105,
    CSR_SCOUNTEREN = 0x106,
    CSR_SENVCFG = 0x10a,
    CSR_SSCRATCH = 0x140,
    CSR_SEPC = 0x141,
    CSR_SCAUSE = 0x142,
    CSR_STVAL = 0x143,
    CSR_SIP = 0x144,
    CSR_SATP = 0x180,
    CSR_CYCLE = 0xc00,
    CSR_TIME = 0xc01,
    CSR_INSTRET = 0xc02,
    CSR_CYCLEH = 0xc80,
    CSR_TIMEH = 0xc81,
    CSR_INSTRETH = 0xc82,
};

FN u64 rotate_left(u64 x, u32 n) { return x << n | x >> (64 - n); }

// 64 fresh bits: SipHash-2-4 of a counter under the VM's key, which the host draws from its own entropy.
SLOW u64 entropy_word(Hart &h) {
    u64 k0 = h.entropy_key[0], k1 = h.entropy_key[1], message = h.entropy_count++;
    u64 v0 = k0 ^ 0x736f6d6570736575ull, v1 = k1 ^ 0x646f72616e646f6dull;
    u64 v2 = k0 ^ 0x6c7967656e657261ull, v3 = k1 ^ 0x7465646279746573ull;
    for (u32 block = 0; block < 3; block++) {
        u64 word = block == 0 ? message : 8ull << 56;
        u32 rounds = 2;
        if (block < 2)
            v3 ^= word;
        else
            v2 ^= 0xff, rounds = 4;
        for (u32 i = 0; i < rounds; i++) {
            v0 += v1, v1 = rotate_left(v1, 13) ^ v0, v0 = rotate_left(v0, 32);
            v2 += v3, v3 = rotate_left(v3, 16) ^ v2;
            v0 += v3, v3 = rotate_left(v3, 21) ^ v0;
            v2 += v1, v1 = rotate_left(v1, 17) ^ v2, v2 = rotate_left(v2, 32);
        }
        if (block < 2) v0 ^= word;
    }
    return v0 ^ v1 ^ v2 ^ v3;
}

// What of a CSR is a word of the hart: what the others are made of, and what a write changes. Null for those
// that cannot be written.
FN u32 *csr_word(Hart &h, u32 number) {
    switch (number) {
    case CSR_SSTATUS: return &h.sstatus;
    case CSR_SIE: return &h.sie;
    case CSR_STVEC: return &h.stvec;
    case CSR_SCOUNTEREN: return &h.scounteren;
    case CSR_SENVCFG: return &h.senvcfg;
    case CSR_SSCRATCH: return &h.sscratch;
    case CSR_SEPC: return &h.sepc;
    case CSR_SCAUSE: return &h.scause;
    case CSR_STVAL: return &h.stval;
    case CSR_SIP: return &h.sip;
    case CSR_SATP: return &h.satp;
    default: return 0;
    }
}
// What a CSR holds after a write of `value`.
FN u32 csr_kept(u32 number, u32 value) {
    switch (number) {
    case CSR_SSTATUS: return value & SSTATUS_MASK;
    case CSR_SIE: return value & IP_MASK;
    case CSR_STVEC: return value & ~2u; // direct or vectored
    case CSR_SCOUNTEREN: return value & 7;
    case CSR_SENVCFG: return value & 1;
    case CSR_SEPC: return value & ~3u;
    case CSR_SIP: return value & IP_SSIP; // STIP and SEIP are read-only here
    default: return value;
    }
}
// Events that come up when a CSR that held `old` holds `value`.
FN u32 csr_events(u32 number, u32 old, u32 value) {
    u32 changed = old ^ value;
    switch (number) {
    case CSR_SSTATUS:
        return (changed & value & SSTATUS_SIE ? EV_CHECK : EV_NONE) |
               (changed & SSTATUS_SUM ? EV_MODE : EV_NONE) | (changed & SSTATUS_MXR ? EV_FLUSH : EV_NONE);
    case CSR_SIE:
    case CSR_SIP: return EV_CHECK;
    case CSR_SATP: return EV_FLUSH;
    default: return EV_NONE;
    }
}
// CSRRW, CSRRS, CSRRC and their immediate forms: whether `insn` writes, and what, where `base` was.
FN bool csr_writes(u32 insn) { return (insn >> 12 & 3) == 1 || (insn >> 15 & 31) != 0; }
FN u32 csr_operand(u32 insn, u32 base, u32 rs1_value) {
    u32 f3 = insn >> 12 & 7, operand = f3 & 4 ? insn >> 15 & 31 : rs1_value;
    return (f3 & 3) == 1 ? operand : (f3 & 3) == 2 ? base | operand : base & ~operand;
}

// Reads a CSR; false when it does not exist for this mode.
FN bool csr_read(Machine &m, u32 number, u32 &value) {
    Hart &h = m.vm->hart;
    if ((number >> 8 & 3) > h.mode) return false;
    if (const u32 *word = csr_word(h, number)) {
        value = number == CSR_SIP ? pending_interrupts(*m.vm) : *word;
        return true;
    }
    // Counters. hpmcounters are not implemented: mcounteren keeps them from S and U.
    if ((number & ~0x80u) < CSR_CYCLE || (number & ~0x80u) > CSR_INSTRET) return false;
    if (h.mode == MODE_U && !(h.scounteren >> (number & 3) & 1)) return false;
    u64 count = (number & 3) == 0 ? h.steps : (number & 3) == 1 ? guest_ticks(h) : h.steps - h.trapped;
    value = (u32)(number & 0x80 ? count >> 32 : count);
    return true;
}

FN void csr_write(Machine &m, u32 number, u32 value) {
    u32 *word = csr_word(m.vm->hart, number);
    if (!word) return;
    value = csr_kept(number, value);
    m.events |= csr_events(number, *word, value);
    *word = value;
}

// A CSR instruction on CSR `number`, which `insn` names. False: illegal instruction.
FN bool csr_operate(Machine &m, u32 number, u32 insn, u32 rs1_value, u32 &result) {
    bool writes = csr_writes(insn);
    if (number == CSR_SEED) { // must be written to be read; U mode may poll it too (sseed and useed are set)
        if (!writes) return false;
        result = 2u << 30 | (u32)(entropy_word(m.vm->hart) & 0xffff); // OPST = ES16: 16 fresh bits
        return true;
    }
    if (writes && (number >> 10) == 3) return false; // read-only
    u32 old;
    if (!csr_read(m, number, old)) return false;
    if (writes) csr_write(m, number, csr_operand(insn, number == CSR_SIP ? m.vm->hart.sip : old, rs1_value));
    result = old;
    return true;
}
SLOW bool csr_execute(Machine &m, u32 insn, u32 rs1_value, u32 &result) {
    return csr_operate(m, insn >> 20, insn, rs1_value, result);
}
