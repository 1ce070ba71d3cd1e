//! The fleet: back ends, scheduling, memory, mailboxes and ports.

pub mod abi;
pub mod backend;
pub mod console;
pub mod fleet;
pub mod guest;
pub mod lockstep;
pub mod mailbox;
pub mod memory;
pub mod net;
pub mod report;
mod sync;
pub mod web;
