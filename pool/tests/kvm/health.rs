//! Health checks of real guests.

use std::time::Duration;

use hearth_pool::{Backend, OfferRefusal, Parking, ProbeError, Refill, VmId};
use hearth_tests::{kvm, patience, within};
use hearth_vmm::VmStatus;

use crate::rig::{BASE, Rig, config, counts, full, stop, verdict_on};

#[tokio::test]
async fn healthy_guests_stay_and_paused_ones_are_paused_again() {
    if !kvm() {
        return;
    }
    for parking in [Parking::Paused, Parking::Running] {
        let rig = Rig::new().await;
        let pool = rig.pool(config(2).park(parking)).await;
        for _ in 0..2 {
            let report = within(10, "check", pool.check(BASE, 2)).await.unwrap();
            assert_eq!((report.healthy, report.unhealthy), (2, 0), "{parking:?}");
        }
        assert_eq!((counts(&pool).ready, counts(&pool).boots), (2, 2));
        stop(pool).await;
    }
}

#[tokio::test]
async fn a_paused_guest_is_paused_again_after_its_check_which_opens_no_connection() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).park(Parking::Paused)).await;
    let check = async || {
        let report = within(10, "check", pool.check(BASE, 1)).await.unwrap();
        assert_eq!((report.healthy, report.unhealthy), (1, 0));
    };
    for _ in 0..3 {
        check().await;
    }
    let guest = pool.acquire(BASE).unwrap();
    assert_eq!(rig.found(&guest), VmStatus::Paused);
    // A lease pings on the same connection as the pool.
    let victim = rig.vm(guest.id());
    let before = victim.port().await;
    for _ in 0..3 {
        within(6, "ping", guest.ping()).await.unwrap();
    }
    assert_eq!(victim.port().await, before + 1);
    drop(guest);
    stop(pool).await;
}

/// The pool is not notified of the end here, as if that notification failed.
#[tokio::test]
async fn a_check_finds_a_guest_that_was_killed_panicked_went_off_or_lost_its_agent() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    rig.deafen();
    let pool = rig.pool(config(2).park(Parking::Running)).await;
    for way in ["kill", "panic", "poweroff", "crash-agent"] {
        let victim = rig.all().pop().unwrap();
        match way {
            "kill" => victim.kill().await,
            program => victim.die_of(program).await,
        }
        assert_eq!(counts(&pool).ready, 2, "{way}: nobody has noticed yet");
        let mut events = pool.subscribe();
        let report = within(10, "check", pool.check(BASE, 2)).await.unwrap();
        assert_eq!((report.healthy, report.unhealthy), (1, 1), "{way}");
        let verdict = verdict_on(&mut events, victim.id).await;
        assert_eq!(verdict, ProbeError::Dead, "{way}");
        full(&pool).await;
    }
    for guest in pool.acquire_many(BASE, 2).unwrap() {
        within(6, "ping", guest.ping()).await.unwrap();
    }
    stop(pool).await;
}

#[tokio::test]
async fn every_check_of_a_dead_guest_says_unhealthy() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).refill(Refill::AtStart)).await;
    let guest = pool.acquire(BASE).unwrap();
    rig.vm(guest.id()).kill().await;
    for _ in 0..5 {
        assert_eq!(within(6, "ping", guest.ping()).await, Err(ProbeError::Dead));
        let verdict = within(6, "probe", rig.probe(&guest)).await;
        assert_eq!(verdict, Err(ProbeError::Dead));
    }
    drop(guest);
    stop(pool).await;
}

#[tokio::test]
async fn a_guest_in_the_middle_of_a_balloon_operation_passes_its_check() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).park(Parking::Running)).await;
    let victim = rig.all().pop().unwrap();
    let balloon = victim.balloon.clone();
    let limit = patience(Duration::from_secs(5));
    let inflates = tokio::spawn(async move { balloon.resize(8, limit).await });
    let mut checks = 0;
    while !inflates.is_finished() {
        let report = within(10, "check", pool.check(BASE, 1)).await.unwrap();
        assert_eq!((report.healthy, report.unhealthy), (1, 0));
        checks += 1;
    }
    inflates.await.unwrap().unwrap();
    assert!(checks > 0, "the balloon was faster than a check");
    stop(pool).await;
}

/// At whichever moment the guest dies, the check reports healthy, unhealthy or dropped, and the
/// pool goes on.
#[tokio::test]
async fn a_guest_that_dies_in_the_middle_of_its_check() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1)).await;
    for step in [0, 2, 5, 9_u32] {
        let victim = rig.all().pop().unwrap();
        let dies = async {
            tokio::time::sleep(Duration::from_micros(200) * step * step).await;
            victim.kill().await;
        };
        let (report, ()) = tokio::join!(pool.check(BASE, 1), dies);
        let report = report.unwrap();
        assert_eq!(report.healthy + report.unhealthy + report.dropped, 1);
        // The check may have come before the death, which the pool learns of a moment later.
        let replaced = async {
            while rig.all().pop().is_none_or(|vm| vm.id == victim.id) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        within(10, "a replacement", replaced).await;
        full(&pool).await;
    }
    stop(pool).await;
}

#[tokio::test]
async fn of_a_live_and_a_killed_guest_that_are_offered_the_live_one_is_adopted() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(2).refill(Refill::Manual)).await;
    let profile = &config(2).profiles[0];
    let (dead, live) = tokio::try_join!(
        rig.create(profile, VmId(1 << 40)),
        rig.create(profile, VmId(2 << 40))
    )
    .unwrap();
    dead.vm().kill();
    let adopted = within(6, "offer", pool.offer(BASE, live)).await.unwrap();
    for _ in 0..2 {
        // Each probe gives the same verdict.
        let verdict = within(6, "probe", rig.probe(&dead)).await;
        assert_eq!(verdict, Err(ProbeError::Dead));
    }
    let refused = within(6, "offer", pool.offer(BASE, dead))
        .await
        .unwrap_err();
    assert!(
        matches!(refused.why, OfferRefusal::Unhealthy(ProbeError::Dead)),
        "{refused}"
    );
    assert!(matches!(
        refused.vm.unwrap().vm().status(),
        VmStatus::Ended(_)
    ));
    assert_eq!(counts(&pool).ready, 1);
    let guest = pool.acquire(BASE).unwrap();
    assert_eq!(guest.id(), adopted);
    within(6, "ping", guest.ping()).await.unwrap();
    // A guest that was handed out cannot be offered as new.
    let (used, share) = guest.into_inner();
    let refused = within(6, "offer", pool.offer(BASE, used))
        .await
        .unwrap_err();
    assert!(matches!(refused.why, OfferRefusal::Unfit), "{refused}");
    drop((refused, share));
    stop(pool).await;
}
