//! The policy of a pool as a value: it receives events and returns the actions to carry out.
//!
//! It never reads a clock, spawns, waits or logs, so every rule of the pool can be tested by
//! calling it: at random against its invariants, and exhaustively for small cases.
//!
//! ```text
//!             Booted                    take / Serve              Returned
//!  Booting ------------> Ready <-----------------------> Leased -----------> Retiring --> (gone)
//!     |                  |   ^ \         Untouched         |                  ^
//!     | BootFailed       |   |  +------- Ended, Resize ----|------------------+
//!     v          Check   v   | healthy                     | Withdrawn        | unhealthy
//!   (gone)             Checking ---------------------------|------------------+
//!                        +---------------- take ---------->+--> (gone, the caller's)
//! ```
//!
//! Invariants, at every moment and for each profile:
//! - ready + checking + booting <= size (0 while draining);
//! - boots that hold a permit <= the permits of the size, cancelled ones that have not ended
//!   included;
//! - no caller waits while a VM is ready and a lease is free; waiters are served in order of
//!   arrival;
//! - leases <= the limit;
//! - a VM is in exactly one state, and leaves `Leased` only for `Retiring`, for the caller's
//!   ownership or, if untouched, for `Ready`.

mod autoscale;
mod book;
pub(crate) mod breaker;
mod dues;
mod event;
mod reconcile;
mod steps;
#[cfg(test)]
mod tests;
mod time;
mod view;
#[cfg(test)]
mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

pub use autoscale::ScaleRules;
use book::Book;
pub use book::Rules;
pub use breaker::BreakerRules;
use dues::{Dues, Limit};
pub use event::{Action, Event, Outcome, Overdue, Refusal, Shortage};
pub use view::Counts;

use crate::slot::VmId;

/// A profile, by its place in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProfileId(pub usize);

/// A waiting caller; a smaller number came earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WaiterId(pub u64);

/// A request for one boot, or an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TicketId(pub u64);

/// A health-check round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PassId(pub u64);

impl PassId {
    /// The periodic round, which the pool makes by itself.
    pub const PERIODIC: Self = Self(0);
}

/// The phase of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Nothing runs.
    Stopped,
    /// First boots; no caller is served yet.
    Starting,
    /// In service.
    Running,
    /// Being emptied.
    Stopping,
}

/// Why a boot was begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Origin {
    Refill,
    Ticket(TicketId),
    Offer(TicketId),
}

impl Origin {
    fn holds_permit(self) -> bool {
        !matches!(self, Self::Offer(_))
    }

    fn ticket(self) -> Option<TicketId> {
        match self {
            Self::Refill => None,
            Self::Ticket(ticket) | Self::Offer(ticket) => Some(ticket),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stage {
    Booting { origin: Origin, cancelled: bool },
    Ready,
    Checking { check: u64, pass: PassId },
    Leased(Hold),
    Retiring,
}

/// Sub-state of a leased VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Hold {
    /// The VM is the caller's.
    Held,
    /// The VM has ended by itself: it is destroyed when it is returned, picked up or not.
    Dead,
    /// The pool is ending the VM.
    Ending,
    /// The pool has ended the VM; the lease is still out.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Entry {
    profile: ProfileId,
    stage: Stage,
    /// When the VM was booted; none if it was offered or is still booting.
    born: Option<Instant>,
}

/// Rules of the pool as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolRules {
    /// Most leases at a time.
    pub lease_limit: usize,
    /// Time between health-check rounds; none: no periodic rounds.
    pub health_interval: Option<Duration>,
    /// Longest lease.
    pub lease_deadline: Option<Duration>,
    /// Longest time that a lease may go unused.
    pub lease_idle: Option<Duration>,
}

/// See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ledger {
    rules: PoolRules,
    phase: Phase,
    books: Vec<Book>,
    entries: BTreeMap<VmId, Entry>,
    leased: usize,
    pressed: bool,
    /// The profile at which the next refill begins.
    turn: usize,
    next_vm: u64,
    next_check: u64,
    next_pass_at: Option<Instant>,
    stop_at: Option<Instant>,
    /// Whether the deadline of the stop has passed: leases are then ended, and not waited for once
    /// their VMs have ended.
    past_stop: bool,
    /// Whether the pool was ever started.
    started: bool,
    dues: Dues,
    /// VMs that became ready in this step.
    fresh: Vec<VmId>,
    out: Vec<Action>,
}

impl Ledger {
    /// The ledger of a stopped pool with these profiles, in this order.
    #[must_use]
    pub fn new(rules: PoolRules, profiles: impl IntoIterator<Item = Rules>) -> Self {
        Self {
            rules,
            phase: Phase::Stopped,
            books: profiles.into_iter().map(Book::new).collect(),
            entries: BTreeMap::new(),
            leased: 0,
            pressed: false,
            turn: 0,
            next_vm: 1,
            next_check: 1,
            next_pass_at: None,
            stop_at: None,
            past_stop: false,
            started: false,
            dues: Dues::default(),
            fresh: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Applies an event and returns all actions to carry out now, in order.
    #[must_use]
    pub fn apply(&mut self, now: Instant, event: Event) -> Vec<Action> {
        self.take_in(now, event);
        self.reconcile(now);
        std::mem::take(&mut self.out)
    }

    /// Applies an event without scheduling boots: serves waiting callers and returns the actions to
    /// carry out. Missing VMs are refilled by the next [`apply`](Self::apply). For callers other
    /// than the actor: only the actor decides on boots, after it has read the host's memory
    /// pressure.
    #[must_use]
    pub fn note(&mut self, now: Instant, event: Event) -> Vec<Action> {
        self.take_in(now, event);
        if self.phase == Phase::Running {
            // Now, because new callers may come between a return and the next `apply`.
            self.serve_waiters(now);
        }
        std::mem::take(&mut self.out)
    }

    /// Puts a waiting caller into the queue of each of `profiles` that may serve it. A caller whose
    /// VM died before it was picked up is queued again under its old number, and so in its old
    /// place. Returns the actions to carry out, as [`apply`](Self::apply) does.
    #[must_use]
    pub fn line_up(
        &mut self,
        now: Instant,
        waiter: WaiterId,
        profiles: &[ProfileId],
    ) -> Vec<Action> {
        self.wait(waiter, profiles);
        self.reconcile(now);
        std::mem::take(&mut self.out)
    }

    /// Returns the VM that [`take`](Self::take) would take.
    ///
    /// # Errors
    /// Why there is none.
    pub fn peek(&self, now: Instant, profile: ProfileId) -> Result<VmId, Refusal> {
        self.takeable(now, profile)
    }

    /// Takes the best VM of `profile` for a caller, without waiting. The next
    /// [`apply`](Self::apply) refills.
    ///
    /// # Errors
    /// Why there is none. Nothing changes but the count of misses.
    pub fn take(&mut self, now: Instant, profile: ProfileId) -> Result<VmId, Refusal> {
        match self.takeable(now, profile) {
            Ok(id) => {
                self.lease(now, id);
                Ok(id)
            }
            Err(refusal) => {
                self.missed(profile, refusal, 1);
                Err(refusal)
            }
        }
    }

    /// Takes `count` VMs, or none.
    ///
    /// # Errors
    /// As [`take`](Self::take), if there are fewer.
    pub fn take_many(
        &mut self,
        now: Instant,
        profile: ProfileId,
        count: usize,
    ) -> Result<Vec<VmId>, Refusal> {
        let refusal = match self.takeable(now, profile) {
            Err(refusal) => Some(refusal),
            Ok(_) if count > self.rules.lease_limit.saturating_sub(self.leased) => Some(
                Refusal::Exhausted(Shortage::LeaseLimit(self.rules.lease_limit)),
            ),
            Ok(_) => match self.books.get(profile.0) {
                Some(book) if count > book.parked() => {
                    Some(Refusal::Exhausted(book.shortage(now, self.pressed)))
                }
                _ => None,
            },
        };
        if let Some(refusal) = refusal {
            let parked = self.books.get(profile.0).map_or(0, Book::parked);
            self.missed(profile, refusal, count.saturating_sub(parked));
            return Err(refusal);
        }
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count {
            taken.push(self.take(now, profile)?);
        }
        Ok(taken)
    }

    /// Removes all VMs, waiting callers and requests, because the actor has ended.
    pub fn abort(&mut self) {
        self.phase = Phase::Stopped;
        self.stop_at = None;
        self.past_stop = false;
        self.next_pass_at = None;
        self.dues.clear();
        for id in self.entries.keys().copied().collect::<Vec<_>>() {
            self.shift(id, None);
        }
        for book in &mut self.books {
            book.waiters.clear();
            book.tickets.clear();
        }
        self.fresh.clear();
        self.out.clear();
    }

    fn takeable(&self, now: Instant, profile: ProfileId) -> Result<VmId, Refusal> {
        if let Some(refusal) = self.closed() {
            return Err(refusal);
        }
        let Some(book) = self.books.get(profile.0) else {
            return Err(Refusal::Exhausted(Shortage::Empty));
        };
        if book.draining {
            return Err(Refusal::Draining);
        }
        if self.leased >= self.rules.lease_limit {
            return Err(Refusal::Exhausted(Shortage::LeaseLimit(
                self.rules.lease_limit,
            )));
        }
        if !book.waiters.is_empty() {
            return Err(Refusal::Exhausted(Shortage::Queue(book.waiters.len())));
        }
        book.best()
            .ok_or_else(|| Refusal::Exhausted(book.shortage(now, self.pressed)))
    }

    /// Why no caller of `profile` would be served however long it waits; none if it may be served.
    #[must_use]
    pub fn hopeless(&self, profile: ProfileId) -> Option<Refusal> {
        let of_book = || match self.books.get(profile.0) {
            Some(book) if book.draining => Some(Refusal::Draining),
            Some(book) if book.size == 0 => Some(Refusal::Exhausted(Shortage::NoSize)),
            _ => None,
        };
        self.closed().or_else(of_book)
    }

    /// Whether [`take_many`](Self::take_many) would take `count` VMs.
    #[must_use]
    pub fn has(&self, now: Instant, profile: ProfileId, count: usize) -> bool {
        let parked = self.books.get(profile.0).map_or(0, Book::parked);
        let free = self.rules.lease_limit.saturating_sub(self.leased);
        self.takeable(now, profile).is_ok() && count <= parked.min(free)
    }

    /// Why the pool serves no caller in its present phase; none if it serves.
    fn closed(&self) -> Option<Refusal> {
        match self.phase {
            Phase::Running => None,
            Phase::Stopped if !self.started => Some(Refusal::NotStarted),
            Phase::Starting => Some(Refusal::NotStarted),
            Phase::Stopping | Phase::Stopped => Some(Refusal::Stopping),
        }
    }

    /// Records that a caller was refused for lack of `vms` VMs.
    fn missed(&mut self, profile: ProfileId, refusal: Refusal, vms: usize) {
        let Some(book) = self.books.get_mut(profile.0) else {
            return;
        };
        if refusal.is_miss() {
            book.misses = book.misses.saturating_add(1);
        }
        if let Some(scale) = &mut book.scale
            && refusal.asks_for_stock()
        {
            scale.missed(vms);
        }
    }

    fn lease(&mut self, now: Instant, id: VmId) {
        self.shift(id, Some(Stage::Leased(Hold::Held)));
        if let Some(book) = self
            .entries
            .get(&id)
            .and_then(|e| self.books.get_mut(e.profile.0))
        {
            book.hits = book.hits.saturating_add(1);
        }
        if let Some(longest) = self.rules.lease_deadline {
            self.dues.set(id, Limit::Deadline, now + longest);
        }
        if let Some(longest) = self.rules.lease_idle {
            self.dues.set(id, Limit::Idle, now + longest);
        }
    }

    fn stage(&self, id: VmId) -> Option<Stage> {
        self.entries.get(&id).map(|entry| entry.stage)
    }

    /// The only place where a VM changes its state; `None` removes the VM.
    fn shift(&mut self, id: VmId, to: Option<Stage>) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let Some(book) = self.books.get_mut(entry.profile.0) else {
            return;
        };
        book.leave(id, entry.stage);
        if matches!(entry.stage, Stage::Leased(_)) {
            self.leased -= 1;
            if to != Some(Stage::Leased(Hold::Dead)) {
                self.dues.forget(id);
            }
        }
        match to {
            Some(stage) => {
                entry.stage = stage;
                book.join(id, stage);
                self.leased += usize::from(matches!(stage, Stage::Leased(_)));
                if stage == Stage::Ready {
                    self.fresh.push(id);
                }
            }
            None => {
                self.entries.remove(&id);
                self.out.push(Action::Drop(id));
            }
        }
    }

    fn begin_boot(&mut self, profile: ProfileId, origin: Origin) {
        let id = VmId(self.next_vm);
        self.next_vm = self.next_vm.saturating_add(1);
        let stage = Stage::Booting {
            origin,
            cancelled: false,
        };
        let Some(book) = self.books.get_mut(profile.0) else {
            return;
        };
        book.join(id, stage);
        let entry = Entry {
            profile,
            stage,
            born: None,
        };
        self.entries.insert(id, entry);
        self.out.push(match origin {
            Origin::Offer(ticket) => Action::Join(profile, id, ticket),
            Origin::Refill | Origin::Ticket(_) => Action::Boot(profile, id),
        });
    }

    fn retire(&mut self, id: VmId) {
        self.shift(id, Some(Stage::Retiring));
        self.out.push(Action::Retire(id));
    }
}
