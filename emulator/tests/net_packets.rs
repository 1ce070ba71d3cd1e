//! Rewriting and switching: exact results, and properties over random and hostile packets.
#![allow(clippy::unwrap_used, missing_docs)]

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use emulator::net::address::{BROADCAST_MAC, HOST_IP, HOST_MAC, MAX_VMS, ip_of, mac_of};
use emulator::net::gateway::Gateway;
use emulator::net::packet::{Ethernet, FRAME_MAX, FrameBuf, Ipv4, MTU, is_intact};
use emulator::net::policy::{Service, Services};
use emulator::net::reason::Reason;
use emulator::net::rewrite::{PacketBuf, Ports, frame_to_vm, readdress};
use emulator::net::switch::{Verdict, decide};
use etherparse::{IpNumber, Ipv4Header, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;

const PORTS: Ports = Ports { base: 4000, vms: 64, guest: 80 };
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 9);
const SERVED: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);

fn gateway() -> Gateway {
    let services = Services::new(&[Service { host: 5432, guest: 15_432 }]).unwrap();
    Gateway::new(PORTS, services)
}

/// The way of a VM's frame to the host: through the switch, then the gateway.
fn to_host(gateway: &mut Gateway, frame: &[u8], vm: u32, out: &mut PacketBuf) -> Result<usize, Reason> {
    match decide(vm, PORTS.vms, frame, &mut [0; FRAME_MAX]) {
        Verdict::Host(ip) => gateway.from_vm(vm, &ip, out, Instant::now()),
        Verdict::Drop(reason) => Err(reason),
        verdict => panic!("not to the host: {verdict:?}"),
    }
}

/// The checksums that a packet should have, computed from scratch by etherparse.
fn with_full_checksums(packet: &[u8]) -> Vec<u8> {
    let sliced = SlicedPacket::from_ip(packet).unwrap();
    let Some(etherparse::NetSlice::Ipv4(ip)) = &sliced.net else { panic!("not IPv4") };
    let mut header = ip.header().to_header();
    header.header_checksum = header.calc_header_checksum();
    let payload = &packet[header.header_len()..];
    let mut out = Vec::new();
    header.write(&mut out).unwrap();
    match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let mut tcp_header = tcp.to_header();
            tcp_header.checksum = tcp_header.calc_checksum_ipv4(&header, tcp.payload()).unwrap();
            tcp_header.write(&mut out).unwrap();
            out.extend_from_slice(tcp.payload());
        }
        Some(TransportSlice::Udp(udp)) => {
            let mut udp_header = udp.to_header();
            udp_header.checksum = udp_header.calc_checksum_ipv4(&header, udp.payload()).unwrap();
            udp_header.write(&mut out).unwrap();
            out.extend_from_slice(udp.payload());
        }
        _ => out.extend_from_slice(payload),
    }
    out
}

fn tcp(from: SocketAddrV4, to: SocketAddrV4, seq: u32, window: u16, ttl: u8, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), ttl)
        .tcp(from.port(), to.port(), seq, window)
        .ack(seq ^ 0x5a5a_5a5a)
        .psh();
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

fn udp(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), 64).udp(from.port(), to.port());
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

fn http(vm: u32) -> Vec<u8> {
    tcp(SocketAddrV4::new(CLIENT, 50_123), SocketAddrV4::new(SERVED, 4000 + vm as u16), 7, 512, 64, b"GET /")
}

fn frame_from(vm: u32, packet: &[u8]) -> Vec<u8> {
    [&HOST_MAC[..], &mac_of(vm).unwrap(), &[8, 0], packet].concat()
}

#[test]
fn a_host_packet_becomes_the_vms_frame() {
    let mut frame = [0; FRAME_MAX];
    let (vm, len) = gateway().from_host(&http(5), &mut frame, Instant::now()).unwrap();
    assert_eq!(vm, 5);
    let ethernet = Ethernet::parse(&frame[..len]).unwrap();
    assert_eq!((ethernet.dst, ethernet.src), (mac_of(5).unwrap(), HOST_MAC));
    let ip = Ipv4::parse(ethernet.payload).unwrap();
    assert_eq!((ip.src(), ip.dst()), (HOST_IP, ip_of(5).unwrap()));
    let segment = ip.segment().unwrap();
    assert_eq!((segment.src_port, segment.dst_port), (50_123, 80));
    assert_eq!(ip.verify_segment(&segment), Ok(()));
    assert!(ip.bytes().ends_with(b"GET /"));
}

#[test]
fn typed_errors_of_rewriting() {
    let mut frame = [0; FRAME_MAX];
    let mut gateway = gateway();
    let mut refused = |packet: &[u8]| gateway.from_host(packet, &mut frame, Instant::now()).unwrap_err();
    let good = http(3);

    assert_eq!(refused(&[]), Reason::Truncated);
    assert_eq!(refused(&good[..19]), Reason::Truncated);
    assert_eq!(refused(&good[..30]), Reason::Truncated);
    assert_eq!(refused(&good[..good.len() - 1]), Reason::Truncated);
    let edit = |at: usize, value: u8| {
        let mut packet = good.clone();
        packet[at] = value;
        let sum = Ipv4Header::from_slice(&packet).map(|(header, _)| header.calc_header_checksum());
        if let Ok(sum) = sum {
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet
    };
    assert_eq!(refused(&edit(0, 0x65)), Reason::Malformed, "version 6");
    assert_eq!(refused(&edit(0, 0x44)), Reason::Malformed, "header of 16 bytes");
    assert_eq!(refused(&edit(3, 19)), Reason::Malformed, "total length within the header");
    assert_eq!(refused(&edit(2, 0xff)), Reason::Oversized, "total length beyond the MTU");
    assert_eq!(refused(&edit(6, 0x20)), Reason::Fragment, "more fragments");
    assert_eq!(refused(&edit(7, 1)), Reason::Fragment, "offset");
    assert_eq!(refused(&edit(9, 47)), Reason::Protocol, "GRE");
    assert_eq!(refused(&edit(32, 0x40)), Reason::Malformed, "TCP header of 16 bytes");
    assert_eq!(refused(&edit(32, 0xf0)), Reason::Truncated, "TCP header beyond the packet");
    let mut damaged = good.clone();
    damaged[8] ^= 1;
    assert_eq!(refused(&damaged), Reason::HeaderChecksum);
    assert_eq!(refused(&http(64)), Reason::Port);
    let below = tcp(SocketAddrV4::new(CLIENT, 1), SocketAddrV4::new(SERVED, 3999), 0, 0, 9, b"");
    assert_eq!(refused(&below), Reason::Port);

    let mut with_options =
        Ipv4Header::new(good.len() as u16 - 20, 64, IpNumber::TCP, CLIENT.octets(), SERVED.octets()).unwrap();
    with_options.options = etherparse::Ipv4Options::try_from(&[1, 1, 1, 0][..]).unwrap();
    with_options.header_checksum = with_options.calc_header_checksum();
    let mut packet = Vec::new();
    with_options.write(&mut packet).unwrap();
    packet.extend_from_slice(&good[20..]);
    assert_eq!(refused(&packet), Reason::Options);

    let datagram =
        |from: Ipv4Addr, to: Ipv4Addr| udp(SocketAddrV4::new(from, 1), SocketAddrV4::new(to, 53), b"abc");
    assert_eq!(refused(&datagram(CLIENT, SERVED)), Reason::Protocol, "only TCP has ports here");
    assert_eq!(refused(&datagram(CLIENT, ip_of(3).unwrap())), Reason::WrongSourceIp);
    assert_eq!(refused(&datagram(HOST_IP, ip_of(64).unwrap())), Reason::UnknownDestination);
    assert_eq!(refused(&datagram(HOST_IP, Ipv4Addr::new(224, 0, 0, 251))), Reason::Multicast);
    assert_eq!(refused(&datagram(HOST_IP, Ipv4Addr::new(10, 77, 255, 255))), Reason::Broadcast);
    let from_loopback =
        |port| tcp(SocketAddrV4::new(SERVED, port), SocketAddrV4::new(ip_of(3).unwrap(), 9), 0, 0, 9, b"");
    assert_eq!(refused(&from_loopback(5431)), Reason::Port, "not a listed service");
    let mut lying = datagram(HOST_IP, ip_of(3).unwrap());
    lying[25] += 1;
    assert_eq!(refused(&lying), Reason::Malformed, "UDP length beyond the packet");
}

#[test]
fn typed_errors_of_the_way_back() {
    let mut packet = [0; MTU];
    let mut gateway = gateway();
    gateway.from_host(&http(3), &mut [0; FRAME_MAX], Instant::now()).unwrap();
    let answer =
        tcp(SocketAddrV4::new(ip_of(3).unwrap(), 80), SocketAddrV4::new(HOST_IP, 50_123), 1, 2, 64, b"ok");
    let good = frame_from(3, &answer);
    let mut refused = |frame: &[u8], vm| to_host(&mut gateway, frame, vm, &mut packet).unwrap_err();
    assert_eq!(refused(&good, 4), Reason::WrongSourceMac);
    assert_eq!(refused(&good[..13], 3), Reason::Truncated);
    assert_eq!(refused(&frame_from(4, &answer), 4), Reason::WrongSourceIp);
    let edit = |range: std::ops::Range<usize>, with: &[u8]| {
        let mut frame = good.clone();
        frame[range].copy_from_slice(with);
        frame
    };
    assert_eq!(refused(&edit(0..6, &[2, 0x4c, 0x47, 9, 9, 9]), 3), Reason::UnknownDestination);
    assert_eq!(refused(&edit(12..14, &[0x81, 0]), 3), Reason::Vlan);
    assert_eq!(refused(&edit(12..14, &[0x86, 0xdd]), 3), Reason::EtherType);
    assert_eq!(refused(&[good.clone(), vec![0; 1500]].concat(), 3), Reason::Oversized);
    let other = tcp(SocketAddrV4::new(ip_of(3).unwrap(), 80), SocketAddrV4::new(CLIENT, 1), 1, 2, 64, b"");
    assert_eq!(refused(&frame_from(3, &other), 3), Reason::UnknownDestination);
    let ssh = tcp(SocketAddrV4::new(ip_of(3).unwrap(), 22), SocketAddrV4::new(HOST_IP, 1), 1, 2, 64, b"");
    assert_eq!(refused(&frame_from(3, &ssh), 3), Reason::NoConnection);
    let dns = udp(SocketAddrV4::new(ip_of(3).unwrap(), 9), SocketAddrV4::new(HOST_IP, 53), b"");
    assert_eq!(refused(&frame_from(3, &dns), 3), Reason::Protocol);
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert_eq!(refused(&damaged, 3), Reason::Checksum);
}

fn arp(vm: u32, operation: u16, sender: Ipv4Addr, target: Ipv4Addr, to: [u8; 6]) -> Vec<u8> {
    let mac = mac_of(vm).unwrap();
    let mut frame = [&to[..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4]].concat();
    frame.extend(operation.to_be_bytes());
    frame.extend(mac);
    frame.extend(sender.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame.extend([0; 18]); // Ethernet's padding
    frame
}

fn dropped(from: u32, frame: &[u8]) -> Reason {
    match decide(from, 64, frame, &mut [0; FRAME_MAX]) {
        Verdict::Drop(reason) => reason,
        verdict => panic!("{verdict:?}"),
    }
}

#[test]
fn arp_is_answered_for_all_addresses_and_no_others() {
    let own = ip_of(3).unwrap();
    let mut reply = [0; FRAME_MAX];
    let answers = [
        (HOST_IP, HOST_MAC),
        (ip_of(0).unwrap(), mac_of(0).unwrap()),
        (ip_of(63).unwrap(), mac_of(63).unwrap()),
    ];
    for (ip, mac) in answers {
        for to in [BROADCAST_MAC, mac] {
            let request = arp(3, 1, own, ip, to);
            let Verdict::Reply(len) = decide(3, 64, &request, &mut reply) else {
                panic!("no reply for {ip}")
            };
            let mut expected =
                [&mac_of(3).unwrap()[..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &mac].concat();
            expected.extend(ip.octets());
            expected.extend(mac_of(3).unwrap());
            expected.extend(own.octets());
            assert_eq!(reply[..len], expected);
        }
    }
    let ask = |operation, sender, target| dropped(3, &arp(3, operation, sender, target, BROADCAST_MAC));
    assert_eq!(ask(1, own, ip_of(64).unwrap()), Reason::UnknownDestination);
    assert_eq!(ask(1, own, Ipv4Addr::new(10, 78, 0, 1)), Reason::UnknownDestination);
    assert_eq!(ask(1, own, own), Reason::Arp, "announcement");
    assert_eq!(ask(1, Ipv4Addr::UNSPECIFIED, own), Reason::Arp, "probe for its own address");
    assert_eq!(ask(2, own, HOST_IP), Reason::Arp, "unasked reply");
    assert_eq!(ask(1, ip_of(4).unwrap(), HOST_IP), Reason::WrongSourceIp);
    assert_eq!(dropped(4, &arp(3, 1, own, HOST_IP, BROADCAST_MAC)), Reason::WrongSourceMac);
    let mut lying = arp(3, 1, own, HOST_IP, BROADCAST_MAC);
    lying[27] ^= 1;
    assert_eq!(dropped(3, &lying), Reason::WrongSourceMac, "inside the packet");
    assert_eq!(dropped(3, &arp(3, 1, own, HOST_IP, BROADCAST_MAC)[..30]), Reason::Truncated);
    let mut token_ring = arp(3, 1, own, HOST_IP, BROADCAST_MAC);
    token_ring[15] = 6;
    assert_eq!(dropped(3, &token_ring), Reason::Malformed);
    token_ring[15] = 1;
    token_ring[18] = 4;
    assert_eq!(dropped(3, &token_ring), Reason::Malformed, "addresses of a wrong size");
}

#[test]
fn unicast_goes_to_its_vm_and_noise_nowhere() {
    let packet =
        udp(SocketAddrV4::new(ip_of(3).unwrap(), 9), SocketAddrV4::new(ip_of(4).unwrap(), 9), b"hello");
    let to = |mac: [u8; 6]| [&mac[..], &mac_of(3).unwrap(), &[8, 0], &packet].concat();
    let mut reply = [0; FRAME_MAX];
    assert!(matches!(decide(3, 64, &to(mac_of(4).unwrap()), &mut reply), Verdict::Forward(4)));
    assert_eq!(dropped(3, &to(mac_of(64).unwrap())), Reason::UnknownDestination);
    assert_eq!(dropped(3, &to(mac_of(3).unwrap())), Reason::UnknownDestination, "to itself");
    assert_eq!(dropped(3, &to(HOST_MAC)), Reason::UnknownDestination, "nothing is routed");
    assert_eq!(dropped(3, &to(BROADCAST_MAC)), Reason::Broadcast);
    assert_eq!(dropped(3, &to([1, 0, 0x5e, 0, 0, 251])), Reason::Multicast);
    assert_eq!(dropped(4, &to(mac_of(4).unwrap())), Reason::WrongSourceMac);
    let mut spoofed = to(mac_of(4).unwrap());
    spoofed[29] ^= 1;
    spoofed[25] = spoofed[25].wrapping_sub(1);
    let spoofed = [&spoofed[..14], &with_full_checksums(&spoofed[14..])].concat();
    assert_eq!(dropped(3, &spoofed), Reason::WrongSourceIp);

    let with_type = |mac: [u8; 6], kind: [u8; 2]| [&mac[..], &mac_of(3).unwrap(), &kind, &[0; 60]].concat();
    assert_eq!(dropped(3, &with_type([0x33, 0x33, 0, 0, 0, 2], [0x86, 0xdd])), Reason::Multicast, "IPv6");
    assert_eq!(dropped(3, &with_type(HOST_MAC, [0x86, 0xdd])), Reason::EtherType);
    assert_eq!(dropped(3, &with_type(HOST_MAC, [0x81, 0x00])), Reason::Vlan);
    assert_eq!(dropped(3, &with_type(BROADCAST_MAC, [0x88, 0xcc])), Reason::Broadcast);
    assert_eq!(dropped(3, &[0; 13]), Reason::Truncated);
    assert_eq!(dropped(3, &[0; FRAME_MAX + 1]), Reason::Oversized);
}

#[test]
fn nothing_but_whole_packets_is_intact() {
    let mut packet = Vec::new();
    let echo = PacketBuilder::ipv4(HOST_IP.octets(), ip_of(3).unwrap().octets(), 3).icmpv4_echo_request(1, 7);
    echo.write(&mut packet, &[0xa5; 56]).unwrap();
    assert!(is_intact(&frame_from(3, &packet)));
    let damaged = |at: usize, value: u8| {
        let mut frame = frame_from(3, &packet);
        frame[at] = value;
        frame
    };
    assert!(!is_intact(&damaged(60, 1)), "its data");
    assert!(!is_intact(&damaged(12, 0x86)), "no IPv4");
    // A fragment's header may be right; what it is part of, nobody has seen.
    let mut fragment = packet.clone();
    fragment[6] = 0x20;
    let header = Ipv4Header::from_slice(&fragment).unwrap().0;
    fragment[10..12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    assert!(Ipv4::parse(&fragment).is_ok() && !is_intact(&frame_from(3, &fragment)));
    for len in [0, 13, 14, 33] {
        assert!(!is_intact(&frame_from(3, &packet)[..len]), "{len} bytes");
    }
    // Of other protocols, nothing is known.
    let mut other = Vec::new();
    PacketBuilder::ipv4([1; 4], [2; 4], 3).write(&mut other, IpNumber::GRE, &[7; 30]).unwrap();
    assert!(Ipv4::parse(&other).is_ok() && !is_intact(&frame_from(3, &other)));
}

#[test]
fn the_host_side_answers_pings() {
    let ping = |size: usize| {
        let builder = PacketBuilder::ipv4(ip_of(3).unwrap().octets(), HOST_IP.octets(), 3)
            .icmpv4_echo_request(0x1234, 7);
        let mut packet = Vec::new();
        builder.write(&mut packet, &vec![0xa5; size]).unwrap();
        packet
    };
    let mut reply = [0; FRAME_MAX];
    for size in [0, 1, 56, 1472] {
        let Verdict::Reply(len) = decide(3, 64, &frame_from(3, &ping(size)), &mut reply) else {
            panic!("no reply to {size} bytes")
        };
        let ethernet = Ethernet::parse(&reply[..len]).unwrap();
        assert_eq!((ethernet.dst, ethernet.src), (mac_of(3).unwrap(), HOST_MAC));
        let builder = PacketBuilder::ipv4(HOST_IP.octets(), ip_of(3).unwrap().octets(), 64)
            .icmpv4_echo_reply(0x1234, 7);
        let mut expected = Vec::new();
        builder.write(&mut expected, &vec![0xa5; size]).unwrap();
        assert_eq!(ethernet.payload, expected);
    }
    let mut damaged = ping(56);
    *damaged.last_mut().unwrap() ^= 1;
    assert_eq!(dropped(3, &frame_from(3, &damaged)), Reason::Checksum);
    let builder =
        PacketBuilder::ipv4(ip_of(3).unwrap().octets(), HOST_IP.octets(), 3).icmpv4_echo_reply(1, 2);
    // The host may have asked: its transport knows.
    let mut answer = Vec::new();
    builder.write(&mut answer, b"").unwrap();
    assert!(matches!(decide(3, 64, &frame_from(3, &answer), &mut reply), Verdict::Host(_)));
}

fn any_tcp() -> impl Strategy<Value = Vec<u8>> {
    let ends = (any::<u32>(), any::<u16>(), any::<u32>(), any::<u16>());
    let payload = proptest::collection::vec(any::<u8>(), 0..1460);
    (ends, any::<u32>(), any::<u16>(), any::<u8>(), payload).prop_map(
        |((a, p, b, q), seq, window, ttl, payload)| {
            let (from, to) = (SocketAddrV4::new(a.into(), p), SocketAddrV4::new(b.into(), q));
            tcp(from, to, seq, window, ttl, &payload)
        },
    )
}

fn any_udp() -> impl Strategy<Value = Vec<u8>> {
    let ends = (any::<u32>(), any::<u16>(), any::<u32>(), any::<u16>());
    (ends, proptest::collection::vec(any::<u8>(), 0..1400)).prop_map(|((a, p, b, q), payload)| {
        udp(SocketAddrV4::new(a.into(), p), SocketAddrV4::new(b.into(), q), &payload)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn incremental_equals_full(
        packet in prop_oneof![any_tcp(), any_udp()],
        src: u32, src_port: u16, dst: u32, dst_port: u16,
    ) {
        let ip = Ipv4::parse(&packet).unwrap();
        let mut out = vec![0; packet.len()];
        let (src, dst) = (SocketAddrV4::new(src.into(), src_port), SocketAddrV4::new(dst.into(), dst_port));
        readdress(&ip, &mut out, src, dst).unwrap();
        prop_assert_eq!(&out, &with_full_checksums(&out));
    }

    #[test]
    fn damage_stays_visible(packet in any_tcp(), at in 40_usize..1500, bit in 0_u8..8) {
        let mut packet = packet;
        let Some(byte) = packet.get_mut(at) else { return Ok(()) };
        *byte ^= 1 << bit;
        let ip = Ipv4::parse(&packet).unwrap();
        let mut out = vec![0; packet.len()];
        let end = SocketAddrV4::new(HOST_IP, 99);
        readdress(&ip, &mut out, end, end).unwrap();
        let ip = Ipv4::parse(&out).unwrap();
        prop_assert_eq!(ip.verify_segment(&ip.segment().unwrap()), Err(Reason::Checksum));
    }

    #[test]
    fn only_what_was_verified_is_intact(packet in prop_oneof![any_tcp(), any_udp()], at: usize, bit in 0_u8..8) {
        let mut frame: FrameBuf = [0; FRAME_MAX];
        let len = frame_to_vm(&packet, 3, &mut frame).unwrap();
        let segment = Ipv4::parse(&packet).unwrap().segment().unwrap();
        prop_assert_eq!(is_intact(&frame[..len]), segment.checksum != 0);
        // One bit of the packet; the MACs are not covered.
        frame[14 + at % packet.len()] ^= 1 << bit;
        prop_assert!(!is_intact(&frame[..len]));
        prop_assert!(!is_intact(&frame[..len - 1]));
    }

    #[test]
    fn udp_without_checksum_stays_without(packet in any_udp(), end: u32) {
        let mut packet = packet;
        packet[26..28].copy_from_slice(&[0, 0]);
        let ip = Ipv4::parse(&packet).unwrap();
        let mut out = vec![0; packet.len()];
        let end = SocketAddrV4::new(end.into(), 1);
        readdress(&ip, &mut out, end, end).unwrap();
        prop_assert_eq!(&out[26..28], &[0, 0]);
    }

    #[test]
    fn there_and_back_is_the_same(packet in any_tcp(), vm in 0..64_u32) {
        let ip = Ipv4::parse(&packet).unwrap();
        let segment = ip.segment().unwrap();
        // From the client to the VM's port, then the same bytes back from the VM: ends swapped, nothing else changed.
        let mut request = vec![0; packet.len()];
        let served = SocketAddrV4::new(SERVED, 4000 + vm as u16);
        readdress(&ip, &mut request, SocketAddrV4::new(ip.src(), segment.src_port), served).unwrap();
        let mut frame: FrameBuf = [0; FRAME_MAX];
        let mut gateway = gateway();
        let (to, len) = gateway.from_host(&request, &mut frame, Instant::now()).unwrap();
        prop_assert_eq!(to, vm);

        let inner = Ipv4::parse(&frame[14..len]).unwrap();
        let inner_segment = inner.segment().unwrap();
        let mut answer = vec![0; packet.len()];
        let from_vm = SocketAddrV4::new(inner.dst(), inner_segment.dst_port);
        let to_lan = SocketAddrV4::new(inner.src(), inner_segment.src_port);
        readdress(&inner, &mut answer, from_vm, to_lan).unwrap();
        let mut back: PacketBuf = [0; MTU];
        let len = to_host(&mut gateway, &frame_from(vm, &answer), vm, &mut back).unwrap();

        let mut expected = vec![0; packet.len()];
        readdress(&ip, &mut expected, served, SocketAddrV4::new(ip.src(), segment.src_port)).unwrap();
        prop_assert_eq!(&back[..len], &expected[..]);
    }

    #[test]
    fn framing_is_refused_only_for_size_and_address(packet in proptest::collection::vec(any::<u8>(), 0..1600), vm: u32) {
        let mut frame = [0; FRAME_MAX];
        match frame_to_vm(&packet, vm, &mut frame) {
            Ok(len) => prop_assert_eq!(&frame[14..len], &packet[..]),
            Err(reason) => prop_assert!(
                (vm >= MAX_VMS && reason == Reason::UnknownDestination)
                    || (packet.len() > MTU && reason == Reason::Oversized)
            ),
        }
    }
}

/// Frames that are nearly right: a good one with some bytes changed and its end cut or extended.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let seeds = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..1600),
        any_tcp().prop_map(|packet| frame_from(3, &packet)),
        Just(frame_from(3, &http(3))),
        Just(arp(3, 1, ip_of(3).unwrap(), HOST_IP, BROADCAST_MAC)),
        Just(frame_from(
            3,
            &udp(SocketAddrV4::new(ip_of(3).unwrap(), 1), SocketAddrV4::new(HOST_IP, 2), b"abc")
        )),
    ];
    let edits = proptest::collection::vec((0..80_usize, any::<u8>()), 0..6);
    (seeds, edits, proptest::option::of(0..1600_usize)).prop_map(|(mut frame, edits, len)| {
        for (at, value) in edits {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        if let Some(len) = len {
            frame.resize(len, 0);
        }
        // Most edits spoil the header's checksum; half of them shall get further.
        if frame.len() > 34
            && frame[14] & 1 == 1
            && let Ok((header, _)) = Ipv4Header::from_slice(&frame[14..])
        {
            frame[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
        }
        frame
    })
}

/// No panic, and only what is well-formed and honest gets through. `HOSTILE_CASES` sets the number of cases.
#[test]
fn hostile_frames_do_no_harm() {
    let cases = std::env::var("HOSTILE_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(20_000);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    struct State {
        reply: FrameBuf,
        frame: FrameBuf,
        packet: PacketBuf,
        gateway: Gateway,
        now: Instant,
    }
    let state = State {
        reply: [0; FRAME_MAX],
        frame: [0; FRAME_MAX],
        packet: [0; MTU],
        gateway: gateway(),
        now: Instant::now(),
    };
    let state = std::cell::RefCell::new(state);
    proptest!(config, |(frame in hostile(), vms in 0..128_u32)| {
        let state = &mut *state.borrow_mut();
        state.now += Duration::from_millis(10);
        let honest = frame.len() >= 14 && frame[6..12] == mac_of(3).unwrap();
        match decide(3, vms, &frame, &mut state.reply) {
            Verdict::Drop(_) => {}
            Verdict::Reply(len) => {
                prop_assert!(honest && len <= FRAME_MAX && state.reply[..6] == mac_of(3).unwrap());
            }
            Verdict::Forward(vm) => prop_assert!(honest && vm < vms && vm != 3),
            Verdict::Host(ip) => {
                prop_assert!(honest && ip.dst() == HOST_IP && ip.src() == ip_of(3).unwrap());
                if let Ok(len) = state.gateway.from_vm(3, &ip, &mut state.packet, state.now) {
                    // Only to who has asked, or to a service that is listed.
                    let out = Ipv4::parse(&state.packet[..len]).unwrap();
                    prop_assert!(
                        out.protocol() == 1 || out.dst() == HOST_IP || out.dst() == SERVED || out.dst() == CLIENT
                    );
                }
            }
        }
        for packet in [frame.get(14..).unwrap_or(&[]), &frame] {
            if let Ok((vm, len)) = state.gateway.from_host(packet, &mut state.frame, state.now) {
                let ethernet = Ethernet::parse(&state.frame[..len]).unwrap();
                prop_assert!(vm < PORTS.vms && ethernet.dst == mac_of(vm).unwrap() && ethernet.src == HOST_MAC);
                let out = Ipv4::parse(ethernet.payload).unwrap();
                prop_assert_eq!((out.src(), out.dst()), (HOST_IP, ip_of(vm).unwrap()));
            }
        }
    });
}
