//! How a configuration is written in a file: one table for each profile.

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
