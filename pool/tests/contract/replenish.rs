//! The contract's section "Replenish", row by row.

use crate::support::*;
use futures::future::join_all;
use hearth_pool::fake::{Boot, FakeBackend, Gate, Ping};
use hearth_pool::{
    AcquireError, BootFailure, EventKind, Pool, PoolConfig, Profile, Replenished, Shortage,
};
use tokio::time::{Instant, sleep, timeout};

fn booted(results: &[Replenished]) -> usize {
    results
        .iter()
        .filter(|result| matches!(result, Replenished::Booted(_)))
        .count()
}

fn full(results: &[Replenished]) -> usize {
    results
        .iter()
        .filter(|result| matches!(result, Replenished::Full))
        .count()
}

async fn calls(pool: &Pool<FakeBackend>, count: usize) -> Vec<Replenished> {
    join_all((0..count).map(|_| async { pool.replenish(PY).await.unwrap() })).await
}

#[tokio::test(start_paused = true)]
async fn replenish_resolves_after_at_most_one_boot_and_never_raises() {
    let fake = FakeBackend::new();
    fake.script(
        PY,
        [
            Boot::Fail("no disk"),
            Boot::Panic,
            Boot::Hang,
            Boot::Dead,
            Boot::Fine,
        ],
    );
    let pool = by_hand(&fake, config(1)).await;
    let failure = |result| match result {
        Replenished::Failed(why) => why,
        other => panic!("{other:?}"),
    };
    let why = failure(pool.replenish(PY).await.unwrap());
    assert!(
        std::error::Error::source(&why)
            .unwrap()
            .to_string()
            .contains("no disk")
    );
    let why = failure(pool.replenish(PY).await.unwrap());
    assert!(matches!(why, BootFailure::Panicked));
    let why = failure(pool.replenish(PY).await.unwrap());
    assert!(matches!(why, BootFailure::TimedOut(limit) if limit == secs(30)));
    let why = failure(pool.replenish(PY).await.unwrap());
    assert!(matches!(why, BootFailure::Unhealthy(_)));
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Booted(_)
    ));
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Full
    ));
    assert_eq!(fake.tally(PY).boots, 5);
    assert!(pool.replenish("perl").await.is_err());
    stop_clean(pool, &fake).await;
    let why = failure(make(&fake, config(1)).replenish(PY).await.unwrap());
    assert!(matches!(why, BootFailure::Stopping));
}

#[tokio::test(start_paused = true)]
async fn three_concurrent_calls_size_one_exactly_one_boot() {
    let fake = FakeBackend::new();
    fake.by_default(PY, Boot::After(secs(1)));
    let pool = by_hand(&fake, config(1)).await;
    let results = calls(&pool, 3).await;
    assert_eq!((booted(&results), full(&results)), (1, 2));
    let tally = fake.tally(PY);
    assert_eq!((tally.boots, tally.most_booting), (1, 1));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn twenty_calls_size_two_two_boots_one_at_a_time() {
    let fake = FakeBackend::new();
    fake.by_default(PY, Boot::After(secs(1)));
    let config = PoolConfig::new(8)
        .profile(Profile::new(PY, PY))
        .health(quiet());
    let pool = by_hand(&fake, config).await;
    let results = calls(&pool, 20).await;
    assert_eq!((booted(&results), full(&results)), (2, 18));
    let tally = fake.tally(PY);
    assert_eq!((tally.boots, tally.most_booting), (2, 1));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn ten_calls_size_five_five_boots_at_most_two_at_a_time() {
    let fake = FakeBackend::new();
    fake.by_default(PY, Boot::After(secs(1)));
    let pool = by_hand(&fake, config(5)).await;
    let results = calls(&pool, 10).await;
    assert_eq!((booted(&results), full(&results)), (5, 5));
    let tally = fake.tally(PY);
    assert_eq!((tally.boots, tally.most_booting), (5, 2));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_pool_filled_by_someone_else_while_waiting_for_the_permit_no_boot() {
    let fake = FakeBackend::new();
    let gate = gated(&fake, PY);
    let pool = by_hand(&fake, config(2)).await;
    let other = pool.clone();
    let first = tokio::spawn(async move { other.replenish(PY).await });
    gate.held(1).await;
    let other = pool.clone();
    let second = tokio::spawn(async move { other.replenish(PY).await });
    settle().await;
    // Size 2, one permit: the second call waits; meanwhile a VM is offered from outside.
    pool.offer(PY, fake.make(PY)).await.unwrap();
    gate.open();
    assert!(matches!(
        first.await.unwrap().unwrap(),
        Replenished::Booted(_)
    ));
    assert!(matches!(second.await.unwrap().unwrap(), Replenished::Full));
    assert_eq!(fake.tally(PY).boots, 1);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn sequential_calls_fill_an_empty_pool_of_size_n_in_n_boots() {
    for size in [1, 2, 5] {
        let fake = FakeBackend::new();
        let pool = by_hand(&fake, config(size)).await;
        for made in 1..=size {
            assert!(matches!(
                pool.replenish(PY).await.unwrap(),
                Replenished::Booted(_)
            ));
            assert_eq!(ready(&pool), made);
        }
        assert!(matches!(
            pool.replenish(PY).await.unwrap(),
            Replenished::Full
        ));
        assert_eq!(fake.tally(PY).boots, size);
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn profiles_never_block_one_another() {
    // The boot of `other` is held until both have begun, and that of `one` until that of `other` is
    // over.
    for [one, other] in [[PY, JS], [JS, PY]] {
        let fake = FakeBackend::new();
        let (waits, goes) = (gated(&fake, one), gated(&fake, other));
        let config = config(1).profile(Profile::new(JS, JS).warm_pool_size(1));
        let pool = by_hand(&fake, config).await;
        let releases = async {
            waits.held(1).await;
            goes.held(1).await;
            goes.open();
            while counts(&pool, other).ready == 0 {
                tokio::task::yield_now().await;
            }
            waits.open();
        };
        let (first, second, ()) =
            tokio::join!(pool.replenish(one), pool.replenish(other), releases);
        assert_eq!(booted(&[first.unwrap(), second.unwrap()]), 2);
        stop_clean(pool, &fake).await;
    }

    // A profile whose boots hang does not keep the other from refilling.
    let fake = FakeBackend::new();
    fake.by_default(PY, Boot::Hang);
    let config = config(1).profile(Profile::new(JS, JS).warm_pool_size(1));
    let pool = by_hand(&fake, config).await;
    let other = pool.clone();
    let hanging = tokio::spawn(async move { other.replenish(PY).await });
    settle().await;
    assert_eq!(booted(&[pool.replenish(JS).await.unwrap()]), 1);
    hanging.abort();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_boot_releases_its_permit() {
    let fake = FakeBackend::new();
    fake.script(PY, [Boot::Fail("once")]);
    let pool = by_hand(&fake, config(1)).await;
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Failed(_)
    ));
    assert_eq!((ready(&pool), counts(&pool, PY).booting), (0, 0));
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Booted(_)
    ));
    assert_eq!(ready(&pool), 1);
    assert_eq!(fake.tally(PY).boots, 2);
    let status = pool.status();
    let profile = status.profile(PY).unwrap();
    assert_eq!(
        (profile.counts.boots, profile.counts.boot_failures),
        (1, 1),
        "counted"
    );
    assert!(matches!(
        profile.last_failure,
        Some(BootFailure::Backend(_))
    ));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn the_loop_retries_a_failed_boot_with_backoff_until_the_pool_is_full() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    fake.script(
        PY,
        [
            Boot::Fail("1"),
            Boot::Fail("2"),
            Boot::Fail("3"),
            Boot::Fine,
        ],
    );
    let mut events = pool.subscribe();
    drop(pool.acquire(PY).unwrap());
    let began = Instant::now();
    let mut failures = Vec::new();
    pool.wait_ready(secs(30)).await.unwrap();
    while let Ok(event) = events.try_recv() {
        if matches!(event.kind, EventKind::BootFailed(_)) {
            failures.push(event.vm);
        }
    }
    assert_eq!(failures.len(), 3);
    let took = began.elapsed();
    assert!((millis(600)..=millis(2_900)).contains(&took), "{took:?}");
    assert_eq!(fake.tally(PY).boots, 5);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_ends_the_retries() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    fake.by_default(PY, Boot::Fail("for ever"));
    drop(pool.acquire(PY).unwrap());
    sleep(millis(300)).await;
    let boots = fake.tally(PY).boots;
    assert!(boots > 1, "it was tried");
    pool.stop().await;
    sleep(secs(3_600)).await;
    assert_eq!(fake.tally(PY).boots, boots);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn the_breaker_stops_hammering_a_broken_image_says_so_and_recovers() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let mut events = pool.subscribe();
    fake.by_default(PY, Boot::Fail("broken image"));
    drop(pool.acquire_many(PY, 2).unwrap());
    sleep(secs(25)).await;
    let before = fake.tally(PY).boots;
    assert!(before <= 2 + 5, "{before}");
    assert!(counts(&pool, PY).breaker_open);
    let error = pool.acquire_timeout(PY, secs(1)).await.unwrap_err();
    let AcquireError::Timeout {
        why: Shortage::BreakerOpen(failures),
        ..
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!(failures, 5);
    sleep(secs(3_600)).await;
    let in_an_hour = fake.tally(PY).boots - before;
    assert!(
        (10..=16).contains(&in_an_hour),
        "one at a time, minutes apart: {in_an_hour}"
    );
    fake.by_default(PY, Boot::Fine);
    pool.wait_ready(secs(301)).await.unwrap();
    assert!(!counts(&pool, PY).breaker_open);
    let mut seen = (0, 0);
    while let Ok(event) = events.try_recv() {
        match event.kind {
            EventKind::BreakerOpened(_) => seen.0 += 1,
            EventKind::BreakerClosed => seen.1 += 1,
            _ => {}
        }
    }
    assert_eq!(seen, (1, 1));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn vms_that_boot_well_and_die_soon_do_not_make_the_pool_boot_without_end() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    sleep(secs(60)).await;
    assert_eq!(fake.tally(PY).boots, 2);
    let dying = fake.clone();
    let saboteur = tokio::spawn(async move {
        loop {
            sleep(millis(100)).await;
            dying
                .live()
                .iter()
                .for_each(hearth_pool::fake::FakeVmHandle::kill);
        }
    });
    sleep(secs(25)).await;
    let boots = fake.tally(PY).boots;
    assert!(boots <= 2 + 2 + 5, "{boots}");
    assert!(counts(&pool, PY).breaker_open, "and it says so");
    sleep(secs(3_600)).await;
    let in_an_hour = fake.tally(PY).boots - boots;
    assert!((10..=16).contains(&in_an_hour), "{in_an_hour}");
    saboteur.abort();
    // The next VM lives; once it has proved that, the others follow.
    pool.wait_ready(secs(303)).await.unwrap();
    assert!(!counts(&pool, PY).breaker_open);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_broken_image_is_not_hammered_by_a_start_or_by_calls_either() {
    let fake = FakeBackend::new();
    fake.by_default(PY, Boot::FailAfter(millis(10), "broken image"));
    let pool = make(&fake, config(100));
    pool.start().await.unwrap_err();
    let boots = fake.tally(PY).boots;
    assert!(boots < 50 + 5, "one round of fifty, not a hundred: {boots}");
    let pool = by_hand(&fake, config(1)).await;
    for _ in 0..5 {
        let failed = pool.replenish(PY).await.unwrap();
        assert!(matches!(
            failed,
            Replenished::Failed(BootFailure::Backend(_))
        ));
    }
    let before = fake.tally(PY).boots;
    for _ in 0..9 {
        let refused = pool.replenish(PY).await.unwrap();
        assert!(matches!(
            refused,
            Replenished::Failed(BootFailure::BreakerOpen(5))
        ));
    }
    assert_eq!(fake.tally(PY).boots, before);
    sleep(secs(31)).await;
    fake.by_default(PY, Boot::Fine);
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Booted(_)
    ));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn dropping_a_replenish_future_releases_its_permit() {
    let fake = FakeBackend::new();
    let gate = gated(&fake, PY);
    let pool = by_hand(&fake, config(1)).await;
    assert!(timeout(secs(1), pool.replenish(PY)).await.is_err());
    settle().await;
    assert_eq!((counts(&pool, PY).booting, fake.tally(PY).booting), (0, 0));
    gate.open();
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Booted(_)
    ));
    // A call that still queues for the permit is cancelled.
    let lease = pool.acquire(PY).unwrap();
    let gate = gated(&fake, PY);
    let other = pool.clone();
    let first = tokio::spawn(async move { other.replenish(PY).await });
    gate.held(1).await;
    assert!(timeout(secs(1), pool.replenish(PY)).await.is_err());
    gate.open();
    assert!(matches!(
        first.await.unwrap().unwrap(),
        Replenished::Booted(_)
    ));
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_created_but_not_yet_parked_is_destroyed_with_its_replenish_future() {
    let fake = FakeBackend::new();
    let gate = Gate::new();
    fake.script_pings(PY, [Ping::Gate(gate.clone())]);
    let pool = by_hand(&fake, config(1)).await;
    let mut call = Box::pin(pool.replenish(PY));
    tokio::select! {
        _ = &mut call => panic!("resolved"),
        () = gate.held(1) => {}
    }
    assert_eq!(fake.tally(PY).live, 1);
    drop(call);
    settle().await;
    let tally = fake.tally(PY);
    assert_eq!((tally.live, tally.retired), (0, 1));
    assert_eq!((ready(&pool), counts(&pool, PY).booting), (0, 0));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_boot_that_was_given_up_counts_for_nothing_however_it_ends() {
    let fake = FakeBackend::new();
    let gate = Gate::new();
    fake.script_pings(PY, [Ping::Gate(gate.clone())]);
    let pool = by_hand(&fake, config(1)).await;
    let mut events = pool.subscribe();
    let other = pool.clone();
    let call = tokio::spawn(async move { other.replenish(PY).await.unwrap() });
    shrunk_behind_the_answer(&pool, gate).await;
    assert!(matches!(call.await.unwrap(), Replenished::Full));
    settle().await;
    let now = counts(&pool, PY);
    assert_eq!((now.boots, now.boot_failures), (0, 0));
    while let Ok(event) = events.try_recv() {
        let ready = matches!(event.kind, EventKind::Ready(_) | EventKind::BootFailed(_));
        assert!(!ready, "{event:?}");
    }
    assert_eq!(fake.tally(PY).retired, 1);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn waiting_callers_are_served_before_stock_is_refilled() {
    let fake = FakeBackend::new();
    let gate = gated(&fake, PY);
    let pool = by_hand(&fake, config(4)).await;
    let waiters: Vec<_> = (0..2)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.acquire_timeout(PY, secs(9)).await })
        })
        .collect();
    settle().await;
    gate.open();
    for waiter in waiters {
        assert!(matches!(
            pool.replenish(PY).await.unwrap(),
            Replenished::Booted(_)
        ));
        assert_eq!(ready(&pool), 0);
        drop(waiter.await.unwrap().unwrap());
    }
    assert!(matches!(
        pool.replenish(PY).await.unwrap(),
        Replenished::Booted(_)
    ));
    assert_eq!(ready(&pool), 1);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn boots_on_behalf_of_waiting_callers_count_as_booting_and_permits_hold() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(4)).await;
    let leases = pool.acquire_many(PY, 4).unwrap();
    fake.by_default(PY, Boot::After(secs(1)));
    let waiters: Vec<_> = (0..9)
        .map(|_| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.acquire_timeout(PY, secs(60)).await })
        })
        .collect();
    settle().await;
    let now = counts(&pool, PY);
    assert_eq!((now.waiting, now.booting), (9, 2), "half of the size");
    for waiter in waiters {
        let lease = waiter.await.unwrap().unwrap();
        let now = counts(&pool, PY);
        assert!(now.parked() + now.booting <= 4, "{now:?}");
        drop(lease);
    }
    assert_eq!(fake.tally(PY).most_booting, 2);
    drop(leases);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn with_automatic_refill_switched_off_no_time_that_passes_boots_anything() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(2)).await;
    let waiting = pool.acquire_timeout(PY, secs(3_600)).await.unwrap_err();
    let AcquireError::Timeout { why, .. } = waiting else {
        panic!("{waiting}")
    };
    assert_eq!(why, Shortage::RefillOff);
    pool.resize(PY, 4).unwrap();
    pool.drain(PY, secs(1)).await.unwrap();
    pool.undrain(PY).unwrap();
    sleep(secs(24 * 3_600)).await;
    assert_eq!(fake.tally(PY).boots, 0);
    pool.replenish(PY).await.unwrap();
    drop(pool.acquire(PY).unwrap());
    sleep(secs(3_600)).await;
    assert_eq!((fake.tally(PY).boots, ready(&pool)), (1, 0));
    stop_clean(pool, &fake).await;
}
