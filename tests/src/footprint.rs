//! Resources of this process: descriptors, threads, mappings, resident memory.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// The resources of this process at one moment, counted by name where there are names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Open descriptors by what they refer to (inode numbers left out).
    pub fds: BTreeMap<String, usize>,
    /// Threads by name.
    pub threads: BTreeMap<String, usize>,
    /// Mappings by file (`[anon]` for those without).
    pub mappings: BTreeMap<String, usize>,
    /// Resident set in KiB.
    pub rss_kib: u64,
}

impl Footprint {
    /// Counts the resources now.
    ///
    /// # Panics
    /// Without a readable `/proc/self`.
    #[must_use]
    pub fn now() -> Self {
        Self {
            fds: fds(),
            threads: threads(),
            mappings: mappings(),
            rss_kib: rss_kib(),
        }
    }

    /// Waits until the process has no more descriptors, threads and mappings of files than this,
    /// and at most `slack` more mappings of anonymous memory (allocators keep some). It has to wait
    /// because a thread of the library tears dropped VMs down.
    ///
    /// # Panics
    /// With the difference, when `limit` passes first.
    pub fn assert_restored(&self, slack: usize, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let grown = self.grown(&Self::now(), slack);
            if grown.is_empty() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the process holds more than before:\n{grown}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Lists the resources that `later` has beyond this, as lines of text.
    fn grown(&self, later: &Self, slack: usize) -> String {
        let mut text = String::new();
        let mut compare = |kind: &str,
                           before: &BTreeMap<String, usize>,
                           after: &BTreeMap<String, usize>,
                           slack: usize| {
            if after.values().sum::<usize>() <= before.values().sum::<usize>() + slack {
                return;
            }
            for (name, count) in after {
                let was = before.get(name).copied().unwrap_or(0);
                if *count > was {
                    let _ = writeln!(text, "{kind} {name}: {was} before, {count} now");
                }
            }
        };
        compare("fd", &self.fds, &later.fds, 0);
        compare("thread", &self.threads, &later.threads, 0);
        let [files, unnamed] = by_name(&self.mappings);
        let [later_files, later_unnamed] = by_name(&later.mappings);
        compare("mapping", &files, &later_files, 0);
        compare("mapping", &unnamed, &later_unnamed, slack);
        text
    }
}

/// Separates mappings of files from those of anonymous memory, which the allocator and the C
/// library make as they need. A guest's memory and a vCPU's page are files.
fn by_name(mappings: &BTreeMap<String, usize>) -> [BTreeMap<String, usize>; 2] {
    let split = mappings.clone().into_iter();
    let (unnamed, files) = split.partition(|(name, _)| name.starts_with('['));
    [files, unnamed]
}

fn count(names: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    counts
}

fn fds() -> BTreeMap<String, usize> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("/proc/self/fd");
    count(entries.filter_map(|entry| {
        let target = std::fs::read_link(entry.ok()?.path()).ok()?;
        let target = target.to_string_lossy();
        // Leaves out the descriptor of this listing.
        (!target.starts_with("/proc/")).then(|| match target.split_once(":[") {
            Some((kind, _)) => kind.to_owned(),
            None => target.into_owned(),
        })
    }))
}

fn threads() -> BTreeMap<String, usize> {
    let entries = std::fs::read_dir("/proc/self/task").expect("/proc/self/task");
    // A thread may end after the listing, before its name is read.
    let names = entries.filter_map(|entry| {
        let comm = std::fs::read_to_string(entry.ok()?.path().join("comm")).ok()?;
        Some(comm.trim_end().to_owned())
    });
    count(names)
}

fn mappings() -> BTreeMap<String, usize> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc/self/maps");
    count(maps.lines().map(|line| {
        let name = line.split_whitespace().nth(5).unwrap_or("[anon]");
        name.to_owned()
    }))
}

fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc/self/status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .expect("VmRSS in /proc/self/status")
}

/// Returns the memory in KiB that is private to this process, without its guests' memory (proc(5),
/// smaps): heap, stacks, costs of threads and handles. Memory that the host's kernel uses for it is
/// not counted.
///
/// # Panics
/// Without a readable `/proc/self`.
#[must_use]
pub fn private_kib() -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("/proc/self/smaps");
    let (mut sum, mut of_guest) = (0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Private_Clean:" | "Private_Dirty:") if !of_guest => {
                let kib = words.next().and_then(|kib| kib.parse::<u64>().ok());
                sum += kib.expect("a size in smaps");
            }
            // The first line of a mapping begins with its addresses.
            Some(word) if !word.ends_with(':') => of_guest = line.contains("hearth-guest"),
            _ => {}
        }
    }
    sum
}

/// Returns the memory in KiB that the host could still give to programs (`MemAvailable`).
///
/// # Panics
/// Without a readable `/proc/meminfo`.
#[must_use]
pub fn available_kib() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .expect("MemAvailable in /proc/meminfo")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_what_was_written_and_not_a_guests() {
        if !crate::kvm() || !crate::alone() {
            return;
        }
        let before = private_kib();
        let heap = std::hint::black_box(vec![1_u8; 8 << 20]);
        assert!((8 << 10..9 << 10).contains(&(private_kib() - before)));
        let boot = || crate::flat::Code::new().sleep().raw(&heap).boot();
        // Boots first what would distort the figures: the first VM of a process sets up shared
        // state, and the C library keeps memory of copies, from the second VM on.
        for _ in 0..3 {
            boot().destroy();
        }
        let before = private_kib();
        let guest = boot();
        assert!(guest.private_bytes().unwrap() >= 8 << 20);
        assert!(private_kib() < before + 1024);
    }

    #[test]
    fn a_leak_of_each_kind_is_seen_and_named() {
        if !crate::alone() {
            return;
        }
        let before = Footprint::now();
        let file = tempfile::tempfile().unwrap();
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("hearth-leaked".into())
            .spawn(move || wait.recv().is_ok())
            .unwrap();
        // The new thread sets its own name, some time after it starts.
        while !Footprint::now().threads.contains_key("hearth-leaked") {
            std::thread::yield_now();
        }
        let grown = before.grown(&Footprint::now(), 0);
        assert!(grown.contains("fd /"), "{grown}");
        assert!(grown.contains("thread hearth-leaked"), "{grown}");
        drop((file, stop));
        thread.join().unwrap();
        before.assert_restored(8, Duration::from_secs(10));
    }
}
