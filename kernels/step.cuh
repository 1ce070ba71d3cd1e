// One instruction, any instruction, on the state in memory: what the engines for warps do with all that their
// fast paths leave out. hart.pc and hart.steps are those of the instruction before the call and of the next
// one after it.
#pragma once
#include "system.cuh"

SLOW void step(Machine &m, Uop u) {
    Hart &h = m.vm->hart;
    u32 *x = h.x;
    u32 a = x[u.rs1], b = x[u.rs2], next = h.pc + 4, value = 0;
    bool writes = true, jumped = false;
    switch (u.op) {
#define X(name)                                                                                              \
    case OP_##name: value = alu<OP_##name>(a, b); break;
        ALU_OPS(X)
#undef X
#define X(name)                                                                                              \
    case OP_##name: value = alu<OP_##name>(a, u.imm); break;
        ALU_IMM_OPS(X)
#undef X
    case OP_LI: value = u.imm; break;
    case OP_AUIPC: value = (h.pc & ~(FRAME_BYTES - 1)) + u.imm; break;
#define X(name)                                                                                              \
    case OP_##name:                                                                                          \
        writes = load_any(m, a + u.imm, access_bytes(OP_##name), value);                                     \
        value = extend<OP_##name>(value);                                                                    \
        break;
        LOAD_OPS(X)
#undef X
    case OP_SB:
    case OP_SH:
    case OP_SW:
        store_any(m, a + u.imm, access_bytes(u.op), b);
        writes = false;
        break;
#define X(name)                                                                                              \
    case OP_##name:                                                                                          \
    case OP_##name##_FAR:                                                                                    \
        writes = false;                                                                                      \
        if (branch_taken<OP_##name>(a, b)) next = h.pc + u.imm, jumped = true;                               \
        break;
        BRANCH_OPS(X)
#undef X
    case OP_JAL:
    case OP_JAL_FAR:
        value = next;
        next = h.pc + u.imm, jumped = true;
        break;
    case OP_JALR:
        value = next;
        next = (a + u.imm) & ~1u, jumped = true;
        break;
    case OP_FENCE:
    case OP_FENCE_I: writes = false; break;
    case OP_CSR:
        writes = csr_execute(m, u.imm, a, value);
        if (!writes) take_exception(m, CAUSE_ILLEGAL, u.imm);
        break;
    case OP_SYSTEM:
        system_execute(m, u.imm, a);
        writes = false;
        break;
    case OP_ILLEGAL:
        take_exception(m, CAUSE_ILLEGAL, u.imm);
        writes = false;
        break;
    default: writes = atomic(m, u.op, a, b, value); break;
    }
    h.steps++;
    if (m.events & EV_JUMP) return; // a trap, or SRET
    if (jumped && (next & 3)) {
        h.steps--;
        take_exception(m, CAUSE_FETCH_MISALIGNED, next);
        h.steps++;
        return;
    }
    if (writes) x[u.rd] = value;
    h.pc = next;
}

// A naturally aligned load or store at a physical address outside RAM, on the registers `x`.
SLOW void step_device(Machine &m, Uop u, u32 va, u64 pa, u32 *x) {
    Hart &h = m.vm->hart;
    u32 size = access_bytes(u.op), next = h.pc + 4, value = 0, cause = 0;
    bool stores = u.op == OP_SB || u.op == OP_SH || u.op == OP_SW;
    if (stores && !mmio_store(m, pa, size, x[u.rs2])) cause = CAUSE_STORE_ACCESS;
    if (!stores && !mmio_load(m, pa, size, value)) cause = CAUSE_LOAD_ACCESS;
    switch (u.op) {
#define X(name)                                                                                              \
    case OP_##name: value = extend<OP_##name>(value); break;
        LOAD_OPS(X)
#undef X
    default: break;
    }
    if (cause) memory_fault(m, cause, va);
    h.steps++;
    if (m.events & EV_JUMP) return;
    if (!stores && u.rd) x[u.rd] = value;
    h.pc = next;
}
