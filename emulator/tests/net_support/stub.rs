//! Stubs of [`emulator::backend::stub`] behind fake links: so that the bridge is measured, and not its guests.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use emulator::backend::stub::Page;
use emulator::net::packet::FRAME_MAX;

use super::FakeLinks;

pub struct Stubs {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stubs {
    /// Answers every segment with data with the page, then closes if `close`.
    pub fn start(links: Arc<FakeLinks>, page: Page, close: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut vms = Vec::new();
            let mut out = [0; FRAME_MAX];
            while !stopped.load(Ordering::Acquire) {
                links.wait_for_frames(&mut vms, Duration::from_millis(50));
                for vm in vms.drain(..) {
                    while links.vm_can_send(vm)
                        && let Some(frame) = links.vm_receives(vm)
                    {
                        if let Some(len) = page.reply(&frame, close, &mut out) {
                            assert!(links.vm_sends(vm, &out[..len]));
                        }
                    }
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Stubs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
