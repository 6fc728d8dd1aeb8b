//! The contract's section "Start and stop", row by row.

use crate::support::*;
use hearth_pool::fake::{Boot, FakeBackend, FakeVmError, Gate, Method, Ping};
use hearth_pool::{
    AcquireError, BootFailure, EventKind, NotReady, Phase, Profile, Refill, StartError,
};
use tokio::time::{Instant, sleep, timeout};

fn two() -> hearth_pool::PoolConfig {
    config(4).profile(Profile::new(JS, JS).warm_pool_size(2))
}

#[tokio::test(start_paused = true)]
async fn start_boots_all_profiles_in_parallel() {
    let fake = FakeBackend::new();
    fake.by_default(PY, Boot::After(secs(1)));
    fake.by_default(JS, Boot::After(secs(1)));
    let pool = make(&fake, two());
    let began = Instant::now();
    let report = pool.start().await.unwrap();
    assert_eq!(
        began.elapsed(),
        secs(2),
        "four by two, two by one, side by side"
    );
    assert_eq!(
        report.profiles.iter().map(|p| p.booted).collect::<Vec<_>>(),
        [4, 2]
    );
    assert_eq!(fake.tally(PY).most_booting, 2);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn start_reports_which_vms_failed_and_why_and_the_loop_makes_up_for_them() {
    let fake = FakeBackend::new();
    fake.script(PY, [Boot::Fine, Boot::Fail("disk full"), Boot::Panic]);
    let pool = make(&fake, config(4));
    let mut events = pool.subscribe();
    let report = pool.start().await.unwrap();
    let python = &report.profiles[0];
    assert_eq!((python.booted, python.failures.len()), (2, 2));
    assert!(
        matches!(&python.failures[0].why, BootFailure::Backend(why) if why.to_string() == "disk full")
    );
    assert!(matches!(&python.failures[1].why, BootFailure::Panicked));
    let which: Vec<_> = python.failures.iter().map(|failure| failure.vm).collect();
    let mut failed = Vec::new();
    while let Ok(event) = events.try_recv() {
        if matches!(event.kind, EventKind::BootFailed(_)) {
            failed.push(event.vm);
        }
    }
    assert_eq!(which, failed, "by the numbers of its events");
    pool.wait_ready(secs(10)).await.unwrap();
    assert_eq!(ready(&pool), 4);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn start_fails_if_no_vm_at_all_could_be_booted_for_a_profile() {
    let fake = FakeBackend::new();
    fake.by_default(JS, Boot::Fail("no node"));
    let pool = make(&fake, two());
    let error = pool.start().await.unwrap_err();
    let StartError::NoVm(report) = &error else {
        panic!("{error}")
    };
    assert_eq!(
        (report.profiles[0].booted, report.profiles[1].booted),
        (4, 0)
    );
    assert!(
        error.to_string().contains("javascript (no node)"),
        "{error}"
    );
    assert!(fake.live().is_empty(), "everything it created is destroyed");
    assert_eq!(
        (pool.status().phase, pool.status().usage.vms),
        (Phase::Stopped, 0)
    );
    // Once the profile works, the pool starts.
    fake.by_default(JS, Boot::Fine);
    pool.start().await.unwrap();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_profile_that_is_to_have_no_vm_does_not_keep_the_pool_from_starting() {
    let fake = FakeBackend::new();
    let pool = running(&fake, two()).await;
    pool.drain(JS, secs(1)).await.unwrap();
    pool.stop().await;
    pool.start().await.expect("drained");
    assert_eq!((ready(&pool), counts(&pool, JS).ready), (4, 0));
    pool.undrain(JS).unwrap();
    pool.wait_ready(secs(1)).await.unwrap();
    pool.stop().await;
    pool.resize(JS, 0).unwrap();
    pool.start().await.expect("of size 0");
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_profile_that_others_fill_during_the_start_has_its_vms() {
    let fake = FakeBackend::new();
    let gate = Gate::new();
    fake.script_prepare(PY, [Boot::Gate(gate.clone())]);
    let pool = make(&fake, config(1));
    let starting = pool.clone();
    let start = tokio::spawn(async move { starting.start().await });
    gate.held(1).await;
    pool.replenish(PY).await.unwrap();
    gate.open();
    let report = start.await.unwrap().unwrap();
    assert_eq!((report.profiles[0].booted, fake.tally(PY).boots), (1, 1));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn start_fails_if_a_profile_cannot_be_prepared() {
    for step in [Boot::Fail("no kernel"), Boot::Panic] {
        let fake = FakeBackend::new();
        fake.script_prepare(JS, [step]);
        let pool = make(&fake, two());
        assert!(matches!(pool.start().await, Err(StartError::NoVm(_))));
        assert!(fake.live().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_start_destroys_everything_it_created() {
    let fake = FakeBackend::new();
    fake.by_default(JS, Boot::Hang);
    let pool = make(&fake, two());
    assert!(timeout(secs(5), pool.start()).await.is_err());
    pool.stop().await;
    assert!(fake.live().is_empty());
    let tally = fake.tally(PY);
    assert_eq!((tally.created, tally.retired), (4, 4));
    assert_eq!(fake.tally(JS).booting, 0);
    fake.by_default(JS, Boot::Fine);
    pool.start().await.unwrap();
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn start_during_stop_is_an_error_and_start_after_a_clean_stop_works() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    assert!(matches!(pool.start().await, Err(StartError::Running)));
    let lease = pool.acquire(PY).unwrap();
    let stopping = pool.clone();
    let stop = tokio::spawn(async move { stopping.stop().await });
    settle().await;
    assert!(matches!(pool.start().await, Err(StartError::Stopping)));
    drop(lease);
    stop.await.unwrap();
    for _ in 0..3 {
        pool.start().await.unwrap();
        assert!(pool.acquire(PY).is_ok());
        pool.stop().await;
        assert!(fake.live().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn stop_during_start_ends_it() {
    let fake = FakeBackend::new();
    fake.by_default(PY, Boot::Hang);
    let pool = make(&fake, config(2));
    let starting = pool.clone();
    let start = tokio::spawn(async move { starting.start().await });
    settle().await;
    pool.stop().await;
    assert!(matches!(start.await.unwrap(), Err(StartError::Stopping)));
    assert_eq!(fake.tally(PY).booting, 0);
}

#[tokio::test(start_paused = true)]
async fn stop_during_start_ends_its_preparations_too() {
    let fake = FakeBackend::new();
    let gate = Gate::new();
    fake.script_prepare(PY, [Boot::Gate(gate.clone())]);
    let pool = make(&fake, config(2));
    let starting = pool.clone();
    let start = tokio::spawn(async move { starting.start().await });
    gate.held(1).await;
    let rest = Gate::new();
    fake.gate_settle(Some(rest.clone()));
    let stopping = pool.clone();
    let stop = tokio::spawn(async move { stopping.stop().await });
    rest.held(1).await;
    assert_eq!(gate.waiting(), 0, "what it was making is given up");
    settle().await;
    assert!(!stop.is_finished(), "and awaited");
    rest.open();
    stop.await.unwrap();
    assert!(matches!(start.await.unwrap(), Err(StartError::Stopping)));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_was_stopped_or_cancelled_leaves_the_next_life_alone() {
    for cancelled in [false, true] {
        let fake = FakeBackend::new();
        let gate = Gate::new();
        fake.script_prepare(PY, [Boot::Gate(gate.clone())]);
        let pool = make(&fake, config(2));
        let mut first = Box::pin(pool.start());
        tokio::select! {
            _ = &mut first => panic!("resolved"),
            () = gate.held(1) => {}
        }
        pool.stop().await;
        pool.start().await.unwrap();
        gate.open();
        if cancelled {
            drop(first);
        } else {
            assert!(matches!(first.await, Err(StartError::Stopping)));
        }
        settle().await;
        assert_eq!((pool.status().phase, ready(&pool)), (Phase::Running, 2));
        assert_eq!(fake.tally(PY).boots, 2, "the first start boots nothing");
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_is_over_when_its_own_life_is() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    let other = pool.clone();
    let mut stop = Box::pin(async move { other.stop().await });
    assert!(futures::poll!(&mut stop).is_pending());
    while pool.start().await.is_err() {
        tokio::task::yield_now().await;
    }
    assert!(timeout(secs(60), stop).await.is_ok());
    assert_eq!(pool.status().phase, Phase::Running);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn stop_ends_boots_checks_waiters_and_replenish_calls() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let gate = Gate::new();
    parked(&fake)[0].script_pings([Ping::Gate(gate.clone())]);
    let other = pool.clone();
    let pass = tokio::spawn(async move { other.check(PY, 1).await });
    gate.held(1).await;
    fake.by_default(PY, Boot::Hang);
    pool.resize(PY, 4).unwrap();
    let other = pool.clone();
    let replenish = tokio::spawn(async move { other.replenish(PY).await });
    let leases = pool.acquire_many(PY, 2).unwrap();
    let other = pool.clone();
    let waiter = tokio::spawn(async move { other.acquire_timeout(PY, secs(900)).await });
    settle().await;
    assert_eq!(
        (counts(&pool, PY).booting, counts(&pool, PY).waiting),
        (2, 1)
    );
    drop(leases);
    let began = Instant::now();
    pool.stop().await;
    assert_eq!(began.elapsed(), secs(0));
    assert!(matches!(waiter.await.unwrap(), Err(AcquireError::Stopping)));
    assert!(matches!(
        replenish.await.unwrap().unwrap(),
        hearth_pool::Replenished::Failed(BootFailure::Stopping)
    ));
    assert_eq!(pass.await.unwrap().unwrap().dropped, 1);
    assert_eq!(fake.tally(PY).booting, 0);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn leases_still_out_are_awaited_up_to_the_deadline_then_destroyed() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let (early, late) = (pool.acquire(PY).unwrap(), pool.acquire(PY).unwrap());
    let handle = early.handle();
    let stopping = pool.clone();
    let began = Instant::now();
    let stop = tokio::spawn(async move { stopping.stop_within(secs(7)).await });
    settle().await;
    assert!(early.work().is_ok(), "leases go on until the deadline");
    assert!(matches!(pool.acquire(PY), Err(AcquireError::Stopping)));
    sleep(secs(2)).await;
    drop(early);
    settle().await;
    assert!(!handle.is_alive());
    stop.await.unwrap();
    assert_eq!(began.elapsed(), secs(7));
    assert_eq!(
        late.work(),
        Err(FakeVmError::Ended),
        "its guest runs no more"
    );
    assert_eq!(pool.status().phase, Phase::Stopped);
    assert_eq!(pool.status().usage.vms, 0, "and holds nothing");
    // A new run of the pool is not confused by a lease of the old one.
    pool.start().await.unwrap();
    drop(late);
    settle().await;
    assert_eq!((ready(&pool), pool.status().usage.vms), (2, 2));
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_the_stop_has_ended_holds_nothing_of_the_host() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let leases = pool.acquire_many(PY, 2).unwrap();
    leases[0].handle().kill();
    settle().await;
    assert!(leases[0].handle().holds_memory(), "ended, but its owner's");
    pool.stop_within(secs(1)).await;
    for lease in &leases {
        assert!(!lease.handle().holds_memory());
        assert_eq!(lease.work(), Err(FakeVmError::Ended));
    }
    assert_eq!(pool.status().usage.vms, 0);
    let (vm, reservation) = leases.into_iter().next().unwrap().into_inner();
    assert!(reservation.is_none());
    drop(vm);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn stop_is_idempotent_and_survives_cancellation_of_its_caller() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2)).await;
    let lease = pool.acquire(PY).unwrap();
    assert!(timeout(secs(1), pool.stop_within(secs(100))).await.is_err());
    assert_eq!(pool.status().phase, Phase::Stopping, "it goes on by itself");
    let began = Instant::now();
    tokio::join!(pool.stop_within(secs(3)), pool.stop_within(secs(50)));
    assert_eq!(began.elapsed(), secs(3), "the earliest deadline counts");
    drop(lease);
    pool.stop().await;
    pool.stop().await;
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn after_stop_no_task_remains() {
    let fake = FakeBackend::new();
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    let pool = running(&fake, two().health(Default::default())).await;
    assert!(metrics.num_alive_tasks() > before);
    drop(pool.acquire(PY).unwrap());
    pool.stop().await;
    settle().await;
    assert_eq!(
        metrics.num_alive_tasks(),
        before,
        "the health task is done, and all others"
    );
    assert_eq!(pool.status().phase, Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn stop_does_not_wait_for_a_destruction_that_hangs() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(1)).await;
    fake.gate_retire(Some(Gate::new()));
    let began = Instant::now();
    pool.stop().await;
    assert_eq!(began.elapsed(), secs(30), "bounded");
    assert!(fake.live().is_empty());
}

#[tokio::test(start_paused = true)]
async fn wait_ready_resolves_when_every_profile_is_full() {
    let fake = FakeBackend::new();
    let pool = make(&fake, two());
    assert_eq!(pool.wait_ready(secs(1)).await, Err(NotReady::NotRunning));
    pool.start().await.unwrap();
    let gate = gated(&fake, JS);
    drop(pool.acquire(JS).unwrap());
    settle().await;
    assert_eq!(
        pool.wait_ready(secs(1)).await,
        Err(NotReady::Timeout(secs(1)))
    );
    let began = Instant::now();
    let waiting = pool.clone();
    let ready = tokio::spawn(async move { waiting.wait_ready(secs(10)).await });
    sleep(secs(2)).await;
    gate.open();
    assert_eq!(ready.await.unwrap(), Ok(()));
    assert_eq!(began.elapsed(), secs(2));
    let waiting = pool.clone();
    pool.stop().await;
    assert_eq!(waiting.wait_ready(secs(1)).await, Err(NotReady::NotRunning));
}

#[tokio::test(start_paused = true)]
async fn wait_ready_does_not_poll() {
    let fake = FakeBackend::new();
    let mut config = config(2);
    config.boot.timeout_ms = 7_200_000;
    let pool = running(&fake, config).await;
    let gate = gated(&fake, PY);
    let lease = pool.acquire(PY).unwrap();
    let waiting = pool.clone();
    let waits = tokio::spawn(async move { waiting.wait_ready(secs(7_200)).await });
    settle().await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.worker_park_count(0);
    // Less than the time limit of a boot.
    sleep(secs(3_600)).await;
    let parks = metrics.worker_park_count(0) - before;
    assert!(parks <= 4, "{parks} wake-ups in an hour");
    assert!(!waits.is_finished());
    gate.open();
    assert_eq!(waits.await.unwrap(), Ok(()));
    drop(lease);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn dropping_the_pool_without_stop_cleans_up_in_the_background() {
    let fake = FakeBackend::new();
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    let pool = running(&fake, config(3)).await;
    let lease = pool.acquire(PY).unwrap();
    let mut events = pool.subscribe();
    drop(pool);
    settle().await;
    assert_eq!(fake.live().len(), 1, "only the lease is out");
    assert!(lease.ping().await.is_ok());
    drop(lease);
    while !matches!(events.recv().await.unwrap().kind, EventKind::Stopped) {}
    assert!(fake.live().is_empty());
    settle().await;
    assert_eq!(metrics.num_alive_tasks(), before);
}

#[test]
fn a_runtime_that_ends_under_a_pool_takes_everything_with_it() {
    let fake = FakeBackend::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let pool = make(&fake, config(3));
    runtime.block_on(pool.start()).unwrap();
    let lease = pool.acquire(PY).unwrap();
    drop(runtime);
    assert_eq!(fake.live().len(), 1);
    assert!(matches!(pool.acquire(PY), Err(AcquireError::Stopping)));
    assert_eq!(pool.status().usage.vms, 1, "what lives is counted");
    drop(lease);
    assert!(fake.live().is_empty());
    assert_eq!(pool.status().usage.vms, 0);
    // The pool can be started on another runtime.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        pool.start().await.unwrap();
        stop_clean(pool, &fake).await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_is_told_before_its_end() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(1));
    for _ in 0..200 {
        pool.start().await.unwrap();
        let mut events = pool.subscribe();
        pool.stop().await;
        let mut last = "nothing";
        while let Ok(event) = events.try_recv() {
            match event.kind {
                EventKind::Stopping => last = "Stopping",
                EventKind::Stopped => assert_eq!(last, "Stopping"),
                _ => {}
            }
        }
        assert_eq!(last, "Stopping");
    }
}

#[test]
fn start_without_a_runtime_is_an_error() {
    let pool = make(&FakeBackend::new(), config(1));
    assert!(matches!(
        futures::executor::block_on(pool.start()),
        Err(StartError::NoRuntime)
    ));
}

#[tokio::test(start_paused = true)]
async fn with_refill_at_start_only_nothing_is_made_up_for() {
    let fake = FakeBackend::new();
    let pool = running(&fake, config(2).refill(Refill::AtStart)).await;
    assert_eq!(ready(&pool), 2);
    drop(pool.acquire(PY).unwrap());
    sleep(secs(60)).await;
    assert_eq!(ready(&pool), 1);
    stop_clean(pool, &fake).await;
}

#[tokio::test(start_paused = true)]
async fn the_event_stream_tells_the_life_of_a_vm() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(1).refill(Refill::AtStart));
    let mut events = pool.subscribe();
    pool.start().await.unwrap();
    drop(pool.acquire(PY).unwrap());
    settle().await;
    pool.stop().await;
    let mut names = Vec::new();
    while let Ok(event) = events.try_recv() {
        names.push(
            format!("{:?}", event.kind)
                .split(['(', ' ', '{'])
                .next()
                .unwrap()
                .to_owned(),
        );
    }
    let expected = [
        "Booting",
        "Ready",
        "Started",
        "Leased",
        "Returned",
        "Destroyed",
        "Stopping",
        "Stopped",
    ];
    assert_eq!(names, expected);
}

/// A runtime that runs only while the test drives it, with a paused clock or a real one.
fn own_runtime(paused: bool) -> tokio::runtime::Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(paused).build().unwrap()
}

#[test]
fn stop_ends_a_pool_whose_runtime_is_not_driven_any_more() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(3));
    let undriven = own_runtime(false);
    undriven.block_on(pool.start()).unwrap();
    let [late, early] = [pool.acquire(PY).unwrap(), pool.acquire(PY).unwrap()];
    // The boots that replace the two leased VMs never end now.
    own_runtime(true).block_on(async {
        let stopping = pool.clone();
        let stop = tokio::spawn(async move { stopping.stop_within(secs(60)).await });
        sleep(secs(30)).await;
        assert!(!stop.is_finished(), "leases have their time");
        drop(early);
        assert!(late.handle().is_alive() && fake.live().len() == 1);
        stop.await.unwrap();
    });
    assert!(!late.handle().is_alive(), "and no more");
    let status = pool.status();
    assert_eq!((status.phase, status.usage.vms), (Phase::Stopped, 0));
    drop(late);
    assert!(fake.live().is_empty());
    // The pool starts again elsewhere, and its old loop, when driven after all, leaves it alone.
    own_runtime(true).block_on(async {
        pool.start().await.unwrap();
        undriven.block_on_elsewhere(settle);
        assert_eq!((ready(&pool), pool.status().phase), (3, Phase::Running));
        stop_clean(pool.clone(), &fake).await;
    });
}

trait BlockOnElsewhere {
    fn block_on_elsewhere<F: Future<Output = ()>>(&self, run: fn() -> F);
}

impl BlockOnElsewhere for tokio::runtime::Runtime {
    /// Runs on a thread of its own: one thread drives one runtime at a time.
    fn block_on_elsewhere<F: Future<Output = ()>>(&self, run: fn() -> F) {
        std::thread::scope(|scope| {
            scope.spawn(|| self.block_on(run()));
        });
    }
}

#[test]
fn a_lease_taken_out_after_its_runtime_ended_keeps_its_share_of_the_limits() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(1));
    let runtime = own_runtime(true);
    runtime.block_on(pool.start()).unwrap();
    let lease = pool.acquire(PY).unwrap();
    drop(runtime);
    let (vm, reservation) = lease.into_inner();
    assert_eq!(pool.status().usage.vms, 1);
    drop((vm, reservation));
    assert_eq!(pool.status().usage.vms, 0);
}

#[tokio::test(start_paused = true)]
async fn who_comes_after_the_stop_is_told_of_the_stop() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(1));
    assert!(matches!(pool.acquire(PY), Err(AcquireError::NotStarted)));
    pool.start().await.unwrap();
    pool.stop().await;
    assert!(matches!(pool.acquire(PY), Err(AcquireError::Stopping)));
    let waited = pool.acquire_timeout(PY, secs(1)).await;
    assert!(matches!(waited, Err(AcquireError::Stopping)));
    pool.start().await.unwrap();
    assert!(pool.acquire(PY).is_ok());
    pool.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_panics_in_settled_hangs_neither_start_nor_stop() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(1));
    fake.script(PY, [Boot::Fail("no")]);
    fake.panic_in(Method::Settled);
    let start = timeout(secs(600), pool.start()).await.expect("ends");
    assert!(matches!(start, Err(StartError::NoVm(_))));
    // Also while a preparation is being cancelled.
    fake.script_prepare(PY, [Boot::Hang]);
    fake.panic_in(Method::Settled);
    let starting = pool.clone();
    let start = tokio::spawn(async move { starting.start().await });
    settle().await;
    timeout(secs(600), pool.stop()).await.expect("ends");
    assert!(start.await.unwrap().is_err());
    assert!(pool.start().await.is_ok());
    // And while a boot is being cancelled.
    fake.by_default(PY, Boot::Hang);
    drop(pool.acquire(PY).unwrap());
    settle().await;
    fake.panic_in(Method::Settled);
    timeout(secs(600), pool.stop()).await.expect("ends");
    assert_eq!(pool.status().usage.vms, 0);
}

#[tokio::test(start_paused = true)]
async fn a_vm_whose_end_the_backend_cannot_watch_is_replaced() {
    let fake = FakeBackend::new();
    let pool = make(&fake, config(2));
    fake.panic_in(Method::Watch);
    pool.start().await.unwrap();
    settle().await;
    pool.wait_ready(secs(600)).await.unwrap();
    settle().await;
    let tally = fake.tally(PY);
    assert_eq!((tally.created, tally.retired), (3, 1));
    timeout(secs(600), stop_clean(pool, &fake))
        .await
        .expect("ends");
}
