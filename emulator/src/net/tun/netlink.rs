//! As much of rtnetlink as the bridge needs: routing rules, and one route.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// The table of the host's own addresses.
pub const LOCAL_TABLE: u32 = 255;
/// Rules that the kernel made have this protocol.
pub const KERNEL: u8 = 2;

const INET: u8 = 2;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const NEW_ROUTE: u16 = 24;
const NEW_RULE: u16 = 32;
const DEL_RULE: u16 = 33;
const GET_RULE: u16 = 34;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const DUMP: u16 = 0x300;

const RULE_DST: u16 = 1;
const RULE_PRIORITY: u16 = 6;
const RULE_TABLE: u16 = 15;
const RULE_PROTOCOL: u16 = 21;
const RULE_IP_PROTO: u16 = 22;
const RULE_DPORTS: u16 = 24;
const ROUTE_DST: u16 = 1;
const ROUTE_DEVICE: u16 = 4;
const ROUTE_SRC: u16 = 7;
const ROUTE_TABLE: u16 = 15;

/// A routing rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Rules are looked at from the lowest priority up.
    pub priority: u32,
    /// The table that it sends to.
    pub table: u32,
    /// Who made it.
    pub protocol: u8,
    /// Only for TCP to these ports of this address.
    pub tcp_to: Option<(Ipv4Addr, u16, u16)>,
}

/// A connection to the kernel's routing.
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Connects.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Adds a rule; one that is there already is no error.
    pub fn add(&mut self, rule: &Rule) -> io::Result<()> {
        let flags = REQUEST | ACK | CREATE | EXCLUSIVE;
        self.ask(NEW_RULE, flags, &rule.message(), |_, _| ()).or_else(unless(rustix::io::Errno::EXIST))
    }

    /// Removes a rule; one that is not there is no error.
    pub fn remove(&mut self, rule: &Rule) -> io::Result<()> {
        let gone = unless(rustix::io::Errno::NOENT);
        self.ask(DEL_RULE, REQUEST | ACK, &rule.message(), |_, _| ()).or_else(gone)
    }

    /// All rules for IPv4.
    pub fn rules(&mut self) -> io::Result<Vec<Rule>> {
        let mut rules = Vec::new();
        let header = [INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        self.ask(GET_RULE, REQUEST | DUMP, &header, |kind, body| {
            if kind == NEW_RULE {
                rules.extend(Rule::read(body));
            }
        })?;
        Ok(rules)
    }

    /// Routes one address to a device, with a source address, in a table.
    pub fn add_route(&mut self, dst: Ipv4Addr, device: u32, src: Ipv4Addr, table: u32) -> io::Result<()> {
        const STATIC: u8 = 4;
        const LINK: u8 = 253;
        const UNICAST: u8 = 1;
        let mut message = vec![INET, 32, 0, 0, 0, STATIC, LINK, UNICAST, 0, 0, 0, 0];
        attribute(&mut message, ROUTE_DST, &dst.octets());
        attribute(&mut message, ROUTE_DEVICE, &device.to_ne_bytes());
        attribute(&mut message, ROUTE_SRC, &src.octets());
        attribute(&mut message, ROUTE_TABLE, &table.to_ne_bytes());
        self.ask(NEW_ROUTE, REQUEST | ACK | CREATE, &message, |_, _| ())
    }

    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut answer: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend(((16 + body.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        send(&self.socket, &message, SendFlags::empty())?;

        let mut buffer = vec![0_u8; 32 * 1024];
        loop {
            let (len, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let mut left = &buffer[..len];
            while let Some((header, rest)) = left.split_at_checked(16) {
                let size = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
                let kind = u16::from_ne_bytes([header[4], header[5]]);
                let sequence = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
                let Some(body) = size.checked_sub(16).and_then(|size| rest.get(..size)) else { break };
                left = rest.get(body.len().next_multiple_of(4)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                match (kind, body.first_chunk()) {
                    (ERROR, Some(code)) => {
                        return match i32::from_ne_bytes(*code) {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(-code)),
                        };
                    }
                    (DONE, _) => return Ok(()),
                    _ => answer(kind, body),
                }
            }
        }
    }
}

fn unless(errno: rustix::io::Errno) -> impl Fn(io::Error) -> io::Result<()> {
    move |error| if error.raw_os_error() == Some(errno.raw_os_error()) { Ok(()) } else { Err(error) }
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(((4 + value.len()) as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

impl Rule {
    fn message(&self) -> Vec<u8> {
        const TO_TABLE: u8 = 1;
        const TCP: u8 = 6;
        let dst_len = if self.tcp_to.is_some() { 32 } else { 0 };
        // Tables beyond 255 stand in an attribute only.
        let table = u8::try_from(self.table).unwrap_or(0);
        let mut message = vec![INET, dst_len, 0, 0, table, 0, 0, TO_TABLE, 0, 0, 0, 0];
        attribute(&mut message, RULE_PRIORITY, &self.priority.to_ne_bytes());
        attribute(&mut message, RULE_TABLE, &self.table.to_ne_bytes());
        attribute(&mut message, RULE_PROTOCOL, &[self.protocol]);
        if let Some((address, first, last)) = self.tcp_to {
            attribute(&mut message, RULE_DST, &address.octets());
            attribute(&mut message, RULE_IP_PROTO, &[TCP]);
            attribute(&mut message, RULE_DPORTS, &[first.to_ne_bytes(), last.to_ne_bytes()].concat());
        }
        message
    }

    fn read(body: &[u8]) -> Option<Self> {
        let (header, mut left) = body.split_at_checked(12)?;
        let mut rule = Self { table: header[4].into(), ..Self::default() };
        let (mut address, mut ports) = (None, None);
        while let Some((head, rest)) = left.split_at_checked(4) {
            let size = usize::from(u16::from_ne_bytes([head[0], head[1]]));
            let value = size.checked_sub(4).and_then(|size| rest.get(..size))?;
            left = rest.get(value.len().next_multiple_of(4)..).unwrap_or_default();
            match (u16::from_ne_bytes([head[2], head[3]]), value) {
                (RULE_PRIORITY, &[a, b, c, d]) => rule.priority = u32::from_ne_bytes([a, b, c, d]),
                (RULE_TABLE, &[a, b, c, d]) => rule.table = u32::from_ne_bytes([a, b, c, d]),
                (RULE_PROTOCOL, &[protocol]) => rule.protocol = protocol,
                (RULE_DST, &[a, b, c, d]) => address = Some(Ipv4Addr::new(a, b, c, d)),
                (RULE_DPORTS, &[a, b, c, d]) => {
                    ports = Some((u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])));
                }
                _ => {}
            }
        }
        rule.tcp_to = address.zip(ports).map(|(address, (first, last))| (address, first, last));
        Some(rule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_written() {
        let rules = [
            Rule { priority: 9, table: LOCAL_TABLE, protocol: 76, tcp_to: None },
            Rule { priority: 8, table: 7700, protocol: 76, tcp_to: Some((Ipv4Addr::LOCALHOST, 4000, 4015)) },
        ];
        for rule in rules {
            assert_eq!(Rule::read(&rule.message()), Some(rule));
        }
        assert_eq!(Rule::read(&[0; 5]), None);
        assert_eq!(Rule::read(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 1, 0]), None);
    }

    #[test]
    fn the_kernels_rules_are_seen() {
        let rules = Netlink::open().and_then(|mut netlink| netlink.rules()).unwrap();
        assert!(rules.iter().any(|rule| rule.table == LOCAL_TABLE), "{rules:?}");
    }
}
