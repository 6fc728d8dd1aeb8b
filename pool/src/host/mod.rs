//! What the pool reads about the host: memory and threads.

mod cgroup;
mod memory;
mod threads;

use std::fs;

pub use memory::{MemoryLimit, memory_limit};
pub use threads::{ThreadLimit, thread_limit};

/// The host's memory, as the pool needs to know it. Called rarely: reading a small file is fine.
pub trait Host: Send + Sync + 'static {
    /// Memory in MiB that programs could still get, read once when a pool is made.
    fn memory_available_mib(&self) -> Option<u64>;

    /// Percentage of the last ten seconds in which some task stalled for memory; `None` if not
    /// known.
    fn memory_stall_percent(&self) -> Option<f64>;
}

/// The machine that this process runs on, as read from `/proc/meminfo`, the limits of this
/// process's cgroups, and `/proc/pressure/memory`.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThisHost;

impl Host for ThisHost {
    fn memory_available_mib(&self) -> Option<u64> {
        memory::available_mib()
    }

    fn memory_stall_percent(&self) -> Option<f64> {
        stall_percent(&fs::read_to_string("/proc/pressure/memory").ok()?)
    }
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
    fn nonsense_is_taken_for_unknown() {
        let pressure = "some avg10=1.50 avg60=0.00 avg300=0.00 total=0\nfull avg10=9.00\n";
        assert_eq!(stall_percent(pressure), Some(1.5));
        for nonsense in ["", "some", "some avg10=x"] {
            assert_eq!(stall_percent(nonsense), None);
        }
    }

    #[test]
    fn this_host_knows_its_memory_and_threads() {
        assert!(ThisHost.memory_available_mib().is_some_and(|mib| mib > 0));
        assert!(thread_limit().is_some_and(|limit| limit.left > 0));
    }
}
