//! Leases, from the hand-off to their end.

use crate::support::*;
use hearth_pool::config::LeaseConfig;
use hearth_pool::fake::{FakeBackend, FakeVmError};
use hearth_pool::{EventKind, PoolConfig, Profile};

#[tokio::test(start_paused = true)]
async fn each_vm_is_used_once_a_returned_lease_destroys_it_and_triggers_replenishment() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let lease = pool.acquire(PY).unwrap();
    let id = lease.id();
    lease.release().await;
    assert!(
        fake.vm(id).is_none(),
        "release resolves when it is destroyed"
    );
    let dropped = pool.acquire(PY).unwrap();
    let second = dropped.id();
    drop(dropped);
    assert!(fake.vm(second).is_some(), "drop only sends");
    settle().await;
    assert!(fake.vm(second).is_none());
    pool.wait_ready(secs(1)).await.unwrap();
    let tally = fake.tally(PY);
    assert_eq!((tally.created, tally.retired, tally.dropped), (4, 2, 0));
    assert!(
        parked(&fake)
            .iter()
            .all(|vm| vm.id() != id && vm.id() != second)
    );
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn destruction_is_off_the_callers_path() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let gate = hearth_pool::fake::Gate::new();
    fake.gate_retire(Some(gate.clone()));
    let lease = pool.acquire(PY).unwrap();
    drop(lease);
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(
        counts(&pool, PY).retiring,
        1,
        "refilled while the old one is still being destroyed"
    );
    assert!(pool.acquire(PY).is_ok());
    gate.open();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_dropped_off_the_runtime_comes_home() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let lease = pool.acquire(PY).unwrap();
    std::thread::spawn(move || drop(lease)).join().unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(fake.tally(PY).retired, 1);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn lease_ping_gives_the_verdict_of_the_pools_own_check() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let lease = pool.acquire(PY).unwrap();
    assert!(lease.ping().await.is_ok());
    lease.handle().script_pings([hearth_pool::fake::Ping::Lost]);
    assert!(lease.ping().await.is_ok(), "one lost ping is not death");
    lease.handle().kill();
    for _ in 0..5 {
        assert!(
            lease.ping().await.is_err(),
            "false, every time, once killed"
        );
    }
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn into_inner_takes_the_vm_out_and_its_reservation_lives_as_long() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let (vm, reservation) = pool.acquire(PY).unwrap().into_inner();
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(pool.status().leased, 0);
    assert_eq!(pool.status().usage.vms, 2, "still counted");
    pool.stop().await;
    assert!(vm.handle().is_alive(), "the caller's for good");
    assert_eq!(pool.status().usage.vms, 1);
    drop((vm, reservation));
    assert_eq!(pool.status().usage.vms, 0);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_was_taken_out_is_its_owners_in_the_same_moment() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let (vm, reservation) = pool.acquire(PY).unwrap().into_inner();
    assert_eq!(pool.status().leased, 0);
    pool.stop_within(secs(0)).await;
    assert!(vm.handle().is_alive(), "stop has nothing to do with it");
    drop((vm, reservation));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_was_dropped_is_free_for_others_in_the_same_moment() {
    let fake = FakeBackend::new();
    let config = PoolConfig::new(1)
        .profile(Profile::new(PY, PY).warm_pool_size(2))
        .health(quiet());
    let pool = running(&fake, config).await;
    for _ in 0..2 {
        drop(pool.acquire(PY).expect("one lease at a time is allowed"));
    }
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_beyond_its_deadline_or_idle_for_too_long_is_ended() {
    let fake = FakeBackend::new();
    let mut limits = LeaseConfig::default();
    limits.deadline_ms = 60_000;
    limits.idle_ms = 10_000;
    let pool = running(&fake, config(2).lease(limits)).await;
    let mut events = pool.subscribe();
    let busy = pool.acquire(PY).unwrap();
    let idle = pool.acquire(PY).unwrap();
    for _ in 0..11 {
        tokio::time::sleep(secs(5)).await;
        assert!(busy.work().is_ok());
    }
    assert_eq!(idle.work(), Err(FakeVmError::Ended));
    tokio::time::sleep(secs(6)).await;
    assert_eq!(
        busy.work(),
        Err(FakeVmError::Ended),
        "used or not, a minute is enough"
    );
    let mut overdue = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let EventKind::Overdue(why) = event.kind {
            overdue.push((event.vm.unwrap(), why));
        }
    }
    let expected = [
        (idle.id(), hearth_pool::Overdue::Idle),
        (busy.id(), hearth_pool::Overdue::Deadline),
    ];
    assert_eq!(overdue, expected);
    drop((busy, idle));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_never_used_is_ended_after_one_idle_time() {
    let fake = FakeBackend::new();
    let mut limits = LeaseConfig::default();
    limits.idle_ms = 10_000;
    let pool = running(&fake, config(1).lease(limits)).await;
    let idle = pool.acquire(PY).unwrap();
    tokio::time::sleep(secs(9)).await;
    assert!(idle.handle().is_alive());
    tokio::time::sleep(secs(2)).await;
    assert!(!idle.handle().is_alive());
    drop(idle);
    stop_clean(pool, &fake).await;
}
