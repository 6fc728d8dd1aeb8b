//! A picture of a pool at one moment.

use std::error::Error;
use std::sync::Arc;

use crate::error::BootFailure;
use crate::ledger::{Counts, Phase};
use crate::permit::{Limits, Usage};

/// A consistent picture: all numbers are of the same moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PoolStatus {
    /// Where the pool is in its life.
    pub phase: Phase,
    /// Leases out.
    pub leased: usize,
    /// The bounds on everything that lives.
    pub limits: Limits,
    /// What is taken of them.
    pub usage: Usage,
    /// Whether refill has stopped because of the host's memory.
    pub memory_pressure: bool,
    /// In the order of the configuration.
    pub profiles: Vec<ProfileStatus>,
}

/// One profile's part of it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ProfileStatus {
    /// Its name.
    pub name: String,
    /// Its numbers.
    pub counts: Counts,
    /// Why the last boot that failed did.
    pub last_failure: Option<BootFailure>,
    /// Why its VMs boot from cold although they should be copies of a template.
    pub no_template: Option<Arc<dyn Error + Send + Sync>>,
}

impl PoolStatus {
    /// The numbers of one profile.
    #[must_use]
    pub fn profile(&self, name: &str) -> Option<&ProfileStatus> {
        self.profiles.iter().find(|profile| profile.name == name)
    }
}
