//! Memory that this process could still get: what the machine has available, or less where a cgroup
//! of this process has a limit.

use std::fs;

use super::cgroup::{Controller, Files, Limited, limits};

const CONTROLLER: Controller = Controller {
    name: "memory",
    v2: Files {
        limit: "memory.max",
        used: "memory.current",
    },
    v1: Files {
        limit: "memory.limit_in_bytes",
        used: "memory.usage_in_bytes",
    },
};

/// What version 1 has instead of `max`: the largest number of bytes in whole pages.
const NO_LIMIT: u64 = i64::MAX as u64 & !0xfff;

/// A limit on memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryLimit {
    /// The file of a cgroup in which to raise it.
    pub name: String,
    /// The limit in MiB, part of which is already used.
    pub mib: u64,
}

/// The smallest limit of the cgroups that this process is in; `None` if they have none.
#[must_use]
pub fn memory_limit() -> Option<MemoryLimit> {
    smallest(limits(&CONTROLLER))
}

fn smallest(limits: Vec<Limited>) -> Option<MemoryLimit> {
    let limits = limits.into_iter().filter(|of| of.limit < NO_LIMIT);
    let smallest = limits.min_by_key(|of| of.limit)?;
    let name = smallest.dir.join(smallest.limit_file);
    Some(MemoryLimit {
        name: name.display().to_string(),
        mib: smallest.limit >> 20,
    })
}

/// In MiB; `None` if the machine's available memory is not known.
pub(super) fn available_mib() -> Option<u64> {
    let machine = available_kib(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let cgroups = limits(&CONTROLLER);
    let least = cgroups.iter().map(|limited| left(limited) >> 10).min();
    Some(least.unwrap_or(u64::MAX).min(machine) >> 10)
}

/// Bytes that a cgroup leaves. Inactive page cache counts as used there, but is reclaimed at need.
fn left(limited: &Limited) -> u64 {
    let stat = fs::read_to_string(limited.dir.join("memory.stat")).unwrap_or_default();
    let cache = ["total_inactive_file ", "inactive_file "]
        .iter()
        .find_map(|name| stat.lines().find_map(|line| line.strip_prefix(name)))
        .and_then(|bytes| bytes.trim().parse().ok())
        .unwrap_or(0);
    limited
        .limit
        .saturating_sub(limited.used.saturating_sub(cache))
}

fn available_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::cgroup::limits_in;
    use super::*;

    #[test]
    fn nonsense_is_taken_for_unknown() {
        let meminfo = "MemTotal:  100 kB\nMemAvailable:   20480 kB\n";
        assert_eq!(available_kib(meminfo), Some(20480));
        for nonsense in ["", "MemAvailable:", "MemAvailable: x"] {
            assert_eq!(available_kib(nonsense), None);
        }
    }

    /// Creates a tree of cgroups as files, by path and content.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    fn least(root: &Path, membership: &str) -> Option<u64> {
        limits_in(root, membership, &CONTROLLER)
            .iter()
            .map(left)
            .min()
    }

    #[test]
    fn the_smallest_limit_above_the_process_counts() {
        let root = tree(&[
            ("a/memory.max", "1000\n"),
            ("a/memory.current", "100\n"),
            ("a/b/memory.max", "5000\n"),
            ("a/b/memory.current", "90\n"),
            ("a/b/c/memory.max", "max\n"),
            ("a/b/c/memory.current", "90\n"),
            ("other/memory.max", "1\n"),
            ("other/memory.current", "0\n"),
        ]);
        assert_eq!(least(root.path(), "0::/a/b/c\n"), Some(900));
        assert_eq!(least(root.path(), "0::/\n"), None);
        // A path of the host's, seen from within a container.
        assert_eq!(least(root.path(), "0::/../../a\n"), None);
    }

    #[test]
    fn version_1_and_idle_page_cache_are_known() {
        let root = tree(&[
            ("memory/a/memory.limit_in_bytes", "1000\n"),
            ("memory/a/memory.usage_in_bytes", "990\n"),
            (
                "memory/a/memory.stat",
                "inactive_file 1\ntotal_inactive_file 490\n",
            ),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory/memory.usage_in_bytes", "990\n"),
        ]);
        assert_eq!(least(root.path(), "4:memory:/a\n0::/\n"), Some(500));
        assert_eq!(least(root.path(), "4:cpu,memory:/a\n"), Some(500));
        assert_eq!(least(root.path(), "4:cpu:/a\n"), None);
    }

    #[test]
    fn a_limit_is_named_and_none_is_none() {
        let limit = |limit: &str| {
            let root = tree(&[
                ("memory/a/memory.limit_in_bytes", limit),
                ("memory/a/memory.usage_in_bytes", "990\n"),
                ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory/memory.usage_in_bytes", "990\n"),
            ]);
            smallest(limits_in(root.path(), "4:memory:/a\n", &CONTROLLER))
        };
        let found = limit("67108864\n").unwrap();
        assert_eq!(found.mib, 64);
        assert!(found.name.ends_with("memory/a/memory.limit_in_bytes"));
        assert_eq!(limit("9223372036854771712\n"), None);
    }

    #[test]
    fn more_used_than_allowed_leaves_nothing_and_nonsense_is_no_limit() {
        let used = ("a/memory.current", "20\n");
        let root = tree(&[("a/memory.max", "10\n"), used]);
        assert_eq!(least(root.path(), "0::/a\n"), Some(0));
        for nonsense in ["nonsense", "", ":", "0:"] {
            assert_eq!(least(root.path(), nonsense), None, "{nonsense}");
        }
        for nonsense in ["", "x", "-1"] {
            let root = tree(&[("a/memory.max", nonsense), used]);
            assert_eq!(least(root.path(), "0::/a\n"), None, "{nonsense}");
        }
    }
}
