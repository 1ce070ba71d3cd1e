//! A packet as it was seen: where, which way, and what became of it.

use std::time::SystemTime;

use super::reason::Reason;

/// Where a packet was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// On VM n's link: an Ethernet frame.
    Vm(u32),
    /// On the host's side of the rewriting: an IPv4 packet. Only transports that capture packets have this side.
    Host,
}

/// Which way a packet went, seen from its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It came in: a VM got it, the host got it.
    In,
    /// It went out.
    Out,
}

/// A packet as it was seen.
#[derive(Clone, Debug)]
pub struct Record {
    /// When.
    pub at: SystemTime,
    /// Where.
    pub place: Place,
    /// The VM concerned, if any.
    pub vm: Option<u32>,
    /// Which way.
    pub direction: Direction,
    /// Why it went no further, if it did not.
    pub dropped: Option<Reason>,
    /// The packet.
    pub bytes: Box<[u8]>,
}
