// Engine W: a warp runs VMS_PER_WARP VMs, each with VM_LANES of its lanes. Registers and translations are in
// shared memory (VmSlot); each lane holds an instruction of the trace that is being executed (trace.cuh).
// What the lanes' loop leaves out is in serve.cuh.
#pragma once
#include "serve.cuh"

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

#define LOOKS 0x80000000u // beside a trace's number

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
