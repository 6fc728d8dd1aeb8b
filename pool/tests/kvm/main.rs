//! The rows of the pool's contract that need real guests. One guest is booted for the whole binary;
//! every VM here is a fork of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod ended;
mod hand_off;
mod health;
mod nothing_left;
mod rig;
mod torture;
