//! Threads for blocking work: making and tearing down VMs, reading and writing templates.
//!
//! tokio's blocking pool panics where the host refuses a thread (a limit on tasks, say), and a
//! runtime that is dropped waits for its threads. The threads here are started on demand and end
//! when idle, and a failure to start one is an error. They take no signals, and inherit nothing
//! from the thread that happens to start them.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::BoxFuture;
use hearth_vmm::spawn_neutral;
use tokio::sync::oneshot;

/// Most threads for blocking work in the process.
const MOST: usize = 64;
/// How long an idle thread waits for another job before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// Why blocking work was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkError {
    /// The host refuses to start a thread.
    #[error("the host gives this process no thread; check ulimit -u, TasksMax or pids.max")]
    NoThread(#[source] io::Error),
    /// The work panicked.
    #[error("a task of the backend panicked")]
    Panicked,
}

/// Called on a worker thread, or with the error if none can be started.
type Job = Box<dyn FnOnce(io::Result<()>) + Send>;
type Spawn = fn(Arc<Workers>) -> io::Result<()>;

struct Workers {
    state: Mutex<State>,
    more: Condvar,
    most: usize,
    spawn: Spawn,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// Runs `work` on a worker thread, to its end even if the future is dropped.
pub(super) fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> BoxFuture<'static, Result<T, WorkError>> {
    static WORKERS: LazyLock<Arc<Workers>> = LazyLock::new(|| Workers::new(MOST, spawn));
    Box::pin(WORKERS.run(work))
}

fn spawn(workers: Arc<Workers>) -> io::Result<()> {
    spawn_neutral("hearth-pool", move || workers.work())
}

impl Workers {
    fn new(most: usize, spawn: Spawn) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            more: Condvar::new(),
            most,
            spawn,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the work at once, not when the future is polled.
    fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = Result<T, WorkError>> + Send + 'static {
        let (done, result) = oneshot::channel();
        self.begin(Box::new(move |thread| {
            let result = thread.map_err(WorkError::NoThread).and_then(|()| {
                catch_unwind(AssertUnwindSafe(work)).map_err(|_| WorkError::Panicked)
            });
            // The receiver may have been dropped.
            let _ = done.send(result);
        }));
        async move { result.await.unwrap_or(Err(WorkError::Panicked)) }
    }

    fn begin(self: &Arc<Self>, job: Job) {
        let mut state = self.state();
        state.jobs.push_back(job);
        let wanted = state.jobs.len() > state.idle && state.threads < self.most;
        if !wanted {
            return self.more.notify_one();
        }
        state.threads += 1;
        drop(state);
        let Err(error) = (self.spawn)(Arc::clone(self)) else {
            return;
        };
        let mut state = self.state();
        state.threads -= 1;
        if state.threads > 0 {
            // The threads that exist take the job.
            return self.more.notify_one();
        }
        // Other jobs may have counted on the refused thread.
        let given_up = std::mem::take(&mut state.jobs);
        drop(state);
        for job in given_up {
            job(Err(same(&error)));
        }
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                // A result without a receiver is dropped in the job, and its drop may panic as
                // well.
                let _ = catch_unwind(AssertUnwindSafe(|| job(Ok(()))));
                state = self.state();
                continue;
            }
            state.idle += 1;
            let waited = self.more.wait_timeout(state, IDLE);
            let (again, time) = waited.unwrap_or_else(PoisonError::into_inner);
            state = again;
            state.idle -= 1;
            if time.timed_out() && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

/// Copies an error: several jobs may fail for one reason.
fn same(error: &io::Error) -> io::Error {
    let code = error.raw_os_error().map(io::Error::from_raw_os_error);
    code.unwrap_or_else(|| error.kind().into())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    use futures::executor::block_on;
    use futures::future::join_all;

    use super::*;

    fn none(_: Arc<Workers>) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(11))
    }

    /// Starts the first thread, and refuses all others.
    fn one(workers: Arc<Workers>) -> io::Result<()> {
        if workers.state().threads > 1 {
            return none(workers);
        }
        spawn(workers)
    }

    #[test]
    fn where_the_host_gives_no_thread_it_is_an_error_and_nothing_is_left() {
        let workers = Workers::new(4, none);
        for _ in 0..3 {
            let (held, seen) = mpsc::channel::<()>();
            let done = block_on(workers.run(move || drop(held)));
            assert!(matches!(done, Err(WorkError::NoThread(_))), "{done:?}");
            assert!(seen.recv().is_err(), "the work is dropped");
        }
        assert_eq!(workers.state().threads, 0);
    }

    #[test]
    fn the_threads_that_there_are_do_the_work_of_those_that_are_refused() {
        let workers = Workers::new(4, one);
        let results = (0..100).map(|number| workers.run(move || number * 2));
        let results = block_on(join_all(results));
        for (number, result) in results.into_iter().enumerate() {
            assert_eq!(result.unwrap(), number * 2);
        }
        assert_eq!(workers.state().threads, 1);
    }

    #[test]
    fn there_are_never_more_than_so_many_and_each_does_what_it_can() {
        static NOW: AtomicUsize = AtomicUsize::new(0);
        static MOST_AT_ONCE: AtomicUsize = AtomicUsize::new(0);
        let workers = Workers::new(3, spawn);
        let (meet, met) = (Arc::new(std::sync::Barrier::new(3)), 30);
        let jobs = (0..met).map(|_| {
            let meet = Arc::clone(&meet);
            workers.run(move || {
                let now = NOW.fetch_add(1, Ordering::SeqCst) + 1;
                MOST_AT_ONCE.fetch_max(now, Ordering::SeqCst);
                // Each job waits for two others, so fewer than three threads would hang.
                meet.wait();
                NOW.fetch_sub(1, Ordering::SeqCst);
            })
        });
        let jobs: Vec<_> = jobs.collect();
        assert!(block_on(join_all(jobs)).iter().all(Result::is_ok));
        assert_eq!(MOST_AT_ONCE.load(Ordering::SeqCst), 3);
    }

    /// The field `name` of the calling thread's status in /proc.
    fn of_this_thread(name: &str) -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    }

    #[test]
    fn its_threads_take_no_signals_and_run_where_the_process_may_whoever_needed_them() {
        use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
        let processors = || sched_getaffinity(None).unwrap();
        let main = std::fs::read_to_string("/proc/self/status").unwrap();
        let main = main
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed:"));
        let allowed = processors();
        let here = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu));
        let mut one = CpuSet::new();
        one.set(here.unwrap());
        sched_setaffinity(None, &one).unwrap();
        let workers = Workers::new(1, spawn);
        let told = workers.run(|| (of_this_thread("Cpus_allowed:"), of_this_thread("SigBlk:")));
        let (runs_on, blocked) = block_on(told).unwrap();
        assert_eq!(Some(&*runs_on), main.map(str::trim));
        let blocked = u64::from_str_radix(&blocked, 16).unwrap();
        // SIGHUP, SIGINT, SIGUSR1, SIGTERM, SIGCHLD
        for signal in [1, 2, 10, 15, 17] {
            assert_ne!(blocked & (1 << (signal - 1)), 0, "{signal}: {blocked:x}");
        }
        // SIGSEGV is not blocked: a thread causes it itself.
        assert_eq!(blocked & (1 << 10), 0, "{blocked:x}");
    }

    #[test]
    fn a_panic_is_an_error_and_its_thread_goes_on() {
        let workers = Workers::new(1, spawn);
        let done = block_on(workers.run(|| std::panic::resume_unwind(Box::new(()))));
        assert!(matches!(done, Err(WorkError::Panicked)), "{done:?}");
        assert_eq!(block_on(workers.run(|| 7)).unwrap(), 7);
    }

    #[test]
    fn a_result_that_nobody_takes_and_that_panics_when_dropped_costs_no_thread() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                std::panic::resume_unwind(Box::new(()));
            }
        }
        let workers = Workers::new(1, spawn);
        let (go_on, gone) = mpsc::channel();
        drop(workers.run(move || gone.recv().map(|()| Bomb)));
        go_on.send(()).unwrap();
        assert_eq!(block_on(workers.run(|| 7)).unwrap(), 7);
        assert_eq!(workers.state().threads, 1);
    }

    #[test]
    fn work_that_counted_on_a_thread_that_is_refused_is_told_why() {
        static FIRST: Mutex<Option<Arc<Workers>>> = Mutex::new(None);
        static SECOND: Mutex<Vec<mpsc::Receiver<bool>>> = Mutex::new(Vec::new());
        /// Queues more work while the first thread is being refused.
        fn refuse(workers: Arc<Workers>) -> io::Result<()> {
            if FIRST
                .lock()
                .unwrap()
                .replace(Arc::clone(&workers))
                .is_none()
            {
                let second = workers.run(|| ());
                let (told, heard) = mpsc::channel();
                SECOND.lock().unwrap().push(heard);
                thread::spawn(move || {
                    let refused = matches!(block_on(second), Err(WorkError::NoThread(_)));
                    told.send(refused).unwrap();
                });
            }
            none(workers)
        }
        let workers = Workers::new(4, refuse);
        let first = block_on(workers.run(|| ()));
        assert!(matches!(first, Err(WorkError::NoThread(_))), "{first:?}");
        let second = SECOND.lock().unwrap().pop().unwrap();
        assert!(second.recv().unwrap());
        assert_eq!(workers.state().threads, 0);
    }
}
