//! How fast an emptied pool fills from a template, and the cost of each step. A guest counts when
//! it is parked: refreshed, and proven by a ping.

use std::time::{Duration, Instant};

use hearth_pool::{Parking, Refill};
use hearth_vmm::Template;

use super::agent::{renew, resume, template};
use super::boot::Files;
use super::pool::{PROFILE, backend, config, full, start};
use super::{ScenarioError, us};
use crate::cpu;
use crate::report::Report;
use crate::target::{Bound, Statistic};

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
    let pool = start(
        &backend,
        config(files.shape, SIZE, Refill::Automatic),
        Parking::Paused,
    )
    .await?;
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
    let metric = "refill";
    report.expect(metric, "hearth", Statistic::P50, Bound::AtLeast(50.0));
    one_by_one(report, files, n).await
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Measures wall and processor time of each step, without other work beside it.
async fn one_by_one(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let template = template(files).await?;
    let mut steps = STEPS.map(|step| (step, vec![], vec![]));
    for _ in 0..n {
        for ((_, wall, spent), lap) in steps.iter_mut().zip(laps(&template).await?) {
            wall.push(us(lap.0));
            spent.push(ms(lap.1));
        }
    }
    for (step, wall, spent) in steps {
        report.add("refill", step, "us", "wall", wall);
        report.add("refill", step, "ms", "cpu", spent);
    }
    Ok(())
}

/// Steps of a pool's guest.
const STEPS: [&str; 4] = ["fork", "reseed and ping", "park", "destroy"];

/// Returns wall and processor time of each step of one guest.
async fn laps(template: &Template) -> Result<[(Duration, Duration); 4], ScenarioError> {
    let now = || (Instant::now(), cpu::process());
    let begin = now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let forked = now();
    let mut agent = resume(&vm)?;
    renew(&mut agent, 1).await?;
    let answered = now();
    vm.pause().map_err(ScenarioError::at("park"))?;
    let parked = now();
    drop(agent);
    vm.destroy();
    let times = [begin, forked, answered, parked, now()];
    let laps = times.array_windows();
    let mut spent = [(Duration::ZERO, Duration::ZERO); 4];
    for (lap, [from, to]) in spent.iter_mut().zip(laps) {
        *lap = (to.0 - from.0, to.1 - from.1);
    }
    Ok(spent)
}
