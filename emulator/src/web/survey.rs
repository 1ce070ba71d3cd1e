//! Looks at all VMs once a second: a row for each, totals, and their history.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Duration, MissedTickBehavior, interval_at};

use super::Hub;
use super::pages::PageState;
use crate::fleet::{Activity, Glance, Stage};
use crate::sync::lock;

/// How often.
pub const PERIOD: Duration = Duration::from_secs(1);
/// Totals that are kept: ten minutes of them.
const HISTORY: usize = 600;

/// What a VM is doing, in the page's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum State {
    /// It has not said READY yet.
    #[default]
    Booting,
    /// It has said READY, and did something in the last second.
    Ready,
    /// It has said READY, and slept through the last second.
    Idle,
    /// It is in an engine, or waits for one.
    Running,
    /// Somebody has paused it.
    Paused,
    /// It has shut down.
    Stopped,
    /// It can't go on.
    Failed,
}

impl State {
    /// All of them, in the order of their numbers.
    pub const ALL: [State; 7] = [
        State::Booting,
        State::Ready,
        State::Idle,
        State::Running,
        State::Paused,
        State::Stopped,
        State::Failed,
    ];

    /// Whether a page can be expected of it.
    pub fn is_up(self) -> bool {
        matches!(self, State::Ready | State::Idle | State::Running)
    }

    /// The state of a VM that retired `instructions` since the last look.
    pub fn of(stage: Stage, activity: Activity, instructions: u64) -> Self {
        match (stage, activity) {
            (Stage::Failed, _) => State::Failed,
            (Stage::Stopped, _) => State::Stopped,
            (_, Activity::Paused) => State::Paused,
            (Stage::Booting, _) => State::Booting,
            (Stage::Ready, Activity::Queued | Activity::Running) => State::Running,
            (Stage::Ready, _) if instructions > 0 => State::Ready,
            (Stage::Ready, _) => State::Idle,
        }
    }

    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            State::Booting => "booting",
            State::Ready => "ready",
            State::Idle => "idle",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Failed => "failed",
        }
    }
}

/// One VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// What it is doing.
    pub state: State,
    /// Thousands of instructions in the last second.
    pub kips: u32,
    /// Frames given to and taken from it, modulo 2^32.
    pub packets: u32,
    /// What its own page said last.
    pub page: PageState,
}

/// Bytes of a row on the wire.
pub const ROW_BYTES: usize = 20;

impl Row {
    /// VM, state, page status, page's milliseconds, kips, packets, uptime: little endian, 20 bytes.
    pub fn write(&self, vm: u32, into: &mut Vec<u8>) {
        into.extend(vm.to_le_bytes());
        into.extend([self.state as u8, self.page.status as u8]);
        into.extend(self.page.millis.to_le_bytes());
        into.extend(self.kips.to_le_bytes());
        into.extend(self.packets.to_le_bytes());
        into.extend(self.page.uptime.unwrap_or(u32::MAX).to_le_bytes());
    }
}

/// The fleet at one moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Totals {
    /// Seconds since the program started.
    pub seconds: f64,
    /// VMs in each state, in the order of [`State::ALL`].
    pub states: [u32; 7],
    /// Guest instructions in the last second, by 10^9.
    pub gips: f64,
    /// Frames given to VMs in the last second.
    pub packets_in: f64,
    /// Frames taken from VMs in the last second.
    pub packets_out: f64,
    /// Pages of VMs that were fetched in the last second.
    pub pages: f64,
    /// Memory that all VMs share.
    pub shared_bytes: u64,
    /// Memory that belongs to one VM each.
    pub private_bytes: u64,
    /// Everything else.
    pub overhead_bytes: u64,
}

/// One look at all VMs.
#[derive(Debug, Default)]
pub struct Sample {
    /// One for each VM.
    pub rows: Vec<Row>,
    /// Of all.
    pub totals: Totals,
}

/// The totals of the last minutes.
#[derive(Debug, Default)]
pub struct History(VecDeque<Totals>);

impl History {
    fn push(&mut self, totals: Totals) {
        if self.0.len() == HISTORY {
            self.0.pop_front();
        }
        self.0.push_back(totals);
    }

    /// The oldest first.
    pub fn all(&self) -> Vec<Totals> {
        self.0.iter().copied().collect()
    }
}

/// Counters at the last look.
struct Before {
    at: Instant,
    vms: Vec<(u64, u64)>,
    steps: u64,
    frames: (u64, u64),
    pages: u64,
}

/// Looks once, then in a task for as long as somebody could ask.
pub(super) fn start(hub: Arc<Hub>, samples: watch::Sender<Arc<Sample>>) {
    let vms = hub.facts.vms as usize;
    let mut before =
        Before { at: Instant::now(), vms: vec![(0, 0); vms], steps: 0, frames: (0, 0), pages: 0 };
    let mut activities = Vec::with_capacity(vms);
    let mut look = move |hub: &Hub| {
        let sample = look(hub, &mut before, &mut activities);
        lock(&hub.history).push(sample.totals);
        samples.send(Arc::new(sample)).is_ok()
    };
    // Nobody is to be told that there are no VMs.
    look(&hub);
    tokio::spawn(async move {
        let mut ticks = interval_at(tokio::time::Instant::now() + PERIOD, PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !look(&hub) {
                return;
            }
        }
    });
}

fn look(hub: &Hub, before: &mut Before, activities: &mut Vec<Activity>) -> Sample {
    let now = Instant::now();
    let span = now.duration_since(before.at).as_secs_f64().max(1e-3);
    let mut rows = Vec::with_capacity(before.vms.len());
    let mut totals = Totals { seconds: hub.fleet.started().elapsed().as_secs_f64(), ..Totals::default() };
    let mut frames = (0, 0);
    hub.fleet.survey(activities, |glance: &Glance| {
        let counters = &glance.counters;
        let packets = counters.rx_frames + counters.tx_frames;
        let (instructions, _) =
            std::mem::replace(&mut before.vms[glance.vm as usize], (counters.instructions, packets));
        let instructions = counters.instructions.saturating_sub(instructions);
        let state = State::of(glance.stage, glance.activity, instructions);
        frames.0 += counters.rx_frames;
        frames.1 += counters.tx_frames;
        totals.states[state as usize] += 1;
        rows.push(Row {
            state,
            kips: (instructions as f64 / span / 1e3).round() as u32,
            packets: packets as u32,
            page: hub.pages.as_ref().map_or_else(PageState::default, |pages| pages.state(glance.vm)),
        });
    });
    let steps = hub.fleet.steps();
    let pages = hub.pages.as_ref().map_or(0, |pages| pages.fetched());
    let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / span;
    totals.gips = rate(steps, before.steps) / 1e9;
    totals.packets_in = rate(frames.0, before.frames.0);
    totals.packets_out = rate(frames.1, before.frames.1);
    totals.pages = rate(pages, before.pages);
    let memory = hub.fleet.memory();
    totals.shared_bytes = memory.shared_bytes;
    totals.private_bytes = memory.private_bytes;
    totals.overhead_bytes = memory.overhead_bytes;
    (before.at, before.steps, before.frames, before.pages) = (now, steps, frames, pages);
    Sample { rows, totals }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::web::pages::PageStatus;

    #[test]
    fn states_have_the_names_of_the_page() {
        use Activity::*;
        assert_eq!(State::of(Stage::Booting, Running, 9), State::Booting);
        assert_eq!(State::of(Stage::Ready, Running, 0), State::Running);
        assert_eq!(State::of(Stage::Ready, Queued, 0), State::Running);
        assert_eq!(State::of(Stage::Ready, Sleeping, 1), State::Ready);
        assert_eq!(State::of(Stage::Ready, Sleeping, 0), State::Idle);
        assert_eq!(State::of(Stage::Booting, Paused, 0), State::Paused);
        assert_eq!(State::of(Stage::Stopped, Down, 0), State::Stopped);
        assert_eq!(State::of(Stage::Failed, Down, 0), State::Failed);
        for (n, state) in State::ALL.into_iter().enumerate() {
            assert_eq!(state as usize, n);
        }
    }

    #[test]
    fn a_row_has_its_place_on_the_wire() {
        let page = PageState { status: PageStatus::Answers, millis: 0x1234, uptime: Some(7) };
        let row = Row { state: State::Idle, kips: 5, packets: 6, page };
        let mut bytes = Vec::new();
        row.write(258, &mut bytes);
        assert_eq!(bytes.len(), ROW_BYTES);
        assert_eq!(bytes, [2, 1, 0, 0, 2, 1, 0x34, 0x12, 5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0]);
    }
}
