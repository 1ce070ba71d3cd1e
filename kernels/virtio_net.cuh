// virtio-net over virtio-mmio version 2 (virtio 1.2: 2.7 split virtqueues, 4.2.2 registers, 5.1 network
// device). The link's other end is the mailbox. Whatever the driver writes is bounded before use; a queue
// that makes no sense sets DEVICE_NEEDS_RESET and is left alone until the driver resets the device.
#pragma once
#include "plic.cuh"

#define VIRTIO_F_VERSION_1_HIGH 1u // bit 32
#define VIRTIO_NET_F_GUEST_CSUM (1u << 1)
#define VIRTIO_NET_F_MTU (1u << 3)
#define VIRTIO_NET_F_MAC (1u << 5)
#define STATUS_DRIVER_OK 4u
#define STATUS_FEATURES_OK 8u
#define STATUS_NEEDS_RESET 64u
#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define AVAIL_NO_INTERRUPT 1u
#define NET_DATA_VALID 2u // flag of the header: checksums were verified (5.1.6.4)
#define NET_HEADER 12u    // virtio_net_hdr with num_buffers: always so with VERSION_1 (5.1.6)
#define RXQ 0
#define TXQ 1

FN u32 net_features(u32 word) {
    return word == 0   ? VIRTIO_NET_F_GUEST_CSUM | VIRTIO_NET_F_MTU | VIRTIO_NET_F_MAC
           : word == 1 ? VIRTIO_F_VERSION_1_HIGH
                       : 0;
}

FN void net_interrupt(Machine &m, u32 bits) {
    m.vm->net.interrupt |= bits;
    plic_line(m, NET_IRQ, m.vm->net.interrupt != 0);
}

SLOW void net_broken(Machine &m) {
    VirtioNet &n = m.vm->net;
    n.status |= STATUS_NEEDS_RESET;
    n.errors++;
    n.tx_stalled = 0;
    if (n.status & STATUS_DRIVER_OK) net_interrupt(m, 2); // configuration change (2.1.2)
}

FN bool net_running(const VirtioNet &n, u32 queue) {
    return (n.status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET)) == STATUS_DRIVER_OK && n.queue[queue].ready;
}

// A descriptor chain, walked one descriptor at a time.
struct Chain {
    u64 addr;
    u32 len, flags, next, left;
};
FN bool chain_load(Machine &m, const Virtq &q, Chain &c) {
    u64 at = q.desc + 16 * (u64)c.next;
    u32 lo, hi, flags, next;
    if (c.next >= q.num || c.left == 0) return false; // beyond the table, or a loop
    if (!ram_load(m, at, 4, lo) || !ram_load(m, at + 4, 4, hi) || !ram_load(m, at + 8, 4, c.len) ||
        !ram_load(m, at + 12, 2, flags) || !ram_load(m, at + 14, 2, next))
        return false;
    if (flags & ~(DESC_NEXT | DESC_WRITE)) return false; // indirect descriptors were not offered
    c.addr = (u64)hi << 32 | lo, c.flags = flags, c.next = next, c.left--;
    return ram_has(m, c.addr, c.len);
}

// Opens the next available chain. 1: opened, 0: none, -1: broken.
FN int queue_next(Machine &m, Virtq &q, u32 &head, Chain &c) {
    u32 idx;
    if (!ram_load(m, q.avail + 2, 2, idx)) return -1;
    u32 waiting = (idx - q.last_avail) & 0xffff;
    if (waiting == 0) return 0;
    if (waiting > q.num) return -1;
    if (!ram_load(m, q.avail + 4 + 2 * (u64)(q.last_avail % q.num), 2, head)) return -1;
    c.next = head, c.left = q.num;
    return chain_load(m, q, c) ? 1 : -1;
}

// Whether the next used element can be written. Not when its page is still shared and no frame is left: the
// VM then stops, and tries again.
SLOW bool queue_writable(Machine &m, const Virtq &q) {
    u64 at = q.used + 4 + 8 * (u64)(q.used_idx % q.num);
    return ram_write_at(m, (u32)at) && ram_write_at(m, (u32)at + 4) && ram_write_at(m, (u32)q.used + 2);
}

// Puts the chain on the used ring.
FN bool queue_done(Machine &m, Virtq &q, u32 head, u32 written) {
    u64 at = q.used + 4 + 8 * (u64)(q.used_idx % q.num);
    u32 next = (q.used_idx + 1) & 0xffff;
    if (!ram_store(m, at, 4, head) || !ram_store(m, at + 4, 4, written) || !ram_store(m, q.used + 2, 2, next))
        return false;
    q.used_idx = next;
    q.last_avail = (q.last_avail + 1) & 0xffff;
    m.vm->hart.reservation = 0xFFFFFFFFu; // a device has written
    return true;
}

FN bool queue_wants_interrupt(Machine &m, const Virtq &q) {
    u32 flags;
    return ram_load(m, q.avail, 2, flags) && !(flags & AVAIL_NO_INTERRUPT);
}

SLOW void net_transmit(Machine &m) {
    VirtioNet &n = m.vm->net;
    Virtq &q = n.queue[TXQ];
    n.tx_stalled = 0;
    if (!net_running(n, TXQ)) return;
    bool done = false;
    for (u32 budget = q.num; budget; budget--) {
        u32 head;
        Chain c;
        int got = queue_next(m, q, head, c);
        if (got < 0) return net_broken(m);
        if (got == 0) break;
        Rings &rings = m.vm->rings;
        if (rings.tx_head - rings.tx_tail >= NET_SLOTS) rings.tx_tail = shared_load(&m.mail->rings.tx_tail);
        if (rings.tx_head - rings.tx_tail >= NET_SLOTS || !queue_writable(m, q)) {
            n.tx_stalled = 1; // the host is behind: go on when it has taken some
            break;
        }
        Slot &slot = m.mail->tx[rings.tx_head % NET_SLOTS];
        u64 total = 0;
        u32 len = 0;
        for (;;) {
            if (c.flags & DESC_WRITE) return net_broken(m);
            u32 skip = total < NET_HEADER ? (u32)(NET_HEADER - total) : 0;
            if (skip > c.len) skip = c.len;
            u32 take = c.len - skip;
            total += c.len;
            if (total <= NET_HEADER + ETH_FRAME_BYTES) {
                if (take && !ram_copy_out(m, (u32)c.addr + skip, slot.data + len, take)) return net_broken(m);
                len += take;
            }
            if (!(c.flags & DESC_NEXT)) break;
            if (!chain_load(m, q, c)) return net_broken(m);
        }
        if (total > NET_HEADER + ETH_FRAME_BYTES || len < 14) {
            n.tx_dropped++;
        } else {
            slot.len = (u16)len;
            shared_store(&m.mail->rings.tx_head, ++rings.tx_head);
            n.tx_frames++, n.tx_bytes += len;
        }
        if (!queue_done(m, q, head, 0)) return net_broken(m);
        done = true;
    }
    if (done && queue_wants_interrupt(m, q)) net_interrupt(m, 1);
}

// Gives the guest what has come, as far as its buffers go. False: its queue is broken.
FN bool net_receive_all(Machine &m) {
    VirtioNet &n = m.vm->net;
    Virtq &q = n.queue[RXQ];
    Rings &rings = m.vm->rings;
    bool done = false, starved = false;
    for (u32 budget = NET_SLOTS; budget && rings.rx_tail != rings.rx_head; budget--) {
        const Slot &slot = m.mail->rx[rings.rx_tail % NET_SLOTS];
        u32 head;
        Chain c;
        int got = queue_next(m, q, head, c);
        if (got < 0) return false;
        if (got == 0 || !queue_writable(m, q)) break; // no buffer: the frame waits
        u32 len = slot.len, at = 0, total = NET_HEADER + len;
        if (len > ETH_FRAME_BYTES) total = 0xFFFFFFFFu;
        // All of the chain is checked before the first byte is written.
        Chain probe = c;
        u64 room = 0;
        for (;;) {
            if (!(probe.flags & DESC_WRITE)) return false;
            room += probe.len;
            if (!(probe.flags & DESC_NEXT)) break;
            if (!chain_load(m, q, probe)) return false;
        }
        if (room < total) {
            n.rx_dropped++, rings.rx_tail++;
            continue;
        }
        bool valid = slot.flags & SLOT_INTACT && n.driver_features[0] & VIRTIO_NET_F_GUEST_CSUM;
        u8 header[NET_HEADER] = {
            (u8)(valid ? NET_DATA_VALID : 0), 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0}; // num_buffers = 1
        for (;;) {
            u32 off = 0;
            while (off < c.len && at < total) {
                bool in_header = at < NET_HEADER;
                u32 run = (in_header ? NET_HEADER : total) - at;
                if (run > c.len - off) run = c.len - off;
                const u8 *from = in_header ? header + at : slot.data + (at - NET_HEADER);
                m.vm->hart.reservation = 0xFFFFFFFFu;
                starved = !ram_copy_in(m, (u32)c.addr + off, from, run);
                if (starved) break;
                off += run, at += run;
            }
            if (at == total || starved) break;
            if (!chain_load(m, q, c)) return false;
        }
        if (starved) break; // no frame left: the slice ends, and this packet is tried again
        if (!queue_done(m, q, head, total)) return false;
        n.rx_frames++, n.rx_bytes += len, rings.rx_tail++;
        done = true;
    }
    if (done && queue_wants_interrupt(m, q)) net_interrupt(m, 1);
    return true;
}

// What was there when the mailbox's index was looked at last.
SLOW void net_take(Machine &m) {
    Rings &rings = m.vm->rings;
    if (!net_running(m.vm->net, RXQ)) return;
    u32 before = rings.rx_tail;
    if (!net_receive_all(m)) net_broken(m);
    if (rings.rx_tail != before) shared_store(&m.mail->rings.rx_tail, rings.rx_tail);
}

FN void net_receive(Machine &m) {
    if (!net_running(m.vm->net, RXQ)) return;
    m.vm->rings.rx_head = shared_load(&m.mail->rings.rx_head);
    net_take(m);
}

FN void net_reset(VirtioNet &n) {
    for (u32 i = 0; i < 2; i++) {
        Virtq &q = n.queue[i];
        q.num = 0, q.ready = 0, q.desc = 0, q.avail = 0, q.used = 0, q.last_avail = 0, q.used_idx = 0;
    }
    n.status = 0, n.interrupt = 0, n.device_sel = 0, n.driver_sel = 0, n.queue_sel = 0, n.tx_stalled = 0;
    n.driver_features[0] = n.driver_features[1] = 0;
}

FN u32 net_config_byte(const VirtioNet &n, u32 offset) {
    if (offset < 6) return n.mac[offset];
    if (offset == 10) return n.mtu & 0xff;
    if (offset == 11) return n.mtu >> 8;
    return 0;
}

SLOW u32 net_read(Machine &m, u32 offset, u32 size) {
    VirtioNet &n = m.vm->net;
    if (offset >= 0x100) {
        u32 value = 0;
        for (u32 i = 0; i < size; i++) value |= net_config_byte(n, offset - 0x100 + i) << (8 * i);
        return value;
    }
    bool selected = n.queue_sel < 2;
    switch (offset) {
    case 0x000: return 0x74726976; // "virt"
    case 0x004: return 2;
    case 0x008: return 1;
    case 0x00c: return 0x554d454c;
    case 0x010: return net_features(n.device_sel);
    case 0x034: return selected ? VIRTQ_MAX : 0;
    case 0x044: return selected ? n.queue[n.queue_sel].ready : 0;
    case 0x060: return n.interrupt;
    case 0x070: return n.status;
    case 0x0b0:
    case 0x0b4:
    case 0x0b8:
    case 0x0bc: return 0xFFFFFFFFu; // no shared memory regions (4.2.2)
    case 0x0fc: return n.generation;
    default: return 0;
    }
}

FN u64 with_low(u64 old, u32 value) { return (old & ~0xFFFFFFFFull) | value; }
FN u64 with_high(u64 old, u32 value) { return (old & 0xFFFFFFFFull) | (u64)value << 32; }

SLOW void net_write(Machine &m, u32 offset, u32 value) {
    VirtioNet &n = m.vm->net;
    Virtq scratch;
    bool setup = n.queue_sel < 2 && !n.queue[n.queue_sel].ready; // addresses are fixed once a queue is ready
    Virtq &q = setup ? n.queue[n.queue_sel] : scratch;
    switch (offset) {
    case 0x014: n.device_sel = value; return;
    case 0x020:
        if (n.driver_sel < 2 && !(n.status & STATUS_FEATURES_OK)) n.driver_features[n.driver_sel] = value;
        return;
    case 0x024: n.driver_sel = value; return;
    case 0x030: n.queue_sel = value; return;
    case 0x038:
        if (value && value <= VIRTQ_MAX && !(value & (value - 1))) q.num = value;
        return;
    case 0x044:
        if (n.queue_sel >= 2) return;
        if (!(value & 1)) {
            n.queue[n.queue_sel].ready = 0;
        } else if (setup) {
            // sizes and alignments of 2.7, all of it in RAM
            bool good = q.num && !(q.desc & 15) && !(q.avail & 1) && !(q.used & 3) &&
                        ram_has(m, q.desc, 16 * q.num) && ram_has(m, q.avail, 6 + 2 * q.num) &&
                        ram_has(m, q.used, 6 + 8 * q.num);
            if (!good) return net_broken(m);
            q.ready = 1, q.last_avail = 0, q.used_idx = 0;
        }
        return;
    case 0x050:
        if (value == TXQ)
            net_transmit(m);
        else if (value == RXQ)
            net_receive(m);
        return;
    case 0x064:
        n.interrupt &= ~value;
        plic_line(m, NET_IRQ, n.interrupt != 0);
        return;
    case 0x070:
        if (value == 0) {
            net_reset(n);
            plic_line(m, NET_IRQ, false);
            return;
        }
        if ((value & STATUS_FEATURES_OK) && !(n.status & STATUS_FEATURES_OK)) {
            bool subset =
                !(n.driver_features[0] & ~net_features(0)) && n.driver_features[1] == net_features(1);
            if (!subset) value &= ~STATUS_FEATURES_OK;
        }
        n.status = (value & 0xff) | (n.status & STATUS_NEEDS_RESET);
        if (n.status & STATUS_DRIVER_OK) net_receive(m);
        return;
    case 0x080: q.desc = with_low(q.desc, value); return;
    case 0x084: q.desc = with_high(q.desc, value); return;
    case 0x090: q.avail = with_low(q.avail, value); return;
    case 0x094: q.avail = with_high(q.avail, value); return;
    case 0x0a0: q.used = with_low(q.used, value); return;
    case 0x0a4: q.used = with_high(q.used, value); return;
    default: return; // config space is read-only for the driver: MAC and MTU
    }
}

SLOW void net_poll(Machine &m) {
    if (m.vm->net.tx_stalled) net_transmit(m);
    if (m.vm->rings.rx_tail != m.vm->rings.rx_head) net_take(m);
}
