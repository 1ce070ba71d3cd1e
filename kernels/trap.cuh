// Traps and interrupts of S mode (RISC-V Privileged 1.12, 4.1). Every exception and interrupt is delegated to
// S.
#pragma once
#include "memory.cuh"

enum Cause : u32 {
    CAUSE_FETCH_MISALIGNED = 0,
    CAUSE_FETCH_ACCESS = 1,
    CAUSE_ILLEGAL = 2,
    CAUSE_BREAKPOINT = 3,
    CAUSE_LOAD_MISALIGNED = 4,
    CAUSE_LOAD_ACCESS = 5,
    CAUSE_STORE_MISALIGNED = 6,
    CAUSE_STORE_ACCESS = 7,
    CAUSE_ECALL_U = 8,
    CAUSE_FETCH_PAGE = 12,
    CAUSE_LOAD_PAGE = 13,
    CAUSE_STORE_PAGE = 15,
    CAUSE_INTERRUPT = 0x80000000u,
};

#define MODE_U 0u
#define MODE_S 1u

#define SSTATUS_SIE (1u << 1)
#define SSTATUS_SPIE (1u << 5)
#define SSTATUS_SPP (1u << 8)
#define SSTATUS_SUM (1u << 18)
#define SSTATUS_MXR (1u << 19)
#define SSTATUS_MASK (SSTATUS_SIE | SSTATUS_SPIE | SSTATUS_SPP | SSTATUS_SUM | SSTATUS_MXR)

#define IP_SSIP (1u << 1)
#define IP_STIP (1u << 5)
#define IP_SEIP (1u << 9)
#define IP_MASK (IP_SSIP | IP_STIP | IP_SEIP)

#define NO_RESERVATION 0xFFFFFFFFu

FN void enter_trap(Machine &m, u32 cause, u32 tval, u32 offset) {
    Hart &h = m.vm->hart;
    h.sepc = h.pc, h.scause = cause, h.stval = tval;
    h.last_trap[0] = cause, h.last_trap[1] = h.pc, h.last_trap[2] = tval;
    u32 s = h.sstatus & ~(SSTATUS_SPIE | SSTATUS_SPP | SSTATUS_SIE);
    if (h.sstatus & SSTATUS_SIE) s |= SSTATUS_SPIE;
    if (h.mode == MODE_S) s |= SSTATUS_SPP;
    h.sstatus = s;
    h.mode = MODE_S;
    h.reservation = NO_RESERVATION;
    h.pc = (h.stvec & ~3u) + offset;
    m.events |= EV_JUMP | EV_MODE;
}

// What SRET makes of sstatus, and the mode it leads to.
struct TrapReturn {
    u32 mode, status;
};
FN TrapReturn trap_return(u32 status) {
    TrapReturn back;
    back.mode = status & SSTATUS_SPP ? MODE_S : MODE_U;
    back.status = (status & ~(SSTATUS_SIE | SSTATUS_SPP)) | SSTATUS_SPIE;
    if (status & SSTATUS_SPIE) back.status |= SSTATUS_SIE;
    return back;
}

// Takes an exception at hart.pc, which must be that of the instruction that trapped. It counts as a step, so
// that a hart whose trap handler traps still uses up its slice.
SLOW void take_exception(Machine &m, u32 cause, u32 tval) {
    m.vm->hart.trapped++;
    enter_trap(m, cause, tval, 0);
}

// PLIC: the highest pending priority above `floor` among the enabled sources, lowest source number first; 0
// if none.
FN u32 plic_best(const Plic &p, u32 floor) {
    u32 candidates = p.pending & p.enable & ~1u, best = 0, best_priority = floor;
    for (u32 source = 1; candidates >> source; source++) {
        if ((candidates >> source & 1) && p.priority[source] > best_priority)
            best = source, best_priority = p.priority[source];
        if (source == 31) break;
    }
    return best;
}

// sip as S mode reads it.
FN u32 pending_interrupts(const Vm &vm) {
    u32 ip = vm.hart.sip & IP_SSIP;
    if (guest_ticks(vm.hart) >= vm.hart.stimecmp) ip |= IP_STIP;
    if ((vm.plic.pending & vm.plic.enable) && plic_best(vm.plic, vm.plic.threshold)) ip |= IP_SEIP;
    return ip;
}

// Takes the most urgent deliverable interrupt before the instruction at hart.pc; false if there is none.
SLOW bool take_interrupt(Machine &m) {
    Hart &h = m.vm->hart;
    u32 ready = pending_interrupts(*m.vm) & h.sie;
    if (!ready || (h.mode == MODE_S && !(h.sstatus & SSTATUS_SIE))) return false;
    u32 code = ready & IP_SEIP ? 9 : ready & IP_SSIP ? 1 : 5; // 4.1.3: SEI, SSI, STI
    enter_trap(m, CAUSE_INTERRUPT | code, 0, h.stvec & 1 ? 4 * code : 0);
    return true;
}
