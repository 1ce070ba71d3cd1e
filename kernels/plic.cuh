// Platform-level interrupt controller (RISC-V PLIC 1.0.0): 31 sources, level-triggered gateways, context 0 =
// S mode.
#pragma once
#include "trap.cuh"

FN void plic_line(Machine &m, u32 source, bool high) {
    Plic &p = m.vm->plic;
    u32 bit = 1u << source;
    if (!high) {
        p.level &= ~bit; // a request already latched stays until it is claimed
        return;
    }
    p.level |= bit;
    if (!(p.claimed & bit)) p.pending |= bit;
    m.events |= EV_CHECK;
}

SLOW u32 plic_read(Machine &m, u32 offset) {
    Plic &p = m.vm->plic;
    if (offset < 32 * 4) return p.priority[offset / 4];
    switch (offset) {
    case 0x1000: return p.pending;
    case 0x2000: return p.enable;
    case 0x200000: return p.threshold;
    case 0x200004: {
        u32 source = plic_best(p, 0);
        p.pending &= ~(1u << source);
        if (source) p.claimed |= 1u << source;
        return source;
    }
    default: return 0;
    }
}

SLOW void plic_write(Machine &m, u32 offset, u32 value) {
    Plic &p = m.vm->plic;
    if (offset >= 4 && offset < 32 * 4)
        p.priority[offset / 4] = value & 7;
    else if (offset == 0x2000)
        p.enable = value & ~1u;
    else if (offset == 0x200000)
        p.threshold = value & 7;
    else if (offset == 0x200004 && value > 0 && value < 32 && (p.enable >> value & 1)) {
        u32 bit = 1u << value;
        p.claimed &= ~bit;
        if (p.level & bit) p.pending |= bit;
    }
    m.events |= EV_CHECK;
}
