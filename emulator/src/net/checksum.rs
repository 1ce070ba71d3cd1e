//! Internet checksums: computed in full, and updated incrementally (RFC 1624, equation 3).

use std::net::Ipv4Addr;

use etherparse::checksum::Sum16BitWords;

/// A checksum field that follows the words it covers as they change: HC' = ~(~HC + ~m + m').
#[derive(Clone, Copy, Debug)]
pub struct Incremental(u32);

impl Incremental {
    /// Starts from the field's value.
    pub fn new(field: u16) -> Self {
        Self(u32::from(!field))
    }

    /// One 16-bit word of the covered data changed.
    #[must_use]
    pub fn word(self, old: u16, new: u16) -> Self {
        // At most a few dozen words change, so the carries can wait for `field`: no overflow.
        Self(self.0 + u32::from(!old) + u32::from(new))
    }

    /// An address of the covered data changed.
    #[must_use]
    pub fn address(self, old: Ipv4Addr, new: Ipv4Addr) -> Self {
        let (old, new) = (old.to_bits(), new.to_bits());
        self.word((old >> 16) as u16, (new >> 16) as u16).word(old as u16, new as u16)
    }

    /// The field's new value.
    pub fn field(self) -> u16 {
        let folded = (self.0 & 0xffff) + (self.0 >> 16);
        !(((folded & 0xffff) + (folded >> 16)) as u16)
    }
}

/// The checksum over `data`; 0 if `data` includes a correct checksum field.
pub fn of(data: &[u8]) -> u16 {
    Sum16BitWords::new().add_slice(data).ones_complement().to_be()
}

/// The checksum over a TCP or UDP segment and its pseudo header; 0 if the segment includes a correct one.
pub fn of_segment(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, segment: &[u8]) -> u16 {
    // A segment came out of an IPv4 packet, so its length fits 16 bits.
    Sum16BitWords::new()
        .add_4bytes(src.octets())
        .add_4bytes(dst.octets())
        .add_2bytes([0, protocol])
        .add_2bytes((segment.len() as u16).to_be_bytes())
        .add_slice(segment)
        .ones_complement()
        .to_be()
}
