//! A fleet with its page, and plain HTTP to it.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "it is part of tests")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A folder for the fleet's state, and ports of its own.
pub struct Lab {
    folder: tempfile::TempDir,
    image: PathBuf,
    /// Of the page.
    pub port: u16,
    port_base: u16,
    token: Option<&'static str>,
}

/// A fleet that runs until dropped.
pub struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the server answered.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Lab {
    /// With an image that `make` writes.
    pub fn new(make: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        std::fs::create_dir(&image).unwrap();
        make(&image);
        Self::with(folder, image)
    }

    /// With a real image.
    pub fn of(image: PathBuf) -> Self {
        Self::with(tempfile::tempdir().unwrap(), image)
    }

    fn with(folder: tempfile::TempDir, image: PathBuf) -> Self {
        // Ports that were free a moment ago, below those that the system gives to connections.
        let free = |ports: std::ops::Range<u16>| {
            ports.clone().all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        };
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let port = loop {
            let n = std::process::id() * 977 + NEXT.fetch_add(300, Relaxed);
            let port = 10_000 + (n % 20_000) as u16;
            if free(port..port + 300) {
                break port;
            }
        };
        Self { folder, image, port, port_base: port + 1, token: None }
    }

    pub fn image(&self) -> &Path {
        &self.image
    }

    pub fn token(mut self, token: &'static str) -> Self {
        self.token = Some(token);
        self
    }

    pub fn command(&self, subcommand: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_emulator"));
        command.arg(subcommand).arg("--state-dir").arg(self.folder.path().join("state"));
        command.args(["--port-base", &self.port_base.to_string()]).args(args).stdin(Stdio::null());
        command.env_remove("LINUX_ON_GPU_TOKEN").envs(self.token.map(|token| ("LINUX_ON_GPU_TOKEN", token)));
        command
    }

    /// A fleet whose page answers.
    pub fn serve(&self, vms: u32, args: &[&str]) -> Serving {
        let mut command = self.command("fleet", args);
        command.arg("--image").arg(&self.image).args(["--vms", &vms.to_string(), "--backend", "cpu"]);
        command.args(["--web", &self.port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
        let serving = Serving(command.spawn().unwrap());
        until("the page answers", || TcpStream::connect(("127.0.0.1", self.port)).is_ok());
        serving
    }

    /// Sends a request with these headers; Host is added.
    pub fn ask(&self, request: &str, headers: &[&str]) -> Answer {
        let host = format!("Host: 127.0.0.1:{}", self.port);
        let mut all = vec![&host[..]];
        if headers.iter().any(|header| header.starts_with("Host:")) {
            all.clear();
        }
        all.extend(headers);
        self.send(&format!("{request} HTTP/1.1\r\n{}\r\nConnection: close\r\n\r\n", all.join("\r\n")))
    }

    /// Sends bytes as they are.
    pub fn send(&self, text: &str) -> Answer {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    /// The body of an answer of HTTP/1.0, whatever it is.
    pub fn bytes(&self, request: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "{request} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
        assert!(answer.starts_with(b"HTTP/1.0 200"), "{:?}", String::from_utf8_lossy(&answer[..head]));
        answer.split_off(head + 4)
    }

    /// The JSON at a path.
    pub fn get(&self, path: &str) -> Value {
        let answer = self.ask(&format!("GET {path}"), &[]);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        answer.json()
    }

    pub fn state(&self, vm: u32) -> String {
        self.get(&format!("/api/vms/{vm}"))["state"].as_str().unwrap().to_owned()
    }

    /// Waits until all VMs have been ready.
    pub fn until_ready(&self, vms: u32) {
        until("all VMs are ready", || self.get("/api/status")["report"]["ready"]["vms"] == vms);
    }
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
