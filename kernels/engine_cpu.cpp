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

// Kept out of the handlers that jump to them, which would have to save registers otherwise.
#define OUT_OF_LINE __attribute__((noinline, cold))

struct TlbEntry {
    u32 read, write; // virtual page, or INVALID
    u64 addend;      // host address minus virtual address
};
struct FetchEntry {
    u32 page;  // virtual page, or INVALID
    u32 delta; // see above
    u64 bias;  // the micro-op of address a is at bias + 2 * a
};

#define TLB_ENTRIES 256u
#define FETCH_ENTRIES 128u
#define INVALID 0x800u // differs from every tag: a tag has only bits of page number and misalignment
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
    // Range of addresses translated through 4 MiB pages since the last flush: one of them may sit in many
    // entries.
    u32 large_first, large_last;
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
#define INLINE inline __attribute__((always_inline))

// clang-format off: it takes these lists for expressions
// Micro-ops that only this engine has: jumps backwards, and runs of words stored or loaded at one base.
#define CPU_ONLY_OPS(X)                                                                                      \
    X(BEQ_BACK)                                                                                              \
    X(BNE_BACK)                                                                                              \
    X(BLT_BACK) X(BGE_BACK) X(BLTU_BACK) X(BGEU_BACK) X(JAL_BACK) X(SW_RUN2) X(SW_RUN3) X(SW_RUN4)           \
        X(LW_RUN2) X(LW_RUN3) X(LW_RUN4)

// Pairs of neighbours that run with one dispatch: the most frequent ones of a Linux boot.
#define PAIRS(X)                                                                                             \
    X(ADDI, ADDI)                                                                                            \
    X(ADDI, SW)                                                                                              \
    X(ADDI, JAL_BACK) X(ADDI, JALR) X(ADDI, BLTU_BACK) X(ADDI, JAL_FAR) X(ADDI, LW) X(ADDI, LI)              \
        X(ADDI, SLLI) X(ADDI, ADD) X(ADDI, BEQ) X(ADDI, BNE) X(ADDI, BNE_BACK) X(ADDI, ANDI) X(ADDI, JAL)    \
            X(LW, ADDI) X(LW, LI) X(LW, ANDI) X(LW, ADD) X(LW, SW) X(LW, BNE) X(LW, BEQ) X(LW, SLLI)         \
                X(LW, LW) X(LW, JALR) X(SW, ADDI) X(SW, LW) X(SW, JAL_BACK) X(SW, LI) X(SW, SW)              \
                    X(SW, JAL_FAR) X(SW, JAL) X(LI, ADDI) X(LI, LI) X(LI, AND) X(LI, LW) X(LI, SW)           \
                        X(LI, BNE) X(LI, BEQ) X(LI, JAL_FAR) X(LI, JAL) X(LI, ADD) X(SLLI, ADD) X(SLLI, OR)  \
                            X(SLLI, SRAI) X(SLLI, SRLI) X(SRLI, SLLI) X(SRLI, OR) X(SRLI, ANDI) X(ADD, LW)   \
                                X(ADD, XOR) X(ADD, ADD) X(ADD, ADDI) X(ADD, LBU) X(ADD, JALR) X(ADD, SW)     \
                                    X(ADD, SLLI) X(LBU, BNE) X(LBU, BEQ) X(LBU, LBU) X(LBU, ADDI)            \
                                        X(LBU, ANDI) X(LBU, SLLI) X(LBU, SB) X(ANDI, BEQ) X(ANDI, BNE)       \
                                            X(ANDI, ADDI) X(OR, ADD) X(OR, SLLI) X(OR, SW) X(OR, OR)         \
                                                X(XOR, SRLI) X(XOR, SLLI) X(AND, BEQ) X(AND, BNE)            \
                                                    X(AND, SUB) X(AND, BGE) X(AUIPC, JALR) X(AUIPC, ADDI)    \
                                                        X(AUIPC, LW) X(SB, ADDI) X(SUB, ADDI) X(SRAI, ADDI)  \
                                                            X(LH, LI) X(LHU, SLLI) X(SLTU, ADD)

// clang-format on
enum CpuOp : u32 {
    OP_CPU_BASE = OP_COUNT - 1,
#define X(name) OP_##name,
    CPU_ONLY_OPS(X)
#undef X
#define X(first, second) OP_##first##_##second,
        PAIRS(X)
#undef X
            OP_CPU_COUNT
};
static_assert(OP_CPU_COUNT <= 256, "a micro-op's code is one byte");

extern const Handler FAST[256];
extern const Handler EXACT[256];

#define WINDOW 1024

inline i64 position(const Uop *at) { return (i64)((uintptr_t)at >> 3); }
inline u32 pc_of(const Uop *at, u32 delta) { return (u32)((uintptr_t)at >> 1) + delta; }
inline TlbEntry &entry_of(Tlb *tlb, u32 va) {
    return *(TlbEntry *)((char *)tlb->data + (va >> 8 & (TLB_ENTRIES - 1) * sizeof(TlbEntry)));
}
inline FetchEntry &fetch_of(Tlb *tlb, u32 va) {
    return *(FetchEntry *)((char *)tlb->fetch + (va >> 8 & (FETCH_ENTRIES - 1) * sizeof(FetchEntry)));
}
static_assert(sizeof(TlbEntry) == 16 && sizeof(FetchEntry) == 16, "entries are indexed by a shift of 12 - 4");
inline bool fetch_hit(Tlb *tlb, u32 target) {
    return LIKELY((target & (PAGE_MASK | 3)) == fetch_of(tlb, target).page);
}
inline void note_large(Cpu *cpu, const Walk &w, u32 va) {
    if (!w.is_leaf_large) return;
    u32 first = va & ~0x3fffffu, last = va | 0x3fffffu;
    if (first < cpu->large_first) cpu->large_first = first;
    if (last > cpu->large_last) cpu->large_last = last;
}
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

// -- Cached translations
// -----------------------------------------------------------------------------------------

const Uop *code_page(const Machine &m, u32 page) {
    return (const Uop *)(uintptr_t)(m.pool->code_ptr + (u64)page * CODE_PAGE_BYTES);
}

void flush(Cpu *cpu) {
    for (Tlb &tlb : cpu->tlb) {
        for (TlbEntry &e : tlb.data) e = {INVALID, INVALID, 0};
        for (FetchEntry &f : tlb.fetch) f = {INVALID, 0, 0};
    }
    cpu->large_first = ~0u, cpu->large_last = 0;
}

void flush_page(Cpu *cpu, u32 va) {
    if (va >= cpu->large_first && va <= cpu->large_last) return flush(cpu);
    for (Tlb &tlb : cpu->tlb) {
        TlbEntry &e = entry_of(&tlb, va);
        if (((e.read ^ va) & PAGE_MASK) == 0 || ((e.write ^ va) & PAGE_MASK) == 0) e = {INVALID, INVALID, 0};
        FetchEntry &f = fetch_of(&tlb, va);
        if (((f.page ^ va) & PAGE_MASK) == 0) f = {INVALID, 0, 0};
    }
}

void flush_frame(Cpu *cpu) {
    const Machine &m = cpu->machine;
    u64 host = (u64)(uintptr_t)m.frames + (u64)m.flush_frame * FRAME_BYTES;
    u64 ops = m.flush_code ? (u64)(uintptr_t)code_page(m, m.flush_code - 1) : 0;
    for (Tlb &tlb : cpu->tlb) {
        for (TlbEntry &e : tlb.data)
            if (e.addend + (e.read & PAGE_MASK) == host) e = {INVALID, INVALID, 0};
        if (!ops) continue;
        for (FetchEntry &f : tlb.fetch)
            if (f.bias + 2 * (u64)(f.page & PAGE_MASK) == ops) f = {INVALID, 0, 0};
    }
}

// Makes cached translations true again.
void forget_stale(Cpu *cpu) {
    u32 events = cpu->machine.events;
    if (LIKELY(!(events & (EV_FLUSH | EV_FLUSH_PAGE | EV_FLUSH_FRAME)))) return;
    if (events & EV_FLUSH) {
        flush(cpu);
    } else {
        if (events & EV_FLUSH_PAGE) flush_page(cpu, cpu->machine.flush_va);
        if (events & EV_FLUSH_FRAME) flush_frame(cpu);
    }
    cpu->machine.events &= ~(EV_FLUSH | EV_FLUSH_PAGE | EV_FLUSH_FRAME);
}

// -- Operations out of line
// --------------------------------------------------------------------------------------

template <u32 OP> OUT_OF_LINE void load_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Machine &m = cpu->machine;
    u32 va = x[at->rs1] + at->imm, value;
    if (!(va & (access_bytes(OP) - 1))) {
        Walk w = translate(m, va, ACCESS_LOAD);
        const u8 *host = !w.cause && !(w.pa >> 32) ? ram_read_at(m, (u32)w.pa) : 0;
        if (LIKELY(host && !m.events)) {
            note_large(cpu, w, va);
            entry_of(tlb, va) = {va & PAGE_MASK, INVALID, (u64)(uintptr_t)host - va};
            return FAST[OP].run(STATE);
        }
    }
    if (!load_any(m, va, access_bytes(OP), value)) {
        settled(cpu);
        return;
    }
    x[at->rd] = extend<OP>(value);
    if (settled(cpu)) NEXT;
}

template <u32 OP> OUT_OF_LINE void store_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    Machine &m = cpu->machine;
    u32 va = x[at->rs1] + at->imm;
    if (!(va & (access_bytes(OP) - 1))) {
        Walk w = translate(m, va, ACCESS_STORE);
        u8 *host = !w.cause && !(w.pa >> 32) ? ram_write_at(m, (u32)w.pa) : 0;
        if (LIKELY(host && !(m.events & EV_FLUSH))) {
            // If the frame held code, that is forgotten now: the code that runs must be looked up again.
            bool held_code = (m.events & EV_FLUSH_FRAME) && m.flush_code;
            forget_stale(cpu);
            note_large(cpu, w, va);
            entry_of(tlb, va) = {va & PAGE_MASK, va & PAGE_MASK, (u64)(uintptr_t)host - va};
            if (LIKELY(!held_code && !m.events)) return FAST[OP].run(STATE);
            m.events |= EV_CHECK;
        }
    }
    store_any(m, va, access_bytes(OP), x[at->rs2]);
    if (settled(cpu)) NEXT;
}

template <u32 OP> OUT_OF_LINE void atomic_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    u32 value;
    if (atomic(cpu->machine, OP, x[at->rs1], x[at->rs2], value)) x[at->rd] = value;
    if (settled(cpu)) NEXT;
}

// A jump whose target is not cached, or misaligned.
INLINE void jump_slow(u32 target, ARGUMENTS) {
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
OUT_OF_LINE void system_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    system_execute(cpu->machine, at->imm, x[at->rs1]);
    if (settled(cpu)) NEXT;
}
OUT_OF_LINE void illegal_slow(ARGUMENTS) {
    Cpu *cpu = sync(STATE);
    take_exception(cpu->machine, CAUSE_ILLEGAL, at->imm);
    settled(cpu);
}

// -- Decoding
// ----------------------------------------------------------------------------------------------------

struct PairTable {
    u8 of[OP_SW_RUN2][OP_SW_RUN2]; // the pair's code, or 0
    u8 first[256];                 // the first operation of a pair or run; other codes lead to themselves
    constexpr PairTable() : of(), first() {
        for (u32 i = 0; i < 256; i++) first[i] = (u8)i;
#define X(a, b) of[OP_##a][OP_##b] = OP_##a##_##b, first[OP_##a##_##b] = OP_##a;
        PAIRS(X)
#undef X
        for (u32 i = 0; i < 3; i++) first[OP_SW_RUN2 + i] = OP_SW, first[OP_LW_RUN2 + i] = OP_LW;
    }
};
constexpr PairTable PAIR;

void put(const Uop *at, Uop u) {
    u64 word;
    __builtin_memcpy(&word, &u, 8);
    __atomic_store_n((u64 *)at, word, __ATOMIC_RELEASE);
}
Uop decode_single(const u32 *words, u32 index) {
    Uop u = decode(words[index], 4 * index);
    if (u.op >= OP_BEQ && u.op <= OP_JAL && (i32)u.imm <= 0) u.op = (u8)(u.op - OP_BEQ + OP_BEQ_BACK);
    return u;
}

#define BLOCK 32

// Decodes from `at` to the next unconditional jump, the end of the page or a micro-op already decoded, BLOCK
// at most, and joins neighbours where one dispatch can do for all of them. Each keeps its own slot and
// operands: a jump may lead there.
void decode_block(const Machine &m, const Uop *at) {
    u64 offset = (u64)(uintptr_t)at - m.pool->code_ptr;
    u32 page = (u32)(offset / CODE_PAGE_BYTES), index = (u32)(offset % CODE_PAGE_BYTES) / 8;
    if (index >= 1024) return put(at, uop(OP_NEXT_PAGE, 0, 0, 0, 0));
    u32 frame = ((const u32 *)(uintptr_t)m.pool->code_frame_ptr)[page];
    const u32 *words = (const u32 *)(m.frames + (u64)frame * FRAME_BYTES);
    Uop block[BLOCK];
    u32 length = 0;
    while (length < BLOCK && index + length < 1024 && (length == 0 || at[length].op == OP_DECODE)) {
        Uop u = decode_single(words, index + length);
        block[length++] = u;
        if (u.op == OP_JALR || u.op == OP_JAL || u.op == OP_JAL_FAR || u.op == OP_JAL_BACK ||
            u.op == OP_ILLEGAL)
            break;
    }
    for (u32 i = length; i-- > 0;) { // backwards: what a joined micro-op needs is in place before it
        Uop u = block[i];
        u32 op = u.op;
        if (i + 1 < length) u.op = PAIR.of[op][block[i + 1].op] ? PAIR.of[op][block[i + 1].op] : (u8)op;
        if (op == OP_LW || op == OP_SW) {
            // Words at ascending or descending addresses of one base, which no load of the run but the last
            // replaces.
            u32 run = 1;
            while (run < 4 && i + run < length) {
                const Uop &next = block[i + run], &previous = block[i + run - 1];
                if (next.op != op || next.rs1 != u.rs1 || ((next.imm ^ u.imm) & 3)) break;
                if (op == OP_LW && previous.rd == u.rs1) break;
                if (run > 1 && ((i32)next.imm > (i32)previous.imm) != ((i32)previous.imm > (i32)u.imm)) break;
                run++;
            }
            if (run > 1) u.op = (u8)((op == OP_SW ? OP_SW_RUN2 : OP_LW_RUN2) + run - 2);
        }
        put(at + i, u);
    }
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

// To an address: the fetch entry must have been found to hold it. `at` is the jump, which this counts.
#define GO_TO(target)                                                                                        \
    do {                                                                                                     \
        i64 done = count + position(at) + 1;                                                                 \
        const FetchEntry &f = fetch_of(tlb, target);                                                         \
        at = (const Uop *)(uintptr_t)(f.bias + 2 * (u64)(target));                                           \
        delta = f.delta;                                                                                     \
        count = done - position(at);                                                                         \
        CHECK_LIMIT;                                                                                         \
        DISPATCH;                                                                                            \
    } while (0)
// Within the page.
#define GO_NEAR                                                                                              \
    do {                                                                                                     \
        i64 distance = (i32)at->imm >> 2;                                                                    \
        count += 1 - distance;                                                                               \
        at += distance;                                                                                      \
    } while (0)

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
        return atomic_slow<OP>(STATE);
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
    } else if constexpr (OP == OP_SYSTEM) {
        return system_slow(STATE);
    } else if constexpr (OP == OP_DECODE) {
        return decode_slow(STATE);
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
    forget_stale(cpu);
    note_large(cpu, w, h.pc);
    FetchEntry &f = fetch_of(tlb, h.pc);
    f.page = h.pc & PAGE_MASK;
    f.bias = (u64)(uintptr_t)code_page(m, page) - 2 * (u64)f.page;
    f.delta = 0 - (u32)(f.bias >> 1);
    return true;
}

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
