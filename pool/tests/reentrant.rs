//! Observers of a pool may call into it: the code for logs, spans, metrics, events and wakers is
//! the embedding program's, and none of it runs under the pool's lock. A test program of its own,
//! because it installs a subscriber and a recorder for the whole process.

#![allow(
    clippy::field_reassign_with_default,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

#[allow(dead_code, reason = "the other tests need more of it")]
#[path = "contract/support.rs"]
mod support;

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use futures::task::{ArcWake, waker};
use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

use crate::support::*;
use hearth_pool::fake::{Boot, FakeBackend, FakeVmHandle, Gate, Method, Ping};
use hearth_pool::{Parking, Pool, Profile};

static POOL: OnceLock<Pool<FakeBackend>> = OnceLock::new();
static CALLS: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];
/// Number of log events of the backend itself.
static BY_BACKEND: AtomicUsize = AtomicUsize::new(0);

#[derive(Clone, Copy)]
enum Watcher {
    Log,
    Metric,
    Waker,
}

/// Calls into the pool, but not from within such a call.
fn call(watcher: Watcher) {
    thread_local! {
        static BUSY: Cell<bool> = const { Cell::new(false) };
    }
    let Some(pool) = POOL.get() else { return };
    if !BUSY.replace(true) {
        let calls = CALLS[watcher as usize].fetch_add(1, Ordering::Relaxed);
        let _ = pool.status();
        if calls < 20 {
            // Not each time, because an acquire causes more calls.
            drop(pool.acquire(JS));
        }
        BUSY.set(false);
    }
}

struct Logs;

impl Layer<Registry> for Logs {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, Registry>) {
        if event.metadata().target().starts_with("hearth_pool::fake") {
            BY_BACKEND.fetch_add(1, Ordering::Relaxed);
        }
        call(Watcher::Log);
    }

    fn on_new_span(
        &self,
        _: &tracing::span::Attributes<'_>,
        _: &tracing::span::Id,
        _: Context<'_, Registry>,
    ) {
        call(Watcher::Log);
    }
}

struct Numbers;

impl CounterFn for Numbers {
    fn increment(&self, _: u64) {
        call(Watcher::Metric);
    }
    fn absolute(&self, _: u64) {}
}

impl GaugeFn for Numbers {
    fn increment(&self, _: f64) {}
    fn decrement(&self, _: f64) {}
    fn set(&self, _: f64) {
        call(Watcher::Metric);
    }
}

impl HistogramFn for Numbers {
    fn record(&self, _: f64) {
        call(Watcher::Metric);
    }
}

impl Recorder for Numbers {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Arc::new(Numbers))
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Arc::new(Numbers))
    }
    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Arc::new(Numbers))
    }
}

struct Woken;

impl ArcWake for Woken {
    fn wake_by_ref(_: &Arc<Self>) {
        call(Watcher::Waker);
    }
}

/// Polls once, with a waker that calls into the pool.
fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) {
    let waker = waker(Arc::new(Woken));
    let polled = future.poll(&mut std::task::Context::from_waker(&waker));
    assert!(polled.is_pending());
}

/// Ends a VM between its check and its parking. The backend logs that, in a call under the pool's
/// lock.
async fn parked_when_dead(fake: &FakeBackend, pool: &Pool<FakeBackend>) {
    pool.wait_ready(secs(600)).await.unwrap();
    let gate = Gate::new();
    for vm in fake.live() {
        vm.script_pings([Ping::Gate(gate.clone())]);
    }
    let (checking, victims) = (pool.clone(), fake.clone());
    let check = tokio::spawn(async move { checking.check(PY, 1).await });
    gate.held(1).await;
    gate.open();
    // Before the pool receives the result of the check.
    let kill = tokio::spawn(async move { victims.live().iter().for_each(FakeVmHandle::kill) });
    kill.await.unwrap();
    check.await.unwrap().unwrap();
    assert_eq!(BY_BACKEND.load(Ordering::Relaxed), 1);
}

/// Causes everything that a pool reports.
async fn life() {
    let fake = FakeBackend::new();
    let mut config = config(2).profile(Profile::new(JS, JS).warm_pool_size(1));
    config.park = Some(Parking::Paused);
    config.limits.vms = 6;
    config.boot.breaker_failures = 2;
    config.lease.deadline_ms = 60_000;
    fake.script(PY, [Boot::Fail("once")]);
    fake.refuse_template(PY, Some("no memory"));
    let pool = make(&fake, config);
    POOL.set(pool.clone()).map_err(drop).unwrap();
    let mut events = pool.subscribe();
    let mut event = Box::pin(events.recv());
    poll_once(event.as_mut());
    pool.start().await.unwrap();
    pool.wait_ready(secs(600)).await.unwrap();
    let leases = pool.acquire_many(PY, 2).unwrap();
    gated(&fake, PY);
    let mut waiting = Box::pin(pool.acquire_timeout(PY, secs(600)));
    poll_once(waiting.as_mut());
    let mut replenishing = Box::pin(pool.replenish(PY));
    poll_once(replenishing.as_mut());
    let mut offering = Box::pin(pool.offer(PY, fake.make(PY)));
    poll_once(offering.as_mut());
    settle().await;
    fake.by_default(PY, Boot::Fine);
    drop(leases);
    settle().await;
    pool.resize(PY, 0).unwrap();
    settle().await;
    drop((waiting, replenishing, offering));
    pool.resize(PY, 1).unwrap();
    pool.wait_ready(secs(600)).await.unwrap();
    // One VM fails its check, one dies, one lease exceeds its time limit, and the backend panics.
    for vm in fake.live() {
        vm.script_pings([Ping::Wrong("nonce")]);
    }
    pool.check(PY, 9).await.unwrap();
    pool.wait_ready(secs(600)).await.unwrap();
    for vm in fake.live() {
        vm.kill();
    }
    drop(pool.acquire(PY));
    pool.wait_ready(secs(600)).await.unwrap();
    let late = pool.acquire(PY).unwrap();
    tokio::time::sleep(secs(61)).await;
    parked_when_dead(&fake, &pool).await;
    fake.panic_in(Method::Alive);
    drop(pool.acquire(PY));
    drop(late);
    pool.stop().await;
}

#[test]
fn whoever_watches_a_pool_may_call_into_it() {
    tracing::subscriber::set_global_default(Registry::default().with(Logs)).unwrap();
    metrics::set_global_recorder(Numbers).map_err(drop).unwrap();
    let (done, over) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(life());
        done.send(()).unwrap();
    });
    // A deadlock would last for ever, hence the timeout.
    over.recv_timeout(Duration::from_secs(60)).unwrap();
    for calls in &CALLS {
        assert!(calls.load(Ordering::Relaxed) > 0, "{CALLS:?}");
    }
}
