// The CPU engine's cached translations, and how they are forgotten.
#pragma once
#include "system.cuh"
#include "cpu_uops.h"

struct NativeCode;

namespace {

struct TlbEntry {
    u32 read, write; // virtual page, or INVALID
    u64 addend;      // host address minus virtual address
};
struct FetchEntry {
    u32 page;  // virtual page, or INVALID
    u32 delta; // pc = (u32)(micro-op's address >> 1) + delta
    u64 bias;  // the micro-op of address a is at bias + 2 * a
};

#define TLB_ENTRIES 256u
#define FETCH_ENTRIES 256u
#define HEAT_ENTRIES 4096u
#define INVALID 0x800u // differs from every tag: a tag has only bits of page number and misalignment
#define PAGE_MASK 0xfffff000u

// Cached translations of one mode: user, supervisor, supervisor with SUM.
struct Tlb {
    TlbEntry data[TLB_ENTRIES];
    FetchEntry fetch[FETCH_ENTRIES];
    u32 physical[TLB_ENTRIES]; // of `data`: physical page
    u8 heat[HEAT_ENTRIES];     // counts jumps to micro-ops up to 256
};

// Frames by number modulo 1,024: may one of them be in an entry? Most frames that are forgotten are in none.
struct FrameSet {
    u64 bits[16];
    void add(u32 frame) { bits[frame / 64 % 16] |= 1ull << frame % 64; }
    bool may_have(u32 frame) const { return bits[frame / 64 % 16] >> frame % 64 & 1; }
};

struct Cpu {
    Tlb tlb[3];
    FrameSet data_frames, fetch_frames;
    Machine machine;
    NativeCode *native; // or null
    u64 entries_base, native_run;
    u64 limit; // steps at which the run ends
    // Range of addresses translated through 4 MiB pages since the last flush: one of them may sit in many
    // entries.
    u32 large_first, large_last;
};

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
inline u32 &physical_of(Tlb *tlb, u32 va) { return tlb->physical[va / FRAME_BYTES % TLB_ENTRIES]; }

inline bool in_large(const Cpu *cpu, u32 va) { return va >= cpu->large_first && va <= cpu->large_last; }
inline void note_large(Cpu *cpu, const Walk &w, u32 va) {
    if (!w.is_leaf_large) return;
    u32 first = va & ~0x3fffffu, last = va | 0x3fffffu;
    if (first < cpu->large_first) cpu->large_first = first;
    if (last > cpu->large_last) cpu->large_last = last;
}

inline const Uop *code_page(const Machine &m, u32 page) {
    return (const Uop *)(uintptr_t)(m.pool->code_ptr + (u64)page * CODE_PAGE_BYTES);
}

// Caches a translation of `va` to RAM at `host`.
inline void fill_data(Cpu *cpu, Tlb *tlb, const Walk &w, u32 va, const u8 *host, bool writable) {
    note_large(cpu, w, va);
    cpu->data_frames.add((u32)((u64)(host - cpu->machine.frames) / FRAME_BYTES));
    entry_of(tlb, va) = {va & PAGE_MASK, writable ? va & PAGE_MASK : INVALID, (u64)(uintptr_t)host - va};
    physical_of(tlb, va) = (u32)w.pa & PAGE_MASK;
}

void flush(Cpu *cpu) {
    for (Tlb &tlb : cpu->tlb) {
        for (TlbEntry &e : tlb.data) e = {INVALID, INVALID, 0};
        for (FetchEntry &f : tlb.fetch) f = {INVALID, 0, 0};
    }
    cpu->data_frames = cpu->fetch_frames = {};
    cpu->large_first = ~0u, cpu->large_last = 0;
}

void flush_page(Cpu *cpu, u32 va) {
    if (in_large(cpu, va)) return flush(cpu);
    for (Tlb &tlb : cpu->tlb) {
        TlbEntry &e = entry_of(&tlb, va);
        if (((e.read ^ va) & PAGE_MASK) == 0 || ((e.write ^ va) & PAGE_MASK) == 0) e = {INVALID, INVALID, 0};
        FetchEntry &f = fetch_of(&tlb, va);
        if (((f.page ^ va) & PAGE_MASK) == 0) f = {INVALID, 0, 0};
    }
}

void flush_frame(Cpu *cpu) {
    const Machine &m = cpu->machine;
    if (cpu->data_frames.may_have(m.flush_frame)) {
        u64 host = (u64)(uintptr_t)m.frames + (u64)m.flush_frame * FRAME_BYTES;
        for (Tlb &tlb : cpu->tlb)
            for (TlbEntry &e : tlb.data)
                if (e.addend + (e.read & PAGE_MASK) == host) e = {INVALID, INVALID, 0};
    }
    if (m.flush_code && cpu->fetch_frames.may_have(m.flush_frame)) {
        u64 ops = (u64)(uintptr_t)code_page(m, m.flush_code - 1);
        for (Tlb &tlb : cpu->tlb)
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

// Whether what has come up leaves the code that runs at `pc` as it is, so that forgetting is enough.
inline bool code_stands(const Cpu *cpu, u32 pc) {
    const Machine &m = cpu->machine;
    if (m.events & ~(EV_FLUSH_PAGE | EV_FLUSH_FRAME)) return false;
    if ((m.events & EV_FLUSH_PAGE) && (in_large(cpu, m.flush_va) || !((m.flush_va ^ pc) & PAGE_MASK)))
        return false;
    return !((m.events & EV_FLUSH_FRAME) && m.flush_code && cpu->fetch_frames.may_have(m.flush_frame));
}

} // namespace
