//! Packet rewriting between the host's ports and the VMs' links: pure functions from packet to packet.
//!
//! [`super::gateway`] says which addresses a packet gets; here it gets them. Checksums follow incrementally (RFC 1624), so
//! a packet that was damaged on its way stays recognisable as damaged.

use std::net::SocketAddrV4;

use etherparse::EtherType;

use super::address::{HOST_MAC, mac_of};
use super::checksum::{self, Incremental};
use super::packet::{ETHERNET_LEN, FrameBuf, Ipv4, MTU, TCP, write_ethernet};
use super::reason::Reason;

/// Room for one IPv4 packet.
pub type PacketBuf = [u8; MTU];

/// Which host port is which VM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Host port of VM 0.
    pub base: u16,
    /// Number of VMs.
    pub vms: u32,
    /// The port in the VMs.
    pub guest: u16,
}

impl Ports {
    /// The VM that a host port belongs to.
    pub fn vm_of(&self, port: u16) -> Option<u32> {
        let vm = u32::from(port.checked_sub(self.base)?);
        (vm < self.vms).then_some(vm)
    }

    /// The host port of a VM.
    pub fn port_of(&self, vm: u32) -> Option<u16> {
        if vm >= self.vms {
            return None;
        }
        u16::try_from(u32::from(self.base).checked_add(vm)?).ok()
    }
}

/// Copies a whole TCP or UDP packet into `out` (of the same length) with other addresses and ports.
pub fn readdress(ip: &Ipv4<'_>, out: &mut [u8], src: SocketAddrV4, dst: SocketAddrV4) -> Result<(), Reason> {
    let segment = ip.segment()?;
    let (old_src, old_dst) = (ip.src(), ip.dst());
    out.copy_from_slice(ip.bytes());

    put_word(out, 10, {
        let field = Incremental::new(word(out, 10));
        field.address(old_src, *src.ip()).address(old_dst, *dst.ip()).field()
    });
    out[12..16].copy_from_slice(&src.ip().octets());
    out[16..20].copy_from_slice(&dst.ip().octets());

    let at = ip.header_len();
    put_word(out, at, src.port());
    put_word(out, at + 2, dst.port());
    if segment.optional && segment.checksum == 0 {
        return Ok(()); // UDP without a checksum stays so.
    }
    let field = Incremental::new(segment.checksum)
        .address(old_src, *src.ip())
        .address(old_dst, *dst.ip())
        .word(segment.src_port, src.port())
        .word(segment.dst_port, dst.port())
        .field();
    // 0 would say that there is no checksum; its other representation sums up to the same.
    let field = if segment.optional && field == 0 { 0xffff } else { field };
    put_word(out, segment.checksum_at, field);
    Ok(())
}

/// Puts an IPv4 packet of the host side into a frame for VM `vm`; returns the frame's length.
pub fn frame_to_vm(packet: &[u8], vm: u32, frame: &mut FrameBuf) -> Result<usize, Reason> {
    let mac = mac_of(vm).map_err(|_| Reason::UnknownDestination)?;
    if packet.len() > MTU {
        return Err(Reason::Oversized);
    }
    write_ethernet(frame, mac, HOST_MAC, EtherType::IPV4)[..packet.len()].copy_from_slice(packet);
    Ok(ETHERNET_LEN + packet.len())
}

/// The reset that TCP sends when it knows no connection for a segment (RFC 9293, 3.10.7.1); none for what is no TCP,
/// or a reset itself. Returns its length.
pub fn reset_for(ip: &Ipv4<'_>, out: &mut PacketBuf) -> Option<usize> {
    const FIN: u8 = 1;
    const SYN: u8 = 2;
    const RST: u8 = 4;
    const ACK: u8 = 16;
    let segment = ip.segment().ok().filter(|_| ip.protocol() == TCP)?;
    let tcp = ip.payload();
    let flags = tcp[13];
    if flags & RST != 0 {
        return None;
    }
    let long = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
    let length = tcp.len() - usize::from(tcp[12] >> 4) * 4;
    let length = length as u32 + u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
    let (seq, ack, with) =
        if flags & ACK != 0 { (long(8), 0, RST) } else { (0, long(4).wrapping_add(length), RST | ACK) };

    let out = &mut out[..40];
    out.fill(0);
    out[0] = 0x45;
    put_word(out, 2, 40);
    out[6] = 0x40; // don't fragment
    out[8] = 64;
    out[9] = TCP;
    out[12..16].copy_from_slice(&ip.dst().octets());
    out[16..20].copy_from_slice(&ip.src().octets());
    let sum = checksum::of(&out[..20]);
    put_word(out, 10, sum);
    put_word(out, 20, segment.dst_port);
    put_word(out, 22, segment.src_port);
    out[24..28].copy_from_slice(&seq.to_be_bytes());
    out[28..32].copy_from_slice(&ack.to_be_bytes());
    out[32] = 5 << 4;
    out[33] = with;
    let sum = checksum::of_segment(ip.dst(), ip.src(), TCP, &out[20..]);
    put_word(out, 36, sum);
    Some(40)
}

/// What remains of a segment all of whose data was acknowledged already, up to `acked`, but not the FIN behind it: the FIN
/// alone. None for any other packet. Returns the length.
pub fn only_fin(ip: &Ipv4<'_>, acked: u32, out: &mut PacketBuf) -> Option<usize> {
    const FIN: u8 = 1;
    ip.segment().ok().filter(|_| ip.protocol() == TCP)?;
    let tcp = ip.payload();
    let header = usize::from(tcp[12] >> 4) * 4;
    let seq = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let data = (tcp.len() - header) as u32;
    if tcp[13] & FIN == 0 || data == 0 || seq.wrapping_add(data) != acked {
        return None;
    }
    let len = ip.header_len() + header;
    let out = &mut out[..len];
    out.copy_from_slice(&ip.bytes()[..len]);
    put_word(out, 2, len as u16);
    out[ip.header_len() + 4..ip.header_len() + 8].copy_from_slice(&acked.to_be_bytes());
    fill_checksums(out);
    Some(len)
}

/// Computes the checksums of a whole IPv4 packet anew, in place. What can't be read stays as it is: it is refused later.
pub fn fill_checksums(packet: &mut [u8]) {
    let header = usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4;
    if header < 20 || packet.len() < header {
        return;
    }
    put_word(packet, 10, 0);
    let sum = checksum::of(&packet[..header]);
    put_word(packet, 10, sum);
    let Ok(ip) = Ipv4::parse(packet) else { return };
    let (Ok(segment), len) = (ip.segment(), ip.bytes().len()) else { return };
    let (src, dst, protocol) = (ip.src(), ip.dst(), ip.protocol());
    put_word(packet, segment.checksum_at, 0);
    let sum = checksum::of_segment(src, dst, protocol, &packet[header..len]);
    put_word(packet, segment.checksum_at, if sum == 0 && segment.optional { 0xffff } else { sum });
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put_word(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}
