//! The host's end of the guest LAN: takes what VMs sent, lets the switch decide, and delivers, with a bounded queue
//! per VM in front of full mailboxes. Shared by all transports; every frame passes through here once each way.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etherparse::EtherType;

use super::Links;
use super::address::{HOST_MAC, mac_of};
use super::counters::Counters;
use super::fault::{Fault, Kind};
use super::packet::{ETHERNET_LEN, FRAME_MAX, FrameBuf, Ipv4, write_ethernet};
use super::policy::Policy;
use super::rate::Rates;
use super::reason::Reason;
use super::record::{Direction, Place};
use super::rewrite::frame_to_vm;
use super::switch::{self, Verdict};
use super::tap::Tap;

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

/// What a bridge tells others, while it runs and afterwards.
#[derive(Clone)]
pub struct Watch {
    /// What passed.
    pub counters: Arc<Counters>,
    /// Copies of it.
    pub tap: Tap,
}

impl Watch {
    /// For so many VMs.
    pub fn new(vms: u32) -> Self {
        Self { counters: Arc::new(Counters::new(vms)), tap: Tap::default() }
    }
}

/// The host's end of the LAN.
pub struct Lan {
    links: Arc<dyn Links>,
    watch: Watch,
    isolated: bool,
    fault: Option<Fault>,
    rates: Rates,
    blocked: HashMap<u32, Blocked>,
    retries: BinaryHeap<Reverse<(Instant, u32)>>,
    reply: Box<FrameBuf>,
    damaged: Box<FrameBuf>,
}

impl Lan {
    /// A LAN over the VMs' links.
    pub fn new(links: Arc<dyn Links>, watch: Watch, policy: &Policy) -> Self {
        let rates = Rates::new(policy.limits, links.vms(), Instant::now());
        Self {
            links,
            watch,
            isolated: policy.isolated,
            fault: policy.fault,
            rates,
            blocked: HashMap::new(),
            retries: BinaryHeap::new(),
            reply: Box::new([0; FRAME_MAX]),
            damaged: Box::new([0; FRAME_MAX]),
        }
    }

    /// The VMs' links.
    pub fn links(&self) -> &dyn Links {
        &*self.links
    }

    /// What others are told.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// The counters.
    pub fn counters(&self) -> &Counters {
        &self.watch.counters
    }

    /// The tap.
    pub fn tap(&self) -> &Tap {
        &self.watch.tap
    }

    /// Takes VM `vm`'s next frame and switches it. What the host side has to do is returned, and [`Lan::done`] wants to
    /// know what came of it; `Ok(None)` means that the frame needs nothing more, `Err` that there was none.
    pub fn take<'a>(
        &mut self,
        vm: u32,
        frame: &'a mut FrameBuf,
        now: Instant,
    ) -> Result<Option<Ipv4<'a>>, NoFrame> {
        let len = self.links.take(vm, frame).ok_or(NoFrame)?;
        let frame = &frame[..len.min(FRAME_MAX)];
        self.counters().taken(vm, frame.len());
        let outcome = self.switch(vm, frame, now);
        if let Ok(Some(packet)) = outcome {
            return Ok(Some(packet));
        }
        self.seen_from(vm, frame, outcome.err());
        Ok(None)
    }

    fn switch<'a>(&mut self, vm: u32, frame: &'a [u8], now: Instant) -> Result<Option<Ipv4<'a>>, Reason> {
        if !self.rates.allow(vm, Direction::Out, frame.len(), now) {
            return Err(Reason::RateLimit);
        }
        match switch::decide(vm, self.links.vms(), frame, &mut self.reply) {
            Verdict::Host(packet) => return Ok(Some(packet)),
            Verdict::Reply(len) => {
                if self.fault.is_some_and(|fault| fault.is(Kind::Arp, vm)) && is_arp(frame) {
                    return Err(Reason::Fault);
                }
                let reply = *self.reply;
                self.send(vm, &reply[..len], now);
            }
            Verdict::Forward(_) if self.isolated => return Err(Reason::Isolated),
            Verdict::Forward(to) => self.send(to, frame, now),
            Verdict::Drop(reason) => return Err(reason),
        }
        Ok(None)
    }

    /// What came of a packet to the host side: it was taken, or refused.
    pub fn done(&self, vm: u32, packet: &Ipv4<'_>, refused: Option<Reason>) {
        if refused.is_none() && !self.tap().is_active() {
            return;
        }
        // The switch has checked the frame that it came in.
        let mut frame: FrameBuf = [0; FRAME_MAX];
        let bytes = packet.bytes();
        let own = mac_of(vm).unwrap_or_default();
        write_ethernet(&mut frame, HOST_MAC, own, EtherType::IPV4)[..bytes.len()].copy_from_slice(bytes);
        self.seen_from(vm, &frame[..ETHERNET_LEN + bytes.len()], refused);
    }

    fn seen_from(&self, vm: u32, frame: &[u8], dropped: Option<Reason>) {
        if let Some(reason) = dropped {
            self.counters().dropped(Some(vm), Direction::Out, reason);
        }
        self.tap().see(Place::Vm(vm), Some(vm), Direction::Out, dropped, frame);
    }

    /// A frame to a VM that does not get there.
    fn lose(&self, vm: u32, frame: &[u8], reason: Reason) {
        self.counters().dropped(Some(vm), Direction::In, reason);
        self.tap().see(Place::Vm(vm), Some(vm), Direction::In, Some(reason), frame);
    }

    fn deliver(&mut self, vm: u32, frame: &[u8]) -> bool {
        let frame = match self.fault {
            Some(fault) if frame.len() <= FRAME_MAX => {
                fault.damage(vm, frame, &mut self.damaged);
                &self.damaged[..frame.len()]
            }
            _ => frame,
        };
        if self.links.deliver(vm, frame).is_err() {
            return false;
        }
        self.watch.counters.delivered(vm, frame.len());
        self.watch.tap.see(Place::Vm(vm), Some(vm), Direction::In, None, frame);
        true
    }

    /// Whether TCP may send VM `vm` another frame.
    pub fn has_room(&self, vm: u32) -> bool {
        self.blocked.get(&vm).is_none_or(|blocked| blocked.frames.len() < TCP_ROOM)
    }

    /// Whether nothing waits for VM `vm`.
    pub fn is_clear(&self, vm: u32) -> bool {
        !self.blocked.contains_key(&vm)
    }

    /// Delivers a frame to VM `vm`, now or when its mailbox has room. Dropped and counted if too many wait already, or
    /// it got too much of late, or is down.
    pub fn send(&mut self, vm: u32, frame: &[u8], now: Instant) {
        if self.links.is_down(vm) {
            return self.lose(vm, frame, Reason::Down);
        }
        if !self.rates.allow(vm, Direction::In, frame.len(), now) {
            return self.lose(vm, frame, Reason::RateLimit);
        }
        if let Some(blocked) = self.blocked.get_mut(&vm) {
            if blocked.frames.len() < QUEUE_MAX {
                blocked.frames.push_back(frame.into());
            } else {
                self.lose(vm, frame, Reason::QueueFull);
            }
        } else if !self.deliver(vm, frame) {
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
            Err(reason) => self.counters().dropped(Some(vm), Direction::In, reason),
        }
    }

    /// Tries a VM that may have room again; true if TCP may send to it now.
    pub fn retry(&mut self, vm: u32, now: Instant) -> bool {
        let Some(mut blocked) = self.blocked.remove(&vm) else { return true };
        let before = blocked.frames.len();
        while let Some(frame) = blocked.frames.front() {
            if !self.deliver(vm, frame) {
                break;
            }
            blocked.frames.pop_front();
        }
        let left = blocked.frames.len();
        if left == 0 {
            return true;
        }
        if self.links.is_down(vm) {
            for frame in &blocked.frames {
                self.lose(vm, frame, Reason::Down);
            }
            return true;
        }
        blocked.backoff = if left < before { BACKOFF_MIN } else { (blocked.backoff * 2).min(BACKOFF_MAX) };
        let due = now + blocked.backoff;
        // An earlier entry in the heap would find the VM not yet due, and be dropped: push only what is needed.
        if blocked.due <= now || due < blocked.due {
            blocked.due = due;
            self.retries.push(Reverse((due, vm)));
        }
        self.blocked.insert(vm, blocked);
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
        for frame in self.blocked.remove(&vm).into_iter().flat_map(|blocked| blocked.frames) {
            self.lose(vm, &frame, Reason::Down);
        }
    }
}

fn is_arp(frame: &[u8]) -> bool {
    frame.get(12..ETHERNET_LEN) == Some(&EtherType::ARP.0.to_be_bytes())
}

/// The VM has sent no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoFrame;
