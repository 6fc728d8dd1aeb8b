//! Observability: every documented metric is recorded, every span carries its VM, and failures are
//! logged. A test program of its own, because it installs a subscriber for the whole process.

#![allow(
    clippy::field_reassign_with_default,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod recorder;
#[allow(dead_code, reason = "the other tests need more of it")]
#[path = "../contract/support.rs"]
mod support;
mod trace;

use std::collections::{BTreeMap, BTreeSet};

use crate::recorder::{Kind, Recorder};
use crate::support::*;
use crate::trace::Trace;
use hearth_pool::config::LeaseConfig;
use hearth_pool::fake::{Boot, FakeBackend, Gate, Ping};
use hearth_pool::{Autoscale, Making, PoolConfig, Profile};
use tokio::time::sleep;

/// Returns name and kind of each metric, from the table in the module's documentation.
fn documented() -> BTreeMap<String, Kind> {
    let rows = include_str!("../../src/metrics.rs").lines();
    let rows = rows.filter_map(|line| line.strip_prefix("//! | `"));
    let row = |row: &str| {
        let (name, rest) = row.split_once("` | ").unwrap();
        let kind = match rest.split_once(" |").unwrap().0 {
            "gauge" => Kind::Gauge,
            "counter" => Kind::Counter,
            "histogram" => Kind::Histogram,
            other => panic!("{other}"),
        };
        (name.to_owned(), kind)
    };
    rows.map(row).collect()
}

/// Runs a pool from start to stop under a recorder, with paused time.
fn recorded(life: impl AsyncFnOnce()) -> Recorder {
    Trace::begin();
    let recorder = Recorder::default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    metrics::with_local_recorder(&recorder, || runtime.block_on(life()));
    recorder
}

#[test]
fn every_documented_metric_is_recorded_and_no_other() {
    let recorder = recorded(async || {
        for making in [Making::Boot, Making::Fork] {
            everything_happens(&FakeBackend::new().with_making(making)).await;
        }
    });
    let seen: BTreeMap<_, _> = recorder.kinds().into_iter().collect();
    assert_eq!(seen, documented());
    // One failure for each way of making VMs, later made up for.
    assert_eq!(recorder.sum("hearth_pool_template_failures_total"), 2.0);
    assert_eq!(recorder.sum("hearth_pool_without_template"), 0.0);
}

/// Causes every event that is measured, at least once.
async fn everything_happens(fake: &FakeBackend) {
    let mut leases = LeaseConfig::default();
    leases.deadline_ms = 60_000;
    let mut config = config(2).lease(leases);
    config.limits.vms = 3;
    fake.refuse_template(PY, Some("out of memory"));
    let pool = running(fake, config).await;
    fake.refuse_template(PY, None);
    let lease = pool.acquire(PY).unwrap();
    assert!(pool.acquire_many(PY, 9).is_err());
    drop(pool.acquire_timeout(PY, secs(1)).await.unwrap());
    fake.script(PY, [Boot::Fail("a disk is full")]);
    pool.wait_ready(secs(9)).await.unwrap();
    let vms = parked(fake);
    vms[1].script_pings([Ping::Wrong("nonsense")]);
    assert_eq!(pool.check(PY, 9).await.unwrap().unhealthy, 1);
    vms[2].kill();
    pool.wait_ready(secs(9)).await.unwrap();
    sleep(secs(61)).await;
    drop(lease);
    fake.gate_retire(Some(Gate::new()));
    drop(pool.acquire(PY).unwrap());
    sleep(secs(31)).await;
    fake.gate_retire(None);
    stop_clean(pool, fake).await;
}

#[test]
fn boot_failures_are_counted_by_reason_as_the_status_counts_them() {
    let recorder = recorded(async || {
        let fake = FakeBackend::new();
        let mut config = config(2);
        config.limits.vms = 2;
        let pool = by_hand(&fake, config).await;
        fake.script(PY, [Boot::Fail("no"), Boot::Panic, Boot::Dead, Boot::Hang]);
        for _ in 0..6 {
            pool.replenish(PY).await.unwrap();
            sleep(secs(31)).await;
        }
        let leases = pool.acquire_many(PY, 2).unwrap();
        pool.replenish(PY).await.unwrap();
        // A cancelled boot is no failure.
        fake.by_default(PY, Boot::Hang);
        drop(leases);
        settle().await;
        let giving_up = tokio::time::timeout(secs(1), pool.replenish(PY)).await;
        assert!(giving_up.is_err());
        settle().await;
        let counts = counts(&pool, PY);
        assert_eq!((counts.boots, counts.boot_failures), (2, 5));
        assert_eq!((counts.hits, counts.misses), (2, 0));
        stop_clean(pool, &fake).await;
    });
    let failures = recorder.by_label("hearth_pool_boot_failures_total", "reason");
    let expected = [
        ("backend", 1.0),
        ("limits", 1.0),
        ("panic", 1.0),
        ("timeout", 1.0),
        ("unhealthy", 1.0),
    ];
    let expected = expected.map(|(reason, count)| (reason.to_owned(), count));
    assert_eq!(failures, BTreeMap::from(expected));
    assert_eq!(recorder.sum("hearth_pool_boots_total"), 2.0);
    assert_eq!(recorder.sum("hearth_pool_hits_total"), 2.0);
    assert_eq!(recorder.sum("hearth_pool_misses_total"), 0.0);
}

#[test]
fn the_gauge_of_waiting_callers_falls_when_one_goes_away() {
    let recorder = recorded(async || {
        let fake = FakeBackend::new();
        let pool = by_hand(&fake, config(1)).await;
        let waiting = tokio::time::timeout(secs(1), pool.acquire_timeout(PY, secs(9))).await;
        assert!(waiting.is_err());
        settle().await;
        std::mem::forget(pool);
    });
    assert_eq!(recorder.sum("hearth_pool_waiting"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn spans_of_boot_fork_acquire_check_adopt_and_destroy_name_their_vm() {
    let trace = Trace::begin();
    for making in [Making::Boot, Making::Fork] {
        let fake = FakeBackend::new().with_making(making);
        let pool = running(&fake, config(2)).await;
        pool.check(PY, 1).await.unwrap();
        let leases = (
            pool.acquire(PY).unwrap(),
            pool.acquire_timeout(PY, secs(1)).await.unwrap(),
        );
        pool.wait_ready(secs(1)).await.unwrap();
        pool.resize(PY, 3).unwrap();
        fake.by_default(PY, Boot::Hang);
        pool.offer(PY, fake.make(PY)).await.unwrap_err();
        drop(leases);
        stop_clean(pool, &fake).await;
        let fake = FakeBackend::new();
        let pool = by_hand(&fake, config(1)).await;
        pool.offer(PY, fake.make(PY)).await.unwrap();
        stop_clean(pool, &fake).await;
    }
    let spans = trace.spans();
    let names: BTreeSet<_> = spans.iter().map(|span| &*span.name).collect();
    let expected = [
        "acquire", "adopt", "boot", "check", "destroy", "fork", "prepare",
    ];
    assert_eq!(names, BTreeSet::from(expected));
    for span in spans.iter().filter(|span| span.name != "prepare") {
        let vm = span.fields.get("vm");
        assert!(vm.is_some_and(|vm| vm.starts_with("vm-")), "{span:?}");
    }
    let acquired = spans.iter().filter(|span| span.name == "acquire");
    assert_eq!(acquired.count(), 4);
}

#[tokio::test(start_paused = true)]
async fn the_destruction_of_a_vm_that_is_on_no_book_any_more_names_it_too() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let gate = Gate::new();
    fake.gate_retire(Some(gate.clone()));
    let lease = pool.acquire(PY).unwrap();
    let stopping = pool.clone();
    let stop = tokio::spawn(async move { stopping.stop_within(secs(1)).await });
    // The pool has ended the leased VM and waits only for the parked ones.
    sleep(secs(2)).await;
    assert_eq!(counts(&pool, PY).leased, 0);
    let trace = Trace::begin();
    let name = lease.id().to_string();
    drop(lease);
    settle().await;
    gate.open();
    stop.await.unwrap();
    let spans = trace.spans();
    let [destroyed] = &*spans else {
        panic!("{spans:?}")
    };
    assert_eq!(
        (&*destroyed.name, &destroyed.fields["vm"]),
        ("destroy", &name)
    );
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_boot_is_logged_with_its_vm_and_its_cause() {
    let trace = Trace::begin();
    let fake = FakeBackend::new();
    fake.script(PY, [Boot::Fail("a disk is full")]);
    let pool = by_hand(&fake, config(1)).await;
    pool.replenish(PY).await.unwrap();
    let logged = trace.events();
    let failure = logged.iter().find(|event| event.name == "a boot failed");
    let failure = failure.expect("logged");
    assert_eq!(failure.fields["vm"], "vm-1");
    assert!(failure.fields["cause"].contains("a disk is full"));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn the_events_of_a_size_that_demand_moves_name_the_size() {
    let fake = FakeBackend::new();
    let profile = Profile::new(PY, PY)
        .warm_pool_size(1)
        .autoscale(Autoscale::between(1, 4).window(secs(10)));
    let pool = running(&fake, PoolConfig::new(100).profile(profile).health(quiet())).await;
    let mut events = pool.subscribe();
    assert!(pool.acquire_many(PY, 2).is_err());
    sleep(secs(11)).await;
    let mut sizes = Vec::new();
    while let Ok(event) = events.try_recv() {
        if let hearth_pool::EventKind::Resized(size) = event.kind {
            sizes.push(size);
        }
    }
    assert_eq!(sizes, [2]);
    stop_clean(pool, &fake).await;
}
