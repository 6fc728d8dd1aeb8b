//! Acquiring leases: one at once, several at once, or by waiting in a queue.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use tracing::field::{Empty, display};
use tracing::{Instrument, Span};

use crate::backend::Backend;
use crate::deadline;
use crate::error::{AcquireError, Ineligible};
use crate::event::EventKind;
use crate::lease::Lease;
use crate::ledger::{Event, ProfileId, Refusal, WaiterId};
use crate::pool::Pool;
use crate::profile::Request;
use crate::shared::{Kept, Shared, State, Waiter};

impl<B: Backend> Pool<B> {
    /// Returns a lease on a ready VM at once. Never waits for a boot or for the pool's tasks: it
    /// holds a lock for a moment, moves ownership of the VM and signals its resume.
    ///
    /// # Errors
    /// [`AcquireError::Exhausted`] if none is ready; [`AcquireError::NotEligible`] if no profile
    /// serves the request; the other variants as documented there.
    pub fn acquire(&self, request: impl Into<Request>) -> Result<Lease<B>, AcquireError> {
        let now = Instant::now();
        let shared = self.shared();
        let among = shared.matching(&request.into())?;
        let span = shared.acquire_span(&among);
        let _entered = span.enter();
        let taken = shared.take(&mut shared.state(), now, &among);
        shared.nudge.wake();
        let lease = taken.map_err(|refusal| shared.missed(among.first, refusal))?;
        let lease = lease.hand_off();
        span.record("vm", display(lease.id()));
        shared.leased(&lease, |kept| {
            kept.metrics.acquire.record(now.elapsed());
        });
        Ok(lease)
    }

    /// Returns leases on `count` ready VMs of one profile at once, or none.
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire); `Exhausted` if fewer are ready.
    pub fn acquire_many(
        &self,
        request: impl Into<Request>,
        count: usize,
    ) -> Result<Vec<Lease<B>>, AcquireError> {
        let now = Instant::now();
        let shared = self.shared();
        let among = shared.matching(&request.into())?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let span = shared.acquire_span(&among);
        let _entered = span.enter();
        let taken = shared.take_many(&mut shared.state(), now, &among, count);
        shared.nudge.wake();
        let leases = taken.map_err(|refusal| shared.missed(among.first, refusal))?;
        let leases: Vec<_> = leases.into_iter().map(Lease::hand_off).collect();
        if !span.is_disabled() {
            let ids: Vec<_> = leases.iter().map(|lease| lease.id().to_string()).collect();
            span.record("vm", ids.join(" "));
        }
        for lease in &leases {
            tracing::debug!(vm = %lease.id(), "one of a burst");
            shared.leased(lease, |kept| {
                kept.metrics.acquire.record(now.elapsed());
            });
        }
        Ok(leases)
    }

    /// Returns a lease on a ready VM, or on the first that becomes ready within `patience`. Callers
    /// are served in the order in which they came, before the pool refills.
    ///
    /// # Errors
    /// [`AcquireError::Timeout`] with the reason; others as for [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    /// The future may be dropped at any await point: a VM that was assigned to it is parked again.
    pub async fn acquire_timeout(
        &self,
        request: impl Into<Request>,
        patience: Duration,
    ) -> Result<Lease<B>, AcquireError> {
        let began = Instant::now();
        let shared = self.shared();
        let among = shared.matching(&request.into())?;
        let until = deadline::after(began, patience);
        let span = shared.acquire_span(&among);
        let lease = shared
            .wait(&among, began, until)
            .instrument(span.clone())
            .await?;
        span.record("vm", display(lease.id()));
        shared.leased(&lease, |kept| {
            kept.metrics.wait.record(began.elapsed());
        });
        Ok(lease)
    }
}

/// The profiles that serve a request, in the order of the configuration.
struct Among {
    first: ProfileId,
    others: Vec<ProfileId>,
}

impl Among {
    fn all(&self) -> impl Iterator<Item = ProfileId> + '_ {
        std::iter::once(self.first).chain(self.others.iter().copied())
    }
}

impl<B: Backend> Shared<B> {
    /// Makes the span of an acquire call. Its `vm` field is recorded once a VM is assigned.
    fn acquire_span(&self, among: &Among) -> Span {
        let name = self.profile(among.first).map(|kept| &*kept.name);
        // The name is left out if several profiles match: the VM's number tells which one served.
        let name = name.filter(|_| among.others.is_empty());
        tracing::debug_span!("acquire", profile = name, vm = Empty)
    }

    /// Emits the event and records the metrics of a lease that a caller received.
    fn leased(&self, lease: &Lease<B>, measure: impl FnOnce(&Kept)) {
        let profile = lease.profile_id();
        self.emit(Some(profile), Some(lease.id()), EventKind::Leased);
        if let Some(kept) = self.profile(profile) {
            kept.metrics.hits.increment(1);
            measure(kept);
        }
    }

    fn matching(&self, request: &Request) -> Result<Among, AcquireError> {
        let mut refused = Vec::new();
        let mut known = false;
        let mut among: Option<Among> = None;
        for (index, kept) in self.profiles.iter().enumerate() {
            // `Kept::name`, not the name in `spec`: after an idle time, each page that a hand-off
            // touches for the first time costs it 0.2 us.
            if request.named().is_some_and(|name| name != &*kept.name) {
                continue;
            }
            known = true;
            let mismatches = request.mismatches(&kept.spec);
            if mismatches.is_empty() {
                let id = ProfileId(index);
                match &mut among {
                    Some(among) => among.others.push(id),
                    None => {
                        let others = Vec::new();
                        among = Some(Among { first: id, others });
                    }
                }
                continue;
            }
            refused.push(Ineligible {
                profile: kept.spec.name.clone(),
                mismatches,
            });
        }
        if let Some(among) = among {
            return Ok(among);
        }
        match request.named() {
            Some(name) if !known => Err(AcquireError::UnknownProfile {
                name: name.to_owned(),
                known: self.names(),
            }),
            _ => Err(AcquireError::NotEligible(refused)),
        }
    }

    fn take(
        self: &Arc<Self>,
        state: &mut State<B>,
        now: Instant,
        among: &Among,
    ) -> Result<Lease<B>, Refusal> {
        let has = |profile: &ProfileId| {
            // Each iteration but the last retires a dead VM.
            while let Ok(id) = state.ledger.peek(now, *profile) {
                if state.is_alive(&self.backend, id) {
                    return true;
                }
                self.ended(state, now, id);
            }
            false
        };
        let profile = among.all().find(has).unwrap_or(among.first);
        let id = state.ledger.take(now, profile)?;
        self.lease(state, profile, id).ok_or(Refusal::Stopping)
    }

    fn take_many(
        self: &Arc<Self>,
        state: &mut State<B>,
        now: Instant,
        among: &Among,
        count: usize,
    ) -> Result<Vec<Lease<B>>, Refusal> {
        let has = |profile: &ProfileId| {
            let parked: Vec<_> = state.ledger.parked(*profile).collect();
            for id in parked {
                if !state.is_alive(&self.backend, id) {
                    self.ended(state, now, id);
                }
            }
            state.ledger.has(now, *profile, count)
        };
        let profile = among.all().find(has).unwrap_or(among.first);
        let taken = state.ledger.take_many(now, profile, count)?;
        Ok(taken
            .into_iter()
            .filter_map(|id| self.lease(state, profile, id))
            .collect())
    }

    fn lease(
        self: &Arc<Self>,
        state: &mut State<B>,
        profile: ProfileId,
        id: crate::slot::VmId,
    ) -> Option<Lease<B>> {
        let home = state.inbox.clone()?;
        let vm = state.take_out(id)?;
        Some(Lease::untouched(Arc::clone(self), home, id, profile, vm))
    }

    async fn wait(
        self: &Arc<Self>,
        among: &Among,
        began: Instant,
        until: Instant,
    ) -> Result<Lease<B>, AcquireError> {
        let profile = among.first;
        let (waiter, missed, mut served) = {
            let mut state = self.state();
            let missed = match self.take(&mut state, began, among) {
                Ok(lease) => {
                    drop(state);
                    self.nudge.wake();
                    return Ok(lease.hand_off());
                }
                Err(refusal) if among.all().any(|of| state.ledger.hopeless(of).is_none()) => {
                    refusal.is_miss()
                }
                Err(refusal) => {
                    drop(state);
                    return Err(self.missed(profile, refusal));
                }
            };
            let (reply, served) = oneshot::channel();
            let waiter = state.next_waiter();
            let profiles = among.all().collect();
            state.line_up(began, waiter, Waiter { profiles, reply });
            (
                Waiting {
                    shared: self,
                    waiter,
                },
                missed,
                served,
            )
        };
        self.nudge.wake();
        if missed && let Some(kept) = self.profile(profile) {
            kept.metrics.misses.increment(1);
        }
        loop {
            let answer = match timeout_at(until, &mut served).await {
                Ok(answer) => answer,
                Err(_) => {
                    let why = self.state().ledger.shortage(Instant::now(), profile);
                    drop(waiter);
                    // A lease that was sent just before the waiter was removed is used despite the
                    // timeout.
                    match served.try_recv() {
                        Ok(Ok(lease)) if lease.is_alive() => return Ok(lease.hand_off()),
                        _ => {
                            let profile = self.profile_name(profile);
                            return Err(AcquireError::Timeout {
                                profile,
                                waited: began.elapsed(),
                                why,
                            });
                        }
                    }
                }
            };
            match answer {
                Ok(Ok(lease)) if lease.is_alive() => return Ok(lease.hand_off()),
                Ok(Ok(dead)) => {
                    // The VM died before it was picked up: wait again, at the old place in the
                    // queue.
                    let (reply, again) = oneshot::channel();
                    served = again;
                    let mut state = self.state();
                    let profiles = among.all().collect();
                    let waiting = Waiter { profiles, reply };
                    state.line_up(Instant::now(), waiter.waiter, waiting);
                    drop(state);
                    drop(dead);
                    self.nudge.wake();
                }
                Ok(Err(refusal)) => return Err(self.refused(profile, refusal)),
                Err(_) => return Err(AcquireError::Stopping),
            }
        }
    }

    fn missed(&self, profile: ProfileId, refusal: Refusal) -> AcquireError {
        if let Some(kept) = self.profile(profile).filter(|_| refusal.is_miss()) {
            kept.metrics.misses.increment(1);
        }
        self.refused(profile, refusal)
    }

    fn refused(&self, profile: ProfileId, refusal: Refusal) -> AcquireError {
        match refusal {
            Refusal::NotStarted => AcquireError::NotStarted,
            Refusal::Stopping => AcquireError::Stopping,
            Refusal::Draining => AcquireError::Draining(self.profile_name(profile)),
            Refusal::Exhausted(why) => AcquireError::Exhausted {
                profile: self.profile_name(profile),
                why,
            },
        }
    }
}

/// Drop guard that takes a waiter out of the queue. If the waiter was served already, the lease is
/// in its channel and is returned to the pool when the channel is dropped.
struct Waiting<'a, B: Backend> {
    shared: &'a Shared<B>,
    waiter: WaiterId,
}

impl<B: Backend> Drop for Waiting<'_, B> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        if let Some(reply) = state.waiters.remove(&self.waiter) {
            state.tell(Instant::now(), Event::Leave(self.waiter));
            drop(state);
            self.shared.nudge.wake();
            drop(reply);
        }
    }
}
