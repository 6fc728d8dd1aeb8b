//! vmm-bench: measures the cost of Hearth's steps beside the bare ioctls that they consist of.
//!
//! A [`scenario`] (the [`suite`] runs all of them) takes samples, interleaved A/B/A/B where it
//! compares two sides. [`stats`] summarises them and refuses ratios of too few samples; [`report`]
//! is the JSON and the table, [`page`] its charts; [`compare`] compares two runs.

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
