//! The parts of the pool's contract that need real guests. One guest is booted for the whole
//! binary, or found in the template cache; most VMs here are forks of it.

#![allow(
    clippy::field_reassign_with_default,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod cold;
mod ended;
mod hand_off;
mod health;
mod idle;
mod leases;
mod limits;
mod nothing_left;
mod profiles;
mod rig;
mod sessions;
mod templates;
mod torture;
