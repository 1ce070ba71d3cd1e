//! The fleet: back ends, scheduling, memory, mailboxes and ports.

pub mod abi;
pub mod backend;
pub mod mailbox;
pub mod memory;
pub mod net;
