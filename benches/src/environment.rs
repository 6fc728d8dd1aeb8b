//! The machine on which the figures were measured.

use std::time::{SystemTime, UNIX_EPOCH};

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
    /// Day of the run (UTC), as 2026-01-31; empty in results that are older than this field.
    #[serde(default)]
    pub date: String,
    /// The frequency governor of the processor; empty if the host does not tell.
    #[serde(default)]
    pub governor: String,
}

impl Environment {
    /// Reads the environment of this machine.
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
            date: day(SystemTime::now()),
            governor: read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
                .trim()
                .to_owned(),
        })
    }
}

/// Returns the day of a moment in UTC, by the Gregorian calendar (H. Hinnant, "chrono-compatible
/// low-level date algorithms").
fn day(moment: SystemTime) -> String {
    let seconds = moment
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    // Days since 0000-03-01: leap days are then at the end of a year, and 400 years have 146,097
    // days.
    let days = seconds / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + later)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn days_are_those_of_the_calendar() {
        for (days, name) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (789, "1972-02-29"),
            (11_016, "2000-02-29"),
            (19_722, "2023-12-31"),
            (19_723, "2024-01-01"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            let noon = UNIX_EPOCH + Duration::from_secs(days * 86_400 + 43_200);
            assert_eq!(day(noon), name);
        }
    }
}
