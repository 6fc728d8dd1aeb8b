//! KVM's statistics of all living VMs, where the kernel's debugging files can be read.

use std::fs;
use std::path::Path;

use hearth_vmm::Vm;

use super::Counts;
use crate::scenario::ScenarioError;

/// KVM's statistics (`Documentation/virt/kvm/api.rst`, `KVM_GET_STATS_FD`, has their names), all
/// VMs added up.
const FILES: &str = "/sys/kernel/debug/kvm";

/// Statistics of the VMs that live now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Kvm {
    /// Exits to KVM.
    exits: f64,
    /// Faults of guest memory that KVM resolved.
    faults: f64,
    /// Pages of 4 KiB that guests can reach without a fault.
    small: f64,
    /// Pages of 2 MiB.
    large: f64,
}

impl Kvm {
    /// Reads the statistics; `None` where they cannot be read.
    pub(super) fn now() -> Option<Self> {
        Self::at(Path::new(FILES))
    }

    fn at(dir: &Path) -> Option<Self> {
        let read = |name| {
            let text = fs::read_to_string(dir.join(name)).ok()?;
            text.trim().parse().ok()
        };
        Some(Self {
            exits: read("exits")?,
            faults: read("pf_fixed")?,
            small: read("pages_4k")?,
            large: read("pages_2m")?,
        })
    }
}

/// Names of the metrics of one VM.
pub(super) struct Names {
    /// The VM's exits to the monitor.
    pub(super) monitor: &'static str,
    /// Memory that the host has allocated for this VM alone.
    pub(super) memory: &'static str,
    // KVM's statistics for the VM.
    pub(super) exits: &'static str,
    pub(super) faults: &'static str,
    pub(super) small: &'static str,
    pub(super) large: &'static str,
}

impl Counts {
    /// Records the VM's exits to the monitor and its memory, and the change of KVM's statistics
    /// since `before`. No VM may end in between.
    pub(super) fn vm(
        &mut self,
        vm: &Vm,
        before: Option<Kvm>,
        names: &Names,
    ) -> Result<(), ScenarioError> {
        let now = Kvm::now();
        let bytes = vm.private_bytes();
        let bytes = bytes.map_err(ScenarioError::at("guest memory"))? as f64;
        let exits = vm.exits().total() as f64;
        self.samples.push(names.monitor, "exits", exits);
        self.samples.push(names.memory, "KiB", bytes / 1024.0);
        let Some((before, now)) = before.zip(now) else {
            return Ok(());
        };
        let counted = [
            (names.exits, "exits", now.exits - before.exits),
            (names.faults, "faults", now.faults - before.faults),
            (names.small, "pages", now.small - before.small),
            (names.large, "pages", now.large - before.large),
        ];
        for (metric, unit, value) in counted {
            self.samples.push(metric, unit, value);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_read_by_name_and_missed_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("exits", "7\n"), ("pf_fixed", "5\n"), ("pages_4k", "3\n")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        assert_eq!(Kvm::at(dir.path()), None);
        fs::write(dir.path().join("pages_2m"), "1\n").unwrap();
        let Kvm {
            exits,
            faults,
            small,
            large,
        } = Kvm::at(dir.path()).unwrap();
        assert_eq!((exits, faults, small, large), (7.0, 5.0, 3.0, 1.0));
    }
}
