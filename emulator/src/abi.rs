//! Every structure that host and machine share, declared once.
//!
//! `build.rs` turns this file into the C header that `kernels/` includes and asserts every size and offset on the
//! C++ side, so the two can't drift. Only plain integers and arrays live here: 64-bit fields named `*_ptr` hold
//! addresses in the address space of the side that runs the machine (host memory for the CPU back end, device
//! memory for a GPU).

/// Bytes in one frame of guest RAM (RISC-V Privileged, Sv32: a base page).
pub const FRAME_BYTES: u32 = 4096;
/// Largest Ethernet frame on the link, without FCS: 14 bytes of header and an MTU of 1500.
pub const ETH_FRAME_BYTES: u32 = 1514;
/// Bytes reserved per packet slot.
pub const SLOT_BYTES: u32 = 1532;
/// Flag of a frame for the guest: an IPv4 packet whose checksums were verified.
pub const SLOT_INTACT: u16 = 1;
/// Packet slots in each direction of a mailbox; a power of two.
pub const NET_SLOTS: u32 = 8;
/// Bytes in the console output ring; a power of two.
pub const CONSOLE_OUT_BYTES: u32 = 2048;
/// Bytes in the console input ring; a power of two.
pub const CONSOLE_IN_BYTES: u32 = 256;
/// Entries per virtqueue: QueueNumMax. Below 32 Linux's TX queue stops (it wants 19 free descriptors).
pub const VIRTQ_MAX: u32 = 32;
/// Depth of each 16550 FIFO.
pub const UART_FIFO: u32 = 16;
/// Timer frequency in Hz: one tick of the `time` CSR.
pub const TIMEBASE_HZ: u32 = 65_000_000;

/// Physical base of the PLIC.
pub const PLIC_BASE: u32 = 0xF000_0000;
/// Bytes of the PLIC's window: up to and including context 0's threshold and claim page.
pub const PLIC_BYTES: u32 = 0x20_2000;
/// Physical base of the 16550 UART.
pub const UART_BASE: u32 = 0xF400_0000;
/// Bytes of the UART's window.
pub const UART_BYTES: u32 = 0x1000;
/// PLIC source of the UART.
pub const UART_IRQ: u32 = 1;
/// Physical base of virtio-net (virtio-mmio, version 2).
pub const NET_BASE: u32 = 0xF410_0000;
/// Bytes of virtio-net's window.
pub const NET_BYTES: u32 = 0x1000;
/// PLIC source of virtio-net.
pub const NET_IRQ: u32 = 2;
/// Physical base of the goldfish real-time clock.
pub const RTC_BASE: u32 = 0xF500_0000;
/// Bytes of the clock's window.
pub const RTC_BYTES: u32 = 0x1000;
/// PLIC source of the clock's alarm.
pub const RTC_IRQ: u32 = 3;

/// First three bytes of every VM's MAC address; the VM number follows, big endian, in three bytes.
pub const MAC_PREFIX: [u8; 3] = [0x02, 0x4c, 0x47];

/// Bytes in one code page: 1,024 micro-ops of 8 bytes, the one that leads to the next page, and padding that keeps
/// equal offsets of neighbouring pages in different cache sets.
pub const CODE_PAGE_BYTES: u32 = 8192 + 64;
/// Code pages that a VM may have for frames of its own.
pub const CODE_PAGES_PER_VM: u32 = 128;

/// Bytes of one text of engine W: a page's words, where in it traces start, and what was learned of its branches and of
/// its jumps, and how often traces were made again.
pub const TEXT_BYTES: u32 = 3 * FRAME_BYTES + FRAME_BYTES / 2;
/// Bytes of one trace of engine W: 32 lanes of 16 bytes. With k VMs in a warp a trace has 32 / k lanes.
pub const TRACE_BYTES: u32 = 512;
/// Texts that a device has room for at most: a lane of a trace names one in 12 bits.
pub const TEXTS_MOST: u32 = 4096;
/// Texts that a VM may make before the host clears them all, and one more for every 2^20 steps.
pub const TEXTS_PER_VM: u32 = 1024;
/// Traces that a VM may make, and one more for every 2^10 steps.
pub const TRACES_PER_VM: u32 = 1 << 16;
/// The first text and the first trace that are made. Number 0 is for lanes that have none: they read it for nothing, and
/// a cache beside them goes on saying what it said then.
pub const CODE_FIRST: u32 = 1;
/// Of 2^32 traces so many are looked at for what can be learned from them: one of 7.
pub const LESSONS_OFTEN: u32 = 0x2545_f491;
/// The same for decoded code that has been learned from in an earlier start: one of 56. A lesson costs a trace.
pub const LESSONS_SELDOM: u32 = 0x0492_4925;
/// Bytes of shared memory for a VM on a GPU, without the translations that it has at hand: 8 bytes each.
pub const VM_SLOT_BYTES: u32 = 288;

/// Frame table entry: the frame belongs to this VM alone and may be written in place.
pub const FRAME_PRIVATE: u32 = 0x8000_0000;
/// Frame table entry: the frame number.
pub const FRAME_MASK: u32 = (1 << 28) - 1;

/// The slice used up its budget.
pub const EXIT_BUDGET: u32 = 0;
/// WFI with nothing pending: the VM sleeps until `wake_ticks`, a packet or console input.
pub const EXIT_IDLE: u32 = 1;
/// SBI system reset: shutdown.
pub const EXIT_SHUTDOWN: u32 = 2;
/// SBI system reset: reboot.
pub const EXIT_REBOOT: u32 = 3;
/// The frame pool is exhausted; this VM asked for one more.
pub const EXIT_NO_FRAME: u32 = 4;
/// The host has to drain the mailbox (console or transmit slots are full) before the VM can go on.
pub const EXIT_DRAIN: u32 = 5;
/// The guest kernel asked for a reset because of a failure (SBI SRST reason 1: system failure).
pub const EXIT_FAILURE: u32 = 6;
/// Hart stopped by SBI HSM with no other hart to start it.
pub const EXIT_STOPPED: u32 = 7;

/// Guest time advances with executed instructions and jumps over idle stretches.
pub const TIME_VIRTUAL: u32 = 0;
/// Guest time follows `now_ticks` of the slice request, bounded by the work done.
pub const TIME_REAL: u32 = 1;

/// One RISC-V hart: integer registers and the supervisor CSRs (RISC-V Privileged 1.12).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Hart {
    /// x0-x31, then one write-only sink that stands for x0 as a destination.
    pub x: [u32; 33],
    /// Program counter.
    pub pc: u32,
    /// Instructions started: retired ones and those that trapped. Guest time is counted in it.
    pub steps: u64,
    /// Instructions that trapped instead of retiring; `instret` is `steps - trapped`.
    pub trapped: u64,
    /// Privilege mode: 0 user, 1 supervisor.
    pub mode: u32,
    /// `sstatus`: SIE, SPIE, SPP, SUM and MXR; the other bits read as zero.
    pub sstatus: u32,
    /// `sie`.
    pub sie: u32,
    /// `sip`: the software-writable SSIP bit only; STIP and SEIP are computed.
    pub sip: u32,
    /// `stvec`.
    pub stvec: u32,
    /// `scounteren`.
    pub scounteren: u32,
    /// `senvcfg`: FIOM.
    pub senvcfg: u32,
    /// `sscratch`.
    pub sscratch: u32,
    /// `sepc`.
    pub sepc: u32,
    /// `scause`.
    pub scause: u32,
    /// `stval`.
    pub stval: u32,
    /// `satp`.
    pub satp: u32,
    /// LR reservation: physical address, or `u32::MAX` for none.
    pub reservation: u32,
    /// 1 while the hart waits in WFI.
    pub waiting: u32,
    /// Timer deadline in ticks (SBI TIME); `u64::MAX` for none.
    pub stimecmp: u64,
    /// Guest time in ticks is `time_base + (steps >> time_shift)`.
    pub time_base: u64,
    /// See `time_base`: 0 in virtual time, 3 in real time.
    pub time_shift: u32,
    /// `TIME_VIRTUAL` or `TIME_REAL`.
    pub time_mode: u32,
    /// Key of the entropy source behind the `seed` CSR; the host draws it afresh for every VM.
    pub entropy_key: [u64; 2],
    /// Words drawn from the entropy source.
    pub entropy_count: u64,
    /// Copies of the last trap for diagnosis: cause, epc, tval.
    pub last_trap: [u32; 3],
    /// Padding.
    pub reserved: u32,
}

/// Platform-level interrupt controller, 31 sources, one context: hart 0, S mode (RISC-V PLIC 1.0.0).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Plic {
    /// Priority of each source, 0-7.
    pub priority: [u32; 32],
    /// Levels of the interrupt lines.
    pub level: u32,
    /// Pending bits.
    pub pending: u32,
    /// Claimed and not yet completed.
    pub claimed: u32,
    /// Enable bits of context 0.
    pub enable: u32,
    /// Priority threshold of context 0.
    pub threshold: u32,
    /// Padding.
    pub reserved: u32,
}

/// 16550A UART.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Uart {
    /// Interrupt enable register.
    pub ier: u32,
    /// FIFO control register as last written (bit 0: FIFOs on; bits 7:6: trigger).
    pub fcr: u32,
    /// Line control register.
    pub lcr: u32,
    /// Modem control register.
    pub mcr: u32,
    /// Scratch register.
    pub scr: u32,
    /// Divisor latch.
    pub divisor: u32,
    /// Modem status deltas (bits 3:0) and lines (bits 7:4).
    pub msr: u32,
    /// Overrun, parity, framing and break bits latched until LSR is read.
    pub lsr_errors: u32,
    /// Transmitter-empty interrupt waiting to be seen.
    pub thre_pending: u32,
    /// Bytes in the receive FIFO.
    pub rx_len: u32,
    /// Bytes that wait to be sent while the console ring is full.
    pub tx_len: u32,
    /// Padding.
    pub reserved: u32,
    /// Receive FIFO, oldest first.
    pub rx: [u8; 16],
    /// Transmit FIFO, oldest first.
    pub tx: [u8; 16],
    /// `instret` when the last newline was written.
    pub newline_instret: u64,
    /// Newlines written since reset.
    pub newlines: u64,
}

/// One split virtqueue (virtio 1.2, 2.7).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Virtq {
    /// QueueNum.
    pub num: u32,
    /// QueueReady.
    pub ready: u32,
    /// Descriptor area.
    pub desc: u64,
    /// Driver area (available ring).
    pub avail: u64,
    /// Device area (used ring).
    pub used: u64,
    /// Next available entry to take.
    pub last_avail: u32,
    /// Next used index to publish.
    pub used_idx: u32,
}

/// virtio-net over virtio-mmio (virtio 1.2, 4.2 and 5.1).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct VirtioNet {
    /// Receive queue, then transmit queue.
    pub queue: [Virtq; 2],
    /// Status register.
    pub status: u32,
    /// InterruptStatus.
    pub interrupt: u32,
    /// DeviceFeaturesSel.
    pub device_sel: u32,
    /// DriverFeaturesSel.
    pub driver_sel: u32,
    /// Driver features, low and high word.
    pub driver_features: [u32; 2],
    /// QueueSel.
    pub queue_sel: u32,
    /// ConfigGeneration.
    pub generation: u32,
    /// MAC address in config space.
    pub mac: [u8; 6],
    /// MTU in config space.
    pub mtu: u16,
    /// 1 while the transmit queue waits for room in the mailbox.
    pub tx_stalled: u32,
    /// Padding.
    pub reserved: u32,
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Bytes given to the guest.
    pub rx_bytes: u64,
    /// Frames taken from the guest.
    pub tx_frames: u64,
    /// Bytes taken from the guest.
    pub tx_bytes: u64,
    /// Frames dropped because the guest's buffer was too small.
    pub rx_dropped: u64,
    /// Frames dropped because the guest's frame was shorter than a header or longer than the link allows.
    pub tx_dropped: u64,
    /// Times the queues were found broken (DEVICE_NEEDS_RESET).
    pub errors: u64,
}

/// Goldfish real-time clock.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Rtc {
    /// Nanoseconds since the Unix epoch at guest tick 0.
    pub epoch_ns: u64,
    /// Alarm time in nanoseconds since the epoch.
    pub alarm_ns: u64,
    /// High word latched by a read of TIME_LOW.
    pub latched_high: u32,
    /// High word of an alarm being written.
    pub alarm_high: u32,
    /// 1 while an alarm is armed.
    pub armed: u32,
    /// 1 when the alarm may interrupt.
    pub irq_enabled: u32,
    /// 1 while the alarm interrupts.
    pub interrupt: u32,
    /// Padding.
    pub reserved: u32,
}

/// Where the guest's RAM is.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ram {
    /// Frame table: one `u32` a guest page.
    pub table_ptr: u64,
    /// Guest pages.
    pub pages: u32,
    /// Frames that belong to this VM alone.
    pub private_frames: u32,
    /// Which of this VM's private code pages are in use, a bit each.
    pub code_used: [u32; 4],
    /// Where the search for a code page to evict goes on.
    pub code_hand: u32,
    /// Padding.
    pub reserved: u32,
    /// Engine W: texts that this VM has made.
    pub texts_made: u32,
    /// Engine W: traces that this VM has made.
    pub traces_made: u32,
}

/// One virtual machine: all that a slice reads and writes, apart from frames and mailbox.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Vm {
    /// The hart.
    pub hart: Hart,
    /// Guest RAM.
    pub ram: Ram,
    /// The engine that runs the VM in this slice; only that engine uses it.
    pub engine_ptr: u64,
    /// VM number.
    pub number: u32,
    /// Exit of the last slice.
    pub exit: u32,
    /// Interrupt controller.
    pub plic: Plic,
    /// Console.
    pub uart: Uart,
    /// Network.
    pub net: VirtioNet,
    /// Clock.
    pub rtc: Rtc,
    /// The mailbox's indices during a slice: the machine's own, and the host's as they were last seen.
    pub rings: Rings,
}

/// One Ethernet frame on its way.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slot {
    /// Length in bytes.
    pub len: u16,
    /// `SLOT_INTACT`, or 0.
    pub flags: u16,
    /// The frame.
    pub data: [u8; SLOT_BYTES as usize],
}

/// Indices of a mailbox's rings. They run freely: the producer of a ring writes its `head`, the consumer its `tail`, and
/// each masks the index by the ring's size.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Rings {
    /// Written by the machine: console output produced.
    pub out_head: u32,
    /// Written by the host: console output consumed.
    pub out_tail: u32,
    /// Written by the host: console input produced.
    pub in_head: u32,
    /// Written by the machine: console input consumed.
    pub in_tail: u32,
    /// Written by the host: frames for the guest produced.
    pub rx_head: u32,
    /// Written by the machine: frames for the guest consumed.
    pub rx_tail: u32,
    /// Written by the machine: frames from the guest produced.
    pub tx_head: u32,
    /// Written by the host: frames from the guest consumed.
    pub tx_tail: u32,
}

/// Where host and machine meet: single-producer, single-consumer rings.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Mailbox {
    /// How far the rings are filled and emptied.
    pub rings: Rings,
    /// Console output.
    pub out: [u8; CONSOLE_OUT_BYTES as usize],
    /// Console input.
    pub input: [u8; CONSOLE_IN_BYTES as usize],
    /// Frames for the guest.
    pub rx: [Slot; NET_SLOTS as usize],
    /// Frames from the guest.
    pub tx: [Slot; NET_SLOTS as usize],
}

/// The frames that hold guest RAM, and the free ones among them.
///
/// Free frames wait in a ring: the machine takes at `head` (compare and swap), the host gives back at `tail`.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    /// Base of the frames; frame f lies at `base_ptr + f * FRAME_BYTES`.
    pub base_ptr: u64,
    /// Ring of free frame numbers, `capacity` entries of `u32`.
    pub ring_ptr: u64,
    /// Frames taken so far.
    pub head: u64,
    /// Frames given back so far, the first fill included.
    pub tail: u64,
    /// Frames in the pool; the ring's size.
    pub capacity: u32,
    /// Frames below this number are shared by all VMs and never written.
    pub shared_frames: u32,
    /// Code page of each frame plus one (`u32` each), or 0: decoded instructions, see `kernels/code.cuh`.
    pub code_of_ptr: u64,
    /// Frame of each code page (`u32` each).
    pub code_frame_ptr: u64,
    /// The code pages, `CODE_PAGE_BYTES` each: first `code_pages_per_vm` for each VM, then one for each shared frame.
    pub code_ptr: u64,
    /// Code pages that each VM may have for frames of its own; at most `CODE_PAGES_PER_VM`.
    pub code_pages_per_vm: u32,
    /// Engine W: texts made so far, and [`CODE_FIRST`] (may count beyond the capacity).
    pub text_count: u32,
    /// Engine W: texts, see `kernels/trace.cuh`.
    pub text_ptr: u64,
    /// Engine W: hash table of texts (`u32` each): text plus one, or 0.
    pub text_table_ptr: u64,
    /// Engine W: traces of 32 lanes of 16 bytes.
    pub trace_ptr: u64,
    /// Engine W: texts there is room for.
    pub text_capacity: u32,
    /// Engine W: size of the hash table, a power of two.
    pub text_slots: u32,
    /// Engine W: traces there is room for.
    pub trace_capacity: u32,
    /// Engine W: traces made so far, and [`CODE_FIRST`] (may count beyond the capacity).
    pub trace_count: u32,
    /// Engine W: translations that VMs had at hand at the end of their last slice, 8 bytes each and 8 more a VM, or 0.
    pub saved_ptr: u64,
    /// Engine W: counts how often all texts were forgotten.
    pub code_epoch: u32,
    /// Padding.
    pub reserved: u32,
}

/// One entry of the list of VMs that a GPU launch runs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GpuSlice {
    /// VM number.
    pub vm: u32,
    /// The slice ends early once its warp has run for so many cycles of its multiprocessor, at the next chance; 0: for any
    /// time. So a launch does not wait for those of its VMs that take longest.
    pub cycles: u32,
    /// What to run.
    pub request: SliceRequest,
}

/// What the host asks of one slice.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SliceRequest {
    /// Instructions to run at most.
    pub budget: u64,
    /// Host time in guest ticks since the fleet started (used in real time only).
    pub now_ticks: u64,
    /// `TIME_VIRTUAL` or `TIME_REAL`.
    pub time_mode: u32,
    /// 1: return `EXIT_BUDGET` at exactly `budget` steps; idle jumps of virtual time don't count as steps.
    pub reserved: u32,
}

/// What a slice did, and the counters that the host shows; the host reads no other part of a VM while it runs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SliceResult {
    /// One of the `EXIT_*` codes.
    pub exit: u32,
    /// Frames that belong to this VM alone.
    pub private_frames: u32,
    /// Steps taken in this slice.
    pub steps: u64,
    /// When idle: guest time in ticks at which the timer fires, `u64::MAX` for never.
    pub wake_ticks: u64,
    /// Guest time in ticks at the end.
    pub time_ticks: u64,
    /// Instructions retired since reset.
    pub instret: u64,
    /// `instret` when the guest last wrote a newline to its console.
    pub newline_instret: u64,
    /// Frames given to the guest since reset.
    pub rx_frames: u64,
    /// Frames taken from the guest since reset.
    pub tx_frames: u64,
    /// Frames dropped by the device since reset, either way.
    pub net_dropped: u64,
    /// Program counter at the end.
    pub pc: u32,
    /// Last trap: cause, epc, tval.
    pub last_trap: [u32; 3],
    /// Code pages for frames of the VM's own.
    pub code_pages: u32,
    /// Engine W: 1 if there is no room for more texts or traces: the host should clear them.
    pub code_full: u32,
}
