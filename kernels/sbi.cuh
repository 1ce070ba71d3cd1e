// SBI 2.0 as the machine provides it: base, TIME, IPI, sPI, RFENCE, HSM, SRST, DBCN and the legacy calls that
// consoles of small kernels use. One hart, hart 0.
#pragma once
#include "bus.cuh"

#define SBI_OK 0
#define SBI_FAILED (-1)
#define SBI_NOT_SUPPORTED (-2)
#define SBI_INVALID_PARAM (-3)
#define SBI_INVALID_ADDRESS (-5)
#define SBI_ALREADY_AVAILABLE (-6)

#define SBI_BASE 0x10u
#define SBI_TIME 0x54494D45u
#define SBI_IPI 0x735049u
#define SBI_RFENCE 0x52464E43u
#define SBI_HSM 0x48534Du
#define SBI_SRST 0x53525354u
#define SBI_DBCN 0x4442434Eu

struct SbiResult {
    i32 error;
    u32 value;
};
FN SbiResult sbi_result(i32 error, u32 value) {
    SbiResult r;
    r.error = error, r.value = value;
    return r;
}

FN void set_timer(Machine &m, u32 low, u32 high) {
    m.vm->hart.stimecmp = (u64)high << 32 | low;
    m.events |= EV_CHECK;
}

FN void exit_with(Machine &m, u32 code) {
    m.vm->exit = code;
    m.events |= EV_EXIT;
}

// Whether a hart mask names hart 0 and no other hart; base -1 stands for all harts.
FN bool names_hart_0(u32 mask, u32 base) { return base == 0xFFFFFFFFu || (base == 0 && mask == 1); }

// The hart waits until an interrupt is pending. With one at hand, it goes on at once (3.3.3).
FN void wait_for_interrupt(Machine &m) {
    m.vm->hart.waiting = 1;
    m.events |= EV_CHECK;
}

// Puts a byte on the wire. While there is no room, the ECALL has not happened: the slice ends before it.
FN void console_put_blocking(Machine &m, u8 byte) {
    if (console_put(m, byte)) return;
    exit_with(m, EXIT_DRAIN);
    not_executed(m);
}

// Debug console: `len` bytes of guest memory, all of it in RAM.
SLOW SbiResult debug_console(Machine &m, u32 function, u32 len, u32 low, u32 high) {
    if (function > 2) return sbi_result(SBI_NOT_SUPPORTED, 0);
    if (function == 2) { // one byte
        console_put_blocking(m, (u8)len);
        return sbi_result(SBI_OK, 0);
    }
    if (high || !ram_has(m, low, len)) return sbi_result(SBI_INVALID_PARAM, 0);
    u32 done = 0;
    if (function == 0) {
        if (len > 256) len = 256; // a partial write is allowed and keeps slices short
        for (; done < len; done++) {
            const u8 *byte = ram_read_at(m, low + done);
            if (!byte || !console_put(m, *byte)) break;
        }
        if (done < len) exit_with(m, EXIT_DRAIN);
        return sbi_result(SBI_OK, done);
    }
    for (u32 left = input_waiting(m); left && done < len; left--, done++) {
        u8 *to = ram_write_at(m, low + done);
        if (!to) break;
        *to = input_take(m);
    }
    return sbi_result(SBI_OK, done);
}

SLOW SbiResult sbi_call(Machine &m, u32 extension, u32 function, const u32 *a) {
    switch (extension) {
    case SBI_BASE:
        switch (function) {
        case 0: return sbi_result(SBI_OK, 0x02000000); // version 2.0
        case 1: return sbi_result(SBI_OK, 0x4C4F47);   // implementation: ours
        case 2: return sbi_result(SBI_OK, 1);
        case 3: {
            u32 e = a[0];
            bool has = e == SBI_BASE || e == SBI_TIME || e == SBI_IPI || e == SBI_RFENCE || e == SBI_HSM ||
                       e == SBI_SRST || e == SBI_DBCN || e <= 3 || e == 5 || e == 6 || e == 7 || e == 8;
            return sbi_result(SBI_OK, has);
        }
        case 4:
        case 5:
        case 6: return sbi_result(SBI_OK, 0); // mvendorid, marchid, mimpid
        default: return sbi_result(SBI_NOT_SUPPORTED, 0);
        }
    case SBI_TIME:
        if (function != 0) break;
        set_timer(m, a[0], a[1]);
        return sbi_result(SBI_OK, 0);
    case SBI_IPI:
        if (function != 0) break;
        if (!names_hart_0(a[0], a[1])) return sbi_result(a[0] == 0 ? SBI_OK : SBI_INVALID_PARAM, 0);
        m.vm->hart.sip |= IP_SSIP;
        m.events |= EV_CHECK;
        return sbi_result(SBI_OK, 0);
    case SBI_RFENCE:
        if (function > 2) break; // the rest is for hypervisors
        if (!names_hart_0(a[0], a[1])) return sbi_result(a[0] == 0 ? SBI_OK : SBI_INVALID_PARAM, 0);
        if (function) m.events |= EV_FLUSH;
        return sbi_result(SBI_OK, 0);
    case SBI_HSM:
        switch (function) {
        case 0: return sbi_result(a[0] == 0 ? SBI_ALREADY_AVAILABLE : SBI_INVALID_PARAM, 0);
        case 1: exit_with(m, EXIT_STOPPED); return sbi_result(SBI_OK, 0);
        case 2: return sbi_result(a[0] == 0 ? SBI_OK : SBI_INVALID_PARAM, 0); // started
        case 3:
            if (a[0] == 0) { // default retentive suspend
                wait_for_interrupt(m);
                return sbi_result(SBI_OK, 0);
            }
            return sbi_result(a[0] == 0x80000000u ? SBI_NOT_SUPPORTED : SBI_INVALID_PARAM, 0);
        default: break;
        }
        break;
    case SBI_SRST:
        if (function != 0) break;
        if (a[0] > 2 || a[1] > 1) return sbi_result(SBI_INVALID_PARAM, 0);
        exit_with(m, a[1] == 1 ? EXIT_FAILURE : a[0] == 0 ? EXIT_SHUTDOWN : EXIT_REBOOT);
        return sbi_result(SBI_OK, 0);
    case SBI_DBCN: return debug_console(m, function, a[0], a[1], a[2]);
    default: break;
    }
    return sbi_result(SBI_NOT_SUPPORTED, 0);
}

// ECALL from S mode. Arguments and results are in hart.x: the engine has put its registers there.
SLOW void sbi_ecall(Machine &m) {
    u32 *x = m.vm->hart.x;
    u32 extension = x[17];
    switch (extension) { // legacy: result in a0 alone
    case 0:
        set_timer(m, x[10], x[11]);
        x[10] = 0;
        return;
    case 1:
        console_put_blocking(m, (u8)x[10]);
        if (!(m.events & EV_EXIT)) x[10] = 0;
        return;
    case 2: x[10] = input_waiting(m) ? input_take(m) : 0xFFFFFFFFu; return;
    case 3:
        m.vm->hart.sip &= ~IP_SSIP;
        x[10] = 0;
        return;
    case 5: x[10] = 0; return;
    case 6:
    case 7:
        m.events |= EV_FLUSH;
        x[10] = 0;
        return;
    case 8:
        exit_with(m, EXIT_SHUTDOWN);
        x[10] = 0;
        return;
    default: break;
    }
    u32 a[4] = {x[10], x[11], x[12], x[13]};
    SbiResult r = sbi_call(m, extension, x[16], a);
    if (m.events & EV_JUMP) return; // it will be called again
    x[10] = (u32)r.error, x[11] = r.value;
}
