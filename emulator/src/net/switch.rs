//! What becomes of a frame that a VM sent: a pure decision, without I/O or state.
//!
//! All addresses are known beforehand, so nothing is learned and nothing is flooded: ARP requests are answered here for
//! every VM and for the host side, unicast goes to the one VM that has the address, everything else is dropped with its
//! reason. A VM can speak only with its own addresses.

use std::net::Ipv4Addr;

use etherparse::{ArpHardwareId, ArpOperation, ArpPacketSlice, EtherType};

use super::address::{BROADCAST_MAC, HOST_IP, HOST_MAC, Mac, ip_of, mac_of, vm_of_ip, vm_of_mac};
use super::checksum::{self, Incremental};
use super::packet::{Carries, ETHERNET_LEN, Ethernet, FrameBuf, ICMP, Ipv4, write_ethernet};
use super::reason::Reason;

/// Types of ICMP messages.
const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;

/// What to do with a frame.
#[derive(Clone, Copy, Debug)]
pub enum Verdict<'a> {
    /// The answer is in the reply buffer, this many bytes long: deliver it to the sender.
    Reply(usize),
    /// Deliver the frame as it is to this VM.
    Forward(u32),
    /// The host side is meant: a whole IPv4 packet without options, to [`HOST_IP`].
    Host(Ipv4<'a>),
    /// Drop the frame.
    Drop(Reason),
}

/// Decides what becomes of `frame`, sent by VM `from` in a fleet of `vms`. Answers are written to `reply`.
pub fn decide<'a>(from: u32, vms: u32, frame: &'a [u8], reply: &mut FrameBuf) -> Verdict<'a> {
    judge(from, vms, frame, reply).unwrap_or_else(Verdict::Drop)
}

fn judge<'a>(from: u32, vms: u32, frame: &'a [u8], reply: &mut FrameBuf) -> Result<Verdict<'a>, Reason> {
    let ethernet = Ethernet::parse(frame)?;
    if Ok(ethernet.src) != mac_of(from) {
        return Err(Reason::WrongSourceMac);
    }
    match ethernet.carries {
        Carries::Other => Err(if ethernet.dst == BROADCAST_MAC {
            Reason::Broadcast
        } else if is_group(ethernet.dst) {
            Reason::Multicast
        } else {
            Reason::EtherType
        }),
        Carries::Arp => answer_arp(from, vms, ethernet.payload, reply).map(Verdict::Reply),
        Carries::Ipv4 => {
            let ip = Ipv4::parse(ethernet.payload)?;
            if ethernet.dst == BROADCAST_MAC {
                return Err(Reason::Broadcast);
            }
            if is_group(ethernet.dst) || ip.dst().is_multicast() {
                return Err(Reason::Multicast);
            }
            if Ok(ip.src()) != ip_of(from) {
                return Err(Reason::WrongSourceIp);
            }
            if ethernet.dst == HOST_MAC {
                return to_host(from, ip, reply);
            }
            match vm_of_mac(ethernet.dst) {
                Some(vm) if vm < vms && vm != from => Ok(Verdict::Forward(vm)),
                _ => Err(Reason::UnknownDestination),
            }
        }
    }
}

fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// Answers for whoever has the address asked for; returns the answer's length.
fn answer_arp(from: u32, vms: u32, payload: &[u8], reply: &mut FrameBuf) -> Result<usize, Reason> {
    let arp = ArpPacketSlice::from_slice(payload).map_err(|_| Reason::Truncated)?;
    if arp.hw_addr_type() != ArpHardwareId::ETHERNET || arp.proto_addr_type() != EtherType::IPV4 {
        return Err(Reason::Malformed);
    }
    let (Ok(sender_mac), Ok(sender_ip), Ok(target_ip)) = (
        <Mac>::try_from(arp.sender_hw_addr()),
        <[u8; 4]>::try_from(arp.sender_protocol_addr()),
        <[u8; 4]>::try_from(arp.target_protocol_addr()),
    ) else {
        return Err(Reason::Malformed);
    };
    let (sender_ip, target_ip) = (Ipv4Addr::from(sender_ip), Ipv4Addr::from(target_ip));
    let own = ip_of(from).map_err(|_| Reason::WrongSourceIp)?;
    if Ok(sender_mac) != mac_of(from) {
        return Err(Reason::WrongSourceMac);
    }
    // Before it takes an address, a host asks for it from 0.0.0.0 (RFC 5227).
    if sender_ip != own && !sender_ip.is_unspecified() {
        return Err(Reason::WrongSourceIp);
    }
    if arp.operation() != ArpOperation::REQUEST || target_ip == own {
        return Err(Reason::Arp);
    }
    let owner = match vm_of_ip(target_ip) {
        _ if target_ip == HOST_IP => HOST_MAC,
        Some(vm) if vm < vms => mac_of(vm).map_err(|_| Reason::UnknownDestination)?,
        _ => return Err(Reason::UnknownDestination),
    };

    let body = write_ethernet(reply, sender_mac, owner, EtherType::ARP);
    body[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]); // Ethernet, IPv4, their lengths, reply
    body[8..14].copy_from_slice(&owner);
    body[14..18].copy_from_slice(&target_ip.octets());
    body[18..24].copy_from_slice(&sender_mac);
    body[24..28].copy_from_slice(&sender_ip.octets());
    Ok(ETHERNET_LEN + 28)
}

fn to_host<'a>(from: u32, ip: Ipv4<'a>, reply: &mut FrameBuf) -> Result<Verdict<'a>, Reason> {
    if ip.dst() != HOST_IP {
        return Err(Reason::UnknownDestination);
    }
    ip.whole_and_plain()?;
    match (ip.protocol(), ip.payload().first()) {
        // The host has asked, if its transport lets it ask.
        (ICMP, Some(&ECHO_REPLY)) => Ok(Verdict::Host(ip)),
        (ICMP, _) => answer_echo(from, ip, reply).map(Verdict::Reply),
        _ => Ok(Verdict::Host(ip)),
    }
}

/// Answers a ping (RFC 792); returns the answer's length.
fn answer_echo(from: u32, ip: Ipv4<'_>, reply: &mut FrameBuf) -> Result<usize, Reason> {
    let echo = ip.payload();
    if echo.len() < 8 {
        return Err(Reason::Truncated);
    }
    if checksum::of(echo) != 0 {
        return Err(Reason::Checksum);
    }
    if echo[0] != ECHO || echo[1] != 0 {
        return Err(Reason::Protocol);
    }
    let mac = mac_of(from).map_err(|_| Reason::UnknownDestination)?;
    let len = ip.bytes().len();
    let out = &mut write_ethernet(reply, mac, HOST_MAC, EtherType::IPV4)[..len];
    out.copy_from_slice(ip.bytes());

    // Swapping the addresses leaves the header's sum alone; the answer starts with a fresh time to live.
    const TTL: u8 = 64;
    let field = u16::from_be_bytes([out[10], out[11]]);
    let field = Incremental::new(field)
        .word(u16::from_be_bytes([out[8], ICMP]), u16::from_be_bytes([TTL, ICMP]))
        .field();
    out[8] = TTL;
    out[10..12].copy_from_slice(&field.to_be_bytes());
    out[12..16].copy_from_slice(&ip.dst().octets());
    out[16..20].copy_from_slice(&ip.src().octets());

    let icmp = &mut out[ip.header_len()..];
    let field = Incremental::new(u16::from_be_bytes([icmp[2], icmp[3]]))
        .word(u16::from_be_bytes([ECHO, 0]), u16::from_be_bytes([ECHO_REPLY, 0]))
        .field();
    icmp[0] = ECHO_REPLY;
    icmp[2..4].copy_from_slice(&field.to_be_bytes());
    Ok(ETHERNET_LEN + len)
}
