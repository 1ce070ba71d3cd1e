//! The HTTP probe.
