//! Forking a template, beside the floor, up to the clone's first instruction.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hearth_vmm::{Template, Vm, VmConfig};

use super::floor::Floor;
use super::{ScenarioError, us};
use crate::report::Report;

/// `l: out 0x80, al; jmp l`.
pub(super) const CODE: [u8; 4] = [0xe6, 0x80, 0xeb, 0xfc];
/// How long a clone may take to its first instruction before the run is given up.
const STUCK: Duration = Duration::from_secs(10);

/// Measures the floor alone, `n` times.
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
    report.add("floor", "fork to first instruction", "us", "floor", whole);
    report.add("floor", "shell to first instruction", "us", "floor", shell);
    Ok(())
}

/// Measures forks of a flat guest and the floor in turns, `n` times each.
///
/// # Errors
/// When a VM cannot be made or does not run.
pub fn beside_floor(report: &mut Report, n: usize) -> Result<(), ScenarioError> {
    let floor = Floor::new()?;
    let config = VmConfig::flat(CODE)
        .memory_mib(128)
        .build()
        .map_err(ScenarioError::at("configuration"))?;
    let vm = Vm::boot(&config).map_err(ScenarioError::at("boot"))?;
    wait_for_exit(&vm)?;
    let template = vm.into_template().map_err(ScenarioError::at("template"))?;
    let (mut ours, mut kvm, mut devices, mut bare) = (vec![], vec![], vec![], vec![]);
    for round in 0..n + 3 {
        let (first, vm) = fork_once(&template)?;
        let times = vm.times();
        // Taken apart here, so that the other side is not measured against our clean-up.
        vm.destroy();
        let peer = floor.fork()?;
        if round >= 3 {
            ours.push(us(first));
            kvm.push(us(times.kvm));
            devices.push(us(times.devices));
            bare.push(us(peer.whole));
        }
    }
    report.add("fork", "fork to first instruction", "us", "hearth", ours);
    report.add("fork", "fork to first instruction", "us", "floor", bare);
    report.add("fork", "KVM's part", "us", "hearth", kvm);
    report.add("fork", "devices and threads", "us", "hearth", devices);
    report.compare("fork to first instruction", "hearth", "floor");
    Ok(())
}

fn fork_once(template: &Template) -> Result<(Duration, Vm), ScenarioError> {
    let start = Instant::now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    wait_for_exit(&vm)?;
    Ok((start.elapsed(), vm))
}

/// Spins until the guest's first OUT was seen.
pub(super) fn wait_for_exit(vm: &Vm) -> Result<(), ScenarioError> {
    let start = Instant::now();
    while vm.exits().pio.load(Ordering::Relaxed) == 0 {
        if start.elapsed() > STUCK {
            return Err(ScenarioError::at("first instruction")(
                "the guest does not run",
            ));
        }
        std::thread::yield_now();
    }
    Ok(())
}
