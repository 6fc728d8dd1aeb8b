//! Integration tests of Hearth on real guests.
//!
//! The library is the harness: [`Guest`] boots our kernel with our agent, [`flat`] makes guests of
//! a few instructions, [`Footprint`] says what the process holds ([`alone`] gives a test a
//! process), [`Cgroup`] limits one, and [`kvm`] counts a test as skipped where there is nothing to
//! run it on.
//!
//! Rules for tests here: a cold boot costs seconds, so a binary boots one guest and forks it
//! ([`Guest::fork`]) for each case, or has the cases that leave a guest as it was share one
//! ([`shared`]); nothing asserts a wall-clock time but by an upper bound for
//! "stuck", which [`patience`] scales with the host's kind.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a harness fails its test by panicking"
)]

mod alone;
mod cgroup;
pub mod flat;
mod footprint;
mod guest;
pub mod low_water;
pub mod registers;
mod root;
mod skip;
pub mod structure;
mod vcpus;

pub use alone::alone;
pub use cgroup::Cgroup;
pub use footprint::{Footprint, available_kib, private_kib};
pub use guest::{Guest, Phases, dial_agent, error_chain, image, kernel_path, noise, shared};
pub use root::{shell_guest, shell_root};
pub use skip::{kvm, not_measured, patience, within};
pub use vcpus::vcpu_times;
