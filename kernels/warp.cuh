// What a warp can do together, for engine W. A GPU does it in hardware; kernels/tests/warp_cpu.cpp does it
// with 32 fibers, so that the engine is tested where there is no GPU.
#pragma once
#include "base.cuh"

#define ALL_LANES 0xFFFFFFFFu

// VMs that share a warp: each has 32 / VMS_PER_WARP lanes.
#ifndef VMS_PER_WARP
#define VMS_PER_WARP 1
#endif
#define VM_LANES (32u / VMS_PER_WARP)
static_assert(VM_LANES * VMS_PER_WARP == 32, "1, 2, 4, 8, 16 or 32 VMs in a warp");
#define VM_LANES_MASK (VM_LANES == 32 ? ALL_LANES : (1u << VM_LANES % 32) - 1)

#define PAGE_OF(va) ((va) & ~(FRAME_BYTES - 1))

// Translations at hand. A tag is virtual page | mode key, or 0 for none; of data also TAG_WRITABLE, if stores
// may go to the frame directly. The host chooses how many: in large fleets shared memory is scarce.
#ifndef DATA_ENTRIES
#define DATA_ENTRIES 128u
#define FETCH_ENTRIES 64u
#endif
#define TAG_WRITABLE 0x10u
#define TAG_OUTSIDE 0x20u // no frame but a page outside RAM, which lanes never find

// Where a trace finds the address of its page, behind the registers.
#define PAGE_SLOT 32u

struct alignas(8) DataEntry {
    u32 tag, frame;
};
struct alignas(8) FetchEntry {
    u32 tag, text;
};
#define HELD_NONE 1u // LR and SC are for words
#define MISS_NONE 0u
#define MISS_LOAD 1u
#define MISS_STORE 2u
#define MISS_FETCH 3u
#define MISS_HOLD 4u // an LR whose page is at hand
// A VM while its slice runs, in shared memory.
#define SAVED_WORDS (DATA_ENTRIES + FETCH_ENTRIES + 1) // of 8 bytes
struct alignas(8) VmSlot {
    DataEntry data[DATA_ENTRIES]; // first, and these together: they are saved as words of 8 bytes
    FetchEntry fetch[FETCH_ENTRIES];
    u32 x[33];            // x0 to x31 and the address of the page
    u32 held_va, held_pa; // of the last LR, or HELD_NONE
    u32 large;            // 4 MiB that have large pages here, see large_mark
    // What the lanes leave their loop for, see warp_serve: the access whose page is not at hand, ...
    u32 miss_va, miss; // MISS_NONE and so on
    // ... and what is to be learned: text and word of the branch or jump; LEARN_TAKEN and so on, its lane and
    // the trace (LEARN_OF); where that started; where the jump led, relative to its page.
    u32 learn_at, learn, learn_start, learn_to;
    Vm *vm;
    Pool *pool;
    Mailbox *mail;
    SliceResult *result;
    u64 *saved;             // translations from slice to slice, or null
    u64 before, end, limit; // steps: at the start of the slice, at its end, at the next deadline
    u32 began, cycles;      // of the clock: at the start of the slice, and how many it may last, 0: any
    SliceRequest request;
    u64 frames, index, traces; // where they are: guest RAM, what starts a trace, and the traces
};

FN u32 read_through(const u32 *word) { return *(const volatile u32 *)word; }
FN u64 read_through(const u64 *word) { return *(const volatile u64 *)word; }

// Where a word of the slot is, for slot_note.
#define SLOT_NOTE(slot, field) ((u32)((uintptr_t)&(slot)->field - (uintptr_t)(slot)))

#if MACHINE_GPU
extern __shared__ VmSlot vm_slots[];
FN VmSlot *warp_slots() { return vm_slots + threadIdx.x / 32 * VMS_PER_WARP; }
FN u32 warp_lane() { return threadIdx.x % 32; }
FN void warp_sync() { __syncwarp(); }
// All lanes are here, and go on together. The compiler can't tell that of code behind a call, and guards all
// that lanes do with each other there. So this has it said by an instruction that a warp executes as one or
// not at all, and that does nothing else (PTX ISA, movmatrix.aligned); a barrier would do, but an SM has few
// of them.
FN void warp_together() {
    __syncwarp();
    u32 nothing;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(nothing) : "r"(0u) : "memory");
}
FN u32 warp_ballot(bool vote) { return __ballot_sync(ALL_LANES, vote); }
FN bool warp_any(bool vote) { return __ballot_sync(ALL_LANES, vote) != 0; }
FN u32 warp_shuffle(u32 value, u32 lane) { return __shfl_sync(ALL_LANES, value, lane); }
FN u64 warp_shuffle(u64 value, u32 lane) { return __shfl_sync(ALL_LANES, value, lane); }
FN u32 group_shuffle(u32 value, u32 lane) { return __shfl_sync(ALL_LANES, value, lane, VM_LANES); }
FN u32 warp_exchange(u32 value, u32 mask) { return __shfl_xor_sync(ALL_LANES, value, mask); }
FN u32 first_of(u32 bits) { return __ffs((int)bits) - 1; } // ~0u for none
FN u32 last_of(u32 bits) { return 31 - __clz((int)bits); } // ~0u for none
FN u32 funnel_right(u32 low, u32 high, u32 by) { return __funnelshift_r(low, high, by); }
FN u32 atomic_add(u32 *word, u32 value) { return atomicAdd(word, value); }
FN u32 atomic_or(u32 *word, u32 bits) { return atomicOr(word, bits); }
FN u32 atomic_and(u32 *word, u32 bits) { return atomicAnd(word, bits); }
FN u32 atomic_swap(u32 *word, u32 value) { return atomicExch(word, value); }
FN u32 atomic_compare_swap(u32 *word, u32 expected, u32 value) { return atomicCAS(word, expected, value); }
FN void publish_fence() { __threadfence(); }
FN void back_off() { __nanosleep(200); }
// All bits as bit 7, 15, 23 or 31 of `bits`: the sign of byte `BYTE`.
template <u32 BYTE> FN u32 byte_sign(u32 bits) {
    u32 mask;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(bits), "n"(0x8888 | BYTE * 0x1111));
    return mask;
}
// Whether `word` has any of `bits`: one instruction, which the compiler's own wisdom would turn into three.
FN bool has(u32 word, u32 bits) {
    u32 both;
    asm("and.b32 %0, %1, %2;" : "=r"(both) : "r"(word), "r"(bits));
    return both != 0;
}
// Byte `BYTE`.
template <u32 BYTE> FN u32 byte_of(u32 word) {
    u32 byte;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(byte) : "r"(word), "n"(0x4440 | BYTE));
    return byte;
}
// Cycles of the multiprocessor.
FN u32 warp_clock() {
    u32 clock;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(clock));
    return clock;
}
// Differs from warp to warp, and takes no register.
FN u32 warp_seed() {
    u32 block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block * 0x61C88647u;
}
// A slot by its address in shared memory, which a register holds.
typedef u32 SlotPlace;
FN SlotPlace slot_place(VmSlot *slot) { return (u32)__cvta_generic_to_shared(slot); }
FN DataEntry cached_data(SlotPlace slot, u32 va) {
    DataEntry entry;
    u32 at = slot + (va >> 9 & (DATA_ENTRIES - 1) * 8);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(entry.tag), "=r"(entry.frame)
                 : "r"(at)
                 : "memory");
    return entry;
}
FN FetchEntry cached_fetch(SlotPlace slot, u32 pc) {
    FetchEntry entry;
    u32 at = slot + (pc >> 9 & (FETCH_ENTRIES - 1) * 8);
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2+%3];"
                 : "=r"(entry.tag), "=r"(entry.text)
                 : "r"(at), "n"(DATA_ENTRIES * 8)
                 : "memory");
    return entry;
}
FN u32 slot_read(SlotPlace slot, u32 number) {
    u32 value, at = slot + number * 4;
    asm volatile("ld.shared.u32 %0, [%1+%2];"
                 : "=r"(value)
                 : "r"(at), "n"((DATA_ENTRIES + FETCH_ENTRIES) * 8)
                 : "memory");
    return value;
}
// The word `offset` bytes behind x0.
FN void slot_write(SlotPlace slot, u32 offset, u32 value) {
    asm volatile("st.shared.u32 [%0+%1], %2;"
                 :
                 : "r"(slot + offset), "n"((DATA_ENTRIES + FETCH_ENTRIES) * 8), "r"(value)
                 : "memory");
}
FN void slot_write_if(bool take, SlotPlace slot, u32 offset, u32 value) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.shared.u32 [%1+%2], %3; }"
                 :
                 : "r"((u32)take), "r"(slot + offset), "n"((DATA_ENTRIES + FETCH_ENTRIES) * 8), "r"(value)
                 : "memory");
}
FN void slot_note(SlotPlace slot, u32 where, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" : : "r"(slot + where), "r"(value) : "memory");
}
FN u32 load_word(u64 address) {
    u32 word;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
    return word;
}
FN u64 load_long(u64 address) {
    u64 word;
    asm volatile("ld.global.u64 %0, [%1];" : "=l"(word) : "l"(address) : "memory");
    return word;
}
// Words for lanes that take part, without a branch; 0 for the others.
FN u32 load_if(bool take, u64 address) {
    u32 word;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; mov.u32 %0, 0; @p ld.global.u32 %0, [%2]; }"
                 : "=&r"(word)
                 : "r"((u32)take), "l"(address)
                 : "memory");
    return word;
}
FN void store_if(bool take, u64 address, u32 value) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u32 [%1], %2; }"
                 :
                 : "r"((u32)take), "l"(address), "r"(value)
                 : "memory");
}
// A word for lanes that take part; the others keep theirs.
FN void load_to(u32 &word, bool take, u64 address) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p ld.global.u32 %0, [%2]; }"
                 : "+r"(word)
                 : "r"((u32)take), "l"(address)
                 : "memory");
}
FN void store_part_if(bool take, u64 address, bool two, u32 value) {
    asm volatile("{ .reg .pred p, q, r; .reg .b16 h; cvt.u16.u32 h, %3; setp.ne.u32 p, %0, 0;"
                 "setp.ne.and.u32 q, %2, 0, p; setp.eq.and.u32 r, %2, 0, p;"
                 "@q st.global.u16 [%1], h; @r st.global.u8 [%1], %3; }"
                 :
                 : "r"((u32)take), "l"(address), "r"((u32)two), "r"(value)
                 : "memory");
}
#else
VmSlot *warp_slots();
u32 warp_lane();
u32 warp_clock();
void warp_sync();
FN void warp_together() { warp_sync(); }
u32 warp_ballot(bool vote);
FN bool warp_any(bool vote) { return warp_ballot(vote); }
u32 warp_shuffle(u32 value, u32 lane);
u64 warp_shuffle(u64 value, u32 lane);
FN u32 group_shuffle(u32 value, u32 lane) {
    return warp_shuffle(value, (warp_lane() & ~(VM_LANES - 1)) | (lane & (VM_LANES - 1)));
}
u32 warp_exchange(u32 value, u32 mask);
FN u32 first_of(u32 bits) { return bits ? (u32)__builtin_ctz(bits) : ~0u; }
FN u32 last_of(u32 bits) { return bits ? 31u - (u32)__builtin_clz(bits) : ~0u; }
FN u32 funnel_right(u32 low, u32 high, u32 by) { return (u32)(((u64)high << 32 | low) >> (by & 31)); }
FN u32 atomic_add(u32 *word, u32 value) { return __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST); }
FN u32 atomic_or(u32 *word, u32 bits) { return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST); }
FN u32 atomic_and(u32 *word, u32 bits) { return __atomic_fetch_and(word, bits, __ATOMIC_SEQ_CST); }
FN u32 atomic_swap(u32 *word, u32 value) { return __atomic_exchange_n(word, value, __ATOMIC_SEQ_CST); }
FN u32 atomic_compare_swap(u32 *word, u32 expected, u32 value) {
    __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
FN void publish_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
FN void back_off() {}
template <u32 BYTE> FN u32 byte_sign(u32 bits) { return bits >> (8 * BYTE + 7) & 1 ? ~0u : 0; }
FN bool has(u32 word, u32 bits) { return word & bits; }
template <u32 BYTE> FN u32 byte_of(u32 word) { return word >> 8 * BYTE & 0xff; }
FN u32 warp_seed() { return 0; }
typedef VmSlot *SlotPlace;
FN SlotPlace slot_place(VmSlot *slot) { return slot; }
FN DataEntry cached_data(SlotPlace slot, u32 va) { return slot->data[va / FRAME_BYTES % DATA_ENTRIES]; }
FN FetchEntry cached_fetch(SlotPlace slot, u32 pc) { return slot->fetch[pc / FRAME_BYTES % FETCH_ENTRIES]; }
FN u32 slot_read(SlotPlace slot, u32 number) { return *(volatile u32 *)&slot->x[number]; }
FN void slot_write(SlotPlace slot, u32 offset, u32 value) { *(volatile u32 *)&slot->x[offset / 4] = value; }
FN void slot_write_if(bool take, SlotPlace slot, u32 offset, u32 value) {
    if (take) slot->x[offset / 4] = value;
}
FN void slot_note(SlotPlace slot, u32 where, u32 value) { ((volatile u32 *)slot)[where / 4] = value; }
FN u32 load_word(u64 address) { return *(const volatile u32 *)(uintptr_t)address; }
FN u64 load_long(u64 address) { return *(const volatile u64 *)(uintptr_t)address; }
FN u32 load_if(bool take, u64 address) { return take ? load_word(address) : 0; }
FN void store_if(bool take, u64 address, u32 value) {
    if (take) *(volatile u32 *)(uintptr_t)address = value;
}
FN void load_to(u32 &word, bool take, u64 address) {
    if (take) word = load_word(address);
}
FN void store_part_if(bool take, u64 address, bool two, u32 value) {
    if (!take) return;
    if (two)
        *(volatile u16 *)(uintptr_t)address = (u16)value;
    else
        *(volatile u8 *)(uintptr_t)address = (u8)value;
}
#endif

// The byte, or two bytes, at `va` of the word that they are in.
FN u32 part_of(u32 word, u32 va, bool two, bool is_signed) {
    u32 unused = two ? 16 : 24, top = word << (unused - (va & 3) * 8);
    return is_signed ? (u32)((i32)top >> unused) : top >> unused;
}

FN u32 warp_max(u32 value) {
#if MACHINE_GPU && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(ALL_LANES, value);
#else
    for (u32 mask = 16; mask; mask /= 2) {
        u32 other = warp_exchange(value, mask);
        if (other > value) value = other;
    }
    return value;
#endif
}
// On a GPU its result is in a uniform register: branches on it cost no care for lanes that go another way.
FN u32 warp_or(u32 value) {
#if MACHINE_GPU && __CUDA_ARCH__ >= 800
    return __reduce_or_sync(ALL_LANES, value);
#else
    for (u32 mask = 16; mask; mask /= 2) value |= warp_exchange(value, mask);
    return value;
#endif
}
// The slot of a warp with one VM, which all its lanes know.
FN SlotPlace slot_place_of_warp(VmSlot *slot) {
#if MACHINE_GPU
    return warp_or(slot_place(slot));
#else
    return slot_place(slot);
#endif
}
FN u32 warp_sum(u32 value) {
    for (u32 mask = 16; mask; mask /= 2) value += warp_exchange(value, mask);
    return value;
}
// The votes of the lanes that belong to this lane's VM.
FN u32 group_ballot(bool vote) {
    u32 votes = warp_ballot(vote);
    return VM_LANES == 32 ? votes : votes >> (warp_lane() & ~(VM_LANES - 1)) & VM_LANES_MASK;
}
