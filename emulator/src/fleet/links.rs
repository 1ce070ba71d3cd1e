//! The VMs' links over their mailboxes, as the bridge sees them.

use std::sync::Arc;
use std::sync::atomic::{Ordering::SeqCst, fence};
use std::time::Instant;

use crate::fleet::Shared;
use crate::fleet::worker::WATCHED;
use crate::net::packet::is_intact;
use crate::net::{Full, Links};
use crate::sync::lock;

impl Links for Shared {
    fn vms(&self) -> u32 {
        self.machines.vms()
    }

    fn deliver(&self, vm: u32, frame: &[u8]) -> Result<(), Full> {
        let Some(state) = self.vms.get(vm as usize) else { return Err(Full) };
        let mailbox = self.machines.mailbox(vm);
        let intact = is_intact(frame);
        let send = || if intact { mailbox.send_intact(frame) } else { mailbox.send_frame(frame) };
        {
            let _putting = lock(&state.receive);
            if !send() {
                // Either the worker sees the wish after the slice that made room, or we see the room.
                state.wants_room.store(true, SeqCst);
                fence(SeqCst);
                if !send() {
                    return Err(Full);
                }
                state.wants_room.store(false, SeqCst);
            }
        }
        self.sched.wake(vm);
        Ok(())
    }

    fn take(&self, vm: u32, frame: &mut [u8; 1514]) -> Option<usize> {
        let state = self.vms.get(vm as usize)?;
        let len = {
            let _taking = lock(&state.transmit);
            self.machines.mailbox(vm).take_frame(frame)?
        };
        fence(SeqCst);
        if state.tx_blocked.load(SeqCst) && state.tx_blocked.swap(false, SeqCst) {
            self.sched.wake(vm);
        }
        Some(len)
    }

    fn take_dirty(&self, vms: &mut Vec<u32>) {
        let mut dirty = lock(&self.dirty);
        for vm in dirty.drain(..) {
            self.vms[vm as usize].dirty.store(false, SeqCst);
            vms.push(vm);
        }
    }

    fn set_waker(&self, wake: Arc<dyn Fn() + Send + Sync>) {
        *lock(&self.bridge) = Some(wake);
        // Frames may have come before.
        self.call_bridge();
    }

    fn attend(&self, now: Instant) -> Option<Instant> {
        let span = self.config.busy_poll;
        let polls = self.machines.run_apart() && self.vms.len() <= WATCHED && !span.is_zero();
        let until = polls.then(|| now + span)?;
        self.sched.stay_awake(until);
        Some(until)
    }

    fn is_down(&self, vm: u32) -> bool {
        self.vms.get(vm as usize).is_none_or(|state| state.down.load(SeqCst))
    }
}

impl Shared {
    /// Puts the VM on the bridge's list; false if it is there already.
    pub(crate) fn mark_dirty(&self, vm: u32) -> bool {
        if self.vms[vm as usize].dirty.load(SeqCst) {
            return false;
        }
        let mut dirty = lock(&self.dirty);
        if self.vms[vm as usize].dirty.swap(true, SeqCst) {
            return false;
        }
        dirty.push(vm);
        true
    }

    /// Wakes the bridge.
    pub(crate) fn call_bridge(&self) {
        let wake = lock(&self.bridge).clone();
        if let Some(wake) = wake {
            wake();
        }
    }
}
