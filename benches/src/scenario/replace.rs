//! From the end of a parked guest to its replacement.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_pool::{EventKind, Parking, Pool, PoolEvent, Refill, VmId};
use tokio::sync::broadcast::Receiver;

use super::ScenarioError;
use super::boot::Files;
use super::pool::{PROFILE, backend, config};
use super::victim::{Victims, Way};
use crate::report::Report;
use crate::target::{Bound, Statistic};

/// Longest wait for a pong on hardware, with one attempt: the time to detect a silent guest.
const PING_TIMEOUT_MS: u64 = 500;
/// How long a replacement may take before the run is given up.
const STUCK: Duration = Duration::from_secs(120);
/// Target in milliseconds from the end of a parked guest until it is noticed.
const NOTICED_MS: f64 = 50.0;

/// Ends parked guests in every way, `n` times each.
///
/// # Errors
/// When a guest cannot be made, or is not replaced.
pub async fn run(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let victims = Victims::new(backend(files).await?);
    let mut config = config(files.shape, 1, Refill::Automatic).park(Parking::Running);
    (config.health.ping_timeout_ms, config.health.attempts) = (PING_TIMEOUT_MS, 1);
    // A guest that ends soon after its boot counts against its image, and several such guests open
    // the circuit breaker. Here the guests are ended on purpose.
    config.boot.early_death_ms = 0;
    let pool = Pool::new(Arc::clone(&victims), config);
    let pool = pool.map_err(ScenarioError::at("configuration"))?;
    pool.start().await.map_err(ScenarioError::at("start"))?;
    for (side, way) in [
        ("kill", Way::Kill),
        ("panic", Way::Panic),
        ("power off", Way::PowerOff),
        ("frozen vCPU", Way::Freeze),
        ("wedged agent", Way::Wedge),
    ] {
        let (mut noticed, mut replaced, mut forked) = (vec![], vec![], vec![]);
        for _ in 0..n {
            let times = replacement(&pool, &victims, way).await?;
            noticed.push(times.noticed);
            replaced.push(times.replaced);
            forked.push(times.forked);
        }
        // The end of a guest is reported by an event; a silent guest is found by a check.
        report.add("replace", "end to notice", "ms", side, noticed);
        report.add("replace", "end to replacement", "ms", side, replaced);
        report.add("replace", "the replacement's boot", "ms", side, forked);
        if !way.is_silent() {
            let bound = Bound::AtMost(NOTICED_MS);
            report.expect("end to notice", side, Statistic::P99, bound);
        }
    }
    pool.stop().await;
    Ok(())
}

/// Times in milliseconds, the first two since the guest's end.
struct Times {
    noticed: f64,
    replaced: f64,
    /// The replacement's boot alone.
    forked: f64,
}

async fn replacement(
    pool: &Pool<Arc<Victims>>,
    victims: &Victims,
    way: Way,
) -> Result<Times, ScenarioError> {
    let filled = pool.wait_ready(STUCK).await;
    filled.map_err(ScenarioError::at("full pool"))?;
    let mut events = pool.subscribe();
    let Some(victim) = victims.youngest() else {
        return Err(ScenarioError::at("victim")("the pool has made none"));
    };
    let end = async {
        let ended = victims.end(victim, way).await?;
        if way.is_silent() {
            let check = pool.check(PROFILE, 1).await;
            check.map_err(ScenarioError::at("check"))?;
        }
        Ok::<_, ScenarioError>(ended)
    };
    let told = tokio::time::timeout(STUCK, told(&mut events, victim));
    let (ended, told) = tokio::join!(end, told);
    let (noticed, ready, forked) = told.map_err(ScenarioError::at("replacement"))??;
    let ended = ended?;
    let since = |then: Instant| 1e3 * then.saturating_duration_since(ended).as_secs_f64();
    Ok(Times {
        noticed: since(noticed),
        replaced: since(ready),
        forked: 1e3 * forked.as_secs_f64(),
    })
}

/// Returns when the end of `victim` was noticed, when another VM was ready, and how long that VM's
/// boot took.
async fn told(
    events: &mut Receiver<PoolEvent>,
    victim: VmId,
) -> Result<(Instant, Instant, Duration), ScenarioError> {
    let mut noticed = None;
    loop {
        let event = events.recv().await.map_err(ScenarioError::at("events"))?;
        match (event.kind, noticed) {
            (EventKind::Ended | EventKind::Unhealthy(_), _) if event.vm == Some(victim) => {
                noticed = Some(Instant::now());
            }
            (EventKind::Ready(took), Some(noticed)) => return Ok((noticed, Instant::now(), took)),
            _ => {}
        }
    }
}
