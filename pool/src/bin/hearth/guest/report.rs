//! What `--json` prints.

use std::time::Duration;

use hearth_agent::proto::Exited;
use hearth_vmm::{CpuProfile, CreateTimes};
use serde::Serialize;

/// The times of the phases that were reached, and the result.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) exit_code: u8,
    pub(super) timed_out: bool,
    /// The reason why the program's end is not known.
    pub(crate) error: Option<String>,
    pub(super) profile: Option<CpuProfile>,
    pub(super) phases_us: Phases,
    /// The parts of the `create` phase.
    pub(super) create_us: Option<Create>,
    /// Guest instructions that KVM's emulator ran until the agent greeted; null where the host
    /// does not count them. On an emulated host they are the cost of a boot, and repeat where
    /// times do not.
    pub(super) boot_instructions: Option<u64>,
    /// The program's times, measured by the guest's clock.
    pub(super) program_us: Option<Program>,
}

/// Phases in microseconds, in order. They do not overlap.
#[derive(Debug, Default, Serialize)]
pub(super) struct Phases {
    /// KVM checked for access, and the kind of host probed; once per process.
    pub(super) host_probe: Option<u64>,
    /// Image found or built, kernel and initramfs read.
    pub(super) image: Option<u64>,
    /// All work of the host after that, up to the first KVM_RUN.
    pub(super) create: Option<u64>,
    /// From the first KVM_RUN to the start of the agent.
    pub(super) boot: Option<u64>,
    /// From the start of the agent to its greeting on the host.
    pub(super) agent_ready: Option<u64>,
    /// Files copied into the guest; `None` if there were none.
    pub(super) copy_in: Option<u64>,
    /// From the request to the program's exit status.
    pub(super) exec: Option<u64>,
    /// Files copied out of the guest.
    pub(super) copy_out: Option<u64>,
}

#[derive(Debug, Serialize)]
pub(super) struct Create {
    load: u64,
    kvm: u64,
    devices: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Program {
    wall: u64,
    user: u64,
    system: u64,
}

impl Report {
    pub(crate) fn line(&self) -> String {
        // Cannot fail: there are only numbers and strings.
        serde_json::to_string(self).unwrap_or_default()
    }

    pub(super) fn exited(&mut self, exited: &Exited) {
        self.timed_out = exited.timed_out;
        self.program_us = Some(Program {
            wall: exited.usage.wall_us,
            user: exited.usage.user_us,
            system: exited.usage.system_us,
        });
    }
}

impl From<CreateTimes> for Create {
    fn from(times: CreateTimes) -> Self {
        Self {
            load: micros(times.load),
            kvm: micros(times.kvm),
            devices: micros(times.devices),
        }
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
