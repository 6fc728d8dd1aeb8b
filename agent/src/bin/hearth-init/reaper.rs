//! The only place where children are waited for: the agent's own and the orphans that PID 1
//! inherits.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use hearth_agent::proto::ExitStatus;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};

use crate::{kill::KILL, sys};

/// Most children reaped before other events are handled.
const BATCH: usize = 256;

/// Whether this process may have children. It has none until it starts one; orphans descend from
/// its children.
static EXPECTED: AtomicBool = AtomicBool::new(true);

/// To be called before a child is started.
pub(crate) fn expect_children() {
    EXPECTED.store(true, Ordering::Relaxed);
}

/// Reaps children, and has a descriptor that tells when one has died.
#[derive(Debug)]
pub(crate) struct Reaper {
    signals: OwnedFd,
    /// The last batch was full: more children may be dead without another signal.
    more: bool,
}

/// A child that was reaped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reaped {
    pub(crate) pid: i32,
    pub(crate) status: ExitStatus,
    pub(crate) user_us: u64,
    pub(crate) system_us: u64,
    pub(crate) max_rss_kib: u64,
}

impl Reaper {
    pub(crate) fn start() -> Result<Self, Errno> {
        let mut reaper = Self {
            signals: sys::child_signals()?,
            more: false,
        };
        // Finds out that there is no child yet.
        reaper.reap();
        Ok(reaper)
    }

    /// Returns a descriptor that is readable when a child has died; `None` while there is no child.
    /// Polling it makes the kernel check each signal twice per wait, which is a tenth of the cost
    /// of a ping where ring 0 is emulated.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        EXPECTED
            .load(Ordering::Relaxed)
            .then(|| self.signals.as_fd())
    }

    /// Whether [`reap`](Self::reap) is to be called again without waiting.
    pub(crate) fn has_more(&self) -> bool {
        self.more
    }

    /// Reaps dead children, at most `BATCH`.
    pub(crate) fn reap(&mut self) -> Vec<Reaped> {
        // One pending SIGCHLD stands for any number of deaths; reading it before the waits loses
        // none.
        let _ = rustix::io::read(&self.signals, &mut [0; size_of::<libc::signalfd_siginfo>()]);
        let mut dead = Vec::new();
        while dead.len() < BATCH {
            match sys::reap() {
                Ok(Some(child)) => dead.push(Reaped::from(&child)),
                Ok(None) => break,
                Err(errno) => {
                    EXPECTED.store(errno != Errno::CHILD, Ordering::Relaxed);
                    break;
                }
            }
        }
        self.more = dead.len() == BATCH;
        dead
    }
}

impl Reaped {
    /// Returns the record of a child that was killed and could not be reaped.
    pub(crate) fn killed(pid: i32) -> Self {
        Self {
            pid,
            status: ExitStatus::Signal(KILL),
            user_us: 0,
            system_us: 0,
            max_rss_kib: 0,
        }
    }
}

impl From<&sys::Dead> for Reaped {
    fn from(dead: &sys::Dead) -> Self {
        let status = if libc::WIFSIGNALED(dead.status) {
            ExitStatus::Signal(u8::try_from(libc::WTERMSIG(dead.status)).unwrap_or(u8::MAX))
        } else {
            ExitStatus::Code(u8::try_from(libc::WEXITSTATUS(dead.status)).unwrap_or(u8::MAX))
        };
        Self {
            pid: dead.pid,
            status,
            user_us: dead.user_us,
            system_us: dead.system_us,
            max_rss_kib: dead.max_rss_kib,
        }
    }
}
