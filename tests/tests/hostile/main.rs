#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! The hostile suite with real guests: a few instructions on a real vCPU that misuse devices, ports
//! and the processor. `tests/HOSTILE.md` lists these attacks, and those that are played without a
//! guest.
//!
//! Each attack names the branch that must catch it and what becomes of the VM; none may affect
//! anything beyond its own VM.

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
