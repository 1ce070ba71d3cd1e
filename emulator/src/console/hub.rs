//! One VM's console on the host: who listens, what waits to be typed, what was printed last.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::console::scan::{Mark, Scanner};
use crate::mailbox::MailboxRef;
use crate::sync::lock;

/// Input that waits until the guest has taken what is in its mailbox.
const INPUT_BYTES: usize = 4096;
/// Output that waits for a slow listener; then the oldest is dropped.
const LISTENER_BYTES: usize = 64 * 1024;

/// One VM's console.
#[derive(Default)]
pub struct Console {
    inner: Mutex<Inner>,
    room: Condvar,
    printed: AtomicU64,
}

#[derive(Default)]
struct Inner {
    scanner: Scanner,
    listeners: Vec<Weak<Feed>>,
    input: VecDeque<u8>,
    /// The guest is ready to be typed to.
    listening: bool,
    closed: bool,
}

#[derive(Default)]
struct Feed {
    state: Mutex<FeedState>,
    more: Condvar,
}

#[derive(Default)]
struct FeedState {
    bytes: VecDeque<u8>,
    lost: u64,
    closed: bool,
    /// A task that waits in [`Subscription::poll_receive`].
    waiting: Option<Waker>,
}

/// Output that came for a listener.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Bytes, and how many before them were lost because the listener was slow.
    Bytes {
        /// The output.
        bytes: Vec<u8>,
        /// Bytes dropped before it.
        lost: u64,
    },
    /// Nothing came in time.
    Nothing,
    /// The VM will never print again.
    Closed,
}

/// A listener's end of a console.
pub struct Subscription {
    feed: Arc<Feed>,
    /// What the VM printed last, before the subscription.
    pub tail: Vec<u8>,
}

impl Subscription {
    /// Waits for output.
    pub fn receive(&self, timeout: Duration) -> Output {
        let state = lock(&self.feed.state);
        let (mut state, _) = self
            .feed
            .more
            .wait_timeout_while(state, timeout, |s| s.bytes.is_empty() && !s.closed)
            .unwrap_or_else(PoisonError::into_inner);
        state.take().unwrap_or(Output::Nothing)
    }

    /// The same for a task: never [`Output::Nothing`].
    pub fn poll_receive(&self, context: &mut Context<'_>) -> Poll<Output> {
        let mut state = lock(&self.feed.state);
        match state.take() {
            Some(output) => Poll::Ready(output),
            None => {
                state.waiting = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Ends every [`Subscription::receive`], now and later, once what came is read.
    pub fn close(&self) {
        self.feed.close();
    }
}

impl FeedState {
    fn take(&mut self) -> Option<Output> {
        if !self.bytes.is_empty() {
            let lost = std::mem::take(&mut self.lost);
            return Some(Output::Bytes { bytes: std::mem::take(&mut self.bytes).into(), lost });
        }
        self.closed.then_some(Output::Closed)
    }
}

impl Console {
    /// Takes output of the VM and appends what its lines tell.
    pub fn output(&self, bytes: &[u8], marks: &mut Vec<Mark>) {
        self.printed.fetch_add(bytes.len() as u64, Relaxed);
        let mut inner = lock(&self.inner);
        inner.scanner.feed(bytes, marks);
        inner.listeners.retain(|feed| feed.upgrade().is_some_and(|feed| feed.push(bytes)));
    }

    /// Listens to the VM from now on.
    pub fn subscribe(&self) -> Subscription {
        let feed = Arc::new(Feed::default());
        let mut inner = lock(&self.inner);
        lock(&feed.state).closed = inner.closed;
        inner.listeners.push(Arc::downgrade(&feed));
        Subscription { feed, tail: inner.scanner.tail() }
    }

    /// From now on the guest gets what is typed. Before, it would be lost: a kernel that boots empties its serial port.
    pub fn let_in(&self) {
        lock(&self.inner).listening = true;
    }

    /// Queues input for the VM; returns how much found room.
    pub fn type_in(&self, bytes: &[u8], mailbox: MailboxRef<'_>) -> usize {
        let mut inner = lock(&self.inner);
        if inner.closed {
            return 0;
        }
        let room = INPUT_BYTES - inner.input.len();
        let taken = bytes.len().min(room);
        inner.input.extend(&bytes[..taken]);
        inner.refill(mailbox);
        taken
    }

    /// Waits until more input finds room; false if it doesn't in time.
    pub fn wait_for_room(&self, timeout: Duration) -> bool {
        let inner = lock(&self.inner);
        let full = |inner: &mut Inner| inner.input.len() == INPUT_BYTES && !inner.closed;
        let (inner, _) =
            self.room.wait_timeout_while(inner, timeout, full).unwrap_or_else(PoisonError::into_inner);
        inner.input.len() < INPUT_BYTES
    }

    /// Gives the VM what waits to be typed; true if some of it found room.
    pub fn refill(&self, mailbox: MailboxRef<'_>) -> bool {
        let mut inner = lock(&self.inner);
        let moved = inner.refill(mailbox);
        if moved {
            self.room.notify_all();
        }
        moved
    }

    /// Bytes printed so far.
    pub fn printed(&self) -> u64 {
        self.printed.load(Relaxed)
    }

    /// The last lines, printable.
    pub fn last_lines(&self) -> Vec<String> {
        lock(&self.inner).scanner.last_lines()
    }

    /// The guest starts over.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.scanner.reset();
        inner.listening = false;
        inner.closed = false;
    }

    /// The VM does not run again, unless it is reset.
    pub fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.input = VecDeque::new();
        for feed in inner.listeners.drain(..).filter_map(|feed| feed.upgrade()) {
            feed.close();
        }
        self.room.notify_all();
    }

    /// Whether [`Console::close`] was called.
    pub fn is_closed(&self) -> bool {
        lock(&self.inner).closed
    }
}

impl Inner {
    fn refill(&mut self, mailbox: MailboxRef<'_>) -> bool {
        let mut moved = false;
        while self.listening && !self.input.is_empty() {
            let sent = mailbox.send_console(self.input.as_slices().0);
            if sent == 0 {
                break;
            }
            self.input.drain(..sent);
            moved = true;
        }
        moved
    }
}

impl Feed {
    fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        self.tell(&mut state);
    }

    fn tell(&self, state: &mut FeedState) {
        self.more.notify_all();
        if let Some(task) = state.waiting.take() {
            task.wake();
        }
    }

    fn push(&self, bytes: &[u8]) -> bool {
        let mut state = lock(&self.state);
        if state.closed {
            return false;
        }
        let new = &bytes[bytes.len().saturating_sub(LISTENER_BYTES)..];
        let excess = (state.bytes.len() + new.len()).saturating_sub(LISTENER_BYTES);
        state.bytes.drain(..excess);
        state.bytes.extend(new);
        state.lost += (excess + bytes.len() - new.len()) as u64;
        self.tell(&mut state);
        true
    }
}

/// Tries `attempt` until it says how it ended or `timeout` is over, waiting for room in between.
///
/// `attempt` returns how many of the bytes it is given were taken.
pub fn write_all(
    console: &Console,
    bytes: &[u8],
    timeout: Duration,
    mut attempt: impl FnMut(&[u8]) -> usize,
) -> usize {
    let end = Instant::now() + timeout;
    let mut done = 0;
    while done < bytes.len() && !console.is_closed() {
        let taken = attempt(&bytes[done..]);
        done += taken;
        if taken == 0 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || !console.wait_for_room(left) {
                break;
            }
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{CONSOLE_IN_BYTES, Mailbox};

    fn mailbox() -> Box<Mailbox> {
        // SAFETY: a mailbox is plain integers; all zero is its empty state.
        Box::new(unsafe { std::mem::zeroed() })
    }

    #[test]
    fn input_is_bounded_and_comes_in_order() {
        let mut memory = mailbox();
        let at = &raw mut *memory;
        // SAFETY: `memory` lives to the end of the test and is touched only here.
        let mailbox = unsafe { MailboxRef::new(at) };
        let console = Console::default();
        assert_eq!(console.type_in(b"ab", mailbox), 2);
        assert!(!mailbox.has_input(), "a guest that boots is not typed to");
        console.let_in();
        assert!(console.refill(mailbox) && mailbox.has_input());
        // SAFETY: the guest's side, played by the same thread.
        unsafe { (*at).rings.in_tail = (*at).rings.in_head };
        let text: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        let taken = console.type_in(&text, mailbox);
        assert_eq!(taken, INPUT_BYTES);
        // What went to the mailbox made room again.
        assert_eq!(console.type_in(&text[taken..], mailbox), CONSOLE_IN_BYTES as usize);
        assert_eq!(console.type_in(b"x", mailbox), 0);
        assert!(!console.wait_for_room(Duration::ZERO));
        assert!(!console.refill(mailbox), "the guest has taken nothing");
        let mut got = Vec::new();
        while got.len() < INPUT_BYTES + CONSOLE_IN_BYTES as usize {
            // SAFETY: the guest's side, played by the same thread.
            unsafe {
                while (*at).rings.in_tail != (*at).rings.in_head {
                    got.push((*at).input[((*at).rings.in_tail % CONSOLE_IN_BYTES) as usize]);
                    (*at).rings.in_tail = (*at).rings.in_tail.wrapping_add(1);
                }
            }
            console.refill(mailbox);
        }
        assert!(console.wait_for_room(Duration::ZERO));
        assert_eq!(got, text[..got.len()]);
    }

    #[test]
    fn slow_listeners_lose_the_oldest_output_and_are_told() {
        let console = Console::default();
        console.output(b"before", &mut Vec::new());
        let slow = console.subscribe();
        assert_eq!(slow.tail, b"before");
        assert_eq!(slow.receive(Duration::ZERO), Output::Nothing);
        for i in 0..100u8 {
            console.output(&[i; 1000], &mut Vec::new());
        }
        let Output::Bytes { bytes, lost } = slow.receive(Duration::ZERO) else { panic!("no output") };
        assert_eq!((bytes.len(), lost), (LISTENER_BYTES, 100_000 - LISTENER_BYTES as u64));
        assert_eq!(bytes.last(), Some(&99));
        drop(slow);
        console.output(b"x", &mut Vec::new());
        assert!(lock(&console.inner).listeners.is_empty());
    }

    #[test]
    fn a_task_that_waits_is_woken_by_output_and_by_the_end() {
        struct Bell(AtomicU64);
        impl std::task::Wake for Bell {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Relaxed);
            }
        }
        let bell = Arc::new(Bell(AtomicU64::new(0)));
        let waker = Waker::from(bell.clone());
        let mut context = Context::from_waker(&waker);
        let console = Console::default();
        let listener = console.subscribe();
        assert!(listener.poll_receive(&mut context).is_pending());
        console.output(b"hello", &mut Vec::new());
        assert_eq!(bell.0.load(Relaxed), 1);
        let Poll::Ready(Output::Bytes { bytes, lost: 0 }) = listener.poll_receive(&mut context) else {
            panic!("no output")
        };
        assert_eq!((&bytes[..], console.printed()), (&b"hello"[..], 5));
        assert!(listener.poll_receive(&mut context).is_pending());
        console.close();
        assert_eq!(bell.0.load(Relaxed), 2);
        assert_eq!(listener.poll_receive(&mut context), Poll::Ready(Output::Closed));
        // After a reset it can be heard again.
        console.reset();
        assert!(console.subscribe().poll_receive(&mut context).is_pending());
    }

    #[test]
    fn a_closed_console_ends_listening_and_typing() {
        let mut memory = mailbox();
        // SAFETY: `memory` lives to the end of the test and is touched only here.
        let mailbox = unsafe { MailboxRef::new(&raw mut *memory) };
        let console = Console::default();
        let listener = console.subscribe();
        console.output(b"last words", &mut Vec::new());
        console.close();
        assert!(matches!(listener.receive(Duration::ZERO), Output::Bytes { .. }));
        assert_eq!(listener.receive(Duration::from_secs(9)), Output::Closed);
        assert_eq!(console.subscribe().receive(Duration::from_secs(9)), Output::Closed);
        let end = Instant::now() + Duration::from_secs(5);
        let done =
            write_all(&console, b"abc", Duration::from_secs(60), |bytes| console.type_in(bytes, mailbox));
        assert_eq!(done, 0);
        assert!(Instant::now() < end);
    }
}
