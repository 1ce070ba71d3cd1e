//! Why a packet went no further: one list for rewriting, switching and delivery, so that every drop is counted.

/// Why a packet was refused or dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reason {
    /// The frame ends inside a header, or before the end that a header promises.
    #[error("truncated: the packet ends before its headers say")]
    Truncated,
    /// Longer than the link allows.
    #[error("oversized: longer than the link allows")]
    Oversized,
    /// A header contradicts itself.
    #[error("malformed: a header contradicts itself")]
    Malformed,
    /// The IPv4 header checksum is wrong.
    #[error("wrong IPv4 header checksum")]
    HeaderChecksum,
    /// The TCP, UDP or ICMP checksum is wrong.
    #[error("wrong TCP, UDP or ICMP checksum")]
    Checksum,
    /// VLAN tags are not spoken here.
    #[error("VLAN tag")]
    Vlan,
    /// Neither IPv4 nor ARP.
    #[error("neither IPv4 nor ARP")]
    EtherType,
    /// A fragment where whole packets are needed.
    #[error("IPv4 fragment")]
    Fragment,
    /// IPv4 options where none are accepted.
    #[error("IPv4 options")]
    Options,
    /// A protocol or service that nobody offers at the destination.
    #[error("no such protocol or service at the destination")]
    Protocol,
    /// A TCP or UDP port that belongs to no VM.
    #[error("the port belongs to no VM")]
    Port,
    /// The source MAC is not the sending VM's.
    #[error("the source MAC is not the sender's")]
    WrongSourceMac,
    /// The source IPv4 address is not the sending VM's.
    #[error("the source address is not the sender's")]
    WrongSourceIp,
    /// Nobody has the destination's MAC or IPv4 address.
    #[error("nobody has the destination's address")]
    UnknownDestination,
    /// A multicast frame; there are no groups on this LAN.
    #[error("multicast")]
    Multicast,
    /// A broadcast other than an ARP request; broadcasts are not flooded.
    #[error("broadcast")]
    Broadcast,
    /// ARP that needs no answer: announcements, probes for one's own address, replies.
    #[error("ARP that needs no answer")]
    Arp,
    /// TCP that belongs to no connection; a reset was sent back where TCP asks for one.
    #[error("TCP outside any connection")]
    NoConnection,
    /// The receiver's queue is full.
    #[error("the receiver's queue is full")]
    QueueFull,
    /// The receiver is down.
    #[error("the receiver is down")]
    Down,
    /// VMs of this fleet don't reach one another.
    #[error("VMs are isolated from one another")]
    Isolated,
    /// The VM sends or gets more than it may.
    #[error("beyond the VM's rate limit")]
    RateLimit,
    /// A fault that was asked for.
    #[error("a fault that was asked for (--fault)")]
    Fault,
    /// Too many connections are remembered already.
    #[error("too many connections at once")]
    Flows,
    /// The host took no more packets.
    #[error("the host's queue is full")]
    HostFull,
    /// The TCP code failed on this packet; its connection was reset.
    #[error("the host's TCP failed on this packet")]
    Stack,
}

impl Reason {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 26] = [
        Self::Truncated,
        Self::Oversized,
        Self::Malformed,
        Self::HeaderChecksum,
        Self::Checksum,
        Self::Vlan,
        Self::EtherType,
        Self::Fragment,
        Self::Options,
        Self::Protocol,
        Self::Port,
        Self::WrongSourceMac,
        Self::WrongSourceIp,
        Self::UnknownDestination,
        Self::Multicast,
        Self::Broadcast,
        Self::Arp,
        Self::NoConnection,
        Self::QueueFull,
        Self::Down,
        Self::Isolated,
        Self::RateLimit,
        Self::Fault,
        Self::Flows,
        Self::HostFull,
        Self::Stack,
    ];

    /// The stable name that reports use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Oversized => "oversized",
            Self::Malformed => "malformed",
            Self::HeaderChecksum => "header_checksum",
            Self::Checksum => "checksum",
            Self::Vlan => "vlan",
            Self::EtherType => "ether_type",
            Self::Fragment => "fragment",
            Self::Options => "options",
            Self::Protocol => "protocol",
            Self::Port => "port",
            Self::WrongSourceMac => "wrong_source_mac",
            Self::WrongSourceIp => "wrong_source_ip",
            Self::UnknownDestination => "unknown_destination",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Arp => "arp",
            Self::NoConnection => "no_connection",
            Self::QueueFull => "queue_full",
            Self::Down => "down",
            Self::Isolated => "isolated",
            Self::RateLimit => "rate_limit",
            Self::Fault => "fault",
            Self::Flows => "flows",
            Self::HostFull => "host_full",
            Self::Stack => "stack",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_complete_and_in_order() {
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index, "{}", reason.name());
        }
        let names: std::collections::HashSet<_> = Reason::ALL.map(Reason::name).into_iter().collect();
        assert_eq!(names.len(), Reason::ALL.len());
    }
}
