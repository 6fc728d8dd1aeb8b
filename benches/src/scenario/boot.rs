//! A cold boot to the agent's pong, by phase; then a template of that guest, forked to pong.

use std::path::Path;
use std::time::{Duration, Instant};

use hearth_agent::proto::READY_PORT;
use hearth_vmm::{Template, Vm, VmConfig};

use super::agent::{dial, freeze, greet, resume};
use super::{ScenarioError, us};
use crate::report::Report;
use crate::target::{Bound, Statistic};

/// The host's part of it.
const CREATE: &str = "create (to the first KVM_RUN)";
/// How long a boot may take before the run is given up.
const STUCK: Duration = Duration::from_secs(300);

/// The files that are booted.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// Kernel.
    pub kernel: &'a Path,
    /// Initramfs with the agent.
    pub initramfs: &'a Path,
}

/// Boots `n` times, then forks the last guest `forks` times.
///
/// # Errors
/// When a guest cannot be made or does not answer.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    n: usize,
    forks: usize,
) -> Result<(), ScenarioError> {
    let config = VmConfig::builder(files.kernel)
        .initramfs(files.initramfs)
        .count_instructions(true)
        .build()
        .map_err(ScenarioError::at("configuration"))?;
    config.preload().map_err(ScenarioError::at("image"))?;
    let (mut create, mut init, mut ready, mut pong) = (vec![], vec![], vec![], vec![]);
    let (mut exits, mut instructions) = (vec![], vec![]);
    let mut last = None;
    for _ in 0..n {
        let start = Instant::now();
        let vm = Vm::create(&config).map_err(ScenarioError::at("create"))?;
        let mut listener = vm
            .vsock()
            .listen(READY_PORT)
            .map_err(ScenarioError::at("listen"))?;
        create.push(us(start.elapsed()));
        let running = Instant::now();
        vm.resume().map_err(ScenarioError::at("resume"))?;
        let stream = tokio::time::timeout(STUCK, listener.accept())
            .await
            .map_err(ScenarioError::at("agent"))?
            .map_err(ScenarioError::at("agent"))?;
        let mut agent = greet(stream).await?;
        ready.push(us(running.elapsed()));
        init.push(agent.hello().unwrap_or_default().started_us as f64);
        agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
        pong.push(us(start.elapsed()));
        exits.push(vm.exits().total() as f64);
        instructions.extend(vm.emulated_instructions().map(|count| count as f64));
        last = Some((vm, agent));
    }
    report.add("boot", CREATE, "us", "hearth", create);
    report.add(
        "boot",
        "kernel entry to init (guest clock)",
        "us",
        "hearth",
        init,
    );
    report.add(
        "boot",
        "first KVM_RUN to agent ready",
        "us",
        "hearth",
        ready,
    );
    report.add("boot", "cold boot to pong", "us", "hearth", pong);
    report.expect(
        "cold boot to pong",
        "hearth",
        Statistic::P50,
        Bound::AtMost(7e6),
    );
    report.expect(CREATE, "hearth", Statistic::P50, Bound::AtMost(3_000.0));
    report.add("boot", "exits to pong", "exits", "hearth", exits);
    if !instructions.is_empty() {
        let metric = "guest instructions emulated to pong";
        report.add("boot", metric, "instructions", "hearth", instructions);
    }
    let Some((vm, agent)) = last else {
        return Ok(());
    };
    let template = freeze(vm, agent).await?;
    fork_to_pong(report, &template, forks).await
}

async fn fork_to_pong(
    report: &mut Report,
    template: &Template,
    n: usize,
) -> Result<(), ScenarioError> {
    let (mut forked, mut kept, mut dialled) = (vec![], vec![], vec![]);
    for round in 0..n + 3 {
        let (made, answered) = to_pong(template, true).await?;
        let (_, redialled) = to_pong(template, false).await?;
        if round >= 3 {
            forked.push(us(made));
            kept.push(us(answered));
            dialled.push(us(redialled));
        }
    }
    report.add("fork", "fork call", "us", "hearth", forked);
    let metric = "fork to pong";
    report.add("fork", metric, "us", "hearth", kept);
    report.expect(metric, "hearth", Statistic::P50, Bound::AtMost(20_000.0));
    let metric = "fork to pong (fresh connection)";
    report.add("fork", metric, "us", "hearth", dialled);
    Ok(())
}

/// One clone: how long its fork took, and all up to its pong, on the connection of its template or on a new one.
async fn to_pong(
    template: &Template,
    has_kept: bool,
) -> Result<(Duration, Duration), ScenarioError> {
    let start = Instant::now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let made = start.elapsed();
    let mut agent = match has_kept {
        true => resume(&vm)?,
        false => dial(vm.vsock()).await?,
    };
    agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
    let answered = start.elapsed();
    drop(agent);
    // Taken apart here, so that the next is not measured against its clean-up.
    vm.destroy();
    Ok((made, answered))
}
