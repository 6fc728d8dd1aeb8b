//! Reads a file's text so that every value of a wrong type and every unknown key is found, not only
//! the first.

use std::ops::Range;

use serde::Deserialize;
use toml::de::{DeTable, DeValue, Deserializer};

use super::{ConfigError, PoolConfig, Problem};

/// Returns the configuration without its unknown keys and values of a wrong type, and these as
/// problems.
pub(super) fn read(text: &str) -> Result<(PoolConfig, Vec<Problem>), ConfigError> {
    let mut table = DeTable::parse(text).map_err(ConfigError::from_toml)?;
    let mut wrong = Vec::new();
    loop {
        let error = match PoolConfig::deserialize(Deserializer::from(table.clone())) {
            Ok(config) => return Ok((config, wrong)),
            Err(error) => error,
        };
        let path = error.span().and_then(|span| cut(table.get_mut(), &span));
        let Some(path) = path else {
            return Err(ConfigError::from_toml(error));
        };
        wrong.push(Problem {
            field: path,
            what: error.message().trim().to_owned(),
        });
    }
}

/// Removes from the table the innermost entry whose value or key contains `span`, and returns its
/// path.
fn cut(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let mut found = None;
    for (key, value) in table.iter_mut() {
        // A table's span is its header: its entries need not lie within it.
        let inner = match value.get_mut() {
            DeValue::Table(inner) => cut(inner, span),
            _ => None,
        };
        let around = |of: Range<usize>| of.start <= span.start && span.end <= of.end;
        let around = around(value.span()) || around(key.span());
        let key = key.get_ref().to_string();
        if let Some(path) = inner {
            return Some(format!("{key}.{path}"));
        }
        if around {
            found = Some(key);
        }
    }
    let key = found?;
    table.remove(key.as_str());
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_in_the_readme_is_a_valid_one() {
        let readme = include_str!("../../../README.md");
        let (_, rest) = readme.split_once("```toml").unwrap();
        let (text, _) = rest.split_once("```").unwrap();
        let config = PoolConfig::from_toml(text).unwrap();
        assert_eq!(config.profiles.len(), 1);
    }

    #[test]
    fn every_value_of_a_wrong_type_is_reported_with_everything_else() {
        let error = PoolConfig::from_toml(
            r#"
            max_concurrent_vms = "ten"
            warm_pool_percent = 200
            refill = "sometimes"
            stop_deadline_ms = -1
            [health]
            attempts = 1.5
            [lease]
            deadline_ms = 86_400_001
            [profiles.python]
            memory_mib = true
            warm_up = ["python3", 3]
            autoscale = { min = 1 }
            env = { A = 1 }
            [profiles.javascript.autoscale]
            max = 2
            "#,
        )
        .unwrap_err();
        let mut fields: Vec<_> = error
            .problems()
            .iter()
            .map(|problem| problem.field.as_str())
            .collect();
        fields.sort_unstable();
        let expected = [
            "health.attempts",
            "lease.deadline_ms",
            "max_concurrent_vms",
            "profiles.javascript.autoscale",
            "profiles.python.autoscale",
            "profiles.python.env.A",
            "profiles.python.memory_mib",
            "profiles.python.warm_up",
            "refill",
            "stop_deadline_ms",
            "warm_pool_percent",
        ];
        assert_eq!(fields, expected, "{error}");
        let message = error.to_string();
        assert!(
            message.contains("max_concurrent_vms: invalid type: string"),
            "{message}"
        );
        assert!(message.contains("missing field `max`"), "{message}");
    }
}
