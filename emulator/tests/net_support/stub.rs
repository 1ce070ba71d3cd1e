//! VMs that answer HTTP with next to no work: so that the bridge is measured, and not its guests.
//!
//! The stub keeps no state: all that an answer needs is in the packet it answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use emulator::net::checksum;

use super::FakeLinks;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

pub struct Stubs {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stubs {
    /// Answers every segment with data with `answer`, then closes if `close`.
    pub fn start(links: Arc<FakeLinks>, answer: Vec<u8>, close: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut vms = Vec::new();
            let mut out = Vec::new();
            while !stopped.load(Ordering::Acquire) {
                links.wait_for_frames(&mut vms, Duration::from_millis(50));
                for vm in vms.drain(..) {
                    while links.vm_can_send(vm)
                        && let Some(frame) = links.vm_receives(vm)
                    {
                        if reply(&frame, &answer, close, &mut out) {
                            assert!(links.vm_sends(vm, &out));
                        }
                    }
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Stubs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn reply(frame: &[u8], answer: &[u8], close: bool, out: &mut Vec<u8>) -> bool {
    let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let tcp = &frame[34..14 + total];
    let long = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
    let (seq, ack, flags) = (long(4), long(8), tcp[13]);
    let data = (tcp.len() - usize::from(tcp[12] >> 4) * 4) as u32;
    if flags & RST != 0 {
        return false;
    }
    let (my_seq, my_ack, my_flags, body): (u32, u32, u8, &[u8]) = if flags & SYN != 0 {
        (1000, seq.wrapping_add(1), SYN | ACK, &[])
    } else if data > 0 {
        let last = if close { FIN } else { 0 };
        let end = u32::from(flags & FIN != 0);
        (ack, seq.wrapping_add(data + end), ACK | PSH | last, answer)
    } else if flags & FIN != 0 {
        (ack, seq.wrapping_add(1), ACK | if close { 0 } else { FIN }, &[])
    } else {
        return false;
    };
    out.clear();
    out.extend_from_slice(&frame[6..12]);
    out.extend_from_slice(&frame[..6]);
    out.extend_from_slice(&frame[12..34]);
    let options: &[u8] = if my_flags & SYN != 0 { &[2, 4, 0x05, 0xb4] } else { &[] };
    out[16..18].copy_from_slice(&((40 + options.len() + body.len()) as u16).to_be_bytes());
    out[24..26].copy_from_slice(&[0, 0]);
    out[26..30].copy_from_slice(&frame[30..34]);
    out[30..34].copy_from_slice(&frame[26..30]);
    let sum = checksum::of(&out[14..34]);
    out[24..26].copy_from_slice(&sum.to_be_bytes());
    out.extend_from_slice(&tcp[2..4]);
    out.extend_from_slice(&tcp[..2]);
    out.extend_from_slice(&my_seq.to_be_bytes());
    out.extend_from_slice(&my_ack.to_be_bytes());
    out.push(((20 + options.len()) as u8 / 4) << 4);
    out.push(my_flags);
    out.extend_from_slice(&[0xfa, 0xf0, 0, 0, 0, 0]);
    out.extend_from_slice(options);
    out.extend_from_slice(body);
    let address = |at: usize| std::net::Ipv4Addr::new(out[at], out[at + 1], out[at + 2], out[at + 3]);
    let sum = checksum::of_segment(address(26), address(30), 6, &out[34..]);
    out[50..52].copy_from_slice(&sum.to_be_bytes());
    true
}
