//! The configuration of a pool: a builder and a TOML file, checked as a whole.
//!
//! ```
//! use hearth_pool::{Language, PoolConfig, Profile};
//!
//! let built = PoolConfig::new(10).profile(Profile::of(Language::Python));
//! let read: PoolConfig = PoolConfig::from_toml(
//!     r#"
//!     max_concurrent_vms = 10
//!     [profiles.python]
//!     session = "python"
//!     memory_mib = 256
//!     "#,
//! )?;
//! assert_eq!(built, read);
//! # Ok::<(), hearth_pool::ConfigError>(())
//! ```

mod file;
mod read;
mod sections;
mod validate;

use std::time::Duration;

pub use sections::{
    Autoscale, BalloonConfig, BootConfig, HealthConfig, LeaseConfig, LimitsConfig, PressureConfig,
    Refill,
};
use serde::{Deserialize, Serialize};
pub use validate::{ConfigError, Problem};

use crate::policy;
use crate::profile::{Parking, Profile};

/// The configuration of a pool. Names carry their units; each field documents what 0 means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct PoolConfig {
    /// Most leases at a time, over all profiles. Must be given.
    pub max_concurrent_vms: usize,
    /// VMs to keep warm per profile; 0: a share of `max_concurrent_vms`.
    pub warm_pool_size: usize,
    /// That share, in percent (1 to 100).
    pub warm_pool_percent: u32,
    /// Boots at a time per profile, in percent of its size (1 to 100).
    pub concurrent_boots_percent: u32,
    /// When the pool boots by itself.
    pub refill: Refill,
    /// How parked VMs wait; not given: the backend's choice.
    pub park: Option<Parking>,
    /// Health checks.
    pub health: HealthConfig,
    /// Boots.
    pub boot: BootConfig,
    /// Balloons of parked VMs.
    pub balloon: BalloonConfig,
    /// Limits on all existing VMs.
    pub limits: LimitsConfig,
    /// What to do when the host runs short of memory.
    pub pressure: PressureConfig,
    /// Bounds on leases.
    pub lease: LeaseConfig,
    /// How long `stop` waits for leases, in milliseconds.
    pub stop_deadline_ms: u64,
    /// Longest time to wait for the destruction of one VM, in milliseconds.
    pub retire_timeout_ms: u64,
    /// The profiles, in order; names are unique.
    #[serde(with = "file::by_name")]
    pub profiles: Vec<Profile>,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            max_concurrent_vms: 0,
            warm_pool_size: 0,
            warm_pool_percent: policy::WARM_POOL_PERCENT,
            concurrent_boots_percent: policy::CONCURRENT_BOOTS_PERCENT,
            refill: Refill::default(),
            park: None,
            health: HealthConfig::default(),
            boot: BootConfig::default(),
            balloon: BalloonConfig::default(),
            limits: LimitsConfig::default(),
            pressure: PressureConfig::default(),
            lease: LeaseConfig::default(),
            stop_deadline_ms: sections::ms(policy::STOP_DEADLINE),
            retire_timeout_ms: sections::ms(policy::RETIRE_TIMEOUT),
            profiles: Vec::new(),
        }
    }
}

impl PoolConfig {
    /// The configuration of a pool that leases at most `max_concurrent_vms` VMs at a time; add
    /// profiles to it.
    #[must_use]
    pub fn new(max_concurrent_vms: usize) -> Self {
        Self {
            max_concurrent_vms,
            ..Self::default()
        }
    }

    /// Reads and validates a TOML file's text.
    ///
    /// # Errors
    /// If the text is not TOML; else all problems at once, including values of a wrong type.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let (config, mut problems) = read::read(text)?;
        if let Err(error) = config.validate() {
            // Values of a wrong type were replaced by defaults: do not report problems with these.
            let wrong = std::mem::take(&mut problems);
            let own = error.problems().iter().cloned();
            let own = own.filter(|found| !wrong.iter().any(|wrong| wrong.covers(found)));
            problems.extend(own);
            problems.extend(wrong);
        }
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid(problems))
        }
    }

    /// Adds a profile.
    #[must_use]
    pub fn profile(mut self, profile: Profile) -> Self {
        self.profiles.push(profile);
        self
    }

    /// Sets the VMs to keep warm per profile.
    #[must_use]
    pub fn warm_pool_size(mut self, size: usize) -> Self {
        self.warm_pool_size = size;
        self
    }

    /// Sets when the pool boots by itself.
    #[must_use]
    pub fn refill(mut self, refill: Refill) -> Self {
        self.refill = refill;
        self
    }

    /// Sets how parked VMs wait.
    #[must_use]
    pub fn park(mut self, parking: Parking) -> Self {
        self.park = Some(parking);
        self
    }

    /// Sets the health checks.
    #[must_use]
    pub fn health(mut self, health: HealthConfig) -> Self {
        self.health = health;
        self
    }

    /// Sets the rules for boots.
    #[must_use]
    pub fn boot(mut self, boot: BootConfig) -> Self {
        self.boot = boot;
        self
    }

    /// Sets the limits on all existing VMs.
    #[must_use]
    pub fn limits(mut self, limits: LimitsConfig) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the bounds on leases.
    #[must_use]
    pub fn lease(mut self, lease: LeaseConfig) -> Self {
        self.lease = lease;
        self
    }

    /// Sets how long `stop` waits for leases.
    #[must_use]
    pub fn stop_deadline(mut self, deadline: Duration) -> Self {
        self.stop_deadline_ms = sections::ms(deadline);
        self
    }

    /// The number of VMs that are kept warm for `profile`.
    #[must_use]
    pub fn size_of(&self, profile: &Profile) -> usize {
        match profile.warm_pool_size.unwrap_or(self.warm_pool_size) {
            0 => policy::warm_pool_size(self.max_concurrent_vms, self.warm_pool_percent),
            explicit => explicit,
        }
    }

    /// The number of boots at a time for `profile`.
    #[must_use]
    pub fn concurrent_boots_of(&self, profile: &Profile) -> usize {
        policy::concurrent_boots(self.size_of(profile), self.concurrent_boots_percent)
    }
}
