//! Writes pcapng (draft-ietf-opsawg-pcapng), the format of Wireshark: as many blocks as are needed here.

use std::collections::HashMap;
use std::time::{SystemTime, UNIX_EPOCH};

use super::address::mac_of;
use super::packet::FRAME_MAX;
use super::record::{Direction, Place, Record};

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;
const ETHERNET: u16 = 1;
const RAW_IP: u16 = 101;

/// Options that all blocks may have.
const END: u16 = 0;
const COMMENT: u16 = 1;

/// Encodes one section. Interfaces are described when their first packet comes.
#[derive(Debug, Default)]
pub struct Encoder {
    begun: bool,
    interfaces: HashMap<Place, u32>,
    packets: u64,
    lost: u64,
}

impl Encoder {
    /// Whether [`Encoder::begin`] was called.
    pub fn has_begun(&self) -> bool {
        self.begun
    }

    /// The section's header.
    pub fn begin(&mut self) -> Vec<u8> {
        const APPLICATION: u16 = 4;
        self.begun = true;
        let mut body = Vec::new();
        body.extend(0x1a2b_3c4d_u32.to_le_bytes());
        body.extend([1, 0, 0, 0]); // version 1.0
        body.extend(u64::MAX.to_le_bytes()); // length unknown
        let name = concat!("linux-on-gpu ", env!("CARGO_PKG_VERSION"));
        option(&mut body, APPLICATION, name.as_bytes());
        option(&mut body, END, &[]);
        let mut out = Vec::new();
        block(&mut out, SECTION, &body);
        out
    }

    /// Packets were lost before they came here.
    pub fn lost(&mut self, packets: u64) {
        self.lost += packets;
    }

    /// Appends a packet.
    pub fn packet(&mut self, record: &Record, out: &mut Vec<u8>) {
        const FLAGS: u16 = 2;
        let interface = match self.interfaces.get(&record.place) {
            Some(interface) => *interface,
            None => self.interface(record.place, out),
        };
        self.packets += 1;
        let mut body = Vec::with_capacity(record.bytes.len() + 64);
        body.extend(interface.to_le_bytes());
        time(&mut body, record.at);
        let len = record.bytes.len() as u32;
        body.extend(len.to_le_bytes());
        body.extend(len.to_le_bytes());
        body.extend(&*record.bytes);
        pad(&mut body);
        let flags: u32 = match record.direction {
            Direction::In => 1,
            Direction::Out => 2,
        };
        option(&mut body, FLAGS, &flags.to_le_bytes());
        if let Some(reason) = record.dropped {
            option(&mut body, COMMENT, format!("dropped ({}): {reason}", reason.name()).as_bytes());
        }
        option(&mut body, END, &[]);
        block(out, PACKET, &body);
    }

    fn interface(&mut self, place: Place, out: &mut Vec<u8>) -> u32 {
        const NAME: u16 = 2;
        const MAC: u16 = 6;
        const RESOLUTION: u16 = 9;
        const NANOSECONDS: u8 = 9;
        let number = self.interfaces.len() as u32;
        self.interfaces.insert(place, number);
        let (link, name) = match place {
            Place::Vm(vm) => (ETHERNET, format!("vm{vm}")),
            Place::Host => (RAW_IP, "host".to_owned()),
        };
        let mut body = Vec::new();
        body.extend(link.to_le_bytes());
        body.extend([0, 0]);
        body.extend((FRAME_MAX as u32).to_le_bytes());
        option(&mut body, NAME, name.as_bytes());
        if let Place::Vm(vm) = place
            && let Ok(mac) = mac_of(vm)
        {
            option(&mut body, MAC, &mac);
        }
        option(&mut body, RESOLUTION, &[NANOSECONDS]);
        option(&mut body, END, &[]);
        block(out, INTERFACE, &body);
        number
    }

    /// How many packets there are and how many were lost: the section's end.
    pub fn finish(&mut self) -> Vec<u8> {
        const RECEIVED: u16 = 4;
        const DROPPED: u16 = 5;
        let mut out = Vec::new();
        if self.interfaces.is_empty() {
            return out;
        }
        let mut body = Vec::new();
        body.extend(0_u32.to_le_bytes());
        time(&mut body, SystemTime::now());
        option(&mut body, RECEIVED, &(self.packets + self.lost).to_le_bytes());
        option(&mut body, DROPPED, &self.lost.to_le_bytes());
        option(&mut body, END, &[]);
        block(&mut out, STATISTICS, &body);
        out
    }
}

fn block(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let len = (body.len() + 12) as u32;
    out.extend(kind.to_le_bytes());
    out.extend(len.to_le_bytes());
    out.extend(body);
    out.extend(len.to_le_bytes());
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    pad(body);
}

fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

fn time(body: &mut Vec<u8>, at: SystemTime) {
    let nanos = at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    body.extend(((nanos >> 32) as u32).to_le_bytes());
    body.extend((nanos as u32).to_le_bytes());
}
