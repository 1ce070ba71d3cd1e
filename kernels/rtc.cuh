// Goldfish real-time clock: nanoseconds since the epoch in two words, and one alarm.
#pragma once
#include "plic.cuh"

FN u64 rtc_now(const Vm &vm) { return vm.rtc.epoch_ns + guest_ticks(vm.hart) * 200 / 13; } // 65 MHz

// Guest time in ticks at which the armed alarm rings.
FN u64 rtc_alarm_ticks(const Vm &vm) {
    if (!vm.rtc.armed) return ~0ull;
    if (vm.rtc.alarm_ns <= vm.rtc.epoch_ns) return 0;
    u64 ns = vm.rtc.alarm_ns - vm.rtc.epoch_ns;
    return ns / 200 * 13 + (ns % 200 * 13 + 199) / 200;
}

SLOW void rtc_poll(Machine &m) {
    Rtc &r = m.vm->rtc;
    if (r.armed && guest_ticks(m.vm->hart) >= rtc_alarm_ticks(*m.vm)) r.armed = 0, r.interrupt = 1;
    plic_line(m, RTC_IRQ, r.interrupt && r.irq_enabled);
}

SLOW u32 rtc_read(Machine &m, u32 offset) {
    Rtc &r = m.vm->rtc;
    switch (offset) {
    case 0x00: { // TIME_LOW latches TIME_HIGH
        u64 now = rtc_now(*m.vm);
        r.latched_high = (u32)(now >> 32);
        return (u32)now;
    }
    case 0x04: return r.latched_high;
    case 0x08: return (u32)r.alarm_ns;
    case 0x0c: return (u32)(r.alarm_ns >> 32);
    case 0x10: return r.irq_enabled;
    case 0x18: return r.armed;
    default: return 0;
    }
}

SLOW void rtc_write(Machine &m, u32 offset, u32 value) {
    Rtc &r = m.vm->rtc;
    switch (offset) {
    case 0x00: r.epoch_ns += (((u64)r.latched_high << 32) | value) - rtc_now(*m.vm); break; // after TIME_HIGH
    case 0x04: r.latched_high = value; break;
    case 0x08: // arms; ALARM_HIGH was written before
        r.alarm_ns = (u64)r.alarm_high << 32 | value;
        r.armed = 1;
        break;
    case 0x0c: r.alarm_high = value; break;
    case 0x10: r.irq_enabled = value & 1; break;
    case 0x14: r.armed = 0; break;
    case 0x1c: r.interrupt = 0; break;
    default: return;
    }
    rtc_poll(m);
    m.events |= EV_CHECK;
}
