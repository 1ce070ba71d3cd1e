// What the lanes of a VM leave their loop for (engine_w.cuh): instructions that are not for lanes, pages that
// are not at hand, traces that are to be made, interrupts and the ends of a slice. All lanes of the warp take
// part; whatever is rare runs in lane 0 on the state in memory (step.cuh).
#pragma once
#include "brief.cuh"
#include "step.cuh"
#include "trace.cuh"
#include "translations.cuh"

FN Machine machine_at(const VmSlot *slot) {
    Machine m;
    m.vm = slot->vm, m.pool = slot->pool, m.mail = slot->mail;
    m.table = (u32 *)(uintptr_t)m.vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)m.pool->base_ptr;
    m.events = 0, m.flush_va = 0, m.flush_frame = 0, m.flush_code = 0;
    return m;
}

// Registers, between the lanes' loop and what runs on the state in memory.
FN void warp_save(VmSlot *slot) {
    slot->vm->hart.x[warp_lane()] = read_through(&slot->x[warp_lane()]);
    warp_sync();
}
FN void warp_load(VmSlot *slot) {
    u32 lane = warp_lane();
    slot->x[lane] = lane == 0 ? 0 : read_through(&slot->vm->hart.x[lane]);
    warp_sync();
}

// One instruction through memory, by lane 0.
SLOW u32 warp_step(VmSlot *slot, u32 insn) {
    Machine m = machine_at(slot);
    warp_save(slot);
    if (warp_lane() == 0) step(m, decode(insn, slot->vm->hart.pc % FRAME_BYTES));
    warp_sync();
    warp_load(slot);
    return forget(slot, m);
}

// A load or store outside RAM whose translation is at hand.
SLOW u32 warp_device(VmSlot *slot, u32 insn, u32 va) {
    Machine m = machine_at(slot);
    u32 page = read_through(&slot->data[va / FRAME_BYTES % DATA_ENTRIES].frame);
    warp_sync();
    if (warp_lane() == 0)
        step_device(m, decode(insn, 0), va, (u64)page * FRAME_BYTES + va % FRAME_BYTES, slot->x);
    warp_sync();
    return forget(slot, m);
}

// Gives the guest page a frame of its own; the whole warp copies. False: there is none, and nothing has
// changed.
SLOW bool warp_own(VmSlot *slot, u32 page, u32 old) {
    Machine m = machine_at(slot);
    u32 lane = warp_lane(), frame = NO_FRAME;
    if (lane == 0) frame = frame_take(m);
    frame = warp_shuffle(frame, 0);
    if (frame == NO_FRAME) return false;
    struct alignas(16) Piece {
        u64 low, high;
    };
    const Piece *from = (const Piece *)frame_at(m, old);
    Piece *to = (Piece *)frame_at(m, frame), pieces[8];
    for (u32 i = 0; i < 8; i++) pieces[i] = from[lane + 32 * i];
    for (u32 i = 0; i < 8; i++) to[lane + 32 * i] = pieces[i];
    if (lane == 0) {
        m.table[page] = frame | FRAME_PRIVATE;
        m.vm->ram.private_frames++;
        forget_frame(m, old, code_of(m)[old]);
    }
    warp_sync();
    forget(slot, m);
    return true;
}

// Translates for a load or store, and notes it in the cache. False: leave it to warp_step.
SLOW bool warp_fill(VmSlot *slot, u32 va, bool store) {
    Machine m = machine_at(slot);
    u32 lane = warp_lane(), page = NO_FRAME, dirty = 0;
    if (lane == 0) {
        Walk walk = translate(m, va, store ? ACCESS_STORE : ACCESS_LOAD);
        if (!walk.cause && !(walk.pa >> 32) && walk.pa / FRAME_BYTES < m.vm->ram.pages)
            page = (u32)walk.pa / FRAME_BYTES, dirty = store || walk.is_dirty;
        if (walk.is_leaf_large) slot->large |= large_mark(va);
    }
    warp_sync();
    forget(slot, m); // a page table may have moved
    page = warp_shuffle(page, 0), dirty = warp_shuffle(dirty, 0);
    if (page == NO_FRAME) return false;
    u32 entry = warp_shuffle(read_through(&m.table[page]), 0);
    if (store && !(entry & FRAME_PRIVATE)) {
        if (!warp_own(slot, page, entry & FRAME_MASK)) return false;
        entry = warp_shuffle(read_through(&m.table[page]), 0);
    }
    u32 frame = entry & FRAME_MASK;
    bool direct = dirty && (entry & FRAME_PRIVATE) && !warp_shuffle(read_through(&code_of(m)[frame]), 0);
    if (store && !direct) return false;
    DataEntry &entry_there = slot->data[va / FRAME_BYTES % DATA_ENTRIES];
    if (lane == 0) {
        entry_there.tag = PAGE_OF(va) | mode_key(m.vm->hart) | (direct ? TAG_WRITABLE : 0);
        entry_there.frame = frame;
    }
    warp_sync();
    return true;
}

// Notes the text of pc. False: there is none, and the events say what has happened: an exception came up, and
// hart.pc leads on; or there is no room for another text, and one instruction has been executed without.
struct WarpFetch {
    u32 found, events;
};
SLOW WarpFetch warp_fetch(VmSlot *slot, u32 pc) {
    Machine m = machine_at(slot);
    Hart &h = m.vm->hart;
    u32 frame = NO_FRAME;
    WarpFetch out;
    if (warp_lane() == 0) {
        Walk walk = translate(m, pc, ACCESS_FETCH);
        if (!walk.cause && ((walk.pa >> 32) || walk.pa / FRAME_BYTES >= m.vm->ram.pages))
            walk.cause = CAUSE_FETCH_ACCESS;
        if (walk.cause) {
            memory_fault(m, walk.cause, pc);
            h.steps++;
            m.events |= EV_CHECK;
        } else {
            frame = m.table[walk.pa / FRAME_BYTES] & FRAME_MASK;
            if (walk.is_leaf_large) slot->large |= large_mark(pc);
        }
    }
    warp_sync();
    out.events = forget(slot, m), out.found = 0;
    frame = warp_shuffle(frame, 0);
    if (frame == NO_FRAME) return out;
    u32 known = warp_shuffle(read_through(&code_of(m)[frame]), 0);
    u32 text = known ? known - 1 : text_find(m.pool, m.vm, frame);
    if (text == NO_TEXT) {
        const u32 *words = (const u32 *)frame_at(m, frame);
        out.events |= warp_step(slot, words[pc / 4 % TEXT_WORDS]) | EV_CHECK;
        return out;
    }
    if (!known) forget_data_of(slot, frame); // from now on stores to it must not go there directly
    FetchEntry &entry = slot->fetch[pc / FRAME_BYTES % FETCH_ENTRIES];
    warp_sync();
    if (warp_lane() == 0) entry.tag = PAGE_OF(pc) | mode_key(h), entry.text = text;
    warp_sync();
    out.found = 1;
    return out;
}

// What is to be learned: which way a branch goes, 0 on and 1 to its target; that a page that was not at hand
// when the trace was made has been come to; where a JALR leads.
#define LEARN_TAKEN 1u
#define LEARN_PAGE 2u
#define LEARN_TARGET 3u
// VmSlot::learn; the trace's number has 25 bits, see plan.rs.
#define LEARN_OF(kind, lane, trace) ((kind) | (lane) << 2 | (trace) << 7)

// A trace is left more often than not by a branch or a JALR, or was left at a page that was not at hand when
// it was made: it is to be made again, going another way.
SLOW void warp_learn(VmSlot *slot, const LaneState &s, u32 chance) {
    u32 at = read_through(&slot->learn_at), what = read_through(&slot->learn);
    u32 start = read_through(&slot->learn_start), to = read_through(&slot->learn_to), kind = what & 3;
    u32 old = (what >> 7) + 1, again = 0; // what the index said, and may no longer say
    FetchEntry fetch = slot->fetch[start / FRAME_BYTES % FETCH_ENTRIES];
    FetchEntry there = slot->fetch[s.pc / FRAME_BYTES % FETCH_ENTRIES];
    bool branch = kind < LEARN_PAGE, at_hand = there.tag == (PAGE_OF(s.pc) | s.mode);
    if (fetch.tag != (PAGE_OF(start) | s.mode) || !(branch || at_hand)) return;
    Text *from = text_at(slot->pool, fetch.text);
    u32 first = start / 4 % TEXT_WORDS;
    if (warp_lane() == 0) {
        Text *text = text_at(slot->pool, at / TEXT_WORDS);
        volatile u8 *remade = &from->remade[first];
        u32 often = *remade, seldom = often > REMADE_FREE ? often - REMADE_FREE : 0;
        // A target of 0 stands for one that is not known. Many VMs come here at the same time, and one of
        // them is enough.
        if (!(chance & ((1u << seldom) - 1)) && !(kind == LEARN_TARGET && to == 0) &&
            read_through(&from->index[first]) == old)
            again = text_claim(from, first);
        if (again) {
            if (often < REMADE_MOST) *remade = (u8)(often + 1);
            if (branch) hint_set(text, at % TEXT_WORDS, kind == LEARN_TAKEN);
            if (kind == LEARN_TARGET) *(volatile u32 *)&text->targets[at % TEXT_WORDS] = to;
        }
    }
    if (!warp_shuffle(again, 0)) return;
    TraceBefore before = {old, 32, false, to};
    if (kind != LEARN_PAGE) before.lanes = (what >> 2 & 31) + 1, before.turns = true;
    trace_make(slot, fetch.text, start, s.mode, before);
    if (warp_lane() == 0) text_release(from, first);
}

// So much of a frame is fetched ahead: most requests.
#define FRAME_AHEAD 256u

// As rings_open, by all lanes at once: the host's memory is a microsecond away. What lane 0 looks at next is
// on its way to the L1 cache then: the VM's state, and the next frame.
FN void warp_open(VmSlot *slot) {
    constexpr u32 SECTOR = 32;
    u32 lane = warp_lane();
    u32 *own = (u32 *)&slot->vm->rings;
    const u32 *there = (const u32 *)&slot->mail->rings;
    if (lane < sizeof(Rings) / 4) own[lane] = shared_load(there + lane);
    warp_sync();
    static_assert(sizeof(Vm) <= 32 * SECTOR, "a lane for each sector");
    if (lane < sizeof(Vm) / SECTOR) load_word((u64)(uintptr_t)slot->vm + lane * SECTOR);
    u32 head = read_through(&slot->vm->rings.rx_head), tail = read_through(&slot->vm->rings.rx_tail);
    if (head != tail && lane < FRAME_AHEAD / SECTOR)
        load_word((u64)(uintptr_t)&slot->mail->rx[tail % NET_SLOTS] + lane * SECTOR);
}

SLOW u32 warp_begin(VmSlot *slot) {
    Machine m = machine_at(slot);
    warp_open(slot);
    translations_load(slot);
    if (warp_lane() == 0) slice_open(m, slot->request);
    warp_sync();
    u32 events = forget(slot, m); // packets may have come to pages at hand
    warp_load(slot);
    return events & (EV_CHECK | EV_EXIT);
}

// Interrupts, idling and the next deadline. False: the slice is over, as it is in any case if it has lasted
// long enough (`late`).
SLOW bool warp_turn(VmSlot *slot, u32 events, bool late) {
    Machine m = machine_at(slot);
    u32 turn = TURN_RUN;
    if (warp_lane() == 0) {
        m.events = events & (EV_EXIT | EV_CHECK);
        if (late && m.vm->hart.steps < slot->end) slot->end = m.vm->hart.steps;
        turn = take_turn(m, slot->end);
        if (turn == TURN_RUN) {
            slot->limit = next_deadline(m, slot->end);
        } else {
            slice_end(m, slot->before, *slot->result);
            const Pool *pool = slot->pool;
            slot->result->code_full = read_through(&pool->trace_count) >= pool->trace_capacity ||
                                      read_through(&pool->text_count) >= pool->text_capacity;
        }
    }
    turn = warp_shuffle(turn, 0);
    if (turn != TURN_RUN) warp_save(slot), translations_save(slot);
    return turn == TURN_RUN;
}

// Does what the lanes of one VM have left their loop for; all lanes of the warp. They go on there, or the
// slice is over (LEAVE_NOT).
SLOW LaneState warp_serve(VmSlot *slot, LaneState s, u32 chance) {
    Hart &h = slot->vm->hart;
    u32 lane = warp_lane(), events = 0, insn = 0;
    warp_sync();
    u64 limit = slot->limit, steps = limit - s.left;
    switch (s.leave) {
    case LEAVE_START: events = warp_begin(slot) | EV_CHECK; break;
    case LEAVE_LEARN: warp_learn(slot, s, chance); return s;
    default:
        if (lane == 0) h.pc = s.pc, h.steps = steps;
        warp_sync();
        u32 miss = warp_shuffle(read_through(&slot->miss), 0);
        warp_sync();
        if (lane == 0) slot->miss = MISS_NONE; // at a limit too: an interrupt may lead elsewhere
        if (s.leave == LEAVE_LIMIT || s.leave == LEAVE_LATE) break;
        FetchEntry fetch = slot->fetch[s.pc / FRAME_BYTES % FETCH_ENTRIES];
        if (fetch.tag != (PAGE_OF(s.pc) | s.mode)) {
            WarpFetch found = warp_fetch(slot, s.pc);
            if (found.found && !found.events) return s;
            events = found.events;
            break;
        }
        if (s.leave == LEAVE_TRACE && trace_make(slot, fetch.text, s.pc, s.mode, TRACE_NEW) != BUSY) return s;
        insn = text_at(slot->pool, fetch.text)->words[s.pc / 4 % TEXT_WORDS];
        if (s.leave == LEAVE_DEVICE && (insn & 0x5f) == 0x03) { // a load or a store
            events = warp_device(slot, insn, read_through(&slot->miss_va));
            break;
        }
        bool lacks = miss == MISS_LOAD || miss == MISS_STORE;
        if (lacks && warp_fill(slot, read_through(&slot->miss_va), miss == MISS_STORE)) return s;
        // With a VM for itself, a warp has tried that before it came here.
        if (VM_LANES < 32 && s.leave == LEAVE_STEP && miss == MISS_NONE) {
            if (warp_brief(slot, slot_place(slot), slot->pool->base_ptr, insn, s)) {
                if (s.left) return s;
                if (lane == 0) h.pc = s.pc, h.steps = limit;
                warp_sync();
                break;
            }
            if (lane == 0) slot->miss = MISS_NONE;
        }
        events = warp_step(slot, insn);
    }
    warp_sync();
    u64 now = load_long((u64)(uintptr_t)&h.steps);
    bool late = s.leave == LEAVE_LATE, turns = now >= limit || late || (events & (EV_EXIT | EV_CHECK));
    if (turns || s.leave == LEAVE_START) {
        if (!warp_turn(slot, events, late)) {
            s.leave = LEAVE_NOT, s.left = 0;
            return s;
        }
    }
    warp_sync();
    s.left = (u32)(*(volatile u64 *)&slot->limit - now); // slices are far shorter than 2^32
    s.pc = read_through(&h.pc), s.mode = mode_key(h);
    warp_sync();
    return s;
}
