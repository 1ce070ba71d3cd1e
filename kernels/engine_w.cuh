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

// Whether a branch goes the other way than its trace: less, or same if `less` is 0; masks.
FN bool lane_leaves(u32 op, u32 a, u32 b, u32 sign, u32 less) {
    u32 bias = sign & 0x80000000u; // never without `less`
    u32 one = a ^ (b & ~less) ^ bias, two = ((b ^ bias) & less) | (1 & ~less);
    return (one < two) != has(op, LANE_INVERTED);
}

// What a round has to do, as lanes mark it in `work` (trace.cuh) and all of them together in `round`: the
// byte of a kind has a bit for each level, and is shifted down from round to round. In `rest` bits 6:0 say on
// which levels there are instructions, and those of loads and stores PART_SHIFT bits higher that some are of
// less than a word.
#define ROUND_LOAD (1u << MARK_LOAD)
#define ROUND_STORE (1u << MARK_STORE)
#define ROUND_OTHER (1u << MARK_OTHER)
#define ROUND_BRANCH (1u << MARK_BRANCH)
#define ROUND_TOP 0x80000000u // before the first round: later ones are counted by it
#define PART_SHIFT 17u
#define REST_LEVELS 0x7fu
#define REST_LOAD_PART (ROUND_LOAD << PART_SHIFT)
#define REST_STORE_PART (ROUND_STORE << PART_SHIFT)
static_assert(TRACE_LEVELS <= 7, "a byte has a bit for each level, and one that is shifted down to none");

FN u32 lane_level(u32 op) { return op >> 3 & 7; }
FN u32 lane_rest(u32 op, u32 work, u32 either, u32 past) {
    return (1u << lane_level(op) >> past) + (work & either) * (1u << PART_SHIFT);
}
// Rounds that are past.
FN u32 rounds_past(u32 round) { return 31 - last_of(round); }

// Prepares a slot; `vm` is null if there is no VM for it. The slice lasts `cycles` of the clock at most, or
// any time if that is 0.
FN void slot_open(VmSlot *slot, Vm *vm, Pool *pool, Mailbox *mail, u64 *saved, const SliceRequest &request,
                  SliceResult *result, u32 cycles) {
    slot->vm = vm, slot->pool = pool, slot->mail = mail, slot->saved = saved, slot->request = request,
    slot->result = result;
    slot->frames = pool->base_ptr, slot->index = pool->text_ptr + FRAME_BYTES, slot->traces = pool->trace_ptr;
    slot->x[0] = slot->x[PAGE_SLOT] = 0, slot->held_va = HELD_NONE, slot->miss = MISS_NONE;
    if (!vm) return;
    u64 most = 1ull << 31, budget = request.budget;
    slot->before = slot->limit = vm->hart.steps;
    slot->began = warp_clock(), slot->cycles = cycles;
    slot->end = slot->before + (budget < most ? budget : most);
}

// Whether the slice has lasted long enough. What lanes read of the clock may differ.
FN bool slice_is_late(const VmSlot *slot) {
    return slot->cycles && warp_clock() - slot->began > slot->cycles;
}

// Runs the slices of the VMs in `slots`, VMS_PER_WARP of them; those without a VM take part for nothing.
// Of 2^32 traces `lessons` are looked at for what can be learned.
FN void warp_slices(VmSlot *slots, u32 lessons) {
    VmSlot *own = slots + warp_lane() / VM_LANES;
    u32 pc = 0, left = 0, mode = 0, next = 1;
    u32 leave = own->vm ? LEAVE_START : LEAVE_NOT;
    bool over = !own->vm;
    u32 insn = 0; // that the last trace has led to, if it is not for lanes
    for (;;) {
        // What the lanes of each VM have left the loop for, one VM after the other.
        u32 chance = (left * 0x85EBCA6Bu + warp_seed()) >> 8;
        if (VM_LANES == 32) {
            const u64 frames = read_through(&own->frames);
            const SlotPlace slot = slot_place_of_warp(own);
            LaneState s = {warp_or(leave), pc, left, mode};
            warp_sync(); // registers and what lanes have noted are written
            bool served = false;
            if (insn) {
                if (warp_brief(own, slot, frames, insn, s)) s.leave = s.left ? LEAVE_NOT : LEAVE_LIMIT;
            }
            u32 miss = MISS_NONE, va = pc;
            if (s.leave == LEAVE_STEP)
                miss = warp_or(own->miss), va = warp_or(own->miss_va);
            else if (s.leave == LEAVE_TRACE && warp_any(cached_fetch(slot, pc).tag != (PAGE_OF(pc) | mode)))
                miss = MISS_FETCH;
            if (miss != MISS_NONE) s.leave = brief_page(own, slot, frames, s, insn, va, miss);
            if (s.leave != LEAVE_NOT) s = warp_serve(slots, s, chance), served = true;
            warp_together();
            if (warp_or(served && s.leave == LEAVE_NOT)) return;
            // All lanes say the same, and the compiler is to know it.
            pc = warp_or(s.pc), left = warp_or(s.left), mode = warp_or(s.mode), leave = LEAVE_NOT, next = 0;
            insn = 0;
        } else {
            for (u32 waiting = warp_ballot(leave != LEAVE_NOT); waiting;) {
                u32 first = first_of(waiting), number = first / VM_LANES;
                LaneState s;
                s.leave = warp_shuffle(leave, first), s.pc = warp_shuffle(pc, first);
                s.left = warp_shuffle(left, first), s.mode = warp_shuffle(mode, first);
                s = warp_serve(slots + number, s, warp_shuffle(chance, first));
                if (warp_lane() / VM_LANES == number) {
                    pc = s.pc, left = s.left, mode = s.mode;
                    over = s.leave == LEAVE_NOT;
                    leave = LEAVE_NOT, next = over ? 1 : 0;
                }
                waiting &= ~(VM_LANES_MASK << number * VM_LANES);
            }
            if (!warp_any(!over)) return;
        }
        // Asked for again each time: what lives on behind a call would live in memory.
        u32 lane = warp_lane();
        lane = warp_shuffle(lane, lane); // so that the compiler keeps it now
        const u32 member = VM_LANES == 32 ? lane : lane % VM_LANES;
        const SlotPlace slot = VM_LANES == 32 ? slot_place_of_warp(own) : slot_place(own);
        const u64 frames = read_through(&own->frames), index = read_through(&own->index),
                  traces = read_through(&own->traces);
        TraceLane ahead = {0, 0, 0, 0}; // of the trace that follows
        for (;;) {
            u32 trace = next - 1, page = PAGE_OF(pc);
            if (next == 0) {
                FetchEntry fetch = cached_fetch(slot, pc);
                bool known = fetch.tag == (page | mode);
                trace = load_word(index + (u64)(known ? fetch.text : 0) * TEXT_BYTES + pc % FRAME_BYTES) - 1;
                // Another warp may just have made it, and lanes could see it before and after.
                bool lacks = !known | (trace >= BUSY - 1);
                if (VM_LANES == 32 ? warp_any(lacks) : lacks) {
                    leave = LEAVE_TRACE;
                    if (VM_LANES == 32) break;
                }
                if (VM_LANES == 32) ahead = load_lane(lane_place(traces, trace, member));
            }
            if (VM_LANES < 32) {
                leave = group_shuffle(leave, 0), trace = group_shuffle(trace, 0);
                if (UNLIKELY(warp_any(leave != LEAVE_NOT))) break;
                ahead = load_lane(lane_place(traces, trace, member));
            }
            const TraceLane t = ahead;
            u32 op = t.op, more = t.more;
            slot_write(slot, PAGE_SLOT * 4, page);
            warp_sync();
            const u32 first = byte_of<1>(op), second = byte_of<2>(op);
            u32 a = slot_read(slot, first), b = slot_read(slot, second);
            u32 here = page + t.at, lane_page = PAGE_OF(here); // how the trace ends, if it is left here
            const u32 kind = op & 7, last_write = more >> 27, written = more & 31u << 2,
                      slow = kind == T_SLOW ? t.imm : 0;
            // The trace that follows if it is left at this lane, where the lane's page itself says so.
            bool ends = VM_LANES < 32 && (here & 3) == END_BEHIND; // the last lane of all
            u32 onward = ends ? (here & (FRAME_BYTES - 4)) + 4 : t.imm;
            u32 behind_page = (more & LANE_TEXT_MASK) * (TEXT_BYTES >> LANE_TEXT_SHIFT);
            u32 follows = load_if(has(op, LANE_LEADS), index + (u32)(behind_page + onward));
            // What this lane does in which round.
            const u32 sign = byte_sign<0>(op) | 1, either = byte_sign<0>(more), factor = (u32)((i32)op >> 30);
            u32 work = 1u << (more >> 22 & 31), levels = lane_rest(op, work, either, 0);
            // What all lanes do. They are asked once, and again if the trace is left earlier; so all branches
            // of a round are uniform, and are decided early.
            u32 round = warp_or(work) | ROUND_TOP, rest = warp_or(levels);
            // The lane at which the trace is left, and whether that is before its instruction.
            u32 n = first_of(group_ballot((kind >= T_JUMP) | ends));
            bool stops = left <= n, turns = false;
            bool elsewhere = has(more, LANE_ELSEWHERE); // on another page: is it still there?
            if (warp_any(elsewhere | stops)) {
                if (stops) n = left;
                FetchEntry fetch = cached_fetch(slot, here);
                u32 text = (more & LANE_TEXT_MASK) >> LANE_TEXT_SHIFT;
                bool same = (fetch.tag == (lane_page | mode)) & (fetch.text == text);
                bool gone = elsewhere & !same;
                if (gone) here &= ~3u;
                if (UNLIKELY(warp_any(gone | stops))) {
                    warp_together(); // so that the compiler makes this a branch
                    u32 from = first_of(group_ballot(gone));
                    if (from <= n) n = from, stops = true;
                    if (stops && member >= n) work = levels = 0;
                    round = warp_or(work) | ROUND_TOP, rest = warp_or(levels);
                }
            }
            const u32 number = op >> 24 & 15;
            const bool simple = (op & (7u | 15u << 24)) == T_ALU;
            u32 value = (VM_LANES < 32 ? here & ~3u : here) + 4; // of jumps: the link
            do {
                // Asked early: from a question to the branch is a while.
                bool branches = round & ROUND_BRANCH;
                // Before the first round it brings nothing that counts; but so the loop has one end, and the
                // compiler makes one copy of it.
                u32 made_a = group_shuffle(value, first), made_b = group_shuffle(value, second);
                if (has(op, LANE_MADE_1)) a = made_a;
                if (has(op, LANE_MADE_2)) b = made_b;
                u32 operand = b + t.imm;
                u32 shared = (a & operand) | (either & (a | operand));
                u32 result = a + operand * sign + shared * factor;
                if (simple) value = result;
                if (round & ROUND_OTHER) {
                    u32 other = lane_other(number, a, operand); // of lanes without one it means nothing
                    if (work & ROUND_OTHER) value = other;
                }
                if (branches) {
                    u32 with = has(op, LANE_RETURNS) ? operand : b;
                    bool leaves = has(work, ROUND_BRANCH) & lane_leaves(op, a, with, sign, either);
                    if (warp_any(leaves)) {
                        u32 from = first_of(group_ballot(leaves));
                        if (VM_LANES == 32 || from <= n) {
                            n = from, stops = false, turns = true;
                            if (has(op, LANE_RETURNS)) lane_page = a - t.imm; // that is where it leads
                            if (member >= n) work = 0;
                        }
                        u32 past = rounds_past(round);
                        levels = lane_rest(op, work, either, past);
                        round = warp_or(work) | ROUND_TOP >> past, rest = warp_or(member <= n ? levels : 0);
                    }
                }
                if (round & (ROUND_LOAD | ROUND_STORE)) {
                    u32 va = a + t.imm;
                    DataEntry entry = cached_data(slot, va);
                    bool stores = has(work, ROUND_STORE), accesses = has(work, ROUND_LOAD | ROUND_STORE);
                    // Aligned, on that page, in that mode; and may be written.
                    u32 differs = entry.tag ^ ((va & (~(FRAME_BYTES - 1) | number)) | mode | TAG_WRITABLE);
                    if (!stores) differs &= ~TAG_WRITABLE;
                    bool at_hand = differs == 0, misses = accesses & !at_hand;
                    // What lanes load that turn out to be too far is lost, and does no harm.
                    u64 host = (frames + (u64)entry.frame * FRAME_BYTES) | va % FRAME_BYTES;
                    load_to(value, at_hand & has(work, ROUND_LOAD), host & ~3ull);
                    if (UNLIKELY(warp_any(misses))) {
                        // All before that lane happens, some of it in a later round. If that could still lead
                        // elsewhere, the lane waits to be the first of another trace.
                        u32 from = first_of(group_ballot(misses));
                        u32 past = rounds_past(round);
                        u32 undecided =
                            group_ballot(kind >= T_LOAD && kind <= T_BRANCH && lane_level(op) > past);
                        if (VM_LANES == 32 || from <= n) {
                            n = from, stops = true, turns = false;
                            if (!(undecided & ((1u << from) - 1)) && member == from) {
                                here = (here & ~3u) | END_STEP;
                                if (!(va & number)) {
                                    slot_note(slot, SLOT_NOTE(own, miss_va), va);
                                    slot_note(slot, SLOT_NOTE(own, miss), stores ? MISS_STORE : MISS_LOAD);
                                }
                            }
                            if (member >= n) work = 0;
                        }
                        levels = lane_rest(op, work, either, past);
                        round = warp_or(work) | ROUND_TOP >> past, rest = warp_or(member <= n ? levels : 0);
                    }
                    if (rest & REST_LOAD_PART) {
                        u32 part = part_of(value, va, number, op & LANE_SIGNED);
                        if (has(work & either, ROUND_LOAD)) value = part;
                    }
                    if (round & ROUND_STORE) {
                        warp_sync();
                        store_if(at_hand & has(work & ~either, ROUND_STORE), host, b);
                        if (rest & REST_STORE_PART)
                            store_part_if(at_hand & has(work & either, ROUND_STORE), host, number, b);
                        warp_sync();
                    }
                }
                work >>= 1, round >>= 1, rest >>= 1;
            } while (rest & REST_LEVELS);
            // Where it goes on, and how many lanes count.
            u32 target = ((kind == T_JALR ? a : lane_page) + t.imm) | END_BEHIND;
            bool behind = (kind - T_BRANCH <= T_JALR - T_BRANCH) & !stops;
            if (VM_LANES < 32 && ends) {
                if (turns)
                    follows = 0;
                else
                    target = ((here & ~3u) + 4) | END_BEHIND;
                behind = !stops;
                if (here & END_BEHIND) here &= ~3u;
            }
            if (!behind) target = here;
            const bool mine = member == n;
            if (VM_LANES == 32) {
                next = warp_or(mine && !stops ? follows : 0);
                // On its way while the rest is done, which does without what the lanes had loaded. If none is
                // known, trace 0, which nobody needs.
                ahead = load_lane(lane_place(traces, next - 1 < BUSY - 1 ? next - 1 : 0, member));
                target = warp_or(mine ? target : 0);
            } else {
                target = group_shuffle(target, n);
                next = group_shuffle(stops ? 0 : follows, n);
            }
            u32 counted = n + (target & ~(target >> 1) & END_BEHIND);
            warp_sync(); // all have read their operands
            // Those that no other one writes again.
            slot_write_if(counted - 1 - member < last_write, slot, written, value);
            left -= counted;
            // Now and then: was that the way that was to be expected?
            bool looks = left * 0x9E3779B9u + warp_seed() < lessons;
            if (VM_LANES < 32) looks &= !over; // trace 0 is nobody's
            if (VM_LANES == 32 ? looks | (next == BUSY) : warp_any(looks | (next == BUSY))) {
                if (next == BUSY) next = 0;
                u64 place = lane_place(traces, trace, member);
                const TraceLane was = load_lane(place);
                const u32 op = was.op, more = was.more, kind = op & 7;
                bool last_lane = VM_LANES < 32 && member == VM_LANES - 1; // whose way on is never taken
                bool left_here = mine & !stops & !last_lane, branch = kind == T_BRANCH;
                bool returns = (branch || kind == T_JALR) && has(op, LANE_RETURNS | LANE_OPEN);
                bool learns =
                    left_here & (returns | ((kind == T_JUMP || kind == T_EXIT) & (was.imm >= FRAME_BYTES)));
                if (looks & branch & (left_here | (member < n))) {
                    learns = left_here & ((op & LANE_DOUBT) == LANE_DOUBT);
                    u32 doubt = left_here ? op + LANE_DOUBT_ONE : op - LANE_DOUBT_ONE;
                    store_if((!learns) & (left_here | has(op, LANE_DOUBT)), place, doubt);
                }
                store_if(looks & (member == 0) & !(more & LANE_USED), place + 12, more | LANE_USED);
                if (looks & learns) {
                    u32 text = (more & LANE_TEXT_MASK) >> LANE_TEXT_SHIFT;
                    u32 what = was.imm - 4 != (here & (FRAME_BYTES - 4)) ? LEARN_TAKEN : 0;
                    if (!branch) what = LEARN_PAGE;
                    if (returns) what = LEARN_TARGET;
                    slot_note(slot, SLOT_NOTE(own, learn_to), (target & ~3u) - PAGE_OF(here));
                    slot_note(slot, SLOT_NOTE(own, learn_at), text * TEXT_WORDS + here / 4 % TEXT_WORDS);
                    slot_note(slot, SLOT_NOTE(own, learn), LEARN_OF(what, member, trace));
                    slot_note(slot, SLOT_NOTE(own, learn_start), pc);
                    leave = LEAVE_LEARN;
                }
                bool late = slice_is_late(own);
                if (VM_LANES == 32) {
                    leave = warp_or(leave);
                    if (leave == LEAVE_NOT && warp_any(late)) leave = LEAVE_LATE;
                } else {
                    leave = group_shuffle(leave, n), late = group_shuffle(looks & late, 0);
                    if (leave == LEAVE_NOT && late) leave = LEAVE_LATE;
                }
            }
            pc = target & ~3u;
            bool leaves = left == 0 || target & END_STEP;
            if (VM_LANES == 32 ? leaves : warp_any(leaves)) {
                // A jump to no word stays where it is: a step will say so.
                u32 stays = VM_LANES == 32 ? warp_or(mine ? here & ~3u : 0) : group_shuffle(here & ~3u, n);
                if ((target & 3) == (END_STEP | END_BEHIND)) pc = stays;
                if (leaves) leave = left == 0 ? LEAVE_LIMIT : LEAVE_STEP;
                if (VM_LANES == 32) insn = warp_or(mine && left ? slow : 0);
            }
            if (VM_LANES < 32 && over) leave = LEAVE_NOT, next = 1;
            if (UNLIKELY(VM_LANES == 32 ? leave : warp_any(leave != LEAVE_NOT))) break;
        }
    }
}
