//! The host's end of the guest LAN: takes what VMs sent, lets the switch decide, and delivers, with a bounded queue
//! per VM in front of full mailboxes. Shared by all transports; every frame passes through here once each way.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Links;
use super::counters::Counters;
use super::packet::{FRAME_MAX, FrameBuf, Ipv4};
use super::reason::Reason;
use super::rewrite::frame_to_vm;
use super::switch::{self, Verdict};

/// Frames that may wait for one VM before TCP is asked to hold back.
pub const TCP_ROOM: usize = 16;
/// Frames that may wait for one VM at all: TCP's, answers, and what other VMs sent.
const QUEUE_MAX: usize = 48;
/// With so few VMs blocked, all are tried at every wake-up; with more, each by its own back-off.
const FEW_BLOCKED: usize = 64;
const BACKOFF_MIN: Duration = Duration::from_micros(500);
const BACKOFF_MAX: Duration = Duration::from_millis(200);

struct Blocked {
    frames: VecDeque<Box<[u8]>>,
    backoff: Duration,
    due: Instant,
}

/// The host's end of the LAN.
pub struct Lan {
    links: Arc<dyn Links>,
    counters: Arc<Counters>,
    blocked: HashMap<u32, Blocked>,
    retries: BinaryHeap<Reverse<(Instant, u32)>>,
    reply: Box<FrameBuf>,
}

impl Lan {
    /// A LAN over the VMs' links.
    pub fn new(links: Arc<dyn Links>, counters: Arc<Counters>) -> Self {
        Self {
            links,
            counters,
            blocked: HashMap::new(),
            retries: BinaryHeap::new(),
            reply: Box::new([0; FRAME_MAX]),
        }
    }

    /// The VMs' links.
    pub fn links(&self) -> &dyn Links {
        &*self.links
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Takes VM `vm`'s next frame and switches it. What the host side has to do is returned; `Ok(None)` means that the
    /// frame needs nothing more, `Err` that there was none.
    pub fn take<'a>(
        &mut self,
        vm: u32,
        frame: &'a mut FrameBuf,
        now: Instant,
    ) -> Result<Option<Ipv4<'a>>, NoFrame> {
        let len = self.links.take(vm, frame).ok_or(NoFrame)?;
        let frame = &frame[..len.min(FRAME_MAX)];
        self.counters.taken(frame.len());
        match switch::decide(vm, self.links.vms(), frame, &mut self.reply) {
            Verdict::Host(packet) => return Ok(Some(packet)),
            Verdict::Reply(len) => {
                let reply = *self.reply;
                self.send(vm, &reply[..len], now);
            }
            Verdict::Forward(to) if self.links.is_down(to) => self.counters.dropped(Reason::Down),
            Verdict::Forward(to) => self.send(to, frame, now),
            Verdict::Drop(reason) => self.counters.dropped(reason),
        }
        Ok(None)
    }

    /// Whether TCP may send VM `vm` another frame.
    pub fn has_room(&self, vm: u32) -> bool {
        self.blocked.get(&vm).is_none_or(|blocked| blocked.frames.len() < TCP_ROOM)
    }

    /// Whether nothing waits for VM `vm`.
    pub fn is_clear(&self, vm: u32) -> bool {
        !self.blocked.contains_key(&vm)
    }

    /// Delivers a frame to VM `vm`, now or when its mailbox has room. Dropped and counted if too many wait already.
    pub fn send(&mut self, vm: u32, frame: &[u8], now: Instant) {
        if let Some(blocked) = self.blocked.get_mut(&vm) {
            if blocked.frames.len() < QUEUE_MAX {
                blocked.frames.push_back(frame.into());
            } else {
                self.counters.dropped(Reason::QueueFull);
            }
        } else if self.links.deliver(vm, frame).is_ok() {
            self.counters.delivered(frame.len());
        } else {
            let due = now + BACKOFF_MIN;
            let frames = VecDeque::from([Box::from(frame)]);
            self.blocked.insert(vm, Blocked { frames, backoff: BACKOFF_MIN, due });
            self.retries.push(Reverse((due, vm)));
        }
    }

    /// Delivers an IPv4 packet of the host side.
    pub fn send_packet(&mut self, vm: u32, packet: &[u8], now: Instant) {
        let mut frame: FrameBuf = [0; FRAME_MAX];
        match frame_to_vm(packet, vm, &mut frame) {
            Ok(len) => self.send(vm, &frame[..len], now),
            Err(reason) => self.counters.dropped(reason),
        }
    }

    /// Tries a VM that may have room again; true if TCP may send to it now.
    pub fn retry(&mut self, vm: u32, now: Instant) -> bool {
        let Some(blocked) = self.blocked.get_mut(&vm) else { return true };
        let before = blocked.frames.len();
        while let Some(frame) = blocked.frames.front() {
            if self.links.deliver(vm, frame).is_err() {
                break;
            }
            self.counters.delivered(frame.len());
            blocked.frames.pop_front();
        }
        let left = blocked.frames.len();
        if left == 0 {
            self.blocked.remove(&vm);
            return true;
        }
        if self.links.is_down(vm) {
            self.forget(vm);
            return true;
        }
        blocked.backoff = if left < before { BACKOFF_MIN } else { (blocked.backoff * 2).min(BACKOFF_MAX) };
        let due = now + blocked.backoff;
        // An earlier entry in the heap would find the VM not yet due, and be dropped: push only what is needed.
        if blocked.due <= now || due < blocked.due {
            blocked.due = due;
            self.retries.push(Reverse((due, vm)));
        }
        left < TCP_ROOM
    }

    /// Tries the blocked VMs whose time has come, or all if they are few and `woken`. Appends those that have room.
    pub fn retry_due(&mut self, woken: bool, now: Instant, with_room: &mut Vec<u32>) {
        if woken && self.blocked.len() <= FEW_BLOCKED {
            let vms: Vec<u32> = self.blocked.keys().copied().collect();
            with_room.extend(vms.into_iter().filter(|&vm| self.retry(vm, now)));
        }
        while let Some(&Reverse((due, vm))) = self.retries.peek() {
            if due > now {
                break;
            }
            self.retries.pop();
            if self.blocked.get(&vm).is_some_and(|blocked| blocked.due == due) && self.retry(vm, now) {
                with_room.push(vm);
            }
        }
    }

    /// When [`Lan::retry_due`] has something to do.
    pub fn next_retry(&self) -> Option<Instant> {
        self.retries.peek().map(|Reverse((due, _))| *due)
    }

    /// Drops what waits for a VM that is down.
    pub fn forget(&mut self, vm: u32) {
        for _ in self.blocked.remove(&vm).into_iter().flat_map(|blocked| blocked.frames) {
            self.counters.dropped(Reason::Down);
        }
    }
}

/// The VM has sent no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoFrame;
