//! How each event changes the ledger.

use tokio::time::Instant;

use super::event::{Action, Event, Outcome, Overdue, Refusal, Shortage};
use super::{Hold, Ledger, Limit, Origin, PassId, Phase, ProfileId, Stage, TicketId, WaiterId};
use crate::slot::VmId;

impl Ledger {
    pub(super) fn take_in(&mut self, now: Instant, event: Event) {
        match event {
            Event::Start => {
                if self.phase == Phase::Stopped {
                    self.phase = Phase::Starting;
                    self.started = true;
                    self.stop_at = None;
                    self.past_stop = false;
                    // A new start retries boots, whatever failed before.
                    self.books
                        .iter_mut()
                        .for_each(|book| book.breaker.succeeded());
                }
            }
            Event::Run => self.run(now),
            Event::Stop(by) => self.stop(by),
            Event::Replenish(profile, ticket) => self.replenish(profile, ticket),
            Event::Offer(profile, ticket) => self.offer(profile, ticket),
            Event::Forget(ticket) => self.forget(ticket),
            Event::Booted(id) => self.booted(now, id),
            Event::BootFailed(id, has_vm) => self.boot_failed(now, id, has_vm),
            Event::Denied(id) => self.denied(id),
            Event::CapacityFreed => self.books.iter_mut().for_each(|book| book.denied = false),
            Event::Leave(waiter) => self.leave(waiter),
            Event::Returned(id) => self.returned(id),
            Event::Untouched(id) => self.untouched(now, id),
            Event::Withdrawn(id) => {
                if matches!(self.stage(id), Some(Stage::Leased(_))) {
                    self.shift(id, None);
                }
            }
            Event::Ended(id) => match self.stage(id) {
                Some(Stage::Ready | Stage::Checking { .. }) => self.died(now, id),
                Some(Stage::Leased(Hold::Held)) => self.shift(id, Some(Stage::Leased(Hold::Dead))),
                _ => {}
            },
            Event::BeginCheck(profile, most, pass) => self.begin_check(profile, most, pass),
            Event::Checked(id, check, healthy) => self.checked(now, id, check, healthy),
            Event::AbandonPass(pass) => self.abandon(pass),
            Event::Retired(id) => {
                if self.stage(id) == Some(Stage::Retiring) {
                    self.shift(id, None);
                }
            }
            Event::Killed(id) => {
                if self.stage(id) == Some(Stage::Leased(Hold::Ending)) {
                    // After the deadline of a stop the lease keeps the handle of an ended VM that
                    // the pool no longer waits for.
                    let husk = Stage::Leased(Hold::Ended);
                    self.shift(id, (!self.past_stop).then_some(husk));
                }
            }
            Event::Active(id) => {
                if let (Some(Stage::Leased(Hold::Held | Hold::Dead)), Some(longest)) =
                    (self.stage(id), self.rules.lease_idle)
                {
                    self.dues.set(id, Limit::Idle, now + longest);
                }
            }
            Event::Idle(id) => self.kill(id, Overdue::Idle),
            Event::Resize(profile, size) => {
                if let Some(book) = self.books.get_mut(profile.0) {
                    book.size = size;
                }
                self.shrink(profile);
                if size == 0 {
                    // With size 0 the waiting callers would never be served.
                    self.reject_all(profile, Refusal::Exhausted(Shortage::NoSize));
                }
            }
            Event::Drain(profile) => self.drain(profile),
            Event::Undrain(profile) => self.undrain(now, profile),
            Event::Pressure(pressed) => self.pressed = pressed,
            Event::Tick => self.tick(now),
        }
    }

    fn run(&mut self, now: Instant) {
        if self.phase != Phase::Starting {
            return;
        }
        self.phase = Phase::Running;
        self.next_pass_at = self.rules.health_interval.map(|every| now + every);
        for book in &mut self.books {
            let parked = book.parked();
            if let Some(scale) = &mut book.scale {
                scale.begin(now, parked);
            }
        }
    }

    fn stop(&mut self, by: Instant) {
        if self.phase == Phase::Stopped {
            return;
        }
        self.phase = Phase::Stopping;
        self.next_pass_at = None;
        self.stop_at = Some(self.stop_at.map_or(by, |at| at.min(by)));
        for profile in (0..self.books.len()).map(ProfileId) {
            self.turn_away(profile, Refusal::Stopping, Outcome::Stopping);
            self.empty(profile, 0);
        }
    }

    fn drain(&mut self, profile: ProfileId) {
        if let Some(book) = self.books.get_mut(profile.0) {
            book.draining = true;
        }
        self.turn_away(profile, Refusal::Draining, Outcome::Full);
        self.empty(profile, 0);
    }

    fn undrain(&mut self, now: Instant, profile: ProfileId) {
        if let Some(book) = self.books.get_mut(profile.0)
            && book.draining
        {
            book.draining = false;
            let parked = book.parked();
            if let Some(scale) = &mut book.scale {
                scale.begin(now, parked);
            }
        }
    }

    fn turn_away(&mut self, profile: ProfileId, refusal: Refusal, outcome: Outcome) {
        self.reject_all(profile, refusal);
        let Some(book) = self.books.get_mut(profile.0) else {
            return;
        };
        self.out.extend(
            book.tickets
                .drain(..)
                .map(|ticket| Action::Settle(ticket, outcome)),
        );
    }

    fn replenish(&mut self, profile: ProfileId, ticket: TicketId) {
        let open = matches!(self.phase, Phase::Starting | Phase::Running);
        match self.books.get_mut(profile.0).filter(|_| open) {
            Some(book) => book.tickets.push_back(ticket),
            None => self.out.push(Action::Settle(ticket, Outcome::Stopping)),
        }
    }

    fn offer(&mut self, profile: ProfileId, ticket: TicketId) {
        let open = matches!(self.phase, Phase::Starting | Phase::Running);
        match self.books.get(profile.0).filter(|_| open) {
            None => self.out.push(Action::Settle(ticket, Outcome::Stopping)),
            Some(book) if !book.has_room() => self.out.push(Action::Settle(ticket, Outcome::Full)),
            Some(_) => self.begin_boot(profile, Origin::Offer(ticket)),
        }
    }

    fn forget(&mut self, ticket: TicketId) {
        for book in &mut self.books {
            book.tickets.retain(|other| *other != ticket);
        }
        let boot = self.books.iter().flat_map(|book| &book.booting);
        let boot = boot
            .filter(|(_, origin)| origin.ticket() == Some(ticket))
            .map(|(id, _)| *id);
        if let Some(id) = boot.min() {
            self.cancel_boot(id);
        }
    }

    fn cancel_boot(&mut self, id: VmId) {
        if let Some(Stage::Booting {
            origin,
            cancelled: false,
        }) = self.stage(id)
        {
            self.shift(
                id,
                Some(Stage::Booting {
                    origin,
                    cancelled: true,
                }),
            );
            self.out.push(Action::CancelBoot(id));
        }
    }

    fn booted(&mut self, now: Instant, id: VmId) {
        let Some(Stage::Booting { origin, cancelled }) = self.stage(id) else {
            return;
        };
        if cancelled {
            self.settle(origin, self.given_up());
            self.retire(id);
            return;
        }
        self.shift(id, Some(Stage::Ready));
        if origin.holds_permit()
            && let Some(entry) = self.entries.get_mut(&id)
            && let Some(book) = self.books.get_mut(entry.profile.0)
        {
            entry.born = Some(now);
            book.boots = book.boots.saturating_add(1);
            book.breaker.booted(now);
        }
        self.settle(origin, Outcome::Booted(id));
    }

    fn boot_failed(&mut self, now: Instant, id: VmId, has_vm: bool) {
        let Some(Stage::Booting { origin, cancelled }) = self.stage(id) else {
            return;
        };
        if !cancelled
            && origin.holds_permit()
            && let Some(book) = self.book_of(id)
        {
            book.boot_failures = book.boot_failures.saturating_add(1);
            book.breaker.failed(now);
        }
        self.settle(
            origin,
            if cancelled {
                self.given_up()
            } else {
                Outcome::Failed(id)
            },
        );
        if has_vm {
            self.retire(id);
        } else {
            self.shift(id, None);
        }
    }

    fn denied(&mut self, id: VmId) {
        let Some(Stage::Booting { origin, .. }) = self.stage(id) else {
            return;
        };
        if let Some(book) = self.book_of(id) {
            book.denied = true;
            let refused = u64::from(origin.holds_permit());
            book.boot_failures = book.boot_failures.saturating_add(refused);
        }
        // The refused profile is the first to boot when capacity is freed.
        self.turn = self.entries.get(&id).map_or(0, |entry| entry.profile.0);
        self.settle(origin, Outcome::Denied(id));
        self.shift(id, None);
    }

    /// The outcome for the request of a cancelled boot.
    fn given_up(&self) -> Outcome {
        if self.phase == Phase::Stopping {
            Outcome::Stopping
        } else {
            Outcome::Full
        }
    }

    fn settle(&mut self, origin: Origin, outcome: Outcome) {
        if let Some(ticket) = origin.ticket() {
            self.out.push(Action::Settle(ticket, outcome));
        }
    }

    /// Puts a waiter into the queues of the profiles that may serve it. If none may, it is refused
    /// for the reason of the first.
    pub(super) fn wait(&mut self, waiter: WaiterId, profiles: &[ProfileId]) {
        let mut refusal = None;
        for profile in profiles {
            match (self.hopeless(*profile), self.books.get_mut(profile.0)) {
                (None, Some(book)) => {
                    book.waiters.insert(waiter);
                }
                (why, _) => refusal = refusal.or(why),
            }
        }
        self.reject(waiter, refusal.unwrap_or(Refusal::Draining));
    }

    pub(super) fn leave(&mut self, waiter: WaiterId) {
        for book in &mut self.books {
            book.waiters.remove(&waiter);
        }
    }

    /// Refuses a caller, unless another profile may still serve it.
    fn reject(&mut self, waiter: WaiterId, refusal: Refusal) {
        if !self.books.iter().any(|book| book.waiters.contains(&waiter)) {
            self.out.push(Action::Reject(waiter, refusal));
        }
    }

    fn reject_all(&mut self, profile: ProfileId, refusal: Refusal) {
        if let Some(book) = self.books.get_mut(profile.0) {
            for waiter in std::mem::take(&mut book.waiters) {
                self.reject(waiter, refusal);
            }
        }
    }

    fn returned(&mut self, id: VmId) {
        let Some(Stage::Leased(hold)) = self.stage(id) else {
            return;
        };
        if hold == Hold::Held
            && let Some(entry) = self.entries.get(&id)
            && let (Some(born), Some(book)) = (entry.born, self.books.get_mut(entry.profile.0))
        {
            book.breaker.proved(born);
        }
        self.retire(id);
    }

    /// Handles a VM that ended, or failed a check, before it was used.
    fn died(&mut self, now: Instant, id: VmId) {
        if let Some(entry) = self.entries.get(&id)
            && let (Some(born), Some(book)) = (entry.born, self.books.get_mut(entry.profile.0))
        {
            book.breaker.died(now, born);
        }
        self.retire(id);
    }

    fn untouched(&mut self, now: Instant, id: VmId) {
        if let (Some(Stage::Leased(_)), Some(book)) = (self.stage(id), self.book_of(id)) {
            // The caller was not served after all.
            book.hits = book.hits.saturating_sub(1);
        }
        match self.stage(id) {
            Some(Stage::Leased(Hold::Held)) => {}
            Some(Stage::Leased(Hold::Dead)) => return self.died(now, id),
            _ => return self.returned(id),
        }
        let Some(profile) = self.entries.get(&id).map(|entry| entry.profile) else {
            return;
        };
        let Some(book) = self.books.get(profile.0) else {
            return;
        };
        let serving = self.phase == Phase::Running && !book.draining;
        if serving && !book.has_room() {
            // Its place is being refilled: an existing VM is preferred to one that boots.
            self.give_up_a_boot(profile);
        }
        if serving && self.books.get(profile.0).is_some_and(super::Book::has_room) {
            self.shift(id, Some(Stage::Ready));
        } else {
            self.retire(id);
        }
    }

    /// Cancels the youngest boot, preferably one of the refill's. If it was requested, its request
    /// goes back to the head of the queue; if it is an offer, it is answered `Full` (or `Stopping`)
    /// when it ends.
    fn give_up_a_boot(&mut self, profile: ProfileId) -> bool {
        let Some(book) = self.books.get(profile.0) else {
            return false;
        };
        let newest = |own: bool| {
            let mut boots = book.booting.iter().rev();
            boots.find(|(_, origin)| (**origin == Origin::Refill) == own)
        };
        let Some((id, origin)) = newest(true).or_else(|| newest(false)) else {
            return false;
        };
        let (id, origin) = (*id, *origin);
        if let Origin::Ticket(ticket) = origin {
            // The boot no longer belongs to the request, which goes back to the head of its queue.
            self.shift(
                id,
                Some(Stage::Booting {
                    origin: Origin::Refill,
                    cancelled: false,
                }),
            );
            if let Some(book) = self.books.get_mut(profile.0) {
                book.tickets.push_front(ticket);
            }
        }
        self.cancel_boot(id);
        true
    }

    pub(super) fn shrink(&mut self, profile: ProfileId) {
        let target = self.books.get(profile.0).map_or(0, super::Book::target);
        self.empty(profile, target);
    }

    /// Leaves at most `target` VMs: cancels boots first, then retires the VMs checked longest ago.
    fn empty(&mut self, profile: ProfileId, target: usize) {
        while let Some(book) = self.books.get(profile.0)
            && book.occupied() > target
        {
            let oldest = book
                .ready
                .front()
                .or_else(|| book.checking.keys().next())
                .copied();
            if self.give_up_a_boot(profile) {
                continue;
            }
            let Some(id) = oldest else { return };
            self.retire(id);
        }
        if self.phase == Phase::Stopping {
            self.turn_away(profile, Refusal::Stopping, Outcome::Stopping);
        }
    }

    pub(super) fn begin_check(&mut self, profile: ProfileId, most: usize, pass: PassId) {
        if self.phase != Phase::Running {
            return;
        }
        for _ in 0..most {
            let oldest = self
                .books
                .get(profile.0)
                .and_then(|book| book.ready.front().copied());
            let Some(id) = oldest else { return };
            let check = self.next_check;
            self.next_check = self.next_check.saturating_add(1);
            self.shift(id, Some(Stage::Checking { check, pass }));
            self.out.push(Action::Check(profile, id, check, pass));
        }
    }

    fn checked(&mut self, now: Instant, id: VmId, check: u64, healthy: bool) {
        match self.stage(id) {
            Some(Stage::Checking { check: current, .. }) if current == check => {
                if healthy {
                    self.shift(id, Some(Stage::Ready));
                } else {
                    self.died(now, id);
                }
            }
            // The VM was handed out or destroyed since: the verdict is outdated.
            _ => {}
        }
    }

    fn abandon(&mut self, pass: PassId) {
        let held = |stage: Stage| matches!(stage, Stage::Checking { pass: p, .. } if p == pass);
        let held: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, e)| held(e.stage))
            .map(|(id, _)| *id)
            .collect();
        held.into_iter().for_each(|id| self.retire(id));
    }

    pub(super) fn kill(&mut self, id: VmId, why: Overdue) {
        if matches!(self.stage(id), Some(Stage::Leased(Hold::Held | Hold::Dead))) {
            self.shift(id, Some(Stage::Leased(Hold::Ending)));
            self.out.push(Action::Kill(id, why));
        }
    }

    pub(super) fn book_of(&mut self, id: VmId) -> Option<&mut super::Book> {
        let profile = self.entries.get(&id)?.profile;
        self.books.get_mut(profile.0)
    }
}
