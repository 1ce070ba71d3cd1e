//! A network of a test's own: a network namespace, in which loopback is up.

use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, recvfrom, sendto, socket};

/// Runs a test in a network namespace of its own, threads and programs that it starts included. Skips it, and says so,
/// where that is not allowed.
pub fn alone(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: it changes this thread only, which is young and shares nothing that would be undone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let error = io::Error::last_os_error();
            println!("SKIPPED: a network namespace can't be made ({error}); it takes root");
            return;
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            println!("SKIPPED: there is no /dev/net/tun");
            return;
        }
        if std::process::Command::new("ip").arg("-V").output().is_err() {
            println!("SKIPPED: there is no program `ip` (package iproute2)");
            return;
        }
        loopback_up();
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn loopback_up() {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    // SAFETY: plain integers and bytes; all zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    use std::os::fd::AsRawFd;
    // SAFETY: the socket is open, and the request outlives the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &request) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

/// Pings an address; the round trip's time.
pub fn ping(address: Ipv4Addr, number: u16, bytes: usize, patience: Duration) -> Option<Duration> {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP)).unwrap();
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_millis(100)),
    )
    .unwrap();
    let mut echo = vec![8, 0, 0, 0, 0x4c, 0x47];
    echo.extend(number.to_be_bytes());
    echo.extend((0..bytes).map(|n| n as u8));
    let sum = emulator::net::checksum::of(&echo);
    echo[2..4].copy_from_slice(&sum.to_be_bytes());
    let to = std::net::SocketAddr::from((address, 0));
    let start = Instant::now();
    sendto(&socket, &echo, SendFlags::empty(), &to).unwrap();
    let mut buffer = [0; 2048];
    while start.elapsed() < patience {
        let Ok((len, ..)) = recvfrom(&socket, &mut buffer[..], RecvFlags::empty()) else { continue };
        // A raw socket also gets the header, and everybody's ICMP.
        let answer = &buffer[20..len];
        if buffer[12..16] == address.octets() && answer[0] == 0 && answer[4..] == echo[4..] {
            return Some(start.elapsed());
        }
    }
    None
}
