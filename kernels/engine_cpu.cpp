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
#include "cpu_decode.h"
#include "cpu_tlb.h"
#include "cpu_native.h"
#include "step.cuh"

namespace {

// Kept out of the handlers that jump to them, which would have to save registers otherwise.
#define OUT_OF_LINE __attribute__((noinline))

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
#define INLINE inline __attribute__((always_inline))

extern const Handler FAST[256];
extern const Handler EXACT[256];

inline i64 position(const Uop *at) { return (i64)((uintptr_t)at >> 3); }
inline u32 pc_of(const Uop *at, u32 delta) { return (u32)((uintptr_t)at >> 1) + delta; }
inline Vm *vm_of(u32 *x) { return (Vm *)x; }
static_assert(__builtin_offsetof(Vm, hart) == 0 && __builtin_offsetof(Hart, x) == 0, "x leads to the VM");
inline Cpu *cpu_of(u32 *x) { return (Cpu *)(uintptr_t)vm_of(x)->engine_ptr; }

inline bool near_limit(const Uop *at, i64 count) { return count + position(at) > -WINDOW; }

OUT_OF_LINE void to_exact(ARGUMENTS) {
    table = EXACT;
    DISPATCH;
}
#define CHECK_LIMIT                                                                                          \
    do {                                                                                                     \
        if (UNLIKELY(near_limit(at, count))) return to_exact(STATE);                                         \
    } while (0)

// Counts jumps to the micro-op at `at`: code that is often jumped to becomes native.
#if HAS_NATIVE
inline u8 &heat_of(Tlb *tlb, const Uop *at) { return tlb->heat[position(at) % HEAT_ENTRIES]; }
inline void cool(Cpu *cpu, u8 &heat) { heat = (u8)(cpu->native ? 0 - cpu->native->warm_up : 0); }
__attribute__((noinline)) void warm(ARGUMENTS) {
    Cpu *cpu = cpu_of(x);
    cool(cpu, heat_of(tlb, at));
    if (cpu->native && cpu->native->warm_up) make_native(cpu->machine, *cpu->native, at);
    DISPATCH;
}
#define COUNT_HEAT                                                                                           \
    do {                                                                                                     \
        if (UNLIKELY(++heat_of(tlb, at) == 0)) return warm(STATE);                                           \
    } while (0)
#else
#define COUNT_HEAT
#endif

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

// Finds the code at hart.pc in the mode's cached translations, filling them. False: an exception or exit came
// up.
__attribute__((noinline)) bool resolve(Cpu *cpu, Tlb *tlb) {
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
    u32 frame = m.table[w.pa / FRAME_BYTES] & FRAME_MASK, page = code_page_for(m, frame);
    forget_stale(cpu);
    note_large(cpu, w, h.pc);
    cpu->fetch_frames.add(frame);
    FetchEntry &f = fetch_of(tlb, h.pc);
    f.page = h.pc & PAGE_MASK;
    f.bias = (u64)(uintptr_t)code_page(m, page) - 2 * (u64)f.page;
    f.delta = 0 - (u32)(f.bias >> 1);
    return true;
}

// To an address: the fetch entry must have been found to hold it. `at` is the jump, which this counts.
#define GO_TO(target)                                                                                        \
    do {                                                                                                     \
        i64 done = count + position(at) + 1;                                                                 \
        const FetchEntry &f = fetch_of(tlb, target);                                                         \
        at = (const Uop *)(uintptr_t)(f.bias + 2 * (u64)(target));                                           \
        delta = f.delta;                                                                                     \
        count = done - position(at);                                                                         \
        CHECK_LIMIT;                                                                                         \
        COUNT_HEAT;                                                                                          \
        DISPATCH;                                                                                            \
    } while (0)
// Within the page.
#define GO_NEAR                                                                                              \
    do {                                                                                                     \
        i64 distance = (i32)at->imm >> 2;                                                                    \
        count += 1 - distance;                                                                               \
        at += distance;                                                                                      \
    } while (0)

// -- Operations out of line
// --------------------------------------------------------------------------------------

// Caches the translation of an aligned `va`, if RAM is there and nothing comes up that returns to the driver.
// True: the handler will find it.
bool cache_load(Cpu *cpu, Tlb *tlb, u32 va) {
    Machine &m = cpu->machine;
    Walk w = translate(m, va, ACCESS_LOAD);
    const u8 *host = !w.cause && !(w.pa >> 32) ? ram_read_at(m, (u32)w.pa) : 0;
    if (UNLIKELY(!host || m.events)) return false;
    fill_data(cpu, tlb, w, va, host, false);
    return true;
}
bool cache_store(Cpu *cpu, Tlb *tlb, u32 va) {
    Machine &m = cpu->machine;
    Walk w = translate(m, va, ACCESS_STORE);
    u8 *host = !w.cause && !(w.pa >> 32) ? ram_write_at(m, (u32)w.pa) : 0;
    if (UNLIKELY(!host || (m.events & EV_FLUSH))) return false;
    // If the frame held code that was looked up, the code that runs must be looked up again.
    bool stands = code_stands(cpu, m.vm->hart.pc);
    forget_stale(cpu);
    fill_data(cpu, tlb, w, va, host, true);
    if (UNLIKELY(!stands)) m.events |= EV_CHECK;
    return stands;
}

template <u32 OP> OUT_OF_LINE void load_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    u32 va = x[at->rs1] + at->imm, value;
    if (!(va & (access_bytes(OP) - 1)) && cache_load(cpu, tlb, va)) return FAST[OP].run(STATE);
    if (!load_any(cpu->machine, va, access_bytes(OP), value)) {
        settled(cpu);
        return;
    }
    x[at->rd] = extend<OP>(value);
    if (settled(cpu)) NEXT;
}

template <u32 OP> OUT_OF_LINE void store_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    u32 va = x[at->rs1] + at->imm;
    if (!(va & (access_bytes(OP) - 1)) && cache_store(cpu, tlb, va)) return FAST[OP].run(STATE);
    store_any(cpu->machine, va, access_bytes(OP), x[at->rs2]);
    if (settled(cpu)) NEXT;
}

template <u32 OP> OUT_OF_LINE void atomic_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    u32 va = x[at->rs1], value;
    bool fails = OP == OP_SC && vm_of(x)->hart.reservation == NO_RESERVATION; // and writes nothing
    if (!(va & 3) && !fails && (OP == OP_LR ? cache_load(cpu, tlb, va) : cache_store(cpu, tlb, va)))
        return FAST[OP].run(STATE);
    if (atomic(cpu->machine, OP, va, x[at->rs2], value)) x[at->rd] = value;
    if (settled(cpu)) NEXT;
}

// A jump whose target is not cached, or misaligned.
INLINE void jump_slow(u32 target, ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Hart &h = vm_of(x)->hart;
    if (target & 3) {
        take_exception(cpu->machine, CAUSE_FETCH_MISALIGNED, target);
        settled(cpu);
        return;
    }
    x[at->rd] = h.pc + 4;
    h.pc = target;
    h.steps++;
    if (h.steps >= cpu->limit || !resolve(cpu, tlb)) return;
    GO_TO(target);
}
OUT_OF_LINE void jalr_slow(ARGUMENTS) { jump_slow((x[at->rs1] + at->imm) & ~1u, STATE); }
OUT_OF_LINE void relative_slow(ARGUMENTS) { jump_slow(pc_of(at, delta) + at->imm, STATE); }

OUT_OF_LINE void next_page_slow(ARGUMENTS) { sync(STATE); }

__attribute__((noinline)) void csr_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Machine &m = cpu->machine;
    u32 result = 0;
    if (LIKELY(csr_execute(m, at->imm, x[at->rs1], result)))
        x[at->rd] = result;
    else
        take_exception(m, CAUSE_ILLEGAL, at->imm);
    if (settled(cpu)) NEXT;
}
// The kernel turns interrupts and SUM on and off all the time: this stays unless an interrupt is due.
__attribute__((noinline)) void sstatus(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Machine &m = cpu->machine;
    Hart &h = m.vm->hart;
    u32 result = 0;
    if (UNLIKELY(!csr_operate(m, CSR_SSTATUS, at->imm, x[at->rs1], result))) return csr_slow(STATE);
    x[at->rd] = result;
    u32 events = m.events;
    if (events) {
        bool due = (events & EV_CHECK) && (pending_interrupts(*m.vm) & h.sie);
        if (due || (events & ~(EV_CHECK | EV_MODE))) {
            settled(cpu);
            return;
        }
        m.events = 0;
        tlb = &cpu->tlb[h.sstatus & SSTATUS_SUM ? 2 : 1]; // S mode: sstatus is not U's to write
    }
    NEXT;
}
OUT_OF_LINE void system_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    system_execute(cpu->machine, at->imm, x[at->rs1]);
    if (code_stands(cpu, vm_of(x)->hart.pc)) forget_stale(cpu);
    if (settled(cpu)) NEXT;
}
OUT_OF_LINE void illegal_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    take_exception(cpu->machine, CAUSE_ILLEGAL, at->imm);
    settled(cpu);
}

OUT_OF_LINE void decode_slow(ARGUMENTS) {
    decode_block(cpu_of(x)->machine, at);
    DISPATCH;
}

// Near the limit: looks before every instruction, and takes pairs and runs apart.
OUT_OF_LINE void exact(ARGUMENTS) {
    if (count + position(at) >= 0) {
        sync(STATE);
        return;
    }
    if (at->op == OP_DECODE) decode_block(cpu_of(x)->machine, at);
#if HAS_NATIVE
    if (at->op == OP_NATIVE) { // what it stood for
        Cpu *cpu = sync(STATE);
        CodePlace place = place_of(cpu->machine, at);
        u32 next = vm_of(x)->hart.pc + 4;
        step(cpu->machine, decode(place.words[place.index], place.index * 4));
        if (cpu->machine.events || vm_of(x)->hart.pc != next) return;
        NEXT;
    }
#endif
    return FAST[PAIR.first[at->op]].run(STATE);
}

// -- Handlers
// ----------------------------------------------------------------------------------------------------

template <u32 OP> constexpr bool is_alu = OP >= OP_ADD && OP <= OP_REMU;
template <u32 OP> constexpr bool is_alu_imm = OP >= OP_ADDI && OP <= OP_ANDI;
template <u32 OP> constexpr bool is_load = OP >= OP_LB && OP <= OP_LHU;
template <u32 OP> constexpr bool is_store = OP >= OP_SB && OP <= OP_SW;
template <u32 OP>
constexpr bool is_straight =
    is_alu<OP> || is_alu_imm<OP> || is_load<OP> || is_store<OP> || OP == OP_LI || OP == OP_AUIPC;

// What does not jump. False: the translation is not cached, nothing has happened.
template <u32 OP> INLINE bool straight(u32 *x, const Uop *at, u32 delta, Tlb *tlb) {
    if constexpr (OP == OP_LI) {
        x[at->rd] = at->imm;
    } else if constexpr (OP == OP_AUIPC) {
        x[at->rd] = (pc_of(at, delta) & PAGE_MASK) + at->imm;
    } else if constexpr (is_alu<OP>) {
        x[at->rd] = alu<OP>(x[at->rs1], x[at->rs2]);
    } else if constexpr (is_alu_imm<OP>) {
        x[at->rd] = alu<OP>(x[at->rs1], at->imm);
    } else {
        u32 va = x[at->rs1] + at->imm;
        const TlbEntry &e = entry_of(tlb, va);
        u32 tag = is_load<OP> ? e.read : e.write;
        if (UNLIKELY((va & (PAGE_MASK | (access_bytes(OP) - 1))) != tag)) return false;
        void *host = (void *)(uintptr_t)(e.addend + va);
        if constexpr (access_bytes(OP) == 4) {
            if constexpr (is_load<OP>)
                x[at->rd] = *(u32 *)host;
            else
                *(u32 *)host = x[at->rs2];
        } else if constexpr (access_bytes(OP) == 2) {
            if constexpr (is_load<OP>)
                x[at->rd] = extend<OP>(*(u16 *)host);
            else
                *(u16 *)host = (u16)x[at->rs2];
        } else {
            if constexpr (is_load<OP>)
                x[at->rd] = extend<OP>(*(u8 *)host);
            else
                *(u8 *)host = (u8)x[at->rs2];
        }
    }
    return true;
}

template <u32 OP> INLINE void body(ARGUMENTS) {
    if constexpr (is_straight<OP>) {
        if (UNLIKELY(!straight<OP>(x, at, delta, tlb))) {
            if constexpr (is_load<OP>)
                return load_slow<OP>(STATE);
            else
                return store_slow<OP>(STATE);
        }
        NEXT;
    } else if constexpr (OP >= OP_BEQ && OP <= OP_BGEU) {
        if (branch_taken<OP>(x[at->rs1], x[at->rs2])) {
            GO_NEAR;
            DISPATCH;
        }
        NEXT;
    } else if constexpr (OP >= OP_BEQ_BACK && OP <= OP_BGEU_BACK) {
        if (branch_taken<OP - OP_BEQ_BACK + OP_BEQ>(x[at->rs1], x[at->rs2])) {
            GO_NEAR;
            CHECK_LIMIT;
            COUNT_HEAT;
            DISPATCH;
        }
        NEXT;
    } else if constexpr (OP >= OP_BEQ_FAR && OP <= OP_BGEU_FAR) {
        if (branch_taken<OP - OP_BEQ_FAR + OP_BEQ>(x[at->rs1], x[at->rs2])) {
            u32 target = pc_of(at, delta) + at->imm;
            if (!fetch_hit(tlb, target)) return relative_slow(STATE);
            GO_TO(target);
        }
        NEXT;
    } else if constexpr (OP == OP_JAL || OP == OP_JAL_BACK) {
        x[at->rd] = pc_of(at, delta) + 4;
        GO_NEAR;
        if constexpr (OP == OP_JAL_BACK) CHECK_LIMIT;
        COUNT_HEAT;
        DISPATCH;
    } else if constexpr (OP == OP_JAL_FAR) {
        u32 target = pc_of(at, delta) + at->imm;
        if (!fetch_hit(tlb, target)) return relative_slow(STATE);
        x[at->rd] = pc_of(at, delta) + 4;
        GO_TO(target);
    } else if constexpr (OP == OP_JALR) {
        u32 target = (x[at->rs1] + at->imm) & ~1u;
        if (!fetch_hit(tlb, target)) return jalr_slow(STATE);
        x[at->rd] = pc_of(at, delta) + 4;
        GO_TO(target);
    } else if constexpr (OP >= OP_AMOSWAP && OP <= OP_AMOMAXU) {
        u32 va = x[at->rs1];
        const TlbEntry &e = entry_of(tlb, va);
        if (UNLIKELY((va & (PAGE_MASK | 3)) != e.write)) return atomic_slow<OP>(STATE);
        u32 *word = (u32 *)(uintptr_t)(e.addend + va);
        u32 old = *word;
        *word = amo<OP>(old, x[at->rs2]);
        x[at->rd] = old;
        NEXT;
    } else if constexpr (OP == OP_LR || OP == OP_SC) {
        u32 va = x[at->rs1];
        const TlbEntry &e = entry_of(tlb, va);
        if (UNLIKELY((va & (PAGE_MASK | 3)) != (OP == OP_LR ? e.read : e.write)))
            return atomic_slow<OP>(STATE);
        u32 *word = (u32 *)(uintptr_t)(e.addend + va), pa = physical_of(tlb, va) | va % FRAME_BYTES;
        u32 &reservation = vm_of(x)->hart.reservation;
        if constexpr (OP == OP_LR) {
            reservation = pa;
            x[at->rd] = *word;
        } else {
            bool held = reservation == pa;
            if (held) *word = x[at->rs2];
            reservation = NO_RESERVATION;
            x[at->rd] = !held;
        }
        NEXT;
    } else if constexpr (OP == OP_FENCE || OP == OP_FENCE_I) {
        NEXT; // one hart in order; code pages follow stores at once
    } else if constexpr (OP == OP_NEXT_PAGE) {
        // Straight-line code runs into the next page: no instruction, so no step. `at` is one past the page.
        u32 target = pc_of(at, delta);
        if (!fetch_hit(tlb, target)) return next_page_slow(STATE);
        count--; // GO_TO counts an instruction
        GO_TO(target);
    } else if constexpr (OP >= OP_SW_RUN2 && OP <= OP_LW_RUN4) {
        // Words at one base, all in one page.
        constexpr bool store = OP <= OP_SW_RUN4;
        constexpr u32 n = 2 + OP - (store ? OP_SW_RUN2 : OP_LW_RUN2);
        u32 base = x[at->rs1], first = base + at->imm, last = base + at[n - 1].imm;
        const TlbEntry &e = entry_of(tlb, first);
        if (UNLIKELY((first & (PAGE_MASK | 3)) != (store ? e.write : e.read) || ((first ^ last) & PAGE_MASK)))
            return FAST[store ? OP_SW : OP_LW].run(STATE);
        u64 host = e.addend;
        for (u32 i = 0; i < n; i++) {
            u32 *word = (u32 *)(uintptr_t)(host + (u32)(base + at[i].imm));
            if constexpr (store)
                *word = x[at[i].rs2];
            else
                x[at[i].rd] = *word;
        }
        at += n;
        DISPATCH;
    } else if constexpr (OP == OP_CSR) {
        return csr_slow(STATE);
    } else if constexpr (OP == OP_SSTATUS) {
        return sstatus(STATE);
    } else if constexpr (OP == OP_SYSTEM) {
        return system_slow(STATE);
    } else if constexpr (OP == OP_DECODE) {
        return decode_slow(STATE);
    } else if constexpr (OP == OP_NATIVE) {
#if HAS_NATIVE
        Cpu *cpu = cpu_of(x);
        u32 entry = *(const u32 *)(uintptr_t)(cpu->entries_base + (u64)(uintptr_t)at / 2);
        return Handler{(decltype(Handler::run))(uintptr_t)(cpu->native_run + entry)}.run(STATE);
#endif
    } else if constexpr (OP == OP_TO_COUNTED) {
        COUNT_HEAT;
        DISPATCH;
    } else if constexpr (OP == OP_TO_EXACT) {
        return to_exact(STATE);
    } else {
        static_assert(OP == OP_ILLEGAL, "every micro-op has a handler");
        return illegal_slow(STATE);
    }
}
template <u32 OP> void handler(ARGUMENTS) { return body<OP>(STATE); }

template <u32 A, u32 B> void pair(ARGUMENTS) {
    static_assert(is_straight<A>, "the first of a pair does not jump");
    if (UNLIKELY(!straight<A>(x, at, delta, tlb))) return FAST[A].run(STATE);
    at++;
    return body<B>(STATE);
}

const Handler FAST[256] = {
#define X(name) {handler<OP_##name>},
    ALL_OPS(X) CPU_ONLY_OPS(X)
#undef X
#define X(a, b) {pair<OP_##a, OP_##b>},
        PAIRS(X)
#undef X
};
#define X4(x) x, x, x, x
#define X64(x) X4(X4(X4(x)))
const Handler EXACT[256] = {X64({exact}), X64({exact}), X64({exact}), X64({exact})};

// -- Driver
// ------------------------------------------------------------------------------------------------------

void run(Cpu *cpu, u64 end) {
    Machine &m = cpu->machine;
    Hart &h = m.vm->hart;
    m.events |= EV_CHECK;
    for (;;) {
        forget_stale(cpu);
        m.events &= EV_EXIT | EV_CHECK;
        if (m.events || h.steps >= cpu->limit) {
            if (take_turn(m, end) == TURN_STOP) return;
            cpu->limit = next_deadline(m, end);
        }
        Tlb *tlb = &cpu->tlb[h.mode == MODE_U ? 0 : h.sstatus & SSTATUS_SUM ? 2 : 1];
        m.events = 0;
        if (!resolve(cpu, tlb)) continue;
        const FetchEntry &f = fetch_of(tlb, h.pc);
        const Uop *at = (const Uop *)(uintptr_t)(f.bias + 2 * (u64)h.pc);
        i64 count = (i64)(h.steps - cpu->limit) - position(at);
        const Handler *table = near_limit(at, count) ? EXACT : FAST;
        table[at->op].run(h.x, at, count, f.delta, tlb, table);
    }
}

} // namespace

extern "C" u64 machine_cpu_bytes(void) { return sizeof(Cpu); }

// Lets an engine make hot code native. All engines that share a pool must share `native`, too.
extern "C" void machine_cpu_native(void *engine, NativeCode *native) {
#if HAS_NATIVE
    Cpu *cpu = (Cpu *)engine;
    cpu->native = native;
    for (Tlb &tlb : cpu->tlb)
        for (u8 &heat : tlb.heat) cool(cpu, heat);
#else
    (void)engine, (void)native;
#endif
}

// Runs one slice of one VM. `engine` is zeroed memory of machine_cpu_bytes() that one thread uses.
extern "C" void machine_cpu_run(void *engine, Vm *vm, Pool *pool, Mailbox *mail, const SliceRequest *request,
                                SliceResult *result) {
    Cpu *cpu = (Cpu *)engine;
    Machine &m = cpu->machine;
    m.vm = vm, m.pool = pool, m.mail = mail;
    m.table = (u32 *)(uintptr_t)vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)pool->base_ptr;
    vm->engine_ptr = (u64)(uintptr_t)cpu;
#if HAS_NATIVE
    if (NativeCode *native = cpu->native) {
        cpu->entries_base = entries_base(m, *native), cpu->native_run = (u64)(uintptr_t)native->run;
        make_room(m, *native);
    }
#endif
    u64 before = vm->hart.steps;
    flush(cpu);
    slice_begin(m, *request);
    cpu->limit = before;
    u64 most = 1ull << 62; // the distance to the end is counted in 63 bits
    run(cpu, before + (request->budget < most ? request->budget : most));
    slice_end(m, before, *result);
}

// Writes guest-physical memory of a VM that no engine runs, as a device would. False: outside RAM, or no
// frame left.
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
