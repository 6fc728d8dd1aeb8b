//! State shared by the pool's handles, leases and tasks.
//!
//! Lock order: `Shared::state` first, then the account inside [`Admission`]. Neither is held across
//! an await, nor while code of the embedding program runs ([`locked`](crate::locked)). The
//! exception is a [`Backend`] of the embedding program: the methods that the trait names run under
//! `Shared::state`. Only the actor carries out the ledger's actions; all others add to
//! `State::pending` and wake it. VMs and leases are never dropped under the lock.

use std::collections::HashMap;
use std::error::Error;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use tokio::runtime::Handle;
use tokio::sync::{Notify, broadcast, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};

use crate::actor::Home;
use crate::backend::{Backend, ProbeError, Remote};
use crate::config::{ConfigError, PoolConfig, Refill};
use crate::error::BootFailure;
use crate::event::{EventKind, PoolEvent};
use crate::guard::guarded;
use crate::health::CheckRules;
use crate::host::Host;
use crate::lease::{Lease, Released};
use crate::ledger::{
    Action, BreakerRules, Event, Ledger, Phase, PoolRules, ProfileId, Refusal, Rules, ScaleRules,
    TicketId, WaiterId,
};
use crate::locked::{Locked, Outbox};
use crate::metrics::ProfileMetrics;
use crate::permit::{Admission, Reservation};
use crate::policy;
use crate::profile::{Demand, Parking, Profile};
use crate::slot::{Slot, VmId};

pub(crate) struct Shared<B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: PoolConfig,
    pub(crate) profiles: Vec<Kept>,
    pub(crate) check_rules: CheckRules,
    pub(crate) times: Times,
    pub(crate) admission: Arc<Admission>,
    pub(crate) host: Box<dyn Host>,
    pub(crate) nudge: Arc<Nudge>,
    pub(crate) events: broadcast::Sender<PoolEvent>,
    /// Counts the steps of the actor; a task that waits for a condition checks it again at each.
    pub(crate) step: watch::Sender<u64>,
    state: Mutex<State<B>>,
}

/// A profile with its derived settings and its metrics.
pub(crate) struct Kept {
    pub(crate) spec: Profile,
    pub(crate) name: Arc<str>,
    pub(crate) parking: Parking,
    pub(crate) demand: Demand,
    pub(crate) metrics: ProfileMetrics,
}

impl Kept {
    /// The most VMs that may be kept warm: `size`, or the upper bound of autoscaling if that is
    /// larger.
    pub(crate) fn most(&self, size: usize) -> usize {
        let scale = self.spec.autoscale.as_ref();
        scale.map_or(size, |scale| scale.max.max(size))
    }
}

/// Time limits on the backend's operations, multiplied by its time scale.
pub(crate) struct Times {
    pub(crate) boot: Duration,
    pub(crate) retire: Duration,
}

/// Wakes the actor.
#[derive(Default)]
pub(crate) struct Nudge {
    notify: Notify,
    capacity_freed: AtomicBool,
}

impl Nudge {
    pub(crate) fn wake(&self) {
        self.notify.notify_one();
    }

    pub(crate) async fn woken(&self) {
        self.notify.notified().await;
    }

    /// Completes the wait of a loop whose runtime does not run, so that it does not consume a
    /// wake-up meant for the next one.
    fn release(&self) {
        self.notify.notify_waiters();
    }

    fn capacity_freed(&self) {
        self.capacity_freed.store(true, Ordering::Release);
        self.wake();
    }

    pub(crate) fn take_capacity_freed(&self) -> bool {
        self.capacity_freed.swap(false, Ordering::AcqRel)
    }
}

pub(crate) type Served<B> = oneshot::Sender<Result<Lease<B>, Refusal>>;

/// A waiting caller.
pub(crate) struct Waiter<B: Backend> {
    /// All profiles that may serve it, including those that could not when it came.
    pub(crate) profiles: Vec<ProfileId>,
    pub(crate) reply: Served<B>,
}

pub(crate) struct State<B: Backend> {
    pub(crate) ledger: Ledger,
    pub(crate) slots: HashMap<VmId, Slot<B>>,
    pub(crate) waiters: HashMap<WaiterId, Waiter<B>>,
    /// Actions of the ledger that are not carried out yet.
    pub(crate) pending: Vec<Action>,
    /// The actor's mailbox, which leases keep a sender of; present from start until the actor
    /// ends.
    pub(crate) inbox: Option<Home<B>>,
    /// Leased VMs whose generation was ended before they were returned.
    pub(crate) adrift: HashMap<VmId, Adrift<B>>,
    /// By profile.
    pub(crate) last_failure: Vec<Option<BootFailure>>,
    /// By profile, as last reported.
    pub(crate) no_template: Vec<Option<Arc<dyn Error + Send + Sync>>>,
    pub(crate) pressed: bool,
    /// See [`later`](Self::later).
    pub(crate) outbox: Outbox,
    next_id: u64,
}

/// Data kept for a leased VM whose generation has ended.
pub(crate) struct Adrift<B: Backend> {
    remote: Option<Arc<B::Remote>>,
    /// Keeps the VM counted in the limits until the lease is over or the VM has ended.
    reservation: Option<Reservation>,
}

/// A returned VM that has no slot any more (an orphan).
pub(crate) enum Stray<B: Backend> {
    /// Its generation still runs: the actor destroys the VM.
    Late(B::Vm, Released),
    /// Its generation has ended: the VM is dropped, then its reservation.
    Adrift(B::Vm, Option<Adrift<B>>),
}

impl<B: Backend> State<B> {
    /// Applies `event` to the ledger; the actor carries out the resulting actions.
    pub(crate) fn tell(&mut self, now: Instant, event: Event) {
        let actions = self.ledger.apply(now, event);
        self.pending.extend(actions);
    }

    /// Applies `event` without scheduling boots; the actor refills on its next step.
    pub(crate) fn note(&mut self, now: Instant, event: Event) {
        let actions = self.ledger.note(now, event);
        self.pending.extend(actions);
    }

    /// Puts a caller into the queues of its profiles. A caller that was served a dead VM is queued
    /// again under its old number.
    pub(crate) fn line_up(&mut self, now: Instant, id: WaiterId, waiter: Waiter<B>) {
        let actions = self.ledger.line_up(now, id, &waiter.profiles);
        self.waiters.insert(id, waiter);
        self.pending.extend(actions);
    }

    /// Defers `tell` (logs, metrics, events, answers) until the lock is free, because it runs code
    /// of the embedding program.
    pub(crate) fn later(&mut self, tell: impl FnOnce() + Send + 'static) {
        self.outbox.push(tell);
    }

    /// Whether `home` is the mailbox of the current generation.
    pub(crate) fn lives_at(&self, home: &Home<B>) -> bool {
        self.inbox
            .as_ref()
            .is_some_and(|inbox| inbox.same_channel(home))
    }

    /// Whether that generation is the current one and still starting.
    pub(crate) fn is_starting(&self, home: &Home<B>) -> bool {
        self.lives_at(home) && self.ledger.phase() == Phase::Starting
    }

    fn next_id(&mut self) -> u64 {
        self.next_id = self.next_id.saturating_add(1);
        self.next_id
    }

    pub(crate) fn next_waiter(&mut self) -> WaiterId {
        WaiterId(self.next_id())
    }

    pub(crate) fn next_ticket(&mut self) -> TicketId {
        TicketId(self.next_id())
    }

    pub(crate) fn next_pass(&mut self) -> crate::ledger::PassId {
        crate::ledger::PassId(self.next_id())
    }

    pub(crate) fn is_alive(&self, backend: &B, id: VmId) -> bool {
        let vm = self.slots.get(&id).and_then(|slot| slot.vm.as_ref());
        vm.is_some_and(|vm| guarded("alive", || backend.alive(vm)).unwrap_or(false))
    }

    /// Moves a VM that the ledger counts as leased out of its slot.
    pub(crate) fn take_out(&mut self, id: VmId) -> Option<B::Vm> {
        let slot = self.slots.get_mut(&id)?;
        if let Some(check) = slot.job.take() {
            check.cancel();
        }
        // The reading with which the idle limit, if there is one, first compares.
        let remote = slot.remote.as_ref();
        let remote = remote.filter(|_| self.ledger.ends_idle_leases());
        slot.activity = remote.and_then(|remote| guarded("activity", || remote.activity()));
        slot.vm.take()
    }
}

impl<B: Backend> Shared<B> {
    pub(crate) fn new(
        backend: B,
        config: PoolConfig,
        host: Box<dyn Host>,
    ) -> Result<Arc<Self>, ConfigError> {
        let demand = |profile: &Profile| backend.demand(profile);
        let limits = config.limits_on(host.memory_available_mib(), demand)?;
        let conflicts = backend.conflicts(&config);
        if !conflicts.is_empty() {
            return Err(ConfigError::Invalid(conflicts));
        }
        let scale = backend.time_scale().max(1);
        let nudge = Arc::new(Nudge::default());
        let freed = Arc::clone(&nudge);
        let kept = |spec: &Profile| Kept {
            name: spec.name.as_str().into(),
            parking: spec
                .park
                .or(config.park)
                .unwrap_or_else(|| backend.parking(spec)),
            demand: demand(spec),
            metrics: ProfileMetrics::new(&spec.name),
            spec: spec.clone(),
        };
        let profiles: Vec<_> = config.profiles.iter().map(kept).collect();
        Ok(Arc::new(Self {
            check_rules: CheckRules::new(&config.health, scale),
            times: Times {
                boot: Duration::from_millis(config.boot.timeout_ms).saturating_mul(scale),
                retire: Duration::from_millis(config.retire_timeout_ms).saturating_mul(scale),
            },
            admission: Admission::new(limits, move || freed.capacity_freed()),
            host,
            nudge,
            events: broadcast::channel(policy::EVENT_BACKLOG).0,
            step: watch::channel(0).0,
            state: Mutex::new(State {
                ledger: ledger_of(&config),
                slots: HashMap::new(),
                waiters: HashMap::new(),
                pending: Vec::new(),
                inbox: None,
                adrift: HashMap::new(),
                last_failure: vec![None; profiles.len()],
                no_template: vec![None; profiles.len()],
                pressed: false,
                outbox: Outbox::default(),
                next_id: 0,
            }),
            profiles,
            backend,
            config,
        }))
    }

    pub(crate) fn state(&self) -> Locked<'_, B> {
        Locked::new(&self.state)
    }

    pub(crate) fn profile(&self, id: ProfileId) -> Option<&Kept> {
        self.profiles.get(id.0)
    }

    pub(crate) fn profile_name(&self, id: ProfileId) -> String {
        self.profile(id)
            .map_or_else(String::new, |kept| kept.spec.name.clone())
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.profiles
            .iter()
            .map(|profile| profile.spec.name.clone())
            .collect()
    }

    pub(crate) fn find(&self, name: &str) -> Option<ProfileId> {
        self.profiles
            .iter()
            .position(|profile| profile.spec.name == name)
            .map(ProfileId)
    }

    /// Sends an event to the subscribers, after all events queued before it.
    pub(crate) fn emit(&self, profile: Option<ProfileId>, vm: Option<VmId>, kind: EventKind) {
        if self.events.receiver_count() > 0 {
            self.emit_in(&mut self.state(), profile, vm, kind);
        }
    }

    /// Like [`emit`](Self::emit), for a caller that holds the lock: the event is sent once it is
    /// free.
    pub(crate) fn emit_in(
        &self,
        state: &mut State<B>,
        profile: Option<ProfileId>,
        vm: Option<VmId>,
        kind: EventKind,
    ) {
        if self.events.receiver_count() > 0 {
            let profile = profile
                .and_then(|id| self.profile(id))
                .map(|kept| kept.name.clone());
            let events = self.events.clone();
            // An error means that the last subscriber has just gone.
            state.later(move || drop(events.send(PoolEvent { profile, vm, kind })));
        }
    }

    /// Runs `measure` on the metrics of a profile once the lock is free.
    pub(crate) fn measure(
        self: &Arc<Self>,
        state: &mut State<B>,
        profile: ProfileId,
        measure: impl FnOnce(&ProfileMetrics) + Send + 'static,
    ) {
        let shared = Arc::clone(self);
        state.later(move || {
            if let Some(kept) = shared.profile(profile) {
                measure(&kept.metrics);
            }
        });
    }

    /// Handles a VM that has ended by itself. The owner of its lease, if any, learns that from the
    /// VM. The actor replaces the VM on its next step.
    pub(crate) fn ended(self: &Arc<Self>, state: &mut State<B>, now: Instant, id: VmId) {
        let parked = state.slots.get(&id).filter(|slot| slot.vm.is_some());
        if let Some(profile) = parked.map(|slot| slot.profile)
            && state.ledger.is_parked(id)
        {
            self.died(state, profile, id);
        }
        state.note(now, Event::Ended(id));
    }

    /// Reports a VM that ended before it was handed to a caller.
    pub(crate) fn died(self: &Arc<Self>, state: &mut State<B>, profile: ProfileId, id: VmId) {
        let name = self.profile_name(profile);
        self.measure(state, profile, move |metrics| {
            tracing::warn!(vm = %id, profile = name, "a parked VM ended by itself");
            metrics.died.increment(1);
        });
        self.emit_in(state, Some(profile), Some(id), EventKind::Ended);
    }

    /// Returns the VM of a lease to its slot. If it has none any more (the pool was stopped since,
    /// and maybe started again), the error hands the VM back: it must be destroyed all the same.
    pub(crate) fn take_back(
        self: &Arc<Self>,
        (home, id): (&Home<B>, VmId),
        vm: B::Vm,
        untouched: bool,
        done: Released,
    ) -> Result<(), Stray<B>> {
        let mut state = self.state();
        let Some(slot) = state.slots.get_mut(&id) else {
            return Err(if state.lives_at(home) {
                Stray::Late(vm, done)
            } else {
                Stray::Adrift(vm, state.adrift.remove(&id))
            });
        };
        let profile = slot.profile;
        let died = untouched && !guarded("alive", || self.backend.alive(&vm)).unwrap_or(false);
        slot.vm = Some(vm);
        slot.released = done;
        let now = Instant::now();
        if died {
            self.died(&mut state, profile, id);
            state.note(now, Event::Ended(id));
        }
        let event = if untouched {
            Event::Untouched(id)
        } else {
            Event::Returned(id)
        };
        state.note(now, event);
        let untouched = state.ledger.is_kept(id);
        let kind = EventKind::Returned { untouched };
        self.emit_in(&mut state, Some(profile), Some(id), kind);
        drop(state);
        self.nudge.wake();
        Ok(())
    }

    /// Takes the VM of a lease out of the pool for good. Returns its reservation, which its owner
    /// keeps.
    pub(crate) fn withdraw(&self, id: VmId) -> Option<Reservation> {
        let mut state = self.state();
        let Some(slot) = state.slots.get_mut(&id) else {
            let adrift = state.adrift.remove(&id);
            drop(state);
            self.stepped();
            return adrift?.reservation;
        };
        let (profile, reservation) = (slot.profile, slot.reservation.take());
        state.note(Instant::now(), Event::Withdrawn(id));
        self.emit_in(&mut state, Some(profile), Some(id), EventKind::Withdrawn);
        drop(state);
        self.nudge.wake();
        reservation
    }

    /// Begins one probe of a parked VM; none if the VM is no longer in its slot.
    pub(crate) fn probe(&self, id: VmId) -> Option<BoxFuture<'static, Result<(), ProbeError>>> {
        let state = self.state();
        let vm = state.slots.get(&id)?.vm.as_ref()?;
        Some(self.backend.probe(vm))
    }

    /// Asks the pool to stop, with `by` as the deadline for leases, if the generation of `home` is
    /// the current one. From then on no VM is handed out.
    pub(crate) fn begin_stop(&self, home: &Home<B>, by: Instant) {
        let mut state = self.state();
        if !state.lives_at(home) || state.ledger.phase() == Phase::Stopped {
            return;
        }
        if state.ledger.phase() != Phase::Stopping {
            self.emit_in(&mut state, None, None, EventKind::Stopping);
        }
        state.tell(Instant::now(), Event::Stop(by));
        drop(state);
        self.nudge.wake();
    }

    /// Resolves when the generation of `home` has ended. If its actor does not respond, because its
    /// runtime does not run, the generation is ended from here.
    pub(crate) async fn life_over(&self, home: &Home<B>) {
        let over = self.wait_for(|state| (!state.lives_at(home)).then_some(()));
        if Handle::try_current().is_err() {
            // Without a runtime there is no clock to detect an actor that does not respond.
            return over.await;
        }
        tokio::select! {
            biased;
            () = over => {}
            () = self.silence() => {
                tracing::error!("the runtime of the pool's start does not run: the pool is ended without it");
                self.end_life(home);
            }
        }
    }

    /// Resolves when the actor makes no step within `LOOP_SILENCE` after a wake-up.
    async fn silence(&self) {
        let mut steps = self.step.subscribe();
        for answered in [true, false].into_iter().cycle() {
            steps.borrow_and_update();
            if !answered {
                self.nudge.wake();
            }
            let stepped = timeout(policy::LOOP_SILENCE, steps.changed()).await;
            if !answered && stepped.is_err() {
                return;
            }
        }
    }

    /// Announces a step of the actor, or an equivalent change: tasks that wait for a condition
    /// check it again.
    pub(crate) fn stepped(&self) {
        self.step.send_modify(|step| *step = step.wrapping_add(1));
    }

    /// Ends the generation of `home`, if it is the current one: all VMs except leased ones are
    /// dropped.
    pub(crate) fn end_life(&self, home: &Home<B>) {
        let mut state = self.state();
        if !state.lives_at(home) {
            return;
        }
        state.inbox = None;
        self.nudge.release();
        state.pending.clear();
        let killed = state.ledger.phase() != Phase::Stopped;
        let mut slots: Vec<_> = state.slots.drain().collect();
        for (id, slot) in &mut slots {
            if state.ledger.is_leased(*id) {
                let (remote, reservation) = (slot.remote.take(), slot.reservation.take());
                let adrift = Adrift {
                    remote,
                    reservation,
                };
                state.adrift.insert(*id, adrift);
            }
        }
        if killed {
            state.ledger.abort();
        }
        let waiters: Vec<_> = state.waiters.drain().collect();
        drop(state);
        if killed {
            tracing::error!("the pool's loop was ended before it had stopped");
        }
        drop((slots, waiters));
        self.stepped();
        self.emit(None, None, EventKind::Stopped);
    }

    /// Waits until `by` for leases whose generation has ended, then ends their VMs.
    pub(crate) async fn see_home(&self, by: Instant) {
        let all_home = self.wait_for(|state| state.adrift.is_empty().then_some(()));
        if self.state().adrift.is_empty() || Handle::try_current().is_err() {
            return;
        }
        if timeout_at(by, all_home).await.is_ok() {
            return;
        }
        let left: Vec<_> = {
            let mut state = self.state();
            let left = state.adrift.iter_mut();
            left.map(|(id, adrift)| (*id, adrift.remote.take()))
                .collect()
        };
        let limit = self.times.retire;
        let kills = left.into_iter().map(|(id, remote)| async move {
            let Some(remote) = remote else { return };
            let kill = AssertUnwindSafe(remote.kill()).catch_unwind();
            if !matches!(timeout(limit, kill).await, Ok(Ok(()))) {
                tracing::error!(vm = %id, "the VM of a lease does not end");
            }
            // The lease keeps the handle of an ended VM.
            let adrift = self.state().adrift.remove(&id);
            drop(adrift);
        });
        join_all(kills).await;
        self.stepped();
    }

    /// Resolves with the first value that `met` returns; calls it again after each step of the
    /// actor.
    pub(crate) async fn wait_for<T>(&self, mut met: impl FnMut(&State<B>) -> Option<T>) -> T {
        let mut steps = self.step.subscribe();
        loop {
            steps.borrow_and_update();
            if let Some(value) = met(&self.state()) {
                return value;
            }
            // Never an error: `self` owns the sender.
            if steps.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

fn ledger_of(config: &PoolConfig) -> Ledger {
    let some_ms = |ms: u64| (ms > 0).then(|| Duration::from_millis(ms));
    let breaker = BreakerRules {
        backoff_min: Duration::from_millis(config.boot.backoff_min_ms),
        backoff_max: Duration::from_millis(config.boot.backoff_max_ms),
        failures: config.boot.breaker_failures,
        cooldown: Duration::from_millis(config.boot.breaker_cooldown_ms),
        cooldown_max: Duration::from_millis(config.boot.breaker_cooldown_max_ms),
        early: Duration::from_millis(config.boot.early_death_ms),
    };
    let rules = (1_u64..)
        .zip(&config.profiles)
        .map(|(seed, profile)| Rules {
            size: config.size_of(profile),
            boots_percent: config.concurrent_boots_percent,
            refill: config.refill == Refill::Automatic,
            breaker,
            scale: profile.autoscale.as_ref().map(|scale| ScaleRules {
                min: scale.min,
                max: scale.max,
                window: Duration::from_millis(scale.window_ms),
            }),
            seed: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15),
        });
    let pool = PoolRules {
        lease_limit: config.max_concurrent_vms,
        health_interval: some_ms(config.health.interval_ms),
        lease_deadline: some_ms(config.lease.deadline_ms),
        lease_idle: some_ms(config.lease.idle_ms),
    };
    Ledger::new(pool, rules)
}
