// The commonest of what is not for lanes, done between two traces without leaving the kernel's own function:
// atomics on pages at hand, CSRs that are words of the hart, the time, SRET and ECALLs of user mode,
// SFENCE.VMA of a page, and pages whose translation holds as it stands. All lanes do the same. Whatever is
// not simple is left to warp_serve, and nothing has happened then.
#pragma once
#include "csr.cuh"
#include "mmu.cuh"
#include "translations.cuh"

// What a VM's lanes leave behind, and what they go on with.
struct LaneState {
    u32 leave, pc, left, mode;
};

// A page of the guest as its tables have it.
struct BriefWalk {
    u32 page, entry;             // number, and entry of the frame table
    bool writes, large, outside; // outside RAM: a device's, or nobody's
};

// Translates without a change to the tables (Privileged 4.3.2): false if A or D is to be set, and for all
// else that would take a trap.
FN bool brief_walk(const Vm *vm, u64 frames, u32 va, u32 mode, u32 access, BriefWalk &walk) {
    u32 satp = load_word((u64)(uintptr_t)&vm->hart.satp), pages = load_word((u64)(uintptr_t)&vm->ram.pages);
    u64 table = vm->ram.table_ptr;
    u32 page = satp & 0x3fffff;
    if (warp_any(!(satp >> 31) | (page >= pages))) return false;
    u32 entry = load_word(table + 4 * page) & FRAME_MASK;
    u32 pte = load_word(frames + (u64)entry * FRAME_BYTES + 4 * (va >> 22));
    walk.large = pte & (PTE_R | PTE_W | PTE_X);
    if (warp_any(!walk.large)) {
        page = pte >> 10;
        if (warp_any((pte & (PTE_V | PTE_A | PTE_D | PTE_U)) != PTE_V || page >= pages)) return false;
        entry = load_word(table + 4 * page) & FRAME_MASK;
        pte = load_word(frames + (u64)entry * FRAME_BYTES + 4 * (va >> 12 & 0x3ff));
        page = pte >> 10;
    } else {
        page = (pte >> 10) + (va >> 12 & 0x3ff);
        if (warp_any(pte >> 10 & 0x3ff)) return false;
    }
    u32 needs = access == ACCESS_FETCH ? PTE_X : access == ACCESS_STORE ? PTE_R | PTE_W | PTE_D : PTE_R;
    bool user = pte & PTE_U,
         may = mode == MODE_U_KEY ? user : !user || (mode == MODE_S_SUM_KEY && access != ACCESS_FETCH);
    needs |= PTE_V | PTE_A;
    bool bad = (pte & needs) != needs || (pte & (PTE_R | PTE_W)) == PTE_W || !may;
    if (warp_any(bad)) return false;
    walk.outside = warp_any(page >= pages);
    walk.page = page, walk.entry = walk.outside ? 0 : load_word(table + 4 * page);
    walk.writes = (pte & (PTE_D | PTE_W)) == (PTE_D | PTE_W);
    return true;
}

// Why a VM's lanes leave their loop. It calls nothing: what a call might change would have to live in memory.
enum Leave : u32 {
    LEAVE_NOT,
    LEAVE_START,
    LEAVE_LIMIT,
    LEAVE_TRACE,  // there is none here, or the page is not at hand
    LEAVE_STEP,   // an instruction that is not for lanes, or an access (VmSlot::miss)
    LEAVE_DEVICE, // an access outside RAM, as the translation at hand says
    LEAVE_LEARN,
    LEAVE_LATE // the slice has lasted long enough
};

// Puts the page of an access or a fetch at hand, or notes the word of an LR, which then has happened. What is
// left to do; as before if it is not simple.
FN u32 brief_page(VmSlot *slot, SlotPlace place, u64 frames, LaneState &s, u32 insn, u32 va, u32 miss) {
    DataEntry &data = slot->data[va / FRAME_BYTES % DATA_ENTRIES];
    FetchEntry &fetch = slot->fetch[va / FRAME_BYTES % FETCH_ENTRIES];
    bool store = miss == MISS_STORE;
    u32 access = store ? ACCESS_STORE : miss == MISS_FETCH ? ACCESS_FETCH : ACCESS_LOAD;
    u32 tag = PAGE_OF(va) | s.mode, outside = tag | TAG_OUTSIDE | (store ? TAG_WRITABLE : 0);
    bool is_data = miss == MISS_LOAD || store;
    if (is_data && warp_any((read_through(&data.tag) & ~(store ? 0 : TAG_WRITABLE)) == outside))
        return LEAVE_DEVICE;
    BriefWalk walk;
    if (!brief_walk(slot->vm, frames, va, s.mode, access, walk)) return s.leave;
    if (walk.outside) {
        if (!is_data || warp_any(store && !walk.writes)) return s.leave;
        warp_sync(); // all have read what was there
        if (warp_lane() == 0) {
            data.tag = tag | TAG_OUTSIDE | (walk.writes ? TAG_WRITABLE : 0), data.frame = walk.page;
            if (walk.large) slot->large |= large_mark(va);
        }
        warp_sync();
        return LEAVE_DEVICE;
    }
    u32 frame = walk.entry & FRAME_MASK;
    if (miss == MISS_HOLD) {
        u32 pa = walk.page * FRAME_BYTES + va % FRAME_BYTES, rd = insn >> 7 & 31;
        u32 value = load_word(frames + (u64)frame * FRAME_BYTES + va % FRAME_BYTES);
        warp_sync(); // all have read what is written now
        store_if(warp_lane() == 0, (u64)(uintptr_t)&slot->vm->hart.reservation, pa);
        if (warp_lane() == 0) {
            slot->held_pa = pa, slot->held_va = va, slot->miss = MISS_NONE;
            if (rd) slot_write(place, rd * 4, value);
        }
        warp_sync();
        s.pc += 4, s.left--;
        return s.left ? LEAVE_NOT : LEAVE_LIMIT;
    }
    u32 code = load_word(slot->pool->code_of_ptr + 4ull * frame);
    bool direct = walk.writes && (walk.entry & FRAME_PRIVATE) && !code;
    if (warp_any(is_data ? store && !direct : code == 0)) return s.leave;
    warp_sync(); // all have read what was there
    if (warp_lane() == 0) {
        if (is_data)
            data.tag = tag | (direct ? TAG_WRITABLE : 0), data.frame = frame;
        else
            fetch.tag = tag, fetch.text = code - 1;
        slot->miss = MISS_NONE;
        if (walk.large) slot->large |= large_mark(va);
    }
    warp_sync();
    return LEAVE_NOT;
}

// Whether an interrupt could come as soon as it may; true if in doubt. hart.steps is that of the last turn:
// had the timer's deadline passed since, there would have been another one.
FN bool may_be_interrupted(const Vm *vm, u32 sie) {
    const Hart &h = vm->hart;
    return vm->rtc.armed || (h.sip & sie & IP_SSIP) || (vm->plic.pending & vm->plic.enable) ||
           ((sie & IP_STIP) && guest_ticks(h) >= h.stimecmp);
}

// What an AMO writes (Unprivileged 8.4).
FN u32 amo_writes(u32 kind, u32 old, u32 b) {
    u32 bias = kind & 8 ? 0 : 0x80000000u; // of MIN and MAX: signed
    bool less = (old ^ bias) < (b ^ bias);
    switch (kind) {
    case 0x00: return old + b;
    case 0x01: return b;
    case 0x04: return old ^ b;
    case 0x08: return old | b;
    case 0x0c: return old & b;
    case 0x10:
    case 0x18: return less ? old : b;
    default: return less ? b : old; // MAX, MAXU
    }
}

// SC of the word of the last LR (Unprivileged 8.2). An LR says where its word is: brief_page notes that, or
// gets the page, and the LR is tried again.
FN bool brief_reserved(VmSlot *slot, SlotPlace place, u64 frames, bool stores, u32 mode, u32 a, u32 b,
                       u32 &value) {
    DataEntry entry = cached_data(place, a);
    u32 differs = entry.tag ^ (PAGE_OF(a) | mode);
    u64 host = frames + (u64)entry.frame * FRAME_BYTES + a % FRAME_BYTES;
    u64 reservation = (u64)(uintptr_t)&slot->vm->hart.reservation;
    if (stores) {
        // Another address may be the same word: leave that to who looks it up.
        if (warp_any(differs != TAG_WRITABLE || read_through(&slot->held_va) != a)) return false;
        bool held = load_word(reservation) == read_through(&slot->held_pa);
        warp_sync(); // all have read it
        store_if(warp_lane() == 0 && held, host, b);
        store_if(warp_lane() == 0, reservation, NO_RESERVATION);
        value = !held;
        return true;
    }
    if (warp_any(a & 3)) return false;
    warp_sync(); // all have read what is written now
    bool at_hand = !(differs & ~TAG_WRITABLE);
    if (warp_lane() == 0) slot->miss_va = a, slot->miss = at_hand ? MISS_HOLD : MISS_LOAD;
    warp_sync();
    return false;
}

// An AMO whose page is not at hand says so: it is tried again once it is.
FN bool brief_amo(VmSlot *slot, SlotPlace place, u64 frames, u32 insn, u32 mode, u32 a, u32 b, u32 &value) {
    bool is_amo = (insn >> 12 & 7) == 2 && (0x11111113u >> (insn >> 27) & 1); // and not LR, SC or none
    if (warp_any(!is_amo || (a & 3))) return false;
    DataEntry entry = cached_data(place, a);
    if (warp_any(entry.tag != (PAGE_OF(a) | mode | TAG_WRITABLE))) {
        warp_sync(); // all have read it
        if (warp_lane() == 0) slot->miss_va = a, slot->miss = MISS_STORE;
        warp_sync();
        return false;
    }
    u64 host = frames + (u64)entry.frame * FRAME_BYTES + a % FRAME_BYTES;
    value = load_word(host);
    u32 next = amo_writes(insn >> 27, value, b);
    warp_sync(); // all have read it
    store_if(warp_lane() == 0, host, next);
    return true;
}

FN bool brief_csr(VmSlot *slot, u32 insn, LaneState &s, u32 a, u32 &value) {
    Hart &h = slot->vm->hart;
    u32 number = insn >> 20;
    bool writes = csr_writes(insn);
    if ((number & ~0x80u) == CSR_TIME && !writes) {
        if (s.mode == MODE_U_KEY && warp_any(!(h.scounteren >> (CSR_TIME & 31) & 1))) return false;
        u64 steps = slot->limit - s.left, ticks = h.time_base + (steps >> h.time_shift);
        value = (u32)(number & 0x80 ? ticks >> 32 : ticks);
        return true;
    }
    bool traps = number >= CSR_SSCRATCH && number <= CSR_STVAL; // what a trap leaves in the hart
    if (s.mode == MODE_U_KEY || !(traps || number == CSR_SSTATUS || number == CSR_SIE)) return false;
    u64 word = (u64)(uintptr_t)csr_word(h, number);
    value = warp_or(load_word(word));
    if (!writes) return true;
    u32 next = csr_kept(number, csr_operand(insn, value, a));
    u32 events = csr_events(number, value, next);
    if (events & ~(EV_CHECK | EV_MODE)) return false;
    if (number == CSR_SIE) {
        // The timer's deadline depends on it.
        if ((value ^ next) & IP_STIP) return false;
        if (warp_any((h.sstatus & SSTATUS_SIE) && may_be_interrupted(slot->vm, next))) return false;
    } else if (events & EV_CHECK) {
        if (warp_any(may_be_interrupted(slot->vm, h.sie))) return false;
    }
    warp_sync(); // all have read it
    store_if(warp_lane() == 0, word, next);
    if (events & EV_MODE) s.mode = next & SSTATUS_SUM ? MODE_S_SUM_KEY : MODE_S_KEY;
    return true;
}

// SRET, unless an interrupt could come at once.
FN bool brief_return(VmSlot *slot, LaneState &s) {
    Hart &h = slot->vm->hart;
    u32 status = warp_or(h.sstatus), pc = warp_or(h.sepc);
    TrapReturn back = trap_return(status);
    bool open = back.mode == MODE_U || (back.status & SSTATUS_SIE);
    if (s.mode == MODE_U_KEY || (open && warp_any(may_be_interrupted(slot->vm, h.sie)))) return false;
    warp_sync(); // all have read it
    if (warp_lane() == 0) h.mode = back.mode, h.sstatus = back.status, h.reservation = NO_RESERVATION;
    s.pc = pc - 4;
    s.mode = back.mode == MODE_U ? MODE_U_KEY : status & SSTATUS_SUM ? MODE_S_SUM_KEY : MODE_S_KEY;
    return true;
}

// ECALL in user mode.
FN bool brief_call(VmSlot *slot, LaneState &s) {
    if (s.mode != MODE_U_KEY) return false;
    Machine m;
    m.vm = slot->vm, m.events = 0;
    Hart &h = m.vm->hart;
    u32 status = warp_or(h.sstatus), vector = warp_or(h.stvec);
    warp_sync(); // all have read it
    if (warp_lane() == 0) {
        h.pc = s.pc;
        h.trapped++;
        enter_trap(m, CAUSE_ECALL_U, 0, 0);
    }
    s.pc = (vector & ~3u) - 4;
    s.mode = status & SSTATUS_SUM ? MODE_S_SUM_KEY : MODE_S_KEY;
    return true;
}

// Executes `insn`, which is the next one. False: nothing has happened.
FN bool warp_brief(VmSlot *slot, SlotPlace place, u64 frames, u32 insn, LaneState &s) {
    u32 rd = insn >> 7 & 31, opcode = insn & 0x7f, function = insn >> 12 & 7;
    u32 a = warp_or(slot_read(place, insn >> 15 & 31)), value = 0;
    if (opcode == 0x2f) {
        u32 b = warp_or(slot_read(place, insn >> 20 & 31)), kind = insn >> 27;
        bool loads = kind == 2 && (insn >> 20 & 31) == 0, stores = kind == 3;
        if (function == 2 && (loads || stores)) {
            if (!brief_reserved(slot, place, frames, stores, s.mode, a, b, value)) return false;
        } else if (!brief_amo(slot, place, frames, insn, s.mode, a, b, value)) {
            return false;
        }
    } else if (opcode != 0x73) {
        return false;
    } else if (function == 4) {
        return false; // reserved
    } else if (function) {
        if (!brief_csr(slot, insn, s, a, value)) return false;
    } else if (insn == 0x10200073) {
        if (!brief_return(slot, s)) return false;
        rd = 0;
    } else if (insn == 0x00000073) {
        if (!brief_call(slot, s)) return false;
    } else {
        bool page_fence = insn >> 25 == 9 && (insn >> 15 & 31) && rd == 0; // SFENCE.VMA of an address
        if (!page_fence || s.mode == MODE_U_KEY || warp_or(slot->large & large_mark(a))) return false;
        warp_sync(); // all have read what is written now
        if (warp_lane() == 0) forget_page(slot, a);
    }
    warp_sync(); // likewise
    if (rd && warp_lane() == 0) slot_write(place, rd * 4, value);
    warp_sync();
    s.pc += 4, s.left--;
    return true;
}
