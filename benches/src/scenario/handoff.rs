//! How long a caller waits for a guest that is ready: the hand-off alone, the hand-off to the guest's
//! first answer, a burst, and the hand-off while the pool refills.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_pool::kvm::KvmBackend;
use hearth_pool::{Parking, Refill};
use tokio::sync::Barrier;
use tokio::time::sleep;

use super::boot::Files;
use super::pool::{Guest, Guests, PROFILE, backend, config, fill, full, start};
use super::{ScenarioError, us};
use crate::report::Report;
use crate::target::{Bound, Statistic};

/// Guests of a burst.
const BURST: usize = 32;
/// Guests of a pool otherwise.
const SIZE: usize = 8;
/// For how long nothing happens before a hand-off.
const REST: Duration = Duration::from_millis(5);

/// Takes about `n` samples of each metric.
///
/// # Errors
/// When a guest cannot be made or does not answer.
pub async fn run(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let backend = backend(files).await?;
    for parking in [Parking::Paused, Parking::Running] {
        let side = side(parking);
        let samples = to_pong(Arc::clone(&backend), parking, n);
        let (acquired, answered) = task(samples).await?;
        let metric = "acquire on a full pool";
        report.add("handoff", metric, "us", side, acquired);
        report.expect(metric, side, Statistic::P50, Bound::AtMost(10.0));
        report.expect(metric, side, Statistic::P99, Bound::AtMost(100.0));
        report.add("handoff", "acquire to first pong", "us", side, answered);
    }
    report.compare("acquire to first pong", "paused", "running");
    // Whoever waits here is no worker of the runtime: to wake the pool's task it has to wake one.
    let (acquired, _) = to_pong(Arc::clone(&backend), Parking::Paused, n).await?;
    let metric = "acquire from a thread of one's own";
    report.add("handoff", metric, "us", "paused", acquired);
    let acquired = task(after_an_end(Arc::clone(&backend), n)).await?;
    let metric = "acquire just after a guest's end";
    report.add("handoff", metric, "us", "paused", acquired);
    burst(report, &backend, n.div_ceil(BURST)).await?;
    let (idle, busy) = task(refilling(backend, n)).await?;
    report.add("handoff", "acquire", "us", "refilling", busy);
    report.add("handoff", "acquire", "us", "idle", idle);
    report.compare("acquire", "refilling", "idle");
    report.expect_ratio("acquire", "refilling", "idle", Bound::AtMost(2.0));
    Ok(())
}

/// Runs as the tasks of a server do.
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

fn acquire(pool: &Guests) -> Result<Guest, ScenarioError> {
    pool.acquire(PROFILE).map_err(ScenarioError::at("acquire"))
}

/// Samples of the hand-off, and of the hand-off with the first answer, each of a pool that is full and at rest.
async fn to_pong(
    backend: Arc<KvmBackend>,
    parking: Parking,
    n: usize,
) -> Result<(Vec<f64>, Vec<f64>), ScenarioError> {
    let pool = start(&backend, config(SIZE, Refill::Automatic), parking).await?;
    let (mut acquired, mut answered) = (vec![], vec![]);
    for _ in 0..n {
        full(&pool).await?;
        sleep(REST).await;
        let begin = Instant::now();
        let guest = acquire(&pool)?;
        acquired.push(us(begin.elapsed()));
        guest.ping().await.map_err(ScenarioError::at("ping"))?;
        answered.push(us(begin.elapsed()));
        guest.release().await;
    }
    pool.stop().await;
    Ok((acquired, answered))
}

/// Samples of the hand-off just after another guest has ended, while the host still clears up after it.
async fn after_an_end(backend: Arc<KvmBackend>, n: usize) -> Result<Vec<f64>, ScenarioError> {
    let pool = start(&backend, config(SIZE, Refill::Manual), Parking::Paused).await?;
    let mut acquired = vec![];
    for _ in 0..n.div_ceil(SIZE) {
        fill(&pool, SIZE).await?;
        for _ in 0..SIZE {
            let begin = Instant::now();
            let guest = acquire(&pool)?;
            acquired.push(us(begin.elapsed()));
            guest.ping().await.map_err(ScenarioError::at("ping"))?;
            guest.release().await;
        }
    }
    pool.stop().await;
    Ok(acquired)
}

/// A full pool is emptied at once by as many tasks; each counts from the burst's beginning.
async fn burst(
    report: &mut Report,
    backend: &Arc<KvmBackend>,
    rounds: usize,
) -> Result<(), ScenarioError> {
    let pool = start(backend, config(BURST, Refill::Manual), Parking::Paused).await?;
    let (mut served, mut whole) = (vec![], vec![]);
    for _ in 0..rounds {
        fill(&pool, BURST).await?;
        let gate = Arc::new(Barrier::new(BURST + 1));
        let tasks: Vec<_> = (0..BURST)
            .map(|_| {
                let (pool, gate) = (pool.clone(), Arc::clone(&gate));
                tokio::spawn(async move {
                    gate.wait().await;
                    let begin = Instant::now();
                    let guest = acquire(&pool)?;
                    Ok((us(begin.elapsed()), guest))
                })
            })
            .collect();
        gate.wait().await;
        let mut guests = Vec::with_capacity(BURST);
        for task in tasks {
            let taken: Result<_, ScenarioError> = task.await.map_err(ScenarioError::at("burst"))?;
            let (took, guest) = taken?;
            served.push(took);
            guests.push(guest);
        }
        give_back(guests).await;
        fill(&pool, BURST).await?;
        let begin = Instant::now();
        let guests = pool
            .acquire_many(PROFILE, BURST)
            .map_err(ScenarioError::at("burst"))?;
        whole.push(us(begin.elapsed()));
        give_back(guests).await;
    }
    pool.stop().await;
    let metric = "burst of 32, each caller";
    report.add("handoff", metric, "us", "paused", served);
    report.expect(metric, "paused", Statistic::P99, Bound::AtMost(1_000.0));
    report.add("handoff", "32 at once, one caller", "us", "paused", whole);
    Ok(())
}

async fn give_back(guests: Vec<Guest>) {
    for guest in guests {
        guest.release().await;
    }
}

/// The hand-off while others boot, beside that of an idle pool.
async fn refilling(
    backend: Arc<KvmBackend>,
    n: usize,
) -> Result<(Vec<f64>, Vec<f64>), ScenarioError> {
    let pool = start(&backend, config(SIZE, Refill::Automatic), Parking::Paused).await?;
    let (mut idle, mut busy) = (vec![], vec![]);
    while busy.len() < n {
        full(&pool).await?;
        let begin = Instant::now();
        let first = acquire(&pool)?;
        idle.push(us(begin.elapsed()));
        // The first one's replacement boots from here on, and soon those of the others.
        for _ in 1..SIZE {
            sleep(Duration::from_millis(2)).await;
            let begin = Instant::now();
            let guest = acquire(&pool)?;
            busy.push(us(begin.elapsed()));
            drop(guest);
        }
        drop(first);
    }
    pool.stop().await;
    Ok((idle, busy))
}
