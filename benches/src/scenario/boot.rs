//! A cold boot to the agent's pong, by phase; then a template of that guest, forked to pong.

use std::path::Path;
use std::time::{Duration, Instant};

use hearth_agent::proto::READY_PORT;
use hearth_vmm::{Vm, VmConfig};

use super::agent::{dial, greet, prepared};
use super::{ScenarioError, us};
use crate::report::Report;

/// How long a boot may take before the run is given up.
const STUCK: Duration = Duration::from_secs(300);
/// After that a guest that was asked nothing is at rest.
const QUIET: Duration = Duration::from_millis(200);

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
        init.push(agent.hello().started_us as f64);
        agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
        pong.push(us(start.elapsed()));
        exits.push(vm.exits().total() as f64);
        instructions.extend(vm.emulated_instructions().map(|count| count as f64));
        last = Some((vm, agent));
    }
    report.add(
        "boot",
        "create (to the first KVM_RUN)",
        "us",
        "hearth",
        create,
    );
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
    report.add("boot", "exits to pong", "exits", "hearth", exits);
    if !instructions.is_empty() {
        let metric = "guest instructions emulated to pong";
        report.add("boot", metric, "instructions", "hearth", instructions);
    }
    let Some((vm, mut agent)) = last else {
        return Ok(());
    };
    prepared(&mut agent, QUIET).await?;
    drop(agent);
    tokio::time::sleep(QUIET).await;
    fork_to_pong(report, vm, forks).await
}

async fn fork_to_pong(report: &mut Report, vm: Vm, n: usize) -> Result<(), ScenarioError> {
    let template = vm.into_template().map_err(ScenarioError::at("template"))?;
    let (mut forked, mut answered) = (vec![], vec![]);
    for round in 0..n + 3 {
        let start = Instant::now();
        let vm = template.fork().map_err(ScenarioError::at("fork"))?;
        let made = start.elapsed();
        let mut agent = dial(vm.vsock()).await?;
        agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
        if round >= 3 {
            forked.push(us(made));
            answered.push(us(start.elapsed()));
        }
        drop(agent);
        vm.destroy();
    }
    report.add("fork", "fork call", "us", "hearth", forked);
    report.add(
        "fork",
        "fork to pong (fresh connection)",
        "us",
        "hearth",
        answered,
    );
    Ok(())
}
