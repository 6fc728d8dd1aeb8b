//! The actor: the loop that carries out the ledger's actions.
//!
//! One task per started pool. It owns all other tasks (boots, checks, destructions, watches) and
//! receives their results, requests of callers, and orphans (VMs that are returned without having a
//! slot any more). It waits only for its mailbox, a wake-up, or the time that the ledger names, so
//! that no profile can delay another.

mod replies;
mod results;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

pub(crate) use replies::Attempt;
use replies::{Offered, Pass};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::backend::{Backend, Making, ProbeError};
use crate::boot::Failed;
use crate::error::{BootFailure, OfferError, OfferRefusal};
use crate::event::EventKind;
use crate::lease::Released;
use crate::ledger::{Event, PassId, Phase, ProfileId, TicketId};
use crate::permit::Denial;
use crate::shared::{Shared, State};
use crate::slot::{Slot, VmId};
use crate::tasks::Doomed;

/// Mailbox of the actor of one generation (one run of the pool, from its start to its stop).
pub(crate) type Home<B> = mpsc::UnboundedSender<Message<B>>;

/// Messages to the actor. VMs are moved by value.
pub(crate) enum Message<B: Backend> {
    Booted(VmId, (Making, Instant), Result<B::Vm, Failed<B>>),
    Joined(VmId, Result<(), OfferRefusal>),
    Checked(VmId, u64, PassId, Verdict),
    Ended(VmId),
    Retired(VmId),
    Killed(VmId),
    /// An orphan: a returned VM that has no slot any more, or an offered VM whose owner has gone.
    Stray(Option<VmId>, B::Vm, Released),
    Prepare(ProfileId, PreparedReply),
    Prepared(ProfileId, Result<(), BootFailure>, PreparedReply),
    Replenish(ProfileId, TicketId, oneshot::Sender<Attempt>),
    Offer(ProfileId, TicketId, B::Vm, OfferReply<B>),
    Forget(TicketId),
    Check(ProfileId, usize, PassId, oneshot::Sender<CheckReport>),
    AbandonPass(PassId),
}

pub(crate) type OfferReply<B> = oneshot::Sender<Result<VmId, OfferError<<B as Backend>::Vm>>>;

pub(crate) type PreparedReply = oneshot::Sender<Result<(), BootFailure>>;

/// Result of one check.
pub(crate) enum Verdict {
    Healthy(std::time::Duration),
    Unhealthy(ProbeError),
    /// The VM was handed out or destroyed meanwhile.
    Dropped,
}

/// Result of one health-check round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// VMs that passed their check and are parked again.
    pub healthy: usize,
    /// VMs that failed their check and were destroyed.
    pub unhealthy: usize,
    /// VMs that were handed out or destroyed during their check.
    pub dropped: usize,
}

pub(crate) struct Actor<B: Backend> {
    pub(crate) shared: Arc<Shared<B>>,
    pub(crate) home: Home<B>,
    pub(crate) tasks: JoinSet<()>,
    /// Cancels preparations; cancelled when the start that asked for them is over.
    pub(crate) prepared: CancellationToken,
    tickets: HashMap<TicketId, oneshot::Sender<Attempt>>,
    offers: HashMap<TicketId, Offered<B>>,
    passes: HashMap<PassId, Pass>,
    /// Why the boot (`failure`) or offer (`refusal`) that was processed last failed.
    failure: Option<BootFailure>,
    refusal: Option<OfferRefusal>,
    /// The limit that refused a reservation last.
    pub(crate) denial: Option<Denial>,
    pressure_read: Option<Instant>,
    /// By profile: whether the breaker was open when last reported.
    breakers: Vec<bool>,
    /// Slots to drop once the lock is no longer held.
    trash: Vec<Slot<B>>,
    stopped: bool,
}

/// Messages processed before the loop reads the clock again.
const BATCH: usize = 64;

impl<B: Backend> Actor<B> {
    pub(crate) fn new(shared: Arc<Shared<B>>, home: Home<B>) -> Self {
        Self {
            breakers: vec![false; shared.profiles.len()],
            shared,
            home,
            tasks: JoinSet::new(),
            prepared: CancellationToken::new(),
            tickets: HashMap::new(),
            offers: HashMap::new(),
            passes: HashMap::new(),
            failure: None,
            refusal: None,
            denial: None,
            pressure_read: None,
            trash: Vec::new(),
            stopped: false,
        }
    }

    pub(crate) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message<B>>) {
        let shared = Arc::clone(&self.shared);
        let _ending = Ending(Arc::clone(&shared), self.home.clone());
        while !self.stopped {
            let wake = self.wake_at();
            let message = tokio::select! {
                message = inbox.recv() => message,
                () = shared.nudge.woken() => None,
                () = at(wake) => None,
                Some(_) = self.tasks.join_next() => continue,
            };
            self.read_pressure();
            self.step(message, &mut inbox);
        }
        // Messages may still arrive late; the VMs in them are destroyed like the rest.
        inbox.close();
        while let Ok(message) = inbox.try_recv() {
            self.receive_late(message);
        }
        loop {
            let lives = shared.state().lives_at(&self.home);
            tokio::select! {
                joined = self.tasks.join_next() => if joined.is_none() { break },
                // This answer tells a waiting `stop` that the loop still runs.
                () = shared.nudge.woken(), if lives => shared.stepped(),
            }
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let now = Instant::now();
        let state = self.shared.state();
        let ledger = state.ledger.wake_at(now);
        let recheck = self
            .pressure_read
            .filter(|_| state.pressed && state.ledger.is_hungry(now));
        let recheck = recheck.map(|read| read + self.recheck());
        [ledger, recheck].into_iter().flatten().min()
    }

    fn recheck(&self) -> std::time::Duration {
        std::time::Duration::from_millis(self.shared.config.pressure.recheck_ms)
    }

    /// Reads the host's memory pressure before anything is booted, at most once per `recheck_ms`.
    fn read_pressure(&mut self) {
        let limit = self.shared.config.pressure.stall_percent;
        let now = Instant::now();
        if limit == 0
            || self
                .pressure_read
                .is_some_and(|read| now < read + self.recheck())
        {
            return;
        }
        self.pressure_read = Some(now);
        let stall = self.shared.host.memory_stall_percent().unwrap_or(0.0);
        let pressed = stall > f64::from(limit);
        let mut state = self.shared.state();
        if state.pressed != pressed {
            state.pressed = pressed;
            state.tell(now, Event::Pressure(pressed));
            drop(state);
            if pressed {
                tracing::warn!(stall, limit, "the host is short of memory: refill stops");
            } else {
                tracing::info!(stall, limit, "the host has memory again: refill goes on");
            }
            self.shared
                .emit(None, None, EventKind::MemoryPressure(pressed));
        }
    }

    fn step(&mut self, first: Option<Message<B>>, inbox: &mut mpsc::UnboundedReceiver<Message<B>>) {
        let shared = Arc::clone(&self.shared);
        let now = Instant::now();
        let mut state = shared.state();
        if !state.lives_at(&self.home) {
            // A `stop` has ended this generation because this loop did not run.
            drop(state);
            self.stopped = true;
            return first
                .into_iter()
                .for_each(|message| self.receive_late(message));
        }
        if shared.nudge.take_capacity_freed() {
            state.tell(now, Event::CapacityFreed);
        }
        state.tell(now, Event::Tick);
        self.perform(&mut state, now);
        let mut next = first;
        for _ in 0..BATCH {
            let Some(message) = next else { break };
            self.receive(&mut state, now, message);
            self.perform(&mut state, now);
            next = inbox.try_recv().ok();
        }
        if let Some(message) = next {
            self.receive(&mut state, now, message);
            self.perform(&mut state, now);
        }
        if state.ledger.phase() != Phase::Starting {
            self.prepared.cancel();
        }
        self.show_breakers(&mut state);
        let profiles = (0..shared.profiles.len()).map(ProfileId);
        let counts: Vec<_> = profiles.map(|id| state.ledger.counts(id)).collect();
        drop(state);
        for (profile, counts) in shared.profiles.iter().zip(&counts) {
            profile.metrics.show(counts);
        }
        self.trash.clear();
        shared.stepped();
    }

    fn receive(&mut self, state: &mut State<B>, now: Instant, message: Message<B>) {
        match message {
            Message::Booted(id, begun, result) => {
                if let Some(profile) = state.slots.get(&id).map(|slot| slot.profile) {
                    self.show_template(state, profile);
                }
                self.booted(state, now, id, begun, result);
            }
            Message::Joined(id, result) => self.joined(state, now, id, result),
            Message::Checked(id, check, pass, verdict) => {
                self.checked(state, now, id, check, pass, verdict);
            }
            Message::Ended(id) => self.ended(state, now, id),
            Message::Retired(id) => {
                let slot = state.slots.get_mut(&id);
                let profile = slot.as_ref().map(|slot| slot.profile);
                let released = slot.and_then(|slot| slot.released.take());
                self.shared
                    .emit_in(state, profile, Some(id), EventKind::Destroyed);
                state.tell(now, Event::Retired(id));
                if let Some(released) = released {
                    // The receiver may have been dropped.
                    state.later(move || {
                        let _ = released.send(());
                    });
                }
            }
            Message::Killed(id) => {
                // The lease keeps the handle of an ended VM.
                if let Some(slot) = state.slots.get_mut(&id) {
                    slot.reservation = None;
                }
                state.tell(now, Event::Killed(id));
            }
            Message::Stray(id, vm, done) => self.destroy(Doomed::Stray(id), vm, done),
            Message::Prepare(_, reply) if state.pressed => {
                // The start may have been cancelled.
                state.later(move || drop(reply.send(Err(BootFailure::MemoryPressure))));
            }
            Message::Prepare(profile, reply) => self.prepare(profile, reply),
            Message::Prepared(profile, result, reply) => {
                self.show_template(state, profile);
                // The start may have been cancelled.
                state.later(move || drop(reply.send(result)));
            }
            Message::Replenish(profile, ticket, reply) => {
                self.tickets.insert(ticket, reply);
                state.tell(now, Event::Replenish(profile, ticket));
            }
            Message::Offer(profile, ticket, vm, reply) => {
                self.offers.insert(
                    ticket,
                    Offered {
                        vm: Some(vm),
                        id: None,
                        reply,
                    },
                );
                state.tell(now, Event::Offer(profile, ticket));
            }
            Message::Forget(ticket) => {
                let reply = self.tickets.remove(&ticket);
                state.later(move || drop(reply));
                state.tell(now, Event::Forget(ticket));
            }
            Message::Check(profile, most, pass, reply) => {
                let report = CheckReport::default();
                self.passes.insert(
                    pass,
                    Pass {
                        left: 0,
                        report,
                        reply,
                    },
                );
                state.tell(now, Event::BeginCheck(profile, most, pass));
                self.perform(state, now);
                self.settle_pass(state, pass);
            }
            Message::AbandonPass(pass) => {
                let abandoned = self.passes.remove(&pass);
                state.later(move || drop(abandoned));
                state.tell(now, Event::AbandonPass(pass));
            }
        }
    }

    pub(crate) fn ended(&self, state: &mut State<B>, now: Instant, id: VmId) {
        self.shared.ended(state, now, id);
        state.tell(now, Event::Tick);
    }

    /// Carries out all pending actions of the ledger, and those that result from them.
    pub(crate) fn perform(&mut self, state: &mut State<B>, now: Instant) {
        let mut todo = VecDeque::from(std::mem::take(&mut state.pending));
        while let Some(action) = todo.pop_front() {
            self.act(state, now, action);
            todo.extend(state.pending.drain(..));
        }
    }

    /// Handles the refusal of `id` by the host's limits.
    pub(crate) fn deny(
        &mut self,
        state: &mut State<B>,
        now: Instant,
        profile: ProfileId,
        id: VmId,
        denial: Denial,
    ) {
        if let Some(last) = state.last_failure.get_mut(profile.0) {
            *last = Some(BootFailure::Denied(denial));
        }
        let name = self.shared.profile_name(profile);
        state.later(move || {
            tracing::warn!(vm = %id, profile = name, %denial, "a boot was refused");
        });
        self.denial = Some(denial);
        state.tell(now, Event::Denied(id));
    }

    pub(crate) fn discard(&mut self, id: VmId, slot: Option<Slot<B>>) {
        let Some(mut slot) = slot else { return };
        // The lease was returned at the moment in which the pool gave up its VM.
        if let Some(vm) = slot.vm.take() {
            let released = slot.released.take();
            self.destroy(Doomed::Stray(Some(id)), vm, released);
        }
        self.trash.push(slot);
    }

    pub(crate) fn stopped(&mut self, state: &State<B>) {
        debug_assert!(state.ledger.phase() == Phase::Stopped);
        self.stopped = true;
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Drop guard that ends the generation, also when the runtime drops the actor in the middle of its
/// work.
struct Ending<B: Backend>(Arc<Shared<B>>, Home<B>);

impl<B: Backend> Drop for Ending<B> {
    fn drop(&mut self) {
        self.0.end_life(&self.1);
    }
}
