//! Processor time of the vCPUs of this process.

use std::collections::BTreeMap;
use std::time::Duration;

/// Returns the processor time of each live vCPU thread by its name. Threads of the same name are
/// added up.
///
/// # Panics
/// Without a readable `/proc/self`.
#[must_use]
pub fn vcpu_times() -> BTreeMap<String, Duration> {
    let threads = std::fs::read_dir("/proc/self/task").expect("/proc/self/task");
    // A thread may end between the listing and the reading.
    let times = threads.filter_map(|thread| {
        let path = thread.ok()?.path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        // proc(5), schedstat: the first number is the nanoseconds on a processor.
        let spent = std::fs::read_to_string(path.join("schedstat")).ok()?;
        let spent = spent.split(' ').next()?.parse().ok()?;
        let of_vcpu = name.starts_with("hearth-vcpu");
        of_vcpu.then(|| (name.trim_end().to_owned(), Duration::from_nanos(spent)))
    });
    times.fold(BTreeMap::new(), |mut sums, (name, spent)| {
        *sums.entry(name).or_default() += spent;
        sums
    })
}
