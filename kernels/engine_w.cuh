// Engine W: a warp runs VMS_PER_WARP VMs, each with VM_LANES of its lanes. Registers and translations are in
// shared memory (VmSlot); each lane holds an instruction of the trace that is being executed (trace.cuh).
// Whatever is rare runs in lane 0 on the state in memory (step.cuh).
#pragma once
#include "step.cuh"
#include "trace.cuh"

FN Machine machine_at(const VmSlot *slot) {
    Machine m;
    m.vm = slot->vm, m.pool = slot->pool, m.mail = slot->mail;
    m.table = (u32 *)(uintptr_t)m.vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)m.pool->base_ptr;
    m.events = 0, m.flush_va = 0, m.flush_frame = 0, m.flush_code = 0;
    return m;
}

// Translations differ by mode, and in S mode by SUM.
#define MODE_U_KEY 4u
FN u32 mode_key(const Hart &h) { return h.mode == MODE_U ? MODE_U_KEY : h.sstatus & SSTATUS_SUM ? 12 : 8; }

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

// The integer operations that are not simple. Out of the round's way, and apart from each other.
FN u32 lane_other(u32 detail, u32 a, u32 b) {
    u32 fill = detail == A_SRA ? (u32)((i32)a >> 31) : 0;
    u32 shift = detail == A_SLL ? a << (b & 31) : funnel_right(a, fill, b);
    u32 bias = detail == A_SLT ? 0x80000000u : 0;
    u32 less = (a ^ bias) < (b ^ bias);
    u32 value = detail <= A_SLTU ? less : detail == A_MUL ? a * b : shift;
    if (LIKELY(detail <= A_MUL)) return value;
    switch (detail) {
    case A_MULH: return alu<OP_MULH>(a, b);
    case A_MULHSU: return alu<OP_MULHSU>(a, b);
    case A_MULHU: return alu<OP_MULHU>(a, b);
    case A_DIV: return alu<OP_DIV>(a, b);
    case A_DIVU: return alu<OP_DIVU>(a, b);
    case A_REM: return alu<OP_REM>(a, b);
    default: return alu<OP_REMU>(a, b);
    }
}

FN u32 alignment(u32 log_size) { return (1u << log_size) - 1; }

// Whether a branch goes the other way than its trace.
FN bool lane_leaves(u32 op, u32 a, u32 b) {
    u32 bias = op & BRANCH_SIGNED << 3 ? 0x80000000u : 0;
    bool less = (a ^ bias) < (b ^ bias), same = a == b, meets = op & BRANCH_LESS << 3 ? less : same;
    return meets != (bool)(op & BRANCH_INVERT << 3);
}

// The lanes up to the first of `leaving`: all that count if the trace is left there.
FN u32 up_to_first(u32 leaving) { return leaving ^ (leaving - 1); }

// What a round has to do, as lanes mark it (trace.cuh), and that it is not the last.
#define ROUND (1u << MARK_LOAD | 1u << MARK_STORE | 1u << MARK_OTHER | 1u << MARK_BRANCH)
#define ROUND_AHEAD 2u

// Classes whose target is in the immediate.
#define LEADS_ON (1u << T_BRANCH | 1u << T_JUMP | 1u << T_EXIT)

// Why a VM's lanes leave their loop. It calls nothing: what a call might change would have to live in memory.
enum Leave : u32 {
    LEAVE_NOT,
    LEAVE_START,
    LEAVE_LIMIT,
    LEAVE_FETCH,
    LEAVE_TRACE,
    LEAVE_STEP,
    LEAVE_FILL,
    LEAVE_LEARN
};

// LR of a word at hand: notes its physical address. False: leave it to warp_step.
FN bool warp_hold(VmSlot *slot, u32 va) {
    Machine m = machine_at(slot);
    u32 pa = 0, cause = 0;
    if (warp_lane() == 0) {
        Walk walk = translate(m, va, ACCESS_LOAD);
        pa = (u32)walk.pa, cause = walk.cause;
    }
    forget(slot, m);
    if (warp_shuffle(cause, 0)) return false;
    if (warp_lane() == 0) m.vm->hart.reservation = slot->held_pa = pa, slot->held_va = va;
    return true;
}

// The commonest of the instructions that are not for lanes, by all lanes alike and with little to look up:
// AMOs, LR and SC on pages at hand, SFENCE.VMA of a page, the time, and CSRs that are words of the hart. Not
// done: leave it to warp_step.
FN bool warp_quick(VmSlot *slot, u32 insn, u32 &mode) {
    Vm *vm = slot->vm;
    Hart &h = vm->hart;
    Uop u = decode(insn, 0);
    u32 a = read_through(&slot->x[u.rs1]), b = read_through(&slot->x[u.rs2]), value = 0;
    if (u.op >= OP_AMOSWAP && u.op <= OP_AMOMAXU) {
        DataEntry entry = cached_data(slot_place(slot), a);
        if (a & 3 || entry.tag != (PAGE_OF(a) | mode | TAG_WRITABLE)) return false;
        u64 host = slot->pool->base_ptr + (u64)entry.frame * FRAME_BYTES + a % FRAME_BYTES;
        value = load_word(host);
        warp_sync();
        if (warp_lane() == 0) *(u32 *)(uintptr_t)host = amo_of(u.op, value, b);
    } else if (u.op == OP_LR || u.op == OP_SC) {
        DataEntry entry = cached_data(slot_place(slot), a);
        u32 differs = entry.tag ^ (PAGE_OF(a) | mode);
        if (a & 3 || differs & ~TAG_WRITABLE) return false;
        u64 host = slot->pool->base_ptr + (u64)entry.frame * FRAME_BYTES + a % FRAME_BYTES;
        if (u.op == OP_LR) {
            if (!warp_hold(slot, a)) return false;
            value = load_word(host);
        } else {
            // Another address may be the same word: leave that to who looks it up.
            if (!differs || read_through(&slot->held_va) != a) return false;
            value = read_through(&h.reservation) != read_through(&slot->held_pa);
            warp_sync();
            if (warp_lane() == 0) {
                if (!value) *(u32 *)(uintptr_t)host = b;
                h.reservation = NO_RESERVATION;
            }
        }
    } else if (u.op == OP_SYSTEM) {
        bool page_fence = insn >> 25 == 9 && (insn >> 15 & 31); // SFENCE.VMA of an address
        if (!page_fence || mode == MODE_U_KEY || slot->large & large_mark(a)) return false;
        if (warp_lane() == 0) forget_page(slot, a);
    } else if (u.op == OP_CSR && (insn >> 20 & ~0x80u) == CSR_TIME && !csr_writes(insn)) {
        if (mode == MODE_U_KEY && !(h.scounteren >> (CSR_TIME & 31) & 1)) return false;
        u64 ticks = guest_ticks(h);
        value = (u32)(insn >> 20 & 0x80 ? ticks >> 32 : ticks);
    } else {
        u32 number = insn >> 20;
        bool traps = number >= CSR_SSCRATCH && number <= CSR_STVAL; // what a trap leaves in the hart
        if (u.op != OP_CSR || mode == MODE_U_KEY || !(traps || number == CSR_SSTATUS)) return false;
        u32 *word = csr_word(h, number);
        value = read_through(word);
        u32 next = csr_writes(insn) ? csr_kept(number, csr_operand(insn, value, a)) : value;
        u32 events = csr_events(number, value, next);
        if (events & ~(EV_CHECK | EV_MODE)) return false;
        // Interrupts that may come now: are there any?
        if (events & EV_CHECK && (vm->rtc.armed || pending_interrupts(*vm) & h.sie)) return false;
        warp_sync(); // all have read it
        if (warp_lane() == 0) *word = next;
        warp_sync();
        mode = mode_key(h);
    }
    if (warp_lane() == u.rd) slot->x[u.rd] = value;
    warp_sync();
    return true;
}

// What a VM's lanes leave behind, and what they go on with.
struct LaneState {
    u32 leave, pc, left, mode;
    // LEAVE_FILL: address, and whether it is a store. LEAVE_LEARN: text and word of the branch; which way it
    // went, or LEARN_PAGE, and four times the trace; where that started.
    u32 where, which, start;
};

// In `which`: not a branch, but a page that was not at hand when the trace was made.
#define LEARN_PAGE 2u
#define LOOKS 0x80000000u // beside a trace's number

// A trace was left by a branch, or at a page that was not at hand when it was made: it is to be made again,
// going another way. What changes often is believed more and more seldom.
SLOW void warp_learn(VmSlot *slot, const LaneState &s, u32 chance) {
    FetchEntry fetch = slot->fetch[s.start / FRAME_BYTES % FETCH_ENTRIES];
    FetchEntry there = slot->fetch[s.pc / FRAME_BYTES % FETCH_ENTRIES];
    bool branch = !(s.which & LEARN_PAGE);
    bool useful =
        fetch.tag == (PAGE_OF(s.start) | s.mode) && (branch || there.tag == (PAGE_OF(s.pc) | s.mode));
    if (warp_lane() == 0 && useful) {
        u8 *hint = &text_at(slot->pool, s.where / TEXT_WORDS)->hints[s.where % TEXT_WORDS];
        u32 seen = *(volatile u8 *)hint, changes = seen / HINT_CHANGE, way = (s.which & 1) | HINT_KNOWN;
        bool agrees = branch && (seen & (HINT_KNOWN | HINT_TAKEN)) == way;
        if (agrees || !(chance & ((1u << 2 * changes) - 1))) {
            if (!agrees) {
                if (changes < HINT_CHANGES_MAX) changes++;
                *hint = (u8)((branch ? way : seen & (HINT_KNOWN | HINT_TAKEN)) | changes * HINT_CHANGE);
            }
            u32 *index = &text_at(slot->pool, fetch.text)->index[s.start / 4 % TEXT_WORDS];
            atomic_compare_swap(index, (s.which >> 2) + 1, 0);
        }
    }
    warp_sync();
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
    u64 last = slot->saved ? slot->saved[SAVED_WORDS - 1] : 0;
    if ((u32)last != saved_epoch(slot)) return forget_all(slot);
    u64 *words = (u64 *)slot;
    for (u32 i = warp_lane(); i < SAVED_WORDS - 1; i += 32) words[i] = slot->saved[i];
    if (warp_lane() == 0) slot->large = (u32)(last >> 32);
    warp_sync();
}

SLOW u32 warp_begin(VmSlot *slot) {
    Machine m = machine_at(slot);
    translations_load(slot);
    if (warp_lane() == 0) slice_begin(m, *slot->request);
    warp_sync();
    u32 events = forget(slot, m); // packets may have come to pages at hand
    warp_load(slot);
    return events & (EV_CHECK | EV_EXIT);
}

// Interrupts, idling and the next deadline. False: the slice is over.
SLOW bool warp_turn(VmSlot *slot, u32 events) {
    Machine m = machine_at(slot);
    u32 turn = TURN_RUN;
    if (warp_lane() == 0) {
        m.events = events & (EV_EXIT | EV_CHECK);
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
        if (s.leave == LEAVE_LIMIT) break;
        FetchEntry fetch = slot->fetch[s.pc / FRAME_BYTES % FETCH_ENTRIES];
        if (s.leave == LEAVE_FETCH || fetch.tag != (PAGE_OF(s.pc) | s.mode)) {
            WarpFetch found = warp_fetch(slot, s.pc);
            if (found.found && !found.events) return s;
            events = found.events;
            break;
        }
        if (s.leave == LEAVE_TRACE && trace_make(slot, fetch.text, s.pc, s.mode) != BUSY) return s;
        if (s.leave == LEAVE_FILL && warp_fill(slot, s.where, s.which)) return s;
        insn = text_at(slot->pool, fetch.text)->words[s.pc / 4 % TEXT_WORDS];
        if (s.leave == LEAVE_STEP && warp_quick(slot, insn, s.mode)) {
            s.pc += 4, s.left--;
            if (s.left) return s;
            if (lane == 0) h.pc = s.pc, h.steps = limit;
            warp_sync();
            break;
        }
        events = warp_step(slot, insn);
    }
    warp_sync();
    u64 now = *(volatile u64 *)&h.steps;
    bool turns = now >= limit || (events & (EV_EXIT | EV_CHECK));
    if (turns || s.leave == LEAVE_START) {
        if (!warp_turn(slot, events)) {
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

// Prepares a slot; `vm` is null if there is no VM for it.
FN void slot_open(VmSlot *slot, Vm *vm, Pool *pool, Mailbox *mail, u64 *saved, const SliceRequest *request,
                  SliceResult *result) {
    slot->vm = vm, slot->pool = pool, slot->mail = mail, slot->saved = saved, slot->request = request,
    slot->result = result;
    slot->x[0] = slot->x[PAGE_SLOT] = 0, slot->held_va = HELD_NONE;
    if (!vm) return;
    u64 most = 1ull << 31, budget = request->budget;
    slot->before = slot->limit = vm->hart.steps;
    slot->end = slot->before + (budget < most ? budget : most);
}

// Runs the slices of the VMs in `slots`, VMS_PER_WARP of them; those without a VM take part for nothing.
// Of 2^32 traces `lessons` are looked at for what can be learned.
FN void warp_slices(VmSlot *slots, const Pool *pool, u32 lessons) {
    const u64 frames = pool->base_ptr, texts = pool->text_ptr, traces = pool->trace_ptr;
    u32 lane = warp_lane();
    lane = warp_shuffle(lane, lane); // so that the compiler keeps it, and does not ask for it each time
    const u32 member = lane % VM_LANES, own_bit = 1u << member;
    VmSlot *own = slots + lane / VM_LANES;
    const SlotPlace slot = slot_place(own);
    u32 pc = 0, left = 0, mode = 0, next = 1;
    u32 tick = slots->vm->number * 0x9E3779B9u; // so that not all learn at the same time
    u32 leave = own->vm ? LEAVE_START : LEAVE_NOT, where = 0, which = 0, start = 0;
    bool over = !own->vm;
    for (;;) {
        // What the lanes of each VM have left the loop for, one VM after the other.
        for (u32 waiting = warp_ballot(leave != LEAVE_NOT); waiting;) {
            u32 first = VM_LANES == 32 ? 0 : first_of(waiting);
            LaneState s;
            s.leave = warp_shuffle(leave, first), s.pc = warp_shuffle(pc, first);
            s.left = warp_shuffle(left, first), s.mode = warp_shuffle(mode, first);
            s.where = warp_shuffle(where, first), s.which = warp_shuffle(which, first);
            s.start = warp_shuffle(start, first);
            u32 number = first / VM_LANES;
            s = warp_serve(slots + number, s, tick >> 8);
            if (VM_LANES == 32 || lane / VM_LANES == number) {
                pc = s.pc, left = s.left, mode = s.mode;
                over = s.leave == LEAVE_NOT;
                leave = LEAVE_NOT, next = over ? 1 : 0;
            }
            waiting = VM_LANES == 32 ? 0 : waiting & ~(VM_LANES_MASK << number * VM_LANES);
        }
        if (VM_LANES == 32) { // all lanes say the same, and the compiler is to know it
            if (warp_or(over)) return;
            pc = warp_or(pc), left = warp_or(left), tick = warp_or(tick), leave = LEAVE_NOT, next = 0;
        } else if (warp_ballot(!over) == 0) {
            return;
        }
        for (;;) {
            u32 trace = next - 1, page = PAGE_OF(pc);
            if (next == 0) {
                FetchEntry fetch = cached_fetch(slot, pc);
                bool here = fetch.tag == (page | mode);
                u64 index = texts + (u64)(here ? fetch.text : 0) * TEXT_BYTES + FRAME_BYTES;
                trace = load_word(index + pc % FRAME_BYTES) - 1;
                // Another warp may just have made it, and lanes could see it before and after.
                if (trace >= BUSY - 1) leave = LEAVE_TRACE;
                if (!here) leave = LEAVE_FETCH;
                if (VM_LANES == 32) {
                    leave = warp_max(leave);
                    if (UNLIKELY(leave != LEAVE_NOT)) break;
                }
            }
            if (VM_LANES < 32) {
                leave = group_shuffle(leave, 0), trace = group_shuffle(trace, 0);
                if (UNLIKELY(warp_ballot(leave != LEAVE_NOT))) break;
            }
            const TraceLane t = load_lane(traces + ((u64)trace * VM_LANES + member) * (u32)sizeof(TraceLane));
            u32 op = t.op, more = t.more;
            slot_write_if(member == 0, slot, PAGE_SLOT, page);
            warp_sync();
            u32 a = slot_read(slot, op >> 8), b = slot_read(slot, op >> 16);
            u32 here = page + t.at, lane_page = PAGE_OF(here); // how the trace ends, if it is left here
            // The trace that follows if it is left at this lane, where the lane's page itself says so.
            bool ends = VM_LANES < 32 && (here & 3) == END_BEHIND; // the last lane of all
            u32 onward = ends ? (here & (FRAME_BYTES - 4)) + 4 : t.imm;
            bool leads = (ends || LEADS_ON >> (op & 7) & 1) && onward < FRAME_BYTES;
            u64 index = texts + (u64)(more & 0xffff) * TEXT_BYTES + FRAME_BYTES;
            u32 follows = load_word(index + (leads ? onward & ~3u : 0));
            // What this lane does in which round, and the rounds before the one in which it is done; both are
            // shifted on from round to round. What a round has to do and whether another one follows is said
            // by one reduction: its branches are uniform.
            u32 work = 1u << (more >> 27), ahead = (2u << (op >> 28 & 7)) - 2;
            // Lanes at which the trace is left, and those among them whose instruction has not happened.
            u32 stopped = bit_or_none(left);
            if (warp_or(more >> 16 & 1)) { // in part on other pages: are they still there?
                FetchEntry fetch = cached_fetch(slot, here);
                bool same = (fetch.tag == (lane_page | mode)) & (fetch.text == (more & 0xffff));
                bool gone = (more >> 16 & 1) & !same;
                stopped |= group_ballot(gone);
                if (gone) here &= ~3u;
            }
            u32 leaving = stopped;
            const u32 addend = (op & 7) == T_ALU ? t.imm : 0;
            const u32 minus = byte_sign<0>(op), one = byte_sign<1>(op), both = byte_sign<2>(op);
            const u32 sums = byte_sign<3>(op);
            u32 value = (here & ~3u) + 4; // of jumps: the link
            u32 round;
            do {
                // Before the first round it brings nothing that counts; but so the loop has one end, and the
                // compiler makes one copy of it.
                u32 made_a = group_shuffle(value, op >> 8), made_b = group_shuffle(value, op >> 16);
                if (op & OPERAND_MADE << 8) a = made_a;
                if (op & OPERAND_MADE << 16) b = made_b;
                round = warp_or((work & ROUND) | (ahead & ROUND_AHEAD));
                u32 operand = b + addend;
                u32 result =
                    ((a + (operand ^ minus) - minus) & sums) | ((a ^ operand) & one) | (a & operand & both);
                bool simple = (op & 0x0f000007) == T_ALU;
                if (simple) value = result;
                if (round >> MARK_OTHER & 1) {
                    u32 other = lane_other(op >> 24 & 15, a, operand); // 0 of the lanes without one
                    if (work >> MARK_OTHER & 1) value = other;
                }
                if (round >> MARK_BRANCH & 1) {
                    leaving |= group_ballot((work >> MARK_BRANCH & 1) & lane_leaves(op, a, b));
                    if (!(up_to_first(leaving) & own_bit)) ahead = 0;
                }
                if (round & (1u << MARK_LOAD | 1u << MARK_STORE)) {
                    u32 va = a + t.imm;
                    u32 key_mask = ~(FRAME_BYTES - 1) | alignment(op >> 3 & 3);
                    DataEntry entry = cached_data(slot, va);
                    bool stores = (op & 7) == T_STORE;
                    u32 other = entry.tag ^ ((va & key_mask) | mode | TAG_WRITABLE);
                    bool mine = work & (1u << MARK_LOAD | 1u << MARK_STORE);
                    bool ok = (stores ? other : other & ~TAG_WRITABLE) == 0;
                    bool counts = lanes_before(leaving) & own_bit;
                    u32 missing = group_ballot(mine & !ok & counts);
                    if (UNLIKELY(VM_LANES == 32 ? missing : warp_ballot(missing))) {
                        // All before that lane happens, some of it in a later round. If that could still lead
                        // elsewhere, the lane waits to be the first of another trace.
                        u32 kind = op & 7;
                        u32 undecided =
                            group_ballot(kind >= T_LOAD && kind <= T_BRANCH && (ahead & ROUND_AHEAD));
                        missing &= ~missing + 1;
                        u32 miss_va = group_shuffle(va, first_of(missing));
                        u32 miss_store = group_shuffle((u32)stores, first_of(missing));
                        if (missing) {
                            stopped |= missing, leaving |= missing;
                            if (!(undecided & lanes_before(missing))) {
                                where = miss_va, which = miss_store;
                                if (missing & own_bit)
                                    here = (here & ~3u) | (va & alignment(op >> 3 & 3) ? END_STEP : END_FILL);
                            }
                        }
                        if (!(up_to_first(leaving) & own_bit)) ahead = 0;
                    }
                    ok &= mine;
                    u64 host = (frames + (u64)entry.frame * FRAME_BYTES) | va % FRAME_BYTES;
                    bool loads = ok & !stores;
                    u32 word = load_if(loads, host & ~3ull), shift = 32 - (8u << (op >> 3 & 3));
                    word = word >> (8 * va & 31) << shift;
                    word = op & 0x20 ? (u32)((i32)word >> shift) : word >> shift;
                    if (loads) value = word;
                    if (round >> MARK_STORE & 1) {
                        warp_sync();
                        bool happens = ok & stores & (bool)(lanes_before(leaving) & own_bit);
                        store_if(happens, host, op >> 3 & 3, b);
                        warp_sync();
                    }
                }
                work >>= 1, ahead >>= 1;
            } while (round & ROUND_AHEAD);
            // Where it goes on, and which lanes count.
            u32 kind = op & 7, target = lane_page + t.imm;
            bool stops = stopped & own_bit, turns = leaving & ~stopped & own_bit; // a branch
            if (kind == T_JALR) {
                target = ((a + t.imm) & ~1u) | END_BEHIND;
                if (target & 2) here = (here & ~3u) | END_STEP;
            }
            bool behind = (kind - T_BRANCH <= T_JALR - T_BRANCH) & !stops & !(here & 2);
            if (VM_LANES < 32 && ends && (here & 3) == END_BEHIND) {
                if (kind == T_BRANCH && turns)
                    leads = false;
                else
                    target = here + 4;
                behind = !stops, here &= ~3u;
            }
            if (!behind) target = here;
            if (!leads || stops || (!behind && kind != T_EXIT) || follows == BUSY) follows = 0;
            tick += lessons;
            bool looks = tick < lessons;
            leaving |= group_ballot((kind >= T_JUMP) | ends);
            leaving &= ~leaving + 1;
            u32 counted = leaving - 1;
            if (VM_LANES == 32) {
                target = warp_or(leaving & own_bit ? target : 0);
                next = warp_or((leaving & own_bit ? follows : 0) | (looks ? LOOKS : 0));
                looks = next & LOOKS, next &= ~LOOKS; // as it was, but uniform
            } else {
                target = group_shuffle(target, first_of(leaving));
                next = group_shuffle(follows, first_of(leaving));
            }
            if ((target & 3) == END_BEHIND) counted |= leaving;
            warp_sync(); // all have read their operands
            slot_write_if((bool)(counted & own_bit) & !(counted & 1u << (more >> 22 & 31)), slot,
                          more >> 17 & 31, value);
            left -= count_of(counted);
            // Now and then: was that the way that was to be expected?
            if (UNLIKELY(looks)) {
                bool last_lane = VM_LANES < 32 && member == VM_LANES - 1; // whose way on is never taken
                bool branch = (kind == T_BRANCH) & turns & !last_lane;
                bool page_left = (kind == T_JUMP || kind == T_EXIT) & (t.imm >= FRAME_BYTES) & !last_lane;
                u32 lesson = group_ballot((bool)(leaving & ~stopped & own_bit) & (branch | page_left));
                if (VM_LANES == 32 ? lesson : warp_ballot(lesson)) {
                    u32 what = page_left ? LEARN_PAGE : (t.imm & ~3u) - 4 != (here & (FRAME_BYTES - 4));
                    u32 place = (more & 0xffff) * TEXT_WORDS + here / 4 % TEXT_WORDS;
                    place = group_shuffle(place, first_of(lesson)),
                    what = group_shuffle(what, first_of(lesson));
                    if (lesson) where = place, which = what | trace << 2, start = pc, leave = LEAVE_LEARN;
                }
            }
            pc = target & ~3u;
            if (left == 0 || target & 2)
                leave = left == 0 ? LEAVE_LIMIT : (target & 3) == END_STEP ? LEAVE_STEP : LEAVE_FILL;
            if (VM_LANES < 32 && over) leave = LEAVE_NOT, next = 1;
            if (UNLIKELY(VM_LANES == 32 ? leave : warp_ballot(leave != LEAVE_NOT))) break;
        }
    }
}
