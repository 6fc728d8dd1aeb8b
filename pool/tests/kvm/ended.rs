//! Guests that end or freeze while parked, in every way, are never handed out, and are replaced.

use std::time::{Duration, Instant};

use hearth_pool::{EventKind, Parking, Pool, PoolEvent, ProbeError, VmId};
use hearth_tests::{kvm, within};
use hearth_vmm::VmStatus;
use tokio::sync::broadcast::Receiver;

use crate::rig::{BASE, Rig, config, counts, full, impatient, stop, verdict_on};

/// Waits until the pool notices the end of this VM and the next one is ready; returns both times.
async fn replaced(events: &mut Receiver<PoolEvent>, id: VmId) -> [Duration; 2] {
    let began = Instant::now();
    let mut noticed = None;
    loop {
        let event = within(10, "replacement", events.recv()).await.unwrap();
        match event.kind {
            EventKind::Ended | EventKind::Unhealthy(_) if event.vm == Some(id) => {
                noticed = Some(began.elapsed());
            }
            EventKind::Ready(_) => {
                let noticed = noticed.expect("replaced before its end was noticed");
                return [noticed, began.elapsed()];
            }
            _ => {}
        }
    }
}

/// Acquires a guest, and asserts that it is not the dead one.
fn take(pool: &Pool<Rig>, dead: VmId) {
    let guest = pool.acquire(BASE).unwrap();
    assert_ne!(guest.id(), dead);
    assert!(!matches!(guest.vm().status(), VmStatus::Ended(_)));
}

#[tokio::test]
async fn killed_panicked_and_powered_off_guests_and_such_whose_agent_dies_are_replaced_at_once() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).park(Parking::Running)).await;
    for way in ["kill", "panic", "poweroff", "crash-agent"] {
        let mut events = pool.subscribe();
        let victim = rig.all().pop().unwrap();
        let dies = async {
            match way {
                "kill" => victim.kill().await,
                program => victim.die_of(program).await,
            }
        };
        // No health-check round is due: the pool must be notified of the end itself.
        let ((), [noticed, ready]) = tokio::join!(dies, replaced(&mut events, victim.id));
        eprintln!("{way}: noticed after {noticed:?}, replaced after {ready:?}");
        full(&pool).await;
        take(&pool, victim.id);
        full(&pool).await;
    }
    stop(pool).await;
}

#[tokio::test]
async fn a_killed_paused_guest_is_replaced_at_once() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(2).park(Parking::Paused)).await;
    let mut events = pool.subscribe();
    let victim = rig.all().pop().unwrap();
    let began = Instant::now();
    victim.kill().await;
    // Gets the remaining guest or the replacement, but never the dead one.
    take(&pool, victim.id);
    let [noticed, ready] = replaced(&mut events, victim.id).await;
    let killed = began.elapsed();
    eprintln!("noticed after {noticed:?}, replaced after {ready:?} ({killed:?} after the kill)");
    full(&pool).await;
    stop(pool).await;
}

#[tokio::test]
async fn a_frozen_guest_is_found_by_the_next_check_and_replaced() {
    if !kvm() {
        return;
    }
    let found = async |parking| {
        let rig = Rig::new().await;
        let pool = rig.pool(impatient(2).park(parking)).await;
        let mut events = pool.subscribe();
        let victim = rig.all().pop().unwrap();
        rig.freeze(&victim);
        let check = async {
            let report = within(10, "check", pool.check(BASE, 2)).await.unwrap();
            assert_eq!((report.healthy, report.unhealthy), (1, 1), "{parking:?}");
        };
        let mut verdicts = pool.subscribe();
        tokio::join!(check, replaced(&mut events, victim.id));
        let verdict = verdict_on(&mut verdicts, victim.id).await;
        assert!(matches!(verdict, ProbeError::TimedOut(_)), "{verdict}");
        full(&pool).await;
        assert_eq!(counts(&pool).ready, 2);
        take(&pool, victim.id);
        stop(pool).await;
    };
    tokio::join!(found(Parking::Paused), found(Parking::Running));
}

/// All else in the guest goes on: only a check can find this.
#[tokio::test]
async fn a_guest_whose_agent_stands_still_is_found_by_a_check_and_replaced() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(impatient(2).park(Parking::Running)).await;
    let mut events = pool.subscribe();
    let victim = rig.all().pop().unwrap();
    let wedged = victim.wedge();
    let mut verdicts = pool.subscribe();
    let check = async {
        // Until the program has stopped the agent, the guest is healthy.
        for _ in 0..100 {
            let report = within(10, "check", pool.check(BASE, 2)).await.unwrap();
            if report.unhealthy > 0 {
                assert_eq!((report.healthy, report.unhealthy), (1, 1));
                return;
            }
        }
        panic!("the agent was never found silent");
    };
    tokio::join!(check, replaced(&mut events, victim.id));
    let verdict = verdict_on(&mut verdicts, victim.id).await;
    assert!(matches!(verdict, ProbeError::TimedOut(_)), "{verdict}");
    full(&pool).await;
    take(&pool, victim.id);
    stop(pool).await;
    wedged.abort();
}
