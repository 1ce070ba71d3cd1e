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

// Reads a CSR; false when it does not exist for this mode.
FN bool csr_read(Machine &m, u32 number, u32 &value) {
    Hart &h = m.vm->hart;
    if ((number >> 8 & 3) > h.mode) return false;
    switch (number) {
    case CSR_SSTATUS: value = h.sstatus; return true;
    case CSR_SIE: value = h.sie; return true;
    case CSR_STVEC: value = h.stvec; return true;
    case CSR_SCOUNTEREN: value = h.scounteren; return true;
    case CSR_SENVCFG: value = h.senvcfg; return true;
    case CSR_SSCRATCH: value = h.sscratch; return true;
    case CSR_SEPC: value = h.sepc; return true;
    case CSR_SCAUSE: value = h.scause; return true;
    case CSR_STVAL: value = h.stval; return true;
    case CSR_SIP: value = pending_interrupts(*m.vm); return true;
    case CSR_SATP: value = h.satp; return true;
    default: break;
    }
    // Counters. hpmcounters are not implemented: mcounteren keeps them from S and U.
    if ((number & ~0x80u) < CSR_CYCLE || (number & ~0x80u) > CSR_INSTRET) return false;
    if (h.mode == MODE_U && !(h.scounteren >> (number & 3) & 1)) return false;
    u64 count = (number & 3) == 0 ? h.steps : (number & 3) == 1 ? guest_ticks(h) : h.steps - h.trapped;
    value = (u32)(number & 0x80 ? count >> 32 : count);
    return true;
}

FN void csr_write(Machine &m, u32 number, u32 value) {
    Hart &h = m.vm->hart;
    switch (number) {
    case CSR_SSTATUS: {
        u32 changed = h.sstatus ^ value;
        h.sstatus = value & SSTATUS_MASK;
        if (changed & value & SSTATUS_SIE) m.events |= EV_CHECK;
        if (changed & SSTATUS_SUM) m.events |= EV_MODE;
        if (changed & SSTATUS_MXR) m.events |= EV_FLUSH;
        break;
    }
    case CSR_SIE:
        h.sie = value & IP_MASK;
        m.events |= EV_CHECK;
        break;
    case CSR_STVEC: h.stvec = value & ~2u; break; // direct or vectored
    case CSR_SCOUNTEREN: h.scounteren = value & 7; break;
    case CSR_SENVCFG: h.senvcfg = value & 1; break;
    case CSR_SSCRATCH: h.sscratch = value; break;
    case CSR_SEPC: h.sepc = value & ~3u; break;
    case CSR_SCAUSE: h.scause = value; break;
    case CSR_STVAL: h.stval = value; break;
    case CSR_SIP:
        h.sip = value & IP_SSIP; // STIP and SEIP are read-only here
        m.events |= EV_CHECK;
        break;
    case CSR_SATP:
        h.satp = value;
        m.events |= EV_FLUSH;
        break;
    default: break;
    }
}

// CSRRW, CSRRS, CSRRC and their immediate forms on CSR `number`, which `insn` names. False: illegal
// instruction.
FN bool csr_operate(Machine &m, u32 number, u32 insn, u32 rs1_value, u32 &result) {
    u32 f3 = insn >> 12 & 7, rs1 = insn >> 15 & 31;
    u32 operand = f3 & 4 ? rs1 : rs1_value;
    bool writes = (f3 & 3) == 1 || rs1 != 0;
    if (number == CSR_SEED) { // must be written to be read; U mode may poll it too (sseed and useed are set)
        if (!writes) return false;
        result = 2u << 30 | (u32)(entropy_word(m.vm->hart) & 0xffff); // OPST = ES16: 16 fresh bits
        return true;
    }
    if (writes && (number >> 10) == 3) return false; // read-only
    u32 old;
    if (!csr_read(m, number, old)) return false;
    if (writes) {
        u32 base = number == CSR_SIP ? m.vm->hart.sip : old;
        csr_write(m, number, (f3 & 3) == 1 ? operand : (f3 & 3) == 2 ? base | operand : base & ~operand);
    }
    result = old;
    return true;
}
SLOW bool csr_execute(Machine &m, u32 insn, u32 rs1_value, u32 &result) {
    return csr_operate(m, insn >> 20, insn, rs1_value, result);
}
