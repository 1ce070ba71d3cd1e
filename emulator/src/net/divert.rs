//! A wire over a driver that blocks: one that takes packets out of the host's stack, and puts others into it.
//!
//! WinDivert is one ([`super::windivert`]). Its calls can't be waited for together with anything else, so a thread of its
//! own reads, and hands over what it has read. All of this is tested without the driver.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::capture::Wire;
use super::packet::Ipv4;
use super::rewrite;

/// Packets that may wait between the driver and the bridge; more wait in the driver.
const WAITING: usize = 1024;
/// The longest IPv4 packet.
const LONGEST: usize = 65_535;

/// A driver that diverts packets.
pub trait Divert: Send + Sync + 'static {
    /// Where a packet came from and goes to, as the driver says it.
    type Address: Copy + Send + 'static;

    /// Waits for the next packet. `None` after [`Divert::shut_down`], when none is left.
    fn receive(&self, packet: &mut [u8]) -> io::Result<Option<(usize, Self::Address)>>;

    /// Puts a packet into the stack.
    fn send(&self, packet: &[u8], address: &Self::Address) -> io::Result<()>;

    /// What an answer to packets of this address needs for its own.
    fn answer(address: &Self::Address) -> Self::Address;

    /// Ends [`Divert::receive`].
    fn shut_down(&self);
}

enum Event<A> {
    Packet(Box<[u8]>, A),
    Failed(io::Error),
    Wake,
}

/// The wire.
pub struct DivertWire<D: Divert> {
    driver: Arc<D>,
    events: Receiver<Event<D::Address>>,
    sender: SyncSender<Event<D::Address>>,
    /// Received while waiting.
    next: Option<Event<D::Address>>,
    /// How the last packet came: answers go the same way back.
    address: Option<D::Address>,
    reader: Option<JoinHandle<()>>,
}

impl<D: Divert> DivertWire<D> {
    /// Starts to read.
    pub fn new(driver: D) -> io::Result<Self> {
        let driver = Arc::new(driver);
        let (sender, events) = sync_channel(WAITING);
        let (from, to) = (driver.clone(), sender.clone());
        let reader =
            std::thread::Builder::new().name("net-divert".into()).spawn(move || read(&*from, &to))?;
        Ok(Self { driver, events, sender, next: None, address: None, reader: Some(reader) })
    }
}

fn read<D: Divert>(driver: &D, to: &SyncSender<Event<D::Address>>) {
    let mut buffer = vec![0; LONGEST];
    loop {
        let event = match driver.receive(&mut buffer) {
            Ok(Some((len, address))) => Event::Packet(buffer[..len.min(LONGEST)].into(), address),
            Ok(None) => return,
            Err(error) => Event::Failed(error),
        };
        let failed = matches!(event, Event::Failed(_));
        // Without a receiver the bridge has ended.
        if to.send(event).is_err() || failed {
            return;
        }
    }
}

impl<D: Divert> Wire for DivertWire<D> {
    fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if self.next.is_some() {
            return Ok(());
        }
        let event = match timeout {
            // The sender that we keep holds the channel open.
            None => self.events.recv().ok(),
            Some(timeout) => self.events.recv_timeout(timeout).ok(),
        };
        self.next = event;
        Ok(())
    }

    fn capture(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            let event = match self.next.take() {
                Some(event) => event,
                None => match self.events.try_recv() {
                    Ok(event) => event,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(None),
                },
            };
            match event {
                Event::Packet(mut bytes, address) => {
                    self.address = Some(address);
                    // Checksums may have been left to a network card that this packet never sees.
                    rewrite::fill_checksums(&mut bytes);
                    let len = bytes.len().min(packet.len());
                    packet[..len].copy_from_slice(&bytes[..len]);
                    return Ok(Some(len));
                }
                Event::Failed(error) => return Err(error),
                Event::Wake => {}
            }
        }
    }

    fn inject(&mut self, packet: &[u8]) -> io::Result<()> {
        // Nothing was captured yet, so nobody waits for an answer.
        let Some(address) = &self.address else { return Err(io::ErrorKind::WouldBlock.into()) };
        debug_assert!(Ipv4::parse(packet).is_ok());
        self.driver.send(packet, &D::answer(address))
    }

    fn waker(&self) -> Arc<dyn Fn() + Send + Sync> {
        let sender = self.sender.clone();
        Arc::new(move || {
            // A full queue wakes by itself.
            let _ = sender.try_send(Event::Wake);
        })
    }
}

impl<D: Divert> Drop for DivertWire<D> {
    fn drop(&mut self) {
        self.driver.shut_down();
        // The reader may be about to hand over a packet, for which there has to be room.
        while let Some(reader) = self.reader.take() {
            while self.events.try_recv().is_ok() {}
            if reader.is_finished() {
                let _ = reader.join();
            } else {
                self.reader = Some(reader);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
