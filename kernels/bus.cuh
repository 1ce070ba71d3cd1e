// Physical addresses outside RAM, and the slow way through memory: what a load or store does when the
// engine's cached translation does not serve.
#pragma once
#include "mmu.cuh"
#include "uart.cuh"
#include "rtc.cuh"
#include "virtio_net.cuh"

// False: nothing answers there, or not with that width: an access fault.
SLOW bool mmio_load(Machine &m, u64 pa, u32 size, u32 &value) {
    if (pa >> 32) return false;
    u32 at = (u32)pa;
    if (at - UART_BASE < UART_BYTES) {
        value = at - UART_BASE < 8 ? uart_read(m, at - UART_BASE) : 0;
        return true;
    }
    if (at - NET_BASE < NET_BYTES && (size == 4 || at - NET_BASE >= 0x100)) {
        value = net_read(m, at - NET_BASE, size);
        return true;
    }
    if (size != 4) return false;
    if (at - PLIC_BASE < PLIC_BYTES)
        value = plic_read(m, at - PLIC_BASE);
    else if (at - RTC_BASE < RTC_BYTES)
        value = rtc_read(m, at - RTC_BASE);
    else
        return false;
    return true;
}

SLOW bool mmio_store(Machine &m, u64 pa, u32 size, u32 value) {
    if (pa >> 32) return false;
    u32 at = (u32)pa;
    if (at - UART_BASE < UART_BYTES) {
        if (at - UART_BASE < 8) uart_write(m, at - UART_BASE, value);
        return true;
    }
    if (at - NET_BASE < NET_BYTES && (size == 4 || at - NET_BASE >= 0x100)) {
        if (size == 4) net_write(m, at - NET_BASE, value);
        return true;
    }
    if (size != 4) return false;
    if (at - PLIC_BASE < PLIC_BYTES)
        plic_write(m, at - PLIC_BASE, value);
    else if (at - RTC_BASE < RTC_BYTES)
        rtc_write(m, at - RTC_BASE, value);
    else
        return false;
    return true;
}

// Takes back the instruction at hart.pc: it starts again in the next slice. The engine counts a step after
// it.
FN void not_executed(Machine &m) {
    m.vm->hart.steps--;
    m.events |= EV_JUMP;
}

// An exception, unless the real reason is that the frame pool is empty: then the instruction has not happened
// and the VM stops before it.
FN void memory_fault(Machine &m, u32 cause, u32 va) {
    if ((m.events & EV_EXIT) && m.vm->exit == EXIT_NO_FRAME) return not_executed(m);
    take_exception(m, cause, va);
}

// A naturally aligned access. False: an exception was taken.
SLOW bool load_aligned(Machine &m, u32 va, u32 size, u32 &value) {
    Walk w = translate(m, va, ACCESS_LOAD);
    if (!w.cause && !ram_load(m, w.pa, size, value) && !mmio_load(m, w.pa, size, value))
        w.cause = CAUSE_LOAD_ACCESS;
    if (w.cause) memory_fault(m, w.cause, va);
    return !w.cause;
}

SLOW bool store_aligned(Machine &m, u32 va, u32 size, u32 value) {
    Walk w = translate(m, va, ACCESS_STORE);
    if (!w.cause && !ram_store(m, w.pa, size, value)) {
        if ((m.events & EV_EXIT) || !mmio_store(m, w.pa, size, value)) w.cause = CAUSE_STORE_ACCESS;
    }
    if (w.cause) memory_fault(m, w.cause, va);
    return !w.cause;
}

// Misaligned accesses work in RAM, byte by byte (Unprivileged 2.6); nothing is stored unless all of it can
// be. On devices they fault.
SLOW bool load_any(Machine &m, u32 va, u32 size, u32 &value) {
    if (!(va & (size - 1))) return load_aligned(m, va, size, value);
    value = 0;
    for (u32 i = 0; i < size; i++) {
        Walk w = translate(m, va + i, ACCESS_LOAD);
        u32 byte = 0;
        if (!w.cause && !ram_load(m, w.pa, 1, byte)) w.cause = CAUSE_LOAD_ACCESS;
        if (w.cause) {
            memory_fault(m, w.cause, va + i);
            return false;
        }
        value |= byte << (8 * i);
    }
    return true;
}

SLOW bool store_any(Machine &m, u32 va, u32 size, u32 value) {
    if (!(va & (size - 1))) return store_aligned(m, va, size, value);
    u64 at[4];
    for (u32 i = 0; i < size; i++) {
        Walk w = translate(m, va + i, ACCESS_STORE);
        if (!w.cause && ((w.pa >> 32) || !ram_write_at(m, (u32)w.pa))) w.cause = CAUSE_STORE_ACCESS;
        if (w.cause) {
            memory_fault(m, w.cause, va + i);
            return false;
        }
        at[i] = w.pa;
    }
    for (u32 i = 0; i < size; i++) ram_store(m, at[i], 1, value >> (8 * i) & 0xff);
    return true;
}

// LR, SC and AMO (Unprivileged 8). Misaligned: an exception. On devices: an access fault, as no PMA supports
// them.
SLOW bool atomic(Machine &m, u32 op, u32 va, u32 operand, u32 &value) {
    Hart &h = m.vm->hart;
    if (va & 3) {
        take_exception(m, op == OP_LR ? CAUSE_LOAD_MISALIGNED : CAUSE_STORE_MISALIGNED, va);
        return false;
    }
    Walk w = translate(m, va, op == OP_LR ? ACCESS_LOAD : ACCESS_STORE);
    u32 old = 0;
    if (!w.cause && !ram_load(m, w.pa, 4, old))
        w.cause = op == OP_LR ? CAUSE_LOAD_ACCESS : CAUSE_STORE_ACCESS;
    if (!w.cause && op == OP_SC) {
        bool held = h.reservation == (u32)w.pa;
        if (held && !ram_store(m, w.pa, 4, operand))
            w.cause = CAUSE_STORE_ACCESS; // no frame left: it will be tried again
        else
            h.reservation = NO_RESERVATION;
        old = !held;
    } else if (!w.cause && op == OP_LR) {
        h.reservation = (u32)w.pa;
    } else if (!w.cause) {
        if (!ram_store(m, w.pa, 4, amo_of(op, old, operand))) w.cause = CAUSE_STORE_ACCESS;
    }
    if (w.cause) {
        memory_fault(m, w.cause, va);
        return false;
    }
    value = old;
    return true;
}

SLOW void devices_poll(Machine &m) {
    uart_poll(m);
    net_poll(m);
    rtc_poll(m);
}
