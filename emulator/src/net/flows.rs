//! Which host connection is which to a VM: what a capturing transport remembers so that answers find their way back.
//!
//! A VM sees every connection come from the LAN's host side, so two clients with the same port number would look
//! alike: the second gets another port. All else keeps its port. Time comes from outside, nothing here does I/O.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use super::packet::TCP;
use super::reason::Reason;

/// Flows at once.
const FLOWS: usize = 262_144;
/// Ports from here up may stand for a client's own.
const FIRST_PORT: u16 = 1024;
/// A flow is forgotten when nothing came for so long: before the answer, while it lasts, after its end, UDP.
const OPENING: Duration = Duration::from_secs(60);
const OPEN: Duration = Duration::from_secs(2 * 3600);
const CLOSED: Duration = Duration::from_secs(2);
const DATAGRAMS: Duration = Duration::from_secs(60);

/// TCP flags that move a flow.
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;

/// A connection with the host's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Outer {
    /// IP protocol number: TCP or UDP.
    pub protocol: u8,
    /// The client.
    pub client: SocketAddrV4,
    /// What the client connected to.
    pub served: SocketAddrV4,
}

/// The same connection as its VM sees it; the host side's address is always the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Inner {
    /// The VM.
    pub vm: u32,
    /// IP protocol number: TCP or UDP.
    pub protocol: u8,
    /// The host side's port.
    pub host_port: u16,
    /// The VM's port.
    pub vm_port: u16,
}

#[derive(Clone, Copy, Debug)]
struct Flow {
    outer: Outer,
    last: Instant,
    answered: bool,
    host_done: bool,
    vm_done: bool,
}

impl Flow {
    fn over(&self) -> bool {
        self.host_done && self.vm_done
    }

    fn patience(&self) -> Duration {
        match (self.outer.protocol, self.over()) {
            (TCP, true) => CLOSED,
            (TCP, false) if self.answered => OPEN,
            (TCP, false) => OPENING,
            _ => DATAGRAMS,
        }
    }
}

/// The table.
#[derive(Debug, Default)]
pub struct Flows {
    by_outer: HashMap<Outer, Inner>,
    by_inner: HashMap<Inner, Flow>,
    /// One entry a flow, at a time when it may be over.
    due: BinaryHeap<Reverse<(Instant, u64)>>,
    dues: HashMap<u64, Inner>,
    next_due: u64,
    next_port: u16,
}

impl Flows {
    /// Flows known now.
    pub fn len(&self) -> usize {
        self.by_inner.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_inner.is_empty()
    }

    /// A packet of the host's to VM `vm`, port `vm_port`, with these TCP flags (0 for UDP): how the VM knows its flow.
    pub fn from_host(
        &mut self,
        outer: Outer,
        vm: u32,
        vm_port: u16,
        flags: u8,
        now: Instant,
    ) -> Result<Inner, Reason> {
        self.expire(now);
        let inner = match self.by_outer.get(&outer) {
            Some(inner) => *inner,
            None => self.open(outer, vm, vm_port, now)?,
        };
        if let Some(flow) = self.by_inner.get_mut(&inner) {
            if flow.over() && flags & (FIN | RST | SYN) == SYN {
                // The client uses its port again.
                (flow.answered, flow.host_done, flow.vm_done) = (false, false, false);
            }
            let was_over = flow.over();
            flow.host_done |= flags & (FIN | RST) != 0;
            flow.vm_done |= flags & RST != 0;
            flow.last = now;
            if flow.over() && !was_over {
                self.schedule(inner, now + CLOSED);
            }
        }
        Ok(inner)
    }

    /// A packet from a VM: the host's addresses of its flow, if the host has begun one.
    pub fn from_vm(&mut self, inner: Inner, flags: u8, now: Instant) -> Option<Outer> {
        let flow = self.by_inner.get_mut(&inner)?;
        let was_over = flow.over();
        flow.answered = true;
        flow.vm_done |= flags & (FIN | RST) != 0;
        flow.host_done |= flags & RST != 0;
        flow.last = now;
        let (outer, over) = (flow.outer, flow.over());
        if over && !was_over {
            self.schedule(inner, now + CLOSED);
        }
        Some(outer)
    }

    fn open(&mut self, outer: Outer, vm: u32, vm_port: u16, now: Instant) -> Result<Inner, Reason> {
        if self.by_inner.len() >= FLOWS {
            return Err(Reason::Flows);
        }
        let mut inner = Inner { vm, protocol: outer.protocol, host_port: outer.client.port(), vm_port };
        let mut tries = 0;
        while self.by_inner.contains_key(&inner) {
            if tries == u16::MAX {
                return Err(Reason::Flows);
            }
            tries += 1;
            inner.host_port = self.next_port.max(FIRST_PORT);
            self.next_port = inner.host_port.checked_add(1).unwrap_or(FIRST_PORT);
        }
        let flow = Flow { outer, last: now, answered: false, host_done: false, vm_done: false };
        self.by_outer.insert(outer, inner);
        self.by_inner.insert(inner, flow);
        self.schedule(inner, now + flow.patience());
        Ok(inner)
    }

    fn schedule(&mut self, inner: Inner, at: Instant) {
        self.due.push(Reverse((at, self.next_due)));
        self.dues.insert(self.next_due, inner);
        self.next_due += 1;
    }

    /// Forgets flows that are over.
    pub fn expire(&mut self, now: Instant) {
        while let Some(&Reverse((at, number))) = self.due.peek() {
            if at > now {
                return;
            }
            self.due.pop();
            let Some(inner) = self.dues.remove(&number) else { continue };
            let Some(flow) = self.by_inner.get(&inner) else { continue };
            let over = flow.last + flow.patience();
            if over <= now {
                self.by_outer.remove(&flow.outer);
                self.by_inner.remove(&inner);
            } else {
                self.schedule(inner, over);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const ACK: u8 = 16;

    fn outer(client: u8, port: u16) -> Outer {
        let client = SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, client), port);
        Outer { protocol: TCP, client, served: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4000) }
    }

    #[test]
    fn ports_are_kept_unless_they_meet() {
        let (mut flows, now) = (Flows::default(), Instant::now());
        let one = flows.from_host(outer(1, 5000), 0, 80, SYN, now).unwrap();
        let two = flows.from_host(outer(2, 5000), 0, 80, SYN, now).unwrap();
        let other = flows.from_host(outer(2, 5000), 0, 80, ACK, now).unwrap();
        let elsewhere = flows.from_host(
            Outer { served: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 4001), ..outer(1, 5000) },
            1,
            80,
            SYN,
            now,
        );
        assert_eq!((one.host_port, elsewhere.unwrap().host_port), (5000, 5000));
        assert_ne!(two.host_port, 5000);
        assert_eq!(two, other);
        assert_eq!(flows.from_vm(one, ACK, now), Some(outer(1, 5000)));
        assert_eq!(flows.from_vm(two, ACK, now), Some(outer(2, 5000)));
        assert_eq!(flows.from_vm(Inner { host_port: 9, ..one }, ACK, now), None);
        assert_eq!(flows.from_vm(Inner { vm: 7, ..one }, ACK, now), None);
    }

    #[test]
    fn flows_end() {
        let (mut flows, start) = (Flows::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let inner = flows.from_host(outer(1, 1), 0, 80, SYN, start).unwrap();
        // Unanswered.
        flows.expire(after(59));
        assert_eq!(flows.len(), 1);
        flows.expire(after(61));
        assert!(flows.is_empty());
        // Open and idle, then closed by both.
        flows.from_host(outer(1, 1), 0, 80, SYN, start).unwrap();
        flows.from_vm(inner, SYN | ACK, start).unwrap();
        flows.expire(after(3600));
        assert_eq!(flows.len(), 1);
        flows.from_vm(inner, FIN | ACK, after(3600)).unwrap();
        flows.expire(after(3700));
        flows.from_host(outer(1, 1), 0, 80, FIN | ACK, after(3700)).unwrap();
        flows.expire(after(3701));
        assert_eq!(flows.len(), 1);
        flows.expire(after(3703));
        assert!(flows.is_empty() && flows.by_outer.is_empty() && flows.dues.len() <= 1);
        // Reset by one, and the port used again at once.
        flows.from_host(outer(1, 1), 0, 80, SYN, after(4000)).unwrap();
        flows.from_vm(inner, RST, after(4000)).unwrap();
        flows.from_host(outer(1, 1), 0, 80, SYN, after(4001)).unwrap();
        flows.expire(after(4010));
        assert_eq!(flows.len(), 1);
    }
}
