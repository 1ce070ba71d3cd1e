//! Faults of /init that were asked for: `cargo xtask run --fault arp|route[:N]` (docs/debugging-the-network.md).

use std::str::FromStr;

use super::error::Error;

/// What is missing in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The ARP entry of the host side.
    Arp,
    /// All routes.
    Route,
}

/// A fault of /init.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitFault {
    /// What is missing.
    pub kind: Kind,
    /// In this VM only.
    pub vm: Option<u32>,
}

/// A fault as the command line has it: the guest's part, and whether the emulator has one too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The guest's part.
    pub init: Option<InitFault>,
    /// Whether the bridge has a part.
    pub bridge: bool,
}

impl FromStr for Fault {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |what: String| {
            Error::plain(
                format!("--fault {text}: {what}"),
                "Write mac, arp, checksum or route, and perhaps a VM, as in route:3.",
            )
        };
        let (kind, vm) = match text.split_once(':') {
            Some((kind, vm)) => {
                let vm = vm.parse::<u32>().map_err(|_| wrong(format!("`{vm}` is not a VM's number")))?;
                (kind, Some(vm))
            }
            None => (text, None),
        };
        let init = |kind| Some(InitFault { kind, vm });
        Ok(match kind {
            "mac" | "checksum" => Self { init: None, bridge: true },
            // With an entry of its own the guest would not ask, and with an answer it would not need the entry.
            "arp" => Self { init: init(Kind::Arp), bridge: true },
            "route" => Self { init: init(Kind::Route), bridge: false },
            _ => return Err(wrong(format!("`{kind}` is not a fault"))),
        })
    }
}

impl InitFault {
    /// Its name in names of images.
    pub fn name(&self) -> String {
        let kind = match self.kind {
            Kind::Arp => "arp",
            Kind::Route => "route",
        };
        self.vm.map_or(kind.to_owned(), |vm| format!("{kind}-{vm}"))
    }

    /// The script that /init runs.
    pub fn script(&self) -> String {
        let only = self.vm.map_or(String::new(), |vm| format!("[ \"$LG_VM\" = {vm} ] || exit 0\n"));
        let what = match self.kind {
            Kind::Arp => "arp -d 10.77.0.1",
            Kind::Route => "route del default\nroute del -net 10.77.0.0 netmask 255.255.0.0",
        };
        format!(
            "#!/bin/sh\n# Breaks the network on purpose: `cargo xtask run --fault` asked for it.\n{only}{what}\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read() {
        let fault = |text: &str| text.parse::<Fault>().unwrap();
        assert_eq!(fault("mac:3"), Fault { init: None, bridge: true });
        let route = fault("route:3").init.unwrap();
        assert_eq!((route.name().as_str(), fault("route").bridge), ("route-3", false));
        assert!(route.script().contains("\"$LG_VM\" = 3 "));
        assert!(fault("arp").bridge && fault("arp").init.is_some());
        for bad in ["", "x", "arp:", "arp:-1"] {
            assert!(bad.parse::<Fault>().is_err(), "{bad}");
        }
    }
}
