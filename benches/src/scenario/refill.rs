//! How fast an emptied pool fills from a template, what that costs, and where it goes. A guest counts
//! when it is parked: reseeded, and proven by a ping.

use std::time::{Duration, Instant, SystemTime};

use hearth_agent::proto::{InstanceId, READY_PORT, Refresh};
use hearth_pool::{Parking, Refill};
use hearth_vmm::{Template, Vm, VmConfig};

use super::agent::{dial, greet, prepared};
use super::boot::Files;
use super::pool::{MEMORY_MIB, PROFILE, backend, config, full, start};
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
    let metric = "refill";
    report.expect(metric, "hearth", Statistic::P50, Bound::AtLeast(50.0));
    one_by_one(report, files, n).await
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Wall and processor time of each step, without anything beside it.
async fn one_by_one(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let template = template(files).await?;
    let mut steps = STEPS.map(|step| (step, vec![], vec![]));
    for round in 0..n {
        for ((_, wall, spent), lap) in steps.iter_mut().zip(laps(&template, round).await?) {
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

/// What a guest of a pool goes through.
const STEPS: [&str; 6] = [
    "fork",
    "greeting",
    "reseed",
    "first ping",
    "park",
    "destroy",
];

/// Wall and processor time of each step of one guest.
async fn laps(
    template: &Template,
    round: usize,
) -> Result<[(Duration, Duration); 6], ScenarioError> {
    let now = || (Instant::now(), cpu::process());
    let begin = now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let forked = now();
    let mut agent = dial(vm.vsock()).await?;
    let greeted = now();
    let refresh = Refresh {
        // Of the right length; nobody lives on it.
        entropy: vec![0; 64],
        wall_clock: Some(SystemTime::now().into()),
        instance: Some(InstanceId([0; 16])),
        hostname: Some(format!("vm-{round}")),
    };
    let refreshed = agent.refresh(refresh).await;
    refreshed.map_err(ScenarioError::at("reseed"))?;
    let reseeded = now();
    agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
    let answered = now();
    vm.pause().map_err(ScenarioError::at("park"))?;
    let parked = now();
    drop(agent);
    vm.destroy();
    let times = [begin, forked, greeted, reseeded, answered, parked, now()];
    let laps = times.array_windows();
    let mut spent = [(Duration::ZERO, Duration::ZERO); 6];
    for (lap, [from, to]) in spent.iter_mut().zip(laps) {
        *lap = (to.0 - from.0, to.1 - from.1);
    }
    Ok(spent)
}

/// A template like that of the pool, whose steps can be taken one by one.
async fn template(files: Files<'_>) -> Result<Template, ScenarioError> {
    let config = VmConfig::builder(files.kernel)
        .initramfs(files.initramfs)
        .memory_mib(MEMORY_MIB.into())
        .build()
        .map_err(ScenarioError::at("configuration"))?;
    let vm = Vm::create(&config).map_err(ScenarioError::at("create"))?;
    let listener = vm.vsock().listen(READY_PORT);
    let mut listener = listener.map_err(ScenarioError::at("listen"))?;
    vm.resume().map_err(ScenarioError::at("resume"))?;
    let stream = listener.accept().await;
    let mut agent = greet(stream.map_err(ScenarioError::at("agent"))?).await?;
    prepared(&mut agent, Duration::ZERO).await?;
    drop(agent);
    vm.into_template().map_err(ScenarioError::at("template"))
}
