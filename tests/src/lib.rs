//! Integration tests of Hearth on real guests.
//!
//! The library is the harness: [`Guest`] boots our kernel with our agent, [`flat`] makes guests of
//! a few instructions, [`Footprint`] counts what the process uses ([`alone`] gives a test a process
//! of its own), [`Cgroup`] limits a process, and [`kvm`] reports a test as skipped where there is
//! no `/dev/kvm`.
//!
//! Rules for tests here: a cold boot costs seconds, so a binary boots one guest and forks it
//! ([`Guest::fork`]) for each case; cases that leave a guest unchanged share one ([`shared`]). No
//! test asserts a wall-clock time, except an upper bound for "stuck", which [`patience`] scales by
//! the kind of the host.
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
