//! Profiles, which describe a kind of VM, and requests, which are matched against them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::config::Autoscale;

/// A language with a built-in profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Language {
    /// CPython, named `python`.
    Python,
    /// Node.js, named `javascript`.
    Javascript,
    /// Bash, named `shell`.
    Shell,
}

impl Language {
    /// All languages, in the order in which messages list them.
    pub const ALL: [Self; 3] = [Self::Python, Self::Javascript, Self::Shell];

    /// The language's name, as [`FromStr`] accepts it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Javascript => "javascript",
            Self::Shell => "shell",
        }
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Language {
    type Err = UnknownLanguage;

    fn from_str(name: &str) -> Result<Self, UnknownLanguage> {
        Self::ALL
            .into_iter()
            .find(|language| language.as_str() == name)
            .ok_or_else(|| UnknownLanguage(name.to_owned()))
    }
}

/// The error for a name that is not a built-in language's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown language {0:?}; known are: {known}", known = Language::ALL.map(Language::as_str).join(", "))]
pub struct UnknownLanguage(String);

/// How a parked VM waits for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parking {
    /// vCPUs run: hand-off costs nothing, the idle guest costs a little CPU.
    Running,
    /// vCPUs are stopped: the guest costs no CPU at all, hand-off wakes a thread.
    Paused,
}

/// What happens to the memory of a parked VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Balloon {
    /// The balloons of cold-booted VMs are inflated to the idle target while parked. A template's
    /// balloon is inflated once, before it is captured, so that its forks start small; the balloons
    /// of forks are not touched.
    #[default]
    Auto,
    /// Balloons are never touched.
    Off,
}

/// The host resources that one VM takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Demand {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

/// Describes a kind of VM: image, resources, environment and warm-up.
///
/// ```
/// use hearth_pool::{Language, Profile};
/// let data = Profile::new("data", "python").memory_mib(512).package("numpy");
/// assert_eq!(Profile::of(Language::Python).name, "python");
/// # let _ = data;
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Profile {
    /// The profile's name, unique in a pool; in a file, the key of its table.
    #[serde(skip)]
    pub name: String,
    /// The image or template that its VMs come from. Empty in a file: the profile's name.
    pub image: String,
    /// Guest memory in MiB, at least 32.
    pub memory_mib: u32,
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u8,
    /// Packages that the image contains beyond the base of its language.
    pub packages: BTreeSet<String>,
    /// Environment variables of every program that runs in the guest.
    pub env: BTreeMap<String, String>,
    /// Command that runs in the guest before it counts as ready; empty: none.
    pub warm_up: Vec<String>,
    /// The language of an interpreter that is kept warm in the guest: it has started and run code
    /// before the guest counts as ready. Not given: none.
    pub session: Option<Language>,
    /// Code that the interpreter runs before the guest counts as ready (`import numpy`, say);
    /// needs a [`session`](Self::session). Empty: none. Where guests are forks, it runs once,
    /// in their template. The template's clock is a day behind meanwhile, by which OpenSSL in
    /// a clone recognises its random state as old.
    pub prelude: String,
    /// Balloon policy while parked.
    pub balloon: Balloon,
    /// How parked VMs wait; not given: the pool's setting.
    pub park: Option<Parking>,
    /// VMs to keep warm; not given: the pool's setting.
    pub warm_pool_size: Option<usize>,
    /// Bounds between which autoscaling moves the size; not given: the size is fixed.
    pub autoscale: Option<Autoscale>,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            name: String::new(),
            image: String::new(),
            memory_mib: Self::DEFAULT_MEMORY_MIB,
            vcpus: 1,
            packages: BTreeSet::new(),
            env: BTreeMap::new(),
            warm_up: Vec::new(),
            session: None,
            prelude: String::new(),
            balloon: Balloon::default(),
            park: None,
            warm_pool_size: None,
            autoscale: None,
        }
    }
}

impl Profile {
    /// Guest memory in MiB when none is given.
    pub const DEFAULT_MEMORY_MIB: u32 = 256;

    /// A profile called `name` whose VMs come from `image`.
    #[must_use]
    pub fn new(name: impl Into<String>, image: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            ..Self::default()
        }
    }

    /// The built-in profile of `language`: name and image are the language's name, and an
    /// interpreter is kept warm.
    #[must_use]
    pub fn of(language: Language) -> Self {
        let memory_mib = match language {
            Language::Python | Language::Shell => Self::DEFAULT_MEMORY_MIB,
            // Node.js reserves more than twice as much as CPython needs.
            Language::Javascript => 512,
        };
        Self {
            memory_mib,
            session: Some(language),
            ..Self::new(language.as_str(), language.as_str())
        }
    }

    /// Sets the guest memory in MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Sets the number of vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Adds a package that the image holds.
    #[must_use]
    pub fn package(mut self, name: impl Into<String>) -> Self {
        self.packages.insert(name.into());
        self
    }

    /// Sets a variable of the guest's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Sets the command that a guest runs before it counts as ready.
    #[must_use]
    pub fn warm_up(mut self, argv: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.warm_up = argv.into_iter().map(Into::into).collect();
        self
    }

    /// Keeps an interpreter warm.
    #[must_use]
    pub fn session(mut self, language: Language) -> Self {
        self.session = Some(language);
        self
    }

    /// Sets code that the interpreter has run before a guest counts as ready.
    #[must_use]
    pub fn prelude(mut self, code: impl Into<String>) -> Self {
        self.prelude = code.into();
        self
    }

    /// Sets the balloon policy.
    #[must_use]
    pub fn balloon(mut self, balloon: Balloon) -> Self {
        self.balloon = balloon;
        self
    }

    /// Sets how parked VMs wait.
    #[must_use]
    pub fn park(mut self, parking: Parking) -> Self {
        self.park = Some(parking);
        self
    }

    /// Sets how many VMs are kept warm.
    #[must_use]
    pub fn warm_pool_size(mut self, size: usize) -> Self {
        self.warm_pool_size = Some(size);
        self
    }

    /// Lets autoscaling move the size within bounds.
    #[must_use]
    pub fn autoscale(mut self, autoscale: Autoscale) -> Self {
        self.autoscale = Some(autoscale);
        self
    }

    /// The host resources that one VM of this profile takes.
    #[must_use]
    pub fn demand(&self) -> Demand {
        Demand {
            vcpus: self.vcpus.into(),
            memory_mib: self.memory_mib.into(),
        }
    }
}

/// The requirements of a caller. Every requirement that is set must match; the others do not
/// matter.
///
/// ```
/// use hearth_pool::{Language, Request};
/// let any = Request::from(Language::Python);
/// let big = Request::profile("python").memory_mib(1024).package("numpy");
/// # let _ = (any, big);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    profile: Option<String>,
    image: Option<String>,
    memory_mib: Option<u32>,
    vcpus: Option<u8>,
    packages: BTreeSet<String>,
    env: BTreeMap<String, String>,
}

impl Request {
    /// Any profile that meets the other requirements: the first one, in the order of the
    /// configuration, that has a VM ready. A waiting caller is served by the first profile that
    /// gets one.
    #[must_use]
    pub fn any() -> Self {
        Self::default()
    }

    /// The profile called `name`, and no other.
    #[must_use]
    pub fn profile(name: impl Into<String>) -> Self {
        Self {
            profile: Some(name.into()),
            ..Self::default()
        }
    }

    /// Needs this image.
    #[must_use]
    pub fn image(mut self, image: impl Into<String>) -> Self {
        self.image = Some(image.into());
        self
    }

    /// Needs exactly this much guest memory in MiB.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = Some(mib);
        self
    }

    /// Needs exactly this many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.vcpus = Some(vcpus);
        self
    }

    /// Needs this package beyond the base.
    #[must_use]
    pub fn package(mut self, name: impl Into<String>) -> Self {
        self.packages.insert(name.into());
        self
    }

    /// Needs this variable in the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    pub(crate) fn named(&self) -> Option<&str> {
        self.profile.as_deref()
    }

    fn asks_for_nothing_but_a_name(&self) -> bool {
        let Self {
            profile: _,
            image,
            memory_mib,
            vcpus,
            packages,
            env,
        } = self;
        (image, memory_mib, vcpus) == (&None, &None, &None) && packages.is_empty() && env.is_empty()
    }

    /// Why `profile` cannot serve this request; empty if it can.
    pub(crate) fn mismatches(&self, profile: &Profile) -> Vec<Mismatch> {
        let mut found = Vec::new();
        if self.asks_for_nothing_but_a_name() {
            return found;
        }
        if let Some(want) = &self.image
            && *want != profile.image
        {
            found.push(Mismatch::Image {
                want: want.clone(),
                have: profile.image.clone(),
            });
        }
        if let Some(want) = self.memory_mib
            && want != profile.memory_mib
        {
            found.push(Mismatch::Memory {
                want_mib: want,
                have_mib: profile.memory_mib,
            });
        }
        if let Some(want) = self.vcpus
            && want != profile.vcpus
        {
            found.push(Mismatch::Vcpus {
                want,
                have: profile.vcpus,
            });
        }
        for package in self.packages.difference(&profile.packages) {
            found.push(Mismatch::Package(package.clone()));
        }
        for (name, value) in &self.env {
            if profile.env.get(name) != Some(value) {
                found.push(Mismatch::Env(name.clone()));
            }
        }
        found
    }
}

impl From<&str> for Request {
    fn from(name: &str) -> Self {
        Self::profile(name)
    }
}

impl From<String> for Request {
    fn from(name: String) -> Self {
        Self::profile(name)
    }
}

impl From<&String> for Request {
    fn from(name: &String) -> Self {
        Self::profile(name)
    }
}

impl From<Language> for Request {
    fn from(language: Language) -> Self {
        Self::profile(language.as_str())
    }
}

/// A requirement of a request that a profile does not meet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// The image differs.
    #[error("needs image {want:?}, has {have:?}")]
    Image {
        /// Of the request.
        want: String,
        /// Of the profile.
        have: String,
    },
    /// The amount of memory differs.
    #[error("needs {want_mib} MiB of memory, has {have_mib}")]
    Memory {
        /// Of the request.
        want_mib: u32,
        /// Of the profile.
        have_mib: u32,
    },
    /// The number of vCPUs differs.
    #[error("needs {want} vCPUs, has {have}")]
    Vcpus {
        /// Of the request.
        want: u8,
        /// Of the profile.
        have: u8,
    },
    /// A package that the image does not contain.
    #[error("needs package {0:?}")]
    Package(String),
    /// An environment variable that is not set, or has another value.
    #[error("needs environment variable {0:?} set as requested")]
    Env(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn language_names_round_trip_and_an_unknown_one_lists_the_known() {
        for language in Language::ALL {
            assert_eq!(language.to_string().parse(), Ok(language));
        }
        let error = "perl".parse::<Language>().unwrap_err().to_string();
        assert!(
            error.contains("perl") && error.contains("python, javascript, shell"),
            "{error}"
        );
    }

    #[test]
    fn a_request_names_what_the_profile_lacks() {
        let profile = Profile::of(Language::Python).package("numpy").env("A", "1");
        assert!(Request::any().mismatches(&profile).is_empty());
        assert!(
            Request::any()
                .package("numpy")
                .env("A", "1")
                .mismatches(&profile)
                .is_empty()
        );
        let request = Request::any()
            .image("x")
            .memory_mib(1)
            .vcpus(9)
            .package("pandas")
            .env("A", "2");
        assert_eq!(request.mismatches(&profile).len(), 5);
    }
}
