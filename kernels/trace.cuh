// Traces: what engine W executes. A trace is up to 31 instructions along the path that the program is
// expected to take; every lane holds one of them (with k VMs in a warp, a VM has 32 / k lanes, and a trace as
// many instructions at most). Lanes whose operands are ready execute at the same time: an instruction's
// *level* is the length of the longest chain of instructions in the trace that it waits for, so a trace takes
// as many rounds as it has levels. Sums with constants are no links of such chains: whoever uses one adds the
// constant itself.
//
// Where a trace can end early (a branch that goes the other way, an access that needs more than the
// translations at hand, the end of the slice), all before that lane has happened and nothing behind it has:
//   - a store's level is no lower than that of any branch or access before it: when it is performed, all of
//     them have been decided;
//   - a load behind a store that could overlap it is on a higher level;
//   - values stay in the lanes until the trace is left, and only those of lanes that count are kept.
//
// Which way a branch is expected to go: back if its target is behind it, else on; once a trace has been left
// there, the way that it went (Text::hints). A JALR is expected to lead where it led before (Text::targets):
// it is a branch then that is left if it leads elsewhere. That is a first guess: each trace then counts for
// each of its branches whether it is left there more often than not (LANE_DOUBT), and is made again with that
// branch going the other way, and with all before it as they were.
//
// Texts hold decoded code. They are found by what a page says, not by who has it: all VMs whose page holds
// the same instructions share one, and frames that only look alike are told apart by comparing all their
// words.
#pragma once
#include "memory.cuh"
#include "warp.cuh"

#define TRACE_LEVELS 7u
// The last lane of a whole warp is always what follows; where lanes are few, it may hold an instruction.
#define TRACE_LENGTH (VM_LANES == 32 ? 31u : VM_LANES)
#define TEXT_WORDS (FRAME_BYTES / 4)
#define NO_TEXT 0xFFFFFFFFu
#define BUSY 0xFFFFFFFFu // in an index or the table: another warp is making it

// T_EXIT and T_SLOW stand behind the last instruction: the trace ends, or the instruction there is not for
// lanes.
enum TraceClass : u32 { T_ALU, T_LOAD, T_STORE, T_BRANCH, T_JUMP, T_JALR, T_EXIT, T_SLOW };

// Details of integer operations. The simple ones are a + b * sign + factor * ((m ? a | b : a & b)): operand 2
// is taken away (sign -1, else 1), the factor is 0, -1 or -2, and m says which bits count. The others are
// numbered in bits 3:0, and so rare that a trace without them skips them.
#define A_MINUS 0x10u            // sign
#define A_FACTOR(by) ((by) << 5) // two bits: the factor is their two's complement
#define A_EITHER 0x80u           // m
enum TraceAlu : u32 {
    A_ADD = 0,
    A_SUB = A_MINUS,
    A_AND = A_FACTOR(3u) | A_EITHER, // a + b - (a | b)
    A_OR = A_FACTOR(3u),             // a + b - (a & b)
    A_XOR = A_FACTOR(2u),            // a + b - 2 * (a & b)
    A_SLT = 1,
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

// Branch details: the trace is left if (bit 1 ? less : same) differs from bit 0; bit 2: less is signed.
#define BRANCH_INVERT 1u
#define BRANCH_LESS 2u
#define BRANCH_SIGNED 4u
#define BRANCH_RETURNS 8u // a JALR that is expected to lead to operand 2 plus the immediate

// JALR details: it ends the trace only because it is not known where it leads.
#define JALR_OPEN 1u

// How a trace ends, in bits 1:0 of where it goes on: before the lane at which it is left, behind it, or
// before it and something has to be done there first; both bits: a jump to no word, before it too. In
// TraceLane::at END_BEHIND marks the last lane of a trace that has no lane for what follows.
#define END_BEFORE 0u
#define END_BEHIND 1u
#define END_STEP 2u

// A lane marks its level in the byte that says what its round has to do: bit 8 * byte + level.
#define MARK_LOAD 0u
#define MARK_STORE 8u
#define MARK_OTHER 16u
#define MARK_BRANCH 24u
#define MARK_NONE 23u

// One lane of a trace. What every trace needs of every lane is where one instruction gets at it: a byte of
// its own, the uppermost bits, or a mask made of a byte's sign. Operands are registers (or the address of the
// page), or lanes that make them.
//   op     2:0 class           5:3 level        6 what follows is in the index of the lane's page, at imm
//          13:8 operand 1      28 a lane makes it
//          21:16 operand 2     29 a lane makes it
//          of operations  7 operand 2 is taken away   27:24 number of one that is not simple   31:30 factor
//          of accesses    25:24 bytes - 1             30 signed
//          of branches    7 signed                    30 inverted   24 a JALR, see BRANCH_RETURNS
//                         27:25 how much is known against the way that it is expected to go
//          of JALRs       24 see JALR_OPEN
//   imm    immediate; of jumps, branches and T_EXIT the target relative to the lane's page: FRAME_BYTES for a
//          T_EXIT that leads to another page; of T_SLOW the instruction
//   at     1:0 how it ends if this is the lane behind the last one; the rest: where the instruction is,
//          relative to the page of the trace's start
//   more   0 on another page than the trace's start   1 of lane 0: the trace is in use   6:2 rd
//          7 of operations: a | b counts, not a & b; of accesses: of less than a word; of branches: less, not
//          same 21:10 text of the page   26:22 mark 31:27 lanes to the next one that writes rd: 0 if rd is
//          x0, to lane 31 if there is none
struct alignas(16) TraceLane {
    u32 op, imm, at, more;
};
#define LANE_LEADS 0x40u
#define LANE_MADE_1 (1u << 28)
#define LANE_MADE_2 (1u << 29)
#define LANE_SIGNED (1u << 30)
#define LANE_INVERTED (1u << 30)
#define LANE_RETURNS (1u << 24)
#define LANE_OPEN (1u << 24)
#define LANE_DOUBT_SHIFT 25u
#define LANE_DOUBT_MOST 7u
#define LANE_DOUBT_ONE (1u << LANE_DOUBT_SHIFT)
#define LANE_DOUBT (LANE_DOUBT_MOST << LANE_DOUBT_SHIFT)
// Of a branch that is new in a trace: nothing was known of it, or something; and of one that was turned.
#define DOUBT_UNKNOWN 7u
#define DOUBT_KNOWN 4u
#define DOUBT_TURNED 2u
#define LANE_ELSEWHERE 1u
#define LANE_USED 2u
#define LANE_TEXT_SHIFT 10u
#define LANE_TEXT_MASK ((TEXTS_MOST - 1) << LANE_TEXT_SHIFT)
static_assert(TEXTS_MOST == 1u << (22 - LANE_TEXT_SHIFT), "TraceLane::more");
// An operand that a lane makes, as the maker names it.
#define OPERAND_MADE 64u

FN TraceLane load_lane(u64 address) {
    TraceLane t;
#if MACHINE_GPU
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(t.op), "=r"(t.imm), "=r"(t.at), "=r"(t.more)
                 : "l"(address)
                 : "memory");
#else
    t = *(const TraceLane *)(uintptr_t)address;
#endif
    return t;
}

// Where a lane's part of a trace is.
FN u64 lane_place(u64 traces, u32 trace, u32 member) {
    return traces + (u64)(trace * VM_LANES + member) * (u32)sizeof(TraceLane);
}

// Decoded code of one page.
struct Text {
    u32 words[TEXT_WORDS]; // what the page said
    u32 index[TEXT_WORDS]; // trace that starts there plus one, 0 for none yet, or BUSY
    // What was last learned of the branch there: 0 way to go, 1 it is known. 7: the trace that starts there
    // is being made again.
    u8 hints[TEXT_WORDS];
    u32 targets[TEXT_WORDS]; // where the JALR there has led, relative to its page; 0: not known
    u8 remade[TEXT_WORDS];   // how often the trace that starts there was made again, see REMADE_FREE
};
#define HINT_TAKEN 1u
#define HINT_KNOWN 2u
// So often a trace is made again as soon as there is reason to; then more and more seldom, half as often each
// time.
#define REMADE_FREE 8u
#define REMADE_MOST 24u
#define HINT_CLAIMED 0x80u

static_assert(TEXT_BYTES % (1u << LANE_TEXT_SHIFT) == 0, "a text's place is a multiple of TraceLane::more");
static_assert(sizeof(Text) == TEXT_BYTES && sizeof(TraceLane) * 32 == TRACE_BYTES, "see abi.rs");
static_assert(sizeof(VmSlot) == 8 * (DATA_ENTRIES + FETCH_ENTRIES) + VM_SLOT_BYTES, "see abi.rs");

FN Text *text_at(const Pool *pool, u32 text) { return (Text *)(uintptr_t)pool->text_ptr + text; }
FN TraceLane *trace_at(const Pool *pool, u32 trace) {
    return (TraceLane *)(uintptr_t)pool->trace_ptr + (u64)trace * VM_LANES;
}

FN u32 *hint_word(Text *text, u32 word) { return (u32 *)text->hints + word / 4; }
// Whether this warp is to make the trace there again.
FN bool text_claim(Text *text, u32 word) {
    u32 bit = HINT_CLAIMED << 8 * (word % 4);
    return !(atomic_or(hint_word(text, word), bit) & bit);
}
FN void text_release(Text *text, u32 word) {
    atomic_and(hint_word(text, word), ~(HINT_CLAIMED << 8 * (word % 4)));
}

// What the word says once the warp that makes it has finished. That warp runs, and waits for nobody.
FN u32 wait_for(const u32 *word, u32 seen) {
    while (seen == BUSY) {
        back_off();
        seen = read_through(word);
    }
    return seen;
}

// An instruction as the trace's maker wants it: class 2:0, detail 10:3, rd 16:11 (32: none), rs1 22:17 (32:
// the address of its page), rs2 27:23; hints 29:28; immediate 63:32. Targets are relative to the page.
struct TraceKinds {
    u16 of[OP_COUNT]; // class and detail
    MAKES_TABLE void set(u32 op, u32 kind, u32 detail) { of[op] = (u16)(kind | detail << 3); }
    MAKES_TABLE TraceKinds() : of() {
        for (u32 op = 0; op < OP_COUNT; op++) set(op, T_SLOW, 0);
        // clang-format off
#define ALU(name) set(OP_##name, T_ALU, A_##name);
        ALU(ADD) ALU(SUB) ALU(AND) ALU(OR) ALU(XOR) ALU(SLT) ALU(SLTU) ALU(SLL) ALU(SRL) ALU(SRA)
        ALU(MUL) ALU(MULH) ALU(MULHSU) ALU(MULHU) ALU(DIV) ALU(DIVU) ALU(REM) ALU(REMU)
#undef ALU
#define ALU_IMM(name, detail) set(OP_##name, T_ALU, detail);
        ALU_IMM(ADDI, A_ADD) ALU_IMM(ANDI, A_AND) ALU_IMM(ORI, A_OR) ALU_IMM(XORI, A_XOR)
        ALU_IMM(SLTI, A_SLT) ALU_IMM(SLTIU, A_SLTU) ALU_IMM(SLLI, A_SLL) ALU_IMM(SRLI, A_SRL)
        ALU_IMM(SRAI, A_SRA) ALU_IMM(LI, A_ADD) ALU_IMM(AUIPC, A_ADD)
        ALU_IMM(FENCE, A_ADD) ALU_IMM(FENCE_I, A_ADD) // to no register
#undef ALU_IMM
                                                   // clang-format on
                                                   // accesses: bits 1:0 log2 of the size, bit 2 signed
            set(OP_LB, T_LOAD, 0 | 4),
            set(OP_LH, T_LOAD, 1 | 4), set(OP_LW, T_LOAD, 2);
        set(OP_LBU, T_LOAD, 0), set(OP_LHU, T_LOAD, 1);
        set(OP_SB, T_STORE, 0), set(OP_SH, T_STORE, 1), set(OP_SW, T_STORE, 2);
        // branches leave if they are taken
        const u32 less = BRANCH_LESS, below = BRANCH_LESS | BRANCH_SIGNED;
        const u32 branches[6] = {0, BRANCH_INVERT, below, below | BRANCH_INVERT, less, less | BRANCH_INVERT};
        for (u32 i = 0; i < 6; i++) {
            set(OP_BEQ + i, T_BRANCH, branches[i]);
            set(OP_BEQ_FAR + i, T_BRANCH, branches[i]);
        }
        set(OP_JAL, T_JUMP, 0), set(OP_JAL_FAR, T_JUMP, 0), set(OP_JALR, T_JALR, 0);
    }
};
static_assert(OP_BGEU - OP_BEQ == 5 && OP_BGEU_FAR - OP_BEQ_FAR == 5, "BEQ, BNE, BLT, BGE, BLTU, BGEU");
TABLE TraceKinds trace_kinds;

FN u64 trace_encode(u32 insn, u32 offset, u32 hints) {
    Uop u = decode(insn, offset);
    u32 low = trace_kinds.of[u.op], kind = low & 7, imm = u.imm;
    if (kind == T_BRANCH || kind == T_JUMP) {
        imm += offset;
        if (imm & 3) low = T_SLOW; // it traps, if it is taken
    }
    u32 rs1 = u.op == OP_AUIPC ? PAGE_SLOT : u.rs1;
    return (u64)(low | u.rd << 11 | rs1 << 17 | u.rs2 << 23 | (hints & 3) << 28) | (u64)imm << 32;
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

// What the maker knows of a register: exact value 6:0 and base 14:8 (register, or OPERAND_MADE | lane),
// levels on which they can be used 19:16 and 23:20. The register's value is its base plus an offset.
FN u32 register_known(u32 exact, u32 exact_level, u32 base, u32 base_level) {
    return exact | base << 8 | exact_level << 16 | base_level << 20;
}
struct TraceOperand {
    u32 name, level, offset;
};
// The operand for an instruction that adds a constant anyway (`sums`), or not.
FN TraceOperand operand_of(u32 known, u32 offset, bool sums) {
    TraceOperand o;
    bool base = sums || offset == 0;
    o.name = (base ? known >> 8 : known) & 0x7f;
    o.level = (base ? known >> 20 : known >> 16) & 15;
    o.offset = sums ? offset : 0;
    return o;
}

FN void hint_set(Text *text, u32 word, bool taken) {
    u32 at = 8 * (word % 4);
    atomic_or(hint_word(text, word), (HINT_KNOWN | HINT_TAKEN) << at);
    if (!taken) atomic_and(hint_word(text, word), ~(HINT_TAKEN << at));
}

// What a new trace takes the place of: what the index says, 0 for none; how many of its lanes go the same way
// again, but for the last of them, if `turns`: a branch that goes the other way, or a JALR that leads to
// `to`.
struct TraceBefore {
    u32 entry, lanes, turns, to;
};
#define TRACE_NEW (TraceBefore{0, 0, 0, 0})

// Makes the trace that starts at `pc`; all lanes. BUSY if there is no room for another. Where the index has a
// trace, other warps go on with it meanwhile.
SLOW u32 trace_make(const VmSlot *slot, u32 text, u32 pc, u32 mode, TraceBefore before) {
    const u32 old = before.entry;
    Pool *pool = slot->pool;
    Vm *vm = slot->vm;
    Text *t = text_at(pool, text);
    u32 start = pc / 4 % TEXT_WORDS;
    u32 lane = warp_lane(), seen = 0, number = 0;
    if (lane == 0) {
        if (old == 0) seen = atomic_compare_swap(&t->index[start], 0, BUSY);
        if (seen == 0) {
            u32 made = vm->ram.traces_made;
            number = BUSY;
            if (made < TRACES_PER_VM || made < TRACES_PER_VM + (vm->hart.steps >> 10))
                number = atomic_add(&pool->trace_count, 1);
            if (number >= pool->trace_capacity) {
                // The count stays just above the capacity: it is seen to be full, and does not run over.
                if (number != BUSY) atomic_add(&pool->trace_count, ~0u);
                if (old == 0) atomic_swap(&t->index[start], 0);
                number = BUSY;
            } else {
                vm->ram.traces_made = made + 1;
            }
        } else {
            number = wait_for(&t->index[start], seen) - 1; // 0 - 1: BUSY
        }
    }
    number = warp_shuffle(number, 0), seen = warp_shuffle(seen, 0);
    warp_sync();
    if (seen || number == BUSY) return number;

    // Where the path has come to: text, page relative to the first one, word.
    const Text *here_text = t;
    u32 here_number = text, here_page = 0, at = start;
    u32 window = ~0u, length = 0;
    u64 decoded = 0, mine = 0;
    u32 my_level = 0, my_operands = 0, my_at = 0, my_text = text, my_next = 31, my_rd = 0;
    u32 known = register_known(lane, 0, lane, 0), known_offset = 0; // of register `lane`
    u32 writer = ~0u;                                               // likewise: who wrote it last
    u32 end_class = T_EXIT;
    bool any_store = false, any_decided = false; // accesses and branches so far
    bool left = false;                           // the last instruction is a jump that ends it
    TraceLane was = {0, 0, 0, 0};
    if (old) was = load_lane((u64)(uintptr_t)(trace_at(pool, old - 1) + lane % VM_LANES));
    u32 my_doubt = 0;
    for (;;) {
        if (length == TRACE_LENGTH) break;
        if (at >= TEXT_WORDS) { // at the next page, or behind a jump to another one
            u32 there = here_page + (at & ~(TEXT_WORDS - 1)) * 4, va = PAGE_OF(pc) + there;
            FetchEntry fetch = slot->fetch[va / FRAME_BYTES % FETCH_ENTRIES];
            if (length == 0 || fetch.tag != (va | mode)) break;
            here_page = there, here_number = fetch.text, here_text = text_at(pool, fetch.text);
            at %= TEXT_WORDS, window = ~0u;
        }
        if ((at & ~31u) != window) {
            window = at & ~31u;
            u32 word = window + lane;
            decoded =
                trace_encode(here_text->words[word], 4 * word, *(volatile const u8 *)&here_text->hints[word]);
        }
        u64 word = warp_shuffle(decoded, at & 31);
        u32 low = (u32)word, imm = (u32)(word >> 32);
        u32 kind = low & 7, detail = low >> 3 & 0xff, rd = low >> 11 & 63, rs1 = low >> 17 & 63;
        u32 rs2 = low >> 23 & 31, hints = low >> 28;
        if (kind == T_SLOW) {
            end_class = T_SLOW;
            break;
        }
        // operands, and who makes them
        u32 known1 = warp_shuffle(known, rs1 & 31), known2 = warp_shuffle(known, rs2);
        u32 offset1 = warp_shuffle(known_offset, rs1 & 31), offset2 = warp_shuffle(known_offset, rs2);
        if (rs1 == PAGE_SLOT) known1 = register_known(PAGE_SLOT, 0, PAGE_SLOT, 0), offset1 = here_page;
        bool accesses = kind == T_LOAD || kind == T_STORE;
        bool sums = kind == T_ALU && !(detail & ~A_MINUS), minus = detail & A_MINUS;
        // A JALR that leads where no instruction of the trace says, but perhaps where it has led before.
        bool open =
            kind == T_JALR && imm == 0 && (known1 >> 8 & 0x7f) != PAGE_SLOT && length + 1 < TRACE_LENGTH;
        u32 to = 0, doubt = 0, was_op = 0, was_imm = 0;
        bool again = false, turned = false; // as it was, or not as it was
        if (kind == T_BRANCH || open) {
            was_op = warp_shuffle(was.op, length), was_imm = warp_shuffle(was.imm, length);
            bool same = length < before.lanes && (warp_shuffle(was.at, length) & ~3u) == here_page + 4 * at;
            turned = same && before.turns && length + 1 == before.lanes;
            again = same && !turned && (was_op & 7) == T_BRANCH;
            doubt = again    ? was_op >> LANE_DOUBT_SHIFT & LANE_DOUBT_MOST
                    : turned ? DOUBT_TURNED
                             : DOUBT_KNOWN;
        }
        if (open) {
            to = again ? was_imm - here_page : before.to;
            if (!again && !turned) to = warp_shuffle(read_through(&here_text->targets[at]), 0);
            u32 va = PAGE_OF(pc) + here_page + PAGE_OF(to);
            if (PAGE_OF(to) && slot->fetch[va / FRAME_BYTES % FETCH_ENTRIES].tag != (va | mode)) to = 0;
        }
        bool returns = to;
        if (kind == T_JALR) detail = open ? JALR_OPEN : 0;
        TraceOperand one = operand_of(known1, offset1, accesses || sums || (kind == T_JALR && !returns));
        TraceOperand two = operand_of(known2, offset2, kind == T_ALU);
        if (kind == T_ALU && !minus) imm += one.offset + two.offset;
        if (kind == T_ALU && minus) imm += two.offset - one.offset;
        if (accesses || (kind == T_JALR && !returns)) imm += one.offset;
        u32 level = one.level > two.level ? one.level : two.level;
        if (kind == T_LOAD ? any_store : kind == T_STORE && any_decided) {
            u32 behind = lane < length ? level_behind(mine, my_operands & 127, my_level, kind, one.name, imm,
                                                      1u << (detail & 3))
                                       : 0;
            behind = warp_max(behind);
            if (behind > level) level = behind;
        }
        if (level >= TRACE_LEVELS) break;
        any_store |= kind == T_STORE, any_decided |= accesses || kind == T_BRANCH;

        // where it is expected to go on
        u32 here = at;
        bool last = length + 1 == TRACE_LENGTH && VM_LANES < 32, follows = false;
        at++;
        if (kind == T_BRANCH) {
            bool taken = hints & HINT_KNOWN ? hints & HINT_TAKEN : imm < 4 * here;
            // One that leads to the next instruction is taken for taken: that makes no difference.
            if (again || turned) taken = (was_imm == 4 * here + 4) != turned;
            if (!again && !turned && !(hints & HINT_KNOWN)) doubt = DOUBT_UNKNOWN;
            if (taken && !last) { // left if it is not taken
                at = (i32)imm >> 2;
                imm = 4 * here + 4, detail ^= BRANCH_INVERT;
            }
        } else if (kind == T_JUMP) {
            follows = !last;
            if (follows) at = (i32)imm >> 2;
        } else if (returns) {
            at = (i32)to >> 2, any_decided = true;
            kind = T_BRANCH, detail = BRANCH_RETURNS | BRANCH_INVERT, imm = here_page + to,
            two.name = PAGE_SLOT;
        } else if (kind == T_JALR) {
            // Back to where the trace itself has come from, for one.
            follows = !last && one.name == PAGE_SLOT && !(imm & 2);
            if (follows) at = (i32)((imm & ~1u) - here_page) >> 2;
        }
        bool leads_on = at < TEXT_WORDS;
        if (!leads_on && (kind == T_JUMP || kind == T_JALR)) {
            // Only if the page is at hand: else the jump itself ends the trace.
            u32 va = PAGE_OF(pc) + here_page + 4 * (at & ~(TEXT_WORDS - 1));
            follows &= slot->fetch[va / FRAME_BYTES % FETCH_ENTRIES].tag == (va | mode);
        }
        if (follows) { // what is left of it is its link
            kind = T_ALU, detail = A_ADD, imm = here_page + 4 * here + 4;
            one.name = PAGE_SLOT, two.name = 0, level = 0, sums = true, minus = false;
        }
        left = kind == T_JUMP || kind == T_JALR;
        if (lane == length) {
            mine = (u64)(kind | detail << 3) | (u64)imm << 32;
            my_level = level, my_operands = one.name | two.name << 7, my_at = here_page + 4 * here;
            my_text = here_number, my_rd = rd & 31, my_doubt = doubt << LANE_DOUBT_SHIFT;
            if (rd == SINK) my_next = lane;
        }
        u32 earlier = warp_shuffle(writer, rd & 31);
        if (rd != SINK && lane == earlier) my_next = length;
        if (lane == rd) {
            writer = length;
            u32 made = OPERAND_MADE | length, base = made, base_level = level + 1;
            known_offset = 0;
            if (kind == T_ALU && sums && !minus && (two.name == 0 || one.name == 0)) {
                base = two.name == 0 ? one.name : two.name, base_level = level;
                known_offset = imm;
            }
            known = register_known(made, level + 1, base, base_level);
        }
        length++;
        if (left) break;
    }
    TraceLane out;
    u32 low = (u32)mine, ends = END_BEFORE, mark = MARK_NONE, less = 0;
    out.imm = (u32)(mine >> 32);
    if (lane >= length) { // nothing, or what follows
        bool end = lane == length && !left;
        low = end ? end_class : T_ALU | A_ADD << 3;
        bool near = at < TEXT_WORDS;
        out.imm = !end ? 0 : near ? 4 * at : FRAME_BYTES;
        if (low == T_SLOW) out.imm = here_text->words[at % TEXT_WORDS];
        my_at = here_page + 4 * at, my_level = 0, my_operands = 0, my_next = lane;
        my_text = near ? here_number : text;
        if (low == T_SLOW) ends = END_STEP;
    } else if (lane + 1 == length && length == VM_LANES && !left) {
        ends = END_BEHIND;
    }
    bool elsewhere = my_at >= FRAME_BYTES && (lane < length || (lane == length && !left && at < TEXT_WORDS));
    u32 kind = low & 7, detail = low >> 3 & 0xff;
    bool leads = kind == T_BRANCH || kind == T_JUMP || kind == T_EXIT;
    if (kind == T_BRANCH && (detail & BRANCH_RETURNS)) leads = false;
    leads = ends == END_BEHIND ? my_at % FRAME_BYTES + 4 < FRAME_BYTES : leads && out.imm < FRAME_BYTES;
    out.op = kind | my_level << 3 | (leads ? LANE_LEADS : 0) | (my_operands & 63) << 8 |
             (my_operands >> 7 & 63) << 16 | (my_operands & OPERAND_MADE ? LANE_MADE_1 : 0) |
             (my_operands >> 7 & OPERAND_MADE ? LANE_MADE_2 : 0);
    if (kind == T_ALU) {
        out.op |= (detail & 15) << 24 | (detail & A_MINUS ? 1u << 7 : 0) | (detail >> 5 & 3) << 30;
        less = detail & A_EITHER;
        if (detail & 15) mark = MARK_OTHER + my_level;
    } else if (kind == T_LOAD || kind == T_STORE) {
        u32 rest = (1u << (detail & 3)) - 1; // bytes - 1
        out.op |= rest << 24 | (detail & 4 ? LANE_SIGNED : 0);
        less = rest < 3;
        mark = (kind == T_LOAD ? MARK_LOAD : MARK_STORE) + my_level;
    } else if (kind == T_BRANCH) {
        out.op |= (detail & BRANCH_SIGNED ? 1u << 7 : 0) | (detail & BRANCH_INVERT ? LANE_INVERTED : 0) |
                  (detail & BRANCH_RETURNS ? LANE_RETURNS : 0) | my_doubt;
        less = detail & BRANCH_LESS;
        mark = MARK_BRANCH + my_level;
    }
    if (kind == T_JALR && (detail & JALR_OPEN)) out.op |= LANE_OPEN;
    out.at = my_at | ends;
    out.more = (elsewhere ? LANE_ELSEWHERE : 0) | my_rd << 2 | (less ? 1u << 7 : 0) |
               my_text << LANE_TEXT_SHIFT | mark << 22 | (my_next - lane) << 27;
    if (lane < VM_LANES) trace_at(pool, number)[lane] = out;
    publish_fence();
    warp_sync();
    if (lane == 0) {
        if (old == 0)
            *(volatile u32 *)&t->index[start] = number + 1;
        else
            atomic_compare_swap(&t->index[start], old, number + 1);
    }
    return number;
}

// The text of a frame that has none yet, found by its words or made; all lanes. NO_TEXT if there is no room
// for another, or this VM has made its share.
SLOW u32 text_find(Pool *pool, Vm *vm, u32 frame) {
    u32 lane = warp_lane();
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
            for (u32 i = lane; i < TEXT_WORDS; i += 32)
                t->words[i] = words[i], t->index[i] = 0, t->hints[i] = t->remade[i] = 0, t->targets[i] = 0;
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
    if (text != NO_TEXT && lane == 0) ((u32 *)(uintptr_t)pool->code_of_ptr)[frame] = text + 1;
    warp_sync();
    return text;
}
