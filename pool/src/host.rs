//! What the pool asks about the host's memory.

use std::fs;

/// The host's memory, as the pool needs to know it. Called seldom: a small file read is fine.
pub trait Host: Send + Sync + 'static {
    /// Memory in MiB that programs could still get, read once when a pool is made.
    fn memory_available_mib(&self) -> Option<u64>;

    /// Percentage of the last ten seconds in which some task stalled for memory; none: not known.
    fn memory_stall_percent(&self) -> Option<f64>;
}

/// The machine that this runs on, by `/proc/meminfo` and `/proc/pressure/memory`.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThisHost;

impl Host for ThisHost {
    fn memory_available_mib(&self) -> Option<u64> {
        available_mib(&fs::read_to_string("/proc/meminfo").ok()?)
    }

    fn memory_stall_percent(&self) -> Option<f64> {
        stall_percent(&fs::read_to_string("/proc/pressure/memory").ok()?)
    }
}

fn available_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

fn stall_percent(pressure: &str) -> Option<f64> {
    let line = pressure
        .lines()
        .find_map(|line| line.strip_prefix("some "))?;
    line.split_whitespace()
        .find_map(|word| word.strip_prefix("avg10="))?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_files_and_takes_nonsense_for_unknown() {
        let meminfo = "MemTotal:  100 kB\nMemAvailable:   20480 kB\n";
        assert_eq!(available_mib(meminfo), Some(20));
        let pressure = "some avg10=1.50 avg60=0.00 avg300=0.00 total=0\nfull avg10=9.00\n";
        assert_eq!(stall_percent(pressure), Some(1.5));
        for nonsense in ["", "some", "MemAvailable:", "some avg10=x"] {
            assert_eq!(available_mib(nonsense), None);
            assert_eq!(stall_percent(nonsense), None);
        }
    }

    #[test]
    fn this_host_knows_its_memory() {
        assert!(ThisHost.memory_available_mib().is_some_and(|mib| mib > 0));
    }
}
