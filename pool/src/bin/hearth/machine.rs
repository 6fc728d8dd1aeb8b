//! The memory and CPUs of a guest: options that `run` and `boot` share.

use std::time::Duration;

use hearth_pool::memory_limit;
use hearth_vmm::{DEFAULT_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB, VmConfigBuilder};

#[derive(Debug, clap::Args)]
pub(crate) struct Machine {
    /// Memory of the guest in MiB, a whole number from 32 up [default: 128, or what the image
    /// needs]
    #[arg(long, value_name = "MIB", value_parser = memory)]
    memory: Option<u64>,
    /// Number of virtual CPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = cpus)]
    cpus: u8,
}

/// The guest's memory exceeds a cgroup limit: the kernel would end this process once the guest used
/// it.
#[derive(Debug, thiserror::Error)]
#[error(
    "a guest of {memory_mib} MiB does not fit in the cgroup of this process: {name} is {limit_mib} MiB; \
     raise that, or give the guest less with --memory"
)]
pub(crate) struct DoesNotFit {
    memory_mib: u64,
    name: String,
    limit_mib: u64,
}

impl Machine {
    /// Checks that the cgroups of this process allow so much memory.
    pub(crate) fn fits(&self, usual_mib: u64) -> Result<(), DoesNotFit> {
        let memory_mib = self.memory.unwrap_or(usual_mib);
        match memory_limit() {
            Some(limit) if limit.mib < memory_mib => Err(DoesNotFit {
                memory_mib,
                name: limit.name,
                limit_mib: limit.mib,
            }),
            _ => Ok(()),
        }
    }

    /// Sets memory and CPUs; `usual_mib` is the default amount of memory.
    pub(crate) fn apply(&self, config: VmConfigBuilder, usual_mib: u64) -> VmConfigBuilder {
        let memory_mib = self.memory.unwrap_or(usual_mib);
        config.memory_mib(memory_mib).vcpus(self.cpus)
    }
}

/// Only parses: the monitor, which knows the host, checks the range.
fn memory(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| {
        format!(
            "not a whole number of MiB; give a plain number from {MIN_MEMORY_MIB} up, such as {DEFAULT_MEMORY_MIB}"
        )
    })
}

fn cpus(text: &str) -> Result<u8, String> {
    text.parse()
        .map_err(|_| format!("not a number of CPUs; choose 1 to {MAX_VCPUS}"))
}

/// Parses a time in seconds, fractions allowed.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "not a time; give seconds, such as 30 or 0.5".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_are_not_whole_mib_are_refused_with_an_example() {
        assert_eq!(memory("256"), Ok(256));
        for text in ["", "-1", "1.5", "256M", "1G", "99999999999999999999"] {
            assert!(memory(text).unwrap_err().contains("such as 128"), "{text}");
        }
    }

    #[test]
    fn times_are_positive_seconds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "NaN", "inf", "1e30", "5s", ""] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_of_cpus_fit_their_type() {
        assert_eq!(cpus("4"), Ok(4));
        assert!(cpus("256").unwrap_err().contains("1 to 32"));
    }
}
