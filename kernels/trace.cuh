// Traces: what engine W executes. A trace is up to 31 instructions along the path that the program is
// expected to take through one page; every lane of a warp holds one of them. Lanes whose operands are ready
// execute at the same time: an instruction's *level* is the length of the longest chain of instructions in
// the trace that it waits for, so a trace takes as many rounds as it has levels.
//
// Where a trace can end early (a branch that goes the other way, an access that needs more than the
// translations at hand, the end of the slice), all before that lane has happened and nothing behind it has:
//   - a store's level is no lower than that of any branch or access before it: when it is performed, all of
//     them have been decided;
//   - a load behind a store that could overlap it is on a higher level;
//   - values stay in the lanes until the trace is left, and only those of lanes that count are kept.
//
// Texts hold decoded code. They are found by what a page says, not by who has it: all VMs whose page holds
// the same instructions share one, and frames that only look alike are told apart by comparing all their
// words.
#pragma once
#include "memory.cuh"
#include "warp.cuh"

#define TRACE_LANES 32u
#define TRACE_LEVELS 6u
#define TEXT_WORDS (FRAME_BYTES / 4)
#define NO_TEXT 0xFFFFFFFFu
#define BUSY 0xFFFFFFFFu // in an index or the table: another warp is making it

// T_EXIT and T_SLOW stand behind the last instruction: the trace ends, or the instruction there is not for
// lanes.
enum TraceClass : u32 { T_ALU, T_LOAD, T_STORE, T_BRANCH, T_JUMP, T_JALR, T_EXIT, T_SLOW };

// Details of integer operations. The simple ones are put together from a sum and two bitwise parts; the
// others are numbered in bits 3:0, and so rare that a trace without them skips them.
#define A_MINUS 0x10u // of a sum: a - b
#define A_ONE 0x20u   // a ^ b
#define A_BOTH 0x40u  // a & b
#define A_SUM 0x80u   // a + b
enum TraceAlu : u32 {
    A_ADD = A_SUM,
    A_SUB = A_SUM | A_MINUS,
    A_AND = A_BOTH,
    A_OR = A_BOTH | A_ONE,
    A_XOR = A_ONE,
    A_PAGE = 1, // page + immediate
    A_SLT,
    A_SLTU,
    A_SLL,
    A_SRL,
    A_SRA,
    A_MUL,
    A_MULH,
    A_MULHSU,
    A_MULHU,
    A_DIV,
    A_DIVU,
    A_REM,
    A_REMU
};

// Branch details: the trace is left if (bit 1 ? less : equal) differs from bit 0; bit 2: less is signed.
#define BRANCH_INVERT 1u
#define BRANCH_LESS 2u
#define BRANCH_SIGNED 4u

// How a trace ends, in bits 1:0 of where it goes on: before the lane at which it is left, behind it, or
// before it and something has to be done there first.
#define END_BEFORE 0u
#define END_BEHIND 1u
#define END_STEP 2u
#define END_FILL 3u

// One lane of a trace. The flags of integer operations are the uppermost bits of bytes, where one instruction
// makes masks of them. Operands are registers, or lanes that make them.
//   op     2:0 class          5:3 detail of accesses and branches       7 A_MINUS
//          12:8 operand 1     13 a lane makes it                        15 A_ONE
//          20:16 operand 2    21 a lane makes it                        23 A_BOTH
//          27:24 number of another operation   30:28 level              31 A_SUM
//   imm    immediate; of jumps, branches and T_EXIT the target relative to the page, and how it ends
//   writers which lanes write register `lane`
//   place  1:0 how it ends if this is the lane behind the last one      12:2 word in the page
//          18:13 levels with accesses or other operations   24:19 with accesses   30:25 with stores
struct alignas(16) TraceLane {
    u32 op, imm, writers, place;
};

// Decoded code of one page.
struct Text {
    u32 words[TEXT_WORDS]; // what the page said
    u32 index[TEXT_WORDS]; // trace that starts there plus one, 0 for none yet, or BUSY
};

static_assert(sizeof(Text) == TEXT_BYTES && sizeof(TraceLane) * TRACE_LANES == TRACE_BYTES, "see abi.rs");
static_assert(sizeof(WarpCache) == WARP_BYTES, "see abi.rs");

FN Text *text_at(const Pool *pool, u32 text) { return (Text *)(uintptr_t)pool->text_ptr + text; }
FN TraceLane *trace_at(const Pool *pool, u32 trace) {
    return (TraceLane *)(uintptr_t)pool->trace_ptr + (u64)trace * TRACE_LANES;
}

FN u32 read_through(const u32 *word) { return *(const volatile u32 *)word; }

// What the word says once the warp that makes it has finished. That warp runs, and waits for nobody.
FN u32 wait_for(const u32 *word, u32 seen) {
    while (seen == BUSY) {
        back_off();
        seen = read_through(word);
    }
    return seen;
}

// An instruction as the trace's maker wants it: class 2:0, detail 10:3, rd 16:11 (32: none), rs1 21:17, rs2
// 26:22.
FN u64 trace_word(u32 kind, u32 detail, u32 rd, u32 rs1, u32 rs2, u32 imm) {
    return (u64)(kind | detail << 3 | rd << 11 | rs1 << 17 | rs2 << 22) | (u64)imm << 32;
}
FN u64 trace_branch(const Uop &u, u32 detail, u32 offset) {
    u32 target = offset + u.imm;
    if (target & 3) return trace_word(T_SLOW, 0, SINK, 0, 0, 0); // it traps, if it is taken
    return trace_word(T_BRANCH, detail, SINK, u.rs1, u.rs2, target);
}
FN u64 trace_encode(u32 insn, u32 offset) {
    Uop u = decode(insn, offset);
    switch (u.op) {
        // clang-format off
#define ALU(name) case OP_##name: return trace_word(T_ALU, A_##name, u.rd, u.rs1, u.rs2, 0);
#define ALU_IMM(name, detail) case OP_##name: return trace_word(T_ALU, detail, u.rd, u.rs1, 0, u.imm);
        ALU(ADD) ALU(SUB) ALU(AND) ALU(OR) ALU(XOR) ALU(SLT) ALU(SLTU) ALU(SLL) ALU(SRL) ALU(SRA)
        ALU(MUL) ALU(MULH) ALU(MULHSU) ALU(MULHU) ALU(DIV) ALU(DIVU) ALU(REM) ALU(REMU)
        ALU_IMM(ADDI, A_ADD) ALU_IMM(ANDI, A_AND) ALU_IMM(ORI, A_OR) ALU_IMM(XORI, A_XOR)
        ALU_IMM(SLTI, A_SLT) ALU_IMM(SLTIU, A_SLTU) ALU_IMM(SLLI, A_SLL) ALU_IMM(SRLI, A_SRL)
        ALU_IMM(SRAI, A_SRA) ALU_IMM(LI, A_ADD) ALU_IMM(AUIPC, A_PAGE)
#undef ALU
#undef ALU_IMM
        // loads: bits 1:0 log2 of the size, bit 2 signed
    case OP_LB: return trace_word(T_LOAD, 0 | 4, u.rd, u.rs1, 0, u.imm);
    case OP_LH: return trace_word(T_LOAD, 1 | 4, u.rd, u.rs1, 0, u.imm);
    case OP_LW: return trace_word(T_LOAD, 2, u.rd, u.rs1, 0, u.imm);
    case OP_LBU: return trace_word(T_LOAD, 0, u.rd, u.rs1, 0, u.imm);
    case OP_LHU: return trace_word(T_LOAD, 1, u.rd, u.rs1, 0, u.imm);
    case OP_SB: return trace_word(T_STORE, 0, SINK, u.rs1, u.rs2, u.imm);
    case OP_SH: return trace_word(T_STORE, 1, SINK, u.rs1, u.rs2, u.imm);
    case OP_SW: return trace_word(T_STORE, 2, SINK, u.rs1, u.rs2, u.imm);
        // branches leave if they are taken
#define BRANCH(name, detail) case OP_##name: case OP_##name##_FAR: return trace_branch(u, detail, offset);
        BRANCH(BEQ, 0)
        BRANCH(BNE, BRANCH_INVERT)
        BRANCH(BLT, BRANCH_LESS | BRANCH_SIGNED)
        BRANCH(BGE, BRANCH_LESS | BRANCH_SIGNED | BRANCH_INVERT)
        BRANCH(BLTU, BRANCH_LESS)
        BRANCH(BGEU, BRANCH_LESS | BRANCH_INVERT)
#undef BRANCH
        // clang-format on
    case OP_JAL:
    case OP_JAL_FAR:
        return (offset + u.imm) & 3 ? trace_word(T_SLOW, 0, SINK, 0, 0, 0)
                                    : trace_word(T_JUMP, 0, u.rd, 0, 0, offset + u.imm);
    case OP_JALR: return trace_word(T_JALR, 0, u.rd, u.rs1, 0, u.imm);
    case OP_FENCE:
    case OP_FENCE_I: return trace_word(T_ALU, A_ADD, SINK, 0, 0, 0);
    default: return trace_word(T_SLOW, 0, SINK, 0, 0, 0);
    }
}

// The lowest level on which the access of `kind` at x[base] + offset may be, given this lane's instruction
// before it. Equal `base` means the same value: operands are named by who makes them.
FN u32 level_behind(u64 mine, u32 my_base, u32 my_level, u32 kind, u32 base, u32 offset, u32 bytes) {
    u32 my_kind = (u32)mine & 7, my_offset = (u32)(mine >> 32), my_bytes = 1u << ((u32)mine >> 3 & 3);
    if (my_kind == T_STORE) {
        u32 ahead = offset - my_offset, behind = my_offset - offset;
        // Nearer than a page: farther away they could be the same bytes through two mappings.
        bool near = ahead < FRAME_BYTES / 2 || behind < FRAME_BYTES / 2;
        bool apart = my_base == base && near && ahead >= my_bytes && behind >= bytes;
        if (!apart) return my_level + 1;
    }
    bool decided = my_kind == T_STORE || my_kind == T_LOAD || my_kind == T_BRANCH;
    return kind == T_STORE && decided ? my_level : 0;
}

// Makes the trace that starts at word `start`; all lanes. BUSY if there is no room for another.
SLOW u32 trace_make(Pool *pool, Vm *vm, u32 text, u32 start) {
    Text *t = text_at(pool, text);
    u32 lane = warp_lane(), seen = 0, number = 0;
    if (lane == 0) {
        seen = atomic_compare_swap(&t->index[start], 0, BUSY);
        if (seen == 0) {
            bool room = read_through(&pool->trace_count) < pool->trace_capacity &&
                        vm->ram.traces_made < TRACES_PER_VM + (vm->hart.steps >> 10);
            number = room ? atomic_add(&pool->trace_count, 1) : BUSY;
            if (number >= pool->trace_capacity) {
                atomic_swap(&t->index[start], 0);
                number = BUSY;
            } else {
                vm->ram.traces_made++;
            }
        } else {
            number = wait_for(&t->index[start], seen) - 1; // 0 - 1: BUSY
        }
    }
    number = warp_shuffle(number, 0), seen = warp_shuffle(seen, 0);
    warp_sync();
    if (seen || number == BUSY) return number;

    u32 window = ~0u, length = 0, at = start, highest = 0, accesses = 0, stores = 0, other = 0;
    u64 decoded = 0, mine = 0;
    u32 my_level = 0, my_operands = 0, my_at = 0;
    u32 writer = ~0u, writers = 0; // of register `lane`
    u32 end_class = T_EXIT, end_target = 0;
    for (;;) {
        end_target = 4 * at;
        if (length == TRACE_LANES - 1 || at >= TEXT_WORDS) break;
        if ((at & ~31u) != window) {
            window = at & ~31u;
            decoded = trace_encode(t->words[window + lane], 4 * (window + lane));
        }
        u64 word = warp_shuffle(decoded, at & 31);
        u32 low = (u32)word, imm = (u32)(word >> 32);
        u32 kind = low & 7, rd = low >> 11 & 63, rs1 = low >> 17 & 31, rs2 = low >> 22 & 31;
        if (kind == T_SLOW) {
            end_class = T_SLOW;
            break;
        }
        // operands, and who makes them
        u32 by1 = warp_shuffle(writer, rs1), by2 = warp_shuffle(writer, rs2), level = 0;
        u32 level1 = warp_shuffle(my_level, by1 & 31), level2 = warp_shuffle(my_level, by2 & 31);
        u32 operand1 = rs1, operand2 = rs2;
        if (by1 != ~0u) operand1 = by1 | 32, level = level1 + 1;
        if (by2 != ~0u) operand2 = by2 | 32, level = level2 + 1 > level ? level2 + 1 : level;
        if (kind == T_LOAD || kind == T_STORE) {
            u32 behind = lane < length ? level_behind(mine, my_operands & 63, my_level, kind, operand1, imm,
                                                      1u << (low >> 3 & 3))
                                       : 0;
            behind = warp_max(behind);
            if (behind > level) level = behind;
        }
        if (level >= TRACE_LEVELS) break;
        if (level > highest) highest = level;
        if (kind == T_LOAD || kind == T_STORE) accesses |= 1u << level;
        if (kind == T_STORE) stores |= 1u << level;
        if (kind == T_ALU && low >> 3 & 15) other |= 1u << level;

        // where it is expected to go on: branches back are taken, others not
        u32 here = at;
        bool leaves = kind == T_JALR;
        at++;
        if (kind == T_BRANCH && imm < 4 * here) {
            word = (u64)(low ^ (BRANCH_INVERT << 3)) | (u64)(4 * here + 4) << 32;
            at = imm / 4;
        } else if (kind == T_JUMP && imm < FRAME_BYTES) {
            word = trace_word(T_ALU, A_PAGE, rd, 0, 0, 4 * here + 4);
            other |= (u32)(rd != SINK) << level;
            at = imm / 4;
        } else if (kind == T_JUMP) {
            leaves = true;
        }
        if (lane == length) {
            mine = word, my_level = level, my_operands = operand1 | operand2 << 6, my_at = here;
        }
        if (lane == rd) writer = length, writers |= 1u << length;
        length++;
        if (leaves) {
            end_class = T_ALU; // the jump itself ends it
            break;
        }
    }
    TraceLane out;
    u32 low = (u32)mine, ends = END_BEFORE;
    out.imm = (u32)(mine >> 32);
    if (lane >= length) { // nothing, or what ends it
        low = lane == length && end_class != T_ALU ? end_class : T_ALU | A_SUM << 3;
        out.imm = lane == length ? end_target : 0, my_level = highest, my_operands = 0,
        my_at = end_target / 4;
        if (low == T_SLOW) ends = END_STEP;
    }
    u32 kind = low & 7, detail = low >> 3 & 0xff;
    if (kind == T_BRANCH || kind == T_JUMP) out.imm |= END_BEHIND;
    out.op = kind | (my_operands & 63) << 8 | (my_operands >> 6 & 63) << 16 | my_level << 28;
    if (kind == T_ALU)
        out.op |= (detail & 15) << 24 | (detail & A_MINUS ? 1u << 7 : 0) | (detail & A_ONE ? 1u << 15 : 0) |
                  (detail & A_BOTH ? 1u << 23 : 0) | (detail & A_SUM ? 1u << 31 : 0);
    else
        out.op |= (detail & 7) << 3;
    out.writers = writers;
    out.place = ends | my_at << 2 | (accesses | other) << 13 | accesses << 19 | stores << 25;
    trace_at(pool, number)[lane] = out;
    publish_fence();
    warp_sync();
    if (lane == 0) atomic_swap(&t->index[start], number + 1);
    return number;
}

// The text of a frame, found by its words or made; all lanes. NO_TEXT if there is no room for another, or
// this VM has made its share.
SLOW u32 text_find(Pool *pool, Vm *vm, u32 frame) {
    u32 lane = warp_lane();
    u32 *codes = (u32 *)(uintptr_t)pool->code_of_ptr;
    u32 known = warp_shuffle(read_through(&codes[frame]), 0);
    if (known) return known - 1;
    const u32 *words = (const u32 *)(uintptr_t)(pool->base_ptr + (u64)frame * FRAME_BYTES);
    u32 hash = 0;
    for (u32 i = lane; i < TEXT_WORDS; i += 32) hash = (hash ^ words[i]) * 0x9E3779B1u + (hash >> 15);
    hash = (hash ^ lane) * 0x85EBCA6Bu;
    hash = warp_sum(hash ^ hash >> 13);
    u32 *table = (u32 *)(uintptr_t)pool->text_table_ptr, text = NO_TEXT;
    for (u32 probe = 0; probe < pool->text_slots; probe++) {
        u32 *slot = &table[(hash + probe) & (pool->text_slots - 1)];
        u32 seen = 0, made = NO_TEXT;
        if (lane == 0) {
            bool may = vm->ram.texts_made < TEXTS_PER_VM + (vm->hart.steps >> 20) &&
                       read_through(&pool->text_count) < pool->text_capacity;
            seen = may ? atomic_compare_swap(slot, 0, BUSY) : read_through(slot);
            if (may && seen == 0) {
                made = atomic_add(&pool->text_count, 1);
                if (made >= pool->text_capacity) {
                    atomic_swap(slot, 0);
                    made = NO_TEXT;
                }
            }
            seen = wait_for(slot, seen);
        }
        seen = warp_shuffle(seen, 0), made = warp_shuffle(made, 0);
        warp_sync();
        if (made != NO_TEXT) {
            Text *t = text_at(pool, made);
            for (u32 i = lane; i < TEXT_WORDS; i += 32) t->words[i] = words[i], t->index[i] = 0;
            publish_fence();
            warp_sync();
            if (lane == 0) {
                vm->ram.texts_made++;
                atomic_swap(slot, made + 1);
            }
            text = made;
            break;
        }
        if (seen == 0) return NO_TEXT;
        const Text *t = text_at(pool, seen - 1);
        bool same = true;
        for (u32 i = lane; i < TEXT_WORDS; i += 32) same &= t->words[i] == words[i];
        if (warp_ballot(same) == ALL_LANES) {
            text = seen - 1;
            break;
        }
    }
    if (text != NO_TEXT && lane == 0) codes[frame] = text + 1;
    warp_sync();
    return text;
}
