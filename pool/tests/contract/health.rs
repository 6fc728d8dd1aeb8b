//! The contract's section "Health check", row by row.

use crate::support::*;
use hearth_pool::config::HealthConfig;
use hearth_pool::fake::{Boot, FakeBackend, FakeVmHandle, Gate, Ping};
use hearth_pool::{AcquireError, CheckReport, EventKind, OfferRefusal, Parking, ProbeError, VmId};
use tokio::time::{Instant, sleep, timeout};

fn ids(vms: &[FakeVmHandle]) -> Vec<VmId> {
    vms.iter().map(FakeVmHandle::id).collect()
}

fn probed(vms: &[FakeVmHandle]) -> Vec<bool> {
    // The first probe proves that the VM is alive before it is parked.
    vms.iter().map(|vm| vm.probes() > 1).collect()
}

#[tokio::test(start_paused = true)]
async fn a_pass_over_an_empty_pool_returns_at_once() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(3)).await;
    let began = Instant::now();
    assert_eq!(pool.check(PY, 10).await.unwrap(), CheckReport::default());
    assert_eq!(began.elapsed(), secs(0));
    assert!(pool.check("perl", 1).await.is_err());
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn begin_check_takes_at_most_n_oldest_first() {
    for (size, asked, expected) in [(3, 2, 2), (2, 5, 2), (3, 3, 3), (3, 0, 0)] {
        let fake = FakeBackend::new();
        let pool = by_hand(&fake, config(size)).await;
        for _ in 0..size {
            pool.replenish(PY).await.unwrap();
        }
        let vms = parked(&fake);
        let gate = Gate::new();
        vms.iter()
            .for_each(|vm| vm.script_pings([Ping::Gate(gate.clone())]));
        let checking = pool.clone();
        let pass = tokio::spawn(async move { checking.check(PY, asked).await });
        settle().await;
        let now = counts(&pool, PY);
        assert_eq!(
            (now.checking, now.ready),
            (expected, size - expected),
            "{size}, {asked}"
        );
        let flags = probed(&vms);
        assert!(
            flags.iter().take(expected).all(|probed| *probed),
            "{flags:?}"
        );
        assert!(
            flags.iter().skip(expected).all(|probed| !*probed),
            "{flags:?}"
        );
        gate.open();
        assert_eq!(pass.await.unwrap().unwrap().healthy, expected);
        assert_eq!(ready(&pool), size);
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn vms_are_checked_in_parallel_and_a_slow_one_holds_nobody_back() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(4)).await;
    let vms = parked(&fake);
    let gate = Gate::new();
    vms[0].script_pings([Ping::Gate(gate.clone())]);
    vms[1..]
        .iter()
        .for_each(|vm| vm.script_pings([Ping::After(secs(1))]));
    let checking = pool.clone();
    let pass = tokio::spawn(async move { checking.check(PY, 4).await });
    settle().await;
    assert_eq!(counts(&pool, PY).checking, 4);
    sleep(secs(1)).await;
    settle().await;
    assert_eq!(
        (counts(&pool, PY).checking, ready(&pool)),
        (1, 3),
        "restored at once"
    );
    gate.open();
    assert_eq!(pass.await.unwrap().unwrap().healthy, 4);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_under_check_stays_acquirable_when_nothing_else_is_left() {
    for size in [1, 3] {
        let fake = FakeBackend::new();
        let pool = by_hand(&fake, config(size).park(Parking::Paused)).await;
        for _ in 0..size {
            pool.replenish(PY).await.unwrap();
        }
        let gate = Gate::new();
        parked(&fake)
            .iter()
            .for_each(|vm| vm.script_pings([Ping::Gate(gate.clone())]));
        let checking = pool.clone();
        let pass = tokio::spawn(async move { checking.check(PY, size).await });
        gate.held(size).await;
        let leases: Vec<_> = (0..size).map(|_| pool.acquire(PY).unwrap()).collect();
        assert!(matches!(
            pool.acquire(PY),
            Err(AcquireError::Exhausted { .. })
        ));
        let report = pass.await.unwrap().unwrap();
        assert_eq!(report.dropped, size, "their checks are dropped");
        settle().await;
        for lease in &leases {
            assert!(lease.work().is_ok(), "the dropped check does not pause it");
        }
        drop(leases);
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_ready_vm_is_handed_out_before_one_under_check() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let vms = parked(&fake);
    let gate = Gate::new();
    vms[0].script_pings([Ping::Gate(gate.clone())]);
    let checking = pool.clone();
    let pass = tokio::spawn(async move { checking.check(PY, 1).await });
    gate.held(1).await;
    assert_eq!(pool.acquire(PY).unwrap().id(), vms[1].id());
    gate.open();
    assert_eq!(pass.await.unwrap().unwrap().healthy, 1);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn the_unhealthy_are_destroyed_and_replaced_the_healthy_stay() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(3)).await;
    let vms = parked(&fake);
    vms[0].freeze();
    vms[1].script_pings([Ping::Wrong("a nonce never sent")]);
    let report = pool.check(PY, 3).await.unwrap();
    assert_eq!((report.healthy, report.unhealthy), (1, 2));
    pool.wait_ready(secs(1)).await.unwrap();
    let now = ids(&parked(&fake));
    assert!(!now.contains(&vms[0].id()) && !now.contains(&vms[1].id()));
    assert!(now.contains(&vms[2].id()));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn frozen_the_ping_times_out_and_resuming_does_not_help() {
    for parking in [Parking::Running, Parking::Paused] {
        let fake = FakeBackend::new();
        let pool = by_hand(&fake, config(1).park(parking)).await;
        pool.replenish(PY).await.unwrap();
        parked(&fake)[0].freeze();
        let mut events = pool.subscribe();
        let began = Instant::now();
        assert_eq!(pool.check(PY, 1).await.unwrap().unhealthy, 1);
        let took = began.elapsed();
        assert!(
            (millis(15_200)..=millis(15_700)).contains(&took),
            "three pings of 5 s: {took:?}"
        );
        let mut why = None;
        while let Ok(event) = events.try_recv() {
            if let EventKind::Unhealthy(error) = event.kind {
                why = Some(error);
            }
        }
        assert_eq!(why, Some(ProbeError::TimedOut(secs(5))));
        assert_eq!(ready(&pool), 0);
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_paused_vm_is_resumed_for_its_check_and_paused_again() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1).park(Parking::Paused)).await;
    let vm = parked(&fake).remove(0);
    let gate = Gate::new();
    vm.script_pings([Ping::Gate(gate.clone())]);
    assert!(vm.is_paused());
    let checking = pool.clone();
    let pass = tokio::spawn(async move { checking.check(PY, 1).await });
    gate.held(1).await;
    assert!(!vm.is_paused());
    gate.open();
    assert_eq!(pass.await.unwrap().unwrap().healthy, 1);
    assert!(vm.is_paused());
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn one_lost_ping_is_not_death_it_is_retried() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let vm = parked(&fake).remove(0);
    let before = vm.probes();
    vm.script_pings([Ping::Lost, Ping::Silence]);
    let began = Instant::now();
    assert_eq!(pool.check(PY, 1).await.unwrap().healthy, 1);
    assert_eq!(vm.probes(), before + 3);
    assert!(began.elapsed() >= millis(5_200));
    vm.script_pings([Ping::Lost, Ping::Lost, Ping::Lost]);
    assert_eq!(pool.check(PY, 1).await.unwrap().unhealthy, 1, "three are");
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_no_healthy_guest_gives_is_unhealthy_without_retry() {
    for what in ["a nonce never sent", "a nonce answered twice", "garbage"] {
        let fake = FakeBackend::new();
        let pool = by_hand(&fake, config(1)).await;
        pool.replenish(PY).await.unwrap();
        let vm = parked(&fake).remove(0);
        let before = vm.probes();
        vm.script_pings([Ping::Wrong(what)]);
        let began = Instant::now();
        assert_eq!(pool.check(PY, 1).await.unwrap().unhealthy, 1);
        assert_eq!((vm.probes(), began.elapsed()), (before + 1, secs(0)));
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_dies_in_the_middle_of_its_check_is_no_panic_and_no_error() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let vms = parked(&fake);
    vms[0].script_pings([Ping::Dies]);
    let gate = Gate::new();
    vms[1].script_pings([Ping::Gate(gate.clone())]);
    let checking = pool.clone();
    let pass = tokio::spawn(async move { checking.check(PY, 2).await });
    gate.held(1).await;
    vms[1].kill();
    let report = pass.await.unwrap().unwrap();
    assert_eq!(report.healthy + report.unhealthy + report.dropped, 2);
    assert_eq!(report.healthy, 0);
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(ready(&pool), 2);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn an_unexpected_panic_in_a_check_destroys_what_it_held() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let vms = parked(&fake);
    vms[0].script_pings([Ping::Panic]);
    let report = pool.check(PY, 2).await.unwrap();
    assert_eq!((report.healthy, report.unhealthy), (1, 1));
    pool.wait_ready(secs(1)).await.unwrap();
    assert!(!ids(&parked(&fake)).contains(&vms[0].id()));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_pass_destroys_what_it_held_no_vm_is_lost_or_parked_twice() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(3)).await;
    let vms = parked(&fake);
    let gate = Gate::new();
    vms[..2]
        .iter()
        .for_each(|vm| vm.script_pings([Ping::Gate(gate.clone())]));
    assert!(timeout(secs(1), pool.check(PY, 3)).await.is_err());
    pool.wait_ready(secs(1)).await.unwrap();
    settle().await;
    let now = ids(&parked(&fake));
    assert_eq!((now.len(), ready(&pool)), (3, 3));
    assert!(now.contains(&vms[2].id()), "already restored: kept");
    assert!(!now.contains(&vms[0].id()) && !now.contains(&vms[1].id()));
    gate.open();
    stop_clean(pool, &fake).await;
    let tally = fake.tally(PY);
    assert_eq!((tally.created, tally.retired, tally.dropped), (5, 5, 0));
}

#[tokio::test(start_paused = true)]
async fn repeated_passes_happen_every_interval_and_a_parked_death_needs_none() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1).health(HealthConfig::default())).await;
    let vm = parked(&fake).remove(0);
    sleep(secs(9)).await;
    assert_eq!(vm.probes(), 1);
    sleep(secs(2)).await;
    assert_eq!(vm.probes(), 2);
    sleep(secs(30)).await;
    assert_eq!(vm.probes(), 5);
    // A VM that dies while parked is an event, handled at once.
    let mut events = pool.subscribe();
    let died = Instant::now();
    vm.kill();
    loop {
        let event = events.recv().await.unwrap();
        if matches!(event.kind, EventKind::Ready(_)) {
            break;
        }
    }
    assert_eq!(died.elapsed(), secs(0));
    assert_eq!(ready(&pool), 1);
    stop_clean(pool, &fake).await;
}

/// Returns how often the runtime parked in an hour: once for each wake-up.
async fn wake_ups_in_an_hour(health: HealthConfig) -> u64 {
    let fake = FakeBackend::new();
    let scale = hearth_pool::Autoscale::between(3, 9).window(secs(7_200));
    let profile = hearth_pool::Profile::new(PY, PY)
        .warm_pool_size(3)
        .autoscale(scale);
    let config = hearth_pool::PoolConfig::new(100)
        .profile(profile)
        .health(health);
    let pool = running(&fake, config).await;
    let lease = pool.acquire(PY).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    settle().await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.worker_park_count(0);
    sleep(secs(3_600)).await;
    let parks = metrics.worker_park_count(0) - before;
    drop(lease);
    stop_clean(pool, &fake).await;
    parks
}

#[tokio::test(start_paused = true)]
async fn between_checks_nothing_wakes_up() {
    let parks = wake_ups_in_an_hour(quiet()).await;
    assert!(parks <= 4, "something of the pool wakes up: {parks}");
    // For comparison: with health checks it does wake up.
    let parks = wake_ups_in_an_hour(HealthConfig::default()).await;
    assert!(parks >= 360, "{parks}");
}

#[tokio::test(start_paused = true)]
async fn the_ping_timeout_is_scaled_by_the_backend() {
    let fake = FakeBackend::new().with_time_scale(4);
    let pool = by_hand(&fake, config(1)).await;
    pool.replenish(PY).await.unwrap();
    parked(&fake)[0].freeze();
    let began = Instant::now();
    assert_eq!(pool.check(PY, 1).await.unwrap().unhealthy, 1);
    let took = began.elapsed();
    assert!(
        (millis(60_200)..=millis(60_700)).contains(&took),
        "three pings of 20 s: {took:?}"
    );
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_check_of_a_dead_vm_says_unhealthy_as_often_as_it_is_asked() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let lease = pool.acquire(PY).unwrap();
    lease.handle().kill();
    for _ in 0..5 {
        assert_eq!(lease.ping().await, Err(ProbeError::Dead));
    }
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn offer_adopts_the_live_one_and_refuses_the_killed_one() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(2).park(Parking::Paused)).await;
    let (live, killed) = (fake.make(PY), fake.make(PY));
    killed.handle().kill();
    let handle = live.handle();
    let (live, killed) = tokio::join!(pool.offer(PY, live), pool.offer(PY, killed));
    let id = live.unwrap();
    let refused = killed.unwrap_err();
    assert!(matches!(
        refused.why,
        OfferRefusal::Unhealthy(ProbeError::Dead)
    ));
    assert!(refused.vm.is_some(), "it comes back");
    drop(refused);
    assert_eq!(ready(&pool), 1);
    assert!(handle.is_paused(), "parked like any other");
    assert_eq!(pool.acquire(PY).unwrap().id(), id);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn offer_refuses_what_was_made_for_another_profile_or_has_been_used() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(2)).await;
    let other = pool.offer(PY, fake.make(JS)).await.unwrap_err();
    assert!(matches!(other.why, OfferRefusal::Unfit), "{other}");
    pool.offer(PY, fake.make(PY)).await.unwrap();
    let (used, reservation) = pool.acquire(PY).unwrap().into_inner();
    let refused = pool.offer(PY, used).await.unwrap_err();
    assert!(matches!(refused.why, OfferRefusal::Unfit), "{refused}");
    assert!(refused.vm.is_some(), "it comes back");
    drop((other, refused, reservation));
    assert_eq!(ready(&pool), 0);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn offer_refuses_when_full_and_a_dropped_offer_destroys_its_vm() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(1)).await;
    pool.replenish(PY).await.unwrap();
    let refused = pool.offer(PY, fake.make(PY)).await.unwrap_err();
    assert!(matches!(refused.why, OfferRefusal::Full));
    drop(refused);
    drop(pool.acquire(PY).unwrap());
    settle().await;
    let gate = Gate::new();
    let vm = fake.make(PY);
    vm.handle().script_pings([Ping::Gate(gate.clone())]);
    let mut offer = Box::pin(pool.offer(PY, vm));
    tokio::select! {
        _ = &mut offer => panic!("resolved"),
        () = gate.held(1) => {}
    }
    assert_eq!(pool.status().usage.vms, 1);
    drop(offer);
    settle().await;
    assert_eq!((pool.status().usage.vms, fake.live().len()), (0, 0));
    stop_clean(pool, &fake).await;
    let refused = pool_stopped_offer(&fake).await;
    assert!(matches!(refused, OfferRefusal::Stopping));
}

#[tokio::test(start_paused = true)]
async fn an_offer_that_is_given_up_after_its_check_gives_its_vm_back() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(1)).await;
    let gate = Gate::new();
    let vm = fake.make(PY);
    let handle = vm.handle();
    handle.script_pings([Ping::Gate(gate.clone())]);
    let offering = pool.clone();
    let offer = tokio::spawn(async move { offering.offer(PY, vm).await });
    shrunk_behind_the_answer(&pool, gate).await;
    let refused = offer.await.unwrap().unwrap_err();
    assert!(matches!(refused.why, OfferRefusal::Full));
    assert!(refused.vm.is_some() && handle.is_alive());
    drop(refused);
    stop_clean(pool, &fake).await;
}

async fn pool_stopped_offer(fake: &FakeBackend) -> OfferRefusal {
    let pool = make(fake, config(1));
    pool.offer(PY, fake.make(PY)).await.unwrap_err().why
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_boots_dead_or_frozen_is_never_parked() {
    let fake = FakeBackend::new();
    fake.script(PY, [Boot::Dead, Boot::Frozen]);
    let pool = by_hand(&fake, config(1)).await;
    for _ in 0..2 {
        let result = pool.replenish(PY).await.unwrap();
        assert!(
            matches!(result, hearth_pool::Replenished::Failed(_)),
            "{result:?}"
        );
        assert_eq!(ready(&pool), 0);
    }
    settle().await;
    assert!(fake.live().is_empty());
    stop_clean(pool, &fake).await;
}
