// Guest RAM: a table of frames per VM, copy-on-write, and the code pages that cache decoded instructions.
// Every address here is a guest-physical one and is bounded before use.
#pragma once
#include "base.cuh"
#include "isa.cuh"

#define NO_FRAME 0xFFFFFFFFu

FN u32 *code_of(Machine &m) { return (u32 *)(uintptr_t)m.pool->code_of_ptr; }
FN u32 *code_frame(Machine &m) { return (u32 *)(uintptr_t)m.pool->code_frame_ptr; }

FN u8 *frame_at(Machine &m, u32 frame) { return m.frames + (u64)frame * FRAME_BYTES; }

// Takes a free frame, or NO_FRAME when the pool is exhausted.
SLOW u32 frame_take(Machine &m) {
    Pool *pool = m.pool;
#if defined(MACHINE_WARP) && MACHINE_GPU
    // Frames come back between launches only: tickets from `tail` on find nothing and are all given back. A
    // thousand warps that compare and swap would spend their time in it.
    u64 ticket = atomicAdd((unsigned long long *)&pool->head, 1ull);
    if (ticket < relaxed_load(&pool->tail))
        return *((const volatile u32 *)(uintptr_t)pool->ring_ptr + ticket % pool->capacity);
    atomicAdd((unsigned long long *)&pool->head, ~0ull);
    return NO_FRAME;
#else
    u64 head = relaxed_load(&pool->head);
    for (;;) {
        if (head >= relaxed_load(&pool->tail)) return NO_FRAME;
        // Read before it is taken: afterwards the host may put another frame there.
        u32 frame = shared_load((const u32 *)(uintptr_t)pool->ring_ptr + head % pool->capacity);
        if (compare_and_swap(&pool->head, head, head + 1)) return frame;
    }
#endif
}

// Forgets the decoded instructions of a private frame.
SLOW void code_drop(Machine &m, u32 frame) {
    u32 page = code_of(m)[frame] - 1;
    code_of(m)[frame] = 0;
#ifndef MACHINE_WARP // whose decoded code belongs to all frames with the same words (trace.cuh)
    u32 slot = page - m.vm->number * m.pool->code_pages_per_vm;
    if (slot < m.pool->code_pages_per_vm) m.vm->ram.code_used[slot / 32] &= ~(1u << (slot % 32));
#endif
    forget_frame(m, frame, page + 1);
}

// Gives the guest page a frame of its own, a copy of the shared one. False when the pool is exhausted: the VM
// stops.
SLOW bool frame_own(Machine &m, u32 page) {
    u32 frame = frame_take(m);
    if (frame == NO_FRAME) {
        m.vm->exit = EXIT_NO_FRAME;
        m.events |= EV_EXIT;
        return false;
    }
    u32 old = m.table[page] & FRAME_MASK;
    copy_words((u64 *)frame_at(m, frame), (const u64 *)frame_at(m, old), FRAME_BYTES / 8);
    m.table[page] = frame | FRAME_PRIVATE;
    m.vm->ram.private_frames++;
    forget_frame(m, old, code_of(m)[old]);
    return true;
}

// The byte at a physical address for reading, or null outside RAM. Valid to the end of the page.
FN const u8 *ram_read_at(Machine &m, u32 pa) {
    u32 page = pa / FRAME_BYTES;
    if (page >= m.vm->ram.pages) return 0;
    return frame_at(m, m.table[page] & FRAME_MASK) + pa % FRAME_BYTES;
}

// The byte at a physical address for writing, or null outside RAM or without a frame to be had (EV_EXIT is
// then set).
FN u8 *ram_write_at(Machine &m, u32 pa) {
    u32 page = pa / FRAME_BYTES;
    if (page >= m.vm->ram.pages) return 0;
    u32 entry = m.table[page];
    if (UNLIKELY(!(entry & FRAME_PRIVATE))) {
        if (!frame_own(m, page)) return 0;
        entry = m.table[page];
    }
    u32 frame = entry & FRAME_MASK;
    if (UNLIKELY(code_of(m)[frame] != 0)) code_drop(m, frame);
    return frame_at(m, frame) + pa % FRAME_BYTES;
}

// Naturally aligned words; false outside RAM.
FN bool ram_load(Machine &m, u64 pa, u32 size, u32 &value) {
    const u8 *at = pa >> 32 ? 0 : ram_read_at(m, (u32)pa);
    if (!at) return false;
    value = size == 4 ? *(const u32 *)at : size == 2 ? *(const u16 *)at : *at;
    return true;
}
FN bool ram_store(Machine &m, u64 pa, u32 size, u32 value) {
    u8 *at = pa >> 32 ? 0 : ram_write_at(m, (u32)pa);
    if (!at) return false;
    if (size == 4)
        *(u32 *)at = value;
    else if (size == 2)
        *(u16 *)at = (u16)value;
    else
        *at = (u8)value;
    return true;
}

FN bool ram_has(Machine &m, u64 pa, u64 bytes) {
    u64 size = (u64)m.vm->ram.pages * FRAME_BYTES;
    return bytes <= size && pa <= size - bytes;
}

// Bytes to and from mailboxes. On a GPU those are the host's memory: many words on their way at once, and few
// of less. Guests align frames so that what is behind the Ethernet header is aligned.
#if MACHINE_GPU
#define COPY_AT_ONCE 8u
FN u32 copy_words_out(u8 *to, const u8 *from, u32 bytes) {
    u32 done = 0, words[COPY_AT_ONCE];
    if (((uintptr_t)to & 3) | ((uintptr_t)from & 1)) return 0;
    for (; bytes - done >= 4; done += 4 * COPY_AT_ONCE) {
        u32 count = (bytes - done) / 4;
        const u16 *halves = (const u16 *)(from + done);
#pragma unroll
        for (u32 i = 0; i < COPY_AT_ONCE; i++)
            if (i < count) words[i] = halves[2 * i] | (u32)halves[2 * i + 1] << 16;
#pragma unroll
        for (u32 i = 0; i < COPY_AT_ONCE; i++)
            if (i < count) ((u32 *)(to + done))[i] = words[i];
        if (count < COPY_AT_ONCE) return done + 4 * count;
    }
    return done;
}
FN u32 copy_words_in(u8 *to, const u8 *from, u32 bytes) {
    u32 done = 0, words[COPY_AT_ONCE];
    if (((uintptr_t)from & 3) | ((uintptr_t)to & 1)) return 0;
    for (; bytes - done >= 4; done += 4 * COPY_AT_ONCE) {
        u32 count = (bytes - done) / 4;
        u16 *halves = (u16 *)(to + done);
#pragma unroll
        for (u32 i = 0; i < COPY_AT_ONCE; i++)
            if (i < count) words[i] = ((const u32 *)(from + done))[i];
#pragma unroll
        for (u32 i = 0; i < COPY_AT_ONCE; i++)
            if (i < count) halves[2 * i] = (u16)words[i], halves[2 * i + 1] = (u16)(words[i] >> 16);
        if (count < COPY_AT_ONCE) return done + 4 * count;
    }
    return done;
}
#else
FN u32 copy_words_out(u8 *to, const u8 *from, u32 bytes) { return __builtin_memcpy(to, from, bytes), bytes; }
FN u32 copy_words_in(u8 *to, const u8 *from, u32 bytes) { return __builtin_memcpy(to, from, bytes), bytes; }
#endif

// Copies between guest RAM and device buffers. The range must have been checked with ram_has.
SLOW bool ram_copy_out(Machine &m, u32 pa, u8 *to, u32 bytes) {
    while (bytes) {
        const u8 *from = ram_read_at(m, pa);
        if (!from) return false;
        u32 run = FRAME_BYTES - pa % FRAME_BYTES;
        if (run > bytes) run = bytes;
        for (u32 i = copy_words_out(to, from, run); i < run; i++) to[i] = from[i];
        pa += run, to += run, bytes -= run;
    }
    return true;
}
SLOW bool ram_copy_in(Machine &m, u32 pa, const u8 *from, u32 bytes) {
    while (bytes) {
        u8 *to = ram_write_at(m, pa);
        if (!to) return false;
        u32 run = FRAME_BYTES - pa % FRAME_BYTES;
        if (run > bytes) run = bytes;
        for (u32 i = copy_words_in(to, from, run); i < run; i++) to[i] = from[i];
        pa += run, from += run, bytes -= run;
    }
    return true;
}

// The code page of a frame, made if it has none. A VM's private code pages are a fixed set: the clock hand
// takes the next one when all are in use.
SLOW u32 code_page_for(Machine &m, u32 frame) {
    u32 page = code_of(m)[frame];
    if (page) return page - 1;
    Ram &ram = m.vm->ram;
    u32 slot = ram.code_hand;
    for (u32 i = 0; i < m.pool->code_pages_per_vm; i++) {
        u32 s = (ram.code_hand + i) % m.pool->code_pages_per_vm;
        if (!(ram.code_used[s / 32] >> (s % 32) & 1)) {
            slot = s;
            break;
        }
    }
    ram.code_hand = (slot + 1) % m.pool->code_pages_per_vm;
    page = m.vm->number * m.pool->code_pages_per_vm + slot;
    if (ram.code_used[slot / 32] >> (slot % 32) & 1) code_drop(m, code_frame(m)[page]);
    ram.code_used[slot / 32] |= 1u << (slot % 32);
    code_frame(m)[page] = frame;
    code_of(m)[frame] = page + 1;
    clear_words((u64 *)(uintptr_t)(m.pool->code_ptr + (u64)page * CODE_PAGE_BYTES), CODE_PAGE_BYTES / 8);
    forget_frame(m, frame, 0); // stores to it must no longer bypass code_drop
    return page;
}
