//! Finds all problems of a configuration at once.

use std::collections::BTreeSet;
use std::fmt;

use super::PoolConfig;
use crate::permit::{Limits, Usage};
use crate::policy;
use crate::profile::{Demand, Profile};

/// One problem of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path of the field in a file.
    pub field: String,
    /// What is wrong, and what would be right.
    pub what: String,
}

impl Problem {
    /// Whether `other` may be caused only by this field's missing value: one path contains the
    /// other.
    pub(super) fn covers(&self, other: &Self) -> bool {
        let within = |inner: &str, outer: &str| {
            let rest = inner.strip_prefix(outer);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        within(&other.field, &self.field) || within(&self.field, &other.field)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.what)
    }
}

/// The error for an invalid configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file's text cannot be read.
    #[error("the configuration cannot be read: {0}")]
    Syntax(String),
    /// All problems with its values.
    #[error("the configuration has {} problem(s):{}", .0.len(), lines(.0))]
    Invalid(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(|problem| format!("\n  - {problem}"))
        .collect()
}

impl ConfigError {
    pub(super) fn from_toml(error: toml::de::Error) -> Self {
        Self::Syntax(error.to_string())
    }

    /// The problems; empty if the text could not be read.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Invalid(problems) => problems,
            Self::Syntax(_) => &[],
        }
    }
}

#[derive(Default)]
struct Findings(Vec<Problem>);

impl Findings {
    fn add(&mut self, field: impl Into<String>, what: impl Into<String>) {
        self.0.push(Problem {
            field: field.into(),
            what: what.into(),
        });
    }

    fn within<T: PartialOrd + fmt::Display>(&mut self, field: &str, value: T, low: T, high: T) {
        if value < low || value > high {
            self.add(field, format!("is {value}, must be {low} to {high}"));
        }
    }

    fn ordered(&mut self, table: &str, low: (&str, u64), high: (&str, u64)) {
        if low.1 > high.1 {
            let what = format!("is {}, more than {} = {}", low.1, high.0, high.1);
            self.add(format!("{table}.{}", low.0), what);
        }
    }
}

/// One day. Longer times are considered a mistake in the unit.
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

impl PoolConfig {
    /// Checks everything that can be known without the host.
    ///
    /// # Errors
    /// All problems found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut found = Findings::default();
        self.check_numbers(&mut found);
        self.check_profiles(&mut found);
        if found.0.is_empty() {
            Ok(())
        } else {
            Err(ConfigError::Invalid(found.0))
        }
    }

    /// Returns the limits in force on a host with `available_mib` of memory available, if all
    /// profiles fit in at their full size.
    ///
    /// # Errors
    /// All problems found, those of [`validate`](Self::validate) included.
    pub(crate) fn limits_on(
        &self,
        available_mib: Option<u64>,
        demand: impl Fn(&Profile) -> Demand,
    ) -> Result<Limits, ConfigError> {
        let mut problems = match self.validate() {
            Err(ConfigError::Invalid(problems)) => problems,
            Err(error @ ConfigError::Syntax(_)) => return Err(error),
            Ok(()) => Vec::new(),
        };
        let given = &self.limits;
        let promised = available_mib.map_or(u64::MAX, |available| {
            available.saturating_mul(given.memory_overcommit_percent.into()) / 100
        });
        let or = |value: u64, other: u64| if value == 0 { other } else { value };
        let limits = Limits {
            vms: if given.vms == 0 {
                policy::VMS_MAX
            } else {
                given.vms
            },
            vcpus: or(given.vcpus, u64::MAX),
            memory_mib: or(given.memory_mib, promised),
        };
        let mut total = Usage::default();
        for profile in &self.profiles {
            // A size above `VMS_MAX` is reported as a problem of its own; here it counts as
            // `VMS_MAX`.
            let size = self.largest(profile).min(policy::VMS_MAX);
            total = total.plus(size, demand(profile));
        }
        let mut fit = |field: &str, needed: u64, allowed: u64, unit: &str| {
            if needed > allowed {
                problems.push(Problem {
                    field: field.to_owned(),
                    what: format!(
                        "all pools full need {needed} {unit}, {allowed} are allowed; make pools \
                         smaller or raise the limit"
                    ),
                });
            }
        };
        let count = |vms: usize| u64::try_from(vms).unwrap_or(u64::MAX);
        fit("limits.vms", count(total.vms), count(limits.vms), "VMs");
        fit("limits.vcpus", total.vcpus, limits.vcpus, "vCPUs");
        fit(
            "limits.memory_mib",
            total.memory_mib,
            limits.memory_mib,
            "MiB",
        );
        if problems.is_empty() {
            Ok(limits)
        } else {
            Err(ConfigError::Invalid(problems))
        }
    }

    /// The most VMs that the pool may keep warm for `profile`.
    fn largest(&self, profile: &Profile) -> usize {
        let size = self.size_of(profile);
        profile
            .autoscale
            .as_ref()
            .map_or(size, |scale| scale.max.max(size))
    }

    fn check_numbers(&self, found: &mut Findings) {
        let (health, boot) = (&self.health, &self.boot);
        found.within(
            "max_concurrent_vms",
            self.max_concurrent_vms,
            1,
            policy::VMS_MAX,
        );
        found.within("warm_pool_size", self.warm_pool_size, 0, policy::VMS_MAX);
        found.within("warm_pool_percent", self.warm_pool_percent, 1, 100);
        found.within(
            "concurrent_boots_percent",
            self.concurrent_boots_percent,
            1,
            100,
        );
        found.within("stop_deadline_ms", self.stop_deadline_ms, 0, DAY_MS);
        found.within("retire_timeout_ms", self.retire_timeout_ms, 1, DAY_MS);
        found.within("health.interval_ms", health.interval_ms, 0, DAY_MS);
        found.within("health.attempts", health.attempts, 1, 100);
        found.within("health.backoff_max_ms", health.backoff_max_ms, 0, DAY_MS);
        found.ordered(
            "health",
            ("backoff_min_ms", health.backoff_min_ms),
            ("backoff_max_ms", health.backoff_max_ms),
        );
        found.within("health.ping_timeout_ms", health.ping_timeout_ms, 1, DAY_MS);
        found.within("boot.timeout_ms", boot.timeout_ms, 1, DAY_MS);
        found.within(
            "boot.connect_timeout_ms",
            boot.connect_timeout_ms,
            1,
            DAY_MS,
        );
        found.within("boot.backoff_min_ms", boot.backoff_min_ms, 1, DAY_MS);
        found.within("boot.backoff_max_ms", boot.backoff_max_ms, 1, DAY_MS);
        found.ordered(
            "boot",
            ("backoff_min_ms", boot.backoff_min_ms),
            ("backoff_max_ms", boot.backoff_max_ms),
        );
        found.within("boot.early_death_ms", boot.early_death_ms, 0, DAY_MS);
        found.within("boot.breaker_failures", boot.breaker_failures, 1, 1_000_000);
        found.within(
            "boot.breaker_cooldown_ms",
            boot.breaker_cooldown_ms,
            1,
            DAY_MS,
        );
        found.within(
            "boot.breaker_cooldown_max_ms",
            boot.breaker_cooldown_max_ms,
            1,
            DAY_MS,
        );
        found.ordered(
            "boot",
            ("breaker_cooldown_ms", boot.breaker_cooldown_ms),
            ("breaker_cooldown_max_ms", boot.breaker_cooldown_max_ms),
        );
        found.within(
            "balloon.idle_target_mib",
            self.balloon.idle_target_mib,
            16,
            1 << 20,
        );
        found.within("balloon.timeout_ms", self.balloon.timeout_ms, 1, DAY_MS);
        let overcommit = self.limits.memory_overcommit_percent;
        found.within("limits.memory_overcommit_percent", overcommit, 1, 10_000);
        found.within(
            "pressure.stall_percent",
            self.pressure.stall_percent,
            0,
            100,
        );
        found.within("pressure.recheck_ms", self.pressure.recheck_ms, 1, DAY_MS);
        found.within("lease.deadline_ms", self.lease.deadline_ms, 0, DAY_MS);
        found.within("lease.idle_ms", self.lease.idle_ms, 0, DAY_MS);
    }

    fn check_profiles(&self, found: &mut Findings) {
        if self.profiles.is_empty() {
            found.add("profiles", "none is given, at least one is needed");
        }
        let mut names = BTreeSet::new();
        for profile in &self.profiles {
            let at = |field: &str| format!("profiles.{}.{field}", profile.name);
            if profile.name.is_empty() {
                found.add("profiles", "a profile has no name");
            } else if !names.insert(&profile.name) {
                found.add(
                    format!("profiles.{}", profile.name),
                    "the name is given twice",
                );
            }
            if profile.image.is_empty() {
                found.add(at("image"), "is empty");
            }
            let (memory, most) = (profile.memory_mib, 1 << 24);
            found.within(&at("memory_mib"), memory, policy::MEMORY_MIN_MIB, most);
            found.within(&at("vcpus"), profile.vcpus, 1, policy::VCPUS_MAX);
            let size = profile.warm_pool_size.unwrap_or(0);
            found.within(&at("warm_pool_size"), size, 0, policy::VMS_MAX);
            for (name, value) in &profile.env {
                if name.is_empty() || name.contains(['=', '\0']) {
                    found.add(at("env"), format!("{name:?} is no name of a variable"));
                }
                if value.contains('\0') {
                    found.add(at("env"), format!("the value of {name:?} has a NUL in it"));
                }
            }
            if profile.warm_up.first().is_some_and(String::is_empty) {
                found.add(at("warm_up"), "the name of its program is empty");
            }
            if profile.warm_up.iter().any(|word| word.contains('\0')) {
                found.add(at("warm_up"), "has a NUL in it");
            }
            if !profile.prelude.is_empty() && profile.session.is_none() {
                found.add(at("prelude"), "there is no session to run it: add one");
            }
            if profile.prelude.contains('\0') {
                found.add(at("prelude"), "has a NUL in it");
            }
            if let Some(scale) = &profile.autoscale {
                found.within(&at("autoscale.min"), scale.min, 1, policy::VMS_MAX);
                found.within(&at("autoscale.max"), scale.max, scale.min, policy::VMS_MAX);
                found.within(&at("autoscale.window_ms"), scale.window_ms, 1, DAY_MS);
                let size = self.size_of(profile);
                if scale.min <= scale.max && !(scale.min..=scale.max).contains(&size) {
                    let (min, max) = (scale.min, scale.max);
                    let what = format!("bounds {min} to {max} do not hold the size, {size}");
                    found.add(at("autoscale"), what);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::Language;

    #[test]
    fn every_problem_of_a_file_is_reported_at_once() {
        let error = PoolConfig::from_toml(
            r#"
            warm_pool_percent = 101
            colour = "red"
            [health]
            attempts = 0
            intervall_ms = 3
            backoff_min_ms = 5000
            [profiles.python]
            memory_mib = 8
            vcpus = 33
            cpus = 2
            prelude = "import json"
            "#,
        )
        .unwrap_err();
        let fields: Vec<_> = error.problems().iter().map(|p| p.field.as_str()).collect();
        for field in [
            "max_concurrent_vms",
            "warm_pool_percent",
            "colour",
            "health.attempts",
            "health.intervall_ms",
            "health.backoff_min_ms",
            "profiles.python.memory_mib",
            "profiles.python.vcpus",
            "profiles.python.cpus",
            "profiles.python.prelude",
        ] {
            assert!(fields.contains(&field), "{field} is missing in {fields:?}");
        }
        assert_eq!(fields.len(), 10, "{fields:?}");
        assert!(error.to_string().contains("10 problem(s)"), "{error}");
    }

    #[test]
    fn what_no_program_can_be_given_is_refused_and_an_empty_argument_is_not() {
        let profile = |name: &str| Profile::new(name, "image");
        let config = PoolConfig::new(1)
            .profile(profile("a").warm_up([""]))
            .profile(profile("b").warm_up(["sh", "-c", "a\0b"]))
            .profile(profile("c").env("A", "a\0b"))
            .profile(profile("d").env("A\0", "b"))
            .profile(profile("good").warm_up(["sh", "-c", ""]).env("A", ""));
        let error = config.validate().unwrap_err();
        let fields: Vec<_> = error.problems().iter().map(|p| p.field.as_str()).collect();
        let expected = ["a.warm_up", "b.warm_up", "c.env", "d.env"];
        assert_eq!(fields, expected.map(|field| format!("profiles.{field}")));
    }

    #[test]
    fn a_file_without_profiles_or_that_is_no_toml_is_refused() {
        let error = PoolConfig::from_toml("max_concurrent_vms = 1").unwrap_err();
        assert_eq!(
            error.problems().first().map(|p| p.field.as_str()),
            Some("profiles")
        );
        assert!(matches!(
            PoolConfig::from_toml("max ="),
            Err(ConfigError::Syntax(_))
        ));
    }

    #[test]
    fn a_configuration_survives_a_file() {
        let config = PoolConfig::new(7)
            .profile(
                Profile::of(Language::Javascript)
                    .package("left-pad")
                    .warm_pool_size(3),
            )
            .profile(
                Profile::of(Language::Python)
                    .env("A", "b")
                    .prelude("import json")
                    .warm_up(["python3", "-V"]),
            );
        let text = toml::to_string(&config).unwrap();
        assert_eq!(PoolConfig::from_toml(&text).unwrap(), config, "{text}");
    }

    #[test]
    fn pools_that_cannot_fit_are_an_error() {
        let mut config = PoolConfig::new(100).profile(Profile::new("a", "a").memory_mib(100));
        let demand = Profile::demand;
        assert_eq!(
            config.limits_on(Some(2500), demand).unwrap().memory_mib,
            2500
        );
        let error = config.limits_on(Some(2499), demand).unwrap_err();
        assert_eq!(
            error.problems().first().map(|p| p.field.as_str()),
            Some("limits.memory_mib")
        );
        config.limits.memory_overcommit_percent = 200;
        assert_eq!(
            config.limits_on(Some(1250), demand).unwrap().memory_mib,
            2500
        );
        config.limits.vms = 24;
        config.limits.vcpus = 24;
        assert_eq!(
            config.limits_on(None, demand).unwrap_err().problems().len(),
            2
        );
    }
}
