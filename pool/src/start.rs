//! Start and stop of a pool. A generation lasts from a start until its stop is complete. A pool may
//! have many generations, one after the other, each with its own actor and mailbox; no state of one
//! generation affects the next.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::actor::{Actor, Home, Message};
use crate::backend::Backend;
use crate::config::Refill;
use crate::deadline;
use crate::error::{BootFailure, ProfileStart, Replenished, StartError, StartFailure, StartReport};
use crate::event::EventKind;
use crate::ledger::{Event, Phase, ProfileId};
use crate::pool::Pool;
use crate::shared::Shared;

impl<B: Backend> Pool<B> {
    /// Prepares and boots all profiles in parallel, then serves callers. Missing VMs are reported
    /// and, with automatic refill, booted later. A stopped pool can be started again.
    ///
    /// # Errors
    /// If a profile has no VM at all; all VMs made are then destroyed. A host that is short of
    /// memory is one cause ([`BootFailure::MemoryPressure`]): start again when it has recovered.
    ///
    /// # Cancel safety
    /// Dropping the future stops the pool in the background and destroys everything made.
    pub async fn start(&self) -> Result<StartReport, StartError> {
        let shared = self.shared();
        let home = self.begin_life()?;
        let unfinished = Unfinished {
            shared,
            home: &home,
        };
        let profiles = (0..shared.profiles.len()).map(ProfileId);
        let mut report = StartReport {
            profiles: join_all(profiles.map(|id| self.start_profile(&home, id))).await,
        };
        let lacking = {
            let mut state = shared.state();
            if !state.is_starting(&home) {
                return Err(StartError::Stopping);
            }
            for (index, profile) in report.profiles.iter_mut().enumerate() {
                profile.booted = state.ledger.counts(ProfileId(index)).parked();
            }
            let lacking = report.profiles.iter().any(ProfileStart::is_lacking);
            if !lacking {
                state.tell(Instant::now(), Event::Run);
            }
            lacking
        };
        if lacking {
            drop(unfinished);
            shared.life_over(&home).await;
            return Err(StartError::NoVm(report));
        }
        unfinished.complete();
        shared.nudge.wake();
        shared.emit(None, None, EventKind::Started);
        Ok(report)
    }

    fn begin_life(&self) -> Result<Home<B>, StartError> {
        let shared = self.shared();
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| StartError::NoRuntime)?;
        let mut state = shared.state();
        match state.ledger.phase() {
            Phase::Starting | Phase::Running => return Err(StartError::Running),
            Phase::Stopping => return Err(StartError::Stopping),
            Phase::Stopped if state.inbox.is_some() => return Err(StartError::Stopping),
            Phase::Stopped => {}
        }
        let (home, inbox) = mpsc::unbounded_channel();
        state.inbox = Some(home.clone());
        state.tell(Instant::now(), Event::Start);
        drop(state);
        runtime.spawn(Actor::new(Arc::clone(shared), home.clone()).run(inbox));
        Ok(home)
    }

    async fn start_profile(&self, home: &Home<B>, id: ProfileId) -> ProfileStart {
        let shared = self.shared();
        let mut start = ProfileStart {
            profile: shared.profile_name(id),
            wanted: 0,
            booted: 0,
            failures: Vec::new(),
        };
        let (reply, prepared) = oneshot::channel();
        // A failed send drops `reply`, which ends the wait for the answer.
        let _ = home.send(Message::Prepare(id, reply));
        let prepared = prepared.await.unwrap_or(Err(BootFailure::Stopping));
        if let Err(why) = prepared {
            start.failures.push(StartFailure { vm: None, why });
            return start;
        }
        if shared.config.refill == Refill::Manual {
            return start;
        }
        start.wanted = shared.state().ledger.counts(id).wanted();
        let steps = (0..start.wanted).map(|_| self.replenish_with(home, id));
        for step in join_all(steps).await {
            if let Replenished::Failed(why) = step.did {
                let vm = step.failed;
                start.failures.push(StartFailure { vm, why });
            }
        }
        start
    }

    /// Stops the pool with the configured deadline; see [`stop_within`](Self::stop_within).
    pub async fn stop(&self) {
        self.stop_within(Duration::from_millis(self.config().stop_deadline_ms))
            .await;
    }

    /// Cancels preparations, boots and checks, refuses waiting callers, destroys every parked VM,
    /// waits up to `patience` for leases, ends the VMs of those that are still out, and resolves
    /// when nothing is left. Calling it again changes only the deadline: the earliest one counts.
    /// Cancelling the future does not cancel the stop.
    ///
    /// It may be called on another runtime than [`start`](Self::start). If the runtime of the start
    /// does not run any more (no step within twice [`LOOP_SILENCE`](crate::policy::LOOP_SILENCE)),
    /// VMs are dropped from here instead. Outside of every runtime there is no clock: the runtime
    /// of the start must then run.
    pub async fn stop_within(&self, patience: Duration) {
        let shared = self.shared();
        let by = deadline::after(Instant::now(), patience);
        let life = shared.state().inbox.clone();
        if let Some(home) = life {
            shared.begin_stop(&home, by);
            shared.life_over(&home).await;
        }
        shared.see_home(by).await;
    }
}

/// Drop guard of a start: unless completed, it stops the generation that it has started, and no
/// other.
struct Unfinished<'a, B: Backend> {
    shared: &'a Arc<Shared<B>>,
    home: &'a Home<B>,
}

impl<B: Backend> Unfinished<'_, B> {
    fn complete(self) {
        std::mem::forget(self);
    }
}

impl<B: Backend> Drop for Unfinished<'_, B> {
    fn drop(&mut self) {
        self.shared.begin_stop(self.home, Instant::now());
    }
}
