//! The host side of the LAN for transports that capture packets: which host packet becomes which frame, and back.
//!
//! ```text
//! 127.0.0.1:p -> 127.0.0.1:4000+n   <=>   10.77.0.1:p -> VM n:80      a host port, as in the talk
//! 10.77.0.1:p -> VM n:q             <=>   the same                     a VM's own address
//! 127.0.0.1:h <- VM n:q             <=>   10.77.0.1:g <- VM n:q        a service of the host that was listed
//! ```
//!
//! Packets in, packets out, or the reason why not. What the host did not begin and nobody listed is refused.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Instant;

use super::address::{HOST_IP, NETWORK, PREFIX_LEN, ip_of, vm_of_ip};
use super::checksum;
use super::flows::{Flows, Inner, Outer};
use super::packet::{ETHERNET_LEN, FrameBuf, ICMP, Ipv4, TCP, UDP};
use super::policy::Services;
use super::reason::Reason;
use super::rewrite::{PacketBuf, Ports, frame_to_vm, readdress};

const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;

/// The host side.
#[derive(Debug)]
pub struct Gateway {
    ports: Ports,
    services: Services,
    flows: Flows,
}

impl Gateway {
    /// A host side that serves these ports, and offers these services.
    pub fn new(ports: Ports, services: Services) -> Self {
        Self { ports, services, flows: Flows::default() }
    }

    /// The ports that it serves.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Flows that are remembered.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// Rewrites a host's packet into a frame; returns its VM and the frame's length.
    pub fn from_host(
        &mut self,
        packet: &[u8],
        frame: &mut FrameBuf,
        now: Instant,
    ) -> Result<(u32, usize), Reason> {
        let ip = Ipv4::parse(packet)?;
        let dst = ip.dst();
        if dst.is_multicast() {
            return Err(Reason::Multicast);
        }
        if dst.is_broadcast() || dst.to_bits() == NETWORK.to_bits() | (u32::MAX >> PREFIX_LEN) {
            return Err(Reason::Broadcast);
        }
        ip.whole_and_plain()?;
        if dst == Ipv4Addr::LOCALHOST {
            return self.host_port(&ip, frame, now);
        }
        let vm = vm_of_ip(dst).filter(|vm| *vm < self.ports.vms).ok_or(Reason::UnknownDestination)?;
        if ip.protocol() == ICMP {
            if ip.src() != HOST_IP {
                return Err(Reason::WrongSourceIp);
            }
            return match ip.payload().first() {
                None => Err(Reason::Truncated),
                Some(&ECHO) => Ok((vm, frame_to_vm(ip.bytes(), vm, frame)?)),
                Some(_) => Err(Reason::Protocol),
            };
        }
        let segment = ip.segment()?;
        let src = SocketAddrV4::new(ip.src(), segment.src_port);
        let dst = SocketAddrV4::new(dst, segment.dst_port);
        let inside = if ip.src() == HOST_IP {
            let outer = Outer { protocol: ip.protocol(), client: src, served: dst };
            self.flows.from_host(outer, vm, segment.dst_port, flags(&ip), now)?.host_port
        } else if ip.src() == Ipv4Addr::LOCALHOST && ip.protocol() == TCP {
            self.services.guest_port(segment.src_port).ok_or(Reason::Port)?
        } else {
            return Err(Reason::WrongSourceIp);
        };
        into_frame(&ip, vm, SocketAddrV4::new(HOST_IP, inside), dst, frame)
    }

    /// To 127.0.0.1, port base + n: what the talk captured.
    fn host_port(
        &mut self,
        ip: &Ipv4<'_>,
        frame: &mut FrameBuf,
        now: Instant,
    ) -> Result<(u32, usize), Reason> {
        if ip.protocol() != TCP {
            return Err(Reason::Protocol);
        }
        let segment = ip.segment()?;
        let vm = self.ports.vm_of(segment.dst_port).ok_or(Reason::Port)?;
        let outer = Outer {
            protocol: TCP,
            client: SocketAddrV4::new(ip.src(), segment.src_port),
            served: SocketAddrV4::new(ip.dst(), segment.dst_port),
        };
        let inner = self.flows.from_host(outer, vm, self.ports.guest, flags(ip), now)?;
        let address = ip_of(vm).map_err(|_| Reason::UnknownDestination)?;
        let src = SocketAddrV4::new(HOST_IP, inner.host_port);
        into_frame(ip, vm, src, SocketAddrV4::new(address, self.ports.guest), frame)
    }

    /// Rewrites VM `vm`'s packet to the host side into the host's; returns its length. The switch has checked the
    /// packet's addresses.
    pub fn from_vm(
        &mut self,
        vm: u32,
        ip: &Ipv4<'_>,
        packet: &mut PacketBuf,
        now: Instant,
    ) -> Result<usize, Reason> {
        let len = ip.bytes().len();
        if ip.protocol() == ICMP {
            // An answer only: other messages could reach into connections that are not this VM's.
            return match ip.payload().first() {
                None => Err(Reason::Truncated),
                Some(_) if checksum::of(ip.payload()) != 0 => Err(Reason::Checksum),
                Some(&ECHO_REPLY) => {
                    packet[..len].copy_from_slice(ip.bytes());
                    Ok(len)
                }
                Some(_) => Err(Reason::Protocol),
            };
        }
        let segment = ip.segment()?;
        ip.verify_segment(&segment)?;
        let protocol = ip.protocol();
        let inner = Inner { vm, protocol, host_port: segment.dst_port, vm_port: segment.src_port };
        let (src, dst) = if let Some(outer) = self.flows.from_vm(inner, flags(ip), now) {
            (outer.served, outer.client)
        } else if protocol == TCP
            && let Some(port) = self.services.host_port(segment.dst_port)
        {
            let own = SocketAddrV4::new(ip.src(), segment.src_port);
            (own, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
        } else {
            return Err(if protocol == UDP { Reason::Protocol } else { Reason::NoConnection });
        };
        readdress(ip, &mut packet[..len], src, dst)?;
        Ok(len)
    }
}

fn into_frame(
    ip: &Ipv4<'_>,
    vm: u32,
    src: SocketAddrV4,
    dst: SocketAddrV4,
    frame: &mut FrameBuf,
) -> Result<(u32, usize), Reason> {
    let len = frame_to_vm(ip.bytes(), vm, frame)?;
    readdress(ip, &mut frame[ETHERNET_LEN..len], src, dst)?;
    Ok((vm, len))
}

/// The TCP flags of a segment that was parsed before; 0 for UDP.
fn flags(ip: &Ipv4<'_>) -> u8 {
    match ip.protocol() {
        TCP => ip.payload().get(13).copied().unwrap_or(0),
        _ => 0,
    }
}
