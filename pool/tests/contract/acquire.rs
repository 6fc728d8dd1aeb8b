//! The contract's section "Acquire", row by row.

use std::sync::Arc;
use std::time::Duration;

use crate::support::*;
use hearth_pool::fake::{Boot, FakeBackend};
use hearth_pool::{
    AcquireError, EventKind, Language, Mismatch, Parking, Phase, PoolConfig, Profile, Replenished,
    Request, Shortage,
};
use tokio::time::{Instant, timeout};

#[tokio::test(start_paused = true)]
async fn acquire_never_waits_for_a_boot_a_ready_vm_or_a_clear_exhausted() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let gate = gated(&fake, PY);
    let lease = pool.acquire(PY).unwrap();
    let began = Instant::now();
    let Err(AcquireError::Exhausted { profile, why }) = pool.acquire(PY) else {
        panic!()
    };
    assert_eq!(profile, PY);
    assert_eq!(why, Shortage::Empty);
    settle().await;
    let error = pool.acquire(PY).unwrap_err();
    assert!(matches!(
        error,
        AcquireError::Exhausted {
            why: Shortage::Booting(1),
            ..
        }
    ));
    assert_eq!(began.elapsed(), secs(0));
    // The waiting form, with a deadline.
    let error = pool.acquire_timeout(PY, secs(3)).await.unwrap_err();
    assert!(
        matches!(
            error,
            AcquireError::Timeout {
                why: Shortage::Booting(1),
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(began.elapsed(), secs(3));
    gate.open();
    let second = pool.acquire_timeout(PY, secs(3)).await.unwrap();
    drop((lease, second));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_the_profile_cannot_serve_is_not_served_a_wrong_vm() {
    let fake = FakeBackend::new();
    let big = Profile::new("big", "python")
        .memory_mib(1024)
        .package("numpy")
        .warm_pool_size(1);
    let pool = running(&fake, config(1).profile(big)).await;
    let refused = |request: Request| match pool.acquire(request) {
        Err(AcquireError::NotEligible(why)) => why,
        other => panic!("{other:?}"),
    };
    let why = refused(Request::profile(PY).package("numpy"));
    assert_eq!(why[0].mismatches, [Mismatch::Package("numpy".into())]);
    refused(Request::profile(PY).memory_mib(512));
    refused(Request::profile(PY).image("debian"));
    refused(Request::profile(PY).vcpus(2));
    refused(Request::profile(PY).env("A", "b"));
    // Without a profile's name, all profiles are tried, and the mismatch of each is reported.
    assert_eq!(refused(Request::any().package("pandas")).len(), 2);
    assert_eq!(
        pool.acquire(Request::any().package("numpy"))
            .unwrap()
            .profile(),
        "big"
    );
    assert_eq!(pool.acquire(Language::Python).unwrap().profile(), PY);
    let Err(AcquireError::UnknownProfile { known, .. }) = pool.acquire("perl") else {
        panic!()
    };
    assert_eq!(known, [PY, "big"]);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_died_while_parked_is_never_handed_out() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(3)).await;
    for _ in 0..3 {
        pool.replenish(PY).await.unwrap();
    }
    let vms = parked(&fake);
    // No task runs between death and acquire, so only acquire itself can notice.
    vms[2].kill();
    vms[1].kill();
    let lease = pool.acquire(PY).unwrap();
    assert_eq!(lease.id(), vms[0].id());
    assert!(lease.handle().is_alive());
    assert!(matches!(
        pool.acquire(PY),
        Err(AcquireError::Exhausted { .. })
    ));
    settle().await;
    assert_eq!(fake.tally(PY).retired, 2, "the dead are destroyed");
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_vm_found_by_acquire_is_replaced() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    parked(&fake)
        .iter()
        .for_each(hearth_pool::fake::FakeVmHandle::kill);
    assert!(matches!(
        pool.acquire(PY),
        Err(AcquireError::Exhausted { .. })
    ));
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(ready(&pool), 2);
    assert!(pool.acquire(PY).unwrap().ping().await.is_ok());
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_fresh_vm_needs_is_done_when_it_is_parked_acquire_only_moves_and_resumes() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1).park(Parking::Paused)).await;
    let vm = parked(&fake).remove(0);
    assert_eq!(vm.probes(), 1, "it answered before it counted as ready");
    assert!(vm.is_paused());
    let lease = pool.acquire(PY).unwrap();
    assert!(!vm.is_paused());
    assert_eq!((vm.hand_offs(), vm.probes()), (1, 1));
    assert_eq!(lease.work(), Ok(1));
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn cancelling_an_acquire_at_any_await_point_loses_no_vm() {
    // Cancelled before it is served.
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let gate = gated(&fake, PY);
    let lease = pool.acquire(PY).unwrap();
    let cancelled = timeout(secs(1), pool.acquire_timeout(PY, secs(9))).await;
    assert!(cancelled.is_err());
    assert_eq!(counts(&pool, PY).hits, 1);
    assert_eq!(counts(&pool, PY).waiting, 0);
    gate.open();
    pool.wait_ready(secs(1)).await.unwrap();

    // Cancelled after it is served, before its next poll.
    fake.by_default(PY, Boot::Fine);
    let other = pool.acquire(PY).unwrap();
    let gate = gated(&fake, PY);
    settle().await;
    let waiting = pool.clone();
    let mut waiter = Box::pin(async move { waiting.acquire_timeout(PY, secs(9)).await.map(drop) });
    assert!(futures::poll!(&mut waiter).is_pending());
    assert_eq!(counts(&pool, PY).waiting, 1);
    gate.admit(1);
    settle().await;
    let served = counts(&pool, PY);
    assert_eq!(
        (served.waiting, served.leased),
        (0, 3),
        "its VM lies in its channel"
    );
    drop(waiter);
    settle().await;
    let after = counts(&pool, PY);
    assert_eq!(
        (after.ready, after.leased),
        (1, 2),
        "parked again, its refill given up"
    );
    assert_eq!(after.hits, 2, "and nobody was served");
    let vm = parked(&fake)
        .into_iter()
        .max_by_key(hearth_pool::fake::FakeVmHandle::id)
        .unwrap();
    assert_eq!(vm.hand_offs(), 0);
    assert_eq!(
        pool.acquire(PY).unwrap().id(),
        vm.id(),
        "an untouched VM is as good as new"
    );
    drop((lease, other));
    gate.open();
    stop_clean(pool, &fake).await;
    let tally = fake.tally(PY);
    assert_eq!(tally.created, tally.retired + tally.dropped);
}

/// Polls an acquire `polls` times, serves it before poll `served_before`, then drops it.
#[tokio::test(start_paused = true)]
async fn an_acquire_that_is_dropped_after_any_number_of_polls_leaves_the_counts_right() {
    for polls in 0..5 {
        for served_before in 0..=polls {
            let fake = FakeBackend::new();
            let pool = by_hand(&fake, config(1)).await;
            let waiting = pool.clone();
            let mut waiter = Box::pin(async move { waiting.acquire_timeout(PY, secs(9)).await });
            let mut lease = None;
            for poll in 0..polls {
                if poll == served_before {
                    pool.replenish(PY).await.unwrap();
                }
                if let std::task::Poll::Ready(served) = futures::poll!(&mut waiter) {
                    lease = Some(served.unwrap());
                    break;
                }
            }
            let served = lease.is_some();
            assert_eq!(served, served_before < polls, "{polls}, {served_before}");
            if !served {
                // The VM is in the waiter's channel, or parked if the acquire has never been
                // polled.
                pool.replenish(PY).await.unwrap();
            }
            drop((waiter, lease));
            settle().await;
            let (now, kept) = (counts(&pool, PY), usize::from(!served));
            assert_eq!((now.ready, now.leased, now.waiting), (kept, 0, 0));
            assert_eq!((now.hits, fake.live().len()), (u64::from(served), kept));
            stop_clean(pool, &fake).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn waiters_are_served_in_the_order_in_which_they_came_and_nobody_overtakes() {
    let fake = FakeBackend::new();
    let gate = gated(&fake, PY);
    let pool = by_hand(&fake, config(2)).await;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut waiters = Vec::new();
    for index in 0..4 {
        let (pool, order) = (pool.clone(), Arc::clone(&order));
        waiters.push(tokio::spawn(async move {
            let lease = pool.acquire_timeout(PY, secs(60)).await.unwrap();
            order.lock().unwrap().push(index);
            lease
        }));
        settle().await;
    }
    // A waiter in the middle is cancelled.
    waiters.remove(1).abort();
    gate.open();
    for _ in 0..3 {
        assert!(matches!(
            pool.replenish(PY).await.unwrap(),
            Replenished::Booted(_)
        ));
        let newcomer = pool.acquire(PY);
        settle().await;
        assert!(newcomer.is_err(), "served before those who wait");
    }
    assert_eq!(*order.lock().unwrap(), [0, 2, 3]);
    for waiter in waiters {
        drop(waiter.await.unwrap());
    }
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_dies_on_its_way_to_a_waiter_is_not_handed_out() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(1)).await;
    let waiting = pool.clone();
    let mut waiter = Box::pin(async move { waiting.acquire_timeout(PY, secs(9)).await });
    assert!(futures::poll!(&mut waiter).is_pending());
    pool.replenish(PY).await.unwrap();
    let first = parked(&fake).remove(0);
    first.kill();
    assert!(
        futures::poll!(&mut waiter).is_pending(),
        "the dead one is refused"
    );
    settle().await;
    assert_eq!(counts(&pool, PY).waiting, 1);
    pool.replenish(PY).await.unwrap();
    let lease = waiter.await.unwrap();
    assert_ne!(lease.id(), first.id());
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_dies_on_its_way_to_a_waiter_that_goes_away_is_not_parked() {
    let fake = FakeBackend::new();
    let config = PoolConfig::new(1)
        .profile(Profile::new(PY, PY).warm_pool_size(1))
        .health(quiet());
    let pool = running(&fake, config).await;
    let lease = pool.acquire(PY).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    let parked_vm = parked(&fake).remove(1);
    // It waits for the one lease to end, although a VM is parked.
    let waiting = pool.clone();
    let mut waiter = Box::pin(async move { waiting.acquire_timeout(PY, secs(9)).await.map(drop) });
    assert!(futures::poll!(&mut waiter).is_pending());
    drop(lease);
    settle().await;
    let now = counts(&pool, PY);
    assert_eq!((now.waiting, now.leased), (0, 1), "it lies in its channel");
    let mut events = pool.subscribe();
    parked_vm.kill();
    settle().await;
    drop(waiter);
    settle().await;
    assert!(fake.vm(parked_vm.id()).is_none(), "destroyed");
    let mut died = 0;
    while let Ok(event) = events.try_recv() {
        died += usize::from(matches!(event.kind, EventKind::Ended));
    }
    assert_eq!(died, 1, "and told");
    pool.wait_ready(secs(1)).await.unwrap();
    assert!(pool.acquire(PY).unwrap().work().is_ok());
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn waiters_whose_vms_die_on_the_way_keep_their_order() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(2)).await;
    let wait = || {
        let pool = pool.clone();
        Box::pin(async move { pool.acquire_timeout(PY, secs(9)).await })
    };
    let (mut first, mut second) = (wait(), wait());
    assert!(futures::poll!(&mut first).is_pending());
    assert!(futures::poll!(&mut second).is_pending());
    for _ in 0..2 {
        pool.replenish(PY).await.unwrap();
    }
    parked(&fake)
        .iter()
        .for_each(hearth_pool::fake::FakeVmHandle::kill);
    // Each finds its own VM dead and waits again; neither moves to the head of the queue.
    assert!(futures::poll!(&mut first).is_pending());
    assert!(futures::poll!(&mut second).is_pending());
    settle().await;
    pool.replenish(PY).await.unwrap();
    assert!(futures::poll!(&mut second).is_pending(), "it came second");
    drop(first.await.unwrap());
    pool.replenish(PY).await.unwrap();
    drop(second.await.unwrap());
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_served_whole_or_not_at_all() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(4)).await;
    let gate = gated(&fake, PY);
    assert!(matches!(
        pool.acquire_many(PY, 5),
        Err(AcquireError::Exhausted { .. })
    ));
    assert_eq!(ready(&pool), 4, "nothing was taken");
    parked(&fake)[1].kill();
    assert!(matches!(
        pool.acquire_many(PY, 4),
        Err(AcquireError::Exhausted { .. })
    ));
    let leases = pool.acquire_many(PY, 3).unwrap();
    assert!(leases.iter().all(|lease| lease.work() == Ok(1)));
    assert!(pool.acquire_many(PY, 0).unwrap().is_empty());
    drop(leases);
    gate.open();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_beyond_max_concurrent_vms_is_refused_whole() {
    let fake = FakeBackend::new();
    let config = PoolConfig::new(3)
        .profile(Profile::new(PY, PY).warm_pool_size(4))
        .health(quiet());
    let pool = running(&fake, config).await;
    let refused = |count| {
        let refused = pool.acquire_many(PY, count).unwrap_err();
        let AcquireError::Exhausted { why, .. } = refused else {
            panic!("{refused}")
        };
        assert_eq!(why, Shortage::LeaseLimit(3));
        assert_eq!(ready(&pool), 4, "nothing was taken");
    };
    refused(4);
    let one = pool.acquire(PY).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    refused(3);
    let two = pool.acquire_many(PY, 2).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    refused(1);
    let now = counts(&pool, PY);
    assert_eq!((now.hits, now.misses), (3, 0), "all were there to be had");
    drop(two);
    assert_eq!(pool.acquire_many(PY, 2).unwrap().len(), 2);
    drop(one);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn max_concurrent_vms_bounds_leases_over_all_profiles() {
    let fake = FakeBackend::new();
    let config = PoolConfig::new(2)
        .profile(Profile::new(PY, PY).warm_pool_size(2))
        .profile(Profile::new(JS, JS).warm_pool_size(2))
        .health(quiet());
    let pool = running(&fake, config).await;
    let (python, javascript) = (pool.acquire(PY).unwrap(), pool.acquire(JS).unwrap());
    let error = pool.acquire(PY).unwrap_err();
    assert!(matches!(
        error,
        AcquireError::Exhausted {
            why: Shortage::LeaseLimit(2),
            ..
        }
    ));
    assert_eq!(counts(&pool, PY).ready + counts(&pool, PY).booting, 1);
    // A lease that becomes free goes to the longest waiter, of either profile.
    let waiting = pool.clone();
    let first = tokio::spawn(async move { waiting.acquire_timeout(JS, secs(9)).await });
    settle().await;
    let waiting = pool.clone();
    let second = tokio::spawn(async move { waiting.acquire_timeout(PY, secs(9)).await });
    settle().await;
    drop(python);
    let first = first.await.unwrap().unwrap();
    settle().await;
    assert!(!second.is_finished());
    drop(javascript);
    let second = second.await.unwrap().unwrap();
    assert_eq!((first.profile(), second.profile()), (JS, PY));
    drop((first, second));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn patience_without_end_is_fine() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(1)).await;
    let waiting = pool.clone();
    let waiter = tokio::spawn(async move { waiting.acquire_timeout(PY, Duration::MAX).await });
    settle().await;
    pool.replenish(PY).await.unwrap();
    let lease = waiter.await.unwrap().unwrap();
    let stopping = pool.clone();
    let stop = tokio::spawn(async move { stopping.stop_within(Duration::MAX).await });
    settle().await;
    drop(lease);
    stop.await.unwrap();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_handed_out_before_the_start_or_after_the_stop() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(1));
    assert!(matches!(pool.acquire(PY), Err(AcquireError::NotStarted)));
    let error = pool.acquire_timeout(PY, secs(1)).await.unwrap_err();
    assert!(matches!(error, AcquireError::NotStarted));
    pool.start().await.unwrap();
    assert!(pool.acquire(PY).is_ok());
    pool.stop().await;
    assert_eq!(pool.status().phase, Phase::Stopped);
    assert!(pool.acquire(PY).is_err());
}

#[tokio::test(start_paused = true)]
async fn at_the_lease_limit_who_waits_is_served_before_newcomers_of_other_profiles() {
    let fake = FakeBackend::new();
    let config = PoolConfig::new(1)
        .profile(Profile::new(PY, PY).warm_pool_size(2))
        .profile(Profile::new(JS, JS).warm_pool_size(2))
        .health(quiet());
    let pool = running(&fake, config).await;
    for _ in 0..100 {
        pool.wait_ready(secs(1)).await.unwrap();
        let held = pool.acquire(PY).unwrap();
        let (other, wait) = (pool.clone(), secs(1));
        let waiting = tokio::spawn(async move { other.acquire_timeout(JS, wait).await });
        settle().await;
        assert_eq!(counts(&pool, JS).waiting, 1);
        drop(held);
        // The pool's loop has not run since then.
        let newcomer = pool.acquire(PY).map(|lease| lease.id());
        let full = Shortage::LeaseLimit(1);
        assert!(
            matches!(&newcomer, Err(AcquireError::Exhausted { why, .. }) if *why == full),
            "{newcomer:?}"
        );
        assert_eq!(waiting.await.unwrap().unwrap().profile(), JS);
    }
    stop_clean(pool, &fake).await;
}
