//! Reconciles the actual state of the pool with the desired one.

use tokio::time::Instant;

use super::event::{Action, Outcome, Overdue};
use super::{Hold, Ledger, Origin, Phase, ProfileId, Stage};

impl Ledger {
    /// Level-triggered: acts on the present state, not on the event that led to it.
    pub(super) fn reconcile(&mut self, now: Instant) {
        match self.phase {
            Phase::Stopped => {}
            Phase::Starting => self.serve_tickets(now),
            Phase::Running => {
                self.serve_waiters(now);
                self.serve_tickets(now);
                self.refill(now);
            }
            Phase::Stopping => self.finish(now),
        }
        for id in std::mem::take(&mut self.fresh) {
            if self.is_ready(id) {
                self.out.push(Action::Park(id));
            }
        }
    }

    pub(super) fn serve_waiters(&mut self, now: Instant) {
        while self.leased < self.rules.lease_limit {
            let served = self.books.iter().enumerate().filter_map(|(index, book)| {
                Some((*book.waiters.first()?, ProfileId(index), book.best()?))
            });
            // Over all profiles: a lease that became free goes to the caller that has waited
            // longest.
            let Some((waiter, profile, id)) = served.min() else {
                return;
            };
            self.leave(waiter);
            self.lease(now, id);
            self.out.push(Action::Serve(profile, waiter, id));
        }
    }

    fn serve_tickets(&mut self, now: Instant) {
        for profile in (0..self.books.len()).map(ProfileId) {
            while let Some(book) = self.books.get_mut(profile.0)
                && let Some(ticket) = book.tickets.front().copied()
            {
                if book.parked() >= book.target() {
                    book.tickets.pop_front();
                    self.out.push(Action::Settle(ticket, Outcome::Full));
                } else if book.breaker.is_open() && book.breaker.waits_until(now).is_some() {
                    let outcome = Outcome::BreakerOpen(book.breaker.failures());
                    book.tickets.pop_front();
                    self.out.push(Action::Settle(ticket, outcome));
                } else if self.pressed && !book.is_owed() {
                    // Only boots for waiting callers are allowed under memory pressure.
                    book.tickets.pop_front();
                    self.out.push(Action::Settle(ticket, Outcome::Pressed));
                } else if book.has_room() && book.boots_running() < book.permits_by_hand() {
                    book.tickets.pop_front();
                    self.begin_boot(profile, Origin::Ticket(ticket));
                } else {
                    break;
                }
            }
        }
    }

    fn refill(&mut self, now: Instant) {
        let (count, first) = (self.books.len(), self.turn);
        for only_owed in [true, false] {
            if self.pressed && !only_owed {
                return;
            }
            for profile in (0..count).map(|step| ProfileId((first + step) % count)) {
                while self
                    .books
                    .get(profile.0)
                    .is_some_and(|book| book.may_refill(now) && (!only_owed || book.is_owed()))
                {
                    self.begin_boot(profile, Origin::Refill);
                }
            }
        }
    }

    /// Stops when no VM is left; at the deadline ends the leases that are still out.
    fn finish(&mut self, now: Instant) {
        if !self.past_stop && self.stop_at.is_some_and(|at| at <= now) {
            self.past_stop = true;
            for id in self.entries.keys().copied().collect::<Vec<_>>() {
                match self.stage(id) {
                    Some(Stage::Leased(Hold::Held | Hold::Dead)) => {
                        self.kill(id, Overdue::Stopping);
                    }
                    // The lease keeps the handle of an ended VM; the pool no longer waits for it.
                    Some(Stage::Leased(Hold::Ended)) => self.shift(id, None),
                    _ => {}
                }
            }
        }
        if self.entries.is_empty() {
            self.phase = Phase::Stopped;
            self.stop_at = None;
            self.past_stop = false;
            self.dues.clear();
            self.out.push(Action::Stopped);
        }
    }
}
