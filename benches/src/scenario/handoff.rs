//! How long a caller waits for a guest that is ready: the hand-off alone, after idle time, up to
//! the guest's first answer, in a burst, and while the pool refills.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_pool::kvm::KvmBackend;
use hearth_pool::{Parking, Refill};
use tokio::sync::Barrier;
use tokio::time::sleep;

use super::boot::{Files, Shape};
use super::pool::{Guest, Guests, PROFILE, backend, config, fill, full, start};
use super::sleeper::Sleeper;
use super::{ScenarioError, us};
use crate::fit::Fit;
use crate::process::Held;
use crate::report::Report;
use crate::sweep::Key;
use crate::target::{Bound, Statistic};

/// Sizes of the bursts.
const BURSTS: [usize; 4] = [1, 8, 32, 128];
/// Most memory in MiB that a guest of a burst takes.
const OWN_MIB: u64 = 8;
/// Size of the burst that has a target.
const TARGET: usize = 32;
/// Size of the pool in the other measurements.
const SIZE: usize = 8;
/// Idle time before some hand-offs: caches become cold, processors sleep.
const REST: Duration = Duration::from_millis(5);
/// Pause between hand-offs during a refill.
const PAUSE: Duration = Duration::from_millis(2);
const RESTED: &str = "acquire after 5 ms of rest";

/// Takes about `n` samples of each metric.
///
/// # Errors
/// When a guest cannot be made or does not answer.
pub async fn run(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let (backend, shape) = (backend(files).await?, files.shape);
    for parking in [Parking::Paused, Parking::Running] {
        let side = side(parking);
        let samples = on_a_full_pool(Arc::clone(&backend), shape, parking, n);
        let (acquired, answered) = task(samples).await?;
        let metric = "acquire on a full pool";
        report.add("handoff", metric, "us", side, acquired);
        report.expect(metric, side, Statistic::P50, Bound::AtMost(10.0));
        report.expect(metric, side, Statistic::P99, Bound::AtMost(100.0));
        report.add("handoff", "acquire to first pong", "us", side, answered);
        let samples = after_a_rest(Arc::clone(&backend), shape, parking, n);
        let (rested, woken) = task(samples).await?;
        report.add("handoff", RESTED, "us", side, rested);
        if parking == Parking::Paused {
            report.add("handoff", RESTED, "us", "a bare thread", woken);
            report.compare(RESTED, side, "a bare thread");
        }
    }
    report.compare("acquire to first pong", "paused", "running");
    // This thread is no worker of the runtime: to wake the pool's task it has to wake a worker.
    let (acquired, _) = on_a_full_pool(Arc::clone(&backend), shape, Parking::Paused, n).await?;
    let metric = "acquire from a thread of one's own";
    report.add("handoff", metric, "us", "paused", acquired);
    let acquired = task(after_an_end(Arc::clone(&backend), shape, n)).await?;
    let metric = "acquire just after a guest's end";
    report.add("handoff", metric, "us", "paused", acquired);
    let mut bursts = vec![];
    for size in BURSTS {
        bursts.extend(burst(report, &backend, shape, size, n.div_ceil(size)).await?);
    }
    let each = bursts.iter().map(|burst| (burst.size, &burst.served[..]));
    report.fits.extend(grown("burst, each caller", each));
    let whole = bursts.iter().map(|burst| (burst.size, &burst.whole[..]));
    report.fits.extend(grown("all at once, one caller", whole));
    let (idle, busy) = task(refilling(backend, shape, n)).await?;
    report.add("handoff", "acquire", "us", "refilling", busy);
    report.add("handoff", "acquire", "us", "idle", idle);
    report.compare("acquire", "refilling", "idle");
    report.expect_ratio("acquire", "refilling", "idle", Bound::AtMost(2.0));
    Ok(())
}

/// Runs the measurement as a spawned task, like the tasks of a server.
async fn task<T: Send + 'static>(
    samples: impl Future<Output = Result<T, ScenarioError>> + Send + 'static,
) -> Result<T, ScenarioError> {
    let task = tokio::spawn(samples);
    task.await.map_err(ScenarioError::at("task"))?
}

fn side(parking: Parking) -> &'static str {
    match parking {
        Parking::Running => "running",
        Parking::Paused => "paused",
    }
}

/// Acquires a guest; returns it with the time of the hand-off in us.
fn acquire(pool: &Guests) -> Result<(Guest, f64), ScenarioError> {
    let begin = Instant::now();
    let guest = pool.acquire(PROFILE);
    let took = us(begin.elapsed());
    Ok((guest.map_err(ScenarioError::at("acquire"))?, took))
}

/// Samples the hand-off, and the hand-off with the first answer, each from a full pool.
async fn on_a_full_pool(
    backend: Arc<KvmBackend>,
    shape: Shape,
    parking: Parking,
    n: usize,
) -> Result<(Vec<f64>, Vec<f64>), ScenarioError> {
    let pool = start(&backend, config(shape, SIZE, Refill::Automatic), parking).await?;
    let (mut acquired, mut answered) = (vec![], vec![]);
    for _ in 0..n {
        full(&pool).await?;
        let begin = Instant::now();
        let (guest, took) = acquire(&pool)?;
        acquired.push(took);
        guest.ping().await.map_err(ScenarioError::at("ping"))?;
        answered.push(us(begin.elapsed()));
        guest.release().await;
    }
    pool.stop().await;
    Ok((acquired, answered))
}

/// Samples the hand-off after idle time, in turns with the wake-up of a plain thread after the same
/// idle time.
async fn after_a_rest(
    backend: Arc<KvmBackend>,
    shape: Shape,
    parking: Parking,
    n: usize,
) -> Result<(Vec<f64>, Vec<f64>), ScenarioError> {
    let pool = start(&backend, config(shape, SIZE, Refill::Automatic), parking).await?;
    let sleeper = Sleeper::start();
    let (mut rested, mut woken) = (vec![], vec![]);
    for _ in 0..n {
        full(&pool).await?;
        sleep(REST).await;
        let (guest, took) = acquire(&pool)?;
        rested.push(took);
        guest.release().await;
        sleep(REST).await;
        let begin = Instant::now();
        sleeper.wake();
        woken.push(us(begin.elapsed()));
    }
    pool.stop().await;
    Ok((rested, woken))
}

/// Samples the hand-off just after another guest has ended, while the host still cleans up after
/// it.
async fn after_an_end(
    backend: Arc<KvmBackend>,
    shape: Shape,
    n: usize,
) -> Result<Vec<f64>, ScenarioError> {
    let pool = start(
        &backend,
        config(shape, SIZE, Refill::Manual),
        Parking::Paused,
    )
    .await?;
    let mut acquired = vec![];
    for _ in 0..n.div_ceil(SIZE) {
        fill(&pool, SIZE).await?;
        for _ in 0..SIZE {
            let (guest, took) = acquire(&pool)?;
            acquired.push(took);
            guest.ping().await.map_err(ScenarioError::at("ping"))?;
            guest.release().await;
        }
    }
    pool.stop().await;
    Ok(acquired)
}

/// A burst's size, the times of its callers, and the times of one caller that takes all guests at
/// once.
struct Burst {
    size: usize,
    served: Vec<f64>,
    whole: Vec<f64>,
}

/// Fits how a time grows with the size of the burst.
fn grown<'a>(metric: &str, bursts: impl Iterator<Item = (usize, &'a [f64])>) -> Option<Fit> {
    let points: Vec<(f64, &[f64])> = bursts.map(|(size, times)| (size as f64, times)).collect();
    Some(Fit {
        scenario: "handoff".into(),
        metric: metric.into(),
        unit: "us".into(),
        side: side(Parking::Paused).into(),
        per: Key::Guests.unit().into(),
        ..Fit::of(&points)?
    })
}

/// Empties a full pool by as many tasks at once, each of which times its own `acquire`; then by one
/// `acquire_many`. `None` if the host has too little memory.
async fn burst(
    report: &mut Report,
    backend: &Arc<KvmBackend>,
    shape: Shape,
    size: usize,
    rounds: usize,
) -> Result<Option<Burst>, ScenarioError> {
    let needed = 2 * size as u64 * OWN_MIB;
    let held = Held::now().map_err(ScenarioError::at("what this process holds"))?;
    let available = held.available_kib / 1024;
    if available < needed {
        let why = format!("handoff burst of {size}: the host has not {needed} MiB available");
        report.not_measured.push(why);
        return Ok(None);
    }
    let mut config = config(shape, size, Refill::Manual);
    // Guests that were just handed out use almost none of the memory that they are promised.
    let promised = 2 * size as u64 * u64::from(shape.memory_mib);
    let percent = (promised * 100).div_ceil(available.max(1)) + 10;
    config.limits.memory_overcommit_percent = u32::try_from(percent).unwrap_or(100).max(100);
    let pool = start(backend, config, Parking::Paused).await?;
    let (mut served, mut whole) = (vec![], vec![]);
    for _ in 0..rounds {
        fill(&pool, size).await?;
        let gate = Arc::new(Barrier::new(size + 1));
        let tasks: Vec<_> = (0..size)
            .map(|_| {
                let (pool, gate) = (pool.clone(), Arc::clone(&gate));
                tokio::spawn(async move {
                    gate.wait().await;
                    acquire(&pool)
                })
            })
            .collect();
        gate.wait().await;
        let mut guests = Vec::with_capacity(size);
        for task in tasks {
            let taken: Result<_, ScenarioError> = task.await.map_err(ScenarioError::at("burst"))?;
            let (guest, took) = taken?;
            served.push(took);
            guests.push(guest);
        }
        give_back(guests).await;
        fill(&pool, size).await?;
        let begin = Instant::now();
        let guests = pool
            .acquire_many(PROFILE, size)
            .map_err(ScenarioError::at("burst"))?;
        whole.push(us(begin.elapsed()));
        give_back(guests).await;
    }
    pool.stop().await;
    let metric = format!("burst of {size}, each caller");
    report.add("handoff", &metric, "us", "paused", served.clone());
    if size == TARGET {
        report.expect(&metric, "paused", Statistic::P99, Bound::AtMost(1_000.0));
    }
    let metric = format!("{size} at once, one caller");
    report.add("handoff", &metric, "us", "paused", whole.clone());
    let burst = Burst {
        size,
        served,
        whole,
    };
    Ok(Some(burst))
}

async fn give_back(guests: Vec<Guest>) {
    for guest in guests {
        guest.release().await;
    }
}

/// Samples the hand-off while others boot, beside that of an idle pool after the same pause.
async fn refilling(
    backend: Arc<KvmBackend>,
    shape: Shape,
    n: usize,
) -> Result<(Vec<f64>, Vec<f64>), ScenarioError> {
    let pool = start(
        &backend,
        config(shape, SIZE, Refill::Automatic),
        Parking::Paused,
    )
    .await?;
    let (mut idle, mut busy) = (vec![], vec![]);
    while busy.len() < n {
        full(&pool).await?;
        sleep(PAUSE).await;
        let (first, took) = acquire(&pool)?;
        idle.push(took);
        // The first guest's replacement boots from here on, and soon those of the others.
        for _ in 1..SIZE {
            sleep(PAUSE).await;
            let (guest, took) = acquire(&pool)?;
            busy.push(took);
            drop(guest);
        }
        drop(first);
    }
    pool.stop().await;
    Ok((idle, busy))
}
