//! The contract's sections "Constants" and "Sizing", and the matching of languages.

use hearth_pool::{ConfigError, Language, PoolConfig, Profile, policy};

fn size(max_concurrent: usize, explicit: usize) -> usize {
    let config = PoolConfig::new(max_concurrent).warm_pool_size(explicit);
    config.size_of(&Profile::of(Language::Python))
}

fn boots(max_concurrent: usize, explicit: usize) -> usize {
    let config = PoolConfig::new(max_concurrent).warm_pool_size(explicit);
    config.concurrent_boots_of(&Profile::of(Language::Python))
}

#[test]
fn a_quarter_of_max_concurrent_rounded_down_but_at_least_one() {
    for (max_concurrent, expected) in [(10, 2), (100, 25), (1, 1), (4, 1), (8, 2), (20, 5)] {
        assert_eq!(size(max_concurrent, 0), expected, "{max_concurrent}");
    }
}

#[test]
fn half_of_the_size_boots_at_a_time_rounded_down_but_at_least_one() {
    assert_eq!((size(8, 0), boots(8, 0)), (2, 1));
    assert_eq!((size(20, 0), boots(20, 0)), (5, 2));
    assert_eq!(boots(1, 0), 1);
}

#[test]
fn an_explicit_size_is_used_as_it_is() {
    assert_eq!(size(100, 5), 5);
    assert_eq!(size(10, 50), 50);
    let own = PoolConfig::new(10).warm_pool_size(7);
    assert_eq!(
        own.size_of(&Profile::of(Language::Python).warm_pool_size(3)),
        3
    );
}

#[test]
fn zero_max_concurrent_vms_is_an_error() {
    let config = PoolConfig::new(0).profile(Profile::of(Language::Python));
    let Err(ConfigError::Invalid(problems)) = config.validate() else {
        panic!("accepted")
    };
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].field, "max_concurrent_vms");
}

#[test]
fn built_in_languages_round_trip_and_an_unknown_one_lists_the_known() {
    for (language, name) in [
        (Language::Python, "python"),
        (Language::Javascript, "javascript"),
        (Language::Shell, "shell"),
    ] {
        assert_eq!(language.to_string(), name);
        assert_eq!(name.parse(), Ok(language));
    }
    let message = "cobol".parse::<Language>().unwrap_err().to_string();
    assert!(
        message.contains("python") && message.contains("javascript"),
        "{message}"
    );
}

#[test]
fn the_constants_are_those_of_the_contract() {
    let config = PoolConfig::default();
    assert_eq!(config.warm_pool_percent, 25);
    assert_eq!(config.concurrent_boots_percent, 50);
    assert_eq!(config.health.interval_ms, 10_000);
    assert_eq!(config.health.attempts, 3);
    assert_eq!(
        (config.health.backoff_min_ms, config.health.backoff_max_ms),
        (100, 2_000)
    );
    assert_eq!(config.health.ping_timeout_ms, 5_000);
    assert_eq!(config.boot.connect_timeout_ms, 5_000);
    assert_eq!(config.balloon.idle_target_mib, 64);
    assert_eq!(config.balloon.timeout_ms, 5_000);
    assert_eq!(config.limits.memory_overcommit_percent, 100);
    assert_eq!(policy::warm_pool_size(7, 25), 1);
}
