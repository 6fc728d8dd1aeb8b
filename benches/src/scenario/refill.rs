//! How fast an emptied pool fills from a template, what that costs, and where it goes. A guest counts
//! when it is parked: reseeded, and proven by a ping.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_pool::kvm::KvmBackend;
use hearth_pool::{Backend, Parking, Refill, VmId};

use super::boot::Files;
use super::pool::{PROFILE, backend, config, full, start};
use super::{ScenarioError, us};
use crate::cpu;
use crate::report::Report;

/// Guests of the pool that is emptied.
const SIZE: usize = 16;

/// Empties the pool `rounds` times; then makes `n` guests one after the other.
///
/// # Errors
/// When a guest cannot be made.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    rounds: usize,
    n: usize,
) -> Result<(), ScenarioError> {
    let backend = backend(files).await?;
    let pool = start(&backend, config(SIZE, Refill::Automatic), Parking::Paused).await?;
    let (mut rate, mut cost) = (vec![], vec![]);
    for _ in 0..rounds {
        let guests = pool
            .acquire_many(PROFILE, SIZE)
            .map_err(ScenarioError::at("acquire"))?;
        let (begin, spent) = (Instant::now(), cpu::process());
        drop(guests);
        full(&pool).await?;
        let count = SIZE as f64;
        rate.push(count / begin.elapsed().as_secs_f64());
        cost.push(ms(cpu::process() - spent) / count);
    }
    pool.stop().await;
    report.add("refill", "refill", "VMs/s", "hearth", rate);
    report.add("refill", "CPU per VM (with its end)", "ms", "hearth", cost);
    one_by_one(report, &backend, n).await
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Wall and processor time of each step, without anything beside it.
async fn one_by_one(
    report: &mut Report,
    backend: &Arc<KvmBackend>,
    n: usize,
) -> Result<(), ScenarioError> {
    let config = config(1, Refill::Manual);
    let mut steps: [(&str, Vec<f64>, Vec<f64>); 3] = [
        ("fork, greeting, reseed", vec![], vec![]),
        ("first ping", vec![], vec![]),
        ("destroy", vec![], vec![]),
    ];
    let ids = (1..).map(VmId).take(n);
    for (profile, id) in config.profiles.iter().cycle().zip(ids) {
        let mut begin = (Instant::now(), cpu::process());
        let mut laps = vec![];
        let mut lap = || {
            let now = (Instant::now(), cpu::process());
            laps.push((us(now.0 - begin.0), ms(now.1 - begin.1)));
            begin = now;
        };
        let guest = backend.create(profile, id).await;
        let guest = guest.map_err(ScenarioError::at("fork"))?;
        lap();
        let answer = backend.probe(&guest).await;
        answer.map_err(ScenarioError::at("ping"))?;
        lap();
        backend.retire(guest).await;
        lap();
        for ((_, wall, spent), lap) in steps.iter_mut().zip(laps) {
            wall.push(lap.0);
            spent.push(lap.1);
        }
    }
    for (step, wall, spent) in steps {
        report.add("refill", step, "us", "wall", wall);
        report.add("refill", step, "ms", "cpu", spent);
    }
    Ok(())
}
