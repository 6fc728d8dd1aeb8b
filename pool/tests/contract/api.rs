//! The API as an embedding program uses it: this compiles outside of the crate.

use std::error::Error;
use std::fmt::Debug;

use crate::support::*;
use hearth_pool::config::{
    BalloonConfig, BootConfig, HealthConfig, LeaseConfig, LimitsConfig, PressureConfig,
};
use hearth_pool::fake::{FakeBackend, FakeVm, Method};
use hearth_pool::{AcquireError, OfferError, OfferRefusal, Pool, Request, Shortage};

#[tokio::test(start_paused = true)]
async fn a_profile_is_named_by_whatever_holds_a_name() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(3)).await;
    let name = String::from(PY);
    drop(pool.acquire(&name).unwrap());
    drop(pool.acquire(name.clone()).unwrap());
    drop(pool.acquire_timeout(name, secs(1)).await.unwrap());
    stop_clean(pool, &fake).await;
}

#[test]
fn a_section_is_written_with_what_is_not_as_usual() {
    let health = HealthConfig {
        attempts: 7,
        ..Default::default()
    };
    let boot = BootConfig {
        timeout_ms: 7,
        ..Default::default()
    };
    let balloon = BalloonConfig {
        timeout_ms: 7,
        ..Default::default()
    };
    let limits = LimitsConfig {
        vms: 7,
        ..Default::default()
    };
    let pressure = PressureConfig {
        recheck_ms: 7,
        ..Default::default()
    };
    let lease = LeaseConfig {
        idle_ms: 7,
        ..Default::default()
    };
    let mut config = config(1)
        .health(health)
        .boot(boot)
        .lease(lease)
        .limits(limits);
    (config.balloon, config.pressure) = (balloon, pressure);
    config.validate().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_refused_offer_is_an_error_with_its_cause() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let error: OfferError<FakeVm> = pool.offer(PY, fake.make(PY)).await.unwrap_err();
    assert!(error.vm.is_some());
    let error: Box<dyn Error> = error.into();
    let cause = error.source().unwrap().downcast_ref();
    assert!(matches!(cause, Some(OfferRefusal::Full)));
    drop(error);
    stop_clean(pool, &fake).await;
}

fn prints(_: &impl Debug) {}

#[test]
fn pools_and_backends_can_be_part_of_what_is_printed() {
    #[derive(Debug)]
    #[allow(dead_code, reason = "it is printed")]
    struct Service(Pool<FakeBackend>);
    let service = Service(make(&FakeBackend::new(), config(1)));
    assert!(format!("{service:?}").contains(PY));
    #[cfg(feature = "kvm")]
    {
        let _: fn(&hearth_pool::kvm::KvmBackend) = prints;
        let _: fn(&hearth_pool::kvm::KvmBackendBuilder) = prints;
    }
    prints(&service);
}

#[cfg(feature = "kvm")]
#[test]
fn a_pool_whose_backend_was_made_for_another_configuration_is_refused() {
    use hearth_pool::kvm::KvmBackend;
    let made_for = config(1);
    let Ok(builder) = KvmBackend::builder(&made_for) else {
        return hearth_tests::not_measured("there is no KVM");
    };
    let backend = std::sync::Arc::new(builder.build());
    assert!(Pool::new(backend.clone(), config(2)).is_ok());
    let mut other = config(2);
    other.boot.timeout_ms += 1;
    other.balloon.idle_target_mib += 1;
    let error = Pool::new(backend, other).unwrap_err();
    let fields: Vec<_> = error.problems().iter().map(|p| p.field.as_str()).collect();
    assert_eq!(fields, ["boot.timeout_ms", "balloon.idle_target_mib"]);
}

#[tokio::test(start_paused = true)]
async fn a_request_for_any_profile_is_served_by_whichever_has_a_vm() {
    let fake = FakeBackend::new();
    let config = config(1).profile(hearth_pool::Profile::new(JS, JS).warm_pool_size(1));
    let pool = running(&fake, config).await;
    gated(&fake, PY);
    let gate = gated(&fake, JS);
    let first = pool.acquire(Request::any()).unwrap();
    let second = pool.acquire(Request::any()).unwrap();
    assert_eq!((first.profile(), second.profile()), (PY, JS));
    assert!(pool.acquire(Request::any()).is_err());
    assert!(pool.acquire_many(Request::any(), 1).is_err());
    let waiting = pool.clone();
    let waiting =
        tokio::spawn(async move { waiting.acquire_timeout(Request::any(), secs(60)).await });
    settle().await;
    assert_eq!(
        (counts(&pool, PY).waiting, counts(&pool, JS).waiting),
        (1, 1)
    );
    // One of the two profiles is emptied: the other may still serve.
    pool.resize(PY, 0).unwrap();
    settle().await;
    gate.open();
    let third = waiting.await.unwrap().unwrap();
    assert_eq!(third.profile(), JS);
    assert_eq!(
        (counts(&pool, PY).waiting, counts(&pool, JS).waiting),
        (0, 0)
    );
    drop((first, second, third));
    stop_clean(pool, &fake).await;
}

/// Regression: the request went on waiting in one profile only, and was refused when that was
/// drained.
#[tokio::test(start_paused = true)]
async fn who_waits_for_any_profile_still_does_when_what_it_is_served_proves_dead() {
    let fake = FakeBackend::new();
    let config = config(1).profile(hearth_pool::Profile::new(JS, JS).warm_pool_size(1));
    let pool = running(&fake, config).await;
    let [first, second] = [PY, JS].map(|profile| gated(&fake, profile));
    let taken = [PY, JS].map(|profile| pool.acquire(profile).unwrap());
    let waiting = pool.clone();
    let waiting =
        tokio::spawn(async move { waiting.acquire_timeout(Request::any(), secs(60)).await });
    settle().await;
    // The check whether the VM for this request is alive panics.
    fake.panic_in(Method::Alive);
    first.admit(1);
    settle().await;
    let waits = || [PY, JS].map(|profile| counts(&pool, profile).waiting);
    assert_eq!((fake.tally(PY).created, waits()), (2, [1, 1]));
    assert_eq!(pool.drain(PY, millis(1)).await.unwrap(), 1);
    assert_eq!(waits(), [0, 1]);
    second.open();
    let lease = waiting.await.unwrap().unwrap();
    assert_eq!((lease.profile(), waits()), (JS, [0, 0]));
    drop((lease, taken));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_profile_that_is_resized_to_nothing_is_told() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    gated(&fake, PY);
    let lease = pool.acquire(PY).unwrap();
    let waiting = pool.clone();
    let waiting = tokio::spawn(async move { waiting.acquire_timeout(PY, secs(600)).await });
    settle().await;
    pool.resize(PY, 0).unwrap();
    settle().await;
    assert!(waiting.is_finished());
    let later = pool.acquire_timeout(PY, secs(600)).await;
    for refused in [waiting.await.unwrap(), later, pool.acquire(PY)] {
        let refused = refused.unwrap_err();
        assert!(
            matches!(
                &refused,
                AcquireError::Exhausted {
                    why: Shortage::NoSize,
                    ..
                }
            ),
            "{refused}"
        );
    }
    drop(lease);
    stop_clean(pool, &fake).await;
}
