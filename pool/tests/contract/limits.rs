//! Limits on the resources of the host that all profiles take together.

use crate::support::*;
use hearth_pool::fake::{Boot, FakeBackend, FakeHost};
use hearth_pool::{
    AcquireError, BootFailure, Denial, Pool, PoolConfig, Profile, Refill, Replenished, Shortage,
    StartError,
};
use tokio::time::sleep;

#[tokio::test(start_paused = true)]
async fn the_limits_on_vcpus_and_on_memory_bound_everything_that_lives_too() {
    for by_vcpus in [true, false] {
        let fake = FakeBackend::new();
        let profile = Profile::new(PY, PY)
            .warm_pool_size(2)
            .vcpus(2)
            .memory_mib(100);
        let mut config = PoolConfig::new(100).profile(profile).health(quiet());
        if by_vcpus {
            config.limits.vcpus = 7;
        } else {
            config.limits.memory_mib = 399;
        }
        let pool = running(&fake, config).await;
        let leases = pool.acquire_many(PY, 2).unwrap();
        settle().await;
        assert_eq!((ready(&pool), fake.live().len()), (1, 3));
        let denied = pool.replenish(PY).await.unwrap();
        let Replenished::Failed(BootFailure::Denied(denial)) = denied else {
            panic!("{denied:?}")
        };
        let expected = if by_vcpus {
            Denial::Vcpus(7)
        } else {
            Denial::Memory(399)
        };
        assert_eq!(denial, expected);
        drop(leases);
        pool.wait_ready(secs(1)).await.unwrap();
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn under_limits_a_profile_with_waiting_callers_boots_before_anothers_stock() {
    let fake = FakeBackend::new();
    let mut config = config(1).profile(Profile::new(JS, JS).warm_pool_size(1));
    config.limits.vms = 2;
    let pool = running(&fake, config).await;
    let (python, javascript) = (pool.acquire(PY).unwrap(), pool.acquire(JS).unwrap());
    settle().await;
    assert!(matches!(
        pool.acquire(JS),
        Err(AcquireError::Exhausted {
            why: Shortage::HostLimits,
            ..
        })
    ));
    let waiting = pool.clone();
    let waiter = tokio::spawn(async move { waiting.acquire_timeout(JS, secs(9)).await });
    settle().await;
    drop(python);
    let served = waiter.await.unwrap().unwrap();
    assert_eq!(served.profile(), JS);
    assert_eq!(counts(&pool, PY).ready, 0, "stock came second");
    drop((javascript, served));
    pool.wait_ready(secs(1)).await.unwrap();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn the_limits_bound_everything_that_lives() {
    let fake = FakeBackend::new();
    let mut config = config(2);
    config.limits.vms = 3;
    let pool = running(&fake, config).await;
    let leases = pool.acquire_many(PY, 2).unwrap();
    settle().await;
    assert_eq!(ready(&pool), 1, "three live, and no more");
    assert_eq!(fake.live().len(), 3);
    let denied = pool.replenish(PY).await.unwrap();
    assert!(
        matches!(denied, Replenished::Failed(BootFailure::Denied(_))),
        "{denied:?}"
    );
    drop(leases);
    pool.wait_ready(secs(1)).await.unwrap();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn memory_pressure_stops_refill_but_not_boots_for_waiting_callers() {
    let fake = FakeBackend::new();
    let host = FakeHost::new(Some(100_000));
    let pool = Pool::with_host(fake.clone(), config(2), host.clone()).unwrap();
    pool.start().await.unwrap();
    sleep(secs(2)).await;
    host.stall(55.0);
    drop(pool.acquire_many(PY, 2).unwrap());
    sleep(secs(30)).await;
    assert_eq!((ready(&pool), fake.tally(PY).boots), (0, 2));
    assert!(pool.status().memory_pressure);
    let lease = pool.acquire_timeout(PY, secs(5)).await.unwrap();
    assert_eq!(fake.tally(PY).boots, 3);
    host.stall(0.5);
    pool.wait_ready(secs(3)).await.unwrap();
    assert!(!pool.status().memory_pressure);
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn memory_pressure_refuses_replenish_by_hand_but_not_for_waiting_callers() {
    let fake = FakeBackend::new();
    let host = FakeHost::new(Some(100_000));
    let config = config(2).refill(Refill::Manual);
    let pool = Pool::with_host(fake.clone(), config, host.clone()).unwrap();
    pool.start().await.unwrap();
    let replenish = async || pool.replenish(PY).await.unwrap();
    assert!(matches!(replenish().await, Replenished::Booted(_)));
    sleep(secs(2)).await;
    host.stall(55.0);
    let calls = (0..3).map(|_| pool.replenish(PY));
    for refused in futures::future::join_all(calls).await {
        let Ok(Replenished::Failed(why @ BootFailure::MemoryPressure)) = refused else {
            panic!("{refused:?}")
        };
        assert!(why.to_string().contains("pressure.stall_percent"), "{why}");
    }
    let now = counts(&pool, PY);
    assert_eq!((now.boots, now.boot_failures, now.booting), (1, 0, 0));
    assert!(!now.breaker_open, "nothing was tried");
    // Existing VMs are served, adopted and checked as usual.
    pool.offer(PY, fake.make(PY)).await.unwrap();
    assert_eq!(pool.check(PY, 2).await.unwrap().healthy, 2);
    assert!(matches!(replenish().await, Replenished::Full));
    let leases = pool.acquire_many(PY, 2).unwrap();
    let waiting = pool.clone();
    let waiter = tokio::spawn(async move { waiting.acquire_timeout(PY, secs(9)).await });
    settle().await;
    assert!(matches!(replenish().await, Replenished::Booted(_)));
    drop((leases, waiter.await.unwrap().unwrap()));
    host.stall(0.5);
    sleep(secs(2)).await;
    assert!(matches!(replenish().await, Replenished::Booted(_)));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn memory_pressure_refuses_a_start_before_it_makes_anything() {
    for refill in [Refill::Automatic, Refill::Manual] {
        let fake = FakeBackend::new();
        let host = FakeHost::new(Some(100_000));
        host.stall(55.0);
        fake.script_prepare(PY, [Boot::Panic]);
        let config = config(2).refill(refill);
        let pool = Pool::with_host(fake.clone(), config, host.clone()).unwrap();
        let error = pool.start().await.unwrap_err();
        let StartError::NoVm(report) = &error else {
            panic!("{error}")
        };
        let failure = &report.profiles[0].failures[0];
        assert!(matches!(failure.why, BootFailure::MemoryPressure));
        assert!(error.to_string().contains("short of memory"), "{error}");
        assert_eq!(fake.tally(PY).boots, 0);
        fake.script_prepare(PY, [Boot::Fine]);
        host.stall(0.0);
        // Not even the preparation was begun: its panic comes only now.
        assert!(pool.start().await.is_err());
        pool.start().await.unwrap();
        stop_clean(pool, &fake).await;
    }
}

/// VMs from before the pressure are kept; the rest are booted after it.
#[tokio::test(start_paused = true)]
async fn memory_pressure_in_the_middle_of_a_start_holds_what_is_left_of_it() {
    let fake = FakeBackend::new();
    let host = FakeHost::new(Some(100_000));
    fake.by_default(PY, Boot::After(secs(3)));
    let pool = Pool::with_host(fake.clone(), config(4), host.clone()).unwrap();
    let starting = pool.clone();
    let start = tokio::spawn(async move { starting.start().await });
    sleep(secs(1)).await;
    host.stall(55.0);
    let report = start.await.unwrap().unwrap();
    let python = &report.profiles[0];
    assert_eq!((python.wanted, python.booted), (4, 2));
    let held = python.failures.iter().map(|failure| &failure.why);
    let held = held.filter(|why| matches!(why, BootFailure::MemoryPressure));
    assert_eq!(held.count(), 2);
    sleep(secs(60)).await;
    assert_eq!(fake.tally(PY).boots, 2);
    host.stall(0.0);
    pool.wait_ready(secs(10)).await.unwrap();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn memory_pressure_is_looked_at_before_the_dead_that_a_caller_finds_are_replaced() {
    let fake = FakeBackend::new();
    let host = FakeHost::new(Some(100_000));
    let pool = Pool::with_host(fake.clone(), config(2), host.clone()).unwrap();
    pool.start().await.unwrap();
    sleep(secs(60)).await;
    host.stall(55.0);
    parked(&fake)
        .iter()
        .for_each(hearth_pool::fake::FakeVmHandle::kill);
    assert!(pool.acquire(PY).is_err());
    sleep(secs(30)).await;
    assert_eq!((ready(&pool), fake.tally(PY).boots), (0, 2));
    host.stall(0.0);
    pool.wait_ready(secs(3)).await.unwrap();
    stop_clean(pool, &fake).await;
}
