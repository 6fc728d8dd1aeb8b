//! Sizes that change while a pool runs: by a call, by a drain, by demand.

use crate::support::*;
use hearth_pool::fake::{FakeBackend, Gate, Ping};
use hearth_pool::{AcquireError, Denial, PoolConfig, Profile, Replenished, ResizeError, Shortage};
use tokio::time::sleep;

#[tokio::test(start_paused = true)]
async fn a_resize_takes_effect_at_once_and_never_over_boots() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    pool.resize(PY, 6).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(ready(&pool), 6);
    let proven_last = parked(&fake).last().unwrap().id();
    pool.resize(PY, 1).unwrap();
    assert_eq!(ready(&pool), 1);
    settle().await;
    assert_eq!(parked(&fake)[0].id(), proven_last);
    // Shrinking cancels boots.
    let gate = gated(&fake, PY);
    pool.resize(PY, 4).unwrap();
    gate.held(2).await;
    pool.resize(PY, 1).unwrap();
    settle().await;
    assert_eq!((ready(&pool), fake.tally(PY).booting), (1, 0));
    assert!(pool.resize("perl", 1).is_err());
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_resize_that_cannot_fit_into_the_limits_is_an_error() {
    let fake = FakeBackend::new();
    let scaled = Profile::new(JS, JS)
        .warm_pool_size(1)
        .autoscale(hearth_pool::Autoscale::between(1, 3));
    let mut config = config(2).profile(scaled);
    config.limits.vms = 6;
    let pool = running(&fake, config).await;
    let error = pool.resize(PY, 4).unwrap_err();
    assert!(
        matches!(error, ResizeError::TooLarge(Denial::Vms(6))),
        "{error}"
    );
    assert_eq!(counts(&pool, PY).size, 2);
    pool.resize(PY, 3).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(ready(&pool), 3);
    let error = pool.resize("perl", 1).unwrap_err();
    assert!(matches!(error, ResizeError::UnknownProfile(_)));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_drained_profile_is_empty_until_it_is_undrained() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let lease = pool.acquire(PY).unwrap();
    assert_eq!(pool.drain(PY, secs(3)).await, Ok(1));
    assert!(matches!(pool.acquire(PY), Err(AcquireError::Draining(_))));
    assert!(matches!(
        pool.acquire_timeout(PY, secs(1)).await,
        Err(AcquireError::Draining(_))
    ));
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Full
    ));
    drop(lease);
    assert_eq!(pool.drain(PY, secs(3)).await, Ok(0));
    assert!(fake.live().is_empty());
    pool.undrain(PY).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    assert!(pool.acquire(PY).is_ok());
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_boots_that_were_given_up() {
    let fake = FakeBackend::new();
    let gate = Gate::new();
    // The boot is cancelled while its VM is being proved, and the VM takes long to destroy.
    fake.script_pings(PY, [Ping::Gate(Gate::new())]);
    fake.gate_retire(Some(gate.clone()));
    let pool = by_hand(&fake, config(1)).await;
    let other = pool.clone();
    let boot = tokio::spawn(async move { other.replenish(PY).await });
    settle().await;
    let mut drain = Box::pin(pool.drain(PY, secs(60)));
    assert!(futures::poll!(&mut drain).is_pending(), "its VM lives");
    settle().await;
    assert!(futures::poll!(&mut drain).is_pending(), "and still does");
    gate.open();
    assert_eq!(drain.await, Ok(0));
    assert_eq!(fake.tally(PY).live, 0);
    assert!(matches!(boot.await.unwrap().unwrap(), Replenished::Full));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn callers_that_more_stock_would_not_have_helped_are_no_demand() {
    let fake = FakeBackend::new();
    let scale = hearth_pool::Autoscale::between(1, 8).window(secs(10));
    let profile = Profile::new(PY, PY).warm_pool_size(2).autoscale(scale);
    let config = PoolConfig::new(2).profile(profile).health(quiet());
    let pool = running(&fake, config).await;
    let leases = pool.acquire_many(PY, 2).unwrap();
    settle().await;
    for _ in 0..5 {
        let refused = pool.acquire(PY).unwrap_err();
        let why = Shortage::LeaseLimit(2);
        assert!(matches!(refused, AcquireError::Exhausted { why: w, .. } if w == why));
    }
    assert_eq!(counts(&pool, PY).misses, 0, "two were ready all the time");
    drop(leases);
    pool.drain(PY, secs(1)).await.unwrap();
    assert!(pool.acquire(PY).is_err());
    pool.undrain(PY).unwrap();
    assert_eq!(counts(&pool, PY).misses, 0);
    sleep(secs(11)).await;
    assert!(counts(&pool, PY).size <= 2);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_that_misses_asks_for_as_many_as_it_missed() {
    let fake = FakeBackend::new();
    let scale = hearth_pool::Autoscale::between(1, 50).window(secs(10));
    let profile = Profile::new(PY, PY).warm_pool_size(16).autoscale(scale);
    let pool = running(&fake, PoolConfig::new(100).profile(profile).health(quiet())).await;
    assert!(pool.acquire_many(PY, 32).is_err());
    sleep(secs(11)).await;
    assert_eq!(counts(&pool, PY).size, 32);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn demand_moves_the_size_between_its_bounds() {
    let fake = FakeBackend::new();
    let scale = hearth_pool::Autoscale::between(1, 4).window(secs(10));
    let profile = Profile::new(PY, PY).warm_pool_size(1).autoscale(scale);
    let pool = running(&fake, PoolConfig::new(100).profile(profile).health(quiet())).await;
    let lease = pool.acquire(PY).unwrap();
    for _ in 0..3 {
        // No task runs in between, so all three miss.
        assert!(pool.acquire(PY).is_err());
    }
    sleep(secs(11)).await;
    assert_eq!(
        (counts(&pool, PY).size, ready(&pool)),
        (2, 2),
        "twice the size at most"
    );
    sleep(secs(11)).await;
    assert_eq!(counts(&pool, PY).size, 1, "what nobody needs is given back");
    drop(lease);
    stop_clean(pool, &fake).await;
}
