//! Sv32 against a model of its own: every combination of PTE bits, mode, SUM, MXR, access and page size; faults;
//! accessed and dirty bits; and cached translations under remapping, aliasing and copy-on-write.

#![allow(
    clippy::unwrap_used,
    clippy::precedence,
    reason = "tests; bit fields as the specifications write them"
)]

mod common;

use common::asm::*;
use common::*;
use emulator::abi::NET_BASE;

const V: u32 = 1;
const R: u32 = 2;
const W: u32 = 4;
const X: u32 = 8;
const U: u32 = 16;
const G: u32 = 32;
const A: u32 = 64;
const D: u32 = 128;
const RWX: u32 = V | R | W | X | A | D;

const RAM: u32 = 0x80_0000 + 0x10_0000;
const ROOT: u32 = 0x1_0000;
const LEAVES: u32 = 0x1_1000;
const CODE_LEAVES: u32 = 0x1_2000;
const FRAME: u32 = 0x2_0000;
const LARGE: u32 = 0x40_0000;
/// Code in S mode and in U mode, and the trap handler.
const CODE_VA: u32 = 0x8000_0000;
const USER_VA: u32 = 0x8000_1000;
const TRAP_VA: u32 = 0x8000_2000;
const TARGET: u32 = 0x4000_5abc;

fn pte(pa: u32, flags: u32) -> u32 {
    pa >> 12 << 10 | flags
}

/// A VM with code mapped for both modes at 0x80000000.
fn paged() -> Bench {
    let b = Bench::new(RAM, &[]);
    b.write32(ROOT + 4 * (CODE_VA >> 22), pte(CODE_LEAVES, V));
    for (i, flags) in [RWX, RWX | U, RWX].into_iter().enumerate() {
        b.write32(CODE_LEAVES + 4 * i as u32, pte(CODE + 0x1000 * i as u32, flags));
    }
    b.hart().satp = 1 << 31 | ROOT >> 12;
    b.hart().stvec = TRAP_VA;
    b
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Load,
    Store,
    Fetch,
    Amo,
    Lr,
    Sc,
}
use Kind::*;

/// Runs one access to `va` in `mode`; the cause of its trap.
fn access(b: &mut Bench, kind: Kind, va: u32, mode: u32, sstatus: u32) -> Option<u32> {
    let insn = match kind {
        Load => lw(6, 5, 0),
        Store => sw(7, 5, 0),
        Fetch => jalr(0, 5, 0),
        Amo => amoadd(6, 5, 7),
        Lr => lr(6, 5),
        Sc => sc(6, 5, 7),
    };
    let (at, pa) = if mode == MODE_U { (USER_VA, CODE + 0x1000) } else { (CODE_VA, CODE) };
    b.write32(pa, insn);
    let h = b.hart();
    (h.pc, h.mode, h.sstatus, h.scause, h.stval, h.sepc) = (at, mode, sstatus, !0, !0, !0);
    (h.x[5], h.x[6], h.x[7]) = (va, 0x600d, 0x1234_5678);
    b.step(if kind == Fetch { 2 } else { 1 });
    let h = b.hart();
    if h.scause == !0 {
        return None;
    }
    assert_eq!((h.pc, h.mode), (TRAP_VA, MODE_S));
    assert_eq!(h.sepc, if kind == Fetch && h.scause != 0 { va } else { at });
    assert_eq!(h.sstatus & SSTATUS_SPP != 0, mode == MODE_S);
    assert_eq!(h.x[6], 0x600d, "a faulting access wrote its register");
    Some(h.scause)
}

fn page_fault(kind: Kind) -> u32 {
    match kind {
        Fetch => 12,
        Load | Lr => 13,
        _ => 15,
    }
}
fn access_fault(kind: Kind) -> u32 {
    match kind {
        Fetch => 1,
        Load | Lr => 5,
        _ => 7,
    }
}

/// Whether a leaf with these flags lets the access through (Privileged 1.12, 4.3.2, steps 3 to 6).
fn allowed(flags: u32, kind: Kind, mode: u32, sum: bool, mxr: bool) -> bool {
    let has = |bit| flags & bit != 0;
    let valid = has(V) && (has(R) || !has(W)) && (has(R) || has(X));
    let owner = if mode == MODE_U { has(U) } else { !has(U) || (sum && kind != Fetch) };
    let right = match kind {
        Fetch => has(X),
        Load | Lr => has(R) || (mxr && has(X)),
        Store | Amo | Sc => has(W),
    };
    valid && owner && right
}

#[test]
fn every_permission() {
    let mut b = paged();
    b.write32(ROOT + 4 * (TARGET >> 22), pte(LEAVES, V));
    let mut passed = 0;
    for large in [false, true] {
        let (at, pa, frame) = if large {
            (ROOT + 4 * (TARGET >> 22), LARGE | (TARGET & 0x3f_ffff), LARGE)
        } else {
            (LEAVES + 4 * (TARGET >> 12 & 0x3ff), FRAME | (TARGET & 0xfff), FRAME)
        };
        for flags in 0..256 {
            for (mode, sum, mxr) in
                (0..8).map(|i| (if i & 1 == 0 { MODE_S } else { MODE_U }, i & 2 != 0, i & 4 != 0))
            {
                for kind in [Load, Store, Fetch, Amo, Lr, Sc] {
                    let entry = pte(frame, flags | 0x300); // the software's bits must stay
                    b.write32(at, entry);
                    b.write32(pa, NOP);
                    let sstatus = if sum { SSTATUS_SUM } else { 0 } | if mxr { SSTATUS_MXR } else { 0 };
                    let what =
                        format!("{kind:?} flags {flags:08b} mode {mode} sum {sum} mxr {mxr} large {large}");
                    let cause = access(&mut b, kind, TARGET, mode, sstatus);
                    let ok = allowed(flags, kind, mode, sum, mxr);
                    assert_eq!(cause, (!ok).then(|| page_fault(kind)), "{what}");
                    let writes = matches!(kind, Store | Amo | Sc);
                    let expected = if ok { entry | A | if writes { D } else { 0 } } else { entry };
                    assert_eq!(b.read32(at), expected, "PTE after {what}");
                    if ok {
                        passed += 1;
                        let stored = match kind {
                            Store => 0x1234_5678,
                            Amo => NOP.wrapping_add(0x1234_5678),
                            _ => NOP, // SC without a reservation stores nothing
                        };
                        assert_eq!(b.read32(pa), stored, "{what}");
                    } else {
                        assert_eq!(b.hart().stval, TARGET, "{what}");
                        assert_eq!(b.read32(pa), NOP, "{what}");
                    }
                }
            }
        }
    }
    assert!(passed > 1000, "{passed}");
}

/// A pointer to the next level with A, D or U set is reserved, and so is one at the last level.
#[test]
fn reserved_pointers() {
    let mut b = paged();
    b.write32(LEAVES + 4 * (TARGET >> 12 & 0x3ff), pte(FRAME, RWX));
    for flags in [A, D, U, A | D, A | D | U, G, 0x100, 0x200] {
        b.write32(ROOT + 4 * (TARGET >> 22), pte(LEAVES, V | flags));
        let fine = flags & (A | D | U) == 0;
        for kind in [Load, Store, Fetch] {
            b.write32(FRAME | (TARGET & 0xfff), NOP);
            let cause = access(&mut b, kind, TARGET, MODE_S, 0);
            assert_eq!(
                cause,
                (!fine).then(|| page_fault(kind)),
                "{kind:?} through a pointer with {flags:#x}"
            );
        }
    }
    b.write32(ROOT + 4 * (TARGET >> 22), pte(LEAVES, V));
    b.write32(LEAVES + 4 * (TARGET >> 12 & 0x3ff), pte(LEAVES, V));
    assert_eq!(access(&mut b, Load, TARGET, MODE_S, 0), Some(13));
}

#[test]
fn misaligned_large_pages() {
    let mut b = paged();
    for bit in 0..10 {
        b.write32(ROOT + 4 * (TARGET >> 22), pte(LARGE, RWX) | 1 << (10 + bit));
        for kind in [Load, Store, Fetch, Amo] {
            assert_eq!(access(&mut b, kind, TARGET, MODE_S, 0), Some(page_fault(kind)), "bit {bit}");
            assert_eq!(b.hart().stval, TARGET);
        }
    }
}

/// Tables and pages that are not in RAM: access faults of the access that asked.
#[test]
fn outside_ram() {
    let mut b = paged();
    let root = ROOT + 4 * (TARGET >> 22);
    let leaf = LEAVES + 4 * (TARGET >> 12 & 0x3ff);
    // frame numbers beyond RAM, in a hole between devices, and beyond 32 bits
    for ppn in [RAM >> 12, 0xe_0000, 0xf_9000, 0x10_0000, 0x10_0020, 0x3f_ffff] {
        for kind in [Load, Store, Fetch, Amo, Lr, Sc] {
            b.write32(root, ppn << 10 | V);
            assert_eq!(
                access(&mut b, kind, TARGET, MODE_S, 0),
                Some(access_fault(kind)),
                "table at {ppn:#x}"
            );
            assert_eq!(b.hart().stval, TARGET);
            b.write32(root, pte(LEAVES, V));
            b.write32(leaf, ppn << 10 | RWX);
            assert_eq!(access(&mut b, kind, TARGET, MODE_S, 0), Some(access_fault(kind)), "page at {ppn:#x}");
            assert_eq!(b.hart().stval, TARGET);
        }
    }
    // devices are no place for code, nor for atomic operations
    for device in [0xf000_0000u32, 0xf400_0000, 0xf410_0000, 0xf500_0000] {
        for kind in [Fetch, Amo, Lr, Sc] {
            b.write32(leaf, pte(device, RWX));
            assert_eq!(access(&mut b, kind, TARGET & !0xfff, MODE_S, 0), Some(access_fault(kind)));
        }
        b.write32(leaf, pte(device, RWX));
        assert_eq!(access(&mut b, Load, TARGET & !0xfff, MODE_S, 0), None, "device {device:#x}");
    }
    // the root itself
    for ppn in [RAM >> 12, 0x3f_ffff] {
        b.hart().satp = 1 << 31 | ppn;
        b.hart().pc = CODE_VA;
        b.step(1);
        assert_eq!((b.hart().scause, b.hart().stval, b.hart().sepc), (1, CODE_VA, CODE_VA));
    }
}

/// With MODE = Bare the other fields of satp mean nothing.
#[test]
fn bare() {
    let mut b = Bench::new(0x1_0000, &[lw(6, 5, 0)]);
    b.hart().satp = 0x7fff_ffff;
    b.hart().x[5] = 0x8000;
    b.write32(0x8000, 77);
    b.step(1);
    assert_eq!(b.x(6), 77);
}

/// Accesses over a page boundary translate both pages; a fault in either stores nothing and names the byte that
/// faulted.
#[test]
fn misaligned_over_two_pages() {
    let mut b = paged();
    let first = TARGET & !0xfff;
    b.write32(ROOT + 4 * (TARGET >> 22), pte(LEAVES, V));
    let leaf = LEAVES + 4 * (first >> 12 & 0x3ff);
    let (low, high) = (FRAME, FRAME + 0x5000);
    for (insn, size, store) in [
        (lw(6, 5, 0), 4, false),
        (lh(6, 5, 0), 2, false),
        (lhu(6, 5, 0), 2, false),
        (sw(7, 5, 0), 4, true),
        (sh(7, 5, 0), 2, true),
    ] {
        for before in 1..size {
            let va = first + 0x1000 - before;
            for (flags_low, flags_high) in
                [(RWX, RWX), (RWX, 0), (0, RWX), (0, 0), (RWX, V | R | A), (V | R | A, RWX), (V | X | A, RWX)]
            {
                b.write(low + 0xffc, &[1, 2, 3, 0x84]);
                b.write(high, &[0x95, 6, 7, 8]);
                b.write32(leaf, pte(low, flags_low));
                b.write32(leaf + 4, pte(high, flags_high));
                b.write32(CODE, insn);
                let h = b.hart();
                (h.pc, h.mode, h.sstatus, h.scause, h.stval) = (CODE_VA, MODE_S, 0, !0, !0);
                (h.x[5], h.x[6], h.x[7]) = (va, 0x600d, 0xa4a3_a2a1);
                b.step(1);
                let right = if store { W } else { R };
                let bad_low = flags_low & right == 0;
                let bad_high = flags_high & right == 0;
                let what = format!("{} at {va:#x}, {flags_low:#x}, {flags_high:#x}", disassemble(insn));
                let h = *b.hart();
                let memory = [b.read(low + 0xffc, 4), b.read(high, 4)].concat();
                if bad_low || bad_high {
                    let tval = if bad_low { va } else { first + 0x1000 };
                    assert_eq!((h.scause, h.stval), (if store { 15 } else { 13 }, tval), "{what}");
                    assert_eq!(memory, [1, 2, 3, 0x84, 0x95, 6, 7, 8], "{what}: partly stored");
                    assert_eq!(h.x[6], 0x600d);
                    continue;
                }
                assert_eq!(h.scause, !0, "{what}");
                let at = 4 - before as usize;
                if store {
                    let mut expected = [1, 2, 3, 0x84, 0x95, 6, 7, 8];
                    expected[at..at + size as usize].copy_from_slice(&h.x[7].to_le_bytes()[..size as usize]);
                    assert_eq!(memory, expected, "{what}");
                } else {
                    let mut value = [0; 4];
                    value[..size as usize].copy_from_slice(&memory[at..at + size as usize]);
                    let mut value = u32::from_le_bytes(value);
                    if insn == lh(6, 5, 0) {
                        value = value as u16 as i16 as u32;
                    }
                    assert_eq!(h.x[6], value, "{what}");
                }
            }
        }
    }
}

/// A program under translation, all in one slice unless it says otherwise: the code lies in a page of its own, identity-mapped like all of
/// the first 4 MiB; the registers that loads leave behind are compared.
struct Script {
    bench: Bench,
    words: Vec<u32>,
}

/// Where scripts run; also mapped at its own address.
const SCRIPT: u32 = 0x10_0000;
const WINDOW: u32 = 0x5000_0000;
const WINDOW_LEAVES: u32 = 0x1_3000;

impl Script {
    fn new() -> Self {
        let b = paged();
        b.write32(ROOT, pte(0, RWX));
        b.write32(ROOT + 4 * (WINDOW >> 22), pte(WINDOW_LEAVES, V));
        Self { bench: b, words: Vec::new() }
    }
    fn load_into(&mut self, rd: Reg, va: u32) {
        self.words.extend(li(30, va));
        self.words.push(lw(rd, 30, 0));
    }
    fn store(&mut self, va: u32, value: u32) {
        self.words.extend(li(30, va));
        self.words.extend(li(31, value));
        self.words.push(sw(31, 30, 0));
    }
    fn fence(&mut self, va: u32, asid: Reg) {
        self.words.extend(li(30, va));
        self.words.push(sfence_vma(30, asid));
    }
    /// Maps a window page.
    fn map(&mut self, page: u32, pa: u32, flags: u32) {
        self.store(WINDOW_LEAVES + 4 * page, pte(pa, flags));
    }
    fn run(self) -> Bench {
        self.run_in(u64::MAX)
    }
    /// In slices of so many steps: what an engine keeps from one to the next is under test.
    fn run_in(mut self, budget: u64) -> Bench {
        self.words.push(SELF);
        let end = SCRIPT + 4 * (self.words.len() as u32 - 1);
        let words = std::mem::take(&mut self.words);
        let b = &mut self.bench;
        b.start(SCRIPT, &words);
        b.steps(words.len() as u64 * 2, budget);
        assert_eq!(b.hart().pc, end, "a trap: {:x?}", b.hart().last_trap);
        self.bench
    }
}

#[test]
fn remapping_after_a_fence() {
    // (rs1 is the address, rs2 an ASID register) or neither
    for (by_address, asid, budget) in
        [u64::MAX, 1, 3].into_iter().flat_map(|n| [(true, 0, n), (true, 5, n), (false, 0, n), (false, 5, n)])
    {
        let mut s = Script::new();
        s.bench.write32(FRAME, 1);
        s.bench.write32(FRAME + 0x1000, 2);
        s.map(3, FRAME, RWX);
        s.load_into(10, WINDOW + 0x3000);
        s.map(3, FRAME + 0x1000, RWX);
        if by_address {
            s.fence(WINDOW + 0x3abc, asid);
        } else {
            s.words.push(sfence_vma(0, asid));
        }
        s.load_into(11, WINDOW + 0x3000);
        s.store(WINDOW + 0x3000, 3);
        let b = s.run_in(budget);
        assert_eq!((b.x(10), b.x(11)), (1, 2));
        assert_eq!((b.read32(FRAME), b.read32(FRAME + 0x1000)), (1, 3));
    }
}

/// Translations to devices follow a fence as those to RAM do, and allow what their page does.
#[test]
fn devices_under_remapping() {
    const MAGIC: u32 = 0x7472_6976;
    let va = WINDOW + 0x3000;
    for budget in [u64::MAX, 1, 3] {
        let mut s = Script::new();
        s.bench.write32(FRAME, 7);
        s.map(3, NET_BASE, RWX);
        s.load_into(10, va);
        s.load_into(11, va);
        s.map(3, FRAME, RWX);
        s.fence(va, 0);
        s.load_into(12, va);
        s.store(va, 8);
        s.map(3, NET_BASE, V | R | A);
        s.fence(va, 0);
        s.load_into(13, va);
        s.load_into(14, va);
        // Read-only: the device must not see a store, here to its register Status.
        s.words.extend(li(30, va + 0x70));
        s.words.push(sw(31, 30, 0));
        let faulting = SCRIPT + 4 * (s.words.len() as u32 - 1);
        let words = s.words.clone();
        let mut b = s.bench;
        b.start(SCRIPT, &words);
        let mut left = words.len() as u64;
        while left > 0 {
            b.slice(left.min(budget));
            left -= left.min(budget);
        }
        let h = b.hart();
        assert_eq!((h.scause, h.stval, h.sepc), (15, va + 0x70, faulting));
        assert_eq!([10, 11, 12, 13, 14].map(|x| b.x(x)), [MAGIC, MAGIC, 7, MAGIC, MAGIC]);
        assert_eq!((b.read32(FRAME), b.vm().net.status), (8, 0));
    }
}

/// A reservation is of a physical address: it lasts while the word has another virtual one, and not at the same virtual
/// address when that leads elsewhere. Once all at hand, engines take shortcuts.
#[test]
fn reservations_follow_the_physical_address() {
    let (va, alias, first, second) = (0x4000_5a00, 0x4000_6a00, FRAME, FRAME + 0x1000);
    let leaf = |va: u32| LEAVES + 4 * (va >> 12 & 0x3ff);
    // x5 and x6 the two addresses, x7 the entry of the first, x8 what is to be in it, x9 what is stored
    let held = [lr(10, 5), sc(11, 5, 9)];
    let by_alias = [lr(10, 5), sc(11, 6, 9)];
    let remapped = [lr(10, 5), sw(8, 7, 0), sfence_vma(5, 0), sc(11, 5, 9)];
    let remapped_and_used = [lr(10, 5), sw(8, 7, 0), sfence_vma(5, 0), lw(12, 5, 0), sc(11, 5, 9)];
    let twice = [lr(10, 5), sc(12, 5, 9), sc(11, 5, 9)];
    let programs: [(&[u32], u32); 5] =
        [(&held, 0), (&by_alias, 0), (&remapped, 1), (&remapped_and_used, 1), (&twice, 1)];
    for (program, fails) in programs {
        for budget in [1, 2, 1000] {
            let mut b = paged();
            b.write32(ROOT + 4 * (va >> 22), pte(LEAVES, V));
            b.write32(ROOT, pte(0, RWX)); // the page tables, where they are
            for round in 0..3u32 {
                for page in [va, alias] {
                    b.write32(leaf(page), pte(first, RWX));
                }
                b.write32(first + 0xa00, 5);
                b.write32(second + 0xa00, 6);
                // all pages at hand, and private
                let warm = [sfence_vma(0, 0), lw(13, 5, 0), sw(13, 5, 0), lw(13, 6, 0), sw(13, 6, 0)];
                let code: Vec<u32> = warm.iter().chain(program).copied().collect();
                b.write(CODE, &bytes(&code));
                let h = b.hart();
                (h.pc, h.mode) = (CODE_VA, MODE_S);
                (h.x[5], h.x[6], h.x[7]) = (va, alias, leaf(va));
                (h.x[8], h.x[9], h.x[11]) = (pte(second, RWX), 77, 99);
                let end = h.steps + code.len() as u64;
                while b.hart().steps < end {
                    let left = end - b.hart().steps;
                    b.step(left.min(budget));
                }
                let what = (program.len(), budget, round);
                assert_eq!((b.x(10), b.x(11)), (5, fails), "{what:?}");
                let stored = if fails == 0 || program == twice { 77 } else { 5 };
                assert_eq!((b.read32(first + 0xa00), b.read32(second + 0xa00)), (stored, 6), "{what:?}");
            }
        }
    }
}

/// One fence for an address of a 4 MiB page is good for all of that page.
#[test]
fn remapping_a_large_page() {
    [u64::MAX, 1, 10].into_iter().for_each(remap_a_large_page);
}

fn remap_a_large_page(budget: u64) {
    let mut s = Script::new();
    let va = 0x6000_0000;
    for i in 0..20 {
        s.bench.write32(LARGE + i * 0x1000, 100 + i);
    }
    s.store(ROOT + 4 * (va >> 22), pte(LARGE, RWX));
    for i in 0..20 {
        s.load_into(31, va + i * 0x1000);
    }
    s.store(ROOT + 4 * (va >> 22), pte(0, RWX));
    s.fence(va + 0x8000, 0);
    for i in 0..10 {
        s.load_into(10 + i, va + FRAME + i * 0x1000);
    }
    s.store(va + FRAME + 0x3000, 77);
    for i in 0..20 {
        s.bench.write32(FRAME + i * 0x1000, 200 + i);
    }
    // FRAME lies in the first 4 MiB; the same offsets of LARGE hold zeroes
    let b = s.run_in(budget);
    assert_eq!((0..10).map(|i| b.x(10 + i)).collect::<Vec<_>>(), (200..210).collect::<Vec<_>>());
    assert_eq!(b.read32(FRAME + 0x3000), 77);
}

/// A store that was allowed faults once its page is read-only and fenced.
#[test]
fn write_protection_after_a_fence() {
    for large in [false, true] {
        let mut s = Script::new();
        let va = if large { 0x6000_0000 } else { WINDOW };
        let at = if large { ROOT + 4 * (va >> 22) } else { WINDOW_LEAVES };
        let pa = if large { LARGE } else { FRAME };
        s.store(at, pte(pa, RWX));
        s.store(va, 1);
        s.store(at, pte(pa, V | R | A));
        s.fence(va, 0);
        s.words.extend(li(30, va));
        s.words.push(sw(31, 30, 0));
        let faulting = SCRIPT + 4 * (s.words.len() as u32 - 1);
        let words = s.words.clone();
        let mut b = s.bench;
        b.start(SCRIPT, &words);
        b.slice(words.len() as u64);
        let h = b.hart();
        assert_eq!((h.pc, h.scause, h.stval, h.sepc), (TRAP_VA, 15, va, faulting));
        assert_eq!(b.read32(pa), 1);
    }
}

/// The D bit: a page that was only read is marked by its first store, though its translation is cached.
#[test]
fn dirty_after_read() {
    let mut s = Script::new();
    s.map(0, FRAME, V | R | W);
    s.load_into(10, WINDOW);
    s.load_into(11, WINDOW_LEAVES);
    s.store(WINDOW, 5);
    s.load_into(12, WINDOW_LEAVES);
    let b = s.run();
    assert_eq!(b.x(11), pte(FRAME, V | R | W | A));
    assert_eq!(b.x(12), pte(FRAME, V | R | W | A | D));
}

/// Two addresses of one frame that is still shared with other VMs: a store through one moves the frame, and loads
/// and code at the other must follow.
#[test]
fn aliases_follow_copy_on_write() {
    let va = |page: u32| WINDOW + page * 0x1000;
    let mut s = Script::new();
    // a page of the boot image, not owned by the VM yet
    let image = [[addi(10, 10, 1), jalr(0, 1, 0), 0, 0].as_slice(), &[42; 8]].concat();
    let pieces = vec![(FRAME, bytes(&image))];
    let fresh = Bench::with(1, None, RAM, pieces, SCRIPT);
    for (at, words) in [(ROOT, 1024), (CODE_LEAVES, 3)] {
        fresh.write(at, &s.bench.read(at, words * 4));
    }
    (fresh.hart().satp, fresh.hart().stvec) = (s.bench.hart().satp, s.bench.hart().stvec);
    s.bench = fresh;
    assert_eq!(s.bench.vm().ram.private_frames, 2);
    s.map(1, FRAME, RWX);
    s.map(2, FRAME, RWX);
    s.load_into(11, va(1) + 16);
    s.load_into(12, va(2) + 16);
    for page in [1, 2] {
        s.words.extend(li(30, va(page)));
        s.words.push(jalr(1, 30, 0));
    }
    s.store(va(1) + 16, 43);
    s.load_into(13, va(2) + 16);
    s.load_into(14, va(1) + 16);
    s.store(va(2) + 20, 44);
    s.load_into(15, va(1) + 20);
    // code changed through the other address
    s.store(va(1), addi(10, 10, 100));
    s.words.push(FENCE_I);
    for page in [2, 1] {
        s.words.extend(li(30, va(page)));
        s.words.push(jalr(1, 30, 0));
    }
    let b = s.run();
    assert_eq!((b.x(11), b.x(12), b.x(13), b.x(14), b.x(15)), (42, 42, 43, 43, 44));
    assert_eq!(b.x(10), 202);
}

/// Address spaces told apart by satp alone; with its own ASID none needs a fence.
#[test]
fn switching_address_spaces() {
    let second = 0x1_4000;
    let mut s = Script::new();
    let root: Vec<u8> = s.bench.read(ROOT, 4096);
    s.bench.write(second, &root);
    s.bench.write32(second + 4 * (WINDOW >> 22), pte(second + 0x1000, V));
    s.bench.write32(second + 0x1000, pte(FRAME + 0x1000, RWX));
    s.bench.write32(WINDOW_LEAVES, pte(FRAME, RWX));
    s.bench.write32(FRAME, 1);
    s.bench.write32(FRAME + 0x1000, 2);
    for round in 0..4 {
        s.load_into(10 + 2 * round, WINDOW);
        s.words.extend(li(29, 1 << 31 | 5 << 22 | second >> 12));
        s.words.push(csrw(SATP, 29));
        s.load_into(11 + 2 * round, WINDOW);
        s.words.extend(li(29, 1 << 31 | 3 << 22 | ROOT >> 12));
        s.words.push(csrw(SATP, 29));
    }
    let b = s.run();
    assert_eq!((10..18).map(|i| b.x(i)).collect::<Vec<_>>(), [1, 2, 1, 2, 1, 2, 1, 2]);
}

/// SUM and MXR act on translations that are cached, at once.
#[test]
fn sum_and_mxr_take_effect_at_once() {
    let mut s = Script::new();
    s.map(0, FRAME, V | R | W | U | A | D);
    s.map(1, FRAME, V | X | A);
    s.words.extend(li(29, SSTATUS_SUM));
    s.words.extend(li(28, SSTATUS_MXR));
    s.words.push(csrrs(0, SSTATUS, 29));
    s.store(WINDOW, 9);
    s.load_into(10, WINDOW);
    s.words.push(csrrc(0, SSTATUS, 29));
    s.words.extend(li(30, WINDOW));
    let first = s.words.len();
    s.words.push(lw(11, 30, 0)); // faults
    s.words.push(csrrs(0, SSTATUS, 28));
    s.load_into(12, WINDOW + 0x1000);
    s.words.push(csrrc(0, SSTATUS, 28));
    s.words.extend(li(30, WINDOW + 0x1000));
    let second = s.words.len();
    s.words.push(lw(13, 30, 0)); // faults
    s.words.push(SELF);
    // the handler counts in x20, notes sepc in x21 and x22, and skips
    s.bench.write(
        CODE + 0x2000,
        &bytes(&[addi(20, 20, 1), addi(21, 22, 0), csrr(22, SEPC), addi(23, 22, 4), csrw(SEPC, 23), SRET]),
    );
    let words = s.words.clone();
    let mut b = s.bench;
    b.start(SCRIPT, &words);
    b.slice(words.len() as u64 + 30);
    assert_eq!(b.x(20), 2);
    assert_eq!((b.x(21), b.x(22)), (SCRIPT + 4 * first as u32, SCRIPT + 4 * second as u32));
    assert_eq!((b.x(10), b.x(11), b.x(12), b.x(13)), (9, 0, 9, 0));
}

/// Random maps, fences, loads, stores and calls, in one slice or many, against a model of the window's pages. Frames are
/// aliased, large pages come and go, and fences are by address or of everything.
#[test]
fn random_remapping() {
    const PAGES: u32 = 6;
    const FRAMES: u32 = 5;
    for round in 0..300 {
        let mut random = Random::seeded(1000 + round);
        let mut s = Script::new();
        // window pages at distances that share entries of a direct-mapped cache
        let va = |page: u32| WINDOW + (page % 3) * 0x10_0000 + (page / 3) * 0x1000;
        let leaf = |page: u32| WINDOW_LEAVES + 4 * (va(page) >> 12 & 0x3ff);
        let large_va = 0x6000_0000u32;
        let frame = |i: u32| FRAME + i * 0x1000;
        let large = |i: u32| i * LARGE; // two large pages: 0 holds the frames too
        // word 0 of each frame is data, word 4 on is `addi x9, x9, n; jalr x0, x1, 0`
        let mut data: Vec<u32> = (0..FRAMES).map(|i| 100 + i).collect();
        let mut code: Vec<u32> = (0..FRAMES).map(|i| i + 1).collect();
        for i in 0..FRAMES {
            s.bench.write32(frame(i), data[i as usize]);
            s.bench.write(frame(i) + 16, &bytes(&[addi(9, 9, code[i as usize] as i32), jalr(0, 1, 0)]));
        }
        let mut map: Vec<u32> = (0..PAGES).map(|page| page % FRAMES).collect();
        for page in 0..PAGES {
            s.bench.write32(leaf(page), pte(frame(map[page as usize]), RWX));
        }
        s.bench.write32(ROOT + 4 * (large_va >> 22), pte(0, RWX));
        let mut large_map = 0;
        s.bench.write32(LARGE + FRAME, 5000);
        let mut large_data = 5000;
        let (mut sum, mut called) = (0u32, 0u32);
        for _ in 0..150 {
            let page = random.below(PAGES);
            let i = map[page as usize] as usize;
            match random.below(8) {
                0 => {
                    map[page as usize] = random.below(FRAMES);
                    s.store(leaf(page), pte(frame(map[page as usize]), RWX));
                    if random.below(4) == 0 {
                        s.words.push(sfence_vma(0, 0));
                    } else {
                        s.fence(va(page) + random.below(4096), 0);
                    }
                }
                1 => {
                    large_map = random.below(2);
                    s.store(ROOT + 4 * (large_va >> 22), pte(large(large_map), RWX));
                    s.fence(large_va + random.below(0x40_0000), 0);
                }
                2 | 3 => {
                    s.load_into(29, va(page));
                    s.words.push(add(8, 8, 29));
                    sum = sum.wrapping_add(data[i]);
                }
                4 => {
                    data[i] = random.word();
                    s.store(va(page), data[i]);
                }
                5 => {
                    // the first frame through the large page, or the other large page's word
                    s.load_into(29, large_va + FRAME);
                    s.words.push(add(8, 8, 29));
                    sum = sum.wrapping_add(if large_map == 0 { data[0] } else { large_data });
                    if random.below(2) == 0 {
                        let value = random.word();
                        s.store(large_va + FRAME, value);
                        *if large_map == 0 { &mut data[0] } else { &mut large_data } = value;
                    }
                }
                6 => {
                    s.words.extend(li(30, va(page) + 16));
                    s.words.push(jalr(1, 30, 0));
                    called = called.wrapping_add(code[i]);
                }
                _ => {
                    code[i] = random.below(1000);
                    s.store(va(page) + 16, addi(9, 9, code[i] as i32));
                    s.words.push(FENCE_I);
                }
            }
        }
        let b = s.run_in([u64::MAX, 7, 30, 100][round as usize % 4]);
        assert_eq!((b.x(8), b.x(9)), (sum, called), "round {round}");
        for i in 0..FRAMES {
            assert_eq!(b.read32(frame(i)), data[i as usize], "round {round}, frame {i}");
        }
        assert_eq!(b.read32(LARGE + FRAME), large_data, "round {round}");
    }
}

/// Accesses of all sizes and alignments in page 0, whose number is 0: no address may match an empty cache entry.
#[test]
fn page_zero() {
    for insn in [lb(6, 5, 0), lh(6, 5, 0), lw(6, 5, 0), lbu(6, 5, 0), lhu(6, 5, 0)] {
        for address in 0..64 {
            let mut b = Bench::new(0x1_0000, &[insn]);
            b.write(0, &(0..80).collect::<Vec<u8>>());
            b.hart().x[5] = address;
            b.step(1);
            assert_eq!(b.x(6) & 0xff, address, "{} of {address}", disassemble(insn));
        }
    }
    for insn in [sb(6, 5, 0), sh(6, 5, 0), sw(6, 5, 0), amoadd(7, 5, 6), lr(7, 5), sc(7, 5, 6)] {
        for address in 0..64 {
            let mut b = Bench::new(0x1_0000, &[insn]);
            b.hart().x[5] = address;
            b.hart().x[6] = 0x55;
            b.step(1);
            let atomic = insn & 0x7f == 0x2f;
            if atomic && address % 4 != 0 {
                assert_eq!(
                    (b.hart().scause, b.hart().stval),
                    (if insn == lr(7, 5) { 4 } else { 6 }, address)
                );
            } else if insn != lr(7, 5) && insn != sc(7, 5, 6) {
                assert_eq!(b.read32(address) & 0xff, 0x55);
            }
        }
    }
}
