//! The cgroups that this process is in, of version 2 or 1, and what their limits leave.
//!
//! A limit applies to all cgroups below it, so each cgroup from the process's own up to the root
//! counts.

use std::fs;
use std::path::{Path, PathBuf};

/// Where Linux systems mount cgroups (`cgroups(7)`).
const MOUNTED: &str = "/sys/fs/cgroup";
/// Maximum number of levels that are read.
const MAX_DEPTH: usize = 64;

/// The files of a controller, by cgroup version.
pub(super) struct Controller {
    pub(super) name: &'static str,
    pub(super) v2: Files,
    pub(super) v1: Files,
}

/// File names in the directory of a cgroup.
pub(super) struct Files {
    pub(super) limit: &'static str,
    pub(super) used: &'static str,
}

/// One cgroup with a limit.
pub(super) struct Limited {
    pub(super) dir: PathBuf,
    pub(super) limit_file: &'static str,
    pub(super) limit: u64,
    pub(super) used: u64,
}

/// Returns each cgroup from this process's own up to the root that has a limit of this kind.
pub(super) fn limits(controller: &Controller) -> Vec<Limited> {
    let Ok(membership) = fs::read_to_string("/proc/self/cgroup") else {
        return Vec::new();
    };
    limits_in(Path::new(MOUNTED), &membership, controller)
}

pub(super) fn limits_in(mounted: &Path, membership: &str, controller: &Controller) -> Vec<Limited> {
    // Lines are `8:pids:/a/b` of version 1 and `0::/a/b` of version 2.
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(names), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (root, files) = if names.is_empty() {
            (mounted.to_owned(), &controller.v2)
        } else if names.split(',').any(|name| name == controller.name) {
            (mounted.join(controller.name), &controller.v1)
        } else {
            continue;
        };
        // In a container the path may be the host's, which is not mounted: then the root's limits
        // count.
        let own = root.join(path.trim_start_matches('/'));
        let levels = own.ancestors().take_while(|dir| dir.starts_with(&root));
        for dir in levels.take(MAX_DEPTH) {
            let number = |name| number(&dir.join(name));
            if let (Some(limit), Some(used)) = (number(files.limit), number(files.used)) {
                found.push(Limited {
                    dir: dir.to_owned(),
                    limit_file: files.limit,
                    limit,
                    used,
                });
            }
        }
    }
    found
}

/// The number that a file consists of; `None` for anything else, such as `max`.
pub(super) fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
