//! [`Pool`], the public handle of a pool.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, timeout};

use crate::actor::{Attempt, CheckReport, Home, Message};
use crate::backend::Backend;
use crate::config::{ConfigError, PoolConfig};
use crate::error::{
    BootFailure, NotReady, OfferError, OfferRefusal, Replenished, ResizeError, UnknownProfile,
};
use crate::event::{EventKind, PoolEvent};
use crate::host::{Host, ThisHost};
use crate::ledger::{Event, PassId, Phase, ProfileId, TicketId};
use crate::permit::Usage;
use crate::shared::Shared;
use crate::slot::VmId;
use crate::status::{PoolStatus, ProfileStatus};

/// Keeps VMs warm, checks them and hands them out. Cheap to clone; clones are the same pool.
///
/// Dropping the last clone stops the pool in the background.
pub struct Pool<B: Backend> {
    owner: Arc<Owner<B>>,
}

impl<B: Backend> Clone for Pool<B> {
    fn clone(&self) -> Self {
        Self {
            owner: Arc::clone(&self.owner),
        }
    }
}

impl<B: Backend> fmt::Debug for Pool<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Does not take the pool's lock: the caller may hold a lock that the pool waits for.
        f.debug_struct("Pool")
            .field("profiles", &self.shared().names())
            .finish_non_exhaustive()
    }
}

struct Owner<B: Backend>(Arc<Shared<B>>);

impl<B: Backend> Drop for Owner<B> {
    fn drop(&mut self) {
        let by = Instant::now() + Duration::from_millis(self.0.config.stop_deadline_ms);
        let life = self.0.state().inbox.clone();
        if let Some(home) = life {
            self.0.begin_stop(&home, by);
        }
    }
}

impl<B: Backend> Pool<B> {
    /// Creates a pool on this host. It is not started yet.
    ///
    /// # Errors
    /// Every problem of the configuration, including pools that do not fit into the limits, and
    /// settings that contradict those of the backend.
    pub fn new(backend: B, config: PoolConfig) -> Result<Self, ConfigError> {
        Self::with_host(backend, config, ThisHost)
    }

    /// Like [`new`](Self::new), with another source of the host's memory figures.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_host(backend: B, config: PoolConfig, host: impl Host) -> Result<Self, ConfigError> {
        let shared = Shared::new(backend, config, Box::new(host))?;
        Ok(Self {
            owner: Arc::new(Owner(shared)),
        })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared<B>> {
        &self.owner.0
    }

    /// The backend.
    #[must_use]
    pub fn backend(&self) -> &B {
        &self.shared().backend
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.shared().config
    }

    /// Makes at most one VM, if the profile has room, as the refill loop does. Resolves when that
    /// is done, or when the profile has been filled otherwise. It does not wait for the backoff
    /// after a failure. While the breaker is open, no boot is tried; while the host is short of
    /// memory, only boots for waiting callers are
    /// ([`BootFailure::MemoryPressure`](crate::BootFailure::MemoryPressure)).
    ///
    /// # Errors
    /// If there is no such profile. A boot that fails is a value, not an error.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the boot; its VM, if there is one already, is destroyed.
    pub async fn replenish(&self, profile: &str) -> Result<Replenished, UnknownProfile> {
        let profile = self.find(profile)?;
        let home = self.shared().state().inbox.clone();
        match home {
            Some(home) => Ok(self.replenish_with(&home, profile).await.did),
            None => Ok(Replenished::Failed(BootFailure::Stopping)),
        }
    }

    pub(crate) async fn replenish_with(&self, home: &Home<B>, profile: ProfileId) -> Attempt {
        let (reply, answer) = oneshot::channel();
        let ticket = self.shared().state().next_ticket();
        let forget = Forget { home, ticket };
        // A failed send drops `reply`, which ends the wait for the answer.
        let _ = home.send(Message::Replenish(profile, ticket, reply));
        let answer = answer.await.unwrap_or_else(|_| Attempt::stopping());
        forget.complete();
        answer
    }

    /// Adopts a VM made elsewhere, after a check.
    ///
    /// # Errors
    /// Why the VM was refused, and the VM itself.
    ///
    /// # Cancel safety
    /// Dropping the future destroys the VM, unless it was adopted already.
    pub async fn offer(&self, profile: &str, vm: B::Vm) -> Result<VmId, OfferError<B::Vm>> {
        let Ok(id) = self.find(profile) else {
            let why = OfferRefusal::UnknownProfile(profile.to_owned());
            return Err(OfferError { vm: Some(vm), why });
        };
        let Some((home, ticket)) = self.ticket() else {
            return Err(OfferError {
                vm: Some(vm),
                why: OfferRefusal::Stopping,
            });
        };
        let (reply, answer) = oneshot::channel();
        let forget = Forget {
            home: &home,
            ticket,
        };
        if let Err(mpsc::error::SendError(Message::Offer(_, _, vm, _))) =
            home.send(Message::Offer(id, ticket, vm, reply))
        {
            return Err(OfferError {
                vm: Some(vm),
                why: OfferRefusal::Stopping,
            });
        }
        let stopping = || {
            Err(OfferError {
                vm: None,
                why: OfferRefusal::Stopping,
            })
        };
        let answer = answer.await.unwrap_or_else(|_| stopping());
        forget.complete();
        answer
    }

    /// Checks at most `most` parked VMs of a profile in parallel, those checked longest ago first.
    /// The pool checks all of them periodically by itself; a call does it now.
    ///
    /// # Errors
    /// If there is no such profile.
    ///
    /// # Cancel safety
    /// Dropping the future destroys (and replaces) the VMs whose check was not over.
    pub async fn check(&self, profile: &str, most: usize) -> Result<CheckReport, UnknownProfile> {
        let profile = self.find(profile)?;
        let (home, pass) = {
            let mut state = self.shared().state();
            let Some(home) = state.inbox.clone() else {
                return Ok(CheckReport::default());
            };
            (home, state.next_pass())
        };
        let (reply, answer) = oneshot::channel();
        let abandon = Abandon { home: &home, pass };
        // A failed send drops `reply`, which ends the wait for the answer.
        let _ = home.send(Message::Check(profile, most, pass, reply));
        let report = answer.await.unwrap_or_default();
        abandon.complete();
        Ok(report)
    }

    /// A consistent snapshot of all numbers.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        let shared = self.shared();
        let state = shared.state();
        let profiles = shared.profiles.iter().enumerate();
        PoolStatus {
            phase: state.ledger.phase(),
            leased: state.ledger.leased(),
            limits: shared.admission.limits(),
            usage: shared.admission.usage(),
            memory_pressure: state.pressed,
            profiles: profiles
                .map(|(index, kept)| ProfileStatus {
                    name: kept.spec.name.clone(),
                    counts: state.ledger.counts(ProfileId(index)),
                    last_failure: state.last_failure.get(index).cloned().flatten(),
                    no_template: state.no_template.get(index).cloned().flatten(),
                })
                .collect(),
        }
    }

    /// Subscribes to all events from now on. A subscriber that falls far behind loses the oldest
    /// events.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<PoolEvent> {
        self.shared().events.subscribe()
    }

    /// Changes how many VMs are kept warm. Shrinking cancels boots first, then destroys the VMs
    /// that were checked longest ago; leased VMs are not affected.
    ///
    /// # Errors
    /// If there is no such profile, or all profiles at their full size would exceed the limits.
    pub fn resize(&self, profile: &str, size: usize) -> Result<(), ResizeError> {
        let id = self.find(profile)?;
        let shared = self.shared();
        let mut state = shared.state();
        let size_of = |other: ProfileId| {
            let size = if other == id {
                size
            } else {
                state.ledger.counts(other).size
            };
            let kept = shared.profile(other)?;
            Some((kept.most(size), kept.demand))
        };
        let all = (0..shared.profiles.len()).filter_map(|index| size_of(ProfileId(index)));
        let full = all.fold(Usage::default(), |sum, (size, each)| sum.plus(size, each));
        let limits = shared.admission.limits();
        limits.admit(full).map_err(ResizeError::TooLarge)?;
        state.note(Instant::now(), Event::Resize(id, size));
        shared.emit_in(&mut state, Some(id), None, EventKind::Resized(size));
        drop(state);
        shared.nudge.wake();
        Ok(())
    }

    /// Empties a profile for maintenance: no new leases, no boots, parked VMs destroyed. Waits up
    /// to `patience` for leases to be returned and returns how many are still out. The profile
    /// stays empty until [`undrain`](Self::undrain).
    ///
    /// # Errors
    /// If there is no such profile.
    pub async fn drain(&self, profile: &str, patience: Duration) -> Result<usize, UnknownProfile> {
        let id = self.find(profile)?;
        self.tell(Event::Drain(id));
        let shared = self.shared();
        let empty = shared.wait_for(|state| state.ledger.is_vacant(id).then_some(()));
        if timeout(patience, empty).await.is_ok() {
            return Ok(0);
        }
        Ok(shared.state().ledger.counts(id).leased)
    }

    /// Ends [`drain`](Self::drain): the profile fills and serves again.
    ///
    /// # Errors
    /// If there is no such profile.
    pub fn undrain(&self, profile: &str) -> Result<(), UnknownProfile> {
        let id = self.find(profile)?;
        self.tell(Event::Undrain(id));
        Ok(())
    }

    /// Resolves when every profile holds as many VMs as it should.
    ///
    /// # Errors
    /// If that does not happen within `patience`, or the pool does not run.
    pub async fn wait_ready(&self, patience: Duration) -> Result<(), NotReady> {
        let ready = self.shared().wait_for(|state| match state.ledger.phase() {
            Phase::Stopping | Phase::Stopped => Some(Err(NotReady::NotRunning)),
            Phase::Running if state.ledger.is_full() => Some(Ok(())),
            Phase::Running | Phase::Starting => None,
        });
        timeout(patience, ready)
            .await
            .unwrap_or(Err(NotReady::Timeout(patience)))
    }

    fn find(&self, name: &str) -> Result<ProfileId, UnknownProfile> {
        let shared = self.shared();
        shared.find(name).ok_or_else(|| UnknownProfile {
            name: name.to_owned(),
            known: shared.names(),
        })
    }

    fn tell(&self, event: Event) {
        self.shared().state().note(Instant::now(), event);
        self.shared().nudge.wake();
    }

    fn ticket(&self) -> Option<(Home<B>, TicketId)> {
        let mut state = self.shared().state();
        let home = state.inbox.clone()?;
        Some((home, state.next_ticket()))
    }
}

/// Drop guard that cancels the request of a caller whose future was dropped.
struct Forget<'a, B: Backend> {
    home: &'a Home<B>,
    ticket: TicketId,
}

impl<B: Backend> Forget<'_, B> {
    fn complete(self) {
        std::mem::forget(self);
    }
}

impl<B: Backend> Drop for Forget<'_, B> {
    fn drop(&mut self) {
        // If the actor has ended, there is nothing to cancel.
        let _ = self.home.send(Message::Forget(self.ticket));
    }
}

/// Drop guard that abandons the health-check round of a caller whose future was dropped.
struct Abandon<'a, B: Backend> {
    home: &'a Home<B>,
    pass: PassId,
}

impl<B: Backend> Abandon<'_, B> {
    fn complete(self) {
        std::mem::forget(self);
    }
}

impl<B: Backend> Drop for Abandon<'_, B> {
    fn drop(&mut self) {
        // If the actor has ended, so have the checks.
        let _ = self.home.send(Message::AbandonPass(self.pass));
    }
}
