//! What the figures were measured on.

use hearth_vmm::{CpuProfile, Host, HostError};
use serde::{Deserialize, Serialize};

/// The machine and its state at the start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Environment {
    /// Version of the benchmark.
    pub version: String,
    /// Processor, as the kernel names it.
    pub cpu: String,
    /// Processors available to this process.
    pub cpus: usize,
    /// Host kernel.
    pub kernel: String,
    /// How KVM runs ring 0 here.
    pub profile: CpuProfile,
    /// Load average of the last minute at the start.
    pub load: f64,
}

impl Environment {
    /// Looks at this machine.
    ///
    /// # Errors
    /// When the machine cannot run guests.
    pub fn here() -> Result<Self, HostError> {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(String::new, |(_, name)| name.to_owned());
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            cpu,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            profile: Host::get()?.profile(),
            load: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(0.0),
        })
    }
}
