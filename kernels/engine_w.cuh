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

FN const u32 *code_words(Pool *pool, u32 page) {
    u32 frame = ((const u32 *)(uintptr_t)pool->code_frame_ptr)[page];
    return (const u32 *)(uintptr_t)(pool->base_ptr + (u64)frame * FRAME_BYTES);
}

// One instruction through memory, by lane 0. The registers are in hart.x before and after.
SLOW WarpEvents warp_step(WarpPlace at, u32 page, u32 index) {
    Machine m = machine_at(at);
    if (warp_lane() == 0) step(m, decode(code_words(at.pool, page)[index], 4 * index));
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

// The engine's own form of a micro-op, made so that whole classes run without a branch:
//   bits 2:0   class, 0: not decoded yet
//   bits 7:3   which operation of the class
//   bits 15:8  rd, 32 for none      bits 20:16 rs1      bits 28:24 rs2      bits 63:32 immediate
// The second operand of an ALU operation is x[rs2] + imm: one of the two is zero.
enum WarpClass : u32 { W_DECODE, W_ALU, W_LOAD, W_STORE, W_JUMP, W_MULTIPLY, W_FENCE, W_SLOW };

// In the order in which warp_alu tells them apart.
enum WarpAlu : u32 { A_ADD, A_SUB, A_AUIPC, A_AND, A_OR, A_XOR, A_SLT, A_SLTU, A_SLL, A_SRL, A_SRA };

FN u64 warp_word(u32 kind, u32 detail, u32 rd, u32 rs1, u32 rs2, u32 imm) {
    return (u64)(kind | detail << 3 | rd << 8 | rs1 << 16 | rs2 << 24) | (u64)imm << 32;
}

FN u64 warp_encode(Uop u) {
    u32 op = u.op;
    switch (op) {
        // clang-format off
#define ALU(name, detail) case OP_##name: return warp_word(W_ALU, detail, u.rd, u.rs1, u.rs2, 0);
#define ALU_IMM(name, detail) case OP_##name: return warp_word(W_ALU, detail, u.rd, u.rs1, 0, u.imm);
        ALU(ADD, A_ADD)
        ALU(SUB, A_SUB)
        ALU(AND, A_AND)
        ALU(OR, A_OR)
        ALU(XOR, A_XOR)
        ALU(SLT, A_SLT)
        ALU(SLTU, A_SLTU)
        ALU(SLL, A_SLL)
        ALU(SRL, A_SRL)
        ALU(SRA, A_SRA)
        ALU_IMM(ADDI, A_ADD)
        ALU_IMM(ANDI, A_AND)
        ALU_IMM(ORI, A_OR)
        ALU_IMM(XORI, A_XOR)
        ALU_IMM(SLTI, A_SLT)
        ALU_IMM(SLTIU, A_SLTU)
        ALU_IMM(SLLI, A_SLL)
        ALU_IMM(SRLI, A_SRL)
        ALU_IMM(SRAI, A_SRA)
        ALU_IMM(LI, A_ADD)
        ALU_IMM(AUIPC, A_AUIPC)
#undef ALU
#undef ALU_IMM
        // clang-format on
    case OP_LB:
        return warp_word(W_LOAD, 0 | 4, u.rd, u.rs1, 0, u.imm); // bits 1:0 log2 of the size, bit 2 signed
    case OP_LH: return warp_word(W_LOAD, 1 | 4, u.rd, u.rs1, 0, u.imm);
    case OP_LW: return warp_word(W_LOAD, 2, u.rd, u.rs1, 0, u.imm);
    case OP_LBU: return warp_word(W_LOAD, 0, u.rd, u.rs1, 0, u.imm);
    case OP_LHU: return warp_word(W_LOAD, 1, u.rd, u.rs1, 0, u.imm);
    case OP_SB: return warp_word(W_STORE, 0, SINK, u.rs1, u.rs2, u.imm);
    case OP_SH: return warp_word(W_STORE, 1, SINK, u.rs1, u.rs2, u.imm);
    case OP_SW:
        return warp_word(W_STORE, 2, SINK, u.rs1, u.rs2, u.imm);
        // bits 2:0 as funct3 of branches; 8: JAL, 16: JALR
#define BRANCH(name, funct3)                                                                                 \
    case OP_##name:                                                                                          \
    case OP_##name##_FAR: return warp_word(W_JUMP, funct3, SINK, u.rs1, u.rs2, u.imm);
        BRANCH(BEQ, 0)
        BRANCH(BNE, 1)
        BRANCH(BLT, 4)
        BRANCH(BGE, 5)
        BRANCH(BLTU, 6)
        BRANCH(BGEU, 7)
#undef BRANCH
    case OP_JAL:
    case OP_JAL_FAR: return warp_word(W_JUMP, 8, u.rd, 0, 0, u.imm);
    case OP_JALR: return warp_word(W_JUMP, 16, u.rd, u.rs1, 0, u.imm);
    case OP_FENCE:
    case OP_FENCE_I: return warp_word(W_FENCE, 0, SINK, 0, 0, 0);
    default: break;
    }
    if (op >= OP_MUL && op <= OP_REMU) return warp_word(W_MULTIPLY, op - OP_MUL, u.rd, u.rs1, u.rs2, 0);
    return warp_word(W_SLOW, 0, SINK, 0, 0, 0);
}

FN u32 warp_alu(u32 kind, u32 a, u32 b, u32 page) {
    u32 negate = kind == A_SUB ? ~0u : 0;
    u32 base = kind == A_AUIPC ? page : a;
    u32 sum = base + (b ^ negate) - negate;
    u32 logic = (kind == A_XOR ? 0 : a & b) | (kind == A_AND ? 0 : a ^ b);
    u32 fill = kind == A_SRA ? (u32)((i32)a >> 31) : 0;
    u32 right = __funnelshift_r(a, fill, b);
    u32 shift = kind == A_SLL ? a << (b & 31) : right;
    bool less = kind == A_SLT ? (i32)a < (i32)b : a < b;
    u32 low = kind <= A_AUIPC ? sum : logic;
    u32 high = kind <= A_SLTU ? (u32)less : shift;
    return kind <= A_XOR ? low : high;
}

// Decodes the line of 32 instructions that `index` is in; each lane one. Other warps may do the same at the
// same time: they write the same words.
SLOW void warp_decode(WarpPlace place, u32 page, u32 index) {
    u64 *ops = (u64 *)(uintptr_t)(place.pool->code_ptr + (u64)page * CODE_PAGE_BYTES);
    u32 at = (index & ~31u) + warp_lane();
    ops[at] = warp_encode(decode(code_words(place.pool, page)[at], 4 * at));
    __syncwarp();
}

FN u32 alignment(u32 log_size) { return (1u << log_size) - 1; }

// Runs until steps reach `limit` or an event comes up, which it returns; hart.pc, hart.steps and hart.x are
// then true.
FN u32 warp_run(WarpPlace place, WarpTlb &tlb, u64 limit) {
    Vm *vm = place.vm;
    u8 *frames = (u8 *)(uintptr_t)place.pool->base_ptr;
    u64 code = place.pool->code_ptr;
    u32 lane = warp_lane();
    u32 x = warp_load(vm);
    u32 pc = *(volatile u32 *)&vm->hart.pc, mode = mode_key(vm->hart) << 2;
    u32 left = (u32)(limit - *(volatile u64 *)&vm->hart.steps); // slices are far shorter than 2^32
    const u64 *ops = 0;
    u32 page = 0, events;
    u64 word;
    for (;;) {
        u32 slot = pc >> 12 & 31;
        u32 tag = __shfl_sync(ALL_LANES, tlb.fetch_tag, slot);
        page = __shfl_sync(ALL_LANES, tlb.fetch_code, slot);
        if (tag != PAGE_OF(pc) + mode) {
            WarpEvents e = warp_resolve(place, pc, limit - left);
            events = warp_forget(tlb, e);
            page = e.value;
            if (page == NO_FRAME) {
                vm->hart.x[lane] = x;
                __syncwarp();
                return events;
            }
            if (lane == slot) tlb.fetch_tag = PAGE_OF(pc) + mode, tlb.fetch_code = page;
        }
        ops = (const u64 *)(uintptr_t)(code + (u64)page * CODE_PAGE_BYTES);
        word = ops[pc >> 2 & 1023];
        for (;;) {
            // `word` is the micro-op at pc; the one behind it is on its way while this one runs.
            u64 following = ops[(pc >> 2 & 1023) + 1];
            u32 low = (u32)word, imm = (u32)(word >> 32);
            u32 kind = low & 7, detail = low >> 3 & 31, rd = low >> 8 & 0xff;
            u32 a = __shfl_sync(ALL_LANES, x, low >> 16 & 31);
            u32 b = __shfl_sync(ALL_LANES, x, low >> 24 & 31);
            u32 next = pc + 4, value = 0;
            // Another warp may decode this line just now, and lanes could see it before and after.
            if (UNLIKELY(__any_sync(ALL_LANES, kind == W_DECODE))) {
                warp_decode(place, page, pc >> 2 & 1023);
                word = *(volatile const u64 *)&ops[pc >> 2 & 1023];
                continue;
            }
            if (kind == W_ALU) {
                value = warp_alu(detail, a, b + imm, PAGE_OF(pc));
            } else if (kind <= W_STORE) {
                u32 va = a + imm, slot = va >> 12 & 31, size = detail & 3;
                u32 key = (va & (~(FRAME_BYTES - 1) | alignment(size))) + mode;
                bool load = kind == W_LOAD;
                u32 tag = __shfl_sync(ALL_LANES, load ? tlb.read_tag : tlb.write_tag, slot);
                u32 frame = __shfl_sync(ALL_LANES, load ? tlb.read_frame : tlb.write_frame, slot);
                if (UNLIKELY(tag != key)) {
                    if (va & alignment(size)) goto slow;
                    WarpEvents e = warp_fill(place, va, load ? ACCESS_LOAD : ACCESS_STORE, pc, limit - left);
                    warp_forget(tlb, e);
                    frame = e.value;
                    if (frame == NO_FRAME) goto slow;
                    if (lane == slot) {
                        if (load)
                            tlb.read_tag = key, tlb.read_frame = frame;
                        else
                            tlb.write_tag = key, tlb.write_frame = frame;
                    }
                }
                u8 *host = frames + ((u64)frame * FRAME_BYTES + (va & (FRAME_BYTES - 1)));
                if (load) {
                    u32 shift = 32 - (8u << size);
                    value = *(const u32 *)(uintptr_t)((uintptr_t)host & ~(uintptr_t)3);
                    value = value >> (8 * (va & 3)) << shift;
                    value = detail & 4 ? (u32)((i32)value >> shift) : value >> shift;
                } else {
                    // All lanes store the same value to the same place, so each lane sees it in its own later
                    // loads.
                    if (size == 2)
                        *(u32 *)host = b;
                    else if (size == 1)
                        *(u16 *)host = (u16)b;
                    else
                        *host = (u8)b;
                }
            } else if (kind == W_JUMP) {
                bool below = detail & 2 ? a < b : (i32)a < (i32)b;
                bool condition = ((detail & 4 ? below : a == b) ? 1 : 0) != (detail & 1);
                value = next;
                if (detail >= 8 || condition) next = detail & 16 ? (a + imm) & ~1u : pc + imm;
                if (UNLIKELY(next & 3)) goto slow;
                if (lane == rd) x = value;
                left--;
                bool same_page = PAGE_OF(next) == PAGE_OF(pc);
                bool straight = next == pc + 4;
                pc = next;
                if (UNLIKELY(left == 0)) goto done;
                if (!same_page) break;
                word = straight ? following : ops[pc >> 2 & 1023];
                continue;
            } else if (kind == W_MULTIPLY) {
                switch (detail) {
                case 0: value = alu<OP_MUL>(a, b); break;
                case 1: value = alu<OP_MULH>(a, b); break;
                case 2: value = alu<OP_MULHSU>(a, b); break;
                case 3: value = alu<OP_MULHU>(a, b); break;
                case 4: value = alu<OP_DIV>(a, b); break;
                case 5: value = alu<OP_DIVU>(a, b); break;
                case 6: value = alu<OP_REM>(a, b); break;
                default: value = alu<OP_REMU>(a, b); break;
                }
            } else if (kind == W_SLOW) {
                goto slow;
            }
            if (lane == rd) x = value; // rd is the sink where there is nothing to write
            left--;
            pc = next;
            word = following;
            if (UNLIKELY(left == 0)) goto done;
            if (LIKELY(pc & (FRAME_BYTES - 1))) continue;
            break;
        slow:
            warp_save(vm, x, pc, limit - left);
            events = warp_forget(tlb, warp_step(place, page, pc >> 2 & 1023));
            if (events) return events;
            x = warp_load(vm);
            pc = *(volatile u32 *)&vm->hart.pc;
            left--;
            if (left == 0) goto done;
            break;
        }
    }
done:
    warp_save(vm, x, pc, limit);
    return 0;
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
