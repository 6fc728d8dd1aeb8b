//! A pool that is gone leaves nothing in the process: no thread, descriptor or mapping.

use std::time::Duration;

use hearth_pool::{EventKind, Phase, Refill};
use hearth_tests::{Footprint, alone, kvm, patience, within};
use hearth_vmm::leaked_vms;

use crate::rig::{BASE, Rig, alone_in_a_runtime, config, stop};

/// Anonymous mappings that the allocator may keep.
const SLACK: usize = 24;

/// Asserts that no guest has a thread or memory; a template does not run and has neither.
fn assert_no_guest(when: &str) {
    let now = Footprint::now();
    let threads = now
        .threads
        .keys()
        .any(|name| name.starts_with("hearth-vcpu"));
    let memory = now
        .mappings
        .keys()
        .any(|name| name.contains("hearth-guest"));
    assert!(!threads && !memory, "{when}: {now:#?}");
}

/// Stopping destroys guests even if the caller still holds leases of them.
async fn stopped_with_leases_out() {
    let pool = Rig::new().await.pool(config(2)).await;
    let leases = pool.acquire_many(BASE, 1).unwrap();
    within(10, "stop", pool.stop_within(Duration::from_millis(10))).await;
    assert_eq!(pool.status().phase, Phase::Stopped);
    assert_no_guest("stopped with leases out");
    for lease in &leases {
        assert!(
            lease.ping().await.is_err(),
            "{} outlived its pool",
            lease.id()
        );
    }
    drop(leases);
}

async fn stopped_during_boot_and_twice() {
    let pool = Rig::new().await.pool(config(2)).await;
    let mut events = pool.subscribe();
    drop(pool.acquire_many(BASE, 2).unwrap());
    loop {
        let event = within(5, "a boot", events.recv()).await.unwrap();
        if matches!(event.kind, EventKind::Booting) {
            break;
        }
    }
    let again = pool.clone();
    tokio::join!(pool.stop(), again.stop());
    stop(pool).await;
}

/// A boot that is cancelled at any step is over when the pool reports that it has stopped.
async fn stopped_in_the_middle_of_a_boot() {
    for micros in [0, 500, 2_000, 8_000] {
        let pool = Rig::new().await.pool(config(1)).await;
        let mut events = pool.subscribe();
        drop(pool.acquire(BASE).unwrap());
        while !matches!(events.recv().await.unwrap().kind, EventKind::Booting) {}
        tokio::time::sleep(Duration::from_micros(micros)).await;
        stop(pool).await;
        assert_no_guest(&format!(
            "stopped {micros} us after the beginning of a boot"
        ));
    }
}

/// The release of a guest that is being killed waits for its end like any other.
async fn released_while_it_is_killed() {
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).refill(Refill::AtStart)).await;
    let guest = pool.acquire(BASE).unwrap();
    let victim = rig.vm(guest.id());
    let kill = tokio::spawn(async move { victim.kill().await });
    tokio::task::yield_now().await;
    within(10, "release", guest.release()).await;
    assert_no_guest("released");
    kill.await.unwrap();
    stop(pool).await;
}

/// A guest that is only dropped is torn down by a thread of the library, which stays.
async fn dropped() {
    let pool = Rig::new()
        .await
        .pool(config(1).refill(Refill::AtStart))
        .await;
    drop(pool.acquire(BASE).unwrap().into_inner());
    stop(pool).await;
}

async fn dropped_without_stop() {
    let pool = Rig::new().await.pool(config(2)).await;
    let lease = pool.acquire(BASE).unwrap();
    let mut events = pool.subscribe();
    drop((pool, lease));
    loop {
        let event = within(10, "the end", events.recv()).await.unwrap();
        if matches!(event.kind, EventKind::Stopped) {
            break;
        }
    }
}

#[test]
fn nothing_is_left_of_a_pool_however_it_ends() {
    if !kvm() || !alone() {
        return;
    }
    // The template stays, as do the library's own threads and its data about the host.
    alone_in_a_runtime(dropped());
    alone_in_a_runtime(stopped_with_leases_out());
    let before = Footprint::now();
    let limit = patience(Duration::from_secs(5));
    alone_in_a_runtime(stopped_with_leases_out());
    before.assert_restored(SLACK, limit);
    alone_in_a_runtime(stopped_in_the_middle_of_a_boot());
    alone_in_a_runtime(released_while_it_is_killed());
    before.assert_restored(SLACK, limit);
    alone_in_a_runtime(stopped_during_boot_and_twice());
    before.assert_restored(SLACK, limit);
    alone_in_a_runtime(dropped_without_stop());
    before.assert_restored(SLACK, limit);
    assert_eq!(leaked_vms(), 0);
}
