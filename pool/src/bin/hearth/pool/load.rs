//! Tasks that acquire guests and run a program in each, and counts of the results.

use std::ffi::OsString;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hearth_agent::client::OutputLimits;
use hearth_pool::kvm::{Guest, GuestError, KvmBackend};
use hearth_pool::{AcquireError, Pool};
use tokio::task::JoinSet;

use super::latency::Latencies;
use crate::failure::chain;

/// How long a task waits for a guest.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause after a failure, so that a task does not fail a thousand times in a second.
const PAUSE: Duration = Duration::from_millis(100);
/// Limits for a program's output, which is discarded.
const OUTPUT: OutputLimits = OutputLimits {
    stdout_bytes: 0,
    stderr_bytes: 0,
};

/// The work that each task repeats.
pub(super) struct Load {
    profile: String,
    argv: Vec<OsString>,
    tally: Mutex<Tally>,
}

/// The results of all tasks so far.
#[derive(Clone, Default)]
pub(super) struct Tally {
    /// Guests that were ready when a task asked.
    pub(super) hits: u64,
    /// Times that no guest was ready and the task waited.
    pub(super) misses: u64,
    /// Programs that ran to exit code 0.
    pub(super) runs: u64,
    pub(super) failures: u64,
    /// The error of the last failure.
    pub(super) last_failure: Option<String>,
    /// Times from asking for a guest to having it.
    pub(super) acquire: Latencies,
    /// Times from the request to the program's end.
    pub(super) run: Latencies,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no guest")]
    Acquire(#[from] AcquireError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("the program ended with {0}")]
    Status(hearth_agent::ExitStatus),
}

impl Load {
    pub(super) fn new(profile: String, argv: &[OsString]) -> Self {
        let argv = match argv {
            [] => vec!["true".into()],
            argv => argv.to_vec(),
        };
        Self {
            profile,
            argv,
            tally: Mutex::default(),
        }
    }

    /// Starts this many tasks, which end when the set is dropped.
    pub(super) fn start(self: &Arc<Self>, pool: &Pool<KvmBackend>, tasks: usize) -> JoinSet<()> {
        let mut set = JoinSet::new();
        for _ in 0..tasks {
            let (load, pool) = (Arc::clone(self), pool.clone());
            set.spawn(async move { load.work(&pool).await });
        }
        set
    }

    pub(super) fn tally(&self) -> Tally {
        self.tallying(|tally| tally.clone())
    }

    async fn work(&self, pool: &Pool<KvmBackend>) {
        loop {
            if let Err(failure) = self.once(pool).await {
                self.tallying(|tally| {
                    tally.failures += 1;
                    tally.last_failure = Some(chain(&failure));
                });
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    async fn once(&self, pool: &Pool<KvmBackend>) -> Result<(), Failure> {
        let begin = Instant::now();
        let lease = match pool.acquire(self.profile.as_str()) {
            Ok(lease) => {
                self.tallying(|tally| tally.hits += 1);
                lease
            }
            Err(AcquireError::Exhausted { .. }) => {
                self.tallying(|tally| tally.misses += 1);
                let profile = self.profile.as_str();
                pool.acquire_timeout(profile, PATIENCE).await?
            }
            Err(error) => return Err(error.into()),
        };
        self.tallying(|tally| tally.acquire.add(begin.elapsed()));
        let begin = Instant::now();
        let ran = self.run(&lease).await;
        let took = begin.elapsed();
        lease.release().await;
        ran?;
        self.tallying(|tally| {
            tally.runs += 1;
            tally.run.add(took);
        });
        Ok(())
    }

    async fn run(&self, guest: &Guest) -> Result<(), Failure> {
        let Some((program, args)) = self.argv.split_first() else {
            return Ok(());
        };
        let command = guest.command(program).args(args);
        let exec = guest.exec(command).await?;
        let output = exec.output(OUTPUT).await.map_err(GuestError::from)?;
        match output.status.success() {
            true => Ok(()),
            false => Err(Failure::Status(output.status)),
        }
    }

    fn tallying<T>(&self, change: impl FnOnce(&mut Tally) -> T) -> T {
        change(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
