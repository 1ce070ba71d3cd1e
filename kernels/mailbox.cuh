// The machine's side of the mailbox (emulator/src/mailbox.rs is the host's). On a GPU it is the host's
// memory, where a look takes a microsecond and a write in order waits for all before it. So indices are
// looked at once, as a slice begins, and again only where they stand in the way or say that there is
// something.
#pragma once
#include "base.cuh"

// As a slice begins.
FN void rings_open(Machine &m) {
    const Rings &there = m.mail->rings;
    Rings seen;
    seen.out_head = shared_load(&there.out_head), seen.out_tail = shared_load(&there.out_tail);
    seen.in_head = shared_load(&there.in_head), seen.in_tail = shared_load(&there.in_tail);
    seen.rx_head = shared_load(&there.rx_head), seen.rx_tail = shared_load(&there.rx_tail);
    seen.tx_head = shared_load(&there.tx_head), seen.tx_tail = shared_load(&there.tx_tail);
    m.vm->rings = seen;
}

// As it ends: the host looks after consoles between slices.
FN void rings_close(Machine &m) {
    shared_store(&m.mail->rings.in_tail, m.vm->rings.in_tail);
    shared_store(&m.mail->rings.out_head, m.vm->rings.out_head);
}

// Puts a byte of output on the wire; false when the ring is full.
FN bool output_put(Machine &m, u8 byte) {
    Rings &rings = m.vm->rings;
    if (rings.out_head - rings.out_tail >= CONSOLE_OUT_BYTES)
        rings.out_tail = shared_load(&m.mail->rings.out_tail);
    if (rings.out_head - rings.out_tail >= CONSOLE_OUT_BYTES) return false;
    m.mail->out[rings.out_head++ % CONSOLE_OUT_BYTES] = byte;
    return true;
}

// Bytes of input that wait on the wire, to be taken one by one.
FN u32 input_waiting(Machine &m) {
    Rings &rings = m.vm->rings;
    if (rings.in_head != rings.in_tail) rings.in_head = shared_load(&m.mail->rings.in_head);
    return rings.in_head - rings.in_tail;
}
FN u8 input_take(Machine &m) { return m.mail->input[m.vm->rings.in_tail++ % CONSOLE_IN_BYTES]; }
