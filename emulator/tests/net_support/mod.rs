//! Fake VMs behind fake links: TCP servers made of smoltcp, and hooks to lose and reorder their frames.
#![allow(clippy::unwrap_used, dead_code, missing_docs)]

pub mod guest;
pub mod stub;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use emulator::abi::NET_SLOTS;
use emulator::net::policy::Policy;
use emulator::net::ports::PortsError;
use emulator::net::user::{Config, Error, Limits, UserBridge};
use emulator::net::{Full, Links};
use guest::{Behaviour, Guest};

/// As many frames as a mailbox holds.
pub const RING: usize = NET_SLOTS as usize;

#[derive(Default)]
struct Rings {
    to_vm: VecDeque<Vec<u8>>,
    from_vm: VecDeque<Vec<u8>>,
    /// Somebody was told that the ring was full.
    full: bool,
}

/// Links over queues of a mailbox's size.
pub struct FakeLinks {
    rings: Vec<Mutex<Rings>>,
    down: Vec<AtomicBool>,
    dirty: Mutex<Vec<u32>>,
    waker: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    /// VMs with frames to look at.
    inbox: Mutex<Vec<u32>>,
    arrived: Condvar,
    /// One in so many frames is lost or delayed; 0 for none.
    pub faults: AtomicU32,
    dice: AtomicU32,
    delayed: Mutex<Vec<(u32, Vec<u8>)>>,
    pub deliveries: AtomicUsize,
}

impl FakeLinks {
    pub fn new(vms: u32) -> Arc<Self> {
        Arc::new(Self {
            rings: (0..vms).map(|_| Mutex::default()).collect(),
            down: (0..vms).map(|_| AtomicBool::new(false)).collect(),
            dirty: Mutex::default(),
            waker: Mutex::default(),
            inbox: Mutex::default(),
            arrived: Condvar::new(),
            faults: AtomicU32::new(0),
            dice: AtomicU32::new(1),
            delayed: Mutex::default(),
            deliveries: AtomicUsize::new(0),
        })
    }

    fn wake(&self) {
        let waker = self.waker.lock().unwrap().clone();
        if let Some(waker) = waker {
            waker();
        }
    }

    /// 0: as it is; 1: lose; 2: delay behind the next.
    fn fault(&self) -> u32 {
        let one_in = self.faults.load(Ordering::Relaxed);
        if one_in == 0 {
            return 0;
        }
        // A linear congruential generator: reproducible, and no two frames share a throw.
        let throw = self.dice.fetch_add(1, Ordering::Relaxed).wrapping_mul(2_654_435_761) >> 8;
        if throw.is_multiple_of(one_in) { 1 + throw / one_in % 2 } else { 0 }
    }

    fn push_to_vm(&self, vm: u32, frame: Vec<u8>) {
        self.rings[vm as usize].lock().unwrap().to_vm.push_back(frame);
        self.inbox.lock().unwrap().push(vm);
        self.arrived.notify_all();
    }

    /// The VM's side: sends a frame; false if the ring is full.
    pub fn vm_sends(&self, vm: u32, frame: &[u8]) -> bool {
        {
            let mut rings = self.rings[vm as usize].lock().unwrap();
            if rings.from_vm.len() >= RING {
                return false;
            }
            match self.fault() {
                1 => {}
                2 if rings.from_vm.len() + 1 < RING => {
                    let last = rings.from_vm.pop_back();
                    rings.from_vm.push_back(frame.to_vec());
                    rings.from_vm.extend(last);
                }
                _ => rings.from_vm.push_back(frame.to_vec()),
            }
        }
        self.dirty.lock().unwrap().push(vm);
        self.wake();
        true
    }

    /// The VMs' side: waits for frames, and names VMs that may have some.
    pub fn wait_for_frames(&self, vms: &mut Vec<u32>, patience: Duration) {
        let mut inbox = self.inbox.lock().unwrap();
        if inbox.is_empty() {
            inbox = self.arrived.wait_timeout(inbox, patience).unwrap().0;
        }
        vms.append(&mut inbox);
    }

    pub fn vm_can_send(&self, vm: u32) -> bool {
        self.rings[vm as usize].lock().unwrap().from_vm.len() < RING
    }

    /// The VM's side: takes the next frame that was delivered.
    pub fn vm_receives(&self, vm: u32) -> Option<Vec<u8>> {
        let (frame, wake) = {
            let mut rings = self.rings[vm as usize].lock().unwrap();
            let frame = rings.to_vm.pop_front()?;
            (frame, std::mem::take(&mut rings.full))
        };
        if wake {
            self.wake();
        }
        Some(frame)
    }

    /// The VM's side: waits for a frame, for so long at most.
    pub fn vm_waits(&self, vm: u32, patience: Duration) -> Option<Vec<u8>> {
        let until = Instant::now() + patience;
        loop {
            if let Some(frame) = self.vm_receives(vm) {
                return Some(frame);
            }
            if Instant::now() > until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn take_down(&self, vm: u32) {
        self.down[vm as usize].store(true, Ordering::Release);
    }
}

impl Links for FakeLinks {
    fn vms(&self) -> u32 {
        self.rings.len() as u32
    }

    fn deliver(&self, vm: u32, frame: &[u8]) -> Result<(), Full> {
        self.deliveries.fetch_add(1, Ordering::Relaxed);
        {
            let mut rings = self.rings[vm as usize].lock().unwrap();
            if rings.to_vm.len() >= RING {
                rings.full = true;
                return Err(Full);
            }
        }
        match self.fault() {
            1 => {}
            2 => {
                let mut delayed = self.delayed.lock().unwrap();
                delayed.push((vm, frame.to_vec()));
            }
            _ => {
                self.push_to_vm(vm, frame.to_vec());
                let late = std::mem::take(&mut *self.delayed.lock().unwrap());
                for (vm, frame) in late {
                    self.push_to_vm(vm, frame);
                }
            }
        }
        Ok(())
    }

    fn take(&self, vm: u32, frame: &mut [u8; 1514]) -> Option<usize> {
        let taken = self.rings[vm as usize].lock().unwrap().from_vm.pop_front()?;
        frame[..taken.len()].copy_from_slice(&taken);
        // The guest may go on sending.
        self.inbox.lock().unwrap().push(vm);
        self.arrived.notify_all();
        Some(taken.len())
    }

    fn take_dirty(&self, vms: &mut Vec<u32>) {
        vms.append(&mut self.dirty.lock().unwrap());
    }

    fn set_waker(&self, wake: Arc<dyn Fn() + Send + Sync>) {
        *self.waker.lock().unwrap() = Some(wake);
    }

    fn is_down(&self, vm: u32) -> bool {
        self.down[vm as usize].load(Ordering::Acquire)
    }
}

/// Fake VMs and a bridge in front of them.
pub struct Fleet {
    pub links: Arc<FakeLinks>,
    pub bridge: UserBridge,
    pub base: u16,
    stop: Arc<AtomicBool>,
    guests: Option<JoinHandle<Vec<Guest>>>,
}

impl Fleet {
    pub fn new(behaviours: Vec<Behaviour>) -> Self {
        Self::with_limits(behaviours, Limits::default())
    }

    pub fn with_limits(behaviours: Vec<Behaviour>, limits: Limits) -> Self {
        let links = FakeLinks::new(behaviours.len() as u32);
        let mut bridge = bind_anywhere(links.vms(), limits);
        bridge.start(links.clone()).unwrap();
        let base = bridge.config().ports.base;
        let stop = Arc::new(AtomicBool::new(false));
        let guests = behaviours.into_iter().enumerate().map(|(vm, how)| Guest::new(vm as u32, how, &links));
        let mut guests: Vec<Guest> = guests.collect();
        let (stopped, all) = (stop.clone(), links.clone());
        let guests = std::thread::spawn(move || {
            run_guests(&mut guests, &all, &stopped);
            guests
        });
        Self { links, bridge, base, stop, guests: Some(guests) }
    }

    pub fn connect(&self, vm: u32) -> TcpStream {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.base + vm as u16)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Waits until no connection is left in the bridge.
    pub fn settle(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while self.bridge.counters().snapshot().connections_open > 0 {
            assert!(Instant::now() < until, "connections left: {:?}", self.bridge.counters().snapshot());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends all; returns the guests as they are then.
    pub fn finish(mut self) -> Vec<Guest> {
        self.bridge.stop().unwrap();
        self.stop.store(true, Ordering::Release);
        self.guests.take().unwrap().join().unwrap()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

pub fn run_guests(guests: &mut [Guest], links: &FakeLinks, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let mut inbox = links.inbox.lock().unwrap();
        if inbox.is_empty() {
            let now = Instant::now();
            let due = guests.iter().filter_map(|guest| guest.due).min();
            let patience = due.map_or(Duration::from_millis(50), |due| due.saturating_duration_since(now));
            inbox = links.arrived.wait_timeout(inbox, patience.min(Duration::from_millis(50))).unwrap().0;
        }
        let mut vms = std::mem::take(&mut *inbox);
        drop(inbox);
        let now = Instant::now();
        vms.extend(
            guests.iter().filter(|guest| guest.due.is_some_and(|due| due <= now)).map(|guest| guest.vm),
        );
        vms.sort_unstable();
        vms.dedup();
        for vm in vms {
            guests[vm as usize].run();
        }
    }
}

/// A bridge on ports that are free now.
pub fn bind_anywhere(vms: u32, limits: Limits) -> UserBridge {
    bind_anywhere_with(vms, limits, Policy::default())
}

/// The same, with a policy.
pub fn bind_anywhere_with(vms: u32, limits: Limits, policy: Policy) -> UserBridge {
    for attempt in 0..100 {
        let probe = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let port = probe.local_addr().unwrap().port();
        drop(probe);
        // The system hands out single ports high up; long ranges are free further down.
        let base = if vms < 256 { port } else { 2000 + attempt * 251 };
        let mut config = Config::new(base, vms);
        config.limits = limits;
        match UserBridge::bind_with(config, policy.clone()) {
            Ok(bridge) => return bridge,
            Err(Error::Ports(PortsError::Taken { .. } | PortsError::Beyond { .. })) => {}
            Err(error) => panic!("{error}"),
        }
    }
    panic!("no {vms} free ports in a row");
}
