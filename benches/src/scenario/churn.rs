//! VMs that are made, run to their first instruction and destroyed, one after the other: how many
//! per second, and whether they leave anything behind.

use std::time::{Duration, Instant};

use hearth_vmm::{Vm, VmConfig};

use super::ScenarioError;
use super::boot::Shape;
use super::fork::{CODE, first_exit};
use super::samples::Samples;
use crate::process::Held;
use crate::report::Report;
use crate::target::{Bound, Statistic};

const SCENARIO: &str = "churn";
const SIDE: &str = "hearth";
/// VMs of a batch. Each batch gives one sample.
const BATCH: usize = 20;
/// How long the host's kernel may take to release destroyed VMs.
const GONE: Duration = Duration::from_secs(2);

/// Metrics that may not grow.
const COUNTS: [&str; 3] = [
    "descriptors beyond the first",
    "threads beyond the first",
    "mappings of files beyond the first",
];

/// Measures `n` batches each of VMs that are created and of VMs that are forked, in turns.
///
/// # Errors
/// When a VM cannot be made or does not run.
pub async fn run(report: &mut Report, shape: Shape, n: usize) -> Result<(), ScenarioError> {
    let config = VmConfig::flat(CODE)
        .memory_mib(shape.memory_mib.into())
        .vcpus(shape.vcpus)
        .build();
    let config = config.map_err(ScenarioError::at("configuration"))?;
    let vm = Vm::create(&config).map_err(ScenarioError::at("create"))?;
    let template = vm.into_template().map_err(ScenarioError::at("template"))?;
    let create = || Vm::boot(&config).map_err(ScenarioError::at("boot"));
    let fork = || template.fork().map_err(ScenarioError::at("fork"));
    // A warm-up: the library's own threads stay, and so does memory that allocators keep.
    batch(&create).await?;
    batch(&fork).await?;
    let before = held()?;
    let (mut created, mut forked, mut beyond) = (vec![], vec![], Samples::default());
    for _ in 0..n {
        created.push(batch(&create).await?);
        forked.push(batch(&fork).await?);
        let now = settled(before)?;
        for (count, more) in COUNTS.into_iter().zip(grown(before, now)) {
            beyond.push(count, "", more);
        }
        let kib = now.rss_kib as f64 - before.rss_kib as f64;
        beyond.push("resident memory beyond the first", "KiB", kib);
    }
    let metric = "create, run and destroy";
    report.add(SCENARIO, metric, "VMs/s", SIDE, created);
    let metric = "fork, run and destroy";
    report.add(SCENARIO, metric, "VMs/s", SIDE, forked);
    beyond.report(report, SCENARIO, SIDE);
    for count in COUNTS {
        report.expect(count, SIDE, Statistic::P99, Bound::AtMost(0.0));
    }
    Ok(())
}

/// Runs one batch; returns VMs per second.
async fn batch(make: &dyn Fn() -> Result<Vm, ScenarioError>) -> Result<f64, ScenarioError> {
    let begin = Instant::now();
    for _ in 0..BATCH {
        let vm = make()?;
        first_exit(&vm).await?;
        vm.destroy();
    }
    Ok(BATCH as f64 / begin.elapsed().as_secs_f64())
}

fn held() -> Result<Held, ScenarioError> {
    Held::now().map_err(ScenarioError::at("what this process holds"))
}

/// Waits until no count is above `before`, for [`GONE`] at most; returns what is held then.
fn settled(before: Held) -> Result<Held, ScenarioError> {
    let deadline = Instant::now() + GONE;
    loop {
        let now = held()?;
        if grown(before, now).iter().all(|&more| more <= 0.0) || Instant::now() > deadline {
            return Ok(now);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns by how much each count is above `before`.
fn grown(before: Held, now: Held) -> [f64; 3] {
    let more = |was: usize, is: usize| is as f64 - was as f64;
    [
        more(before.fds, now.fds),
        more(before.threads, now.threads),
        more(before.mappings, now.mappings),
    ]
}
