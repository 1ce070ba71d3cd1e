//! The `windivert` transport (Windows, Administrator): packets to the ports of 127.0.0.1 are taken out of the host's stack
//! before it sees them, as in the talk.
//!
//! WinDivert.dll and its driver are not ours and not linked: they are looked for beside the program when they are needed.

use std::ffi::{CString, c_char, c_void};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use libloading::Library;

use super::Links;
use super::bridge::{Bridge, Error, io_error};
use super::capture::Capture;
use super::divert::{Divert, DivertWire};
use super::lan::Watch;
use super::policy::Policy;
use super::ports;
use super::rewrite::Ports;

/// Why WinDivert could not be had.
#[derive(Debug, thiserror::Error)]
pub enum WinDivertError {
    /// No DLL.
    #[error(
        "--net windivert needs WinDivert.dll and WinDivert64.sys (version 2.2) beside {}, from WinDivert's own \
         distribution; --net user needs neither",
        folder.display()
    )]
    NotFound {
        /// Where the program lies.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: libloading::Error,
    },
    /// Not as Administrator.
    #[error(
        "--net windivert loads a driver, which only an Administrator may do: start the program as one, or use --net user"
    )]
    Denied,
    /// Anything else.
    #[error("WinDivert can't be opened: {0}; --net user needs no driver")]
    Open(#[source] io::Error),
}

type Handle = *mut c_void;
type Open = unsafe extern "C" fn(*const c_char, u32, i16, u64) -> Handle;
type Receive = unsafe extern "C" fn(Handle, *mut c_void, u32, *mut u32, *mut Address) -> i32;
type Send = unsafe extern "C" fn(Handle, *const c_void, u32, *mut u32, *const Address) -> i32;
type ShutDown = unsafe extern "C" fn(Handle, u32) -> i32;
type Close = unsafe extern "C" fn(Handle) -> i32;

/// WINDIVERT_ADDRESS of version 2: 80 bytes, of which we know the second word.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Address {
    timestamp: i64,
    flags: u32,
    rest: [u8; 68],
}

/// Bits of the flags.
const IMPOSTOR: u32 = 1 << 19;
const CHECKSUMS: u32 = 7 << 21;

struct WinDivert {
    handle: Handle,
    receive: Receive,
    send: Send,
    shut_down: ShutDown,
    close: Close,
    /// Keeps the functions where they are.
    _library: Library,
}

// SAFETY: WinDivert's handles may be used from several threads at once.
unsafe impl std::marker::Send for WinDivert {}
// SAFETY: as above.
unsafe impl Sync for WinDivert {}

impl WinDivert {
    fn open(ports: &Ports) -> Result<Self, WinDivertError> {
        const LAYER_NETWORK: u32 = 0;
        const ACCESS_DENIED: i32 = 5;
        let folder =
            std::env::current_exe().ok().and_then(|exe| exe.parent().map(PathBuf::from)).unwrap_or_default();
        let load = || -> Result<_, libloading::Error> {
            // SAFETY: loading WinDivert runs no code but its own start-up, and the types are those of its header.
            unsafe {
                let library = Library::new(folder.join("WinDivert.dll"))?;
                let open: Open = *library.get(b"WinDivertOpen\0")?;
                let receive: Receive = *library.get(b"WinDivertRecv\0")?;
                let send: Send = *library.get(b"WinDivertSend\0")?;
                let shut_down: ShutDown = *library.get(b"WinDivertShutdown\0")?;
                let close: Close = *library.get(b"WinDivertClose\0")?;
                Ok((library, open, receive, send, shut_down, close))
            }
        };
        let (library, open, receive, send, shut_down, close) = match load() {
            Ok(loaded) => loaded,
            Err(source) => return Err(WinDivertError::NotFound { folder, source }),
        };
        let filter = filter(ports);
        // SAFETY: the filter is a C string that outlives the call.
        let handle = unsafe { open(filter.as_ptr(), LAYER_NETWORK, 0, 0) };
        if handle.is_null() || handle as isize == -1 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(ACCESS_DENIED) => WinDivertError::Denied,
                _ => WinDivertError::Open(error),
            });
        }
        Ok(Self { handle, receive, send, shut_down, close, _library: library })
    }
}

/// What to divert, in WinDivert's language.
fn filter(ports: &Ports) -> CString {
    let last = u32::from(ports.base) + ports.vms - 1;
    let text = format!(
        "outbound and loopback and ip and tcp and ip.DstAddr == 127.0.0.1 and tcp.DstPort >= {} and tcp.DstPort <= {last}",
        ports.base
    );
    // It has no zero byte.
    CString::new(text).unwrap_or_default()
}

impl Divert for WinDivert {
    type Address = Address;

    fn receive(&self, packet: &mut [u8]) -> io::Result<Option<(usize, Address)>> {
        const NO_DATA: i32 = 232;
        const TOO_LONG: i32 = 122;
        let mut address = Address { timestamp: 0, flags: 0, rest: [0; 68] };
        let mut len = 0;
        let room = u32::try_from(packet.len()).unwrap_or(u32::MAX);
        // SAFETY: buffer, length and address are ours and outlive the call; the handle is open.
        let done =
            unsafe { (self.receive)(self.handle, packet.as_mut_ptr().cast(), room, &mut len, &mut address) };
        if done != 0 {
            return Ok(Some((len as usize, address)));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(NO_DATA) => Ok(None),
            // As much as fits was copied: it is too long for the link anyway.
            Some(TOO_LONG) => Ok(Some((packet.len(), address))),
            _ => Err(error),
        }
    }

    fn send(&self, packet: &[u8], address: &Address) -> io::Result<()> {
        let mut sent = 0;
        let len = u32::try_from(packet.len()).unwrap_or(u32::MAX);
        // SAFETY: as above; the driver only reads the packet and the address.
        let done = unsafe { (self.send)(self.handle, packet.as_ptr().cast(), len, &mut sent, address) };
        if done != 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn answer(address: &Address) -> Address {
        // Loopback has one direction, outbound, both ways. Our checksums are right.
        Address { flags: (address.flags & !IMPOSTOR) | CHECKSUMS, ..*address }
    }

    fn shut_down(&self) {
        const BOTH: u32 = 3;
        // SAFETY: the handle is open. A refusal would mean that it is shut down already.
        unsafe { (self.shut_down)(self.handle, BOTH) };
    }
}

impl Drop for WinDivert {
    fn drop(&mut self) {
        // SAFETY: nobody uses the handle any more; the driver goes with the last handle.
        unsafe { (self.close)(self.handle) };
    }
}

/// The bridge: bound, then started, then stopped (at the latest when dropped).
pub struct WinDivertBridge {
    ports: Ports,
    policy: Policy,
    watch: Watch,
    driver: Option<WinDivert>,
    running: Option<Capture>,
}

impl WinDivertBridge {
    /// Opens the driver. From here on, clients wait for an answer.
    pub fn bind(ports: Ports, policy: Policy) -> Result<Self, Error> {
        ports::check(&ports)?;
        let driver = Some(WinDivert::open(&ports)?);
        Ok(Self { ports, policy, watch: Watch::new(ports.vms), driver, running: None })
    }
}

impl Bridge for WinDivertBridge {
    fn start(&mut self, links: Arc<dyn Links>) -> Result<(), Error> {
        let driver = self.driver.take().ok_or(Error::Started)?;
        let wire = Box::new(DivertWire::new(driver).map_err(io_error("start its thread"))?);
        let watch = self.watch.clone();
        self.running = Some(Capture::start("net-windivert", wire, &self.policy, self.ports, links, watch)?);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        self.driver = None;
        let Some(capture) = self.running.take() else { return Ok(()) };
        let stopped = capture.stop();
        self.watch.tap.close();
        stopped
    }

    fn has_failed(&self) -> bool {
        self.running.as_ref().is_some_and(|capture| !capture.is_running())
    }

    fn watch(&self) -> &Watch {
        &self.watch
    }

    fn ports(&self) -> Ports {
        self.ports
    }
}

impl Drop for WinDivertBridge {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}
