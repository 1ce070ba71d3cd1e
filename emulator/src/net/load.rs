//! A load generator: asks VMs for their page, over and over, and measures.
//!
//! In a closed loop each connection asks again as soon as it was answered. With a rate, requests fall due at fixed times,
//! and a request's time counts from when it was due, so that a slow server can't hide behind a client that waits.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde::Serialize;

/// Requests that may be due and not begun; with more, the measurement is over anyway.
const WAITING: usize = 100_000;
/// Bytes of an answer's header at most.
const HEADER_MAX: usize = 16 * 1024;

/// What to do.
#[derive(Clone, Debug)]
pub struct Load {
    /// Who is asked, in turn.
    pub targets: Vec<SocketAddr>,
    /// Connections at once.
    pub connections: usize,
    /// Ask again on the same connection.
    pub keep_alive: bool,
    /// Requests a second; none: as many as go.
    pub rate: Option<f64>,
    /// For how long to begin requests.
    pub span: Duration,
    /// For one answer.
    pub patience: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Answers with status 200.
    pub answered: u64,
    /// Requests without one.
    pub failed: u64,
    /// Why, and how many.
    pub failures: BTreeMap<String, u64>,
    /// Bytes of the answers.
    pub bytes: u64,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Answers a second.
    pub requests_per_second: f64,
    /// Times of the answers, in milliseconds.
    pub milliseconds: Times,
    /// All times in microseconds, sorted.
    #[serde(skip)]
    pub times: Vec<u32>,
}

/// The spread of times.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Times {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Outcome {
    /// Several generators' outcomes as one.
    pub fn merge(parts: Vec<Outcome>) -> Self {
        let mut all = Self::default();
        for part in parts {
            all.answered += part.answered;
            all.failed += part.failed;
            all.bytes += part.bytes;
            all.seconds = all.seconds.max(part.seconds);
            all.times.extend(part.times);
            for (why, count) in part.failures {
                *all.failures.entry(why).or_default() += count;
            }
        }
        all.finish()
    }

    fn finish(mut self) -> Self {
        self.times.sort_unstable();
        let at = |part: f64| match self.times.len() {
            0 => 0.0,
            len => f64::from(self.times[((len as f64 * part) as usize).min(len - 1)]) / 1000.0,
        };
        self.milliseconds = Times { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) };
        self.requests_per_second = if self.seconds > 0.0 { self.answered as f64 / self.seconds } else { 0.0 };
        self
    }
}

/// One connection.
struct Client {
    stream: TcpStream,
    target: usize,
    /// When its request was due; none while nothing is asked.
    due: Option<Instant>,
    begun: Instant,
    sent: usize,
    header: Vec<u8>,
    /// What the header says; of the length, what is still missing.
    body: Option<Head>,
}

/// What the header of an answer says.
#[derive(Clone, Copy)]
struct Head {
    status: u16,
    /// Bytes of the body; without it, the body ends with the connection.
    length: Option<usize>,
    /// The server takes no further request on this connection.
    closes: bool,
}

enum Step {
    Waits,
    Done { status: u16, reusable: bool },
    Failed(String),
}

impl Load {
    /// Runs it on so many threads, though not on more than there are connections.
    pub fn run_on(&self, threads: usize) -> io::Result<Outcome> {
        let parts: io::Result<Vec<Outcome>> = std::thread::scope(|scope| {
            let shares = self.shares(threads);
            let running: Vec<_> = shares.into_iter().map(|load| scope.spawn(move || load.run())).collect();
            let crashed = || io::Error::other("a thread of the load generator crashed");
            running.into_iter().map(|thread| thread.join().map_err(|_| crashed())?).collect()
        });
        Ok(Outcome::merge(parts?))
    }

    /// What each of several threads does.
    fn shares(&self, threads: usize) -> Vec<Load> {
        let threads = threads.min(self.connections).max(1);
        let share = |n: usize| {
            let mut targets = self.targets.clone();
            // Each begins elsewhere, so that together they don't all ask the same VM at once.
            let first = n * targets.len() / threads;
            targets.rotate_left(first);
            let more = usize::from(n < self.connections % threads);
            let connections = self.connections / threads + more;
            Load { targets, connections, rate: self.rate.map(|rate| rate / threads as f64), ..*self }
        };
        (0..threads).map(share).collect()
    }

    /// Runs it, in this thread.
    pub fn run(&self) -> io::Result<Outcome> {
        let mut run = Run {
            load: self,
            poll: Poll::new()?,
            clients: (0..self.connections).map(|_| None).collect(),
            idle: (0..self.connections).rev().collect(),
            due: VecDeque::new(),
            next_target: 0,
            begun: 0,
            start: Instant::now(),
            outcome: Outcome::default(),
        };
        run.run()?;
        let mut outcome = run.outcome;
        outcome.seconds = run.start.elapsed().as_secs_f64();
        Ok(outcome.finish())
    }

    fn request(&self) -> &'static [u8] {
        match self.keep_alive {
            true => b"GET / HTTP/1.1\r\nHost: vm\r\n\r\n",
            false => b"GET / HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n",
        }
    }
}

struct Run<'a> {
    load: &'a Load,
    poll: Poll,
    clients: Vec<Option<Client>>,
    /// Slots without a request.
    idle: Vec<usize>,
    /// Requests that are due and have no slot yet.
    due: VecDeque<Instant>,
    next_target: usize,
    begun: u64,
    start: Instant,
    outcome: Outcome,
}

impl Run<'_> {
    fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        let mut buffer = vec![0; 64 * 1024];
        let mut last_check = Instant::now();
        loop {
            let now = Instant::now();
            let over = now >= self.start + self.load.span;
            let next = if over { None } else { self.fall_due(now) };
            while let Some(slot) = self.idle.pop() {
                let due = match self.load.rate {
                    Some(_) => self.due.pop_front(),
                    None => (!over).then_some(now),
                };
                let Some(due) = due else {
                    self.idle.push(slot);
                    break;
                };
                self.begin(slot, due);
            }
            if over && self.idle.len() == self.clients.len() && self.due.is_empty() {
                return Ok(());
            }
            let patience =
                next.map_or(Duration::from_millis(100), |next| next.saturating_duration_since(now));
            match self.poll.poll(&mut events, Some(patience.min(Duration::from_millis(100)))) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                self.serve(event.token().0, &mut buffer);
            }
            if last_check.elapsed() > Duration::from_millis(200) {
                last_check = Instant::now();
                self.check_patience();
            }
        }
    }

    /// Queues requests whose time has come; returns when the next one's does.
    fn fall_due(&mut self, now: Instant) -> Option<Instant> {
        let rate = self.load.rate?;
        loop {
            let at = self.start + Duration::from_secs_f64(self.begun as f64 / rate);
            if at > now || self.due.len() >= WAITING {
                return Some(at);
            }
            self.begun += 1;
            self.due.push_back(at);
        }
    }

    fn begin(&mut self, slot: usize, due: Instant) {
        if let Some(client) = &mut self.clients[slot] {
            (client.due, client.begun, client.sent) = (Some(due), Instant::now(), 0);
            self.serve_kept(slot);
            return;
        }
        let target = self.next_target;
        self.next_target = (target + 1) % self.load.targets.len();
        let connected = TcpStream::connect(self.load.targets[target]).and_then(|mut stream| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(slot), interest)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => {
                // It only costs time if the system refuses.
                let _ = stream.set_nodelay(true);
                self.clients[slot] = Some(Client {
                    stream,
                    target,
                    due: Some(due),
                    begun: Instant::now(),
                    sent: 0,
                    header: Vec::new(),
                    body: None,
                });
            }
            Err(error) => self.fail(slot, &format!("connect: {}", error.kind())),
        }
    }

    /// A connection that is kept has been writable all along: no event will say so.
    fn serve_kept(&mut self, slot: usize) {
        self.serve(slot, &mut [0; 4096]);
    }

    fn serve(&mut self, slot: usize, buffer: &mut [u8]) {
        let Some(client) = &mut self.clients[slot] else { return };
        let idle = client.due.is_none();
        match client.step(self.load.request(), buffer, &mut self.outcome.bytes) {
            Step::Waits => {}
            // The server has closed what nobody uses.
            Step::Failed(_) if idle => self.clients[slot] = None,
            Step::Failed(why) => self.fail(slot, &why),
            Step::Done { status, reusable } => {
                let due = client.due.take().unwrap_or(client.begun);
                client.header.clear();
                client.body = None;
                if !(self.load.keep_alive && reusable) {
                    self.clients[slot] = None;
                }
                self.idle.push(slot);
                if status == 200 {
                    self.outcome.answered += 1;
                    let time = due.elapsed().as_micros();
                    self.outcome.times.push(u32::try_from(time).unwrap_or(u32::MAX));
                } else {
                    self.count(format!("status {status}"));
                }
            }
        }
    }

    fn fail(&mut self, slot: usize, why: &str) {
        self.clients[slot] = None;
        self.idle.push(slot);
        self.count(why.to_owned());
    }

    fn count(&mut self, why: String) {
        self.outcome.failed += 1;
        *self.outcome.failures.entry(why).or_default() += 1;
    }

    fn check_patience(&mut self) {
        for slot in 0..self.clients.len() {
            let late = |client: &Client| client.due.is_some() && client.begun.elapsed() > self.load.patience;
            if let Some(client) = self.clients[slot].as_ref().filter(|client| late(client)) {
                let why = format!("no answer from {} in time", self.load.targets[client.target]);
                self.fail(slot, &why);
            }
        }
    }
}

impl Client {
    /// Goes on as far as it can.
    fn step(&mut self, request: &[u8], buffer: &mut [u8], bytes: &mut u64) -> Step {
        while self.due.is_some() && self.sent < request.len() {
            match self.stream.write(&request[self.sent..]) {
                Ok(sent) => self.sent += sent,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    return Step::Waits;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Step::Failed(format!("write: {}", error.kind())),
            }
        }
        loop {
            match self.stream.read(buffer) {
                Ok(0) => {
                    return match self.body {
                        Some(Head { status, length: None, .. }) => Step::Done { status, reusable: false },
                        _ => Step::Failed("the connection ended before the answer".into()),
                    };
                }
                Ok(len) => {
                    *bytes += len as u64;
                    if let Some(done) = self.take(&buffer[..len]) {
                        return done;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Step::Waits,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Step::Failed(format!("read: {}", error.kind())),
            }
        }
    }

    /// Takes a piece of the answer; tells if it was the last.
    fn take(&mut self, mut data: &[u8]) -> Option<Step> {
        if self.body.is_none() {
            let before = self.header.len();
            self.header.extend_from_slice(data);
            let from = before.saturating_sub(3);
            let Some(at) = self.header[from..].windows(4).position(|end| end == b"\r\n\r\n") else {
                let long = self.header.len() > HEADER_MAX;
                return long.then(|| Step::Failed("the answer's header has no end".into()));
            };
            let end = from + at + 4;
            let Some(parsed) = parse(&self.header[..end]) else {
                return Some(Step::Failed("the answer is not HTTP".into()));
            };
            self.body = Some(parsed);
            data = &data[end - before..];
        }
        let head = self.body.as_mut()?;
        let left = head.length?;
        if data.len() > left {
            return Some(Step::Failed("more came than was asked for".into()));
        }
        head.length = Some(left - data.len());
        (data.len() == left).then_some(Step::Done { status: head.status, reusable: !head.closes })
    }
}

fn parse(header: &[u8]) -> Option<Head> {
    let text = std::str::from_utf8(header).ok()?;
    let mut lines = text.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let mut head = Head { status, length: None, closes: false };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") && head.length.is_none() {
            head.length = value.trim().parse().ok();
        } else if name.eq_ignore_ascii_case("connection") {
            head.closes |= value.trim().eq_ignore_ascii_case("close");
        }
    }
    Some(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_connections_and_rate_and_begin_apart() {
        let targets: Vec<SocketAddr> = (4000..4010).map(|port| ([127, 0, 0, 1], port).into()).collect();
        let second = Duration::from_secs(1);
        let load = Load {
            targets: targets.clone(),
            connections: 7,
            keep_alive: true,
            rate: Some(6.0),
            span: second,
            patience: second,
        };
        let shares = load.shares(3);
        assert_eq!(shares.iter().map(|load| load.connections).collect::<Vec<_>>(), [3, 2, 2]);
        assert_eq!(shares.iter().map(|load| load.targets[0].port()).collect::<Vec<_>>(), [4000, 4003, 4006]);
        for mut share in shares {
            assert_eq!((share.rate, share.keep_alive), (Some(2.0), true));
            share.targets.sort_unstable();
            assert_eq!(share.targets, targets);
        }
        assert_eq!(load.shares(100).len(), 7);
        assert_eq!(Load { connections: 0, ..load }.shares(0).len(), 1);
    }
}
