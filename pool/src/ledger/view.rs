//! Read-only views of a ledger.

use tokio::time::Instant;

use super::{Hold, Ledger, Phase, ProfileId, Shortage, Stage, autoscale};
use crate::slot::VmId;

/// Counts of one profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// VMs to keep warm (not lowered by a drain).
    pub size: usize,
    /// Parked and not under check.
    pub ready: usize,
    /// Under check.
    pub checking: usize,
    /// Booting, or offered and under their first check.
    pub booting: usize,
    /// With callers.
    pub leased: usize,
    /// Being destroyed.
    pub retiring: usize,
    /// Waiting callers.
    pub waiting: usize,
    /// Callers served, ever, without those that went away before they took their VM.
    pub hits: u64,
    /// Times a caller found no VM ready, ever.
    pub misses: u64,
    /// Boots that succeeded, ever.
    pub boots: u64,
    /// Boots that failed or that the host's limits refused, ever.
    pub boot_failures: u64,
    /// Boots that failed, or whose VMs died early, since the last that succeeded.
    pub failures_in_a_row: u32,
    /// Whether the breaker is open.
    pub breaker_open: bool,
    /// Whether the profile is being drained.
    pub draining: bool,
}

impl Counts {
    /// Parked, under check or not.
    #[must_use]
    pub fn parked(&self) -> usize {
        self.ready + self.checking
    }

    /// VMs to keep warm now: none while draining.
    #[must_use]
    pub fn wanted(&self) -> usize {
        if self.draining { 0 } else { self.size }
    }
}

impl Ledger {
    /// All parked VMs of `profile`, under check or not.
    pub fn parked(&self, profile: ProfileId) -> impl Iterator<Item = VmId> + '_ {
        let books = self.books.get(profile.0).into_iter();
        books.flat_map(|book| book.ready.iter().chain(book.checking.keys()).copied())
    }

    /// The phase of the pool.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// When the next event must be applied at the latest (a tick if there is no other).
    #[must_use]
    pub fn wake_at(&self, now: Instant) -> Option<Instant> {
        if self.phase == Phase::Stopped {
            return None;
        }
        let limit = self.dues.first();
        let books = self.books.iter().flat_map(|book| {
            let retry = book
                .breaker
                .waits_until(now)
                .filter(|_| book.refill && book.has_room());
            // Demand is not measured while the profile is drained.
            let scale = book.scale.as_ref().filter(|_| !book.draining);
            [retry, scale.and_then(autoscale::Scale::ends)]
        });
        let running = self.phase == Phase::Running;
        let proofs = self.proofs().map(|(at, ..)| at);
        let books = books.flatten().chain(proofs).filter(|_| running);
        let books = books.min();
        let pass = self.next_pass_at.filter(|_| running);
        let stop = self.stop_at.filter(|at| now < *at);
        [limit, books, pass, stop].into_iter().flatten().min()
    }

    /// Parked VMs that will prove that boots succeed again: at which time, their profile, and when
    /// they were booted.
    pub(super) fn proofs(&self) -> impl Iterator<Item = (Instant, ProfileId, Instant)> + '_ {
        let suspect = self.books.iter().any(|book| book.breaker.is_suspect());
        let entries = self.entries.values().filter(move |_| suspect);
        entries.filter_map(|entry| {
            let parked = matches!(entry.stage, Stage::Ready | Stage::Checking { .. });
            let book = self.books.get(entry.profile.0).filter(|_| parked)?;
            let at = book.breaker.proves_at(entry.born?)?;
            Some((at, entry.profile, entry.born?))
        })
    }

    /// Whether a boot would begin if the host were not short of memory.
    #[must_use]
    pub fn is_hungry(&self, now: Instant) -> bool {
        self.phase == Phase::Running && self.books.iter().any(|book| book.may_refill(now))
    }

    /// Whether every profile holds as many VMs as it should.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.books.iter().all(|book| book.parked() >= book.target())
    }

    /// Number of leases out.
    #[must_use]
    pub fn leased(&self) -> usize {
        self.leased
    }

    /// Why a caller of `profile` would find no VM ready.
    #[must_use]
    pub fn shortage(&self, now: Instant, profile: ProfileId) -> Shortage {
        if self.leased >= self.rules.lease_limit {
            return Shortage::LeaseLimit(self.rules.lease_limit);
        }
        self.books
            .get(profile.0)
            .map_or(Shortage::Empty, |book| book.shortage(now, self.pressed))
    }

    /// Counts of `profile`; zeros if there is none.
    #[must_use]
    pub fn counts(&self, profile: ProfileId) -> Counts {
        self.books
            .get(profile.0)
            .map_or_else(Counts::default, |book| Counts {
                size: book.size,
                ready: book.ready.len(),
                checking: book.checking.len(),
                booting: book.booting.len(),
                leased: book.leased,
                retiring: book.retiring,
                waiting: book.waiters.len(),
                hits: book.hits,
                misses: book.misses,
                boots: book.boots,
                boot_failures: book.boot_failures,
                failures_in_a_row: book.breaker.failures(),
                breaker_open: book.breaker.is_open(),
                draining: book.draining,
            })
    }

    /// Whether the profile has no VM in any state, boots and destructions that have not ended
    /// included.
    #[must_use]
    pub fn is_vacant(&self, profile: ProfileId) -> bool {
        self.books.get(profile.0).is_none_or(|book| book.vms == 0)
    }

    /// Whether the VM boots (or, offered, is under its first check) and was not cancelled.
    #[must_use]
    pub fn is_booting(&self, id: VmId) -> bool {
        let stage = self.stage(id);
        matches!(stage, Some(Stage::Booting { cancelled, .. }) if !cancelled)
    }

    /// Whether the VM is parked and not under check.
    #[must_use]
    pub fn is_ready(&self, id: VmId) -> bool {
        self.entries
            .get(&id)
            .is_some_and(|entry| entry.stage == Stage::Ready)
    }

    /// Whether the VM is parked, under check or not.
    #[must_use]
    pub fn is_parked(&self, id: VmId) -> bool {
        matches!(self.stage(id), Some(Stage::Ready | Stage::Checking { .. }))
    }

    /// Whether the VM is parked or with a caller.
    #[must_use]
    pub fn is_kept(&self, id: VmId) -> bool {
        self.is_parked(id) || matches!(self.stage(id), Some(Stage::Leased(_)))
    }

    /// Whether the pool ends leases that are idle for long.
    #[must_use]
    pub fn ends_idle_leases(&self) -> bool {
        self.rules.lease_idle.is_some()
    }

    /// Whether the VM is with a caller and not ended by the pool.
    #[must_use]
    pub fn is_leased(&self, id: VmId) -> bool {
        matches!(self.stage(id), Some(Stage::Leased(hold)) if hold != Hold::Ended)
    }

    /// Whether the VM is under the check with this number.
    #[must_use]
    pub fn is_checking(&self, id: VmId, check: u64) -> bool {
        matches!(self.stage(id), Some(Stage::Checking { check: current, .. }) if current == check)
    }
}
