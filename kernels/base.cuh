// Types and qualifiers for both compilers. The machine includes nothing from the host's libraries.
#pragma once

#if defined(__CUDACC__)
#define MACHINE_GPU 1
#define FN __device__ __forceinline__
#define SLOW __device__ __noinline__
#define TABLE __device__ const // made when the kernels are compiled, by a MAKES_TABLE constructor
#define MAKES_TABLE __device__ constexpr
#else
#define MACHINE_GPU 0
#define FN static inline __attribute__((always_inline))
#define SLOW static __attribute__((noinline))
#define TABLE static constexpr
#define MAKES_TABLE constexpr
#endif

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef signed int int32_t;
typedef unsigned long long uintptr_t;
#elif defined(__CUDACC__)
#include <stdint.h>
#else
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINTPTR_TYPE__ uintptr_t;
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int32_t i32;
typedef long long i64;

#include "abi.h"

#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

// Words that host and machine share.
FN u32 shared_load(const u32 *word) {
#if MACHINE_GPU
    u32 value;
    asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
#else
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}
FN void shared_store(u32 *word, u32 value) {
#if MACHINE_GPU
    asm volatile("st.release.sys.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
#else
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}
FN bool compare_and_swap(u64 *word, u64 &expected, u64 desired) {
#if MACHINE_GPU
    u64 seen =
        atomicCAS((unsigned long long *)word, (unsigned long long)expected, (unsigned long long)desired);
    bool done = seen == expected;
    expected = seen;
    return done;
#else
    return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
#endif
}
FN u64 relaxed_load(const u64 *word) {
#if MACHINE_GPU
    return *(const volatile u64 *)word;
#else
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}

// What an operation asks of the engine that runs it. None of them set: go on with the next instruction.
enum Event : u32 {
    EV_NONE = 0,
    EV_JUMP = 1,  // hart.pc is no longer the next instruction
    EV_CHECK = 2, // an interrupt may have become deliverable, or a deadline has moved
    EV_MODE = 4,  // privilege mode or SUM changed: another set of translations applies
    EV_FLUSH = 8, // cached translations are stale: satp, SFENCE.VMA, MXR, a frame moved, code was overwritten
    EV_FLUSH_PAGE = 32, // translations of the page at flush_va are stale; of its 4 MiB if it was a large page
    EV_FLUSH_FRAME = 64, // translations to flush_frame and decoded code of flush_code are stale
    EV_EXIT = 16,        // vm.exit is set: the slice ends after this instruction
};

// One VM as its engine sees it during a slice.
struct Machine {
    Vm *vm;
    Pool *pool;
    Mailbox *mail;
    u32 *table; // frame table
    u8 *frames; // the pool's base
    u32 flush_va;
    u32 flush_frame;
    u32 flush_code; // code page plus one, or 0
    u32 events;     // Event bits that have come up and that the engine has not handled yet
};

// Translations to a frame, and to its code page (plus one, or 0), no longer hold.
FN void forget_frame(Machine &m, u32 frame, u32 code) {
    if (m.events & EV_FLUSH_FRAME) m.events |= EV_FLUSH;
    m.events |= EV_FLUSH_FRAME;
    m.flush_frame = frame, m.flush_code = code;
}

// Frames and code pages are copied and cleared as words of 8 bytes.
FN void copy_words(u64 *to, const u64 *from, u32 words) {
#if MACHINE_GPU
    for (u32 i = 0; i < words; i++) to[i] = from[i];
#else
    __builtin_memcpy(to, from, words * 8);
#endif
}
FN void clear_words(u64 *to, u32 words) {
#if MACHINE_GPU
    for (u32 i = 0; i < words; i++) to[i] = 0;
#else
    __builtin_memset(to, 0, words * 8);
#endif
}

FN u64 guest_ticks(const Hart &hart) { return hart.time_base + (hart.steps >> hart.time_shift); }
