//! The cost of a parked pool that serves no requests.

use std::time::{Duration, Instant};

use hearth_pool::{Parking, Refill};

use super::ScenarioError;
use super::boot::Files;
use super::pool::{backend, config, start};
use crate::cpu;
use crate::report::Report;
use crate::target::{Bound, Statistic};

/// Time in which the work that filling the pool has left behind ends.
const SETTLE: Duration = Duration::from_secs(2);
/// Time over which each sample is taken.
const WINDOW: Duration = Duration::from_secs(1);

/// Measures `size` parked guests for `time`, for each way to park.
///
/// # Errors
/// When a guest cannot be made.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    size: usize,
    time: Duration,
) -> Result<(), ScenarioError> {
    let backend = backend(files).await?;
    for (side, parking) in [("paused", Parking::Paused), ("running", Parking::Running)] {
        let pool = start(
            &backend,
            config(files.shape, size, Refill::Automatic),
            parking,
        )
        .await?;
        tokio::time::sleep(SETTLE).await;
        let (mut whole, end) = (vec![], Instant::now() + time);
        while Instant::now() < end {
            let (begin, spent) = (Instant::now(), cpu::process());
            tokio::time::sleep(WINDOW).await;
            let share = (cpu::process() - spent).as_secs_f64() / begin.elapsed().as_secs_f64();
            whole.push(100.0 * share);
        }
        pool.stop().await;
        let each = whole.iter().map(|percent| percent / size.max(1) as f64);
        let each = each.collect();
        report.add("idle", "whole process", "% of a core", side, whole);
        report.add("idle", "per VM", "% of a core", side, each);
        let (metric, most) = match parking {
            Parking::Paused => ("whole process", 1.0),
            Parking::Running => ("per VM", 2.0),
        };
        report.expect(metric, side, Statistic::P50, Bound::AtMost(most));
    }
    Ok(())
}
