//! The guest that a lease gets.

use std::collections::HashSet;

use hearth_pool::{AcquireError, Parking};
use hearth_tests::{kvm, within};
use hearth_vmm::{CpuProfile, Host, VmStatus};

use crate::rig::{BASE, Rig, config, counts, full, run, stop};

#[tokio::test]
async fn a_parked_guest_is_handed_out_answers_and_runs_programs_paused_or_running() {
    if !kvm() {
        return;
    }
    for parking in [Parking::Paused, Parking::Running] {
        let rig = Rig::new().await;
        let pool = rig.pool(config(1).park(parking)).await;
        let guest = pool.acquire(BASE).unwrap();
        within(6, "ping", guest.ping()).await.unwrap();
        let output = run(&guest, guest.command("echo").arg("warm")).await;
        assert!(output.status.success(), "{parking:?}: {output:?}");
        assert_eq!(output.stdout, b"warm\n");
        within(6, "release", guest.release()).await;
        full(&pool).await;
        stop(pool).await;
    }
}

/// On an emulated host a running guest costs processor time even when idle.
#[tokio::test]
async fn a_guest_waits_as_suits_the_kind_of_host_unless_it_is_told_how() {
    if !kvm() {
        return;
    }
    let of_host = match Host::get().unwrap().profile() {
        CpuProfile::Native => Parking::Running,
        CpuProfile::Emulated => Parking::Paused,
    };
    for told in [None, Some(Parking::Running), Some(Parking::Paused)] {
        let rig = Rig::new().await;
        let mut config = config(1);
        config.park = told;
        let pool = rig.pool(config).await;
        let guest = pool.acquire(BASE).unwrap();
        let expected = match told.unwrap_or(of_host) {
            Parking::Running => VmStatus::Running,
            Parking::Paused => VmStatus::Paused,
        };
        assert_eq!(rig.found(&guest), expected, "{told:?}");
        drop(guest);
        stop(pool).await;
    }
}

#[tokio::test]
async fn each_is_used_once_and_the_pool_refills() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(2)).await;
    let mut ids = HashSet::new();
    for _ in 0..2 {
        let guest = pool.acquire(BASE).unwrap();
        assert!(ids.insert(guest.id()), "{} again", guest.id());
        drop(guest);
        full(&pool).await;
    }
    let all = pool.acquire_many(BASE, 2).unwrap();
    let none = pool.acquire(BASE).unwrap_err();
    assert!(matches!(none, AcquireError::Exhausted { .. }), "{none}");
    drop(all);
    full(&pool).await;
    assert_eq!(counts(&pool).hits, 4);
    stop(pool).await;
}

#[tokio::test]
async fn forks_are_strangers_and_what_one_does_the_other_does_not_see() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(2)).await;
    let [one, two] = pool.acquire_many(BASE, 2).unwrap().try_into().unwrap();
    assert_ne!(one.instance(), two.instance());
    for guest in [&one, &two] {
        let name = run(guest, guest.command("uname")).await;
        let text = String::from_utf8(name.stdout).unwrap();
        let own = format!(" {} ", guest.id());
        assert!(text.contains(&own), "{text:?} without {own:?}");
    }
    // A program in one guest does not show in the other, nor does the end of that guest.
    let asleep = one.exec(one.command("sleep").arg("1000")).await.unwrap();
    let programs = async |guest: &hearth_pool::kvm::Guest| {
        let mut agent = guest.agent().await.unwrap();
        within(5, "ping", agent.ping(1)).await.unwrap().execs
    };
    assert_eq!((programs(&one).await, programs(&two).await), (1, 0));
    rig.vm(one.id()).kill().await;
    assert!(
        within(6, "end of its program", asleep.wait())
            .await
            .is_err()
    );
    within(6, "ping", two.ping()).await.unwrap();
    drop((one, two));
    stop(pool).await;
}

#[tokio::test]
async fn a_lease_agrees_with_the_pool_healthy_when_fresh_and_never_once_killed() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1)).await;
    let guest = pool.acquire(BASE).unwrap();
    for _ in 0..3 {
        within(6, "ping", guest.ping()).await.unwrap();
    }
    rig.vm(guest.id()).kill().await;
    for _ in 0..3 {
        let verdict = within(6, "ping", guest.ping()).await.unwrap_err();
        assert!(!verdict.is_transient(), "{verdict}");
    }
    drop(guest);
    full(&pool).await;
    stop(pool).await;
}
