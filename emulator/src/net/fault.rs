//! Faults on purpose, to learn how they are found (docs/debugging-the-network.md): the talk's, in its order.

use std::str::FromStr;

use super::packet::{Carries, ETHERNET_LEN, Ethernet, FrameBuf, Ipv4, TCP, UDP};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Frames to the VM carry a MAC that is not its own.
    Mac,
    /// The VM's ARP requests are not answered.
    Arp,
    /// TCP and UDP checksums of packets to the VM have their bytes swapped.
    Checksum,
}

/// A fault of the bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is broken.
    pub kind: Kind,
    /// For this VM only.
    pub vm: Option<u32>,
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, vm) = match text.split_once(':') {
            Some((kind, vm)) => (kind, Some(vm)),
            None => (text, None),
        };
        let kind = match kind {
            "mac" => Kind::Mac,
            "arp" => Kind::Arp,
            "checksum" => Kind::Checksum,
            "route" => {
                return Err(
                    "a missing route is a fault of the guest's /init: `cargo xtask run --fault route` makes \
                            such an image"
                        .into(),
                );
            }
            _ => return Err("expected mac, arp or checksum, and perhaps a VM, as in checksum:3".into()),
        };
        let vm = vm.map(|vm| vm.parse().map_err(|_| format!("`{vm}` is no VM number"))).transpose()?;
        Ok(Self { kind, vm })
    }
}

impl Fault {
    /// Whether it is this kind, and concerns VM `vm`.
    pub fn is(&self, kind: Kind, vm: u32) -> bool {
        self.kind == kind && self.vm.is_none_or(|only| only == vm)
    }

    /// Damages a frame to VM `vm`; its length stays.
    pub fn damage(&self, vm: u32, frame: &[u8], out: &mut FrameBuf) {
        let out = &mut out[..frame.len()];
        out.copy_from_slice(frame);
        if self.is(Kind::Mac, vm) && !out.is_empty() {
            // Another address of the same maker, as a slip in the code would give.
            out[5] ^= 0x80;
        }
        if self.is(Kind::Checksum, vm)
            && let Ok(ethernet) = Ethernet::parse(frame)
            && ethernet.carries == Carries::Ipv4
            && let Ok(ip) = Ipv4::parse(ethernet.payload)
            && [TCP, UDP].contains(&ip.protocol())
            && let Ok(segment) = ip.segment()
        {
            let at = ETHERNET_LEN + segment.checksum_at;
            out.swap(at, at + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read() {
        assert_eq!("mac".parse(), Ok(Fault { kind: Kind::Mac, vm: None }));
        assert_eq!("checksum:3".parse(), Ok(Fault { kind: Kind::Checksum, vm: Some(3) }));
        for bad in ["", "macs", "arp:x", "route", "route:1"] {
            assert!(bad.parse::<Fault>().is_err(), "{bad}");
        }
        let fault = Fault { kind: Kind::Arp, vm: Some(2) };
        assert!(fault.is(Kind::Arp, 2) && !fault.is(Kind::Arp, 1) && !fault.is(Kind::Mac, 2));
    }
}
