//! Asks every VM for `GET /` through the bridge until each has answered 200: what `--until http` waits for.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mio::{Events, Interest, Poll, Token};

use super::reach::{Reach, Stream};

const REQUEST: &[u8] = b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\nUser-Agent: linux-on-gpu-probe\r\n\r\n";
/// Of an answer, so much is read; more is not asked for.
const ANSWER_MAX: usize = 256 * 1024;
/// How often VMs that are not ready are looked at, and `stop`.
const LOOK: Duration = Duration::from_millis(10);
/// Of the VMs that have not answered, so many are looked at in one round; the others in the next.
const LOOK_AT: usize = 1024;
/// After a round in which none was found that could be asked.
const LOOK_PAUSE: Duration = Duration::from_millis(2);
/// How often questions without an answer are looked at.
const CHECK: Duration = Duration::from_millis(50);
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// What the caller knows of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Not yet worth asking.
    NotReady,
    /// Ask it.
    Ready,
    /// It will never answer: don't wait for it.
    Down,
}

/// Whom to ask, and how long.
#[derive(Clone)]
pub struct Probe {
    /// How the VMs are reached.
    pub reach: Reach,
    /// VMs asked at once.
    pub at_once: usize,
    /// For one question and its answer.
    pub patience: Duration,
    /// When to give up; none for never.
    pub deadline: Option<Instant>,
}

/// Why a VM's last answer was none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It was never ready.
    NotReady,
    /// It is down.
    Down,
    /// The bridge refused the connection, or reset it: nothing listens in the VM, or it gave no sign of life.
    Refused,
    /// No whole answer in time.
    TimedOut,
    /// The answer ended early.
    Incomplete,
    /// Another status than 200.
    Status(u16),
    /// What came was not HTTP.
    NotHttp,
    /// The host's side failed.
    Host(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReady => write!(f, "it was not ready"),
            Self::Down => write!(f, "it is down"),
            Self::Refused => write!(f, "the connection was refused or reset"),
            Self::TimedOut => write!(f, "no whole answer in time"),
            Self::Incomplete => write!(f, "the answer ended early"),
            Self::Status(status) => write!(f, "it answered with status {status}"),
            Self::NotHttp => write!(f, "what it answered was not HTTP"),
            Self::Host(error) => write!(f, "the host failed: {error}"),
        }
    }
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// VMs that answered 200.
    pub answered: u32,
    /// When the first did.
    pub first: Option<Instant>,
    /// When the last did.
    pub last: Option<Instant>,
    /// The VMs that did not, in order, with the reason of their last failure.
    pub failures: Vec<(u32, Failure)>,
}

/// One VM's question under way.
struct Question {
    vm: u32,
    stream: Stream,
    sent: usize,
    answer: Vec<u8>,
    until: Instant,
}

/// A VM that has not answered yet.
struct Pending {
    vm: u32,
    after: Instant,
    pause: Duration,
}

impl Probe {
    /// Asks until all have answered, failed for good, the deadline has passed, or `stop` is set. Blocks the caller.
    ///
    /// `target` is asked before each attempt. `answered` is called for each VM that answered 200.
    pub fn run(
        &self,
        target: impl Fn(u32) -> Target,
        stop: &AtomicBool,
        mut answered: impl FnMut(u32, Instant),
    ) -> io::Result<Outcome> {
        let mut poll = Poll::new()?;
        let mut events = Events::with_capacity(self.at_once.max(1));
        let start = Instant::now();
        let mut pending: VecDeque<Pending> =
            (0..self.reach.vms()).map(|vm| Pending { vm, after: start, pause: PAUSE_MIN }).collect();
        let mut why = vec![Some(Failure::NotReady); self.reach.vms() as usize];
        let mut asked: Vec<Option<(Question, Duration)>> = (0..self.at_once.max(1)).map(|_| None).collect();
        let mut free: Vec<usize> = (0..asked.len()).rev().collect();
        let (mut look_after, mut check_after) = (start, start);
        let mut outcome = Outcome::default();

        loop {
            let now = Instant::now();
            let over = stop.load(Ordering::Acquire) || self.deadline.is_some_and(|deadline| now >= deadline);
            if over || (pending.is_empty() && free.len() == asked.len()) {
                break;
            }
            let mut look = if now < look_after { 0 } else { pending.len().min(LOOK_AT) };
            while look > 0
                && let Some(&slot) = free.last()
            {
                match self.next(&mut pending, &mut look, &mut why, &target, now, &poll, slot) {
                    Some(question) => asked[slot] = Some(question),
                    None => {
                        look_after = now + LOOK_PAUSE;
                        break;
                    }
                }
                free.pop();
            }

            let timeout = self.timeout(now, !pending.is_empty());
            match poll.poll(&mut events, Some(timeout)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            let now = Instant::now();
            let mut results = Vec::new();
            for event in &events {
                let slot = event.token().0;
                if let Some(Some((question, _))) = asked.get_mut(slot)
                    && let Some(result) = question.go_on()
                {
                    results.push((slot, result));
                }
            }
            if now >= check_after {
                check_after = now + CHECK;
                let late = |place: &Option<(Question, Duration)>| {
                    place.as_ref().is_some_and(|(question, _)| now >= question.until)
                };
                let late = asked.iter().enumerate().filter(|(_, place)| late(place));
                results.extend(late.map(|(slot, _)| (slot, Err(Failure::TimedOut))));
            }
            for (slot, result) in results {
                // Two results of one question: the first counts.
                let Some((Question { vm, .. }, pause)) = asked[slot].take() else { continue };
                free.push(slot);
                match result {
                    Ok(()) => {
                        why[vm as usize] = None;
                        outcome.answered += 1;
                        outcome.first.get_or_insert(now);
                        outcome.last = Some(now);
                        answered(vm, now);
                    }
                    Err(failure) => {
                        why[vm as usize] = Some(failure);
                        let pause = pause.min(PAUSE_MAX);
                        pending.push_back(Pending { vm, after: now + pause, pause: pause * 2 });
                    }
                }
            }
        }
        outcome.failures =
            why.into_iter().enumerate().filter_map(|(vm, why)| Some((vm as u32, why?))).collect();
        Ok(outcome)
    }

    /// Asks the next VM whose turn it is, looking at no more than `look` of them.
    #[allow(clippy::too_many_arguments)]
    fn next(
        &self,
        pending: &mut VecDeque<Pending>,
        look: &mut usize,
        why: &mut [Option<Failure>],
        target: &impl Fn(u32) -> Target,
        now: Instant,
        poll: &Poll,
        slot: usize,
    ) -> Option<(Question, Duration)> {
        while *look > 0 {
            *look -= 1;
            let next = pending.pop_front()?;
            if now < next.after {
                pending.push_back(next);
                continue;
            }
            match target(next.vm) {
                Target::Down => {
                    why[next.vm as usize] = Some(Failure::Down);
                    continue;
                }
                Target::NotReady => {
                    pending.push_back(next);
                    continue;
                }
                Target::Ready => {}
            }
            match self.ask(next.vm, now, poll, slot) {
                Ok(question) => return Some((question, next.pause)),
                Err(error) => {
                    why[next.vm as usize] = Some(Failure::Host(error.to_string()));
                    pending.push_back(Pending { after: now + PAUSE_MAX, ..next });
                }
            }
        }
        None
    }

    fn ask(&self, vm: u32, now: Instant, poll: &Poll, slot: usize) -> io::Result<Question> {
        let mut stream = self.reach.connect(vm)?;
        poll.registry().register(&mut stream, Token(slot), Interest::READABLE | Interest::WRITABLE)?;
        Ok(Question { vm, stream, sent: 0, answer: Vec::new(), until: now + self.patience })
    }

    fn timeout(&self, now: Instant, pending: bool) -> Duration {
        let due = self.deadline.map(|at| at.saturating_duration_since(now));
        // `stop` has no waker, so it is looked at as often as VMs that are not ready.
        let look = if pending { LOOK } else { CHECK };
        due.map_or(look, |due| due.min(look))
    }
}

impl Question {
    /// Sends and reads what can be; the result once there is one.
    fn go_on(&mut self) -> Option<Result<(), Failure>> {
        while self.sent < REQUEST.len() {
            match self.stream.write(&REQUEST[self.sent..]) {
                Ok(bytes) => self.sent += bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.stopped(&error),
            }
        }
        let mut buffer = [0; 4096];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Some(judge(&self.answer, true).unwrap_or(Err(Failure::Incomplete))),
                Ok(bytes) => {
                    let room = ANSWER_MAX.saturating_sub(self.answer.len());
                    self.answer.extend_from_slice(&buffer[..bytes.min(room)]);
                    if let Some(result) = judge(&self.answer, self.answer.len() >= ANSWER_MAX) {
                        // The answer is whole: say so, instead of leaving a reset behind.
                        let _ = self.stream.shutdown(Shutdown::Both);
                        return Some(result);
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.stopped(&error),
            }
        }
    }

    fn stopped(&self, error: &io::Error) -> Option<Result<(), Failure>> {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::NotConnected => None,
            ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe => {
                Some(Err(if self.answer.is_empty() { Failure::Refused } else { Failure::Incomplete }))
            }
            _ => Some(Err(Failure::Host(error.to_string()))),
        }
    }
}

/// What an answer says; none if it goes on. `ended`: no more will come, or be read.
fn judge(answer: &[u8], ended: bool) -> Option<Result<(), Failure>> {
    const HTTP: &[u8] = b"HTTP/1.";
    let start = answer.len().min(HTTP.len());
    if answer[..start] != HTTP[..start] {
        return Some(Err(Failure::NotHttp));
    }
    let Some(header_end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else {
        return ended.then_some(Err(Failure::Incomplete));
    };
    let header = String::from_utf8_lossy(&answer[..header_end]);
    let mut lines = header.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    match status {
        None => return Some(Err(Failure::NotHttp)),
        Some(200) => {}
        Some(status) => return Some(Err(Failure::Status(status))),
    }
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let body = answer.len() - (header_end + 4);
    match length {
        Some(length) if body >= length.min(ANSWER_MAX - (header_end + 4)) => Some(Ok(())),
        Some(_) => ended.then_some(Err(Failure::Incomplete)),
        None => ended.then_some(Ok(())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_judged() {
        let ok = b"HTTP/1.1 200 OK\r\nContent-length: 3\r\n\r\nabc";
        for cut in 0..ok.len() {
            assert_eq!(judge(&ok[..cut], false), None, "{cut}");
            assert_eq!(judge(&ok[..cut], true), Some(Err(Failure::Incomplete)), "{cut}");
        }
        assert_eq!(judge(ok, false), Some(Ok(())));
        let unbounded = b"HTTP/1.0 200 OK\r\n\r\nabc";
        assert_eq!(judge(unbounded, false), None);
        assert_eq!(judge(unbounded, true), Some(Ok(())));
        assert_eq!(judge(b"HTTP/1.1 502 Bad\r\n\r\n", false), Some(Err(Failure::Status(502))));
        assert_eq!(judge(b"SSH-2.0", false), Some(Err(Failure::NotHttp)));
        assert_eq!(judge(b"HTTP/1.1 many\r\n\r\n", false), Some(Err(Failure::NotHttp)));
    }
}
