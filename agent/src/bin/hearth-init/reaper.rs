//! The one place where children are waited for, ours and the orphans that PID 1 inherits.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use hearth_agent::proto::ExitStatus;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    io::Errno,
};

use crate::{kill::KILL, sys};

/// Children reaped before other events have their turn.
const BATCH: usize = 256;

/// Whether this process may have children. It has none until it makes one, and orphans are children
/// of children.
static EXPECTED: AtomicBool = AtomicBool::new(true);

/// A child is about to be made.
pub(crate) fn expect_children() {
    EXPECTED.store(true, Ordering::Relaxed);
}

/// Knows when a child has died.
#[derive(Debug)]
pub(crate) struct Reaper {
    signals: OwnedFd,
    /// The last batch was full: more may be dead without another signal.
    more: bool,
}

/// A child's end.
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
        // There is none yet, which this finds out.
        reaper.reap();
        Ok(reaper)
    }

    /// Readable when a child has died; `None` while there is no child that could. The kernel looks
    /// at each signal to answer, twice for each wait, which is a tenth of what a ping costs
    /// where ring 0 is emulated.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        EXPECTED
            .load(Ordering::Relaxed)
            .then(|| self.signals.as_fd())
    }

    /// Whether [`reap`](Self::reap) is to be called again without waiting.
    pub(crate) fn has_more(&self) -> bool {
        self.more
    }

    /// Reaps what is dead.
    pub(crate) fn reap(&mut self) -> Vec<Reaped> {
        // One pending SIGCHLD stands for any number of deaths; taking it before the waits loses
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
    /// One that was killed, and of which no more is known.
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
