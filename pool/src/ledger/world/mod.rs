//! A model of the world around a ledger: operations under way outside of it, and the steps that may
//! happen next. Every step checks the invariants that the ledger's module states.

mod invariants;
mod options;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::{
    Action, BreakerRules, Event, Ledger, Outcome, PassId, Phase, PoolRules, ProfileId, Rules,
    ScaleRules, Stage, TicketId, WaiterId,
};
use crate::policy;
use crate::slot::VmId;

/// Where a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Place {
    Booting {
        cancelled: bool,
    },
    /// An offered VM under its first check.
    Joining {
        cancelled: bool,
    },
    /// The boot was answered without a VM.
    Unmade,
    Slot,
    /// With a caller, or assigned to a waiter that has not picked it up.
    Lease {
        waiter: Option<(WaiterId, Among)>,
    },
    Retiring,
}

/// The profiles that may serve a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Among(ProfileId, Option<ProfileId>);

impl Among {
    fn all(self) -> impl Iterator<Item = ProfileId> {
        std::iter::once(self.0).chain(self.1)
    }
}

/// One step that may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    Take(ProfileId),
    /// This many at once, or none.
    TakeMany(ProfileId, usize),
    /// A caller waits; also again, if it was served a dead VM.
    Wait(WaiterId, Among),
    Tell(Event),
    /// The actor, which was woken, makes its step.
    Act,
    /// Time passes until the ledger is to be woken.
    Sleep,
}

/// The kind of pool in the world.
#[derive(Debug, Clone, Default)]
pub(super) struct Case {
    pub(super) sizes: Vec<usize>,
    pub(super) lease_limit: usize,
    pub(super) refill: bool,
    /// Whether demand moves the sizes.
    pub(super) scales: bool,
    /// Whether callers ask for several VMs at once.
    pub(super) bursts: bool,
    /// Whether there are periodic health-check rounds.
    pub(super) passes: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) ledger: Ledger,
    pub(super) now: Instant,
    vms: BTreeMap<VmId, (ProfileId, Place)>,
    /// Checks that the ledger waits for.
    checks: BTreeMap<VmId, u64>,
    /// Verdicts that may still come, including outdated ones.
    verdicts: BTreeSet<(VmId, u64)>,
    kills: BTreeSet<VmId>,
    /// Leases that the ledger wants to know about.
    asked: BTreeSet<VmId>,
    /// The profiles that each waiter asked for, and the queues that it is in.
    waiters: BTreeMap<WaiterId, (Among, BTreeSet<ProfileId>)>,
    tickets: BTreeSet<TicketId>,
    /// VMs that were used, have ended or failed a check: never to be handed out again.
    spent: BTreeSet<VmId>,
    /// Whether the actor was woken and has a step to make; other events may come first.
    nudged: bool,
    next: u64,
    made: usize,
    lease_limit: usize,
    profiles: usize,
    bursts: bool,
    passes: bool,
}

/// Whether a caller applies the event itself, during a call; all others come through the actor's
/// mailbox.
fn is_told_by_callers(event: Event) -> bool {
    is_noted(event) || matches!(event, Event::Leave(_) | Event::Stop(_))
}

/// Whether the event is applied with [`Ledger::note`], so that the actor refills on its next step.
fn is_noted(event: Event) -> bool {
    matches!(
        event,
        Event::Returned(_)
            | Event::Untouched(_)
            | Event::Withdrawn(_)
            | Event::Resize(..)
            | Event::Drain(_)
            | Event::Undrain(_)
    )
}

impl World {
    pub(super) fn running(case: &Case) -> Self {
        let mut world = Self::stopped(case);
        world.step(Step::Tell(Event::Start));
        world.step(Step::Tell(Event::Run));
        world
    }

    pub(super) fn stopped(case: &Case) -> Self {
        let rules = |size: &usize| Rules {
            size: *size,
            boots_percent: 50,
            refill: case.refill,
            breaker: BreakerRules {
                backoff_min: Duration::from_secs(1),
                backoff_max: Duration::from_secs(4),
                failures: 2,
                cooldown: Duration::from_secs(30),
                cooldown_max: Duration::from_secs(60),
                early: Duration::from_secs(10),
            },
            scale: case.scales.then_some(ScaleRules {
                min: 0,
                max: 3,
                window: Duration::from_secs(20),
            }),
            seed: 1,
        };
        let pool = PoolRules {
            lease_limit: case.lease_limit,
            health_interval: case.passes.then_some(Duration::from_secs(15)),
            lease_deadline: Some(Duration::from_secs(1_000)),
            lease_idle: Some(Duration::from_secs(300)),
        };
        Self {
            ledger: Ledger::new(pool, case.sizes.iter().map(rules)),
            now: Instant::now(),
            vms: BTreeMap::new(),
            checks: BTreeMap::new(),
            verdicts: BTreeSet::new(),
            kills: BTreeSet::new(),
            asked: BTreeSet::new(),
            waiters: BTreeMap::new(),
            tickets: BTreeSet::new(),
            spent: BTreeSet::new(),
            nudged: false,
            next: 1,
            made: 0,
            lease_limit: case.lease_limit,
            profiles: case.sizes.len(),
            bursts: case.bursts,
            passes: case.passes,
        }
    }

    /// A full pool with as many leases of the first profile out as the limit allows.
    pub(super) fn busy(case: &Case) -> Self {
        let mut world = Self::running(case);
        world.boot_all();
        for _ in 0..case.lease_limit {
            world.step(Step::Take(ProfileId(0)));
            world.step(Step::Act);
            world.boot_all();
        }
        assert_eq!(world.ledger.leased(), case.lease_limit);
        world
    }

    fn boot_all(&mut self) {
        let booting = |(_, place): &(ProfileId, Place)| matches!(place, Place::Booting { .. });
        while let Some(id) = self
            .vms
            .iter()
            .find_map(|(id, vm)| booting(vm).then_some(*id))
        {
            self.step(Step::Tell(Event::Booted(id)));
        }
    }

    pub(super) fn made(&self) -> usize {
        self.made
    }

    /// Whether the periodic health-check round holds a VM.
    pub(super) fn is_in_periodic_pass(&self) -> bool {
        let mut stages = self.ledger.entries.values().map(|entry| entry.stage);
        stages.any(|stage| {
            matches!(
                stage,
                Stage::Checking {
                    pass: PassId::PERIODIC,
                    ..
                }
            )
        })
    }

    /// Makes a step, carries out the ledger's actions and checks the invariants.
    pub(super) fn step(&mut self, step: Step) {
        match step {
            Step::Take(profile) => {
                let spare = self.spare_leases();
                if let Ok(id) = self.ledger.take(self.now, profile) {
                    assert!(spare > 0, "a newcomer overtakes callers who wait");
                    self.hand_out(id, profile, None);
                }
                self.nudged = true;
            }
            Step::TakeMany(profile, count) => {
                let spare = self.spare_leases();
                let before = self.ledger.counts(profile);
                match self.ledger.take_many(self.now, profile, count) {
                    Ok(ids) => {
                        assert_eq!(ids.len(), count);
                        assert!(spare >= count, "newcomers overtake callers who wait");
                        for id in ids {
                            self.hand_out(id, profile, None);
                        }
                    }
                    Err(_) => {
                        let after = self.ledger.counts(profile);
                        let taken = (before.parked(), before.leased);
                        assert_eq!((after.parked(), after.leased), taken, "not whole");
                    }
                }
                self.nudged = true;
            }
            Step::Wait(waiter, among) => self.line_up(waiter, among),
            Step::Act => self.act_on_nudge(),
            Step::Sleep => {
                if let Some(at) = self.ledger.wake_at(self.now) {
                    self.now = self.now.max(at);
                }
                self.tell(Event::Tick);
                let next = self.ledger.wake_at(self.now);
                assert!(next.is_none_or(|at| at > self.now), "never sleeps again");
            }
            Step::Tell(event) => self.tell(event),
        }
        self.check_invariants();
    }

    fn tell(&mut self, event: Event) {
        if self.nudged && !is_told_by_callers(event) {
            // The event comes through the actor, which first makes the step that it was woken for.
            self.act_on_nudge();
        }
        self.prepare(event);
        let actions = if is_noted(event) {
            self.nudged = true;
            self.ledger.note(self.now, event)
        } else {
            self.nudged = false;
            self.ledger.apply(self.now, event)
        };
        for action in actions {
            self.act(action);
        }
    }

    fn line_up(&mut self, waiter: WaiterId, among: Among) {
        self.next += u64::from(waiter.0 == self.next);
        for (_, place) in self.vms.values_mut() {
            if matches!(place, Place::Lease { waiter: Some((other, _)) } if *other == waiter) {
                // The caller waits again; its dead VM is being returned.
                *place = Place::Lease { waiter: None };
            }
        }
        let running = self.ledger.phase() == Phase::Running;
        let may_serve = |of: &ProfileId| running && self.ledger.counts(*of).wanted() > 0;
        let lines = among.all().filter(may_serve).collect();
        self.waiters.insert(waiter, (among, lines));
        self.nudged = false;
        let profiles: Vec<_> = among.all().collect();
        for action in self.ledger.line_up(self.now, waiter, &profiles) {
            self.act(action);
        }
    }

    /// The number of callers that wait for `profile`.
    fn waiting(&self, profile: ProfileId) -> usize {
        let all = self.waiters.values();
        all.filter(|(_, lines)| lines.contains(&profile)).count()
    }

    fn act_on_nudge(&mut self) {
        self.nudged = false;
        for action in self.ledger.apply(self.now, Event::Tick) {
            self.act(action);
        }
    }

    /// Free leases, less those due to waiting callers whose VMs are ready.
    fn spare_leases(&self) -> usize {
        let owed = (0..self.profiles).map(ProfileId).map(|profile| {
            let parked = self.ledger.counts(profile).parked();
            self.waiting(profile).min(parked)
        });
        let free = self.lease_limit.saturating_sub(self.ledger.leased());
        free.saturating_sub(owed.sum())
    }

    /// Updates the model with the outside change that `event` reports.
    fn prepare(&mut self, event: Event) {
        match event {
            Event::Drain(profile) | Event::Resize(profile, 0) => {
                for (_, lines) in self.waiters.values_mut() {
                    lines.remove(&profile);
                }
            }
            Event::Stop(_) => {
                for (_, lines) in self.waiters.values_mut() {
                    lines.clear();
                }
            }
            Event::Leave(waiter) => {
                self.waiters.remove(&waiter);
            }
            Event::Replenish(_, ticket) | Event::Offer(_, ticket) => {
                self.next += 1;
                self.tickets.insert(ticket);
            }
            Event::Forget(ticket) => {
                self.tickets.remove(&ticket);
            }
            Event::Booted(id) | Event::BootFailed(id, true) => self.put(id, Place::Slot),
            Event::BootFailed(id, false) | Event::Denied(id) => self.put(id, Place::Unmade),
            Event::Returned(id) => {
                self.spent.insert(id);
                self.put(id, Place::Slot);
            }
            Event::Untouched(id) => self.put(id, Place::Slot),
            Event::Ended(id) => {
                self.spent.insert(id);
            }
            Event::Checked(id, check, healthy) => {
                self.verdicts.remove(&(id, check));
                // If not, the VM was handed out meanwhile: the verdict is outdated.
                if self.checks.get(&id) == Some(&check) {
                    self.checks.remove(&id);
                    if !healthy {
                        self.spent.insert(id);
                    }
                }
            }
            Event::Killed(id) => {
                self.kills.remove(&id);
                self.spent.insert(id);
            }
            Event::Active(id) | Event::Idle(id) => {
                self.asked.remove(&id);
            }
            Event::Withdrawn(id) => {
                self.vms.remove(&id);
            }
            _ => {}
        }
    }

    fn place(&self, id: VmId) -> Option<Place> {
        self.vms.get(&id).map(|(_, place)| *place)
    }

    fn put(&mut self, id: VmId, place: Place) {
        if let Some((_, old)) = self.vms.get_mut(&id) {
            *old = place;
        }
    }

    fn hand_out(&mut self, id: VmId, profile: ProfileId, waiter: Option<(WaiterId, Among)>) {
        assert_eq!(self.place(id), Some(Place::Slot), "{id} is not parked");
        let owner = self.vms.get(&id).map(|(owner, _)| *owner);
        assert_eq!(owner, Some(profile), "{id} is of another profile");
        assert!(!self.spent.contains(&id), "{id} is handed out used or dead");
        self.checks.remove(&id);
        self.put(id, Place::Lease { waiter });
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Boot(profile, id) => {
                let before = self.vms.values().filter(|(owner, place)| {
                    *owner == profile && matches!(place, Place::Booting { .. })
                });
                let permits = policy::concurrent_boots(self.ledger.counts(profile).size, 50);
                let before = before.count();
                assert!(before < permits, "more boots than permits");
                let open = self.ledger.counts(profile).breaker_open;
                assert!(
                    !open || before == 0,
                    "more than one while the breaker is open"
                );
                self.made += 1;
                let fresh = self
                    .vms
                    .insert(id, (profile, Place::Booting { cancelled: false }));
                assert!(fresh.is_none());
            }
            Action::Join(profile, id, ticket) => {
                assert!(self.tickets.contains(&ticket));
                self.made += 1;
                self.vms
                    .insert(id, (profile, Place::Joining { cancelled: false }));
            }
            Action::CancelBoot(id) => match self.place(id) {
                Some(Place::Booting { cancelled: false }) => {
                    self.put(id, Place::Booting { cancelled: true });
                }
                Some(Place::Joining { cancelled: false }) => {
                    self.put(id, Place::Joining { cancelled: true });
                }
                other => panic!("{id} is told to end its boot: {other:?}"),
            },
            Action::Park(id) => assert_eq!(self.place(id), Some(Place::Slot)),
            Action::Check(_, id, check, _) => {
                assert_eq!(self.place(id), Some(Place::Slot));
                self.checks.insert(id, check);
                self.verdicts.insert((id, check));
            }
            Action::Serve(profile, waiter, id) => {
                let Some((among, lines)) = self.waiters.remove(&waiter) else {
                    panic!("{waiter:?} is served and does not wait");
                };
                assert!(lines.contains(&profile), "{waiter:?} waits for others");
                let mut earlier = self.waiters.range(..waiter);
                let earlier = earlier.any(|(_, (_, lines))| lines.contains(&profile));
                assert!(!earlier, "served out of order");
                self.hand_out(id, profile, Some((waiter, among)));
            }
            Action::Reject(waiter, _) => {
                let left = self.waiters.remove(&waiter).map(|(_, lines)| lines);
                assert_eq!(left, Some(BTreeSet::new()), "another may serve {waiter:?}");
            }
            Action::Settle(ticket, outcome) => {
                // The caller may have gone; the request is settled at most once.
                self.tickets.remove(&ticket);
                if let Outcome::Booted(id) = outcome {
                    assert!(matches!(
                        self.place(id),
                        Some(Place::Slot | Place::Lease { waiter: Some(_) })
                    ));
                }
            }
            Action::Retire(id) => {
                assert_eq!(self.place(id), Some(Place::Slot), "{id} is destroyed twice");
                self.checks.remove(&id);
                self.spent.insert(id);
                self.put(id, Place::Retiring);
            }
            Action::Drop(id) => match self.vms.remove(&id).map(|(_, place)| place) {
                None | Some(Place::Unmade | Place::Retiring) => {}
                // A stopping pool leaves a killed VM with its caller.
                Some(Place::Lease { .. }) => {
                    assert!(self.spent.contains(&id), "{id} is left alive");
                    assert!(matches!(
                        self.ledger.phase(),
                        Phase::Stopping | Phase::Stopped
                    ));
                }
                Some(place) => panic!("{id} is lost: {place:?}"),
            },
            Action::Kill(id, _) => {
                assert!(matches!(self.place(id), Some(Place::Lease { .. })));
                self.kills.insert(id);
            }
            Action::AskIdle(id) => {
                self.asked.insert(id);
            }
            Action::Resized(..) => {}
            Action::Stopped => assert!(self.vms.is_empty(), "stopped with {:?}", self.vms),
        }
    }
}
