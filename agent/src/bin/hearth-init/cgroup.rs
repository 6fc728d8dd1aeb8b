//! One cgroup per program, so that killing it reaches all processes that it started, whatever
//! session they moved to.
//!
//! Creating a cgroup costs the kernel some forty files. So the first is created in advance, and an
//! empty one is reused unless it had limits or was killed: there are kernels (6.18 is one) that
//! kill every process born into a cgroup that was ever killed, because they compare its count of
//! kills with that of the parent's cgroup.

use alloc::{
    borrow::ToOwned,
    format,
    string::{String, ToString},
    vec::Vec,
};

use hearth_agent::proto::{Limits, Resource, SpawnFailure};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, Mode, OFlags, mkdir, open, openat, unlinkat},
    io::{Errno, read, write},
};

/// Most cgroups that exist at once. Beyond that, all are populated by processes that programs left
/// behind.
const MOST: usize = 512;

/// All cgroups that the agent created.
#[derive(Debug)]
pub(crate) struct Cgroups {
    root: Option<OwnedFd>,
    /// The path of the parent cgroup; empty: no cgroups.
    path: Vec<u8>,
    /// Cgroups that no program uses now; processes that programs left behind may still run in
    /// them.
    used: Vec<Cgroup>,
    /// The next number; none is given out twice.
    made: u32,
    /// Numbers of existing cgroups.
    alive: Vec<u32>,
    /// Numbers of cgroups that were ordered to freeze.
    frozen: Vec<u32>,
    controllers: bool,
    /// The `pids.max` of a program without a limit of its own; `None` if the kernel cannot count
    /// processes.
    share: Option<u32>,
}

/// A cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    dir: OwnedFd,
    number: u32,
    /// Never to be reused.
    spent: bool,
}

impl Cgroups {
    /// Uses the place where the agent mounts the cgroup file system.
    pub(crate) fn at_usual_place() -> Self {
        Self::at(crate::mounts::CGROUP_ROOT.as_bytes())
    }

    /// Creates cgroups below an existing one.
    pub(crate) fn at(path: &[u8]) -> Self {
        Self {
            root: None,
            path: path.to_owned(),
            used: Vec::new(),
            made: 0,
            alive: Vec::new(),
            frozen: Vec::new(),
            controllers: false,
            share: None,
        }
    }

    /// Uses no cgroups: programs are killed by process group, session and descent.
    pub(crate) fn none() -> Self {
        Self::at(b"")
    }

    /// Opens the root and creates the first cgroup in advance. Without cgroups in the kernel there
    /// are none.
    pub(crate) fn prepare(&mut self) {
        if self.path.is_empty() || self.root.is_some() {
            return;
        }
        self.root = open(self.path.as_slice(), DIRECTORY, Mode::empty()).ok();
        // Only cgroup2 has this file.
        let usable = self
            .root
            .as_ref()
            .is_some_and(|root| openat(root, "cgroup.procs", READ, Mode::empty()).is_ok());
        if !usable {
            self.root = None;
            return;
        }
        if let Some(root) = &self.root
            && put(root.as_fd(), CONTROL, "+pids").is_ok()
        {
            self.share = share_of_processes();
        }
        if let Ok(Some(first)) = self.make() {
            self.used.push(first);
        }
    }

    /// Returns a cgroup with these limits for one program; `None` if the kernel has no cgroups and
    /// no limit needs one.
    ///
    /// # Errors
    /// [`SpawnFailure::Limit`] if a limit cannot be set; another if no cgroup can be created.
    pub(crate) fn acquire(&mut self, limits: &Limits) -> Result<Option<Cgroup>, SpawnFailure> {
        let empty = self.used.iter().position(|group| !group.is_populated());
        let group = match empty.map(|index| self.used.swap_remove(index)) {
            Some(group) if !group.spent => Some(group),
            Some(group) => {
                self.remove(group);
                self.make()?
            }
            None => self.make()?,
        };
        let wanted = [
            (Resource::Memory, "memory.max", limits.memory_bytes),
            (
                Resource::Processes,
                PROCESSES,
                limits.processes.map(u64::from),
            ),
        ];
        if !limits.need_controllers() {
            return Ok(group);
        }
        let Some(mut group) = group else {
            let limit = if limits.memory_bytes.is_some() {
                Resource::Memory
            } else {
                Resource::Processes
            };
            return Err(SpawnFailure::Limit {
                limit,
                errno: Errno::OPNOTSUPP.raw_os_error(),
            });
        };
        self.enable_controllers();
        group.spent = true;
        for (limit, file, value) in wanted {
            if let Some(value) = value
                && let Err(errno) = group.put(file, &value.to_string())
            {
                self.remove(group);
                return Err(SpawnFailure::Limit {
                    limit,
                    errno: errno.raw_os_error(),
                });
            }
        }
        // A program with a memory limit would swap instead. There is no swap, so the file may be
        // missing.
        let _ = group.put("memory.swap.max", "0");
        Ok(Some(group))
    }

    /// Takes back the cgroup of a program.
    pub(crate) fn release(&mut self, group: Option<Cgroup>) {
        self.used.extend(group);
    }

    /// Freezes all processes in the cgroups. Returns whether all are frozen: a process in the
    /// kernel freezes only when it leaves it. Empty cgroups are left alone, for programs to come.
    ///
    /// # Errors
    /// EOPNOTSUPP without cgroups; otherwise the error of the first cgroup that could not be
    /// frozen.
    pub(crate) fn freeze(&mut self) -> Result<bool, Errno> {
        let root = self.root.as_ref().ok_or(Errno::OPNOTSUPP)?;
        let mut still = true;
        for &number in &self.alive {
            let dir = openat(root, name(number), DIRECTORY, Mode::empty())?;
            if events(dir.as_fd()).populated {
                if !self.frozen.contains(&number) {
                    put(dir.as_fd(), FREEZE, "1")?;
                    self.frozen.push(number);
                }
                still &= events(dir.as_fd()).frozen;
            }
        }
        Ok(still)
    }

    /// Whether any cgroup was ordered to freeze.
    pub(crate) fn are_frozen(&self) -> bool {
        !self.frozen.is_empty()
    }

    /// Thaws all frozen cgroups.
    ///
    /// # Errors
    /// The error of the first cgroup that could not be thawed; it and those not yet tried stay
    /// frozen.
    pub(crate) fn thaw(&mut self) -> Result<(), Errno> {
        let Some(root) = &self.root else {
            return Ok(());
        };
        while let Some(&number) = self.frozen.last() {
            let dir = openat(root, name(number), DIRECTORY, Mode::empty())?;
            put(dir.as_fd(), FREEZE, "0")?;
            self.frozen.pop();
        }
        Ok(())
    }

    fn make(&mut self) -> Result<Option<Cgroup>, SpawnFailure> {
        if self.root.is_none() {
            return Ok(None);
        }
        if self.alive.len() >= MOST {
            return Err(SpawnFailure::Exhausted(Resource::Processes));
        }
        let number = self.made;
        self.made = self.made.wrapping_add(1);
        let path = self.place(number);
        let made = mkdir(path.as_slice(), Mode::from_raw_mode(0o755))
            .and_then(|()| open(path.as_slice(), DIRECTORY, Mode::empty()));
        match made {
            Ok(dir) => {
                self.alive.push(number);
                if let Some(share) = self.share {
                    let _ = put(dir.as_fd(), PROCESSES, &share.to_string());
                }
                Ok(Some(Cgroup {
                    dir,
                    number,
                    spent: false,
                }))
            }
            Err(Errno::MFILE | Errno::NFILE) => Err(SpawnFailure::Exhausted(Resource::OpenFiles)),
            Err(Errno::NOMEM) => Err(SpawnFailure::Exhausted(Resource::Memory)),
            Err(errno) => Err(SpawnFailure::Other {
                errno: errno.raw_os_error(),
            }),
        }
    }

    fn remove(&mut self, group: Cgroup) {
        if unlinkat(
            rustix::fs::CWD,
            self.place(group.number),
            AtFlags::REMOVEDIR,
        )
        .is_ok()
        {
            self.alive.retain(|&number| number != group.number);
            self.frozen.retain(|&number| number != group.number);
        }
    }

    fn place(&self, number: u32) -> Vec<u8> {
        [self.path.as_slice(), b"/", name(number).as_bytes()].concat()
    }

    fn enable_controllers(&mut self) {
        if !self.controllers
            && let Some(root) = &self.root
        {
            self.controllers = true;
            // One by one: a kernel may have only one of them. A missing controller shows when the
            // limit is set.
            for controller in ["+memory", "+pids"] {
                let _ = put(root.as_fd(), CONTROL, controller);
            }
        }
    }
}

impl Cgroup {
    /// Returns the directory, for CLONE_INTO_CGROUP.
    pub(crate) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Kills all processes in the cgroup; returns false if the kernel cannot.
    pub(crate) fn kill(&mut self) -> bool {
        self.spent = true;
        self.put("cgroup.kill", "1").is_ok()
    }

    fn is_populated(&self) -> bool {
        events(self.dir.as_fd()).populated
    }

    fn put(&self, file: &str, value: &str) -> Result<(), Errno> {
        put(self.dir.as_fd(), file, value)
    }
}

const READ: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC);
const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const FREEZE: &str = "cgroup.freeze";
const CONTROL: &str = "cgroup.subtree_control";
const PROCESSES: &str = "pids.max";

/// Returns half of the kernel's maximum: a program that uses all of it leaves others as many.
fn share_of_processes() -> Option<u32> {
    let file = open("/proc/sys/kernel/threads-max", READ, Mode::empty()).ok()?;
    let mut text = [0; 16];
    let count = read(&file, &mut text).ok()?;
    let text = core::str::from_utf8(text.get(..count)?).ok()?;
    let most: u32 = text.trim().parse().ok()?;
    Some(most / 2)
}

fn name(number: u32) -> String {
    format!("exec-{number}")
}

/// The state of a cgroup (`cgroup.events`).
#[derive(Clone, Copy, Debug)]
struct Events {
    populated: bool,
    frozen: bool,
}

/// Reads `cgroup.events`. An unreadable one counts as populated and not frozen; the cgroup is then
/// never reused.
fn events(dir: BorrowedFd<'_>) -> Events {
    let mut text = [0; 128];
    let file = openat(dir, "cgroup.events", READ, Mode::empty());
    let count = file.and_then(|file| read(&file, &mut text)).unwrap_or(0);
    let mut lines = text.get(..count).unwrap_or_default().split(|&b| b == b'\n');
    Events {
        populated: lines.clone().all(|line| line != b"populated 0"),
        frozen: lines.any(|line| line == b"frozen 1"),
    }
}

fn put(dir: BorrowedFd<'_>, file: &str, value: &str) -> Result<(), Errno> {
    let file = openat(dir, file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    write(&file, value.as_bytes()).map(drop)
}
