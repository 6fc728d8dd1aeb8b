//! A pool that keeps microVMs warm, checks them and hands them out.
//!
//! A caller never waits for a boot: [`Pool::acquire`] moves a VM that is ready, reseeded and proven
//! healthy to the caller in microseconds, and the pool makes its replacement in the background.
//! Each VM is used once.
//!
//! ```
//! use std::time::Duration;
//! use hearth_pool::fake::FakeBackend;
//! use hearth_pool::{AcquireError, Language, Pool, PoolConfig, Profile};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = PoolConfig::new(10).profile(Profile::of(Language::Python));
//! let pool = Pool::new(FakeBackend::new(), config)?;
//! pool.start().await?;
//! match pool.acquire(Language::Python) {
//!     Ok(vm) => vm.ping().await?,
//!     Err(AcquireError::Exhausted { .. }) => {
//!         let vm = pool.acquire_timeout(Language::Python, Duration::from_secs(1)).await?;
//!         vm.release().await;
//!     }
//!     Err(other) => return Err(other.into()),
//! }
//! pool.stop().await;
//! # Ok(())
//! # }
//! ```
//!
//! All decisions are made by the [`ledger`], a value that can be tested without a clock. A
//! [`Backend`] makes the VMs. An actor between the two owns every task.

#![forbid(unsafe_code)]

mod acquire;
mod actor;
mod backend;
mod boot;
pub mod config;
mod deadline;
mod error;
mod event;
pub mod fake;
mod guard;
mod health;
mod host;
#[cfg(feature = "kvm")]
pub mod kvm;
mod lease;
pub mod ledger;
mod locked;
pub mod metrics;
mod permit;
pub mod policy;
mod pool;
mod profile;
mod shared;
mod slot;
mod start;
mod status;
mod tasks;

pub use actor::CheckReport;
pub use backend::{Backend, Making, ProbeError, Remote};
pub use config::{Autoscale, ConfigError, PoolConfig, Problem, Refill};
pub use error::{
    AcquireError, BootFailure, Ineligible, NotReady, OfferError, OfferRefusal, ProfileStart,
    Replenished, ResizeError, StartError, StartFailure, StartReport, UnknownProfile,
};
pub use event::{EventKind, PoolEvent};
pub use host::{Host, MemoryLimit, ThisHost, ThreadLimit, memory_limit, thread_limit};
pub use lease::Lease;
pub use ledger::{Counts, Overdue, Phase, Shortage};
pub use permit::{Denial, Limits, Reservation, Usage};
pub use pool::Pool;
pub use profile::{
    Balloon, Demand, Language, Mismatch, Parking, Profile, Request, UnknownLanguage,
};
pub use slot::VmId;
pub use status::{PoolStatus, ProfileStatus};

/// The example in the README compiles.
#[cfg(all(doctest, feature = "kvm"))]
#[doc = include_str!("../../README.md")]
pub mod readme {}
