//! Workers: take runnable VMs, run a slice of each, settle what came of it.

use std::sync::atomic::{
    Ordering::{Relaxed, SeqCst},
    fence,
};
use std::time::Instant;

use crate::abi::{
    ETH_FRAME_BYTES, EXIT_BUDGET, EXIT_DRAIN, EXIT_FAILURE, EXIT_IDLE, EXIT_NO_FRAME, EXIT_REBOOT,
    EXIT_SHUTDOWN, EXIT_STOPPED, SliceRequest, SliceResult,
};
use crate::backend::{Engine, EngineError, Slice, Watch};
use crate::console::scan::Mark;
use crate::fleet::Shared;
use crate::fleet::clock::{TimeMode, Wake};
use crate::fleet::sched::{Class, Turn};
use crate::fleet::vm::Life;
use crate::sync::lock;

/// Instructions after which a guest is typed to though it is not ready: somebody may want to know why.
const LONG_BOOT: u64 = 200_000_000;
/// VMs that a worker resets at most before it runs others again.
const RESETS: usize = 32;
/// So many reboots without READY in between are a failure.
const FUTILE_BOOTS: u32 = 3;

/// Slices of VMs that boot, most of them, are so much longer.
const BOOTING: u64 = 2;
/// Slices of VMs among which some were just woken are so much shorter, on engines that run many at once: 1 ms, not 8.
const SERVING: u64 = 8;
/// With as many turns as this they are not, and with half of it half as long.
const SHORT_TURNS: u64 = 4096;
/// So few VMs are watched while they run: what they send is seen before their slices end.
pub(super) const WATCHED: usize = 64;
/// Then slices are so much shorter while they serve, which is long enough for a short answer.
const SERVING_WATCHED: u64 = 3;

/// Buffers that a worker keeps from slice to slice.
struct Scratch {
    output: Vec<u8>,
    marks: Vec<Mark>,
    frame: Box<[u8; ETH_FRAME_BYTES as usize]>,
}

/// Reports a worker that panics, so that the fleet ends instead of hanging.
struct Alarm<'a>(&'a Shared);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fault("a worker thread of the emulator crashed; see its message above".into());
        }
    }
}

/// Runs slices until the fleet stops.
pub(crate) fn work(shared: &Shared, mut engine: Box<dyn Engine>) {
    let alarm = Alarm(shared);
    let (part, batch) = (engine.part(), engine.batch().max(1));
    let mut scratch =
        Scratch { output: Vec::new(), marks: Vec::new(), frame: Box::new([0; ETH_FRAME_BYTES as usize]) };
    let mut turns: Vec<Turn> = Vec::new();
    let mut slices: Vec<Slice> = Vec::new();
    let mut results: Vec<SliceResult> = Vec::new();
    let mut boots: Vec<Boot> = Vec::new();
    loop {
        slices.clear();
        results.clear();
        boots.clear();
        let began = Instant::now();
        if !shared.sched.take(part, batch, &mut turns) {
            break;
        }
        let taken = Instant::now();
        shared.start_over_those_that_shall(&mut turns);
        if turns.is_empty() {
            continue;
        }
        let now = Instant::now();
        let advice = engine.budget().map(|usual| fit(usual, &turns));
        let numbered = turns.iter().enumerate();
        slices.extend(numbered.map(|(i, turn)| shared.slice(*turn, i, now, advice, &mut boots)));
        if advice.is_some() {
            even_out(&boots, &mut slices);
        }
        let prepared = Instant::now();
        let watch = || shared.watch(&turns);
        let watch = are_watched(&turns).then_some(&watch as Watch<'_>);
        let ran = engine.run(&slices, &mut results, watch);
        let done = Instant::now();
        if let Err(error) = ran {
            shared.fault(error.to_string());
            break;
        }
        if results.len() != turns.len() {
            shared.fault(format!("the engine ran {} of {} slices", results.len(), turns.len()));
            break;
        }
        for (turn, result) in turns.iter().zip(&results) {
            shared.settle(turn.vm, result, &mut scratch);
        }
        let spent = &shared.spent;
        spent.calls.fetch_add(1, Relaxed);
        spent.slices.fetch_add(slices.len() as u64, Relaxed);
        let times = [
            (&spent.waiting, taken - began),
            (&spent.preparing, prepared - taken),
            (&spent.engine, done - prepared),
            (&spent.settling, done.elapsed()),
        ];
        for (sum, time) in times {
            sum.fetch_add(time.as_nanos() as u64, Relaxed);
        }
    }
    drop(alarm);
}

/// Whether some of the turns' VMs were just woken, and none boots: answers are on their way.
fn serve(turns: &[Turn]) -> bool {
    let is = |class| move |turn: &Turn| turn.class == class;
    turns.iter().any(is(Class::Fresh)) && !turns.iter().any(is(Class::Boot))
}

/// Whether what the VMs send is to be seen before their slices end.
fn are_watched(turns: &[Turn]) -> bool {
    turns.len() <= WATCHED && serve(turns)
}

/// Instructions for each of the turns where an engine's slice usually has so many. An answer is on its way through several
/// slices of its VM, and each ends with the slices beside it; but the host needs time for each turn, too. Nobody waits for
/// those that boot, and the longer a launch, the less of it is lost where its VMs end apart.
fn fit(usual: u64, turns: &[Turn]) -> u64 {
    let boots = turns.iter().filter(|turn| turn.class == Class::Boot).count();
    match serve(turns) {
        true if are_watched(turns) => usual / SERVING_WATCHED,
        true => usual / (SHORT_TURNS / turns.len().max(1) as u64).clamp(1, SERVING),
        false if boots * 2 > turns.len() => usual * BOOTING,
        false => usual,
    }
}

/// How far a VM has come that boots.
#[derive(Clone, Copy, Debug)]
struct Boot {
    /// Which of the turns it is.
    turn: usize,
    /// Instructions so far, and steps of its last slice.
    instructions: u64,
    last: u64,
}

/// VMs that boot and have come farther than most get less of an engine that runs many at once, up to a half, which leaves
/// more of it to the others: a fleet is ready when its last VM is.
fn even_out(boots: &[Boot], slices: &mut [Slice]) {
    let count = boots.len().max(1) as u64;
    let mean = boots.iter().map(|boot| boot.instructions).sum::<u64>() / count;
    let usual = (boots.iter().map(|boot| boot.last).sum::<u64>() / count).max(1);
    for boot in boots {
        let ahead = boot.instructions.saturating_sub(mean).min(usual / 2);
        if let Some(slice) = slices.get_mut(boot.turn) {
            let budget = u128::from(slice.request.budget) * u128::from(usual - ahead) / u128::from(usual);
            slice.request.budget = budget as u64;
        }
    }
}

/// What happens to a VM after its slice.
enum Next {
    Run(Class),
    Sleep(Option<Instant>),
    Reboot,
    Down(Life),
}

impl Shared {
    fn slice(
        &self,
        turn: Turn,
        number: usize,
        now: Instant,
        advice: Option<u64>,
        boots: &mut Vec<Boot>,
    ) -> Slice {
        let (time_mode, now_ticks) = {
            let record = lock(&self.vms[turn.vm as usize].record);
            if turn.class == Class::Boot {
                boots.push(Boot { turn: number, instructions: record.last.instret, last: record.last.steps });
            }
            record.clock.request(now)
        };
        let usual = match turn.class {
            Class::Fresh => self.config.budget.fresh,
            Class::Bulk | Class::Boot => self.config.budget.bulk,
        };
        let budget = advice.unwrap_or(usual);
        Slice { vm: turn.vm, request: SliceRequest { budget, now_ticks, time_mode, reserved: 0 } }
    }

    fn settle(&self, vm: u32, result: &SliceResult, scratch: &mut Scratch) {
        let state = &self.vms[vm as usize];
        let mailbox = self.machines.mailbox(vm);
        self.steps.fetch_add(result.steps, Relaxed);

        scratch.output.clear();
        scratch.marks.clear();
        if mailbox.drain_console(&mut scratch.output) > 0 {
            state.console.output(&scratch.output, &mut scratch.marks);
            if let Some(logs) = &self.logs {
                logs.append(vm, &scratch.output);
            }
        }
        // READY, or a guest that waits for input, or one that will hardly become ready any more.
        if !scratch.marks.is_empty() || result.exit == EXIT_IDLE || result.instret > LONG_BOOT {
            state.console.let_in();
        }
        let typed = state.console.refill(mailbox);
        let frames = self.settle_frames(vm, scratch);

        let next = {
            let mut record = lock(&state.record);
            record.last = *result;
            let mut next = None;
            for mark in scratch.marks.drain(..) {
                match mark {
                    Mark::Ready(n) if record.life == Life::Booting => {
                        if n == vm {
                            if record.is_ready(self.config.started, result.newline_instret) {
                                self.been_ready.fetch_add(1, SeqCst);
                            }
                            if self.config.time == TimeMode::Real {
                                record.clock.follow_wall(
                                    self.config.epoch,
                                    Instant::now(),
                                    result.time_ticks,
                                );
                            }
                            self.changed();
                        } else {
                            let why = format!(
                                "it said READY {n}, but it is VM {vm}: the guest has read another VM's identity"
                            );
                            next = Some(Next::Down(Life::Failed(why)));
                        }
                    }
                    Mark::Ready(_) => {}
                    // The first line says why; more follow.
                    Mark::Panic(line) => {
                        next.get_or_insert(Next::Down(Life::Failed(line)));
                    }
                }
            }
            let record = &*record;
            let more = if record.life == Life::Booting { Class::Boot } else { Class::Bulk };
            next.unwrap_or_else(|| match result.exit {
                EXIT_BUDGET => Next::Run(more),
                // What the host had in store for the guest is in the mailbox now.
                EXIT_IDLE if typed => Next::Run(Class::Fresh),
                EXIT_IDLE => match record.clock.wake_at(result.wake_ticks) {
                    Wake::Now => Next::Run(more),
                    Wake::Never => Next::Sleep(None),
                    Wake::At(at) => Next::Sleep(Some(at)),
                },
                EXIT_DRAIN if frames == Frames::Full => Next::Sleep(None),
                EXIT_DRAIN => Next::Run(more),
                EXIT_SHUTDOWN | EXIT_STOPPED => Next::Down(Life::Stopped),
                EXIT_REBOOT => Next::Reboot,
                EXIT_NO_FRAME => Next::Down(Life::Failed(
                    "frame pool exhausted: the fleet's memory is used up; run fewer VMs or give it more memory".into(),
                )),
                EXIT_FAILURE => {
                    Next::Down(Life::Failed("the guest kernel asked for a reset because of a failure".into()))
                }
                other => Next::Down(Life::Failed(format!("the machine ended its slice with unknown code {other}"))),
            })
        };
        match next {
            Next::Run(class) => self.sched.requeue(vm, class),
            Next::Sleep(until) => self.sched.park(vm, until),
            Next::Reboot => self.reboot(vm),
            Next::Down(life) => {
                // Others can use its memory. A VM that crashed keeps it, for a look at what it did.
                if matches!(result.exit, EXIT_SHUTDOWN | EXIT_STOPPED | EXIT_NO_FRAME) {
                    match self.reset(vm) {
                        Ok(()) => lock(&state.record).last.private_frames = 0,
                        Err(error) => tracing::warn!("VM {vm}: its memory could not be given back: {error}"),
                    }
                }
                self.take_down(vm, life);
            }
        }
    }

    /// Tells the bridge of frames from VMs that are still running.
    fn watch(&self, turns: &[Turn]) {
        if !self.config.bridged {
            return;
        }
        let sent = |turn: &&Turn| self.machines.mailbox(turn.vm).has_frames() && self.mark_dirty(turn.vm);
        if turns.iter().filter(sent).count() > 0 {
            self.call_bridge();
        }
    }

    fn settle_frames(&self, vm: u32, scratch: &mut Scratch) -> Frames {
        let state = &self.vms[vm as usize];
        let mailbox = self.machines.mailbox(vm);
        if !self.config.bridged {
            let _taking = lock(&state.transmit);
            let mut dropped = 0;
            while mailbox.take_frame(&mut scratch.frame).is_some() {
                dropped += 1;
            }
            if dropped > 0 {
                lock(&state.record).earlier.dropped += dropped;
            }
            return Frames::Room;
        }
        let mut call = false;
        let mut frames = Frames::Room;
        if mailbox.has_frames() {
            call = self.mark_dirty(vm);
            if mailbox.transmit_full() {
                // Either the bridge sees the flag when it has taken a frame, or we see that it has.
                state.tx_blocked.store(true, SeqCst);
                fence(SeqCst);
                if mailbox.transmit_full() {
                    frames = Frames::Full;
                } else {
                    state.tx_blocked.store(false, SeqCst);
                }
            }
        }
        if state.wants_room.load(SeqCst) && !mailbox.receive_full() && state.wants_room.swap(false, SeqCst) {
            call = true;
            self.mark_dirty(vm);
        }
        if call {
            self.call_bridge();
        }
        frames
    }

    fn reboot(&self, vm: u32) {
        let state = &self.vms[vm as usize];
        if let Err(error) = self.reset(vm) {
            self.take_down(vm, Life::Failed(format!("it could not be reset: {error}")));
            return;
        }
        state.console.reset();
        let futile = {
            let mut record = lock(&state.record);
            record.restart();
            record.futile_boots
        };
        if futile >= FUTILE_BOOTS {
            let why = format!("it rebooted {futile} times without becoming ready");
            self.take_down(vm, Life::Failed(why));
            return;
        }
        self.changed();
        self.sched.requeue(vm, Class::Boot);
    }

    /// Takes the VMs that are to be reset from the turns, and resets them: some, so that the others don't wait long.
    fn start_over_those_that_shall(&self, turns: &mut Vec<Turn>) {
        let mut resets = 0;
        turns.retain(|turn| {
            match turn.reset {
                true if resets < RESETS => {
                    resets += 1;
                    self.start_over(turn.vm);
                }
                true => {
                    self.sched.requeue(turn.vm, Class::Boot);
                    self.sched.reset(turn.vm);
                }
                false => {}
            }
            !turn.reset
        });
    }

    /// The user's reset. The VM has this worker's turn, so no engine runs it.
    fn start_over(&self, vm: u32) {
        let state = &self.vms[vm as usize];
        if let Err(error) = self.reset(vm) {
            let why = Life::Failed(format!("it could not be reset: {error}"));
            // Those that are down are counted as such already.
            match state.down.load(SeqCst) {
                true => self.sched.retire(vm),
                false => self.take_down(vm, why),
            }
            return;
        }
        state.console.reset();
        {
            let mut record = lock(&state.record);
            record.restart();
            record.futile_boots = 0;
        }
        if state.down.swap(false, SeqCst) {
            self.downs.fetch_sub(1, SeqCst);
        }
        self.changed();
        self.sched.requeue(vm, Class::Boot);
    }

    fn reset(&self, vm: u32) -> Result<(), EngineError> {
        let _one_at_a_time = lock(&self.resetting);
        self.machines.reset(vm)
    }

    fn take_down(&self, vm: u32, life: Life) {
        let state = &self.vms[vm as usize];
        lock(&state.record).life = life;
        state.down.store(true, SeqCst);
        self.downs.fetch_add(1, SeqCst);
        state.console.close();
        // The last: from here on another worker may reset it.
        self.sched.retire(vm);
        self.mark_dirty(vm);
        self.call_bridge();
        self.changed();
    }
}

/// Whether the guest can go on sending.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frames {
    Room,
    Full,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_ahead_get_less() {
        let request = SliceRequest { budget: 400_000, now_ticks: 0, time_mode: 0, reserved: 0 };
        let mut slices: Vec<Slice> = (0..5).map(|vm| Slice { vm, request }).collect();
        // VM 1 does not boot.
        let boots = [(0, 100_000), (2, 210_000), (3, 200_000), (4, 330_000)];
        let boots = boots.map(|(turn, instructions)| Boot { turn, instructions, last: 100_000 });
        even_out(&boots, &mut slices);
        // 210,000 are the mean; at most half is taken away.
        let budgets: Vec<u64> = slices.iter().map(|slice| slice.request.budget).collect();
        assert_eq!(budgets, [400_000, 400_000, 400_000, 400_000, 200_000]);
        let boots = [Boot { turn: 0, instructions: 10, last: 0 }];
        even_out(&boots, &mut slices);
        even_out(&[], &mut slices);
        assert_eq!(slices[0].request.budget, 400_000);
    }

    #[test]
    fn slices_are_short_while_a_fleet_serves() {
        let turns = |class, count: usize| vec![Turn { vm: 0, class, reset: false }; count];
        let fit = |turns: &[Turn]| fit(2400, turns);
        let few = [Class::Boot, Class::Bulk, Class::Fresh].map(|class| fit(&turns(class, 9)));
        assert_eq!(few, [4800, 2400, 800]);
        let both = |more| [turns(Class::Fresh, 1), turns(more, 511)].concat();
        assert_eq!([Class::Boot, Class::Bulk].map(|more| fit(&both(more))), [4800, 300]);
        let some_boot = [turns(Class::Boot, 9), turns(Class::Bulk, 9), turns(Class::Fresh, 9)].concat();
        assert_eq!(fit(&some_boot), 2400);
        let fresh = [1024, 2048, 4096, 9999].map(|count| fit(&turns(Class::Fresh, count)));
        assert_eq!(fresh, [600, 1200, 2400, 2400]);
    }
}
