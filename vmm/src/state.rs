//! The status of a VM, and how it ended.

use std::fmt;

/// How a guest ended. The first cause wins; later ones are consequences.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset. A stock kernel that panics with `panic=-1` looks the same; our
    /// kernel reports [`Exit::Panic`].
    Reboot,
    /// The guest's kernel halted without powering off.
    Halt,
    /// The guest's kernel panicked (reported by our kernel only).
    Panic,
    /// The processor shut down after a triple fault.
    TripleFault,
    /// KVM could not go on, mostly because it cannot emulate an instruction.
    InternalError(InternalError),
    /// The host could not provide a page of guest memory: its hardware lost the page, or the file
    /// of a template or pmem image was truncated or cannot be read. Or the host's kernel sent the
    /// thread SIGBUS for another reason (see [`leave_sigbus_alone`](crate::leave_sigbus_alone)).
    BusError,
    /// The host refused KVM the thread that it creates when a VM first runs (since Linux 6.13). A
    /// boot returns this as an error; a fork does not wait for it, and its VM ends with this exit.
    NoThread,
    /// The embedding program killed the VM.
    Killed,
    /// The monitor failed or one of its threads panicked; the text says where. The VM is poisoned.
    Failed(String),
}

/// Details that KVM gives of an internal error (Documentation/virt/kvm/api.rst,
/// KVM_EXIT_INTERNAL_ERROR).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct InternalError {
    /// KVM's suberror; 1 is a failed emulation.
    pub suberror: u32,
    /// Bytes at the instruction pointer, where KVM gives them; at most 15.
    pub instruction: Vec<u8>,
    /// The instruction pointer.
    pub rip: u64,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reboot => f.write_str("the guest rebooted"),
            Self::Halt => f.write_str("the guest halted"),
            Self::Panic => f.write_str("the guest's kernel panicked"),
            Self::TripleFault => f.write_str("the guest's processor shut down (triple fault)"),
            Self::InternalError(error) => {
                write!(f, "KVM could not go on (internal error {}", error.suberror)?;
                if !error.instruction.is_empty() {
                    f.write_str(", instruction")?;
                    for byte in &error.instruction {
                        write!(f, " {byte:02x}")?;
                    }
                }
                write!(f, " at {:#x})", error.rip)
            }
            Self::BusError => {
                f.write_str("the host could not give memory of the guest's (SIGBUS or EFAULT)")
            }
            Self::NoThread => f.write_str(
                "the host refused KVM a thread for the VM; check ulimit -u and pids.max (systemd: TasksMax)",
            ),
            Self::Killed => f.write_str("the guest was killed"),
            Self::Failed(what) => write!(f, "the monitor failed: {what}"),
        }
    }
}

/// What a VM is doing.
///
/// ```text
/// Running <-> Paused
///    |           |
///    +-> Ended <-+      (Failed poisons: nothing but dropping it is left)
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmStatus {
    /// Its vCPUs may run.
    Running,
    /// Its vCPUs are stopped and can go on.
    Paused,
    /// It will never run again.
    Ended(Exit),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_internal_error_shows_its_instruction() {
        let exit = Exit::InternalError(InternalError {
            suberror: 1,
            instruction: vec![0x0f, 0x01, 0xca],
            rip: 0x1000,
        });
        assert_eq!(
            exit.to_string(),
            "KVM could not go on (internal error 1, instruction 0f 01 ca at 0x1000)"
        );
    }
}
