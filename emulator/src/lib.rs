//! The fleet: back ends, scheduling, memory, mailboxes and ports.
