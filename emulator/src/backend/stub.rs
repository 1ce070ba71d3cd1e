//! VMs without a machine: each answers HTTP and pings from its mailbox with next to no work, so that what stands between
//! it and a client can be measured. For `--backend stub`, which is not for users.
//!
//! A stub keeps no state of its connections: all that an answer needs is in the packet that it answers.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};

use crate::abi::{
    CONSOLE_OUT_BYTES, ETH_FRAME_BYTES, EXIT_BUDGET, EXIT_DRAIN, EXIT_IDLE, Mailbox, NET_SLOTS, SliceResult,
    TIME_REAL,
};
use crate::backend::{Engine, EngineError, Machines, MemoryUse, Slice, Watch};
use crate::mailbox::MailboxRef;
use crate::memory::map::Mapping;
use crate::net::checksum;
use crate::net::packet::{Carries, ETHERNET_LEN, Ethernet, FRAME_MAX, FrameBuf, ICMP, Ipv4, TCP};
use crate::sync::lock;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;
/// Nominal steps of a slice.
const STEPS: u64 = 1000;

/// What a stub's web server says. A request has to fit one segment.
#[derive(Clone, Debug)]
pub struct Page {
    answer: Vec<u8>,
}

impl Page {
    /// An HTTP answer with a body of so many bytes.
    pub fn new(bytes: usize) -> Self {
        let header = format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n");
        Self { answer: [header.as_bytes(), &vec![b'x'; bytes]].concat() }
    }

    /// The whole answer.
    pub fn answer(&self) -> &[u8] {
        &self.answer
    }

    /// What a VM answers to a frame; returns the answer's length. It closes after a request that says so, or if `close`.
    pub fn reply(&self, frame: &[u8], close: bool, out: &mut FrameBuf) -> Option<usize> {
        let ethernet = Ethernet::parse(frame).ok().filter(|ethernet| ethernet.carries == Carries::Ipv4)?;
        let ip = Ipv4::parse(ethernet.payload).ok().filter(|ip| ip.header_len() == 20)?;
        out[..6].copy_from_slice(&ethernet.src);
        out[6..12].copy_from_slice(&ethernet.dst);
        out[12..34].copy_from_slice(&frame[12..34]);
        out[26..30].copy_from_slice(&ip.dst().octets());
        out[30..34].copy_from_slice(&ip.src().octets());
        match ip.protocol() {
            ICMP => echo(&ip, out),
            TCP => {
                ip.segment().ok()?;
                self.segment(&ip, close, out)
            }
            _ => None,
        }
    }

    fn segment(&self, ip: &Ipv4<'_>, close: bool, out: &mut FrameBuf) -> Option<usize> {
        let tcp = ip.payload();
        let long = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let (seq, ack, flags) = (long(4), long(8), tcp[13]);
        let data = &tcp[usize::from(tcp[12] >> 4) * 4..];
        let close = close
            || data.windows(17).any(|part| part.eq_ignore_ascii_case(b"connection: close"))
            || data.windows(9).any(|part| part == b" HTTP/1.0");
        let bytes = data.len() as u32;
        let (my_seq, my_ack, my_flags, body): (u32, u32, u8, &[u8]) = if flags & RST != 0 {
            return None;
        } else if flags & SYN != 0 {
            (1000, seq.wrapping_add(1), SYN | ACK, &[])
        } else if bytes > 0 {
            let last = if close { FIN } else { 0 };
            let end = u32::from(flags & FIN != 0);
            (ack, seq.wrapping_add(bytes + end), ACK | PSH | last, &self.answer)
        } else if flags & FIN != 0 {
            // Its end answers ours, or asks for one.
            (ack, seq.wrapping_add(1), ACK | if ack == 1001 { FIN } else { 0 }, &[])
        } else {
            return None;
        };
        let options: &[u8] = if my_flags & SYN != 0 { &[2, 4, 0x05, 0xb4] } else { &[] };
        let len = 40 + options.len() + body.len();
        let packet = out.get_mut(ETHERNET_LEN..ETHERNET_LEN + len)?;
        packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        seal(packet);
        packet[20..22].copy_from_slice(&tcp[2..4]);
        packet[22..24].copy_from_slice(&tcp[..2]);
        packet[24..28].copy_from_slice(&my_seq.to_be_bytes());
        packet[28..32].copy_from_slice(&my_ack.to_be_bytes());
        packet[32] = ((20 + options.len()) as u8 / 4) << 4;
        packet[33] = my_flags;
        packet[34..40].copy_from_slice(&[0xfa, 0xf0, 0, 0, 0, 0]);
        packet[40..40 + options.len()].copy_from_slice(options);
        packet[40 + options.len()..].copy_from_slice(body);
        let sum = checksum::of_segment(ip.dst(), ip.src(), TCP, &packet[20..]);
        packet[36..38].copy_from_slice(&sum.to_be_bytes());
        Some(ETHERNET_LEN + len)
    }
}

/// Answers a ping.
fn echo(ip: &Ipv4<'_>, out: &mut FrameBuf) -> Option<usize> {
    const REPLY: u8 = 0;
    const ECHO: u8 = 8;
    let len = ip.bytes().len();
    if ip.payload().len() < 8 || ip.payload()[0] != ECHO {
        return None;
    }
    let packet = &mut out[ETHERNET_LEN..ETHERNET_LEN + len];
    packet[20..].copy_from_slice(ip.payload());
    packet[20] = REPLY;
    packet[22..24].fill(0);
    let sum = checksum::of(&packet[20..]);
    packet[22..24].copy_from_slice(&sum.to_be_bytes());
    seal(packet);
    Some(ETHERNET_LEN + len)
}

/// The IPv4 header's checksum.
fn seal(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum = checksum::of(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// A fleet of stubs.
pub struct StubMachines {
    shared: Arc<Shared>,
    threads: u32,
}

struct Shared {
    /// A mailbox each, zeroed: empty.
    mailboxes: Mapping,
    vms: Vec<Mutex<SliceResult>>,
    page: Page,
}

impl StubMachines {
    /// So many stubs, served by so many threads.
    pub fn new(vms: u32, threads: u32, page: Page) -> std::io::Result<Self> {
        let mailboxes = Mapping::new(size_of::<Mailbox>() * vms as usize)?;
        let vms = (0..vms).map(|_| Mutex::default()).collect();
        Ok(Self { shared: Arc::new(Shared { mailboxes, vms, page }), threads })
    }
}

impl Shared {
    fn mailbox(&self, vm: u32) -> *mut Mailbox {
        assert!((vm as usize) < self.vms.len());
        // SAFETY: within the mapping.
        unsafe { self.mailboxes.as_ptr().cast::<Mailbox>().add(vm as usize) }
    }

    fn run(&self, slice: &Slice, frame: &mut FrameBuf, answer: &mut FrameBuf) -> SliceResult {
        let port = Port(self.mailbox(slice.vm));
        let mut result = lock(&self.vms[slice.vm as usize]);
        result.time_ticks = match slice.request.time_mode {
            TIME_REAL => result.time_ticks.max(slice.request.now_ticks),
            _ => result.time_ticks + STEPS,
        };
        result.steps = STEPS;
        result.wake_ticks = u64::MAX;
        result.exit = EXIT_IDLE;
        if result.instret == 0 {
            port.print(format!("READY {}\n", slice.vm).as_bytes());
            result.newline_instret = STEPS;
            result.exit = EXIT_BUDGET;
        }
        result.instret += STEPS;
        loop {
            if port.full() {
                result.exit = EXIT_DRAIN;
                break;
            }
            let Some(len) = port.receive(frame) else { break };
            result.rx_frames += 1;
            if let Some(len) = self.page.reply(&frame[..len], false, answer) {
                port.send(&answer[..len]);
                result.tx_frames += 1;
            }
        }
        *result
    }
}

/// A stub's end of its mailbox. The scheduler lets one thread at a time have it.
struct Port(*mut Mailbox);

macro_rules! word {
    ($self:ident . $field:ident) => {
        // SAFETY: the mailbox lives as long as the machines; the field is an aligned u32.
        unsafe { AtomicU32::from_ptr(&raw mut (*$self.0).rings.$field) }
    };
}

impl Port {
    fn print(&self, bytes: &[u8]) {
        let mut head = word!(self.out_head).load(Relaxed);
        for &byte in bytes {
            // SAFETY: the index is masked to the ring.
            unsafe { (&raw mut (*self.0).out[(head % CONSOLE_OUT_BYTES) as usize]).write_volatile(byte) };
            head = head.wrapping_add(1);
        }
        word!(self.out_head).store(head, Release);
    }

    fn full(&self) -> bool {
        word!(self.tx_head).load(Relaxed).wrapping_sub(word!(self.tx_tail).load(Acquire)) >= NET_SLOTS
    }

    fn receive(&self, frame: &mut FrameBuf) -> Option<usize> {
        let tail = word!(self.rx_tail).load(Relaxed);
        if word!(self.rx_head).load(Acquire) == tail {
            return None;
        }
        // SAFETY: the slot at `tail` is ours until `tail` moves; the length is checked.
        let len = unsafe {
            let slot = &raw const (*self.0).rx[(tail % NET_SLOTS) as usize];
            let len = ((&raw const (*slot).len).read_volatile() as usize).min(FRAME_MAX);
            std::ptr::copy_nonoverlapping((&raw const (*slot).data).cast(), frame.as_mut_ptr(), len);
            len
        };
        word!(self.rx_tail).store(tail.wrapping_add(1), Release);
        Some(len)
    }

    /// Sends a frame; there is room.
    fn send(&self, frame: &[u8]) {
        debug_assert!(frame.len() <= ETH_FRAME_BYTES as usize);
        let head = word!(self.tx_head).load(Relaxed);
        // SAFETY: the slot at `head` is ours until `head` is published; a frame fits.
        unsafe {
            let slot = &raw mut (*self.0).tx[(head % NET_SLOTS) as usize];
            (&raw mut (*slot).len).write_volatile(frame.len() as u16);
            std::ptr::copy_nonoverlapping(frame.as_ptr(), (&raw mut (*slot).data).cast(), frame.len());
        }
        word!(self.tx_head).store(head.wrapping_add(1), Release);
    }
}

struct StubEngine {
    shared: Arc<Shared>,
    frame: Box<FrameBuf>,
    answer: Box<FrameBuf>,
}

impl Engine for StubEngine {
    fn batch(&self) -> usize {
        1
    }

    fn run(
        &mut self,
        slices: &[Slice],
        results: &mut Vec<SliceResult>,
        _: Option<Watch<'_>>,
    ) -> Result<(), EngineError> {
        for slice in slices {
            results.push(self.shared.run(slice, &mut self.frame, &mut self.answer));
        }
        Ok(())
    }
}

impl Machines for StubMachines {
    fn backend(&self) -> &'static str {
        "stub"
    }

    fn engine(&self) -> String {
        "stub".into()
    }

    fn vms(&self) -> u32 {
        self.shared.vms.len() as u32
    }

    fn engines(&self) -> Result<Vec<Box<dyn Engine>>, EngineError> {
        let engine = || -> Box<dyn Engine> {
            Box::new(StubEngine {
                shared: self.shared.clone(),
                frame: Box::new([0; FRAME_MAX]),
                answer: Box::new([0; FRAME_MAX]),
            })
        };
        Ok((0..self.threads.max(1)).map(|_| engine()).collect())
    }

    fn mailbox(&self, vm: u32) -> MailboxRef<'_> {
        // SAFETY: the mapping lives as long as the machines; the host uses it through this type alone, stubs through
        // atomics.
        unsafe { MailboxRef::new(self.shared.mailbox(vm)) }
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse {
            overhead_bytes: size_of::<Mailbox>() as u64 * u64::from(self.vms()),
            ..MemoryUse::default()
        }
    }

    fn reset(&self, vm: u32) -> Result<(), EngineError> {
        *lock(&self.shared.vms[vm as usize]) = SliceResult::default();
        Ok(())
    }
}
