//! How many threads this process may still start, by the tightest of its limits.

use std::fs;
use std::path::Path;

use super::cgroup::{Controller, Files, limits, number};

const CONTROLLER: Controller = Controller {
    name: "pids",
    v2: Files {
        limit: "pids.max",
        used: "pids.current",
    },
    v1: Files {
        limit: "pids.max",
        used: "pids.current",
    },
};

/// A limit on threads, and what it leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ThreadLimit {
    /// What to raise: a file of a cgroup, `ulimit -u` or a sysctl.
    pub name: String,
    /// Threads that may still be started under it.
    pub left: u64,
}

/// Returns the limit that leaves this process the fewest threads, as far as `/proc` shows; `None`
/// if it shows none.
///
/// Reads the status of every process of the machine where `ulimit -u` is set, so it is for checks
/// beforehand, not for each start of a thread.
#[must_use]
pub fn thread_limit() -> Option<ThreadLimit> {
    let cgroups = limits(&CONTROLLER).into_iter().map(|limited| ThreadLimit {
        name: limited.dir.join(limited.limit_file).display().to_string(),
        left: limited.limit.saturating_sub(limited.used),
    });
    cgroups
        .chain(of_the_user())
        .chain(of_the_machine())
        .min_by_key(|limit| limit.left)
}

fn of_the_machine() -> Option<ThreadLimit> {
    let max = number(Path::new("/proc/sys/kernel/threads-max"))?;
    let loads = fs::read_to_string("/proc/loadavg").ok()?;
    // `0.00 0.01 0.05 1/234 567`: 234 threads.
    let (_, used) = loads.split_whitespace().nth(3)?.split_once('/')?;
    Some(ThreadLimit {
        name: "sysctl kernel.threads-max".to_owned(),
        left: max.saturating_sub(used.parse().ok()?),
    })
}

/// `ulimit -u` counts the threads of all processes of a user (`getrlimit(2)`). Root is exempt.
fn of_the_user() -> Option<ThreadLimit> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let max: u64 = word(&limits, "Max processes")?.parse().ok()?;
    let own = fs::read_to_string("/proc/self/status").ok()?;
    let user = word(&own, "Uid:").filter(|user| *user != "0")?;
    let used: u64 = fs::read_dir("/proc")
        .ok()?
        .filter_map(|process| fs::read_to_string(process.ok()?.path().join("status")).ok())
        .filter(|status| word(status, "Uid:") == Some(user))
        .filter_map(|status| word(&status, "Threads:")?.parse::<u64>().ok())
        .sum();
    Some(ThreadLimit {
        name: "ulimit -u".to_owned(),
        left: max.saturating_sub(used),
    })
}

/// The first word after `name` at the beginning of a line.
fn word<'text>(text: &'text str, name: &str) -> Option<&'text str> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()
}
