// Engine W on the CPU: the 32 lanes of a warp are fibers, and each thing that a warp does together is a point
// where they meet. All tests of the machine can so be run on the GPU's engine, without a GPU.
#define MACHINE_WARP 1
#include "engine_w.cuh"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" void *malloc(unsigned long);
extern "C" void *calloc(unsigned long, unsigned long);
extern "C" void *memset(void *, int, unsigned long);
extern "C" void *aligned_alloc(unsigned long, unsigned long);
extern "C" int mprotect(void *, unsigned long, int);
extern "C" void abort();

namespace {
constexpr u32 LANES = 32, STACK = 64 << 10;

struct Meeting {
    u32 what; // what the lanes do here: they must all do the same
    u64 values[LANES];
};

struct Warp {
    Meeting meetings[2];
    u32 turn[LANES]; // meetings that each lane has come to
    u32 lane;
    u32 finished;
    VmSlot slots[VMS_PER_WARP]; // the first one has a VM
    // fibers
#if defined(__x86_64__)
    void *stacks[LANES + 1];
#else
    ucontext_t contexts[LANES + 1];
#endif
    u8 *memory;
};
thread_local Warp *warp;

enum What : u32 { SYNC = 1, BALLOT, SHUFFLE, SHUFFLE_WIDE, EXCHANGE };

#if defined(__x86_64__)
// build.rs renames what the two builds of this file would both define.
#define NAME_OF(name) #name
#define NAME(name) NAME_OF(name)
// Saves what a call has to keep (System V AMD64 ABI 3.2.1) and goes on with another stack.
extern "C" void machine_switch_stack(void **from, void *to);
__asm__(".text\n"
        ".p2align 4\n"
        ".hidden " NAME(machine_switch_stack) "\n"
                                              ".globl " NAME(machine_switch_stack) "\n" NAME(
                                                  machine_switch_stack) ":\n"
                                                                        "push %rbp\n push %rbx\n push %r12\n "
                                                                        "push %r13\n push %r14\n push %r15\n"
                                                                        "mov %rsp, (%rdi)\n"
                                                                        "mov %rsi, %rsp\n"
                                                                        "pop %r15\n pop %r14\n pop %r13\n "
                                                                        "pop %r12\n pop %rbx\n pop %rbp\n"
                                                                        "ret\n");
#endif

void go_to(u32 lane) {
    u32 from = warp->lane;
    warp->lane = lane;
#if defined(__x86_64__)
    machine_switch_stack(&warp->stacks[from], warp->stacks[lane]);
#else
    swapcontext(&warp->contexts[from], &warp->contexts[lane]);
#endif
}

// Waits until all lanes have come here; two meetings in turn, since the first to leave may be at the next one
// before the last has left this one.
const Meeting &meet(u32 what, u64 value) {
    Warp *w = warp;
    u32 lane = w->lane;
    Meeting &meeting = w->meetings[w->turn[lane]++ & 1];
    if (lane == 0) meeting.what = what;
    if (meeting.what != what || w->finished) abort(); // the lanes have gone different ways
    meeting.values[lane] = value;
    go_to((lane + 1) % LANES);
    return meeting;
}

void lane_main() {
    warp_slices(warp->slots, LESSONS_OFTEN);
    warp->finished++;
    go_to(warp->lane + 1); // after the last lane: back to the caller
    abort();
}
} // namespace

VmSlot *warp_slots() { return warp->slots; }
u32 warp_lane() { return warp->lane; }
// Time is how often somebody asks for it.
u32 warp_clock() {
    static thread_local u32 clock;
    return clock++;
}
void warp_sync() { meet(SYNC, 0); }
u32 warp_ballot(bool vote) {
    const Meeting &meeting = meet(BALLOT, vote);
    u32 bits = 0;
    for (u32 i = 0; i < LANES; i++) bits |= (u32)meeting.values[i] << i;
    return bits;
}
u32 warp_shuffle(u32 value, u32 lane) { return (u32)meet(SHUFFLE, value).values[lane % LANES]; }
u64 warp_shuffle(u64 value, u32 lane) { return meet(SHUFFLE_WIDE, value).values[lane % LANES]; }
u32 warp_exchange(u32 value, u32 mask) { return (u32)meet(EXCHANGE, value).values[warp->lane ^ mask]; }

// VMs of a pool, at most.
static const u32 VMS_MOST = 1024;

// Forgets all texts and traces.
static void forget_code(Pool *pool) {
    pool->text_count = pool->trace_count = CODE_FIRST, pool->code_epoch++;
    memset((void *)(uintptr_t)pool->text_table_ptr, 0, pool->text_slots * 4);
    memset((void *)(uintptr_t)pool->code_of_ptr, 0, (u64)(pool->shared_frames + pool->capacity) * 4);
}

// Memory whose first `frozen` bytes read as zeroes, and end the program when something is written there: on a
// GPU caches would go on saying what text 0 and trace 0 said when a lane without any read them.
static u64 frozen(u64 bytes, u64 frozen) {
    const u64 page = 4096, head = (frozen + page - 1) / page * page;
    u8 *at = (u8 *)aligned_alloc(page, head + (bytes + page - 1) / page * page);
    if (!at) abort();
    memset(at, 0, head);
    if (mprotect(at, head, 1 /* PROT_READ */)) abort();
    return (u64)(uintptr_t)(at + head - frozen);
}

// What a fleet shares: texts and traces, few, so that tests that make many fill it; and what each VM keeps
// from slice to slice. Made for a pool when it is first seen.
static void code_memory(Pool *pool) {
    const u32 texts = 1024, slots = 4096, traces = 1 << 16;
    pool->text_capacity = texts, pool->text_slots = slots, pool->trace_capacity = traces;
    pool->text_ptr = frozen((u64)texts * sizeof(Text), TEXT_BYTES);
    pool->text_table_ptr = (u64)(uintptr_t)malloc(slots * 4);
    pool->trace_ptr = frozen((u64)traces * VM_LANES * sizeof(TraceLane), VM_LANES * sizeof(TraceLane));
    pool->saved_ptr = (u64)(uintptr_t)calloc((u64)VMS_MOST * SAVED_WORDS, 8);
    forget_code(pool); // the threaded engine's code pages mean nothing here
}

static u64 *saved_of(const Pool *pool, u32 vm) {
    if (vm >= VMS_MOST) abort();
    return (u64 *)(uintptr_t)pool->saved_ptr + (u64)vm * SAVED_WORDS;
}

// What the VM has kept no longer holds: it was reset, or its RAM or satp was changed from outside.
extern "C" void machine_warp_forget(const Pool *pool, u32 vm) {
    if (pool->saved_ptr) saved_of(pool, vm)[SAVED_WORDS - 1] = 0;
}

// When each VM last had its share of texts and traces.
static thread_local u32 epochs[VMS_MOST];

// For how long slices may last.
static thread_local u32 warp_cycles;
extern "C" void machine_warp_cycles(u32 cycles) { warp_cycles = cycles; }

// A slice of each of these VMs, VMS_PER_WARP of them at most: at once, and all with the same request.
extern "C" void machine_warp_share(u32 count, Vm *const *vms, Pool *pool, Mailbox *const *mails,
                                   const SliceRequest *request, SliceResult *results) {
    if (count == 0 || count > VMS_PER_WARP) abort();
    if (!warp) {
        warp = (Warp *)malloc(sizeof(Warp));
        memset((void *)warp, 0, sizeof(Warp));
        warp->memory = (u8 *)malloc(LANES * STACK);
    }
    if (!pool->text_ptr) code_memory(pool);
    Warp *w = warp;
    for (u32 i = 0; i < VMS_PER_WARP; i++) {
        u32 of = i < count ? i : 0;
        // Tests go on with traces, however many they have made before all were forgotten.
        u32 number = vms[of]->number;
        if (epochs[number % VMS_MOST] != pool->code_epoch) {
            epochs[number % VMS_MOST] = pool->code_epoch;
            vms[of]->ram.texts_made = vms[of]->ram.traces_made = 0;
        }
        slot_open(&w->slots[i], i < count ? vms[i] : 0, pool, mails[of], saved_of(pool, vms[of]->number),
                  *request, &results[of], warp_cycles);
    }
    w->finished = 0;
    for (u32 lane = 0; lane < LANES; lane++) {
        w->turn[lane] = 0;
        u8 *top = w->memory + (u64)(lane + 1) * STACK;
#if defined(__x86_64__)
        u64 *stack = (u64 *)top;
        *--stack = 0; // keeps the stack aligned as after a call
        *--stack = (u64)(uintptr_t)lane_main;
        for (u32 i = 0; i < 6; i++) *--stack = 0;
        w->stacks[lane] = stack;
#else
        getcontext(&w->contexts[lane]);
        w->contexts[lane].uc_stack.ss_sp = top - STACK;
        w->contexts[lane].uc_stack.ss_size = STACK;
        w->contexts[lane].uc_link = 0;
        makecontext(&w->contexts[lane], lane_main, 0);
#endif
    }
    w->lane = LANES;
    go_to(0);
    bool full = false;
    for (u32 i = 0; i < count; i++) full |= results[i].code_full != 0;
    if (full) forget_code(pool);
}

extern "C" void machine_warp_run(void *, Vm *vm, Pool *pool, Mailbox *mail, const SliceRequest *request,
                                 SliceResult *result) {
    machine_warp_share(1, &vm, pool, &mail, request, result);
}
