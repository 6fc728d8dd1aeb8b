//! A pool that is gone has left nothing in the process: no thread, descriptor or mapping.

use std::time::Duration;

use hearth_pool::{EventKind, Phase};
use hearth_tests::{Footprint, alone, kvm, patience, within};
use hearth_vmm::leaked_vms;

use crate::rig::{BASE, Rig, config, stop};

/// Mappings of plain memory that the allocator may keep.
const SLACK: usize = 24;

/// In a runtime of its own, whose threads end with it.
fn case(steps: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(steps);
}

async fn stopped_with_leases_out() {
    let pool = Rig::new().await.pool(config(2)).await;
    let leases = pool.acquire_many(BASE, 1).unwrap();
    within(10, "stop", pool.stop_within(Duration::from_millis(10))).await;
    assert_eq!(pool.status().phase, Phase::Stopped);
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
    // The template stays, as do the library's own threads and what it has found out about the host.
    case(stopped_with_leases_out());
    let before = Footprint::now();
    let limit = patience(Duration::from_secs(5));
    case(stopped_with_leases_out());
    before.assert_restored(SLACK, limit);
    case(stopped_during_boot_and_twice());
    before.assert_restored(SLACK, limit);
    case(dropped_without_stop());
    before.assert_restored(SLACK, limit);
    assert_eq!(leaked_vms(), 0);
}
