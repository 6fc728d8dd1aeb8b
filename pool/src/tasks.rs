//! Carries out the ledger's actions: one function of the actor for each.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use crate::actor::{Actor, Message, PreparedReply, Verdict};
use crate::backend::{Backend, Making, ProbeError, Remote};
use crate::boot;
use crate::error::{BootFailure, OfferRefusal};
use crate::event::EventKind;
use crate::guard::guarded;
use crate::health;
use crate::lease::{Lease, Released};
use crate::ledger::{Action, Event, Overdue, PassId, ProfileId, Refusal, TicketId, WaiterId};
use crate::profile::Parking;
use crate::shared::State;
use crate::slot::{Slot, VmId};

/// Identifies a VM that is to be destroyed.
#[derive(Clone, Copy)]
pub(crate) enum Doomed {
    /// A VM with a slot.
    Kept(ProfileId, VmId),
    /// An orphan: a VM without a slot. One that was offered and refused may have no number either.
    Stray(Option<VmId>),
}

impl<B: Backend> Actor<B> {
    pub(crate) fn act(&mut self, state: &mut State<B>, now: Instant, action: Action) {
        match action {
            Action::Boot(profile, id) => self.boot(state, now, profile, id),
            Action::Join(profile, id, ticket) => self.join(state, now, profile, id, ticket),
            Action::CancelBoot(id) => {
                if let Some(job) = state.slots.get(&id).and_then(|slot| slot.job.as_ref()) {
                    job.cancel();
                }
            }
            Action::Park(id) => self.park(state, now, id),
            Action::Check(profile, id, check, pass) => {
                self.check(state, now, profile, id, check, pass);
            }
            Action::Serve(profile, waiter, id) => self.serve(state, now, profile, waiter, id),
            Action::Reject(waiter, refusal) => reject(state, waiter, refusal),
            Action::Settle(ticket, outcome) => self.settle(state, ticket, outcome),
            Action::Retire(id) => self.retire(state, now, id),
            Action::Drop(id) => {
                let slot = state.slots.remove(&id);
                self.discard(id, slot);
            }
            Action::Kill(id, why) => self.kill(state, now, id, why),
            Action::AskIdle(id) => ask_idle(state, now, id),
            Action::Resized(profile, size) => {
                self.shared
                    .emit_in(state, Some(profile), None, EventKind::Resized(size));
            }
            Action::Stopped => self.stopped(state),
        }
    }

    /// Lets the backend prepare a profile; cancelled when the start is over.
    pub(crate) fn prepare(&mut self, profile: ProfileId, reply: PreparedReply) {
        let (shared, home) = (Arc::clone(&self.shared), self.home.clone());
        let over = self.prepared.clone();
        let name = shared.profile(profile).map(|kept| Arc::clone(&kept.name));
        let task = async move {
            let Some(kept) = shared.profile(profile) else {
                return;
            };
            let prepare = async { shared.backend.prepare(&kept.spec).await };
            let prepared = tokio::select! {
                biased;
                () = over.cancelled() => {
                    boot::settled(&shared).await;
                    Err(BootFailure::Stopping)
                }
                prepared = AssertUnwindSafe(prepare).catch_unwind() => match prepared {
                    Ok(prepared) => prepared.map_err(|error| BootFailure::Backend(Arc::new(error))),
                    Err(_) => Err(BootFailure::Panicked),
                },
            };
            let _ = home.send(Message::Prepared(profile, prepared, reply));
        };
        self.spawn_in(
            move || tracing::info_span!("prepare", profile = name.as_deref()),
            task,
        );
    }

    /// Spawns a task in a span. The task makes the span, without the lock, because that runs the
    /// tracing subscriber of the embedding program. Boxed first, the task is not copied again on
    /// its way.
    fn spawn_in(
        &mut self,
        span: impl FnOnce() -> Span + Send + 'static,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let task = Box::pin(task);
        self.tasks
            .spawn(async move { task.instrument(span()).await });
    }

    /// Reserves resources for a VM and creates its slot. Returns the token that cancels its boot,
    /// or none if the host's limits refused it.
    fn admit(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        profile: ProfileId,
        id: VmId,
    ) -> Option<CancellationToken> {
        let kept = self.shared.profile(profile)?;
        let reservation = match self.shared.admission.reserve(kept.demand) {
            Ok(reservation) => reservation,
            Err(denial) => {
                self.deny(state, now, profile, id, denial);
                return None;
            }
        };
        let mut slot = Slot::new(profile, reservation);
        let cancelled = slot.job.insert(CancellationToken::new()).clone();
        state.slots.insert(id, slot);
        Some(cancelled)
    }

    fn boot(&mut self, state: &mut State<B>, now: Instant, profile: ProfileId, id: VmId) {
        let Some(cancelled) = self.admit(state, now, profile, id) else {
            if let Some(denial) = self.denial {
                self.shared.measure(state, profile, move |metrics| {
                    metrics.boot_failed(&BootFailure::Denied(denial), None);
                });
            }
            return;
        };
        self.shared
            .emit_in(state, Some(profile), Some(id), EventKind::Booting);
        let (shared, home) = (Arc::clone(&self.shared), self.home.clone());
        let Some(kept) = shared.profile(profile) else {
            return;
        };
        let how = guarded("making", || shared.backend.making(&kept.spec)).unwrap_or(Making::Boot);
        let name = Arc::clone(&kept.name);
        let span = move || match how {
            Making::Boot => tracing::info_span!("boot", vm = %id, profile = %name),
            Making::Fork => tracing::info_span!("fork", vm = %id, profile = %name),
        };
        let task = async move {
            let result = boot::boot(shared, profile, id, cancelled).await;
            // The actor outlives its tasks, unless the runtime itself ends.
            let _ = home.send(Message::Booted(id, (how, now), result));
        };
        self.spawn_in(span, task);
    }

    fn join(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        profile: ProfileId,
        id: VmId,
        ticket: TicketId,
    ) {
        let Some(cancelled) = self.admit(state, now, profile, id) else {
            return;
        };
        let (mut sound, mut fits) = (true, true);
        if let (Some(vm), Some(slot)) = (self.take_offered(ticket, id), state.slots.get_mut(&id)) {
            slot.remote = guarded("remote", || self.shared.backend.remote(&vm)).map(Arc::new);
            let kept = self.shared.profile(profile);
            let fitting = || kept.is_some_and(|kept| self.shared.backend.fits(&vm, &kept.spec));
            fits = guarded("fits", fitting).unwrap_or(false);
            slot.vm = Some(vm);
            sound = slot.remote.is_some();
        }
        if !fits {
            return self.joined(state, now, id, Err(OfferRefusal::Unfit));
        }
        if !sound {
            let wrong = ProbeError::Wrong("the backend panicked");
            return self.joined(state, now, id, Err(OfferRefusal::Unhealthy(wrong)));
        }
        let (shared, home) = (Arc::clone(&self.shared), self.home.clone());
        let name = shared.profile(profile).map(|kept| Arc::clone(&kept.name));
        let span = move || tracing::info_span!("adopt", vm = %id, profile = name.as_deref());
        let task = async move {
            let check = health::check(shared.check_rules, || shared.probe(id));
            let result = tokio::select! {
                biased;
                () = cancelled.cancelled() => Err(OfferRefusal::Full),
                verdict = check => verdict.map(drop).map_err(OfferRefusal::Unhealthy),
            };
            let _ = home.send(Message::Joined(id, result));
        };
        self.spawn_in(span, task);
    }

    fn park(&mut self, state: &mut State<B>, now: Instant, id: VmId) {
        if !state.ledger.is_ready(id) {
            return;
        }
        let Some(slot) = state.slots.get_mut(&id) else {
            return;
        };
        let Some(vm) = &slot.vm else { return };
        let backend = &self.shared.backend;
        let kept = self.shared.profile(slot.profile);
        let paused = kept.is_some_and(|kept| kept.parking == Parking::Paused);
        if paused && guarded("pause", || backend.pause(vm)).is_none() {
            return self.ended(state, now, id);
        }
        if slot.watch.is_some() {
            return;
        }
        let Some(ended) = guarded("ended", || backend.ended(vm)) else {
            return self.ended(state, now, id);
        };
        let unwatched = CancellationToken::new();
        slot.watch = Some(unwatched.clone());
        let home = self.home.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = unwatched.cancelled() => {}
                over = AssertUnwindSafe(ended).catch_unwind() => {
                    if over.is_err() {
                        // A VM whose end would not be noticed is treated as ended.
                        tracing::error!(what = "ended", "the backend panicked");
                    }
                    let _ = home.send(Message::Ended(id));
                }
            }
        });
    }

    fn check(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        profile: ProfileId,
        id: VmId,
        check: u64,
        pass: PassId,
    ) {
        if !state.ledger.is_checking(id, check) {
            return;
        }
        let Some(slot) = state.slots.get_mut(&id) else {
            return;
        };
        let Some(kept) = self.shared.profile(profile) else {
            return;
        };
        if kept.parking == Parking::Paused
            && let Some(vm) = &slot.vm
            && guarded("resume", || self.shared.backend.resume(vm)).is_none()
        {
            return self.ended(state, now, id);
        }
        let dropped = CancellationToken::new();
        slot.job = Some(dropped.clone());
        let name = Arc::clone(&kept.name);
        let span = move || tracing::debug_span!("check", vm = %id, profile = %name);
        self.count_check(pass);
        let (shared, home) = (Arc::clone(&self.shared), self.home.clone());
        let task = async move {
            let check_vm = health::check(shared.check_rules, || shared.probe(id));
            let verdict = tokio::select! {
                biased;
                () = dropped.cancelled() => Verdict::Dropped,
                verdict = check_vm => verdict.map_or_else(Verdict::Unhealthy, Verdict::Healthy),
            };
            let _ = home.send(Message::Checked(id, check, pass, verdict));
        };
        self.spawn_in(span, task);
    }

    fn serve(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        profile: ProfileId,
        waiter: WaiterId,
        id: VmId,
    ) {
        let Some(waiting) = state.waiters.remove(&waiter) else {
            // The waiter has gone; its VM never left the slot.
            return state.tell(now, Event::Untouched(id));
        };
        let alive = state.is_alive(&self.shared.backend, id);
        let Some(vm) = alive.then(|| state.take_out(id)).flatten() else {
            self.shared.died(state, profile, id);
            state.tell(now, Event::Ended(id));
            state.tell(now, Event::Untouched(id));
            return state.line_up(now, waiter, waiting);
        };
        let (shared, home) = (Arc::clone(&self.shared), self.home.clone());
        let lease = Lease::untouched(shared, home, id, profile, vm);
        // If the waiter has gone, the lease is dropped and its VM returned.
        state.later(move || drop(waiting.reply.send(Ok(lease))));
    }

    fn retire(&mut self, state: &mut State<B>, now: Instant, id: VmId) {
        let Some(slot) = state.slots.get_mut(&id) else {
            return state.tell(now, Event::Retired(id));
        };
        for task in [slot.job.take(), slot.watch.take()].into_iter().flatten() {
            task.cancel();
        }
        let profile = slot.profile;
        match slot.vm.take() {
            Some(vm) => self.destroy(Doomed::Kept(profile, id), vm, None),
            None => state.tell(now, Event::Retired(id)),
        }
    }

    /// Destroys a VM. Notifies `done`, and the actor if the VM has a slot.
    pub(crate) fn destroy(&mut self, doomed: Doomed, vm: B::Vm, done: Released) {
        let (shared, home) = (Arc::clone(&self.shared), self.home.clone());
        let (known, id) = match doomed {
            Doomed::Kept(profile, id) => (Some((profile, id)), Some(id)),
            Doomed::Stray(id) => (None, id),
        };
        let span = move || tracing::debug_span!("destroy", vm = id.map(display));
        let task = async move {
            let began = Instant::now();
            let retire = async { shared.backend.retire(vm).await };
            let retire = AssertUnwindSafe(retire).catch_unwind();
            let ended = timeout(shared.times.retire, retire).await;
            let kept = known.and_then(|(profile, _)| shared.profile(profile));
            match ended {
                Ok(Ok(())) => {
                    if let Some(kept) = kept {
                        kept.metrics.destroy.record(began.elapsed());
                    }
                }
                Ok(Err(_)) => tracing::error!("the backend panicked while it destroyed a VM"),
                Err(_) => {
                    tracing::error!("destroying a VM takes too long: it is no longer waited for");
                    if let Some(kept) = kept {
                        kept.metrics.abandoned.increment(1);
                    }
                }
            }
            if let Some((_, id)) = known {
                let _ = home.send(Message::Retired(id));
            }
            if let Some(done) = done {
                // The receiver may have been dropped.
                let _ = done.send(());
            }
        };
        self.spawn_in(span, task);
    }

    fn kill(&mut self, state: &mut State<B>, now: Instant, id: VmId, why: Overdue) {
        let Some(slot) = state.slots.get(&id) else {
            return state.tell(now, Event::Killed(id));
        };
        let (profile, remote) = (slot.profile, slot.remote.clone());
        self.shared.measure(state, profile, move |metrics| {
            tracing::warn!(vm = %id, ?why, "the pool ends the VM of a lease");
            metrics.overdue(why);
        });
        self.shared
            .emit_in(state, Some(profile), Some(id), EventKind::Overdue(why));
        let Some(remote) = remote else {
            return state.tell(now, Event::Killed(id));
        };
        let (limit, home) = (self.shared.times.retire, self.home.clone());
        self.tasks.spawn(async move {
            let kill = async { remote.kill().await };
            let kill = AssertUnwindSafe(kill).catch_unwind();
            if !matches!(timeout(limit, kill).await, Ok(Ok(()))) {
                tracing::error!(vm = %id, "the VM of a lease does not end");
            }
            let _ = home.send(Message::Killed(id));
        });
    }
}

fn reject<B: Backend>(state: &mut State<B>, waiter: WaiterId, refusal: Refusal) {
    if let Some(waiter) = state.waiters.remove(&waiter) {
        // The waiter may have gone.
        state.later(move || drop(waiter.reply.send(Err(refusal))));
    }
}

fn ask_idle<B: Backend>(state: &mut State<B>, now: Instant, id: VmId) {
    let Some(slot) = state.slots.get_mut(&id) else {
        return;
    };
    let remote = slot.remote.as_ref();
    let activity = remote.and_then(|remote| guarded("activity", || remote.activity()));
    let idle = activity == slot.activity;
    slot.activity = activity;
    state.tell(
        now,
        if idle {
            Event::Idle(id)
        } else {
            Event::Active(id)
        },
    );
}
