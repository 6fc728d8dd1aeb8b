//! A cgroup for one test, of version 2 or 1.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where Linux systems mount cgroups (`cgroups(7)`).
const MOUNTED: &str = "/sys/fs/cgroup";

/// A cgroup with a limit. Dropping it removes it.
#[derive(Debug)]
pub struct Cgroup {
    dir: PathBuf,
    limit_file: &'static str,
    joined: bool,
}

impl Cgroup {
    /// Creates a cgroup with at most `most` threads (a number or `max`). `None` if this user cannot
    /// create one.
    #[must_use]
    pub fn pids(name: &str, most: impl Display) -> Option<Self> {
        Self::new("pids", ["pids.max"; 2], name, most)
    }

    /// Creates a cgroup with at most `most` bytes of memory. `None` if this user cannot create one.
    #[must_use]
    pub fn memory(name: &str, most: u64) -> Option<Self> {
        let limit_files = ["memory.limit_in_bytes", "memory.max"];
        Self::new("memory", limit_files, name, most)
    }

    /// Takes the names of the limit's file in version 1 and in version 2.
    fn new(
        controller: &str,
        [v1, v2]: [&'static str; 2],
        name: &str,
        most: impl Display,
    ) -> Option<Self> {
        let mounted = Path::new(MOUNTED);
        let (root, limit_file) = [(mounted.join(controller), v1), (mounted.to_owned(), v2)]
            .into_iter()
            .find(|(root, _)| root.join("cgroup.procs").exists())?;
        let dir = root.join(format!("hearth-{name}-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        let cgroup = Self {
            dir,
            limit_file,
            joined: false,
        };
        fs::write(cgroup.limit_file(), most.to_string()).ok()?;
        Some(cgroup)
    }

    /// Returns the path of the limit's file.
    #[must_use]
    pub fn limit_file(&self) -> PathBuf {
        self.dir.join(self.limit_file)
    }

    /// Sets another limit.
    ///
    /// # Panics
    /// If the kernel refuses it.
    pub fn limit(&self, most: impl Display) {
        fs::write(self.limit_file(), most.to_string()).unwrap();
    }

    /// Sets the limit to `more` threads above the current number.
    ///
    /// # Panics
    /// If the cgroup was not created by [`pids`](Self::pids).
    pub fn leave_threads(&self, more: u64) {
        let used = fs::read_to_string(self.dir.join("pids.current")).unwrap();
        let used: u64 = used.trim().parse().unwrap();
        self.limit(used + more);
    }

    /// Moves this process into the cgroup until the value is dropped. `None` if it cannot be moved.
    pub fn join(&mut self) -> Option<()> {
        fs::write(self.dir.join("cgroup.procs"), "0").ok()?;
        self.joined = true;
        Some(())
    }

    /// Returns a command that runs `program` in the cgroup.
    #[must_use]
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""])
            .arg(&self.dir)
            .arg(program.as_ref())
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let (true, Some(parent)) = (self.joined, self.dir.parent()) {
            let _ = fs::write(parent.join("cgroup.procs"), "0");
        }
        let _ = fs::remove_dir(&self.dir);
    }
}
