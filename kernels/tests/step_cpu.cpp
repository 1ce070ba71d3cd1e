// step() as an engine of its own, on the CPU: no cached translations, no decoded code, one instruction at a
// time. The engines for warps leave to step() what their fast paths leave out; with this one all tests of the
// machine can be run on it, without a GPU.
#include "step.cuh"

static bool fetch(Machine &m, u32 &insn) {
    Hart &h = m.vm->hart;
    Walk w = translate(m, h.pc, ACCESS_FETCH);
    if (!w.cause && ((w.pa >> 32) || !ram_read_at(m, (u32)w.pa))) w.cause = CAUSE_FETCH_ACCESS;
    if (!w.cause) return ram_load(m, w.pa, 4, insn);
    memory_fault(m, w.cause, h.pc);
    h.steps++;
    return false;
}

extern "C" void machine_step_run(void *, Vm *vm, Pool *pool, Mailbox *mail, const SliceRequest *request,
                                 SliceResult *result) {
    Machine m = {};
    m.vm = vm, m.pool = pool, m.mail = mail;
    m.table = (u32 *)(uintptr_t)vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)pool->base_ptr;
    u64 before = vm->hart.steps, limit = before, most = 1ull << 62;
    u64 end = before + (request->budget < most ? request->budget : most);
    slice_begin(m, *request);
    m.events |= EV_CHECK;
    for (;;) {
        m.events &= EV_EXIT | EV_CHECK;
        if (m.events || vm->hart.steps >= limit) {
            if (take_turn(m, end) == TURN_STOP) break;
            limit = next_deadline(m, end);
        }
        m.events = 0;
        u32 insn;
        if (fetch(m, insn)) step(m, decode(insn, vm->hart.pc % FRAME_BYTES));
    }
    slice_end(m, before, *result);
}
