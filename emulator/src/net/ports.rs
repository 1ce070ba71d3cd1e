//! The host ports of a fleet: all of them are bound before anything boots, or none.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use mio::net::TcpListener;

use super::address::{MAX_VMS, NoAddress};
use super::rewrite::Ports;

#[cfg(any(unix, test))]
/// Files that the rest of the program may need beside listeners and connections.
const FILES_FOR_OTHERS: u64 = 128;
#[cfg(any(unix, test))]
/// A fleet that could hold no more connections than this would be of no use.
const FEWEST_CONNECTIONS: u64 = 64;

/// Why the ports could not be had. Nothing stays bound.
#[derive(Debug, thiserror::Error)]
pub enum PortsError {
    /// No VMs, no ports.
    #[error("a fleet of 0 VMs has no ports")]
    NoVms,
    /// Port 0 can't be served.
    #[error("the port range can't start at 0; choose one with --port-base, for instance --port-base 4000")]
    NoBase,
    /// More VMs than addresses.
    #[error("{vms} VMs are more than the guest LAN has addresses for ({MAX_VMS})")]
    TooManyVms {
        /// VMs asked for.
        vms: u32,
        /// The first VM without an address.
        #[source]
        source: NoAddress,
    },
    /// The range ends beyond 65535.
    #[error(
        "ports {base} to {} are beyond 65535: {fit} VMs fit above --port-base {base}{}",
        u64::from(*base) + u64::from(*vms) - 1,
        lower_base(*vms)
    )]
    Beyond {
        /// First port.
        base: u16,
        /// VMs asked for.
        vms: u32,
        /// VMs that fit.
        fit: u32,
    },
    /// Somebody else listens there.
    #[error(
        "port {port}, which VM {vm} needs, is taken{}; stop that program or choose another range with --port-base",
        owner.as_ref().map(|owner| format!(" by {owner}")).unwrap_or_default()
    )]
    Taken {
        /// The port.
        port: u16,
        /// The VM that it belongs to.
        vm: u32,
        /// Who has it, where the system tells.
        owner: Option<String>,
    },
    /// The system doesn't let this user have the port.
    #[error(
        "port {port}, which VM {vm} needs, is reserved for the administrator; choose a range above 1023 with --port-base"
    )]
    Denied {
        /// The port.
        port: u16,
        /// The VM that it belongs to.
        vm: u32,
    },
    /// The limit of open files is too low for so many listeners.
    #[error(
        "{vms} VMs need {needed} open files at once, but the limit is {limit}: raise it (`ulimit -n {needed}`, or \
         LimitNOFILE= in a service) or run fewer VMs"
    )]
    Files {
        /// VMs asked for.
        vms: u32,
        /// Files needed.
        needed: u64,
        /// Files that the system allows this process at most.
        limit: u64,
    },
    /// Anything else.
    #[error("can't listen on 127.0.0.1:{port} for VM {vm}")]
    Io {
        /// The port.
        port: u16,
        /// The VM that it belongs to.
        vm: u32,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn lower_base(vms: u32) -> String {
    match 65_536_u32.checked_sub(vms) {
        Some(base) if base >= 1024 => format!("; {vms} VMs fit from --port-base {base} down"),
        _ => String::new(),
    }
}

/// Checks that the range exists.
pub fn check(ports: &Ports) -> Result<(), PortsError> {
    let Ports { base, vms, .. } = *ports;
    if vms == 0 {
        return Err(PortsError::NoVms);
    }
    if base == 0 {
        return Err(PortsError::NoBase);
    }
    if vms > MAX_VMS {
        return Err(PortsError::TooManyVms { vms, source: NoAddress { vm: MAX_VMS } });
    }
    let fit = 65_536 - u32::from(base);
    if vms > fit {
        return Err(PortsError::Beyond { base, vms, fit });
    }
    Ok(())
}

/// Binds one listener a VM on 127.0.0.1, VM 0's first.
pub fn bind(ports: &Ports) -> Result<Vec<TcpListener>, PortsError> {
    check(ports)?;
    let mut listeners = Vec::with_capacity(ports.vms as usize);
    for vm in 0..ports.vms {
        let Some(port) = ports.port_of(vm) else { break };
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        listeners.push(listener.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => PortsError::Taken { port, vm, owner: owner_of(port) },
            io::ErrorKind::PermissionDenied => PortsError::Denied { port, vm },
            _ => PortsError::Io { port, vm, source },
        })?);
    }
    Ok(listeners)
}

/// What the limit of open files is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePlan {
    /// The soft limit that it takes.
    pub soft: u64,
    /// VMs that have a port, from VM 0 on.
    pub listeners: u32,
    /// Connections that may be open at once.
    pub connections: usize,
}

#[cfg(any(unix, test))]
fn plan_files(vms: u32, wanted: usize, used: u64, soft: u64, hard: u64) -> Result<FilePlan, PortsError> {
    let others = used + FILES_FOR_OTHERS;
    let needed = u64::from(vms) + others + FEWEST_CONNECTIONS;
    let connections = |files: u64| usize::try_from(files).unwrap_or(usize::MAX).min(wanted);
    if needed > hard {
        // Those that come through the door take two files each, and there may be many of them.
        let room = hard.saturating_sub(others);
        if !cfg!(unix) || room < 4 * FEWEST_CONNECTIONS {
            return Err(PortsError::Files { vms, needed, limit: hard });
        }
        let listeners = u32::try_from(room - room / 4).unwrap_or(u32::MAX);
        return Ok(FilePlan { soft: hard, listeners, connections: connections(room / 4 / 2) });
    }
    let fixed = u64::from(vms) + others;
    let soft = soft.max(hard.min(fixed + wanted as u64));
    Ok(FilePlan { soft, listeners: vms, connections: connections(soft - fixed) })
}

/// Raises the soft limit of open files as far as `vms` listeners and `wanted` connections need and the hard limit
/// allows. If that is not enough for a listener each, some VMs have none.
#[cfg(unix)]
pub fn allow_files(vms: u32, wanted: usize) -> Result<FilePlan, PortsError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let limit = getrlimit(Resource::Nofile);
    let (soft, hard) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    let used = open_files();
    let plan = plan_files(vms, wanted, used, soft, hard)?;
    if plan.soft > soft {
        let raised = Rlimit { current: Some(plan.soft), maximum: limit.maximum };
        if setrlimit(Resource::Nofile, raised).is_err() {
            return plan_files(vms, wanted, used, soft, soft);
        }
    }
    Ok(plan)
}

/// Files that may still be opened.
#[cfg(unix)]
pub fn spare_files() -> u64 {
    let soft = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    soft.saturating_sub(open_files() + FILES_FOR_OTHERS)
}

#[cfg(unix)]
fn open_files() -> u64 {
    std::fs::read_dir("/proc/self/fd").map_or(32, |files| files.count() as u64)
}

/// Sockets are not files here.
#[cfg(not(unix))]
pub fn spare_files() -> u64 {
    u64::MAX
}

/// Sockets are not files here; only the asked number counts.
#[cfg(not(unix))]
pub fn allow_files(vms: u32, wanted: usize) -> Result<FilePlan, PortsError> {
    Ok(FilePlan { soft: u64::MAX, listeners: vms, connections: wanted })
}

/// The process that listens on a local TCP port, as far as /proc shows it to this user.
#[cfg(target_os = "linux")]
fn owner_of(port: u16) -> Option<String> {
    use std::fs;

    let inode = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
        .into_iter()
        .find_map(|table| listener_inode(&fs::read_to_string(table).ok()?, port))?;
    let socket = format!("socket:[{inode}]");
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let holds = files
            .flatten()
            .any(|file| fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == socket.as_str()));
        if holds {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(match name.trim() {
                "" => format!("process {pid}"),
                name => format!("{name} (process {pid})"),
            });
        }
    }
    None
}

#[cfg(not(target_os = "linux"))]
fn owner_of(_port: u16) -> Option<String> {
    None
}

/// Finds the socket that listens on `port` in a table like /proc/net/tcp.
#[cfg(target_os = "linux")]
fn listener_inode(table: &str, port: u16) -> Option<u64> {
    const LISTEN: &str = "0A";
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let local = fields.nth(1)?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?;
        let local_port = u16::from_str_radix(local.rsplit(':').next()?, 16).ok()?;
        (local_port == port && state == LISTEN).then(|| inode.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(base: u16, vms: u32) -> Ports {
        Ports { base, vms, guest: 80 }
    }

    #[test]
    fn ranges_that_cannot_be() {
        assert!(matches!(check(&ports(4000, 0)), Err(PortsError::NoVms)));
        assert!(matches!(check(&ports(0, 1)), Err(PortsError::NoBase)));
        assert!(matches!(check(&ports(1, MAX_VMS + 1)), Err(PortsError::TooManyVms { .. })));
        assert!(check(&ports(65_535, 1)).is_ok());
        assert!(check(&ports(4000, 61_536)).is_ok());
        let error = check(&ports(65_000, 1024)).unwrap_err();
        assert!(matches!(error, PortsError::Beyond { fit: 536, .. }));
        let text = error.to_string();
        assert!(text.contains("536 VMs fit"), "{text}");
        assert!(text.contains("66023"), "{text}");
        assert!(text.contains("--port-base 64512"), "{text}");
    }

    #[test]
    fn files_are_planned_within_the_limits() {
        let plan = |vms, soft, hard| plan_files(vms, 4096, 10, soft, hard);
        // Enough already: nothing is lowered.
        assert_eq!(
            plan(16, 100_000, 100_000).unwrap(),
            FilePlan { soft: 100_000, listeners: 16, connections: 4096 }
        );
        // Raised as far as needed.
        assert_eq!(
            plan(16, 1024, 100_000).unwrap(),
            FilePlan { soft: 16 + 10 + 128 + 4096, listeners: 16, connections: 4096 }
        );
        // Raised as far as allowed.
        assert_eq!(
            plan(16, 256, 1024).unwrap(),
            FilePlan { soft: 1024, listeners: 16, connections: 1024 - 154 }
        );
        // Not enough for a listener each: as many as leave room for connections.
        if cfg!(unix) {
            let few = plan(32_768, 1024, 20_000).unwrap();
            assert_eq!(few, FilePlan { soft: 20_000, listeners: 14_897, connections: 2482 });
            assert!(u64::from(few.listeners) + 2 * few.connections as u64 + 138 <= 20_000);
        }
        // Not enough for anything: says how many.
        let error = plan(32_768, 256, 256).unwrap_err();
        assert!(matches!(error, PortsError::Files { needed: 32_970, limit: 256, .. }));
        assert!(error.to_string().contains("ulimit -n 32970"), "{error}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn listener_is_found_in_the_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                     0: 0100007F:0FA0 0100007F:1234 01 00000000:00000000 00:00000000 00000000  1000 0 111 1 0\n\
                     1: 0100007F:0FA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000 0 222 1 0\n";
        assert_eq!(listener_inode(table, 4000), Some(222));
        assert_eq!(listener_inode(table, 4001), None);
    }
}
