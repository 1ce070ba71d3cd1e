// The CPU engine: one VM per thread, threaded code. Each 4 KiB frame that is executed has a code page of
// 1,024 micro-ops that decode themselves when first reached. Handlers are functions that end in a tail call
// to the next one, so the state of the hart stays in the six argument registers.
//
// `at` points to the current micro-op, and two sums replace counters that each instruction would have to
// move:
//   pc    = (u32)(at >> 1) + delta          (a micro-op is 8 bytes, an instruction 4)
//   steps = limit + count + (at >> 3)       (count is negative; the run ends when steps reaches limit)
// Straight-line code changes neither sum; jumps correct them. From the start of a page or the target of a
// jump backwards at most 1,024 instructions run before the next such point, so only those points compare with
// the limit; within 1,024 of it they change to a table that compares at every instruction.
#include "system.cuh"

namespace {

struct TlbEntry {
    u32 read, write; // virtual page, or INVALID
    u64 addend;      // host address minus virtual address
};
struct FetchEntry {
    u32 page; // virtual page, or INVALID
    u32 reserved;
    const Uop *ops;
};

#define TLB_ENTRIES 256u
#define FETCH_ENTRIES 128u
#define INVALID 1u // no page address has a low bit set
#define PAGE_MASK 0xfffff000u

// Cached translations of one mode: user, supervisor, supervisor with SUM.
struct Tlb {
    TlbEntry data[TLB_ENTRIES];
    FetchEntry fetch[FETCH_ENTRIES];
};

struct Cpu {
    Tlb tlb[3];
    Machine machine;
    u64 limit; // steps at which the run ends
};

struct Handler {
    void (*run)(u32 *x, const Uop *at, i64 count, u32 delta, Tlb *tlb, const Handler *table);
};
#define ARGUMENTS u32 *x, const Uop *at, i64 count, u32 delta, Tlb *tlb, const Handler *table
#define STATE x, at, count, delta, tlb, table
// The byte may be written by another thread that decodes the same shared page; acquire orders the fields
// after it.
#define DISPATCH return table[__atomic_load_n(&at->op, __ATOMIC_ACQUIRE)].run(STATE)
#define NEXT                                                                                                 \
    do {                                                                                                     \
        at++;                                                                                                \
        DISPATCH;                                                                                            \
    } while (0)

// Micro-ops that only this engine has: jumps backwards, and pairs fused into one.
#define CPU_ONLY_OPS(X)                                                                                      \
    X(BEQ_BACK)                                                                                              \
    X(BNE_BACK) X(BLT_BACK) X(BGE_BACK) X(BLTU_BACK) X(BGEU_BACK) X(JAL_BACK) X(LI_PAIR) X(AUIPC_PAIR)

enum CpuOp : u32 {
    OP_CPU_BASE = OP_COUNT - 1,
#define X(name) OP_##name,
    CPU_ONLY_OPS(X)
#undef X
        OP_CPU_COUNT
};

extern const Handler FAST[256];
extern const Handler EXACT[256];

#define WINDOW 1024

inline i64 position(const Uop *at) { return (i64)((uintptr_t)at >> 3); }
inline u32 pc_of(const Uop *at, u32 delta) { return (u32)((uintptr_t)at >> 1) + delta; }
inline Vm *vm_of(u32 *x) { return (Vm *)x; }
static_assert(__builtin_offsetof(Vm, hart) == 0 && __builtin_offsetof(Hart, x) == 0, "x leads to the VM");
inline Cpu *cpu_of(u32 *x) { return (Cpu *)(uintptr_t)vm_of(x)->engine_ptr; }

inline bool near_limit(const Uop *at, i64 count) { return count + position(at) > -WINDOW; }

void to_exact(ARGUMENTS) {
    table = EXACT;
    DISPATCH;
}
#define CHECK_LIMIT                                                                                          \
    do {                                                                                                     \
        if (UNLIKELY(near_limit(at, count))) return to_exact(STATE);                                         \
    } while (0)

// Makes hart.pc and hart.steps those of the micro-op at `at`.
inline Cpu *sync(ARGUMENTS) {
    (void)tlb, (void)table;
    Cpu *cpu = cpu_of(x);
    Hart &h = vm_of(x)->hart;
    h.pc = pc_of(at, delta);
    h.steps = cpu->limit + (u64)(count + position(at));
    return cpu;
}

// After an operation out of line: returns to the driver if anything came up, else true: go on with the next
// one.
inline bool settled(Cpu *cpu) {
    Machine &m = cpu->machine;
    if (LIKELY(!m.events)) return true;
    Hart &h = m.vm->hart;
    if (!(m.events & EV_JUMP)) h.pc += 4;
    h.steps++;
    return false;
}

template <u32 OP> void op_alu(ARGUMENTS) {
    x[at->rd] = alu<OP>(x[at->rs1], x[at->rs2]);
    NEXT;
}
template <u32 OP> void op_alu_imm(ARGUMENTS) {
    x[at->rd] = alu<OP>(x[at->rs1], at->imm);
    NEXT;
}
void op_li(ARGUMENTS) {
    x[at->rd] = at->imm;
    NEXT;
}
void op_li_pair(ARGUMENTS) {
    x[at->rd] = at->imm;
    at += 2;
    DISPATCH;
}
void op_auipc(ARGUMENTS) {
    x[at->rd] = (pc_of(at, delta) & PAGE_MASK) + at->imm;
    NEXT;
}
void op_auipc_pair(ARGUMENTS) {
    x[at->rd] = (pc_of(at, delta) & PAGE_MASK) + at->imm;
    at += 2;
    DISPATCH;
}
void op_fence(ARGUMENTS) { NEXT; }

void load_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Machine &m = cpu->machine;
    u32 op = at->op, size = access_bytes(op), va = x[at->rs1] + at->imm, value;
    if (!(va & (size - 1))) {
        Walk w = translate(m, va, ACCESS_LOAD);
        const u8 *host = !w.cause && !(w.pa >> 32) ? ram_read_at(m, (u32)w.pa) : 0;
        if (host && !m.events) {
            TlbEntry &e = tlb->data[va >> 12 & (TLB_ENTRIES - 1)];
            e.read = va & PAGE_MASK, e.write = INVALID, e.addend = (u64)(uintptr_t)host - va;
        }
    }
    if (!load_any(m, va, size, value)) {
        settled(cpu);
        return;
    }
    switch (op) {
    case OP_LB: value = extend<OP_LB>(value); break;
    case OP_LH: value = extend<OP_LH>(value); break;
    default: break;
    }
    x[at->rd] = value;
    if (settled(cpu)) NEXT;
}

void store_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Machine &m = cpu->machine;
    u32 size = access_bytes(at->op), va = x[at->rs1] + at->imm;
    bool done = store_any(m, va, size, x[at->rs2]);
    if (!settled(cpu)) return;
    if (done && !(va & (size - 1))) {
        Walk w = translate(m, va, ACCESS_STORE);
        if (!w.cause && !(w.pa >> 32) && w.pa / FRAME_BYTES < m.vm->ram.pages) {
            u32 entry = m.table[w.pa / FRAME_BYTES];
            if ((entry & FRAME_PRIVATE) && !code_of(m)[entry & FRAME_MASK]) {
                TlbEntry &e = tlb->data[va >> 12 & (TLB_ENTRIES - 1)];
                e.read = e.write = va & PAGE_MASK;
                e.addend = (u64)(uintptr_t)(frame_at(m, entry & FRAME_MASK) + w.pa % FRAME_BYTES) - va;
            }
        }
    }
    NEXT;
}

template <u32 SIZE> struct Width;
template <> struct Width<1> { typedef u8 Type; };
template <> struct Width<2> { typedef u16 Type; };
template <> struct Width<4> { typedef u32 Type; };

template <u32 OP, u32 SIZE> void op_load(ARGUMENTS) {
    typedef typename Width<SIZE>::Type T;
    u32 va = x[at->rs1] + at->imm;
    const TlbEntry &e = tlb->data[va >> 12 & (TLB_ENTRIES - 1)];
    if (UNLIKELY((va & (PAGE_MASK | (SIZE - 1))) != e.read)) return load_slow(STATE);
    x[at->rd] = extend<OP>(*(const T *)(uintptr_t)(e.addend + va));
    NEXT;
}
template <u32 SIZE> void op_store(ARGUMENTS) {
    typedef typename Width<SIZE>::Type T;
    u32 va = x[at->rs1] + at->imm;
    const TlbEntry &e = tlb->data[va >> 12 & (TLB_ENTRIES - 1)];
    if (UNLIKELY((va & (PAGE_MASK | (SIZE - 1))) != e.write)) return store_slow(STATE);
    *(T *)(uintptr_t)(e.addend + va) = (T)x[at->rs2];
    NEXT;
}

void atomic_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    u32 value;
    if (atomic(cpu->machine, at->op, x[at->rs1], x[at->rs2], value)) x[at->rd] = value;
    if (settled(cpu)) NEXT;
}
template <u32 OP> void op_amo(ARGUMENTS) {
    u32 va = x[at->rs1];
    const TlbEntry &e = tlb->data[va >> 12 & (TLB_ENTRIES - 1)];
    if (UNLIKELY((va & (PAGE_MASK | 3)) != e.write)) return atomic_slow(STATE);
    u32 *word = (u32 *)(uintptr_t)(e.addend + va);
    u32 old = *word;
    *word = amo<OP>(old, x[at->rs2]);
    x[at->rd] = old;
    NEXT;
}

// Sends the hart to `target`, which the caller has counted. A miss leaves it to the driver.
#define GO_TO(target)                                                                                        \
    do {                                                                                                     \
        i64 done = count + position(at) + 1;                                                                 \
        const FetchEntry &f = tlb->fetch[(target) >> 12 & (FETCH_ENTRIES - 1)];                              \
        at = f.ops + ((target) >> 2 & 1023);                                                                 \
        delta = ((target)&PAGE_MASK) - (u32)((uintptr_t)f.ops >> 1);                                         \
        count = done - position(at);                                                                         \
        CHECK_LIMIT;                                                                                         \
        DISPATCH;                                                                                            \
    } while (0)
inline bool fetch_hit(const Tlb *tlb, u32 target) {
    return LIKELY((target & (PAGE_MASK | 3)) == tlb->fetch[target >> 12 & (FETCH_ENTRIES - 1)].page);
}

// A jump whose target is not cached, or misaligned.
inline void jump_slow(u32 target, ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    if (target & 3) {
        take_exception(cpu->machine, CAUSE_FETCH_MISALIGNED, target);
    } else {
        Hart &h = vm_of(x)->hart;
        x[at->rd] = h.pc + 4;
        h.pc = target;
        cpu->machine.events |= EV_JUMP;
    }
    settled(cpu);
}
void jalr_slow(ARGUMENTS) { jump_slow((x[at->rs1] + at->imm) & ~1u, STATE); }
void relative_slow(ARGUMENTS) { jump_slow(pc_of(at, delta) + at->imm, STATE); }

void op_jalr(ARGUMENTS) {
    u32 target = (x[at->rs1] + at->imm) & ~1u;
    if (!fetch_hit(tlb, target)) return jalr_slow(STATE);
    x[at->rd] = pc_of(at, delta) + 4;
    GO_TO(target);
}
void op_jal_far(ARGUMENTS) {
    u32 target = pc_of(at, delta) + at->imm;
    if (!fetch_hit(tlb, target)) return relative_slow(STATE);
    x[at->rd] = pc_of(at, delta) + 4;
    GO_TO(target);
}
#define GO_NEAR                                                                                              \
    do {                                                                                                     \
        i64 distance = (i32)at->imm >> 2;                                                                    \
        count += 1 - distance;                                                                               \
        at += distance;                                                                                      \
    } while (0)
void op_jal(ARGUMENTS) {
    x[at->rd] = pc_of(at, delta) + 4;
    GO_NEAR;
    DISPATCH;
}
void op_jal_back(ARGUMENTS) {
    x[at->rd] = pc_of(at, delta) + 4;
    GO_NEAR;
    CHECK_LIMIT;
    DISPATCH;
}
template <u32 OP> void op_branch(ARGUMENTS) {
    if (branch_taken<OP>(x[at->rs1], x[at->rs2])) {
        GO_NEAR;
        DISPATCH;
    }
    NEXT;
}
template <u32 OP> void op_branch_back(ARGUMENTS) {
    if (branch_taken<OP>(x[at->rs1], x[at->rs2])) {
        GO_NEAR;
        CHECK_LIMIT;
        DISPATCH;
    }
    NEXT;
}
template <u32 OP> void op_branch_far(ARGUMENTS) {
    if (branch_taken<OP>(x[at->rs1], x[at->rs2])) {
        u32 target = pc_of(at, delta) + at->imm;
        if (!fetch_hit(tlb, target)) return relative_slow(STATE);
        GO_TO(target);
    }
    NEXT;
}

// Straight-line code runs into the next page: no instruction, so no step. `at` is one past the page.
void op_next_page(ARGUMENTS) {
    u32 target = pc_of(at, delta);
    if (!fetch_hit(tlb, target)) {
        sync(STATE);
        return;
    }
    count--; // GO_TO counts an instruction
    GO_TO(target);
}

void op_csr(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Machine &m = cpu->machine;
    u32 result = 0;
    if (LIKELY(csr_execute(m, at->imm, x[at->rs1], result)))
        x[at->rd] = result;
    else
        take_exception(m, CAUSE_ILLEGAL, at->imm);
    u32 events = m.events;
    if (events && !(events & ~(EV_CHECK | EV_MODE)) && at->imm >> 20 == CSR_SSTATUS) {
        // The kernel turns interrupts and SUM on and off all the time: stay, unless an interrupt is due.
        Hart &h = m.vm->hart;
        if (!(events & EV_CHECK) || !(pending_interrupts(*m.vm) & h.sie)) {
            m.events = 0;
            tlb = &cpu->tlb[h.sstatus & SSTATUS_SUM ? 2 : 1]; // S mode: sstatus is not U's to write
            NEXT;
        }
    }
    if (settled(cpu)) NEXT;
}
void op_system(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    system_execute(cpu->machine, at->imm);
    if (settled(cpu)) NEXT;
}
void op_illegal(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    take_exception(cpu->machine, CAUSE_ILLEGAL, at->imm);
    settled(cpu);
}

const Uop *code_page(const Machine &m, u32 page) {
    return (const Uop *)(uintptr_t)(m.pool->code_ptr + (u64)page * CODE_PAGE_BYTES);
}

// Fuses two instructions of one page where the pair is common and cannot trap.
Uop fuse(Uop first, const u32 *words, u32 index) {
    if (index + 1 >= 1024 || first.rd == SINK) return first;
    Uop second = decode(words[index + 1], 4 * (index + 1));
    bool chained = second.op == OP_ADDI && second.rd == first.rd && second.rs1 == first.rd;
    if (!chained || (first.op != OP_LI && first.op != OP_AUIPC)) return first;
    first.op = (u8)(first.op == OP_LI ? OP_LI_PAIR : OP_AUIPC_PAIR);
    first.imm += second.imm;
    return first;
}

Uop decode_at(Machine &m, const Uop *at, bool pairs) {
    u64 offset = (u64)(uintptr_t)at - m.pool->code_ptr;
    u32 page = (u32)(offset / CODE_PAGE_BYTES), index = (u32)(offset % CODE_PAGE_BYTES) / 8;
    if (index >= 1024) return uop(OP_NEXT_PAGE, 0, 0, 0, 0);
    const u32 *words = (const u32 *)frame_at(m, code_frame(m)[page]);
    Uop u = decode(words[index], 4 * index);
    if (u.op >= OP_BEQ && u.op <= OP_JAL && (i32)u.imm <= 0) u.op = (u8)(u.op - OP_BEQ + OP_BEQ_BACK);
    return pairs ? fuse(u, words, index) : u;
}

void op_decode(ARGUMENTS) {
    Cpu *cpu = cpu_of(x);
    Uop u = decode_at(cpu->machine, at, true);
    u64 word;
    __builtin_memcpy(&word, &u, 8);
    __atomic_store_n((u64 *)at, word, __ATOMIC_RELEASE);
    DISPATCH;
}

// Near the limit: looks before every instruction. A fused pair that would overstep is run as its first half,
// from a page of its own in which everything else hands back to the driver.
void op_exact(ARGUMENTS) {
    i64 left = -(count + position(at));
    if (left <= 0) {
        sync(STATE);
        return;
    }
    u32 op = at->op;
    if (op == OP_DECODE) {
        op_decode(x, at, count, delta, tlb, EXACT);
        return;
    }
    if (left == 1 && (op == OP_LI_PAIR || op == OP_AUIPC_PAIR)) {
        Cpu *cpu = sync(STATE);
        Uop u = decode_at(cpu->machine, at, false);
        x[u.rd] = (u.op == OP_AUIPC ? pc_of(at, delta) & PAGE_MASK : 0) + u.imm;
        vm_of(x)->hart.pc += 4;
        vm_of(x)->hart.steps++;
        return;
    }
    return FAST[op].run(STATE);
}

#define H(name, handler) [OP_##name] = {handler}
const Handler FAST[256] = {
    H(DECODE, (op_decode)),
    H(NEXT_PAGE, (op_next_page)),
    H(ILLEGAL, (op_illegal)),
#define X(name) H(name, (op_alu<OP_##name>)),
    ALU_OPS(X)
#undef X
#define X(name) H(name, (op_alu_imm<OP_##name>)),
        ALU_IMM_OPS(X)
#undef X
            H(LI, (op_li)),
    H(AUIPC, (op_auipc)),
    H(LB, (op_load<OP_LB, 1>)),
    H(LH, (op_load<OP_LH, 2>)),
    H(LW, (op_load<OP_LW, 4>)),
    H(LBU, (op_load<OP_LBU, 1>)),
    H(LHU, (op_load<OP_LHU, 2>)),
    H(SB, (op_store<1>)),
    H(SH, (op_store<2>)),
    H(SW, (op_store<4>)),
#define X(name) H(name, (op_branch<OP_##name>)),
    BRANCH_OPS(X)
#undef X
        H(JAL, (op_jal)),
#define X(name) H(name##_FAR, (op_branch_far<OP_##name>)),
    BRANCH_OPS(X)
#undef X
        H(JAL_FAR, (op_jal_far)),
    H(JALR, (op_jalr)),
    H(FENCE, (op_fence)),
    H(FENCE_I, (op_fence)),
    H(LR, (atomic_slow)),
    H(SC, (atomic_slow)),
#define X(name) H(name, (op_amo<OP_##name>)),
    AMO_OPS(X)
#undef X
        H(CSR, (op_csr)),
    H(SYSTEM, (op_system)),
#define X(name) H(name##_BACK, (op_branch_back<OP_##name>)),
    BRANCH_OPS(X)
#undef X
        H(JAL_BACK, (op_jal_back)),
    H(LI_PAIR, (op_li_pair)),
    H(AUIPC_PAIR, (op_auipc_pair)),
};
#undef H
#define E4                                                                                                   \
    {op_exact}, {op_exact}, {op_exact}, { op_exact }
#define E8 E4, E4
#define E64 E8, E8, E8, E8, E8, E8, E8, E8
const Handler EXACT[256] = {E64, E64, E64, E64};

void flush(Cpu *cpu) {
    for (Tlb &tlb : cpu->tlb) {
        for (TlbEntry &e : tlb.data) e.read = e.write = INVALID;
        for (FetchEntry &f : tlb.fetch) f.page = INVALID;
    }
}

// Finds the code at hart.pc in the mode's cached translations, filling them. False: an exception or exit came
// up.
bool resolve(Cpu *cpu, Tlb *tlb) {
    Machine &m = cpu->machine;
    Hart &h = m.vm->hart;
    if (fetch_hit(tlb, h.pc)) return true;
    Walk w = translate(m, h.pc, ACCESS_FETCH);
    if (!w.cause && ((w.pa >> 32) || w.pa / FRAME_BYTES >= m.vm->ram.pages)) w.cause = CAUSE_FETCH_ACCESS;
    if (w.cause) {
        memory_fault(m, w.cause, h.pc);
        h.steps++;
        return false;
    }
    u32 page = code_page_for(m, m.table[w.pa / FRAME_BYTES] & FRAME_MASK);
    if (m.events & EV_FLUSH) {
        flush(cpu);
        m.events &= ~EV_FLUSH;
    }
    FetchEntry &f = tlb->fetch[h.pc >> 12 & (FETCH_ENTRIES - 1)];
    f.page = h.pc & PAGE_MASK, f.ops = code_page(m, page);
    return true;
}

void run(Cpu *cpu, u64 end) {
    Machine &m = cpu->machine;
    Hart &h = m.vm->hart;
    m.events |= EV_CHECK;
    for (;;) {
        if (m.events & EV_FLUSH) flush(cpu);
        m.events &= EV_EXIT | EV_CHECK;
        if (m.events || h.steps >= cpu->limit) {
            if (take_turn(m, end) == TURN_STOP) return;
            cpu->limit = next_deadline(m, end);
        }
        Tlb *tlb = &cpu->tlb[h.mode == MODE_U ? 0 : h.sstatus & SSTATUS_SUM ? 2 : 1];
        m.events = 0;
        if (!resolve(cpu, tlb)) continue;
        const FetchEntry &f = tlb->fetch[h.pc >> 12 & (FETCH_ENTRIES - 1)];
        const Uop *at = f.ops + (h.pc >> 2 & 1023);
        i64 count = (i64)(h.steps - cpu->limit) - position(at);
        u32 delta = (h.pc & PAGE_MASK) - (u32)((uintptr_t)f.ops >> 1);
        const Handler *table = near_limit(at, count) ? EXACT : FAST;
        table[at->op].run(h.x, at, count, delta, tlb, table);
    }
}

} // namespace

extern "C" u64 machine_cpu_bytes(void) { return sizeof(Cpu); }

// Runs one slice of one VM. `engine` is zeroed memory of machine_cpu_bytes() that one thread uses.
extern "C" void machine_cpu_run(void *engine, Vm *vm, Pool *pool, Mailbox *mail, const SliceRequest *request,
                                SliceResult *result) {
    Cpu *cpu = (Cpu *)engine;
    Machine &m = cpu->machine;
    m.vm = vm, m.pool = pool, m.mail = mail;
    m.table = (u32 *)(uintptr_t)vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)pool->base_ptr;
    vm->engine_ptr = (u64)(uintptr_t)cpu;
    u64 before = vm->hart.steps;
    flush(cpu);
    slice_begin(m, *request);
    cpu->limit = before;
    run(cpu, before + request->budget);
    slice_end(m, before, *result);
}

// Writes guest-physical memory of a VM that no engine runs, as a device would. False: outside RAM, or no frame left.
extern "C" bool machine_cpu_write(Vm *vm, Pool *pool, u32 pa, const u8 *from, u32 bytes) {
    Machine m = {};
    m.vm = vm, m.pool = pool;
    m.table = (u32 *)(uintptr_t)vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)pool->base_ptr;
    u32 exit = vm->exit;
    bool done = ram_has(m, pa, bytes) && ram_copy_in(m, pa, from, bytes);
    vm->exit = exit;
    if (done) vm->hart.reservation = NO_RESERVATION;
    return done;
}
