// 16550A UART: registers of the PC16550D data sheet, one byte apart. The wire is the mailbox's pair of rings.
#pragma once
#include "mailbox.cuh"
#include "plic.cuh"

#define IER_RX 1u
#define IER_THRE 2u
#define IER_LINE 4u
#define IER_MODEM 8u
#define FCR_ENABLE 1u
#define LCR_DLAB 0x80u
#define MCR_DTR 1u
#define MCR_RTS 2u
#define MCR_LOOP 0x10u
#define LSR_DR 1u
#define LSR_OE 2u
#define LSR_THRE 0x20u
#define LSR_TEMT 0x40u
#define MSR_LINES 0xB0u // DCD, DSR and CTS: the host is always there

FN u32 uart_rx_depth(const Uart &u) { return u.fcr & FCR_ENABLE ? UART_FIFO : 1; }
FN u32 uart_trigger(const Uart &u) {
    if (!(u.fcr & FCR_ENABLE)) return 1;
    u32 level = u.fcr >> 6;
    return level == 0 ? 1 : level == 1 ? 4 : level == 2 ? 8 : 14;
}

// The interrupt with the highest priority, as IIR bits 3:0.
FN u32 uart_iir(const Uart &u) {
    if ((u.ier & IER_LINE) && u.lsr_errors) return 6;
    if ((u.ier & IER_RX) && u.rx_len >= uart_trigger(u)) return 4;
    if ((u.ier & IER_RX) && u.rx_len) return 12; // the wire is silent: character time-out
    if ((u.ier & IER_THRE) && u.thre_pending) return 2;
    if ((u.ier & IER_MODEM) && (u.msr & 15)) return 0;
    return 1;
}
FN void uart_update(Machine &m) { plic_line(m, UART_IRQ, uart_iir(m.vm->uart) != 1); }

FN void uart_receive(Uart &u, u8 byte) {
    if (u.rx_len >= uart_rx_depth(u)) {
        u.lsr_errors |= LSR_OE;
        if (!(u.fcr & FCR_ENABLE)) u.rx[0] = byte; // without FIFOs the old byte is lost
        return;
    }
    u.rx[u.rx_len++] = byte;
}

// MSR bits 7:4. In loopback DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
FN u32 uart_lines(const Uart &u) {
    if (!(u.mcr & MCR_LOOP)) return MSR_LINES;
    return (u.mcr & MCR_RTS ? 0x10 : 0) | (u.mcr & MCR_DTR ? 0x20 : 0) | (u.mcr & 4 ? 0x40 : 0) |
           (u.mcr & 8 ? 0x80 : 0);
}

// Moves input from the wire into the FIFO while the guest listens: it asserts RTS or takes receive
// interrupts. Before that the bytes stay on the wire, so that a driver that clears the FIFO as it starts
// swallows none.
FN void uart_fill(Machine &m) {
    Uart &u = m.vm->uart;
    if ((u.mcr & MCR_LOOP) || !((u.mcr & MCR_RTS) || (u.ier & IER_RX))) return;
    for (u32 left = input_waiting(m); left && u.rx_len < uart_rx_depth(u); left--)
        u.rx[u.rx_len++] = input_take(m);
}

// Puts one byte on the wire; false when the ring is full.
FN bool console_put(Machine &m, u8 byte) {
    if (!output_put(m, byte)) return false;
    if (byte == '\n') {
        Uart &u = m.vm->uart;
        u.newlines++;
        u.newline_instret = m.vm->hart.steps - m.vm->hart.trapped;
    }
    return true;
}

// Sends what waits in the transmit FIFO.
FN void uart_drain(Machine &m) {
    Uart &u = m.vm->uart;
    u32 sent = 0;
    while (sent < u.tx_len && console_put(m, u.tx[sent])) sent++;
    for (u32 i = sent; i < u.tx_len; i++) u.tx[i - sent] = u.tx[i];
    u.tx_len -= sent;
    if (sent && !u.tx_len) u.thre_pending = 1;
}

SLOW void uart_poll(Machine &m) {
    if (m.vm->uart.tx_len) uart_drain(m);
    uart_fill(m);
    uart_update(m);
}

SLOW u32 uart_read(Machine &m, u32 reg) {
    Uart &u = m.vm->uart;
    u32 value = 0;
    switch (reg) {
    case 0:
        if (u.lcr & LCR_DLAB) return u.divisor & 0xff;
        if (u.rx_len) {
            value = u.rx[0];
            u.rx_len--;
            for (u32 i = 0; i < u.rx_len; i++) u.rx[i] = u.rx[i + 1];
        }
        uart_fill(m);
        break;
    case 1: return u.lcr & LCR_DLAB ? u.divisor >> 8 : u.ier;
    case 2:
        value = uart_iir(u);
        if (value == 2) u.thre_pending = 0;
        value |= u.fcr & FCR_ENABLE ? 0xC0 : 0;
        break;
    case 3: return u.lcr;
    case 4: return u.mcr;
    case 5:
        value = u.lsr_errors | (u.rx_len ? LSR_DR : 0) | (u.tx_len ? 0 : LSR_THRE | LSR_TEMT);
        u.lsr_errors = 0;
        break;
    case 6:
        value = uart_lines(u) | (u.msr & 15);
        u.msr &= ~15u;
        break;
    default: return u.scr;
    }
    uart_update(m);
    return value;
}

SLOW void uart_write(Machine &m, u32 reg, u32 value) {
    Uart &u = m.vm->uart;
    value &= 0xff;
    switch (reg) {
    case 0:
        if (u.lcr & LCR_DLAB) {
            u.divisor = (u.divisor & 0xff00) | value;
            return;
        }
        u.thre_pending = 0;
        if (u.mcr & MCR_LOOP) {
            uart_receive(u, (u8)value);
            u.thre_pending = 1;
        } else if (u.tx_len == 0 && console_put(m, (u8)value)) {
            u.thre_pending = 1;
        } else if (u.tx_len < UART_FIFO) {
            u.tx[u.tx_len++] = (u8)value; // the host is behind: wait for it
            m.vm->exit = EXIT_DRAIN;
            m.events |= EV_EXIT;
        }
        break;
    case 1:
        if (u.lcr & LCR_DLAB) {
            u.divisor = (u.divisor & 0xff) | value << 8;
            return;
        }
        if (!(u.ier & IER_THRE) && (value & IER_THRE) && !u.tx_len) u.thre_pending = 1;
        u.ier = value & 15;
        uart_fill(m);
        break;
    case 2:
        if ((value ^ u.fcr) & FCR_ENABLE) u.rx_len = 0;  // a change of mode clears both FIFOs
        if (!(value & FCR_ENABLE)) value = u.fcr & 0xC0; // the other bits are not programmed then
        if (value & 2) u.rx_len = 0;
        u.fcr = value & (FCR_ENABLE | 0xC0);
        break;
    case 3: u.lcr = value; return;
    case 4: {
        u32 before = uart_lines(u);
        u.mcr = value & 0x1f;
        u32 after = uart_lines(u), changed = before ^ after;
        u.msr |= (changed & 0xB0) >> 4 | (before & ~after & 0x40) >> 4; // RI counts at its trailing edge
        uart_fill(m);
        break;
    }
    case 7: u.scr = value; return;
    default: return; // LSR and MSR are read-only
    }
    uart_update(m);
}
