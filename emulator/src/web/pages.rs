//! Fetches the VMs' own pages for the uptime that they tell, as a browser would: through the bridge, from their nginx.
//! Only while somebody looks at the grid; what is on the screen comes first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Hub;
use crate::fleet::Fleet;
use crate::net::reach::{Reach, TaskStream};
use crate::sync::lock;

const REQUEST: &[u8] = b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\nUser-Agent: linux-on-gpu-page\r\n\r\n";
/// Bytes of an answer that are looked at.
const ANSWER_BYTES: usize = 4096;
/// For one answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often new requests are made.
const TICK: Duration = Duration::from_millis(10);
/// No VM is asked more often.
const AGAIN: Duration = Duration::from_millis(950);
/// With this the page of overlays/base tells the uptime; a number follows.
const UPTIME: &str = "Up for ";

/// What came of the last request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum PageStatus {
    /// None was made yet.
    #[default]
    Unknown,
    /// 200.
    Answers,
    /// Another status, or no answer in time.
    Silent,
}

/// What a VM's own page said last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageState {
    /// Whether it answers.
    pub status: PageStatus,
    /// How long the answer took.
    pub millis: u16,
    /// Seconds that the page says the VM is up.
    pub uptime: Option<u32>,
}

impl PageState {
    fn pack(self) -> u64 {
        let uptime = self.uptime.unwrap_or(u32::MAX);
        u64::from(uptime) << 32 | u64::from(self.millis) << 8 | self.status as u64
    }

    fn unpack(word: u64) -> Self {
        let uptime = (word >> 32) as u32;
        Self {
            status: match word as u8 {
                1 => PageStatus::Answers,
                2 => PageStatus::Silent,
                _ => PageStatus::Unknown,
            },
            millis: (word >> 8) as u16,
            uptime: (uptime != u32::MAX).then_some(uptime),
        }
    }
}

/// All VMs' pages.
pub struct Pages {
    reach: Reach,
    limits: Limits,
    states: Vec<AtomicU64>,
    fetched: AtomicU64,
}

/// How much is asked.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Pages a second.
    pub rate: u32,
    /// Requests under way at once.
    pub at_once: u32,
}

impl Limits {
    /// What takes little of the back end's time.
    pub fn of(fleet: &Fleet) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        match fleet.backend() {
            "cuda" => Self { rate: 1100, at_once: 512 },
            _ => Self { rate: 50 * cores, at_once: 8 * cores },
        }
    }
}

impl Pages {
    /// Nobody was asked yet.
    pub fn new(reach: Reach, limits: Limits) -> Self {
        let states = (0..reach.vms()).map(|_| AtomicU64::new(PageState::default().pack())).collect();
        Self { reach, limits, states, fetched: AtomicU64::new(0) }
    }

    /// What a VM's page said last.
    pub fn state(&self, vm: u32) -> PageState {
        PageState::unpack(self.states[vm as usize].load(Relaxed))
    }

    /// Pages that answered 200 so far.
    pub fn fetched(&self) -> u64 {
        self.fetched.load(Relaxed)
    }

    /// How the VMs' web servers are reached.
    pub fn reach(&self) -> &Reach {
        &self.reach
    }

    async fn fetch(&self, vm: u32) {
        let began = Instant::now();
        let body = timeout(PATIENCE, async { get(self.reach.connect_task(vm).await?).await }).await;
        let millis = u16::try_from(began.elapsed().as_millis()).unwrap_or(u16::MAX);
        let state = match body {
            Ok(Ok(answer)) if is_ok(&answer) => {
                self.fetched.fetch_add(1, Relaxed);
                PageState { status: PageStatus::Answers, millis, uptime: uptime(&answer) }
            }
            // The uptime that it told before would be a lie.
            _ => PageState { status: PageStatus::Silent, millis, uptime: None },
        };
        self.states[vm as usize].store(state.pack(), Relaxed);
    }
}

async fn get(mut stream: TaskStream) -> std::io::Result<Vec<u8>> {
    stream.write_all(REQUEST).await?;
    let mut answer = Vec::with_capacity(1024);
    stream.take(ANSWER_BYTES as u64).read_to_end(&mut answer).await?;
    Ok(answer)
}

fn is_ok(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.") && answer.get(8..12) == Some(b" 200")
}

/// The uptime that a page tells.
fn uptime(answer: &[u8]) -> Option<u32> {
    let text = String::from_utf8_lossy(answer);
    let (_, rest) = text.split_once(UPTIME)?;
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    rest[..end].parse().ok().filter(|uptime| *uptime < u32::MAX)
}

/// Whose turn it is.
struct Turns {
    asked: Vec<Option<Instant>>,
    /// Where the last search among all VMs ended, and among those on the screen.
    all: usize,
    shown: usize,
}

impl Turns {
    fn next(&mut self, shown: &[u32], now: Instant) -> Option<u32> {
        let due = |asked: &[Option<Instant>], vm: usize| {
            asked[vm].is_none_or(|at| now.saturating_duration_since(at) >= AGAIN)
        };
        for _ in 0..shown.len() {
            self.shown = (self.shown + 1) % shown.len();
            let vm = shown[self.shown] as usize;
            if due(&self.asked, vm) {
                self.asked[vm] = Some(now);
                return Some(vm as u32);
            }
        }
        for _ in 0..self.asked.len() {
            self.all = (self.all + 1) % self.asked.len();
            if due(&self.asked, self.all) {
                self.asked[self.all] = Some(now);
                return Some(self.all as u32);
            }
        }
        None
    }
}

/// Fetches, for as long as the fleet runs.
pub(super) async fn fetch_all(hub: Arc<Hub>, pages: Arc<Pages>) {
    let room = Arc::new(Semaphore::new(pages.limits.at_once as usize));
    let mut turns = Turns { asked: vec![None; hub.facts.vms as usize], all: 0, shown: 0 };
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = Instant::now();
    let mut owed = 0.0;
    let mut shown: Vec<u32> = Vec::new();
    let mut shown_since = last;
    loop {
        ticks.tick().await;
        let now = Instant::now();
        if !hub.is_watched() {
            tokio::time::sleep(Duration::from_millis(200)).await;
            last = Instant::now();
            continue;
        }
        if shown.is_empty() || now.duration_since(shown_since) > Duration::from_millis(250) {
            shown = lock(&hub.watched).values().flatten().copied().collect();
            shown_since = now;
        }
        let rate = f64::from(pages.limits.rate);
        owed = (owed + now.duration_since(last).as_secs_f64() * rate).min(rate / 10.0 + 1.0);
        last = now;
        let sample = hub.samples.borrow().clone();
        while owed >= 1.0 {
            let Ok(permit) = room.clone().try_acquire_owned() else { break };
            let Some(vm) = turns.next(&shown, now) else { break };
            let up = sample.rows.get(vm as usize).is_some_and(|row| row.state.is_up());
            if !up {
                pages.states[vm as usize].store(PageState::default().pack(), Relaxed);
                continue;
            }
            owed -= 1.0;
            let pages = pages.clone();
            tokio::spawn(async move {
                pages.fetch(vm).await;
                drop(permit);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_survive_packing() {
        for state in [
            PageState::default(),
            PageState { status: PageStatus::Answers, millis: 65535, uptime: Some(0) },
            PageState { status: PageStatus::Silent, millis: 1, uptime: None },
        ] {
            assert_eq!(PageState::unpack(state.pack()), state);
        }
    }

    #[test]
    fn the_uptime_is_read_from_the_page() {
        assert_eq!(uptime(b"<h1>VM 1</h1>\n<p>Up for 61 s.\n"), Some(61));
        assert_eq!(uptime(b"<p>Up for  s."), None);
        assert_eq!(uptime(b"<p>Up for 99999999999 s."), None);
        assert_eq!(uptime(b"hello"), None);
        assert!(is_ok(b"HTTP/1.1 200 OK\r\n") && is_ok(b"HTTP/1.0 200\r\n"));
        assert!(!is_ok(b"HTTP/1.1 404 Not Found\r\n") && !is_ok(b"HTTP"));
    }

    #[test]
    fn what_is_shown_comes_first_and_nobody_twice_a_second() {
        let mut turns = Turns { asked: vec![None; 6], all: 0, shown: 0 };
        let now = Instant::now();
        let mut order: Vec<u32> = std::iter::from_fn(|| turns.next(&[4, 5], now)).collect();
        order[..2].sort_unstable();
        assert_eq!(order[..2], [4, 5]);
        order.sort_unstable();
        assert_eq!(order, [0, 1, 2, 3, 4, 5]);
        assert_eq!(turns.next(&[], now + AGAIN).map(|vm| vm < 6), Some(true));
    }
}
