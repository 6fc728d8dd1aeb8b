//! The invariants of the world at every moment, and the state it reaches when nothing more fails.

use super::super::{Event, Phase, ProfileId};
use super::{Place, Step, World};

impl World {
    pub(super) fn check_invariants(&self) {
        let mut leased = 0;
        for profile in (0..self.profiles).map(ProfileId) {
            let counts = self.ledger.counts(profile);
            let target = if counts.draining { 0 } else { counts.size };
            let occupied = counts.ready + counts.checking + counts.booting;
            assert!(occupied <= target, "over-full: {counts:?}");
            leased += counts.leased;
            let running = self.ledger.phase() == Phase::Running && !counts.draining;
            let waiting = self.waiting(profile);
            assert_eq!(counts.waiting, waiting);
            if running && waiting > 0 && self.ledger.leased() < self.lease_limit {
                assert_eq!(
                    counts.ready + counts.checking,
                    0,
                    "someone waits beside a ready VM"
                );
            }
            let places = |wanted: fn(Place) -> bool| {
                let mine = self.vms.values().filter(|(owner, _)| *owner == profile);
                mine.filter(|(_, place)| wanted(*place)).count()
            };
            assert_eq!(
                counts.ready + counts.checking,
                places(|p| p == Place::Slot),
                "lost"
            );
            let mine = |id| self.vms.get(id).is_some_and(|(owner, _)| *owner == profile);
            let checks = self.checks.keys().filter(|id| mine(id)).count();
            assert_eq!(
                counts.checking, checks,
                "a verdict counts for its own check"
            );
            assert_eq!(places(|p| p == Place::Unmade), 0, "a failed boot stays");
            assert_eq!(counts.leased, places(|p| matches!(p, Place::Lease { .. })));
            assert_eq!(counts.retiring, places(|p| p == Place::Retiring));
            let booting = |place| {
                matches!(
                    place,
                    Place::Booting { cancelled: false } | Place::Joining { cancelled: false }
                )
            };
            assert_eq!(counts.booting, places(booting));
        }
        let hopeless = self.waiters.values().any(|(_, lines)| lines.is_empty());
        assert!(!hopeless, "a caller waits for nobody");
        assert_eq!(leased, self.ledger.leased());
        assert!(leased <= self.lease_limit);
    }

    /// Checks that, if nothing fails from here on, every deficit heals, every request is settled,
    /// every caller is served, and a stopping pool stops.
    pub(in super::super) fn heals(mut self) {
        self.step(Step::Tell(Event::CapacityFreed));
        self.step(Step::Tell(Event::Pressure(false)));
        if self.ledger.phase() == Phase::Starting {
            self.step(Step::Tell(Event::Run));
        }
        for _ in 0..400 {
            let done = self.vms.iter().find_map(|(id, (_, place))| match place {
                Place::Booting { .. } | Place::Joining { .. } => Some(Event::Booted(*id)),
                Place::Lease { .. } => Some(Event::Returned(*id)),
                Place::Retiring => Some(Event::Retired(*id)),
                Place::Unmade | Place::Slot => None,
            });
            let check = self.verdicts.first();
            let done = done.or(check.map(|(id, check)| Event::Checked(*id, *check, true)));
            let done = done.or(self.asked.first().map(|id| Event::Idle(*id)));
            let done = done.or(self.kills.first().map(|id| Event::Killed(*id)));
            match done {
                Some(event) => self.step(Step::Tell(event)),
                // Periodic rounds never end.
                None if self.passes && self.is_well() => break,
                None if self.ledger.wake_at(self.now).is_some() => self.step(Step::Sleep),
                None => break,
            }
        }
        match self.ledger.phase() {
            Phase::Running => {
                assert!(
                    self.tickets.is_empty(),
                    "a ticket is never settled: {self:?}"
                );
                for profile in (0..self.profiles).map(ProfileId) {
                    let counts = self.ledger.counts(profile);
                    let target = if counts.draining { 0 } else { counts.size };
                    if self.refills() {
                        assert_eq!(counts.ready, target, "a deficit is permanent: {self:?}");
                        assert_eq!(counts.waiting, 0, "never served: {self:?}");
                    }
                }
            }
            phase => assert_eq!(phase, Phase::Stopped, "{self:?}"),
        }
    }

    fn is_well(&self) -> bool {
        // Callers of a profile that should hold no VMs wait until they go away.
        let mut lines = self.waiters.values().flat_map(|(_, lines)| lines);
        let served = lines.all(|profile| self.ledger.counts(*profile).wanted() == 0);
        let settled = served && self.tickets.is_empty();
        settled && self.ledger.phase() == Phase::Running && self.ledger.is_full()
    }

    fn refills(&self) -> bool {
        self.ledger.books.iter().all(|book| book.refill)
    }
}
