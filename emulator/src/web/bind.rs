//! The page's address.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::str::FromStr;

/// The port that is tried first.
pub const DEFAULT_PORT: u16 = 8080;
/// Without a wish, so many ports from there on are tried.
const TRIES: u16 = 32;

/// Where the page is to be served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// 127.0.0.1, at the first free port from 8080 on.
    #[default]
    Default,
    /// Exactly there.
    At(SocketAddr),
    /// Nowhere.
    Off,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        match text {
            "off" => Ok(Self::Off),
            _ => text
                .parse()
                .or_else(|_| text.parse().map(|port: u16| SocketAddr::new(local, port)))
                .or_else(|_| text.parse().map(|ip: IpAddr| SocketAddr::new(ip, DEFAULT_PORT)))
                .map(Self::At)
                .map_err(|_| "expected off, a port, or an address as in 127.0.0.1:8080".into()),
        }
    }
}

/// Why the page can't be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address that was asked for.
    #[error("--web {at}: {source}; give another address, or --web off")]
    At {
        /// The address.
        at: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// None of the default ports.
    #[error("none of the ports {DEFAULT_PORT} to {last} of 127.0.0.1 can be had for the page: {source}; \
        give --web ADDRESS, or --web off", last = DEFAULT_PORT + TRIES - 1)]
    NoneFree {
        /// Why the last can't.
        source: io::Error,
    },
}

/// Takes the address; none if no page is wanted.
pub fn bind(choice: Choice) -> Result<Option<TcpListener>, BindError> {
    let listen = |at: SocketAddr| {
        let listener = TcpListener::bind(at)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    match choice {
        Choice::Off => Ok(None),
        Choice::At(at) => listen(at).map(Some).map_err(|source| BindError::At { at, source }),
        Choice::Default => {
            let mut last = io::Error::from(io::ErrorKind::AddrInUse);
            for port in DEFAULT_PORT..DEFAULT_PORT + TRIES {
                match listen((Ipv4Addr::LOCALHOST, port).into()) {
                    Ok(listener) => return Ok(Some(listener)),
                    Err(error) => last = error,
                }
            }
            Err(BindError::NoneFree { source: last })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let at = |text: &str| Choice::At(text.parse().unwrap());
        assert_eq!("off".parse(), Ok(Choice::Off));
        assert_eq!("9000".parse(), Ok(at("127.0.0.1:9000")));
        assert_eq!("0.0.0.0:81".parse(), Ok(at("0.0.0.0:81")));
        assert_eq!("::1".parse(), Ok(at("[::1]:8080")));
        for bad in ["", "on", "70000", "localhost:80", "1.2.3.4:"] {
            assert!(bad.parse::<Choice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_address_that_is_taken_is_an_error_that_names_it() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        let error = bind(Choice::At(at)).unwrap_err().to_string();
        assert!(error.contains(&at.to_string()) && error.contains("--web off"), "{error}");
        assert!(bind(Choice::Off).unwrap().is_none());
        assert!(bind(Choice::Default).unwrap().is_some());
    }
}
