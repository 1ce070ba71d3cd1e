//! Checked views of frames and packets. All that rewriting and switching know of a packet they learn here.

use std::net::Ipv4Addr;

use etherparse::{EtherType, Ethernet2HeaderSlice, Ipv4HeaderSlice, TcpHeaderSlice, UdpHeaderSlice};

use super::address::Mac;
use super::checksum;
use super::reason::Reason;
use crate::abi::ETH_FRAME_BYTES;

/// The longest frame, without FCS.
pub const FRAME_MAX: usize = ETH_FRAME_BYTES as usize;
/// The Ethernet header's length.
pub const ETHERNET_LEN: usize = 14;
/// The longest IPv4 packet: the link's MTU.
pub const MTU: usize = FRAME_MAX - ETHERNET_LEN;
/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// Room for one frame.
pub type FrameBuf = [u8; FRAME_MAX];

/// What an Ethernet frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// IPv4.
    Ipv4,
    /// ARP.
    Arp,
    /// Something else.
    Other,
}

/// An Ethernet II frame.
#[derive(Clone, Copy, Debug)]
pub struct Ethernet<'a> {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// What the payload is.
    pub carries: Carries,
    /// The rest of the frame, padding included.
    pub payload: &'a [u8],
}

impl<'a> Ethernet<'a> {
    /// Checks length and tags.
    pub fn parse(frame: &'a [u8]) -> Result<Self, Reason> {
        if frame.len() > FRAME_MAX {
            return Err(Reason::Oversized);
        }
        let header = Ethernet2HeaderSlice::from_slice(frame).map_err(|_| Reason::Truncated)?;
        let carries = match header.ether_type() {
            EtherType::IPV4 => Carries::Ipv4,
            EtherType::ARP => Carries::Arp,
            EtherType::VLAN_TAGGED_FRAME
            | EtherType::PROVIDER_BRIDGING
            | EtherType::VLAN_DOUBLE_TAGGED_FRAME => return Err(Reason::Vlan),
            _ => Carries::Other,
        };
        Ok(Self { dst: header.destination(), src: header.source(), carries, payload: &frame[ETHERNET_LEN..] })
    }
}

/// Writes the Ethernet header; returns the room behind it.
pub fn write_ethernet(frame: &mut FrameBuf, dst: Mac, src: Mac, ether_type: EtherType) -> &mut [u8] {
    frame[..6].copy_from_slice(&dst);
    frame[6..12].copy_from_slice(&src);
    frame[12..ETHERNET_LEN].copy_from_slice(&ether_type.0.to_be_bytes());
    &mut frame[ETHERNET_LEN..]
}

/// An IPv4 packet: header checked, padding cut off.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4<'a> {
    header: Ipv4HeaderSlice<'a>,
    bytes: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// Checks version, lengths and header checksum. `bytes` may have padding behind the packet.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Reason> {
        let header = Ipv4HeaderSlice::from_slice(bytes).map_err(|error| match error {
            etherparse::err::ipv4::HeaderSliceError::Len(_) => Reason::Truncated,
            etherparse::err::ipv4::HeaderSliceError::Content(_) => Reason::Malformed,
        })?;
        let total = usize::from(header.total_len());
        if total < header.slice().len() {
            return Err(Reason::Malformed);
        }
        if total > MTU {
            return Err(Reason::Oversized);
        }
        let bytes = bytes.get(..total).ok_or(Reason::Truncated)?;
        if checksum::of(header.slice()) != 0 {
            return Err(Reason::HeaderChecksum);
        }
        Ok(Self { header, bytes })
    }

    /// The whole packet, without padding.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The header's length with options.
    pub fn header_len(&self) -> usize {
        self.header.slice().len()
    }

    /// What the packet carries.
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[self.header_len()..]
    }

    /// Source address.
    pub fn src(&self) -> Ipv4Addr {
        self.header.source_addr()
    }

    /// Destination address.
    pub fn dst(&self) -> Ipv4Addr {
        self.header.destination_addr()
    }

    /// IP protocol number.
    pub fn protocol(&self) -> u8 {
        self.header.protocol().0
    }

    /// Refuses what an endpoint on the host side can't use: fragments and options.
    pub fn whole_and_plain(&self) -> Result<(), Reason> {
        if self.header.is_fragmenting_payload() {
            return Err(Reason::Fragment);
        }
        if !self.header.options().is_empty() {
            return Err(Reason::Options);
        }
        Ok(())
    }

    /// The ports, for a whole TCP or UDP packet.
    pub fn segment(&self) -> Result<Segment, Reason> {
        if self.header.is_fragmenting_payload() {
            return Err(Reason::Fragment);
        }
        let payload = self.payload();
        match self.protocol() {
            TCP => {
                let tcp = TcpHeaderSlice::from_slice(payload).map_err(|error| match error {
                    etherparse::err::tcp::HeaderSliceError::Len(_) => Reason::Truncated,
                    etherparse::err::tcp::HeaderSliceError::Content(_) => Reason::Malformed,
                })?;
                Ok(Segment {
                    src_port: tcp.source_port(),
                    dst_port: tcp.destination_port(),
                    checksum: tcp.checksum(),
                    checksum_at: self.header_len() + 16,
                    optional: false,
                })
            }
            UDP => {
                let udp = UdpHeaderSlice::from_slice(payload).map_err(|_| Reason::Truncated)?;
                if usize::from(udp.length()) != payload.len() {
                    return Err(Reason::Malformed);
                }
                Ok(Segment {
                    src_port: udp.source_port(),
                    dst_port: udp.destination_port(),
                    checksum: udp.checksum(),
                    checksum_at: self.header_len() + 6,
                    optional: true,
                })
            }
            _ => Err(Reason::Protocol),
        }
    }

    /// Checks the TCP or UDP checksum of a whole packet.
    pub fn verify_segment(&self, segment: &Segment) -> Result<(), Reason> {
        if segment.optional && segment.checksum == 0 {
            return Ok(());
        }
        match checksum::of_segment(self.src(), self.dst(), self.protocol(), self.payload()) {
            0 => Ok(()),
            _ => Err(Reason::Checksum),
        }
    }
}

/// Whether a frame carries a whole IPv4 packet of TCP, UDP or ICMP all of whose checksums are there and right.
pub fn is_intact(frame: &[u8]) -> bool {
    let Ok(Ethernet { carries: Carries::Ipv4, payload, .. }) = Ethernet::parse(frame) else { return false };
    let Ok(ip) = Ipv4::parse(payload) else { return false };
    match ip.segment() {
        Ok(segment) => segment.checksum != 0 && ip.verify_segment(&segment).is_ok(),
        Err(Reason::Protocol) => ip.protocol() == ICMP && checksum::of(ip.payload()) == 0,
        Err(_) => false,
    }
}

/// Where a TCP segment or UDP datagram comes from and goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// The checksum field.
    pub checksum: u16,
    /// Offset of the checksum field in the packet.
    pub checksum_at: usize,
    /// Whether a checksum of 0 stands for none (UDP).
    pub optional: bool,
}
