//! The command's event loop. All its threads are started before anything else, or none is: tokio panics
//! where it cannot start one later.

use std::fs::File;
use std::io;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::Duration;

use hearth_pool::thread_limit;
use tokio::runtime::{Builder, Runtime};

/// Threads for what blocks: stdin, stdout, stderr, and one for all else.
const BLOCKING: usize = 4;
/// What the event loop opens, signals included: tokio panics where it cannot.
const DESCRIPTORS: usize = 8;
/// Stack of a thread that only waits.
const SMALL_STACK: usize = 64 << 10;
/// Longer than any command runs.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Why there is no event loop.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuntimeError {
    /// A limit on threads.
    #[error(
        "this process needs {needed} more threads and cannot start them: {}",
        advice()
    )]
    Threads { needed: usize, source: io::Error },
    /// Something else, such as file descriptors.
    #[error("cannot start the event loop: check ulimit -n")]
    Start(#[source] io::Error),
}

fn advice() -> String {
    match thread_limit() {
        Some(limit) => format!("{} leaves {}; raise it", limit.name, limit.left),
        None => "check ulimit -u and pids.max of the cgroup".to_owned(),
    }
}

/// An event loop on the calling thread.
pub(crate) fn on_this_thread() -> Result<Runtime, RuntimeError> {
    start(Builder::new_current_thread(), 0)
}

/// An event loop with a thread for each processor.
pub(crate) fn on_all_processors() -> Result<Runtime, RuntimeError> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(workers);
    start(builder, workers)
}

fn start(mut builder: Builder, workers: usize) -> Result<Runtime, RuntimeError> {
    can_open(DESCRIPTORS).map_err(RuntimeError::Start)?;
    let needed = workers + BLOCKING;
    can_start(needed).map_err(|source| RuntimeError::Threads { needed, source })?;
    let runtime = builder
        .enable_all()
        .max_blocking_threads(BLOCKING)
        .thread_keep_alive(FOR_EVER)
        .build()
        .map_err(RuntimeError::Start)?;
    // Those for what blocks are started by work for each at the same time.
    let all = Arc::new(Barrier::new(BLOCKING + 1));
    for _ in 0..BLOCKING {
        let all = all.clone();
        drop(runtime.handle().spawn_blocking(move || all.wait()));
    }
    all.wait();
    Ok(runtime)
}

/// Opens so many descriptors at once and closes them.
fn can_open(descriptors: usize) -> io::Result<()> {
    (0..descriptors)
        .map(|_| File::open("/"))
        .collect::<io::Result<Vec<_>>>()
        .map(drop)
}

/// Starts so many threads at once and ends them.
fn can_start(threads: usize) -> io::Result<()> {
    let mut waiting = Vec::with_capacity(threads);
    for _ in 0..threads {
        let (end, ended) = mpsc::channel::<()>();
        let thread = thread::Builder::new()
            .stack_size(SMALL_STACK)
            .spawn(move || {
                let _ = ended.recv();
            })?;
        waiting.push((end, thread));
    }
    for (end, thread) in waiting {
        drop(end);
        let _ = thread.join();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_blocks_finds_its_threads_started() {
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let runtime = on_this_thread().unwrap();
        let before = threads();
        let all = Arc::new(Barrier::new(BLOCKING + 1));
        for _ in 0..BLOCKING {
            let all = all.clone();
            runtime.handle().spawn_blocking(move || all.wait());
        }
        all.wait();
        assert_eq!(threads(), before);
    }
}
