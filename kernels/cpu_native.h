// Native code for hot code: regions of up to 64 instructions, from where a jump has often led, become x86-64
// code.
//
// Native code has the handlers' calling convention and is one more handler: the micro-op where a region may
// be entered gets the code OP_NATIVE, and nothing else of it changes. In a region `at` stays that of the
// region's first micro-op; `count` changes as in the handlers. Whatever is not common leaves the region: it
// sets `at` to the micro-op and jumps to its handler, which starts over. So the meaning of such operations
// stays in one place.
//
// Guest registers live in memory; up to three host registers hold what was read or written last.
#pragma once
#include "cpu_decode.h"
#include "cpu_tlb.h"
#include "cpu_x86.h"

// Where native code lies, for all engines of a fleet: the host maps it twice, for writing and for running.
// First comes that of shared frames, then a part for each VM.
struct NativeCode {
    u8 *write;
    const u8 *run;
    u64 shared_bytes, shared_used;
    u32 *entries; // by position in the code pages: where in the code the micro-op's region is entered
    u32 *vm_used; // of each VM's part
    u32 vm_bytes;
    u32 warm_up; // jumps to an instruction before it becomes native; 0: never
};

namespace {

#if defined(__x86_64__) && !defined(_WIN32)
#define HAS_NATIVE 1

class NativeWriter : public X86Code {
  public:
    static constexpr u32 REGION = 64;
    static_assert(BYTES >= REGION * 256, "no instruction needs more, with its exits");

    // Compiles from the micro-op at `index` of its page, whose instructions are `words`. False: nothing to
    // gain.
    bool compile(const u32 *words, u32 index, const Uop *first, u64 entries_base, u64 run_base) {
        at = first, entries_at = entries_base, run_at = run_base;
        sweep(words, index);
        if (leaves(0)) return false;
        for (u32 k = 0; k < length;) k += instruction(k);
        if (runs_on(length - 1)) go_outside((i32)length, false);
        for (u32 i = 0; i < exits; i++) write_exit(exit_of[i]);
        for (u32 i = 0; i < exacts; i++) {
            u32 here = size - (exact_at[i] + 4);
            __builtin_memcpy(code + exact_at[i], &here, 4);
            set_at(exact_to[i]);
            to_handler(OP_TO_EXACT);
        }
        for (u32 k = 1; k < length; k++) {
            if (!is_entry(k)) continue;
            entry_at[k] = size;
            set_at(-(i32)k);
            jump_to(k);
        }
        for (u32 i = 0; i < fixups; i++) {
            u32 to = label[fixup_to[i]] - (fixup_at[i] + 4);
            __builtin_memcpy(code + fixup_at[i], &to, 4);
        }
        return true;
    }

    // Once it is known where the code will lie, `start` in all native code, and where in that others are
    // entered.
    void link(u32 start, const u32 *entries) {
        for (u32 i = 0; i < outsides; i++) {
            u32 to = entries[outside_to[i]] - (start + outside_at[i] + 4);
            __builtin_memcpy(code + outside_at[i], &to, 4);
        }
    }

    u32 length = 0;
    Uop uops[REGION];
    u32 entry_at[REGION]; // where code for entering at a micro-op begins
    bool is_entry(u32 k) const { return k == 0 || (entries >> k & 1); }

  private:
    enum ExitKind : u8 { TO_HANDLER, TO_LABEL, TO_LIMIT, TO_COUNTED };
    struct Exit {
        ExitKind kind;
        u32 k, jump_at; // the micro-op; the jump's displacement
    };
    static constexpr u32 NO_GUEST = 64;

    u64 targets = 0, entries = 0; // a bit for each micro-op
    u32 label[REGION];
    Exit exit_of[3 * REGION];
    const Uop *at;
    u64 entries_at, run_at;
    u32 exits = 0, fixups = 0, outsides = 0, exacts = 0;
    u32 outside_at[REGION + 1], exact_at[REGION];
    i32 outside_to[REGION + 1], exact_to[REGION];
    u32 fixup_at[4 * REGION], fixup_to[4 * REGION];
    u32 held[3] = {NO_GUEST, NO_GUEST, NO_GUEST}; // the guest's register in rax, r10, r11
    u32 victim = 0;

    static constexpr Register HOST[3] = {RAX, R10, R11};

    // -- What is compiled

    static bool is_branch_near(u32 op) {
        return (op >= OP_BEQ && op <= OP_BGEU) || (op >= OP_BEQ_BACK && op <= OP_BGEU_BACK);
    }
    static bool is_branch_far(u32 op) { return op >= OP_BEQ_FAR && op <= OP_BGEU_FAR; }
    static bool is_word(u32 op) { return op == OP_LW || op == OP_SW; }
    bool jumps_near(u32 k) const { return uops[k].op == OP_JAL || uops[k].op == OP_JAL_BACK; }
    // Where a jump within the page leads, in micro-ops from the region's first.
    i32 target(u32 k) const { return (i32)k + ((i32)uops[k].imm >> 2); }
    bool inside(u32 k) const { return target(k) >= 0 && target(k) < (i32)length; }

    // Whether control always leaves the region here, to the handler.
    bool leaves(u32 k) const {
        u32 op = uops[k].op;
        return op <= OP_ILLEGAL || (op >= OP_DIV && op <= OP_REMU) || op == OP_JAL_FAR || op == OP_JALR ||
               (op >= OP_LR && op <= OP_SYSTEM) || op == OP_SSTATUS;
    }
    // Whether control never comes to the next instruction from here.
    bool ends(u32 k) const {
        u32 op = uops[k].op;
        bool jump = jumps_near(k) || op == OP_JAL_FAR || op == OP_JALR;
        return op <= OP_ILLEGAL || (jump && uops[k].rd == SINK);
    }
    bool runs_on(u32 k) const { return !ends(k) && !leaves(k) && !jumps_near(k); }

    void sweep(const u32 *words, u32 index) {
        u32 reach = 0; // the furthest target of a jump forward so far
        for (u32 k = 0; k < REGION && index + k < 1024; k++) {
            Uop u = unpacked(__atomic_load_n((const u64 *)(at + k), __ATOMIC_ACQUIRE));
            if (k && u.op == OP_NATIVE) break; // it has its code
            u.op = PAIR.first[u.op];
            if (u.op == OP_NATIVE) u = unpacked(decode_single(words[index + k], 4 * (index + k)));
            uops[k] = u;
            length = k + 1;
            if (u.op >= OP_BEQ && u.op <= OP_JAL && u.rd == SINK && (u32)target(k) > reach)
                reach = (u32)target(k);
            if (ends(k) && reach <= k) break;
        }
        for (u32 k = 0; k < length; k++) {
            u32 op = uops[k].op;
            if ((is_branch_near(op) || jumps_near(k)) && inside(k)) {
                targets |= 1ull << target(k);
                if (target(k) <= (i32)k && !leaves((u32)target(k))) entries |= 1ull << target(k);
            }
            // Here control comes back.
            if (!runs_on(k) && !ends(k) && k + 1 < length && !leaves(k + 1)) entries |= 2ull << k;
        }
    }

    // -- Bytes

    void lea(u32 reg, i32 displacement) { // 64 bits, of itself
        if (displacement) memory(0x8d, reg, reg, displacement, true);
    }
    void set_at(i32 k) { lea(RSI, 8 * k); }
    void jump_to(u32 k) {
        bytes(0xe9, 1);
        fix(k);
    }
    void fix(u32 k) {
        fixup_at[fixups] = size, fixup_to[fixups++] = k;
        size += 4;
    }
    void jump_if(u32 condition, ExitKind kind, u32 k) {
        bytes(0x800f | condition << 8, 2);
        exit_of[exits++] = {kind, k, size};
        size += 4;
    }
    void to_handler(u32 op) { bytes(0xa1ff41 | (u64)(8 * op) << 24, 7); } // jmp [r9 + 8 * op]
    // To the micro-op at k, outside the region: to its native code, if it has any.
    void go_outside(i32 k, bool by_jump) {
        set_at(k);
        if (at[k].op == OP_NATIVE) {
            bytes(0xe9, 1);
            outside_at[outsides] = size, outside_to[outsides++] = k;
            size += 4;
        } else if (by_jump) {
            to_handler(OP_TO_COUNTED);
        } else {
            bytes(0x06b60f, 3);   // movzx eax, byte [rsi]
            bytes(0xc124ff41, 4); // jmp [r9 + 8 * rax]
        }
    }

    void write_exit(Exit e) {
        u32 here = size - (e.jump_at + 4);
        __builtin_memcpy(code + e.jump_at, &here, 4);
        if (e.kind == TO_HANDLER) {
            set_at((i32)e.k);
            to_handler(uops[e.k].op);
        } else if (e.kind == TO_LABEL) {
            jump(e.k);
        } else {
            to_handler(e.kind == TO_LIMIT ? OP_TO_EXACT : OP_TO_COUNTED);
        }
    }
    // Takes the jump at k, whose target is in the page.
    void jump(u32 k) {
        i32 to = target(k);
        lea(RDX, 1 - (to - (i32)k));
        if (to <= (i32)k) { // compares with the limit, as the handlers do
            registers(0x8b, RAX, RSI, true);
            shift(5, RAX, 3, true);
            registers(0x03, RAX, RDX, true);
            immediate(7, RAX, (u32)(-WINDOW - to), true);
            bytes(0x8f0f, 2); // jg
            exact_at[exacts] = size, exact_to[exacts++] = to;
            size += 4;
        }
        if (inside(k))
            jump_to((u32)to);
        else
            go_outside(to, true);
    }

    // -- The guest's registers

    Register find(u32 guest) const {
        for (u32 i = 0; i < 3; i++)
            if (held[i] == guest) return HOST[i];
        return NO_REGISTER;
    }
    static u32 slot(Register r) { return r == RAX ? 0 : r == R10 ? 1 : 2; }
    void forget() { held[0] = held[1] = held[2] = NO_GUEST; }
    // A host register for a new value, other than `kept`.
    Register take(Register kept = NO_REGISTER) {
        for (u32 i = 0; i < 3; i++)
            if (held[i] == NO_GUEST && HOST[i] != kept) return HOST[i];
        do victim = (victim + 1) % 3;
        while (HOST[victim] == kept);
        held[victim] = NO_GUEST;
        return HOST[victim];
    }
    void operate(u32 op, Register reg, u32 guest) { // op reg, the guest's register
        Register other = find(guest);
        if (other != NO_REGISTER)
            registers(op, reg, other);
        else
            memory(op, reg, RDI, 4 * (i32)guest);
    }
    void write(u32 guest, Register reg) {
        if (guest == SINK) return;
        for (u32 &h : held)
            if (h == guest) h = NO_GUEST;
        held[slot(reg)] = guest;
        memory(0x89, reg, RDI, 4 * (i32)guest);
    }
    Register value(u32 guest) {
        Register r = find(guest);
        if (r != NO_REGISTER) return r;
        r = take();
        memory(0x8b, r, RDI, 4 * (i32)guest);
        held[slot(r)] = guest;
        return r;
    }

    // -- Instructions

    // Writes the code of the instruction at k, or of a run of words from there; returns how many those are.
    u32 instruction(u32 k) {
        const Uop &u = uops[k];
        bool is_label = (targets | entries) >> k & 1;
        if (is_label) forget();
        label[k] = size;
        // What has never been reached is not compiled: it leads to its decoding.
        if (u.op == OP_DECODE && k && uops[k - 1].op == OP_DECODE && !is_label) return 1;
        if (u.op == OP_JALR || u.op == OP_JAL_FAR) {
            far_jump(k);
            return 1;
        }
        if (leaves(k)) {
            set_at((i32)k);
            to_handler(u.op);
            return 1;
        }
        if (jumps_near(k)) {
            if (u.rd != SINK) link_register(k, RAX);
            jump(k);
        } else if (is_branch_near(u.op) || is_branch_far(u.op)) {
            branch(k);
        } else if (u.op >= OP_LB && u.op <= OP_SW) {
            return access(k);
        } else if (u.op == OP_LI) {
            if (u.rd == SINK) return 1;
            Register r = take();
            bytes(rex(0, r) | 0xb800u | (r & 7) << 8 | (u64)u.imm << 16, 6);
            write(u.rd, r);
        } else if (u.op == OP_AUIPC) {
            Register r = take();
            registers(0x8b, r, RSI, true); // mov r, rsi
            shift(5, r, 1, true);
            registers(0x03, r, 1); // add r, ecx
            immediate(4, r, PAGE_MASK);
            immediate(0, r, u.imm);
            write(u.rd, r);
        } else if (u.op >= OP_ADDI && u.op <= OP_ANDI) {
            operation_immediate(u);
        } else if (u.op >= OP_ADD && u.op <= OP_MULHU) {
            operation(u);
        } // else FENCE, FENCE_I: nothing to do
        return 1;
    }

    void branch(u32 k) {
        static constexpr u8 CONDITION[6] = {4, 5, 0xc, 0xd, 2, 3}; // je, jne, jl, jge, jb, jae
        const Uop &u = uops[k];
        bool is_far = is_branch_far(u.op);
        u32 kind = is_far ? u.op - OP_BEQ_FAR : u.op >= OP_BEQ_BACK ? u.op - OP_BEQ_BACK : u.op - OP_BEQ;
        Register a = find(u.rs1), second = find(u.rs2);
        if (!u.rs2 && a != NO_REGISTER) {
            registers(0x85, a, a); // test
        } else if (!u.rs2) {
            memory(0x83, 7, RDI, 4 * (i32)u.rs1), bytes(0, 1); // cmp dword [], 0
        } else if (a == NO_REGISTER && second != NO_REGISTER) {
            memory(0x39, second, RDI, 4 * (i32)u.rs1);
        } else {
            operate(0x3b, value(u.rs1), u.rs2);
        }
        jump_if(CONDITION[kind], is_far ? TO_HANDLER : TO_LABEL, k);
    }

    // r = pc of the region's first instruction + `offset`
    void pc_plus(u32 offset, Register r) {
        registers(0x8b, r, RSI, true);
        shift(5, r, 1, true);
        registers(0x03, r, RCX);
        immediate(0, r, offset);
    }
    void link_register(u32 k, Register r) {
        pc_plus(4 * k + 4, r);
        memory(0x89, r, RDI, 4 * (i32)uops[k].rd);
    }

    // A jump to anywhere, as the handlers' GO_TO; to native code without a dispatch.
    void far_jump(u32 k) {
        const Uop &u = uops[k];
        if (u.op == OP_JALR) {
            Register base = find(u.rs1);
            if (base == NO_REGISTER)
                memory(0x8b, RAX, RDI, 4 * (i32)u.rs1);
            else if (base != RAX)
                registers(0x8b, RAX, base);
            if (u.imm) immediate(0, RAX, u.imm);
            immediate(4, RAX, ~1u);
        } else {
            pc_plus(4 * k + u.imm, RAX);
        }
        i32 fetch = (i32) __builtin_offsetof(Tlb, fetch);
        bytes(0x08eac141c28941, 7); // mov r10d, eax; shr r10d, 8
        immediate(4, R10, (FETCH_ENTRIES - 1) * sizeof(FetchEntry));
        registers(0x03, R10, R8, true);
        registers(0x8b, R11, RAX);
        immediate(4, R11, PAGE_MASK | 3);
        memory(0x3b, R11, R10, fetch);
        jump_if(5, TO_HANDLER, k);
        if (u.rd != SINK) link_register(k, R11);
        registers(0x8b, R11, RSI, true); // rdx: count + position(at) + 1
        shift(5, R11, 3, true);
        registers(0x03, RDX, R11, true);
        immediate(0, RDX, k + 1, true);
        registers(0x03, RAX, RAX, true);
        memory(0x03, RAX, R10, fetch + 8, true); // the new `at`
        memory(0x8b, RCX, R10, fetch + 4);
        registers(0x8b, RSI, RAX, true);
        shift(5, RAX, 3, true);
        registers(0x8b, R11, RDX, true);
        registers(0x2b, RDX, RAX, true);
        immediate(7, R11, (u32)-WINDOW, true);
        jump_if(0xf, TO_LIMIT, k);
        bytes(0x06b60f, 3); // movzx eax, byte [rsi]
        immediate(7, RAX, OP_NATIVE);
        jump_if(5, TO_COUNTED, k);
        constant(R11, entries_at);
        registers(0x8b, RAX, RSI, true);
        shift(5, RAX, 1, true);
        bytes(0x03048b41, 4); // mov eax, [r11 + rax]
        constant(R11, run_at);
        registers(0x03, RAX, R11, true);
        bytes(0xe0ff, 2); // jmp rax
    }

    // The first operand in a register that the result may have.
    Register first(u32 guest, Register kept = NO_REGISTER) {
        Register from = find(guest), r = take(kept);
        if (from == NO_REGISTER)
            memory(0x8b, r, RDI, 4 * (i32)guest);
        else if (from != r)
            registers(0x8b, r, from);
        return r;
    }
    void set_if(u32 condition, Register r) { // after a comparison: r = 0 or 1
        registers_0f(0x90 | condition, 0, r);
        registers_0f(0xb6, r, r); // movzx
    }

    void operation_immediate(const Uop &u) {
        if (u.rd == SINK) return;
        Register r;
        if (u.op == OP_SLTI || u.op == OP_SLTIU) {
            Register a = value(u.rs1);
            immediate(7, a, u.imm);
            r = take();
            set_if(u.op == OP_SLTI ? 0xc : 2, r);
            return write(u.rd, r);
        }
        Register from = find(u.rs1);
        if (u.op == OP_ADDI && from != NO_REGISTER && u.imm) {
            r = take(from);
            memory(0x8d, r, from, (i32)u.imm); // lea
            return write(u.rd, r);
        }
        r = first(u.rs1);
        switch (u.op) {
        case OP_ADDI:
            if (u.imm) immediate(0, r, u.imm);
            break;
        case OP_XORI: immediate(6, r, u.imm); break;
        case OP_ORI: immediate(1, r, u.imm); break;
        case OP_ANDI: immediate(4, r, u.imm); break;
        default: shift(u.op == OP_SLLI ? 4 : u.op == OP_SRLI ? 5 : 7, r, u.imm & 31); break;
        }
        write(u.rd, r);
    }

    void operation(const Uop &u) {
        if (u.rd == SINK) return;
        if (u.op == OP_SLL || u.op == OP_SRL || u.op == OP_SRA) {
            // by cl, which is part of delta
            forget();
            memory(0x8b, RAX, RDI, 4 * (i32)u.rs1);
            registers(0x8b, R11, 1); // mov r11d, ecx
            memory(0x8b, 1, RDI, 4 * (i32)u.rs2);
            registers(0xd3, u.op == OP_SLL ? 4 : u.op == OP_SRL ? 5 : 7, RAX);
            registers(0x8b, 1, R11);
            return write(u.rd, RAX);
        }
        if (u.op == OP_SLT || u.op == OP_SLTU) {
            operate(0x3b, value(u.rs1), u.rs2);
            Register r = take();
            set_if(u.op == OP_SLT ? 0xc : 2, r);
            return write(u.rd, r);
        }
        if (u.op >= OP_MULH) {
            // 64 bits of both, each with its own extension: mov or movsxd
            forget();
            memory(u.op == OP_MULHU ? 0x8b : 0x63, RAX, RDI, 4 * (i32)u.rs1, u.op != OP_MULHU);
            memory(u.op == OP_MULH ? 0x63 : 0x8b, R10, RDI, 4 * (i32)u.rs2, u.op == OP_MULH);
            registers_0f(0xaf, RAX, R10, true); // imul rax, r10
            shift(5, RAX, 32, true);
            return write(u.rd, RAX);
        }
        Register second = find(u.rs2), r = first(u.rs1, second);
        if (u.op == OP_MUL) {
            if (second != NO_REGISTER) {
                registers_0f(0xaf, r, second);
            } else {
                memory_0f(0xaf, r, RDI, 4 * (i32)u.rs2);
            }
        } else {
            u32 op = u.op == OP_ADD   ? 0x03
                     : u.op == OP_SUB ? 0x2b
                     : u.op == OP_XOR ? 0x33
                     : u.op == OP_OR  ? 0x0b
                                      : 0x23;
            if (second != NO_REGISTER)
                registers(op, r, second);
            else
                memory(op, r, RDI, 4 * (i32)u.rs2);
        }
        write(u.rd, r);
    }

    // A load or store, or a run of words at one base, all in one page.
    u32 access(u32 k) {
        const Uop u = uops[k];
        u32 n = 1;
        i32 low = (i32)u.imm, high = low;
        while (is_word(u.op) && k + n < length && !((targets | entries) >> (k + n) & 1)) {
            const Uop &next = uops[k + n], &last = uops[k + n - 1];
            if (next.op != u.op || next.rs1 != u.rs1 || ((next.imm ^ u.imm) & 3)) break;
            if (u.op == OP_LW && last.rd == u.rs1) break;
            if ((i32)next.imm < low) low = (i32)next.imm;
            if ((i32)next.imm > high) high = (i32)next.imm;
            n++;
        }
        bool store = u.op >= OP_SB;
        Register base = find(u.rs1);
        if (base != NO_REGISTER)
            memory(0x8d, RAX, base, low); // lea eax, [base + low]
        else {
            memory(0x8b, RAX, RDI, 4 * (i32)u.rs1);
            if (low) immediate(0, RAX, (u32)low);
        }
        if (high > low) {
            memory(0x8d, R11, RAX, high - low);
            registers(0x33, R11, RAX);
            bytes(0xc3f741 | (u64)PAGE_MASK << 24, 7); // test r11d, PAGE_MASK
            jump_if(5, TO_HANDLER, k);
        }
        bytes(0x08eac141c28941, 7); // mov r10d, eax; shr r10d, 8
        immediate(4, R10, (TLB_ENTRIES - 1) * sizeof(TlbEntry));
        bytes(0xc38941, 3); // mov r11d, eax
        immediate(4, R11, PAGE_MASK | (access_bytes(u.op) - 1));
        bytes(0x105c3b47 | (u64)(store ? 4 : 0) << 32, 5); // cmp r11d, [r8 + r10 + 0 or 4]
        jump_if(5, TO_HANDLER, k);
        bytes(0x081044034b, 5); // add rax, [r8 + r10 + 8]
        forget();
        for (u32 i = 0; i < n; i++) {
            const Uop &w = uops[k + i];
            i32 offset = (i32)w.imm - low;
            Register r = i % 2 ? R10 : R11;
            if (store) {
                if (w.rs2) {
                    memory(0x8b, r, RDI, 4 * (i32)w.rs2);
                    held[slot(r)] = w.rs2;
                } else {
                    registers(0x33, r, r);
                    held[slot(r)] = NO_GUEST;
                }
                if (w.op == OP_SH) bytes(0x66, 1);
                memory(w.op == OP_SB ? 0x88 : 0x89, r, RAX, offset);
                continue;
            }
            if (w.op == OP_LW) {
                memory(0x8b, r, RAX, offset);
            } else {
                u32 extending = w.op == OP_LB ? 0xbe : w.op == OP_LBU ? 0xb6 : w.op == OP_LH ? 0xbf : 0xb7;
                memory_0f(extending, r, RAX, offset);
            }
            held[slot(r)] = NO_GUEST;
            write(w.rd, r);
        }
        return n;
    }
};

// The entry of the micro-op at `a` is at this + a / 2.
inline u64 entries_base(const Machine &m, const NativeCode &native) {
    return (u64)(uintptr_t)native.entries - m.pool->code_ptr / 2;
}

// A place for `bytes` of code of code page `page`, or NO_PLACE.
#define NO_PLACE ~0u
inline u32 native_place(const Machine &m, NativeCode &native, u32 page, u32 bytes) {
    u32 number = m.vm->number, per_vm = m.pool->code_pages_per_vm;
    if (page - number * per_vm < per_vm) { // this VM's own, which no other engine has now
        u32 &used = native.vm_used[number], start = used;
        if (bytes > native.vm_bytes - used) return NO_PLACE;
        used += bytes;
        return (u32)native.shared_bytes + number * native.vm_bytes + start;
    }
    if (__atomic_load_n(&native.shared_used, __ATOMIC_RELAXED) + bytes > native.shared_bytes) return NO_PLACE;
    u64 start = __atomic_fetch_add(&native.shared_used, bytes, __ATOMIC_RELAXED);
    return start + bytes > native.shared_bytes ? NO_PLACE : (u32)start;
}

// Before a slice: if a VM's part is all but full, its code starts over.
inline void make_room(Machine &m, NativeCode &native) {
    u32 &used = native.vm_used[m.vm->number], per_vm = m.pool->code_pages_per_vm;
    if (native.vm_bytes - used >= NativeWriter::BYTES) return;
    for (u32 slot = 0; slot < per_vm; slot++)
        if (m.vm->ram.code_used[slot / 32] >> (slot % 32) & 1)
            code_drop(m, code_frame(m)[m.vm->number * per_vm + slot]);
    used = 0;
}

// Makes the code from `at` on native, if it can be.
__attribute__((noinline)) void make_native(const Machine &m, NativeCode &native, const Uop *at) {
    CodePlace place = place_of(m, at);
    if (place.index >= 1024 || at->op == OP_NATIVE || at->op == OP_DECODE) return;
    NativeWriter w;
    if (!w.compile(place.words, place.index, at, entries_base(m, native), (u64)(uintptr_t)native.run)) return;
    u32 start = native_place(m, native, place.page, (w.size + 15) & ~15u);
    if (start == NO_PLACE) return;
    u32 *entries = native.entries + (((u64)(uintptr_t)at - m.pool->code_ptr) >> 3);
    w.link(start, entries);
    __builtin_memcpy(native.write + start, w.code, w.size);
    for (u32 k = w.length; k-- > 0;) {
        if (!w.is_entry(k)) continue;
        __atomic_store_n(entries + k, start + (k ? w.entry_at[k] : 0), __ATOMIC_RELAXED);
        __atomic_store_n((u8 *)&at[k].op, (u8)OP_NATIVE, __ATOMIC_RELEASE);
    }
}

#else
#define HAS_NATIVE 0
#endif

} // namespace
