//! A cold boot until the agent answers a ping, by phase; then a template of that guest, forked up
//! to the same point.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use hearth_agent::proto::READY_PORT;
use hearth_vmm::{CpuProfile, Host, Template, Vm, VmConfig, VmConfigBuilder};

use super::agent::{Agent, dial, freeze, greet, resume};
use super::samples::Samples;
use super::{ScenarioError, us};
use crate::report::Report;
use crate::stats::median;
use crate::target::{Bound, Statistic};

/// Metric of the host's part of a boot.
const CREATE: &str = "create (to the first KVM_RUN)";
/// Metric of a whole boot.
const PONG: &str = "cold boot to pong";
/// Time from the spawn of Firecracker to the first answer over vsock of a guest that it restored,
/// in ms, on an emulated host.
const RECORDED_MS: [f64; 2] = [80.0, 126.0];
/// How long a boot may take before the run is given up.
const STUCK: Duration = Duration::from_secs(300);

/// Size of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u8,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            memory_mib: 128,
            vcpus: 1,
        }
    }
}

/// The files that a guest boots from, and its size.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// Kernel.
    pub kernel: &'a Path,
    /// Initramfs with the agent.
    pub initramfs: &'a Path,
    /// Size of the guest.
    pub shape: Shape,
}

impl Files<'_> {
    /// Returns a configuration that boots these files.
    pub(super) fn config(self) -> VmConfigBuilder {
        VmConfig::builder(self.kernel)
            .initramfs(self.initramfs)
            .memory_mib(self.shape.memory_mib.into())
            .vcpus(self.shape.vcpus)
    }
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
    let config = files
        .config()
        .count_instructions(true)
        .build()
        .map_err(ScenarioError::at("configuration"))?;
    config.preload().map_err(ScenarioError::at("image"))?;
    let mut samples = Samples::default();
    let mut last = None;
    for _ in 0..n {
        // Drops the last guest before the next one boots, so that none runs beside another.
        drop(last.take());
        last = Some(to_ready(&config, &mut samples).await?);
    }
    samples.report(report, "boot", "hearth");
    for (metric, most) in [(PONG, 5e6), (CREATE, 3_000.0)] {
        report.expect(metric, "hearth", Statistic::P50, Bound::AtMost(most));
    }
    let Some((vm, agent)) = last else {
        return Ok(());
    };
    let template = freeze(vm, agent).await?;
    fork_to_pong(report, &template, forks).await
}

/// Boots one guest and measures each phase.
async fn to_ready(config: &VmConfig, samples: &mut Samples) -> Result<(Vm, Agent), ScenarioError> {
    let start = Instant::now();
    let vm = Vm::create(config).map_err(ScenarioError::at("create"))?;
    let listener = vm.vsock().listen(READY_PORT);
    let mut listener = listener.map_err(ScenarioError::at("listen"))?;
    samples.time(CREATE, start.elapsed());
    let steps = vm.times();
    samples.time("memory and image", steps.load);
    samples.time("KVM's part", steps.kvm);
    samples.time("devices and threads", steps.devices);

    let running = Instant::now();
    vm.resume().map_err(ScenarioError::at("resume"))?;
    let stream = tokio::time::timeout(STUCK, listener.accept()).await;
    let stream = stream.map_err(ScenarioError::at("agent"))?;
    let mut agent = greet(stream.map_err(ScenarioError::at("agent"))?).await?;
    let ready = running.elapsed();
    let hello = agent.hello().unwrap_or_default();
    let guest = |us| Duration::from_micros(us);
    samples.time(
        "kernel entry to init (guest clock)",
        guest(hello.started_us),
    );
    let greeted = hello.greeted_us.saturating_sub(hello.started_us);
    samples.time("init to greeting (guest clock)", guest(greeted));
    samples.time("first KVM_RUN to agent ready", ready);
    agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
    samples.time(PONG, start.elapsed());

    let exits = vm.exits();
    let kinds = [
        ("exits to pong", exits.total()),
        ("of these, ports", exits.pio.load(Relaxed)),
        ("of these, devices", exits.mmio.load(Relaxed)),
        ("of these, signals", exits.interrupted.load(Relaxed)),
        ("of these, registers", exits.registers.load(Relaxed)),
    ];
    for (kind, count) in kinds {
        samples.push(kind, "exits", count as f64);
    }
    let touched = vm.private_bytes();
    let touched = touched.map_err(ScenarioError::at("guest memory"))?;
    samples.push("guest memory touched", "KiB", touched as f64 / 1024.0);
    if let Some(count) = vm.emulated_instructions() {
        let metric = "guest instructions emulated to pong";
        samples.push(metric, "instructions", count as f64);
    }
    Ok((vm, agent))
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
    report.notes.extend(beside_recorded(&kept));
    report.add("fork", metric, "us", "hearth", kept);
    report.expect(metric, "hearth", Statistic::P50, Bound::AtMost(16_000.0));
    let metric = "fork to pong (fresh connection)";
    report.add("fork", metric, "us", "hearth", dialled);
    Ok(())
}

/// Compares with the recorded time of Firecracker; `None` on a host of another kind, or without
/// samples.
fn beside_recorded(samples: &[f64]) -> Option<String> {
    let is_such = Host::get().is_ok_and(|host| host.profile() == CpuProfile::Emulated);
    (is_such && !samples.is_empty()).then(|| {
        let ms = median(samples) / 1000.0;
        let [least, most] = RECORDED_MS;
        format!(
            "fork to pong is {:.2} to {:.2} of Firecracker's restore to first answer by what was recorded of that on a machine of \
             this kind ({least} to {most} ms), not measured in this run: --firecracker does",
            ms / most,
            ms / least
        )
    })
}

/// Forks one clone. Returns the time of the fork, and the time until the clone answered a ping, on
/// the connection of its template or on a new one.
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
    // Torn down here, so that the next clone is not measured beside its teardown.
    vm.destroy();
    Ok((made, answered))
}
