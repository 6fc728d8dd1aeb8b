//! The command's event loop. Either all its threads are started before anything else, or it is an
//! error: tokio panics where it cannot start one later.

use std::fs::File;
use std::io;
use std::panic;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use hearth_pool::thread_limit;
use rustix::process::{Resource, Signal, getrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

/// Threads for blocking work: one each for stdin, stdout and stderr, and one for all else.
const BLOCKING: usize = 4;
/// File descriptors that the event loop opens, signals included: tokio panics where it cannot.
const DESCRIPTORS: usize = 8;
/// Stack of each thread, in bytes of address space.
const STACK: usize = 2 << 20;
/// Address space in bytes that must be left beside the stacks.
const SPARE: usize = 8 << 20;
/// How long all threads together may take to start: an instant, unless other processes took the
/// last places under the limit.
const DEADLINE: Duration = Duration::from_secs(5);
/// Keep-alive time of idle threads: longer than any command runs.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Why there is no event loop.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    /// A limit on threads was reached.
    #[error(
        "this process needs {needed} more threads and cannot start them: {}",
        advice(*needed)
    )]
    Threads { needed: usize, source: io::Error },
    /// Something else was missing, such as file descriptors.
    #[error("cannot start the event loop: check ulimit -n")]
    Start(#[source] io::Error),
}

fn advice(needed: usize) -> String {
    match thread_limit().filter(|limit| limit.left < needed as u64) {
        Some(limit) => format!("{} leaves {}; raise it", limit.name, limit.left),
        None => "check ulimit -v, ulimit -u and pids.max of the cgroup".to_owned(),
    }
}

/// Starts an event loop on the calling thread.
pub(crate) fn on_this_thread() -> Result<Runtime, RuntimeError> {
    start(Builder::new_current_thread(), 0)
}

/// Starts an event loop with a thread for each processor.
pub(crate) fn on_all_processors() -> Result<Runtime, RuntimeError> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(workers);
    start(builder, workers)
}

/// Makes a write beyond `ulimit -f` an error. By default SIGXFSZ ends the process; programs that
/// this one starts get that default back.
pub(crate) fn outlive_the_file_limit() -> Result<(), RuntimeError> {
    if getrlimit(Resource::Fsize).current.is_none() {
        return Ok(());
    }
    can_open(DESCRIPTORS).map_err(RuntimeError::Start)?;
    let mut builder = Builder::new_current_thread();
    let runtime = builder.enable_io().build().map_err(RuntimeError::Start)?;
    let _inside = runtime.enter();
    // The handler stays installed when the `Signal` is dropped.
    let caught = signal(SignalKind::from_raw(Signal::XFSZ.as_raw()));
    caught.map(drop).map_err(RuntimeError::Start)
}

fn start(builder: Builder, workers: usize) -> Result<Runtime, RuntimeError> {
    can_open(DESCRIPTORS).map_err(RuntimeError::Start)?;
    let needed = workers + BLOCKING;
    // A thread that has no memory to start with panics too: one error says what is wrong.
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let started = start_all(builder, needed);
    panic::set_hook(hook);
    started.map_err(|source| RuntimeError::Threads { needed, source })?
}

fn start_all(mut builder: Builder, needed: usize) -> io::Result<Result<Runtime, RuntimeError>> {
    can_start(needed + 1)?;
    builder
        .enable_all()
        .max_blocking_threads(BLOCKING)
        .thread_stack_size(STACK)
        .thread_keep_alive(FOR_EVER);
    // Other processes may have taken the places since. Then tokio panics, or waits for a thread
    // that never starts.
    let built = apart(DEADLINE, move || build(&mut builder))?;
    Ok(built.map_err(RuntimeError::Start))
}

/// Builds the runtime and starts all its threads.
fn build(builder: &mut Builder) -> io::Result<Runtime> {
    let runtime = builder.build()?;
    // Blocking threads start on demand: one job for each at the same time starts them all.
    let all = Arc::new(Barrier::new(BLOCKING + 1));
    for _ in 0..BLOCKING {
        let all = all.clone();
        drop(runtime.handle().spawn_blocking(move || all.wait()));
    }
    all.wait();
    Ok(runtime)
}

/// Runs `work` on a separate thread. A panic of that thread is an error, and so is taking longer
/// than `limit`: then the thread is left running.
fn apart<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, result) = mpsc::sync_channel(1);
    let work = move || {
        let _ = done.send(work());
    };
    thread::Builder::new().stack_size(STACK).spawn(work)?;
    result.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => io::ErrorKind::TimedOut.into(),
        RecvTimeoutError::Disconnected => io::ErrorKind::WouldBlock.into(),
    })
}

/// Opens this many descriptors at once and closes them.
fn can_open(descriptors: usize) -> io::Result<()> {
    (0..descriptors)
        .map(|_| File::open("/"))
        .collect::<io::Result<Vec<_>>>()
        .map(drop)
}

/// Starts this many threads at once and ends them. First checks for the address space of their
/// stacks: a thread that has none left for its first allocation ends the process.
fn can_start(threads: usize) -> io::Result<()> {
    let mut addresses = Vec::<u8>::new();
    addresses.try_reserve_exact(threads * STACK + SPARE)?;
    // Otherwise the compiler may remove the unused allocation.
    std::hint::black_box(&mut addresses);
    drop(addresses);
    let mut waiting = Vec::with_capacity(threads);
    for _ in 0..threads {
        let (end, ended) = mpsc::channel::<()>();
        let thread = thread::Builder::new().stack_size(STACK).spawn(move || {
            let _ = ended.recv();
        })?;
        waiting.push((end, thread));
    }
    for (end, thread) in waiting {
        drop(end);
        thread.join().map_err(|_| io::ErrorKind::WouldBlock)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rustix::thread::gettid;

    use super::*;

    #[test]
    fn a_thread_that_waits_for_ever_or_panics_is_an_error() {
        let waits = apart(Duration::from_millis(10), || Barrier::new(2).wait());
        assert_eq!(waits.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let panics = apart::<()>(DEADLINE, || panic!("no thread"));
        assert_eq!(panics.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(apart(DEADLINE, || 1).unwrap(), 1);
    }

    #[test]
    fn what_blocks_finds_its_threads_started() {
        // Compares ids: other tests start and end threads of this process meanwhile.
        let entries = || std::fs::read_dir("/proc/self/task").unwrap();
        let runtime = on_this_thread().unwrap();
        let before: BTreeSet<_> = entries()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let all = Arc::new(Barrier::new(BLOCKING));
        let jobs: Vec<_> = (0..BLOCKING)
            .map(|_| {
                let all = all.clone();
                runtime.handle().spawn_blocking(move || {
                    all.wait();
                    gettid().as_raw_nonzero().to_string()
                })
            })
            .collect();
        let of_jobs: BTreeSet<_> = jobs
            .into_iter()
            .map(|job| runtime.block_on(job).unwrap())
            .collect();
        assert_eq!(of_jobs.len(), BLOCKING);
        assert!(of_jobs.is_subset(&before), "{of_jobs:?}, {before:?}");
    }
}
