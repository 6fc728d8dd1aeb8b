//! Changes that time causes: limits of leases, health-check rounds, breaker proofs, autoscaling.

use tokio::time::Instant;

use super::event::{Action, Overdue};
use super::{Ledger, Limit, PassId, Phase, ProfileId};

impl Ledger {
    pub(super) fn tick(&mut self, now: Instant) {
        while let Some((id, limit)) = self.dues.pop(now) {
            match limit {
                Limit::Deadline => self.kill(id, Overdue::Deadline),
                Limit::Idle => self.out.push(Action::AskIdle(id)),
            }
        }
        if self.phase != Phase::Running {
            return;
        }
        while let Some((profile, born)) = self.proof(now)
            && let Some(book) = self.books.get_mut(profile.0)
        {
            book.breaker.proved(born);
        }
        if let (Some(at), Some(every)) = (self.next_pass_at, self.rules.health_interval)
            && at <= now
        {
            self.next_pass_at = Some(now + every);
            for profile in (0..self.books.len()).map(ProfileId) {
                let all = self.books.get(profile.0).map_or(0, |book| book.ready.len());
                self.begin_check(profile, all, PassId::PERIODIC);
            }
        }
        for profile in (0..self.books.len()).map(ProfileId) {
            let Some(book) = self.books.get_mut(profile.0) else {
                return;
            };
            let (size, parked) = (book.size, book.parked());
            let scale = book.scale.as_mut().filter(|_| !book.draining);
            if let Some(next) = scale.and_then(|scale| scale.decide(now, size, parked))
                && next != size
            {
                book.size = next;
                self.out.push(Action::Resized(profile, next));
                self.shrink(profile);
            }
        }
    }

    /// Finds a parked VM that has lived long enough to prove that boots succeed again; returns its
    /// profile and when it was booted.
    fn proof(&self, now: Instant) -> Option<(ProfileId, Instant)> {
        let mut proofs = self.proofs();
        proofs.find_map(|(at, profile, born)| (at <= now).then_some((profile, born)))
    }
}
