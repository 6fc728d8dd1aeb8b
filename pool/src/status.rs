//! Snapshot of a pool at one moment.

use std::error::Error;
use std::sync::Arc;

use crate::error::BootFailure;
use crate::ledger::{Counts, Phase};
use crate::permit::{Limits, Usage};

/// A consistent snapshot: all numbers are of the same moment.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PoolStatus {
    /// The phase of the pool.
    pub phase: Phase,
    /// Number of leases out.
    pub leased: usize,
    /// The limits on all existing VMs.
    pub limits: Limits,
    /// The resources in use.
    pub usage: Usage,
    /// Whether refill has stopped because of the host's memory.
    pub memory_pressure: bool,
    /// In the order of the configuration.
    pub profiles: Vec<ProfileStatus>,
}

/// The state of one profile.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ProfileStatus {
    /// The profile's name.
    pub name: String,
    /// The profile's counts.
    pub counts: Counts,
    /// Why the last failed boot failed.
    pub last_failure: Option<BootFailure>,
    /// Why VMs boot from cold instead of being forked: the error of making the template.
    pub no_template: Option<Arc<dyn Error + Send + Sync>>,
}

impl PoolStatus {
    /// The numbers of one profile.
    #[must_use]
    pub fn profile(&self, name: &str) -> Option<&ProfileStatus> {
        self.profiles.iter().find(|profile| profile.name == name)
    }
}
