//! vmm-bench: what Hearth's steps cost, measured beside the bare ioctls that they consist of.
//!
//! A [`scenario`] (the [`suite`] runs all of them) takes samples, interleaved A/B/A/B where it
//! compares two sides; [`stats`] sums them up and refuses ratios that too few samples would carry;
//! [`report`] is the JSON and the table, [`page`] its charts; [`compare`] tells two runs apart.

pub mod compare;
pub mod counts;
pub mod cpu;
pub mod environment;
pub mod figures;
pub mod fit;
pub mod meter;
pub mod page;
pub mod peer;
pub mod process;
pub mod report;
pub mod scenario;
pub mod stats;
pub mod suite;
pub mod sweep;
pub mod target;
