// Engine W: one VM per warp. Lane i holds x[i], and entry i of each of three translation caches; what the
// hart does is the same in all lanes. Decoded instructions come from the code pages that all VMs of a frame
// share; 32 lanes decode 32 of them at once. Whatever is rare runs in lane 0 on the state in memory
// (step.cuh).
#pragma once
#include "step.cuh"

#define ALL_LANES 0xFFFFFFFFu
#define PAGE_OF(va) ((va) & ~(FRAME_BYTES - 1))

// One lane's entries: virtual page | mode key, or 0 for none, and what it leads to.
struct WarpTlb {
    u32 read_tag, read_frame;
    u32 write_tag, write_frame;
    u32 fetch_tag, fetch_code;
};

// What an operation out of line hands back, the same in all lanes. The hot loop's own state stays in
// registers: nothing that it holds is passed by address.
struct WarpEvents {
    u32 events;
    u32 flush_va;
    u32 value;
};
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
FN WarpEvents from_lane_0(const Machine &m, u32 value) {
    WarpEvents e;
    e.events = __shfl_sync(ALL_LANES, m.events, 0);
    e.flush_va = __shfl_sync(ALL_LANES, m.flush_va, 0);
    e.value = __shfl_sync(ALL_LANES, value, 0);
    return e;
}
FN u32 warp_lane() { return threadIdx.x % 32; }

FN u32 mode_key(const Hart &h) { return h.mode == MODE_U ? 1 : h.sstatus & SSTATUS_SUM ? 3 : 2; }

// Forgets stale translations; what is left of the events.
FN u32 warp_forget(WarpTlb &tlb, WarpEvents e) {
    if (e.events & (EV_FLUSH | EV_FLUSH_FRAME)) {
        tlb.read_tag = tlb.write_tag = tlb.fetch_tag = 0;
    } else if (e.events & EV_FLUSH_PAGE) {
        // A large page may sit in several entries: forget its 4 MiB in all of them.
        if (((tlb.read_tag ^ e.flush_va) >> 22) == 0) tlb.read_tag = 0;
        if (((tlb.write_tag ^ e.flush_va) >> 22) == 0) tlb.write_tag = 0;
        if (((tlb.fetch_tag ^ e.flush_va) >> 22) == 0) tlb.fetch_tag = 0;
    }
    return e.events & ~(EV_FLUSH | EV_FLUSH_PAGE | EV_FLUSH_FRAME);
}

FN void warp_save(Vm *vm, u32 x, u32 pc, u64 steps) {
    vm->hart.x[warp_lane()] = x;
    if (warp_lane() == 0) vm->hart.pc = pc, vm->hart.steps = steps;
    __syncwarp();
}
FN u32 warp_load(Vm *vm) {
    __syncwarp();
    return warp_lane() == 0 ? 0 : *(volatile u32 *)&vm->hart.x[warp_lane()];
}

// One instruction through memory, by lane 0. The registers are in hart.x before and after.
SLOW WarpEvents warp_step(WarpPlace at, u64 word) {
    Machine m = machine_at(at);
    if (warp_lane() == 0) {
        Uop u;
        u.op = (u8)word, u.rd = (u8)(word >> 8), u.rs1 = (u8)(word >> 16), u.rs2 = (u8)(word >> 24);
        u.imm = (u32)(word >> 32);
        step(m, u);
    }
    __syncwarp();
    return from_lane_0(m, 0);
}

// Translates for a load or store: the frame that may be accessed directly, or NO_FRAME: leave it to
// warp_step.
SLOW WarpEvents warp_fill(WarpPlace at, u32 va, u32 access, u32 pc, u64 steps) {
    Machine m = machine_at(at);
    u32 frame = NO_FRAME;
    if (warp_lane() == 0) {
        m.vm->hart.pc = pc, m.vm->hart.steps = steps;
        Walk walk = translate(m, va, access);
        if (!walk.cause && !(walk.pa >> 32) && walk.pa / FRAME_BYTES < m.vm->ram.pages && !m.events) {
            u32 entry = m.table[walk.pa / FRAME_BYTES];
            bool direct =
                access == ACCESS_LOAD || ((entry & FRAME_PRIVATE) && !code_of(m)[entry & FRAME_MASK]);
            if (direct) frame = entry & FRAME_MASK;
        }
    }
    return from_lane_0(m, frame);
}

// Finds the code page of pc, or NO_FRAME: an exception came up, hart.pc leads on.
SLOW WarpEvents warp_resolve(WarpPlace at, u32 pc, u64 steps) {
    Machine m = machine_at(at);
    u32 page = NO_FRAME;
    if (warp_lane() == 0) {
        Hart &h = m.vm->hart;
        h.pc = pc, h.steps = steps;
        Walk walk = translate(m, pc, ACCESS_FETCH);
        if (!walk.cause && ((walk.pa >> 32) || walk.pa / FRAME_BYTES >= m.vm->ram.pages))
            walk.cause = CAUSE_FETCH_ACCESS;
        if (walk.cause) {
            memory_fault(m, walk.cause, pc);
            h.steps++;
            m.events |= EV_CHECK;
        } else {
            page = code_page_for(m, m.table[walk.pa / FRAME_BYTES] & FRAME_MASK);
        }
    }
    __syncwarp();
    return from_lane_0(m, page);
}

// Decodes the line of 32 instructions that `index` is in; each lane one.
SLOW void warp_decode(WarpPlace place, u32 page, u32 index) {
    Pool *pool = place.pool;
    u64 *ops = (u64 *)(uintptr_t)(pool->code_ptr + (u64)page * CODE_PAGE_BYTES);
    u32 at = (index & ~31u) + warp_lane();
    u32 frame = ((const u32 *)(uintptr_t)pool->code_frame_ptr)[page];
    const u32 *words = (const u32 *)(uintptr_t)(pool->base_ptr + (u64)frame * FRAME_BYTES);
    Uop u = decode(words[at], 4 * at);
    ops[at] = (u64)u.op | (u64)u.rd << 8 | (u64)u.rs1 << 16 | (u64)u.rs2 << 24 | (u64)u.imm << 32;
    __syncwarp();
}

// Runs until steps reach `limit` or an event comes up, which it returns; hart.pc, hart.steps and hart.x are
// then true.
FN u32 warp_run(WarpPlace place, WarpTlb &tlb, u64 limit) {
    Vm *vm = place.vm;
    u8 *frames = (u8 *)(uintptr_t)place.pool->base_ptr;
    u64 code = place.pool->code_ptr;
    u32 x = warp_load(vm);
    u32 pc = *(volatile u32 *)&vm->hart.pc, mode = mode_key(vm->hart);
    u32 left = (u32)(limit - *(volatile u64 *)&vm->hart.steps); // slices are far shorter than 2^32
    const u64 *ops = 0;
    u32 page = 0, events;
    bool resolve = true;
    for (;;) {
        if (left == 0) {
            warp_save(vm, x, pc, limit);
            return 0;
        }
        if (resolve) {
            u32 slot = pc >> 12 & 31;
            u32 tag = __shfl_sync(ALL_LANES, tlb.fetch_tag, slot);
            page = __shfl_sync(ALL_LANES, tlb.fetch_code, slot);
            if (tag != (PAGE_OF(pc) | mode)) {
                WarpEvents e = warp_resolve(place, pc, limit - left);
                events = warp_forget(tlb, e);
                page = e.value;
                if (page == NO_FRAME) {
                    vm->hart.x[warp_lane()] = x;
                    __syncwarp();
                    return events;
                }
                if (warp_lane() == slot) tlb.fetch_tag = PAGE_OF(pc) | mode, tlb.fetch_code = page;
            }
            ops = (const u64 *)(uintptr_t)(code + (u64)page * CODE_PAGE_BYTES);
            resolve = false;
        }
        u64 word = ops[pc >> 2 & 1023];
        u32 low = (u32)word, imm = (u32)(word >> 32);
        u32 op = low & 0xff, rd = low >> 8 & 0xff;
        u32 a = __shfl_sync(ALL_LANES, x, low >> 16 & 31);
        u32 b = __shfl_sync(ALL_LANES, x, low >> 24 & 31);
        u32 next = pc + 4, value = 0;
        switch (op) {
        case OP_DECODE: warp_decode(place, page, pc >> 2 & 1023); continue;
#define X(name)                                                                                              \
    case OP_##name: value = alu<OP_##name>(a, b); break;
            ALU_OPS(X)
#undef X
#define X(name)                                                                                              \
    case OP_##name: value = alu<OP_##name>(a, imm); break;
            ALU_IMM_OPS(X)
#undef X
        case OP_LI: value = imm; break;
        case OP_AUIPC: value = PAGE_OF(pc) + imm; break;
        case OP_LB:
        case OP_LH:
        case OP_LW:
        case OP_LBU:
        case OP_LHU: {
            u32 va = a + imm, slot = va >> 12 & 31;
            u32 size = op == OP_LW ? 4 : op == OP_LH || op == OP_LHU ? 2 : 1;
            u32 tag = __shfl_sync(ALL_LANES, tlb.read_tag, slot);
            u32 frame = __shfl_sync(ALL_LANES, tlb.read_frame, slot);
            if (UNLIKELY(((tag ^ va) & ~(FRAME_BYTES - 1)) || (tag & 3) != mode || (va & (size - 1)))) {
                if (va & (size - 1)) goto slow;
                WarpEvents e = warp_fill(place, va, ACCESS_LOAD, pc, limit - left);
                warp_forget(tlb, e);
                if (e.value == NO_FRAME) goto slow;
                frame = e.value;
                if (warp_lane() == slot) tlb.read_tag = PAGE_OF(va) | mode, tlb.read_frame = frame;
            }
            const u8 *host = frames + (u64)frame * FRAME_BYTES + (va & (FRAME_BYTES - 1));
            value = size == 4 ? *(const u32 *)host : size == 2 ? *(const u16 *)host : *host;
            if (op == OP_LB) value = extend<OP_LB>(value);
            if (op == OP_LH) value = extend<OP_LH>(value);
            break;
        }
        case OP_SB:
        case OP_SH:
        case OP_SW: {
            u32 va = a + imm, slot = va >> 12 & 31;
            u32 size = op == OP_SW ? 4 : op == OP_SH ? 2 : 1;
            u32 tag = __shfl_sync(ALL_LANES, tlb.write_tag, slot);
            u32 frame = __shfl_sync(ALL_LANES, tlb.write_frame, slot);
            if (UNLIKELY(((tag ^ va) & ~(FRAME_BYTES - 1)) || (tag & 3) != mode || (va & (size - 1)))) {
                if (va & (size - 1)) goto slow;
                WarpEvents e = warp_fill(place, va, ACCESS_STORE, pc, limit - left);
                warp_forget(tlb, e);
                if (e.value == NO_FRAME) goto slow;
                frame = e.value;
                if (warp_lane() == slot) tlb.write_tag = PAGE_OF(va) | mode, tlb.write_frame = frame;
            }
            u8 *host = frames + (u64)frame * FRAME_BYTES + (va & (FRAME_BYTES - 1));
            // All lanes store the same value to the same place, so each lane sees it in its own later loads.
            if (size == 4)
                *(u32 *)host = b;
            else if (size == 2)
                *(u16 *)host = (u16)b;
            else
                *host = (u8)b;
            break;
        }
#define X(name)                                                                                              \
    case OP_##name:                                                                                          \
    case OP_##name##_FAR:                                                                                    \
        if (branch_taken<OP_##name>(a, b)) next = pc + imm;                                                  \
        break;
            BRANCH_OPS(X)
#undef X
        case OP_JAL:
        case OP_JAL_FAR:
            value = next;
            next = pc + imm;
            break;
        case OP_JALR:
            value = next;
            next = (a + imm) & ~1u;
            break;
        case OP_FENCE:
        case OP_FENCE_I: break;
        default: goto slow;
        }
        if (UNLIKELY(next & 3)) goto slow;
        if (warp_lane() == rd) x = value; // stores and branches have the sink as rd
        resolve = PAGE_OF(next) != PAGE_OF(pc);
        pc = next;
        left--;
        continue;
    slow:
        warp_save(vm, x, pc, limit - left);
        events = warp_forget(tlb, warp_step(place, word));
        if (events) return events;
        x = warp_load(vm);
        pc = *(volatile u32 *)&vm->hart.pc;
        left--;
        resolve = true;
    }
}

SLOW WarpEvents warp_begin(WarpPlace at, const SliceRequest *request) {
    Machine m = machine_at(at);
    if (warp_lane() == 0) slice_begin(m, *request);
    __syncwarp();
    return from_lane_0(m, 0);
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
    t.turn = __shfl_sync(ALL_LANES, t.turn, 0);
    t.limit = __shfl_sync(ALL_LANES, t.limit, 0);
    __syncwarp();
    return t;
}

// One slice of one VM.
FN void warp_slice(WarpPlace place, const SliceRequest *request, SliceResult *result) {
    u64 before = place.vm->hart.steps, end = before + request->budget;
    WarpTlb tlb;
    tlb.read_tag = tlb.write_tag = tlb.fetch_tag = 0;
    tlb.read_frame = tlb.write_frame = tlb.fetch_code = 0;
    u32 events = warp_forget(tlb, warp_begin(place, request)) | EV_CHECK;
    u64 limit = before;
    for (;;) {
        if ((events & (EV_EXIT | EV_CHECK)) || *(volatile u64 *)&place.vm->hart.steps >= limit) {
            WarpTurn t = warp_turn(place, events & (EV_EXIT | EV_CHECK), end);
            if (t.turn == TURN_STOP) break;
            limit = t.limit;
        }
        events = warp_run(place, tlb, limit);
    }
    if (warp_lane() == 0) {
        Machine m = machine_at(place);
        slice_end(m, before, *result);
    }
}
