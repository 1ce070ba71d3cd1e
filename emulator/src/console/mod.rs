//! Consoles: what guests print and are typed, their logs, and the socket through which people attach.

#[cfg(unix)]
pub mod client;
pub mod hub;
pub mod log;
pub mod place;
pub mod scan;
