//! The contract of the warm pool, row by row: each test is named after its row. Rows that need a
//! real guest are tested elsewhere; here a fake backend and paused time make every interleaving
//! repeatable.

#![allow(
    clippy::field_reassign_with_default,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod acquire;
mod api;
mod faults;
mod health;
mod leases;
mod limits;
mod parking;
mod replenish;
mod sizes;
mod sizing;
mod start_stop;
mod support;
mod templates;
