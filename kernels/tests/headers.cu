// Every operation of the machine, called once from a kernel: shows that the headers compile for a GPU, and
// what registers and stack they need there. It is no engine: one lane runs one VM, and decodes each word
// anew.
#include "system.cuh"

template <u32 OP> FN void one_alu(u32 *x, const Uop &u, bool immediate) {
    x[u.rd] = alu<OP>(x[u.rs1], immediate ? u.imm : x[u.rs2]);
}

FN bool fetch(Machine &m, u32 &insn) {
    Hart &h = m.vm->hart;
    Walk w = translate(m, h.pc, ACCESS_FETCH);
    if (!w.cause && ((w.pa >> 32) || !ram_read_at(m, (u32)w.pa))) w.cause = CAUSE_FETCH_ACCESS;
    if (w.cause) {
        memory_fault(m, w.cause, h.pc);
        return false;
    }
    code_page_for(m, m.table[w.pa / FRAME_BYTES] & FRAME_MASK);
    ram_load(m, w.pa, 4, insn);
    return true;
}

// One instruction. True: hart.pc has to move on by itself.
FN bool execute(Machine &m, u32 insn) {
    Hart &h = m.vm->hart;
    u32 *x = h.x, value = 0;
    Uop u = decode(insn, h.pc & (FRAME_BYTES - 1));
    u32 target = h.pc + u.imm;
    bool taken = false;
    switch (u.op) {
#define X(name)                                                                                              \
    case OP_##name: one_alu<OP_##name>(x, u, false); return true;
        ALU_OPS(X)
#undef X
#define X(name)                                                                                              \
    case OP_##name: one_alu<OP_##name>(x, u, true); return true;
        ALU_IMM_OPS(X)
#undef X
#define X(name)                                                                                              \
    case OP_##name:                                                                                          \
        if (load_any(m, x[u.rs1] + u.imm, access_bytes(OP_##name), value))                                   \
            x[u.rd] = extend<OP_##name>(value);                                                              \
        return true;
        LOAD_OPS(X)
#undef X
#define X(name)                                                                                              \
    case OP_##name: store_any(m, x[u.rs1] + u.imm, access_bytes(OP_##name), x[u.rs2]); return true;
        STORE_OPS(X)
#undef X
#define X(name)                                                                                              \
    case OP_##name:                                                                                          \
    case OP_##name##_FAR: taken = branch_taken<OP_##name>(x[u.rs1], x[u.rs2]); break;
        BRANCH_OPS(X)
#undef X
#define X(name) case OP_##name:
        AMO_OPS(X)
#undef X
    case OP_LR:
    case OP_SC:
        if (atomic(m, u.op, x[u.rs1], x[u.rs2], value)) x[u.rd] = value;
        return true;
    case OP_LI: x[u.rd] = u.imm; return true;
    case OP_AUIPC: x[u.rd] = (h.pc & ~(FRAME_BYTES - 1)) + u.imm; return true;
    case OP_JALR: target = (x[u.rs1] + u.imm) & ~1u;
    // falls through
    case OP_JAL:
    case OP_JAL_FAR: taken = true; break;
    case OP_CSR:
        if (csr_execute(m, insn, x[u.rs1], value))
            x[u.rd] = value;
        else
            take_exception(m, CAUSE_ILLEGAL, insn);
        return true;
    case OP_SYSTEM: system_execute(m, insn, x[u.rs1]); return true;
    case OP_FENCE:
    case OP_FENCE_I: return true;
    default: take_exception(m, CAUSE_ILLEGAL, u.imm); return true;
    }
    if (!taken) return true;
    if (target & 3) {
        take_exception(m, CAUSE_FETCH_MISALIGNED, target);
        return true;
    }
    x[u.rd] = h.pc + 4;
    h.pc = target;
    return false;
}

extern "C" __global__ void machine_headers(Vm *vms, Pool *pool, Mailbox *mailboxes,
                                           const SliceRequest *requests, SliceResult *results, u32 count) {
    u32 number = blockIdx.x * blockDim.x + threadIdx.x;
    if (number >= count) return;
    Machine m;
    m.vm = vms + number, m.pool = pool, m.mail = mailboxes + number;
    m.table = (u32 *)(uintptr_t)m.vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)pool->base_ptr;
    m.events = 0;
    Hart &h = m.vm->hart;
    u64 before = h.steps, end = before + requests[number].budget;
    slice_begin(m, requests[number]);
    u64 limit = before;
    m.events |= EV_CHECK;
    for (;;) {
        m.events &= EV_EXIT | EV_CHECK;
        if (m.events || h.steps >= limit) {
            if (take_turn(m, end) == TURN_STOP) break;
            limit = next_deadline(m, end);
        }
        m.events = 0;
        u32 insn;
        if (fetch(m, insn) && execute(m, insn) && !(m.events & EV_JUMP)) h.pc += 4;
        h.steps++;
    }
    slice_end(m, before, results[number]);
}
