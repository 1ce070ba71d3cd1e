//! The control socket of a running fleet: `status`, and raw consoles.
//!
//! The client sends one line, `status`, `status <n>` or `console <n>`; the fleet answers `ok` or `error <why>` on one
//! line. After a `status` a JSON document follows, with a number the counters of that VM's link; after a `console` the socket is the VM's console, raw, both ways.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::console::hub::{Output, Subscription};
use crate::console::place::Claim;
use crate::fleet::{Fleet, lock};

/// Connections served at a time.
const CONNECTIONS: usize = 64;
/// Bytes of the client's first line.
const HELLO_BYTES: u64 = 64;
/// How long a client may take for its first line, or to read what it is sent.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers with the status document, or with the counters of one VM's link.
pub type StatusReport = Box<dyn Fn(Option<u32>) -> String + Send + Sync>;

/// The server; dropping it ends it and its connections.
pub struct Control {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    fleet: Arc<Fleet>,
    status: StatusReport,
    closing: AtomicBool,
    connections: AtomicUsize,
    open: Mutex<Vec<(u64, UnixStream)>>,
    path: std::path::PathBuf,
}

impl Control {
    /// Serves on the claimed place's socket.
    pub fn serve(claim: &Claim, fleet: Arc<Fleet>, status: StatusReport) -> io::Result<Self> {
        let path = claim.place.socket();
        let listener = UnixListener::bind(&path)?;
        let shared = Arc::new(Shared {
            fleet,
            status,
            closing: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            open: Mutex::default(),
            path,
        });
        let acceptor = {
            let shared = shared.clone();
            std::thread::Builder::new().name("control".into()).spawn(move || accept(&shared, &listener))?
        };
        Ok(Self { shared, acceptor: Some(acceptor) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shared.closing.store(true, SeqCst);
        // The acceptor sits in accept(); a connection of our own gets it out.
        let reached = UnixStream::connect(&self.shared.path).is_ok();
        for (_, stream) in lock(&self.shared.open).drain(..) {
            // Fails only if the client has gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(acceptor) = self.acceptor.take().filter(|_| reached) {
            // A panic was printed; there is nothing to add.
            let _ = acceptor.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener) {
    let mut number = 0;
    for stream in listener.incoming() {
        if shared.closing.load(SeqCst) {
            return;
        }
        let Ok(mut stream) = stream else {
            // Out of descriptors: others may be given back soon.
            std::thread::sleep(Duration::from_millis(50));
            continue;
        };
        if shared.connections.fetch_add(1, SeqCst) >= CONNECTIONS {
            shared.connections.fetch_sub(1, SeqCst);
            let _ = stream.write_all(b"error too many connections to this fleet; close some consoles\n");
            continue;
        }
        number += 1;
        if let Ok(copy) = stream.try_clone() {
            lock(&shared.open).push((number, copy));
        }
        let (owner, id) = (shared.clone(), number);
        let serving = std::thread::Builder::new().name("console".into()).spawn(move || {
            // The client went away, which is its right.
            let _ = serve(&owner, &stream);
            owner.forget(id);
        });
        if serving.is_err() {
            shared.forget(number);
        }
    }
}

fn serve(shared: &Arc<Shared>, stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(stream);
    let mut hello = String::new();
    (&mut reader).take(HELLO_BYTES).read_line(&mut hello)?;
    let mut writer = stream;
    let mut words = hello.split_whitespace();
    match (words.next(), words.next()) {
        (Some("status"), None) => {
            writer.write_all(b"ok\n")?;
            writer.write_all((shared.status)(None).as_bytes())
        }
        (Some(what @ ("console" | "status")), Some(number)) => {
            let vms = shared.fleet.vms();
            match number.parse::<u32>() {
                Ok(vm) if vm < vms && what == "status" => {
                    writer.write_all(b"ok\n")?;
                    writer.write_all((shared.status)(Some(vm)).as_bytes())
                }
                Ok(vm) if vm < vms => {
                    writer.write_all(b"ok\n")?;
                    stream.set_read_timeout(None)?;
                    console(shared, vm, stream, reader)
                }
                _ => writeln!(
                    writer,
                    "error there is no VM {number}: the fleet has {vms}, numbered from 0 to {}",
                    vms - 1
                ),
            }
        }
        _ => writer.write_all(b"error expected 'status', 'status <n>' or 'console <n>'\n"),
    }
}

fn console(
    shared: &Arc<Shared>,
    vm: u32,
    stream: &UnixStream,
    mut reader: BufReader<&UnixStream>,
) -> io::Result<()> {
    // A slow reader loses output; it need not lose the connection.
    stream.set_write_timeout(None)?;
    let listener = Arc::new(shared.fleet.subscribe(vm));
    let mut writer = stream.try_clone()?;
    let printer = {
        let listener = listener.clone();
        let shared = shared.clone();
        std::thread::Builder::new().name("console-out".into()).spawn(move || {
            // An error means that the client has gone; either way the reader below has to see the end.
            let _ = print(&shared, vm, &listener, &mut writer);
            let _ = writer.shutdown(Shutdown::Both);
        })?
    };
    let mut bytes = [0; 1024];
    let ended = loop {
        match reader.read(&mut bytes) {
            Ok(0) => break Ok(()),
            Ok(n) => {
                // A guest that takes no input holds the client up, nobody else.
                let mut left = &bytes[..n];
                while !left.is_empty() && !shared.closing.load(SeqCst) && !shared.fleet.is_down(vm) {
                    let done = shared.fleet.type_all(vm, left, Duration::from_millis(500));
                    left = &left[done..];
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    listener.close();
    // Its error is the client's going away, as the reader's is.
    let _ = printer.join();
    ended
}

fn print(shared: &Shared, vm: u32, listener: &Subscription, writer: &mut UnixStream) -> io::Result<()> {
    writer.write_all(&listener.tail)?;
    loop {
        match listener.receive(Duration::from_secs(3600)) {
            Output::Bytes { bytes, lost } => {
                if lost > 0 {
                    write!(writer, "\r\n[{lost} bytes of output skipped]\r\n")?;
                }
                writer.write_all(&bytes)?;
            }
            Output::Nothing => {}
            Output::Closed if shared.fleet.is_down(vm) => {
                return write!(writer, "\r\n[VM {vm}: {}]\r\n", shared.fleet.status(vm).reason());
            }
            Output::Closed => return Ok(()),
        }
    }
}

impl Shared {
    fn forget(&self, number: u64) {
        lock(&self.open).retain(|(n, _)| *n != number);
        self.connections.fetch_sub(1, SeqCst);
    }
}
