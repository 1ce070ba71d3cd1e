//! How this program itself reaches a VM's web server: by its port, or, where the limit of open files left it none, through
//! the bridge's door. A door hands one end of a pair of sockets to the bridge, which serves it as a client of that VM.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::pin::Pin;
#[cfg(unix)]
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use mio::event::Source;
use mio::net::TcpStream;
#[cfg(unix)]
use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::rewrite::Ports;

/// A connected or connecting socket that does not block.
#[derive(Debug)]
pub enum Stream {
    /// TCP on loopback.
    Tcp(TcpStream),
    /// One end of a pair.
    #[cfg(unix)]
    Pair(UnixStream),
}

macro_rules! each {
    ($self:expr, $stream:ident => $do:expr) => {
        match $self {
            Stream::Tcp($stream) => $do,
            #[cfg(unix)]
            Stream::Pair($stream) => $do,
        }
    };
}

impl Stream {
    /// As [`TcpStream::take_error`].
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        each!(self, stream => stream.take_error())
    }

    /// As [`TcpStream::shutdown`].
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        each!(self, stream => stream.shutdown(how))
    }

    /// Whether the other side has taken the connection.
    pub fn is_connected(&self) -> bool {
        each!(self, stream => stream.peer_addr().is_ok())
    }

    /// Closes it with a reset instead of an orderly end, where there is such a thing.
    pub fn reset(self) {
        match &self {
            Stream::Tcp(stream) => {
                // Should this fail, the client still sees the connection end.
                let _ = rustix::net::sockopt::set_socket_linger(stream, Some(std::time::Duration::ZERO));
            }
            #[cfg(unix)]
            Stream::Pair(_) => {}
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        each!(self, stream => stream.read(buffer))
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        each!(self, stream => stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        each!(self, stream => stream.flush())
    }
}

impl Source for Stream {
    fn register(&mut self, registry: &Registry, token: Token, interest: Interest) -> io::Result<()> {
        each!(self, stream => stream.register(registry, token, interest))
    }

    fn reregister(&mut self, registry: &Registry, token: Token, interest: Interest) -> io::Result<()> {
        each!(self, stream => stream.reregister(registry, token, interest))
    }

    fn deregister(&mut self, registry: &Registry) -> io::Result<()> {
        each!(self, stream => stream.deregister(registry))
    }
}

/// The same for tasks.
#[derive(Debug)]
pub enum TaskStream {
    /// TCP on loopback.
    Tcp(tokio::net::TcpStream),
    /// One end of a pair.
    #[cfg(unix)]
    Pair(tokio::net::UnixStream),
}

macro_rules! each_task {
    ($self:expr, $stream:ident => $do:expr) => {
        match $self.get_mut() {
            TaskStream::Tcp($stream) => $do,
            #[cfg(unix)]
            TaskStream::Pair($stream) => $do,
        }
    };
}

impl AsyncRead for TaskStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        each_task!(self, stream => Pin::new(stream).poll_read(context, buffer))
    }
}

impl AsyncWrite for TaskStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each_task!(self, stream => Pin::new(stream).poll_write(context, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each_task!(self, stream => Pin::new(stream).poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        each_task!(self, stream => Pin::new(stream).poll_shutdown(context))
    }
}

/// Called when a client waits at the door.
#[cfg(unix)]
type Bell = Arc<dyn Fn() + Send + Sync>;

/// Clients on their way to the bridge, by the VM that they want.
#[cfg(unix)]
#[derive(Clone, Default)]
pub struct Door {
    inside: Arc<Mutex<Inside>>,
}

#[cfg(unix)]
#[derive(Default)]
struct Inside {
    waiting: Vec<(u32, UnixStream)>,
    bell: Option<Bell>,
    closed: bool,
}

#[cfg(unix)]
impl Door {
    fn enter(&self, vm: u32) -> io::Result<std::os::unix::net::UnixStream> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        let bell = {
            let mut inside = crate::sync::lock(&self.inside);
            if inside.closed {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            inside.waiting.push((vm, UnixStream::from_std(theirs)));
            inside.bell.clone()
        };
        if let Some(bell) = bell {
            bell();
        }
        Ok(ours)
    }

    /// Sets what is called when a client comes.
    pub(super) fn set_bell(&self, bell: Bell) {
        crate::sync::lock(&self.inside).bell = Some(bell);
    }

    /// Takes those that wait, `most` of them at most.
    pub(super) fn take(&self, most: usize) -> Vec<(u32, UnixStream)> {
        let mut inside = crate::sync::lock(&self.inside);
        let count = inside.waiting.len().min(most);
        inside.waiting.drain(..count).collect()
    }

    /// Whether somebody waits.
    pub(super) fn has_guests(&self) -> bool {
        !crate::sync::lock(&self.inside).waiting.is_empty()
    }

    /// Lets nobody in any more.
    pub(super) fn close(&self) {
        let mut inside = crate::sync::lock(&self.inside);
        inside.closed = true;
        inside.waiting.clear();
        inside.bell = None;
    }
}

/// Where the VMs' web servers are reached.
#[derive(Clone)]
pub struct Reach {
    ports: Ports,
    listening: u32,
    #[cfg(unix)]
    door: Option<Door>,
}

impl Reach {
    /// All by their ports.
    pub fn by_ports(ports: Ports) -> Self {
        Self {
            ports,
            listening: ports.vms,
            #[cfg(unix)]
            door: None,
        }
    }

    /// VMs 0 to `listening` - 1 by their ports, the others through the door.
    #[cfg(unix)]
    pub(super) fn with_door(ports: Ports, listening: u32, door: Door) -> Self {
        Self { ports, listening, door: Some(door) }
    }

    /// VMs.
    pub fn vms(&self) -> u32 {
        self.ports.vms
    }

    /// VMs that have a port, from VM 0 on.
    pub fn listening(&self) -> u32 {
        self.listening
    }

    /// VM 0's port.
    pub fn base(&self) -> u16 {
        self.ports.base
    }

    /// The VM's port, if it has one.
    pub fn port_of(&self, vm: u32) -> Option<u16> {
        self.ports.port_of(vm).filter(|_| vm < self.listening)
    }

    fn address(&self, vm: u32) -> Option<SocketAddr> {
        Some((Ipv4Addr::LOCALHOST, self.port_of(vm)?).into())
    }

    /// Begins a connection.
    pub fn connect(&self, vm: u32) -> io::Result<Stream> {
        if let Some(address) = self.address(vm) {
            return Ok(Stream::Tcp(TcpStream::connect(address)?));
        }
        #[cfg(unix)]
        if let Some(door) = self.door.as_ref().filter(|_| vm < self.ports.vms) {
            return Ok(Stream::Pair(UnixStream::from_std(door.enter(vm)?)));
        }
        Err(io::ErrorKind::AddrNotAvailable.into())
    }

    /// Connects.
    pub async fn connect_task(&self, vm: u32) -> io::Result<TaskStream> {
        if let Some(address) = self.address(vm) {
            return Ok(TaskStream::Tcp(tokio::net::TcpStream::connect(address).await?));
        }
        #[cfg(unix)]
        if let Some(door) = self.door.as_ref().filter(|_| vm < self.ports.vms) {
            return Ok(TaskStream::Pair(tokio::net::UnixStream::from_std(door.enter(vm)?)?));
        }
        Err(io::ErrorKind::AddrNotAvailable.into())
    }
}
