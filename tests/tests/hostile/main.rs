#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! The hostile suite, by real guests: a few instructions on a real vCPU that do to devices, ports
//! and processor what no guest may. `tests/HOSTILE.md` lists its attacks beside those that are
//! played.
//!
//! Each attack says which branch must catch it and what becomes of the VM; none may reach anything
//! beyond its own VM.

mod chains;
mod driver;
mod image;
mod packets;
mod ports;
mod processor;
mod queues;
mod registers;
mod registry;
mod survivors;
