//! Forks of a template up to the clone's first instruction, beside the baseline, with and without a
//! prepared VM.

use std::time::{Duration, Instant};

use hearth_vmm::{CreateTimes, Exit, Template, Vm, VmConfig};

use super::floor::Floor;
use super::{ScenarioError, us};
use crate::report::Report;
use crate::target::Bound;

/// `out 0x80, al; mov al, 1; mov dx, 0x5f0; out dx, al`: the first OUT is measured, the second
/// powers off.
pub(super) const CODE: [u8; 9] = [0xe6, 0x80, 0xb0, 1, 0x66, 0xba, 0xf0, 0x05, 0xee];
/// How long a clone may take to its end before the run is given up.
const STUCK: Duration = Duration::from_secs(10);
/// Target: a fork's time as a multiple of the baseline's.
const MOST: f64 = 1.15;
const WHOLE: &str = "fork to first instruction";
const FROM_SHELL: &str = "shell to first instruction";

/// Measures the baseline alone, `n` times.
///
/// # Errors
/// When a KVM call fails.
pub fn floor_only(report: &mut Report, n: usize) -> Result<(), ScenarioError> {
    let floor = Floor::new()?;
    let times = (0..n + 3)
        .map(|_| floor.fork())
        .collect::<Result<Vec<_>, _>>()?;
    let times = times.get(3..).unwrap_or(&[]);
    let whole = times.iter().map(|t| us(t.whole)).collect();
    let shell = times.iter().map(|t| us(t.from_shell)).collect();
    report.add("floor", WHOLE, "us", "floor", whole);
    report.add("floor", FROM_SHELL, "us", "floor", shell);
    Ok(())
}

/// Measures forks of a flat guest and the baseline in turns, `n` times each: from nothing, and from
/// a prepared VM.
///
/// A side's time ends when its vCPU's thread sees the guest's first OUT. Hearth's caller sleeps
/// meanwhile; the baseline runs its vCPU in the measuring thread, and wakes no other.
///
/// # Errors
/// When a VM cannot be made or does not run.
pub async fn beside_floor(report: &mut Report, n: usize) -> Result<(), ScenarioError> {
    let floor = Floor::new()?;
    let config = VmConfig::flat(CODE)
        .memory_mib(128)
        .build()
        .map_err(ScenarioError::at("configuration"))?;
    let vm = Vm::create(&config).map_err(ScenarioError::at("create"))?;
    let template = vm.into_template().map_err(ScenarioError::at("template"))?;
    let (mut whole, mut from_shell, mut floors) = (vec![], vec![], vec![]);
    let (mut kvm, mut devices) = (vec![], vec![]);
    for round in 0..n + 3 {
        let (first, times) = fork_once(&template).await?;
        let ready = shell_once(&template).await?;
        let bare = floor.fork()?;
        if round >= 3 {
            whole.push(us(first));
            from_shell.push(us(ready));
            floors.push(bare);
            kvm.push(us(times.kvm));
            devices.push(us(times.devices));
        }
    }
    let bare = floors.iter().map(|t| us(t.whole)).collect();
    let bare_shell = floors.iter().map(|t| us(t.from_shell)).collect();
    report.add("fork", WHOLE, "us", "hearth", whole);
    report.add("fork", WHOLE, "us", "floor", bare);
    report.add("fork", FROM_SHELL, "us", "hearth", from_shell);
    report.add("fork", FROM_SHELL, "us", "floor", bare_shell);
    report.add("fork", "KVM's part", "us", "hearth", kvm);
    report.add("fork", "devices and threads", "us", "hearth", devices);
    for metric in [WHOLE, FROM_SHELL] {
        report.compare(metric, "hearth", "floor");
        report.expect_ratio(metric, "hearth", "floor", Bound::AtMost(MOST));
    }
    Ok(())
}

async fn fork_once(template: &Template) -> Result<(Duration, CreateTimes), ScenarioError> {
    let start = Instant::now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let first = first_exit(&vm).await?;
    let times = vm.times();
    // Torn down here, so that the other side is not measured beside our teardown.
    vm.destroy();
    Ok((first - start, times))
}

async fn shell_once(template: &Template) -> Result<Duration, ScenarioError> {
    let shell = template.prepare().map_err(ScenarioError::at("shell"))?;
    let start = Instant::now();
    let vm = shell.fork().map_err(ScenarioError::at("fork"))?;
    let first = first_exit(&vm).await?;
    vm.destroy();
    Ok(first - start)
}

/// Returns when the guest's first OUT was seen. Waits for the guest's end.
pub(super) async fn first_exit(vm: &Vm) -> Result<Instant, ScenarioError> {
    let failed = ScenarioError::at("first instruction");
    let ended = tokio::time::timeout(STUCK, vm.exited()).await;
    match (ended, vm.exits().first()) {
        (Ok(Exit::PowerOff), Some(first)) => Ok(first),
        (Ok(exit), _) => Err(failed(format!("the guest ended otherwise: {exit}"))),
        (Err(_), _) => Err(failed("the guest does not run".into())),
    }
}
