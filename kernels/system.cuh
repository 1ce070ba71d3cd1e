// Operations that every engine runs out of line, and what stands between two of its runs: interrupts,
// deadlines, idling. Before any of them the engine sets hart.pc and hart.steps to those of the instruction.
#pragma once
#include "csr.cuh"
#include "sbi.cuh"

// ECALL, EBREAK, SRET, WFI, SFENCE.VMA. Uses and changes hart.x for SBI calls only.
SLOW void system_execute(Machine &m, u32 insn, u32 rs1_value) {
    Hart &h = m.vm->hart;
    switch (insn) {
    case 0x00000073:
        if (h.mode == MODE_U)
            take_exception(m, CAUSE_ECALL_U, 0);
        else
            sbi_ecall(m);
        return;
    case 0x00100073: take_exception(m, CAUSE_BREAKPOINT, h.pc); return;
    default: break;
    }
    if (h.mode == MODE_U) { // WFI too: it would not complete in bounded time (3.3.3)
        take_exception(m, CAUSE_ILLEGAL, insn);
        return;
    }
    if (insn == 0x10200073) { // SRET
        TrapReturn back = trap_return(h.sstatus);
        h.mode = back.mode, h.sstatus = back.status;
        h.reservation = NO_RESERVATION;
        h.pc = h.sepc;
        m.events |= EV_JUMP | EV_MODE | EV_CHECK;
    } else if (insn == 0x10500073) {
        wait_for_interrupt(m);
    } else if (insn >> 15 &
               31) { // SFENCE.VMA of an address; in all address spaces, which the specification allows
        m.flush_va = rs1_value;
        m.events |= EV_FLUSH_PAGE;
    } else {
        m.events |= EV_FLUSH;
    }
}

// Steps at which the hart must look up next: the end of the slice, the timer, or the clock's alarm.
SLOW u64 next_deadline(Machine &m, u64 slice_end) {
    const Hart &h = m.vm->hart;
    u64 ticks = h.sie & IP_STIP ? h.stimecmp : ~0ull;
    u64 alarm = rtc_alarm_ticks(*m.vm);
    if (alarm < ticks) ticks = alarm;
    u64 now = guest_ticks(h);
    if (ticks <= now) return slice_end; // pending already: only a change of sstatus or sie can matter
    u64 away = ticks - h.time_base;
    if (away >> (63 - h.time_shift)) return slice_end;
    u64 steps = away << h.time_shift;
    return steps < slice_end ? steps : slice_end;
}

// Time moves on without work: in virtual time to the next deadline, in real time to the host's clock.
SLOW void advance_time(Machine &m, u64 ticks) {
    Hart &h = m.vm->hart;
    u64 now = guest_ticks(h);
    if (ticks > now) h.time_base += ticks - now;
}

enum Turn : u32 { TURN_RUN, TURN_STOP };

// Between two runs of instructions: takes interrupts, and idles. TURN_STOP: the slice is over, vm.exit says
// why.
SLOW u32 take_turn(Machine &m, u64 slice_end) {
    Vm &vm = *m.vm;
    Hart &h = vm.hart;
    if (m.events & EV_EXIT) return TURN_STOP;
    for (;;) {
        if (vm.rtc.armed) rtc_poll(m);
        m.events &= ~EV_CHECK;
        u32 ready = pending_interrupts(vm) & h.sie;
        if (ready) {
            h.waiting = 0;
            take_interrupt(m);
            return h.steps < slice_end ? TURN_RUN : (vm.exit = EXIT_BUDGET, TURN_STOP);
        }
        if (!h.waiting) return h.steps < slice_end ? TURN_RUN : (vm.exit = EXIT_BUDGET, TURN_STOP);
        u64 wake = h.sie & IP_STIP ? h.stimecmp : ~0ull;
        u64 alarm = rtc_alarm_ticks(vm);
        if (alarm < wake) wake = alarm;
        if (wake == ~0ull || h.time_mode == TIME_REAL || h.steps >= slice_end) {
            vm.exit = vm.net.tx_stalled || vm.uart.tx_len            ? EXIT_DRAIN
                      : wake != ~0ull && h.time_mode == TIME_VIRTUAL ? EXIT_BUDGET
                                                                     : EXIT_IDLE;
            return TURN_STOP;
        }
        advance_time(m, wake);
    }
}

// Ticks that real time may run ahead per step of work: a slow guest must not spend itself in timer
// interrupts.
#define REAL_TICKS_PER_STEP 64
#define REAL_TIME_SHIFT 3

// The mailbox's indices were looked at just now.
SLOW void slice_open(Machine &m, const SliceRequest &request) {
    Hart &h = m.vm->hart;
    if (h.time_mode != request.time_mode) {
        u64 now = guest_ticks(h);
        h.time_mode = request.time_mode;
        h.time_shift = request.time_mode == TIME_REAL ? REAL_TIME_SHIFT : 0;
        h.time_base = now - (h.steps >> h.time_shift);
    }
    if (request.time_mode == TIME_REAL) {
        u64 now = guest_ticks(h), limit = request.now_ticks;
        u64 most = now + request.budget * REAL_TICKS_PER_STEP;
        if (!h.waiting && limit > most) limit = most;
        advance_time(m, limit);
    }
    m.events = 0;
    devices_poll(m);
}

SLOW void slice_begin(Machine &m, const SliceRequest &request) {
    rings_open(m);
    slice_open(m, request);
}

SLOW void slice_end(Machine &m, u64 steps_before, SliceResult &result) {
    rings_close(m);
    const Vm &vm = *m.vm;
    const Hart &h = vm.hart;
    u64 wake = h.sie & IP_STIP ? h.stimecmp : ~0ull;
    u64 alarm = rtc_alarm_ticks(vm);
    result.exit = vm.exit;
    result.private_frames = vm.ram.private_frames;
    result.steps = h.steps - steps_before;
    result.wake_ticks = alarm < wake ? alarm : wake;
    result.time_ticks = guest_ticks(h);
    result.instret = h.steps - h.trapped;
    result.newline_instret = vm.uart.newline_instret;
    result.rx_frames = vm.net.rx_frames;
    result.tx_frames = vm.net.tx_frames;
    result.net_dropped = vm.net.rx_dropped + vm.net.tx_dropped;
    result.pc = h.pc;
    for (u32 i = 0; i < 3; i++) result.last_trap[i] = h.last_trap[i];
    u32 pages = 0;
    for (u32 i = 0; i < CODE_PAGES_PER_VM; i++) pages += vm.ram.code_used[i / 32] >> (i % 32) & 1;
    result.code_pages = pages;
    result.code_full = 0;
}
