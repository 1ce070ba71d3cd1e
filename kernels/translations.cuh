// Translations at hand: those of loads and stores and those of fetches, in shared memory (VmSlot), tagged by
// mode; and how they outlive a slice.
#pragma once
#include "memory.cuh"
#include "warp.cuh"

// Translations differ by mode, and in S mode by SUM.
#define MODE_U_KEY 4u
#define MODE_S_KEY 8u
#define MODE_S_SUM_KEY 12u
FN u32 mode_key(const Hart &h) {
    return h.mode == MODE_U ? MODE_U_KEY : h.sstatus & SSTATUS_SUM ? MODE_S_SUM_KEY : MODE_S_KEY;
}

// Which 4 MiB have large pages among the translations at hand: a bit for many of them.
FN u32 large_mark(u32 va) { return 1u << ((va >> 22 ^ va >> 27) & 31); }
FN void forget_all(VmSlot *slot) {
    if (warp_lane() == 0) slot->large = 0;
    for (u32 i = warp_lane(); i < DATA_ENTRIES; i += 32) slot->data[i].tag = 0;
    for (u32 i = warp_lane(); i < FETCH_ENTRIES; i += 32) slot->fetch[i].tag = 0;
    warp_sync();
}
FN void forget_data_of(VmSlot *slot, u32 frame) {
    for (u32 i = warp_lane(); i < DATA_ENTRIES; i += 32)
        if (slot->data[i].frame == frame) slot->data[i].tag = 0;
}
// The translations of a page that is part of no large one; lane 0.
FN void forget_page(VmSlot *slot, u32 va) {
    DataEntry &data = slot->data[va / FRAME_BYTES % DATA_ENTRIES];
    FetchEntry &fetch = slot->fetch[va / FRAME_BYTES % FETCH_ENTRIES];
    if (PAGE_OF(data.tag) == PAGE_OF(va)) data.tag = 0;
    if (PAGE_OF(fetch.tag) == PAGE_OF(va)) fetch.tag = 0;
    slot->held_va = HELD_NONE;
}
// Forgets what the events of lane 0 say; what is left of them. All lanes.
FN u32 forget(VmSlot *slot, const Machine &m) {
    u32 events = warp_shuffle(m.events, 0);
    if (!(events & (EV_FLUSH | EV_FLUSH_PAGE | EV_FLUSH_FRAME))) return events;
    u32 lane = warp_lane();
    if (lane == 0) slot->held_va = HELD_NONE;
    if (events & EV_FLUSH) {
        forget_all(slot);
    } else {
        if (events & EV_FLUSH_PAGE) {
            u32 va = warp_shuffle(m.flush_va, 0);
            if (slot->large & large_mark(va)) { // any part may be at hand: all that is in its 4 MiB
                for (u32 i = lane; i < DATA_ENTRIES; i += 32)
                    if (slot->data[i].tag >> 22 == va >> 22) slot->data[i].tag = 0;
                for (u32 i = lane; i < FETCH_ENTRIES; i += 32)
                    if (slot->fetch[i].tag >> 22 == va >> 22) slot->fetch[i].tag = 0;
            } else if (lane == 0) {
                forget_page(slot, va);
            }
            warp_sync();
        }
        if (events & EV_FLUSH_FRAME) {
            forget_data_of(slot, warp_shuffle(m.flush_frame, 0));
            u32 text = warp_shuffle(m.flush_code, 0) - 1;
            for (u32 i = lane; i < FETCH_ENTRIES; i += 32)
                if (slot->fetch[i].text == text) slot->fetch[i].tag = 0;
        }
        warp_sync();
    }
    return events & ~(EV_FLUSH | EV_FLUSH_PAGE | EV_FLUSH_FRAME);
}

// Translations outlive a slice, unless all texts have been forgotten since. The last word says in its halves
// for which epoch they hold (0: for none), and slot.large.
FN u32 saved_epoch(const VmSlot *slot) { return slot->pool->code_epoch + 1; }
FN void translations_save(VmSlot *slot) {
    if (!slot->saved) return;
    const u64 *words = (const u64 *)slot;
    for (u32 i = warp_lane(); i < SAVED_WORDS - 1; i += 32) slot->saved[i] = words[i];
    if (warp_lane() == 0) slot->saved[SAVED_WORDS - 1] = saved_epoch(slot) | (u64)slot->large << 32;
    warp_sync();
}
FN void translations_load(VmSlot *slot) {
    const u64 *saved = slot->saved;
    u64 last = saved ? saved[SAVED_WORDS - 1] : 0;
    if ((u32)last != saved_epoch(slot)) return forget_all(slot);
    constexpr u32 AT_ONCE = SAVED_WORDS > 384   ? 12
                            : SAVED_WORDS > 192 ? 6
                                                : 3; // on their way before the first is waited for
    static_assert((SAVED_WORDS - 1) % (32 * AT_ONCE) == 0, "all lanes load as many");
    u64 *words = (u64 *)slot;
    for (u32 i = warp_lane(); i < SAVED_WORDS - 1; i += 32 * AT_ONCE) {
        u64 some[AT_ONCE];
        for (u32 j = 0; j < AT_ONCE; j++) some[j] = saved[i + 32 * j];
        for (u32 j = 0; j < AT_ONCE; j++) words[i + 32 * j] = some[j];
    }
    if (warp_lane() == 0) slot->large = (u32)(last >> 32);
    warp_sync();
}
