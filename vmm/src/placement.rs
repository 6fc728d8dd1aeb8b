//! Placement of vCPU threads on the host's processors, by a hook of the embedding program.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustix::thread::{CpuSet, Pid, gettid, sched_setaffinity};

/// A thread that is about to run a vCPU, as the embedding program's placement hook gets it. The
/// hook may choose its processors ([`pin`](Self::pin)), its control group (by writing its
/// [`id`](Self::id) to a `cgroup.threads`) and its core scheduling group (`PR_SCHED_CORE` of
/// prctl(2), so that no other tenant's thread shares its core).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuThread {
    index: usize,
    id: Pid,
}

impl VcpuThread {
    /// Returns the id of the calling thread.
    pub(crate) fn own_id() -> Pid {
        gettid()
    }

    pub(crate) fn new(index: usize, id: Pid) -> Self {
        Self { index, id }
    }

    /// Returns the vCPU's number, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Returns the thread's id, as sched_setaffinity(2) and the files of control groups take it.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.id.as_raw_nonzero().get()
    }

    /// Restricts the thread to these processors of the host, given by their numbers, from 0 to
    /// 1023.
    ///
    /// # Errors
    /// The host's error when this process may use none of them; `InvalidInput` for a number that is
    /// too large.
    pub fn pin(&self, processors: &[usize]) -> io::Result<()> {
        let mut set = CpuSet::new();
        for processor in processors {
            if *processor >= CpuSet::MAX_CPU {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            set.set(*processor);
        }
        Ok(sched_setaffinity(Some(self.id), &set)?)
    }
}

type Hook = dyn Fn(&VcpuThread) -> io::Result<()> + Send + Sync;

/// The embedding program's hook, called for each thread before its vCPU runs.
#[derive(Clone)]
pub(crate) struct Placement(Arc<Hook>);

impl Placement {
    pub(crate) fn new(
        place: impl Fn(&VcpuThread) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(place))
    }

    pub(crate) fn place(&self, thread: VcpuThread) -> io::Result<()> {
        (self.0)(&thread)
    }
}

impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Placement")
    }
}
