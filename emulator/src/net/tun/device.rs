//! The device itself, its address, and the routes that lead to it. All of it goes when the device is closed, however
//! that comes about, but for rules: those are removed at the end, or at the next start.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::netlink::{KERNEL, LOCAL_TABLE, Netlink, Rule};
use crate::net::address::{HOST_IP, NETWORK, PREFIX_LEN};
use crate::net::packet::MTU;
use crate::net::rewrite::Ports;

/// The device's name. There is one in a system: who has it, has the guest LAN's addresses.
pub const DEVICE: &str = "lg0";
/// The routing table that leads to the device.
const TABLE: u32 = 7700;
/// The mark on our rules.
const OURS: u8 = b'L';
/// Our rule comes before the local addresses, and those before all else.
const BEFORE_LOCAL: u32 = 8;
const LOCAL: u32 = 9;
/// Packets that the host may have sent and we not yet taken.
const QUEUE: i32 = 10_000;

/// Why the device could not be had. Nothing stays behind.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// No module, no file.
    #[error(
        "--net tun needs {path}, which is not there: load the kernel's module (modprobe tun), or give it to the container; \
         --net user needs neither"
    )]
    NoTun {
        /// The file.
        path: &'static str,
    },
    /// No privileges.
    #[error(
        "--net tun needs the right to set up network devices (CAP_NET_ADMIN): run it as root, or use --net user, which \
         needs no rights"
    )]
    Denied,
    /// Somebody has the device.
    #[error(
        "the network device {DEVICE} is in use: another fleet runs with --net tun; stop it, or use --net user"
    )]
    Busy,
    /// Somebody has the addresses.
    #[error(
        "this host has a route to {route} by {device}, which are the guests' addresses ({NETWORK}/{PREFIX_LEN}): take it \
         away, or use --net user"
    )]
    Overlap {
        /// The route's destination.
        route: String,
        /// Its device.
        device: String,
    },
    /// The host drops what does not come in where it would go out.
    #[error(
        "the host drops packets by strict reverse-path filtering, and answers from VMs would be among them: allow loose \
         filtering (sysctl net.ipv4.conf.all.rp_filter=2), or use --net user"
    )]
    StrictFilter,
    /// Anything else.
    #[error("--net tun can't {what}: {source}; --net user needs none of it")]
    Io {
        /// What it was about to do.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn can_not(what: &'static str) -> impl FnOnce(io::Error) -> TunError {
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => TunError::Denied,
        _ => TunError::Io { what, source },
    }
}

/// The device with what leads to it.
pub struct Device {
    /// Packets.
    pub file: OwnedFd,
    /// Rules, removed when dropped.
    pub routes: Routes,
}

impl Device {
    /// Makes the device and leads to it the guest LAN, and the ports of 127.0.0.1.
    pub fn open(ports: &Ports) -> Result<Self, TunError> {
        let file = create()?;
        // From here on we are the only one: what others left behind can be removed.
        let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}"));
        if read("all/rp_filter").is_ok_and(|value| value.trim() == "1") {
            return Err(TunError::StrictFilter);
        }
        for (name, value) in [("rp_filter", "0"), ("route_localnet", "1"), ("accept_local", "1")] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{DEVICE}/{name}"), value)
                .map_err(can_not("set up its device under /proc/sys"))?;
        }
        // The guest LAN is IPv4 only. It is no loss if the host has no IPv6 either.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{DEVICE}/disable_ipv6"), "1");
        set_up().map_err(can_not("set the address of its device"))?;
        check_overlap()?;
        Ok(Self { file, routes: Routes::add(ports).map_err(can_not("add routing rules"))? })
    }
}

fn create() -> Result<OwnedFd, TunError> {
    const PATH: &str = "/dev/net/tun";
    if !Path::new(PATH).exists() {
        return Err(TunError::NoTun { path: PATH });
    }
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(PATH, flags, Mode::empty())
        .map_err(|error| can_not("open /dev/net/tun")(error.into()))?;
    let mut request = request();
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short | libc::IFF_TUN_EXCL as libc::c_short;
    ioctl(&file, libc::TUNSETIFF, &mut request).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => TunError::Busy,
        _ => can_not("make its device")(error),
    })?;
    Ok(file)
}

/// An empty request for the device.
fn request() -> libc::ifreq {
    // SAFETY: plain integers and bytes; all zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(file: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the file is open, and every request used here takes an ifreq, which outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), number, request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Address, MTU, queue, and up.
fn set_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let address = |address: Ipv4Addr| {
        let address = libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: 0,
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
            sin_zero: [0; 8],
        };
        // SAFETY: both are 16 bytes that begin with the family, and sockaddr may be any bytes.
        unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) }
    };
    let mask = Ipv4Addr::from_bits(u32::MAX << (32 - PREFIX_LEN));
    let set = |number: libc::c_ulong, fill: &dyn Fn(&mut libc::ifreq)| {
        let mut request = request();
        fill(&mut request);
        ioctl(&socket, number as libc::Ioctl, &mut request)
    };
    set(libc::SIOCSIFADDR, &|request| request.ifr_ifru.ifru_addr = address(HOST_IP))?;
    set(libc::SIOCSIFNETMASK, &|request| request.ifr_ifru.ifru_netmask = address(mask))?;
    set(libc::SIOCSIFMTU, &|request| request.ifr_ifru.ifru_mtu = MTU as libc::c_int)?;
    set(libc::SIOCSIFTXQLEN, &|request| request.ifr_ifru.ifru_metric = QUEUE)?;
    set(libc::SIOCSIFFLAGS, &|request| {
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    })
}

/// Finds a route of somebody else's within the guest LAN.
fn check_overlap() -> Result<(), TunError> {
    let table = std::fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    match overlap(&table) {
        None => Ok(()),
        Some((route, device)) => Err(TunError::Overlap { route, device }),
    }
}

/// Looks through a table like /proc/net/route, whose addresses are numbers of the host's byte order.
fn overlap(table: &str) -> Option<(String, String)> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (&device, &dst, &mask) = (fields.first()?, fields.get(1)?, fields.get(7)?);
        let address = |hex: &str| Some(Ipv4Addr::from(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes()));
        let (dst, mask) = (address(dst)?, address(mask)?);
        let prefix = mask.to_bits().leading_ones();
        let inside = dst.to_bits() >> (32 - PREFIX_LEN) == NETWORK.to_bits() >> (32 - PREFIX_LEN);
        // A shorter prefix is a detour that ours goes before.
        (device != DEVICE && inside && prefix >= PREFIX_LEN.into())
            .then(|| (format!("{dst}/{prefix}"), device.to_owned()))
    })
}

/// The rules that lead to the device.
#[derive(Debug)]
pub struct Routes {
    rule: Rule,
}

fn local(priority: u32, protocol: u8) -> Rule {
    Rule { priority, table: LOCAL_TABLE, protocol, tcp_to: None }
}

impl Routes {
    fn add(ports: &Ports) -> io::Result<Self> {
        let mut netlink = Netlink::open()?;
        // Left behind by a fleet that was killed: its device is gone, so they led nowhere.
        for rule in netlink.rules()? {
            if rule.protocol == OURS && rule.table == TABLE {
                netlink.remove(&rule)?;
            }
        }
        let last = ports.base as u32 + ports.vms - 1;
        let last = u16::try_from(last).unwrap_or(u16::MAX);
        let rule = Rule {
            priority: BEFORE_LOCAL,
            table: TABLE,
            protocol: OURS,
            tcp_to: Some((Ipv4Addr::LOCALHOST, ports.base, last)),
        };
        // Dropped on an error below, it undoes what was done.
        let routes = Self { rule: rule.clone() };
        netlink.add_route(Ipv4Addr::LOCALHOST, index()?, Ipv4Addr::LOCALHOST, TABLE)?;
        netlink.add(&rule)?;
        // The kernel's rule for local addresses has priority 0, before which there is nothing: it has to move. Its
        // successor comes first, so that there is one at any time.
        netlink.add(&local(LOCAL, OURS))?;
        netlink.remove(&local(0, KERNEL))?;
        Ok(routes)
    }
}

/// The device's number.
fn index() -> io::Result<u32> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(rustix::net::netdevice::name_to_index(&socket, DEVICE)?)
}

impl Drop for Routes {
    fn drop(&mut self) {
        let undo = || -> io::Result<()> {
            let mut netlink = Netlink::open()?;
            netlink.remove(&self.rule)?;
            netlink.add(&local(0, KERNEL))?;
            netlink.remove(&local(LOCAL, OURS))
        };
        if let Err(error) = undo() {
            tracing::warn!(
                "routing rules could not be removed: {error}; the next fleet with --net tun will remove them"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_of_others_are_found() {
        let hex = |a, b, c, d| format!("{:08X}", u32::from_ne_bytes([a, b, c, d]));
        let line = |device: &str, dst: String, mask: String| {
            format!("head\n{device}\t{dst}\t00000000\t0001\t0\t0\t0\t{mask}\t0\t0\t0\n")
        };
        let mask16 = || hex(255, 255, 0, 0);
        let found = overlap(&line("eth1", hex(10, 77, 3, 0), hex(255, 255, 255, 0)));
        assert_eq!(found, Some(("10.77.3.0/24".to_owned(), "eth1".to_owned())));
        assert!(overlap(&line("eth1", hex(10, 77, 0, 0), mask16())).is_some());
        assert_eq!(overlap(&line(DEVICE, hex(10, 77, 0, 0), mask16())), None);
        assert_eq!(overlap(&line("eth1", hex(10, 0, 0, 0), hex(255, 0, 0, 0))), None);
        assert_eq!(overlap(&line("eth1", hex(10, 78, 0, 0), mask16())), None);
        assert_eq!(overlap(&line("eth0", hex(0, 0, 0, 0), hex(0, 0, 0, 0))), None);
        assert_eq!(overlap("head\nshort line\n"), None);
    }
}
