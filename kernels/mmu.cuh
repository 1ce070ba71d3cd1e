// Sv32 (RISC-V Privileged 1.12, 4.3), with A and D set by the machine as Svadu does.
#pragma once
#include "trap.cuh"

enum Access : u32 { ACCESS_LOAD = 0, ACCESS_STORE = 1, ACCESS_FETCH = 2 };

#define PTE_V 1u
#define PTE_R 2u
#define PTE_W 4u
#define PTE_X 8u
#define PTE_U 16u
#define PTE_A 64u
#define PTE_D 128u

struct Walk {
    u64 pa;            // 34 bits
    u32 cause;         // 0 when the translation holds; otherwise the exception to take
    u32 is_leaf_large; // the leaf is a 4 MiB page
    u32 is_dirty;      // a store needs no other walk: D is set and W allows it
};

FN u32 page_fault(u32 access) {
    return access == ACCESS_LOAD    ? CAUSE_LOAD_PAGE
           : access == ACCESS_STORE ? CAUSE_STORE_PAGE
                                    : CAUSE_FETCH_PAGE;
}
FN u32 access_fault(u32 access) {
    return access == ACCESS_LOAD    ? CAUSE_LOAD_ACCESS
           : access == ACCESS_STORE ? CAUSE_STORE_ACCESS
                                    : CAUSE_FETCH_ACCESS;
}

SLOW Walk translate(Machine &m, u32 va, u32 access) {
    Hart &h = m.vm->hart;
    Walk w;
    w.pa = va, w.cause = 0, w.is_leaf_large = 0, w.is_dirty = 1;
    if (!(h.satp >> 31)) return w;
    u64 table = (u64)(h.satp & 0x3fffff) << 12;
    for (u32 level = 1;; level--) {
        u64 at = table + 4 * (va >> (12 + 10 * level) & 0x3ff);
        u32 pte;
        if (!ram_load(m, at, 4, pte)) {
            w.cause = access_fault(access);
            return w;
        }
        w.cause = page_fault(access);
        if (!(pte & PTE_V) || (pte & (PTE_R | PTE_W)) == PTE_W) return w;
        if (!(pte & (PTE_R | PTE_X))) { // pointer to the next level
            if (level == 0 || (pte & (PTE_A | PTE_D | PTE_U))) return w;
            table = (u64)(pte >> 10) << 12;
            continue;
        }
        if (h.mode == MODE_U) {
            if (!(pte & PTE_U)) return w;
        } else if ((pte & PTE_U) && (access == ACCESS_FETCH || !(h.sstatus & SSTATUS_SUM))) {
            return w;
        }
        if (access == ACCESS_FETCH) {
            if (!(pte & PTE_X)) return w;
        } else if (access == ACCESS_STORE) {
            if (!(pte & PTE_W)) return w;
        } else if (!(pte & PTE_R) && !((h.sstatus & SSTATUS_MXR) && (pte & PTE_X))) {
            return w;
        }
        if (level == 1 && (pte >> 10 & 0x3ff)) return w; // misaligned superpage
        u32 want = pte | PTE_A | (access == ACCESS_STORE ? PTE_D : 0);
        if (want != pte &&
            !ram_store(m, at, 4, want)) { // no frame left: the slice ends, and this is tried again
            w.cause = access_fault(access);
            return w;
        }
        w.cause = 0;
        w.is_leaf_large = level;
        w.is_dirty = (want & (PTE_D | PTE_W)) == (PTE_D | PTE_W);
        u64 page = (u64)(pte >> 10) << 12;
        if (level) page = (page & ~0x3fffffull) | (va & 0x3ff000);
        w.pa = page | (va & 0xfff);
        return w;
    }
}
