//! What a fleet's network allows: services of the host, isolation, rates.

use std::str::FromStr;

use super::fault::Fault;
use super::rate::Limits;

/// What a fleet's network allows. By default VMs may talk to one another, and use nothing of the host.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Services of the host that VMs may use.
    pub services: Services,
    /// VMs don't reach one another.
    pub isolated: bool,
    /// For each VM.
    pub limits: Limits,
    /// Something broken on purpose.
    pub fault: Option<Fault>,
}

/// A TCP service of the host, on 127.0.0.1, that VMs may use at 10.77.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// The port on 127.0.0.1.
    pub host: u16,
    /// The port that VMs connect to.
    pub guest: u16,
}

impl FromStr for Service {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, guest) = text.split_once(':').unwrap_or((text, text));
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port @ 1..) => Ok(port),
            _ => Err(format!(
                "`{text}` is no port; expected HOST:GUEST, two ports from 1 to 65535, as in 5432:5432"
            )),
        };
        Ok(Self { host: port(host)?, guest: port(guest)? })
    }
}

/// The services that VMs may use; none unless listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Services(Vec<Service>);

impl Services {
    /// These services. Fails where two claim one port.
    pub fn new(services: &[Service]) -> Result<Self, String> {
        for (at, service) in services.iter().enumerate() {
            if services[..at].iter().any(|other| other.guest == service.guest) {
                return Err(format!(
                    "two services for the guests' port {}; give each its own",
                    service.guest
                ));
            }
            if services[..at].iter().any(|other| other.host == service.host) {
                return Err(format!("the host's port {} is listed twice; once is enough", service.host));
            }
        }
        Ok(Self(services.to_vec()))
    }

    /// The host's port behind a port that VMs connect to.
    pub fn host_port(&self, guest: u16) -> Option<u16> {
        self.0.iter().find(|service| service.guest == guest).map(|service| service.host)
    }

    /// The port that VMs see for the host's port.
    pub fn guest_port(&self, host: u16) -> Option<u16> {
        self.0.iter().find(|service| service.host == host).map(|service| service.guest)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_read_and_checked() {
        let service = |text: &str| text.parse::<Service>();
        assert_eq!(service("5432:15432"), Ok(Service { host: 5432, guest: 15432 }));
        assert_eq!(service("53"), Ok(Service { host: 53, guest: 53 }));
        for bad in ["", "0", "1:0", "a:1", "1:2:3", "70000"] {
            assert!(service(bad).is_err(), "{bad}");
        }
        let list =
            |texts: &[&str]| Services::new(&texts.iter().map(|t| service(t).unwrap()).collect::<Vec<_>>());
        let services = list(&["5432:15432", "53"]).unwrap();
        assert_eq!((services.host_port(15432), services.host_port(5432)), (Some(5432), None));
        assert_eq!((services.guest_port(5432), services.guest_port(15432)), (Some(15432), None));
        assert!(list(&["1:5", "2:5"]).is_err() && list(&["1:5", "1:6"]).is_err());
    }
}
