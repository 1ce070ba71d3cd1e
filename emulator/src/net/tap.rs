//! A tap on the links: whoever subscribes gets copies of all frames, or of one VM's, without slowing the bridge down.
//!
//! Without subscribers a frame costs one look at a flag. A subscriber that does not keep up loses frames and is told
//! how many.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::pcapng::Encoder;
use super::reason::Reason;
use super::record::{Direction, Place, Record};
use crate::sync::lock;

/// Bytes that may wait for a subscriber.
const WAITING: usize = 8 << 20;

/// The tap of one bridge; clones are handles to the same.
#[derive(Clone, Default)]
pub struct Tap {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    active: AtomicBool,
    subscribers: Mutex<Vec<Arc<Subscriber>>>,
}

struct Subscriber {
    /// Only this VM.
    vm: Option<u32>,
    queue: Mutex<Queue>,
    arrived: Condvar,
}

#[derive(Default)]
struct Queue {
    records: VecDeque<Record>,
    bytes: usize,
    lost: u64,
    closed: bool,
}

impl Tap {
    /// Copies of all packets from now on, or only of those that concern VM `vm`.
    pub fn subscribe(&self, vm: Option<u32>) -> Subscription {
        let subscriber = Arc::new(Subscriber { vm, queue: Mutex::default(), arrived: Condvar::new() });
        lock(&self.shared.subscribers).push(subscriber.clone());
        self.shared.active.store(true, Relaxed);
        Subscription { subscriber, tap: self.clone() }
    }

    /// The same as a pcapng file, piece by piece.
    pub fn stream(&self, vm: Option<u32>) -> PcapStream {
        PcapStream { subscription: self.subscribe(vm), encoder: Encoder::default() }
    }

    /// Whether anybody listens.
    pub fn is_active(&self) -> bool {
        self.shared.active.load(Relaxed)
    }

    /// A packet passes.
    pub(crate) fn see(
        &self,
        place: Place,
        vm: Option<u32>,
        direction: Direction,
        dropped: Option<Reason>,
        bytes: &[u8],
    ) {
        if self.is_active() {
            self.copy(place, vm, direction, dropped, bytes);
        }
    }

    #[cold]
    fn copy(
        &self,
        place: Place,
        vm: Option<u32>,
        direction: Direction,
        dropped: Option<Reason>,
        bytes: &[u8],
    ) {
        let at = SystemTime::now();
        for subscriber in lock(&self.shared.subscribers).iter() {
            if subscriber.vm.is_some() && subscriber.vm != vm {
                continue;
            }
            let mut queue = lock(&subscriber.queue);
            if queue.bytes + bytes.len() > WAITING {
                queue.lost += 1;
                continue;
            }
            queue.bytes += bytes.len();
            queue.records.push_back(Record { at, place, vm, direction, dropped, bytes: bytes.into() });
            subscriber.arrived.notify_one();
        }
    }

    /// Ends all subscriptions, once they have given what they have.
    pub fn close(&self) {
        for subscriber in lock(&self.shared.subscribers).iter() {
            lock(&subscriber.queue).closed = true;
            subscriber.arrived.notify_one();
        }
    }

    fn forget(&self, subscriber: &Arc<Subscriber>) {
        let mut subscribers = lock(&self.shared.subscribers);
        subscribers.retain(|other| !Arc::ptr_eq(other, subscriber));
        self.shared.active.store(!subscribers.is_empty(), Relaxed);
    }
}

/// What a subscription has to give.
#[derive(Debug)]
pub enum Seen {
    /// Packets, in order, and how many were lost before them because the subscriber was slow.
    Packets(Vec<Record>, u64),
    /// None in this time.
    Nothing,
    /// None any more.
    Closed,
}

/// A subscription; dropping it ends it.
pub struct Subscription {
    subscriber: Arc<Subscriber>,
    tap: Tap,
}

impl Subscription {
    /// Waits for packets, so long at most, and takes all that are there.
    pub fn receive(&self, patience: Duration) -> Seen {
        let queue = lock(&self.subscriber.queue);
        let (mut queue, _) = self
            .subscriber
            .arrived
            .wait_timeout_while(queue, patience, |queue| {
                queue.records.is_empty() && queue.lost == 0 && !queue.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        if queue.records.is_empty() && queue.lost == 0 {
            return if queue.closed { Seen::Closed } else { Seen::Nothing };
        }
        queue.bytes = 0;
        Seen::Packets(std::mem::take(&mut queue.records).into(), std::mem::take(&mut queue.lost))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.tap.forget(&self.subscriber);
    }
}

/// A subscription as a pcapng file: what [`PcapStream::read`] returns, one piece after the other, is the file.
pub struct PcapStream {
    subscription: Subscription,
    encoder: Encoder,
}

impl PcapStream {
    /// The file's next bytes: at once the header, then what has come within so long, perhaps nothing. None at the end.
    pub fn read(&mut self, patience: Duration) -> Option<Vec<u8>> {
        if !self.encoder.has_begun() {
            return Some(self.encoder.begin());
        }
        match self.subscription.receive(patience) {
            Seen::Nothing => Some(Vec::new()),
            Seen::Closed => None,
            Seen::Packets(records, lost) => {
                let mut bytes = Vec::new();
                self.encoder.lost(lost);
                for record in &records {
                    self.encoder.packet(record, &mut bytes);
                }
                Some(bytes)
            }
        }
    }

    /// The file's last bytes: statistics.
    pub fn finish(mut self) -> Vec<u8> {
        self.encoder.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn see(tap: &Tap, vm: u32, bytes: &[u8]) {
        tap.see(Place::Vm(vm), Some(vm), Direction::In, None, bytes);
    }

    #[test]
    fn subscribers_get_what_they_asked_for() {
        let tap = Tap::default();
        see(&tap, 0, b"before");
        assert!(!tap.is_active());
        let (all, one) = (tap.subscribe(None), tap.subscribe(Some(1)));
        see(&tap, 0, b"zero");
        see(&tap, 1, b"one");
        let texts = |subscription: &Subscription| -> Vec<Vec<u8>> {
            match subscription.receive(Duration::from_secs(1)) {
                Seen::Packets(records, 0) => records.iter().map(|r| r.bytes.to_vec()).collect(),
                other => panic!("{other:?}"),
            }
        };
        let expected: Vec<Vec<u8>> = vec![b"zero".to_vec(), b"one".to_vec()];
        assert_eq!(texts(&all), expected);
        assert_eq!(texts(&one), expected[1..]);
        assert!(matches!(one.receive(Duration::ZERO), Seen::Nothing));
        drop(all);
        assert!(tap.is_active());
        tap.close();
        assert!(matches!(one.receive(Duration::from_secs(9)), Seen::Closed));
        drop(one);
        assert!(!tap.is_active());
    }

    #[test]
    fn a_slow_subscriber_loses_and_is_told() {
        let tap = Tap::default();
        let slow = tap.subscribe(None);
        let fits = (WAITING / 1000) as u64;
        for _ in 0..fits + 5 {
            see(&tap, 0, &[0; 1000]);
        }
        match slow.receive(Duration::ZERO) {
            Seen::Packets(records, lost) => assert_eq!((records.len() as u64, lost), (fits, 5)),
            other => panic!("{other:?}"),
        }
        see(&tap, 0, b"again");
        assert!(matches!(slow.receive(Duration::ZERO), Seen::Packets(_, 0)));
    }
}
