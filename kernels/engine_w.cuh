// Engine W: one VM per warp. Lane i holds x[i], and instruction i of the trace that is being executed
// (trace.cuh). Whatever is rare runs in lane 0 on the state in memory (step.cuh).
#pragma once
#include "step.cuh"
#include "trace.cuh"

#define PAGE_OF(va) ((va) & ~(FRAME_BYTES - 1))

struct WarpPlace {
    Vm *vm;
    Pool *pool;
    Mailbox *mail;
};
FN Machine machine_at(const WarpPlace &at) {
    Machine m;
    m.vm = at.vm, m.pool = at.pool, m.mail = at.mail;
    m.table = (u32 *)(uintptr_t)at.vm->ram.table_ptr;
    m.frames = (u8 *)(uintptr_t)at.pool->base_ptr;
    m.events = 0, m.flush_va = 0, m.flush_frame = 0, m.flush_code = 0;
    return m;
}

// Translations differ by mode, and in S mode by SUM.
#define MODE_U_KEY 4u
FN u32 mode_key(const Hart &h) { return h.mode == MODE_U ? MODE_U_KEY : h.sstatus & SSTATUS_SUM ? 12 : 8; }

FN void forget_all() {
    WarpCache &cache = warp_cache();
    for (u32 i = warp_lane(); i < DATA_ENTRIES; i += 32) cache.data[i].tag = 0;
    for (u32 i = warp_lane(); i < FETCH_ENTRIES; i += 32) cache.fetch[i].tag = 0;
    warp_sync();
}
FN void forget_fetches() {
    for (u32 i = warp_lane(); i < FETCH_ENTRIES; i += 32) warp_cache().fetch[i].tag = 0;
    warp_sync();
}
// Forgets what the events of lane 0 say; what is left of them. All lanes.
FN u32 forget(const Machine &m) {
    u32 events = warp_shuffle(m.events, 0);
    if (!(events & (EV_FLUSH | EV_FLUSH_PAGE | EV_FLUSH_FRAME))) return events;
    if (events & EV_FLUSH) {
        forget_all();
    } else {
        WarpCache &cache = warp_cache();
        u32 lane = warp_lane();
        if (events & EV_FLUSH_PAGE) { // a large page may sit in several entries: its 4 MiB in all of them
            u32 va = warp_shuffle(m.flush_va, 0) >> 22;
            for (u32 i = lane; i < DATA_ENTRIES; i += 32)
                if (cache.data[i].tag >> 22 == va) cache.data[i].tag = 0;
            for (u32 i = lane; i < FETCH_ENTRIES; i += 32)
                if (cache.fetch[i].tag >> 22 == va) cache.fetch[i].tag = 0;
        }
        if (events & EV_FLUSH_FRAME) {
            u32 frame = warp_shuffle(m.flush_frame, 0);
            for (u32 i = lane; i < DATA_ENTRIES; i += 32)
                if (cache.data[i].frame == frame) cache.data[i].tag = 0;
            if (warp_shuffle(m.flush_code, 0)) {
                forget_fetches();
            }
        }
        warp_sync();
    }
    return events & ~(EV_FLUSH | EV_FLUSH_PAGE | EV_FLUSH_FRAME);
}

FN void warp_save(Vm *vm, u32 x, u32 pc, u64 steps) {
    vm->hart.x[warp_lane()] = x;
    if (warp_lane() == 0) vm->hart.pc = pc, vm->hart.steps = steps;
    warp_sync();
}
// What a lane holds between instructions, read before any lane goes on to change it.
struct WarpHart {
    u32 x, pc, mode;
    u64 steps;
};
FN WarpHart warp_load(Vm *vm) {
    WarpHart w;
    warp_sync();
    w.x = warp_lane() == 0 ? 0 : read_through(&vm->hart.x[warp_lane()]);
    w.pc = read_through(&vm->hart.pc), w.mode = mode_key(vm->hart);
    w.steps = *(volatile u64 *)&vm->hart.steps;
    warp_sync();
    return w;
}

// One instruction through memory, by lane 0. The registers are in hart.x before and after.
SLOW u32 warp_step(WarpPlace at, u32 insn) {
    Machine m = machine_at(at);
    if (warp_lane() == 0) step(m, decode(insn, at.vm->hart.pc % FRAME_BYTES));
    warp_sync();
    return forget(m);
}

// Gives the guest page a frame of its own; the whole warp copies. False: there is none, and nothing has
// changed.
SLOW bool warp_own(WarpPlace at, u32 page, u32 old) {
    Machine m = machine_at(at);
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
        at.vm->ram.private_frames++;
        forget_frame(m, old, code_of(m)[old]);
    }
    warp_sync();
    forget(m);
    return true;
}

// Translates for a load or store, and notes it in the cache. False: leave it to warp_step.
SLOW bool warp_fill(WarpPlace at, u32 va, bool store, u32 pc, u64 steps) {
    Machine m = machine_at(at);
    Hart &h = at.vm->hart;
    u32 lane = warp_lane(), page = NO_FRAME, dirty = 0;
    if (lane == 0) {
        h.pc = pc, h.steps = steps;
        Walk walk = translate(m, va, store ? ACCESS_STORE : ACCESS_LOAD);
        if (!walk.cause && !(walk.pa >> 32) && walk.pa / FRAME_BYTES < at.vm->ram.pages)
            page = (u32)walk.pa / FRAME_BYTES, dirty = store || walk.is_dirty;
    }
    warp_sync();
    forget(m); // a page table may have moved
    page = warp_shuffle(page, 0), dirty = warp_shuffle(dirty, 0);
    if (page == NO_FRAME) return false;
    u32 entry = warp_shuffle(read_through(&m.table[page]), 0);
    if (store && !(entry & FRAME_PRIVATE)) {
        if (!warp_own(at, page, entry & FRAME_MASK)) return false;
        entry = warp_shuffle(read_through(&m.table[page]), 0);
    }
    u32 frame = entry & FRAME_MASK;
    bool direct = dirty && (entry & FRAME_PRIVATE) && !warp_shuffle(read_through(&code_of(m)[frame]), 0);
    if (store && !direct) return false;
    DataEntry &slot = warp_cache().data[va / FRAME_BYTES % DATA_ENTRIES];
    if (lane == 0) slot.tag = PAGE_OF(va) | mode_key(h) | (direct ? TAG_WRITABLE : 0), slot.frame = frame;
    warp_sync();
    return true;
}

// The text of pc. NO_TEXT: an exception came up, and hart.pc leads on; or an event; or there is no room for
// another text, and one instruction has been executed without.
struct WarpText {
    u32 text, events;
};
SLOW WarpText warp_fetch(WarpPlace at, u32 pc, u64 steps) {
    Machine m = machine_at(at);
    Hart &h = at.vm->hart;
    u32 lane = warp_lane(), frame = NO_FRAME;
    WarpText out;
    if (lane == 0) {
        h.pc = pc, h.steps = steps;
        Walk walk = translate(m, pc, ACCESS_FETCH);
        if (!walk.cause && ((walk.pa >> 32) || walk.pa / FRAME_BYTES >= at.vm->ram.pages))
            walk.cause = CAUSE_FETCH_ACCESS;
        if (walk.cause) {
            memory_fault(m, walk.cause, pc);
            h.steps++;
            m.events |= EV_CHECK;
        } else {
            frame = m.table[walk.pa / FRAME_BYTES] & FRAME_MASK;
        }
    }
    warp_sync();
    out.events = forget(m), out.text = NO_TEXT;
    frame = warp_shuffle(frame, 0);
    if (frame == NO_FRAME) return out;
    out.text = text_find(at.pool, at.vm, frame);
    if (out.text == NO_TEXT) {
        const u32 *words = (const u32 *)frame_at(m, frame);
        out.events |= warp_step(at, words[pc / 4 % TEXT_WORDS]) | EV_CHECK;
        return out;
    }
    // Stores to the frame must no longer go there directly.
    WarpCache &cache = warp_cache();
    for (u32 i = lane; i < DATA_ENTRIES; i += 32)
        if (cache.data[i].frame == frame) cache.data[i].tag = 0;
    FetchEntry &slot = cache.fetch[pc / FRAME_BYTES % FETCH_ENTRIES];
    warp_sync();
    if (lane == 0) slot.tag = PAGE_OF(pc) | mode_key(h), slot.text = out.text;
    warp_sync();
    return out;
}

// The integer operations that are not simple. Out of the round's way, and apart from each other.
FN u32 lane_other(u32 detail, u32 page, u32 a, u32 b) {
    u32 fill = detail == A_SRA ? (u32)((i32)a >> 31) : 0;
    u32 shift = detail == A_SLL ? a << (b & 31) : funnel_right(a, fill, b);
    u32 bias = detail == A_SLT ? 0x80000000u : 0;
    u32 less = (a ^ bias) < (b ^ bias);
    u32 value = detail <= A_SLTU ? less : detail == A_MUL ? a * b : shift;
    if (detail == A_PAGE) value = page + b;
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

FN void lane_store(u8 *host, u32 detail, u32 value) {
    if (detail == 2)
        *(u32 *)host = value;
    else if (detail == 1)
        *(u16 *)host = (u16)value;
    else
        *host = (u8)value;
}
FN u32 alignment(u32 log_size) { return (1u << log_size) - 1; }

// Whether a branch goes the other way than its trace. False for all but branches.
FN bool lane_leaves(u32 op, u32 a, u32 b) {
    u32 bias = op & BRANCH_SIGNED << 3 ? 0x80000000u : 0;
    bool less = (a ^ bias) < (b ^ bias), same = a == b, meets = op & BRANCH_LESS << 3 ? less : same;
    return ((op & 7) == T_BRANCH) & (meets != (bool)(op & BRANCH_INVERT << 3));
}

// Classes whose target is in the immediate.
#define LEADS_ON (1u << T_BRANCH | 1u << T_JUMP | 1u << T_EXIT)

// Why the lanes leave their loop. It calls nothing: what a call might change would have to live in memory.
enum Leave : u32 { LEAVE_LIMIT, LEAVE_FETCH, LEAVE_TRACE, LEAVE_STEP, LEAVE_FILL };

// The commonest of the instructions that are not for lanes, by all lanes alike and with nothing to look up:
// AMOs on pages at hand, and CSRs without effect on what comes next. Not done: leave it to warp_step.
struct WarpQuick {
    bool done;
    u32 value;
};
SLOW WarpQuick warp_quick(WarpPlace at, u32 insn, u32 a, u32 b, u32 mode) {
    Hart &h = at.vm->hart;
    WarpQuick q;
    q.done = false, q.value = 0;
    u32 f3 = insn >> 12 & 7, rs1 = insn >> 15 & 31;
    if ((insn & 0x7f) == 0x2f) {
        Uop u = decode(insn, 0);
        if (u.op < OP_AMOSWAP || u.op > OP_AMOMAXU || a & 3) return q;
        DataEntry entry = cached_data(cache_place(), a);
        if (entry.tag != (PAGE_OF(a) | mode | TAG_WRITABLE)) return q;
        u64 host = at.pool->base_ptr + (u64)entry.frame * FRAME_BYTES + a % FRAME_BYTES;
        q.value = load_word(host);
        warp_sync();
        if (warp_lane() == 0) *(u32 *)(uintptr_t)host = amo_of(u.op, q.value, b);
        warp_sync();
        q.done = true;
        return q;
    }
    if ((insn & 0x7f) != 0x73 || !(f3 & 3) || mode == MODE_U_KEY) return q;
    u32 number = insn >> 20, *field = 0;
    if (number == CSR_SSTATUS) field = &h.sstatus;
    if (number == CSR_SSCRATCH) field = &h.sscratch;
    if (number == CSR_SEPC) field = &h.sepc;
    if (number == CSR_SCAUSE) field = &h.scause;
    if (number == CSR_STVAL) field = &h.stval;
    if (!field) return q;
    u32 old = read_through(field), operand = f3 & 4 ? rs1 : a;
    warp_sync(); // all have read it
    u32 value = (f3 & 3) == 1 ? operand : (f3 & 3) == 2 ? old | operand : old & ~operand;
    if ((f3 & 3) != 1 && rs1 == 0) value = old; // only read
    if (number == CSR_SSTATUS) {
        value &= SSTATUS_MASK;
        u32 changed = old ^ value;
        if (changed & (SSTATUS_SUM | SSTATUS_MXR) || changed & value & SSTATUS_SIE) return q;
    }
    if (number == CSR_SEPC) value &= ~3u;
    if (warp_lane() == 0) *field = value;
    warp_sync();
    q.done = true, q.value = old;
    return q;
}

// Runs until steps reach `limit` or an event comes up, which it returns; hart.pc, hart.steps and hart.x are
// then true.
FN u32 warp_run(WarpPlace place, u64 limit) {
    Vm *vm = place.vm;
    const u64 frames = place.pool->base_ptr, texts = place.pool->text_ptr, traces = place.pool->trace_ptr;
    const CachePlace cache = cache_place();
    u32 lane = warp_lane();
    forget_origin(lane);
    WarpHart hart = warp_load(vm);
    u32 x = hart.x, pc = hart.pc, mode = hart.mode;
    u32 left = (u32)(limit - hart.steps); // slices are far shorter than 2^32
    for (;;) {
        u32 leave = LEAVE_FETCH, text = 0, miss_va = 0, miss_store = 0;
        u64 index = 0; // of the text: where its traces are
        for (u32 page = ~0u, next = 0;;) {
            u32 trace = next - 1;
            if (next == 0) {
                if (PAGE_OF(pc) != page) {
                    page = PAGE_OF(pc);
                    FetchEntry fetch = cached_fetch(cache, pc);
                    text = fetch.text;
                    if (UNLIKELY(fetch.tag != (page | mode))) break;
                    index = texts + (u64)text * TEXT_BYTES + FRAME_BYTES;
                }
                trace = load_word(index + pc % FRAME_BYTES) - 1;
                // Another warp may just have made it, and lanes could see it before and after.
                if (UNLIKELY(warp_ballot(trace >= BUSY - 1))) {
                    leave = LEAVE_TRACE;
                    break;
                }
            }
            const TraceLane t = ((const TraceLane *)(uintptr_t)traces)[(u64)trace * TRACE_LANES + lane];
            u32 op = t.op, place_bits = t.place;
            u32 a = warp_shuffle(x, op >> 8), b = warp_shuffle(x, op >> 16);
            // The trace that follows if it is left at this lane, where the page itself says so.
            bool leads = LEADS_ON >> (op & 7) & 1 && t.imm < FRAME_BYTES;
            u32 follows = load_word(index + (leads ? t.imm & ~3u : 0));
            const u32 levels = warp_or(place_bits & 0x7fffe000); // masks of levels: uniform
            u32 last = warp_max(op >> 28 & 7);
            const u32 addend = (op & 7) == T_ALU ? t.imm : 0;
            const u32 minus = byte_sign<0>(op), one = byte_sign<1>(op), both = byte_sign<2>(op);
            const u32 sums = byte_sign<3>(op);
            u32 here = page + (place_bits & 0x1fff); // how the trace ends, if it is left here
            u32 value = here + 4;                    // of jumps: the link
            // Lanes at which the trace is left for certain, and those among them whose instruction has not
            // happened.
            u32 stopped = bit_or_none(left), leaving;
            for (u32 round = 0;; round++) {
                forget_origin(op);
                forget_origin(place_bits);
                u32 operand = b + addend;
                u32 result =
                    ((a + (operand ^ minus) - minus) & sums) | ((a ^ operand) & one) | (a & operand & both);
                bool simple = (op & 0x0f000007) == T_ALU;
                if (levels >> 13 >> round & 1) {
                    if (((op & 7) == T_ALU) & !simple) value = lane_other(op >> 24 & 15, page, a, operand);
                }
                if (simple) value = result;
                if (levels >> 19 >> round & 1) {
                    leaving = stopped | warp_ballot(((op >> 28 & 7) <= round) & lane_leaves(op, a, b));
                    u32 va = a + t.imm;
                    u32 key_mask = ~(FRAME_BYTES - 1) | alignment(op >> 3 & 3);
                    DataEntry entry = cached_data(cache, va);
                    bool stores = (op & 7) == T_STORE;
                    u32 other = entry.tag ^ ((va & key_mask) | mode | TAG_WRITABLE);
                    bool mine = (((op & 7) == T_LOAD) | stores) & ((op >> 28 & 7) == round);
                    bool ok = (stores ? other : other & ~TAG_WRITABLE) == 0;
                    u32 missing = warp_ballot(mine & !ok) & lanes_before(leaving);
                    if (UNLIKELY(missing)) {
                        // All before that lane happens, some of it in a later round. If that could still lead
                        // elsewhere, the lane waits to be the first of another trace.
                        u32 kind = op & 7;
                        u32 undecided =
                            warp_ballot(kind >= T_LOAD && kind <= T_BRANCH && (op >> 28 & 7) > round);
                        missing &= ~missing + 1;
                        leaving = stopped |= missing;
                        if (!(undecided & lanes_before(missing))) {
                            miss_va = warp_shuffle(va, first_of(missing));
                            miss_store = warp_shuffle((u32)stores, first_of(missing));
                            if (missing >> lane & 1)
                                here |= va & alignment(op >> 3 & 3) ? END_STEP : END_FILL;
                        }
                    }
                    ok &= mine;
                    u64 host = (frames + (u64)entry.frame * FRAME_BYTES) | va % FRAME_BYTES;
                    bool loads = ok & !stores;
                    u32 word = load_if(loads, host & ~3ull), shift = 32 - (8u << (op >> 3 & 3));
                    word = word >> (8 * va & 31) << shift;
                    word = op & 0x20 ? (u32)((i32)word >> shift) : word >> shift;
                    if (loads) value = word;
                    if (levels >> 25 >> round & 1) {
                        warp_sync();
                        if (ok && stores && (lanes_before(leaving) >> lane & 1))
                            lane_store((u8 *)(uintptr_t)host, op >> 3 & 3, b);
                        warp_sync();
                    }
                    if (leaving) {
                        u32 needed = warp_max((leaving ^ (leaving - 1)) >> lane & 1 ? op >> 28 & 7 : 0);
                        if (needed < last) last = needed;
                    }
                }
                if (round >= last) break;
                u32 made_a = warp_shuffle(value, op >> 8), made_b = warp_shuffle(value, op >> 16);
                if (op & 1u << 13) a = made_a;
                if (op & 1u << 21) b = made_b;
            }
            // Where it goes on, and which lanes count.
            u32 kind = op & 7, target = page + t.imm;
            if (kind == T_JALR) {
                target = ((a + t.imm) & ~1u) | END_BEHIND;
                if (target & 2) here |= END_STEP;
            }
            bool behind = (kind - T_BRANCH <= T_JALR - T_BRANCH) & !(stopped >> lane & 1) & !(here & 2);
            if (!behind) target = here;
            if (!leads || (!behind && kind != T_EXIT)) follows = 0;
            leaving = stopped | warp_ballot((kind >= T_JUMP) | lane_leaves(op, a, b));
            leaving &= ~leaving + 1;
            target = warp_or(leaving >> lane & 1 ? target : 0);
            next = warp_or(leaving >> lane & 1 ? follows : 0);
            if (next == BUSY) next = 0;
            u32 counted = leaving - 1 + ((target & 3) == END_BEHIND ? leaving : 0);
            u32 writers = t.writers & counted;
            u32 written = warp_shuffle(value, last_of(writers));
            if (writers) x = written;
            left -= count_of(counted);
            pc = target & ~3u;
            if (UNLIKELY(left == 0 || target & 2)) {
                leave = left == 0 ? LEAVE_LIMIT : (target & 3) == END_STEP ? LEAVE_STEP : LEAVE_FILL;
                break;
            }
        }
        u64 steps = limit - left;
        warp_save(vm, x, pc, steps);
        if (leave == LEAVE_LIMIT) return 0;
        if (leave == LEAVE_FETCH) {
            WarpText found = warp_fetch(place, pc, steps);
            if (found.text == NO_TEXT || found.events) return found.events;
            continue;
        }
        if (leave == LEAVE_TRACE) {
            if (trace_make(place.pool, vm, text, pc / 4 % TEXT_WORDS) != BUSY) continue;
        } else if (leave == LEAVE_FILL) {
            if (warp_fill(place, miss_va, miss_store, pc, steps)) continue;
        }
        u32 insn = text_at(place.pool, text)->words[pc / 4 % TEXT_WORDS];
        if (leave == LEAVE_STEP) {
            WarpQuick quick =
                warp_quick(place, insn, warp_shuffle(x, insn >> 15), warp_shuffle(x, insn >> 20), mode);
            if (quick.done) {
                if (lane == (insn >> 7 & 31) && lane) x = quick.value;
                pc += 4, left--;
                if (left) continue;
                warp_save(vm, x, pc, limit);
                return 0;
            }
        }
        u32 events = warp_step(place, insn);
        left--;
        if (left == 0 || (events & ~EV_JUMP)) return events;
        hart = warp_load(vm);
        x = hart.x, pc = hart.pc;
    }
}

SLOW u32 warp_begin(WarpPlace at, const SliceRequest *request) {
    Machine m = machine_at(at);
    if (warp_lane() == 0) slice_begin(m, *request);
    warp_sync();
    forget_all();
    return warp_shuffle(m.events, 0) & (EV_CHECK | EV_EXIT);
}

// Interrupts, idling and the next deadline; TURN_STOP when the slice is over.
struct WarpTurn {
    u32 turn;
    u64 limit;
};
SLOW WarpTurn warp_turn(WarpPlace at, u32 events, u64 end) {
    Machine m = machine_at(at);
    WarpTurn t;
    t.turn = TURN_RUN, t.limit = 0;
    if (warp_lane() == 0) {
        m.events = events;
        t.turn = take_turn(m, end);
        if (t.turn == TURN_RUN) t.limit = next_deadline(m, end);
    }
    t.turn = warp_shuffle(t.turn, 0);
    t.limit = warp_shuffle(t.limit, 0);
    warp_sync();
    return t;
}

// One slice of one VM.
FN void warp_slice(WarpPlace place, const SliceRequest *request, SliceResult *result) {
    u64 before = place.vm->hart.steps, most = 1ull << 31;
    u64 end = before + (request->budget < most ? request->budget : most);
    u32 events = warp_begin(place, request) | EV_CHECK;
    u64 limit = before;
    for (;;) {
        bool over = *(volatile u64 *)&place.vm->hart.steps >= limit;
        warp_sync();
        if (over || (events & (EV_EXIT | EV_CHECK))) {
            WarpTurn t = warp_turn(place, events & (EV_EXIT | EV_CHECK), end);
            if (t.turn == TURN_STOP) break;
            limit = t.limit;
        }
        events = warp_run(place, limit);
    }
    if (warp_lane() == 0) {
        Machine m = machine_at(place);
        slice_end(m, before, *result);
        const Pool *pool = place.pool;
        result->code_full = read_through(&pool->trace_count) >= pool->trace_capacity ||
                            read_through(&pool->text_count) >= pool->text_capacity;
    }
    warp_sync();
}
