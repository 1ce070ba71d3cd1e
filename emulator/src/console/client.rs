//! The other end of the control socket: asks the API of a running fleet, attaches a terminal, or pipes, to a VM's console.

use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::console::place::{Place, PlaceError};

/// Ctrl-], which leaves the console.
const LEAVE: u8 = 0x1d;
/// Bytes of an answer that tells an error.
const ERROR_BYTES: u64 = 4096;
/// With input from a pipe, how long a VM may take to print anything at all: it may be booting.
const FIRST_OUTPUT: Duration = Duration::from_secs(30);

/// Why a request to a fleet failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no fleet to ask.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The fleet refuses.
    #[error("{0}")]
    Refused(String),
    /// The connection, or the terminal, broke.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ClientError {
    move |source| ClientError::Io { what, source }
}

/// How an attachment ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The user left, or the input ended.
    Left,
    /// The VM or the fleet ended.
    Closed,
    /// A signal asked for the end.
    Signal,
}

/// Sends a request of the API; returns what follows the head of the answer if its status is `wanted`.
fn ask(place: &Place, head: &str, wanted: u16) -> Result<BufReader<UnixStream>, ClientError> {
    let socket = place.socket();
    let mut stream = UnixStream::connect(&socket).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            PlaceError::NotRunning { port_base: place.port_base, socket: socket.clone() }
        }
        _ => PlaceError::Io { path: socket.clone(), source },
    })?;
    stream.write_all(head.as_bytes()).map_err(io_error("asking the fleet"))?;
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut text = String::new();
        reader.read_line(&mut text).map_err(io_error("reading the fleet's answer"))?;
        Ok::<_, ClientError>(text.trim_end().to_owned())
    };
    let status = line()?;
    if status.is_empty() {
        return Err(ClientError::Refused("the fleet is ending".into()));
    }
    let mut length = 0;
    loop {
        let header = line()?.to_ascii_lowercase();
        match header.split_once(':') {
            Some(("content-length", value)) => length = value.trim().parse().unwrap_or(0),
            _ if header.is_empty() => break,
            _ => {}
        }
    }
    if status.split(' ').nth(1).and_then(|code| code.parse().ok()) == Some(wanted) {
        return Ok(reader);
    }
    let mut body = String::new();
    // The connection may stay open.
    reader
        .take(ERROR_BYTES.min(length))
        .read_to_string(&mut body)
        .map_err(io_error("reading the fleet's answer"))?;
    let error = serde_json::from_str(&body).ok().and_then(|value: serde_json::Value| {
        let why = value.get("error")?.as_str()?;
        Some(why.to_owned())
    });
    Err(ClientError::Refused(error.unwrap_or(status)))
}

fn request(place: &Place, method: &str, path: &str) -> Result<String, ClientError> {
    let mut text = String::new();
    ask(place, &format!("{method} {path} HTTP/1.0\r\nContent-Length: 0\r\n\r\n"), 200)?
        .read_to_string(&mut text)
        .map_err(io_error("reading the fleet's answer"))?;
    Ok(text)
}

/// The status document of the fleet, or the counters of one VM's link.
pub fn status(place: &Place, vm: Option<u32>) -> Result<String, ClientError> {
    let path = vm.map_or("/api/status".to_owned(), |vm| format!("/api/vms/{vm}/link"));
    request(place, "GET", &path)
}

/// Pauses, resumes or resets VMs, as in `0-9,20`; what the fleet answers.
pub fn act(place: &Place, vms: &str, action: &str) -> Result<String, ClientError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == ',' || c == '-';
    if !vms.chars().all(plain) || vms.is_empty() {
        return Err(ClientError::Refused(format!("{vms:?}: expected all, or VMs as in 0-9,20")));
    }
    request(place, "POST", &format!("/api/vms/{vms}/{action}"))
}

/// Connects to a VM's console.
pub fn attach(place: &Place, vm: u32) -> Result<Attachment, ClientError> {
    let head = format!(
        "GET /api/vms/{vm}/terminal HTTP/1.1\r\nHost: fleet\r\nConnection: upgrade\r\nUpgrade: console\r\n\r\n"
    );
    let reader = ask(place, &head, 101)?;
    let begin = reader.buffer().to_vec();
    Ok(Attachment { stream: reader.into_inner(), begin })
}

/// A connected console.
pub struct Attachment {
    stream: UnixStream,
    begin: Vec<u8>,
}

impl Attachment {
    /// Copies between `input`, `output` and the console until one of them ends, Ctrl-] comes from a terminal, or
    /// `signal` becomes readable. After the end of an input that is no terminal, output is printed until nothing has
    /// come for `linger`; a VM that has printed nothing yet is waited for longer.
    pub fn run(
        self,
        input: &OwnedFd,
        output: &mut dyn Write,
        signal: BorrowedFd<'_>,
        linger: Duration,
    ) -> Result<Ended, ClientError> {
        let mut stream = self.stream;
        let raw = RawTerminal::enter(input.as_fd()).map_err(io_error("setting up the terminal"))?;
        let show = |output: &mut dyn Write, bytes: &[u8]| {
            output.write_all(bytes).and_then(|()| output.flush()).map_err(io_error("writing the output"))
        };
        show(output, &self.begin)?;
        let mut quiet_since = Instant::now();
        let mut heard = !self.begin.is_empty();
        let mut reading = true;
        let mut bytes = [0; 4096];
        loop {
            let wait = match reading {
                true => None,
                false => {
                    let patience = if heard { linger } else { linger.max(FIRST_OUTPUT) };
                    Some(patience.saturating_sub(quiet_since.elapsed()))
                }
            };
            if wait.is_some_and(|wait| wait.is_zero()) {
                return Ok(Ended::Left);
            }
            let wait =
                wait.map(|w| Timespec { tv_sec: w.as_secs() as i64, tv_nsec: w.subsec_nanos().into() });
            let mut fds = vec![
                PollFd::from_borrowed_fd(signal, PollFlags::IN),
                PollFd::new(&stream, PollFlags::IN),
                PollFd::new(input, PollFlags::IN),
            ];
            fds.truncate(if reading { 3 } else { 2 });
            match poll(&mut fds, wait.as_ref()) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(io_error("waiting for the console")(error.into())),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if ready[0] {
                return Ok(Ended::Signal);
            }
            if ready[1] {
                match stream.read(&mut bytes) {
                    Ok(0) => return Ok(Ended::Closed),
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Ended::Closed),
                    Ok(n) => show(output, &bytes[..n])?,
                    Err(error) => return Err(io_error("reading the console")(error)),
                }
                quiet_since = Instant::now();
                heard = true;
            }
            if reading && ready[2] {
                let n = match rustix::io::read(input, &mut bytes) {
                    Ok(n) => n,
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
                    // A terminal that hangs up.
                    Err(rustix::io::Errno::IO) => 0,
                    Err(error) => return Err(io_error("reading the input")(error.into())),
                };
                let leave = raw.as_ref().and_then(|_| bytes[..n].iter().position(|&b| b == LEAVE));
                let typed = &bytes[..leave.unwrap_or(n)];
                match stream.write_all(typed) {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Ended::Closed),
                    other => other.map_err(io_error("typing into the console"))?,
                }
                if leave.is_some() {
                    return Ok(Ended::Left);
                }
                if n == 0 {
                    reading = false;
                    quiet_since = Instant::now();
                }
            }
        }
    }

    /// Ends the connection.
    pub fn close(self) {
        // Fails only if the other side was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A terminal in raw mode until dropped, also by a panic.
struct RawTerminal<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> RawTerminal<'a> {
    fn enter(terminal: BorrowedFd<'a>) -> io::Result<Option<Self>> {
        if !terminal.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(terminal, OptionalActions::Now, &raw)?;
        Ok(Some(Self { terminal, before }))
    }
}

impl Drop for RawTerminal<'_> {
    fn drop(&mut self) {
        // Nothing can be done if the terminal has gone.
        let _ = tcsetattr(self.terminal, OptionalActions::Drain, &self.before);
    }
}
