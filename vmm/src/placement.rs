//! Where the threads that run a guest's processors may run: the embedding program's decision.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustix::thread::{CpuSet, Pid, gettid, sched_setaffinity};

/// A thread that is about to run a vCPU, for whoever decides where it runs: on which processors
/// ([`pin`](Self::pin)), in which control group (its [`id`](Self::id) into a `cgroup.threads`),
/// beside whom (`PR_SCHED_CORE` of prctl(2), so that no other tenant's thread shares its core).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuThread {
    index: usize,
    id: Pid,
}

impl VcpuThread {
    /// The calling thread, which is to run that vCPU.
    pub(crate) fn own_id() -> Pid {
        gettid()
    }

    pub(crate) fn new(index: usize, id: Pid) -> Self {
        Self { index, id }
    }

    /// The vCPU's number, from 0.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// The thread's id, as sched_setaffinity(2) and the files of control groups take it.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.id.as_raw_nonzero().get()
    }

    /// Lets it run on these processors of the host alone, by their numbers, from 0 to 1023.
    ///
    /// # Errors
    /// The host's, which has none of them for this process; `InvalidInput` for a number that is too
    /// large.
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

/// Is told of each thread before its vCPU runs.
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
