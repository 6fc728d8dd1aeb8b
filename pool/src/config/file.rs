//! How a configuration lies in a file: a table for each profile, and keys that mean nothing.

use std::collections::{BTreeMap, BTreeSet};

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};

/// The keys of a table that mean nothing, kept so that all of them can be reported.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Unknown(BTreeSet<String>);

impl Unknown {
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.0.iter()
    }
}

impl<'de> Deserialize<'de> for Unknown {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = BTreeMap::<String, IgnoredAny>::deserialize(deserializer)?;
        Ok(Self(table.into_keys().collect()))
    }
}

/// `Vec<Profile>` as `[profiles.NAME]` tables.
pub(super) mod by_name {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use crate::profile::Profile;

    pub(in crate::config) fn serialize<S: Serializer>(
        profiles: &[Profile],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(profiles.iter().map(|profile| (&profile.name, profile)))
    }

    pub(in crate::config) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Profile>, D::Error> {
        let tables = BTreeMap::<String, Profile>::deserialize(deserializer)?;
        Ok(tables
            .into_iter()
            .map(|(name, mut profile)| {
                if profile.image.is_empty() {
                    profile.image.clone_from(&name);
                }
                profile.name = name;
                profile
            })
            .collect())
    }
}
