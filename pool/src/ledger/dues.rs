//! Times at which the limits of leases are due. Setting and forgetting them takes O(log n) steps
//! for n leases: both happen under the lock that callers need.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;

use crate::slot::VmId;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Limit {
    Deadline,
    Idle,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) struct Dues {
    in_order: BTreeSet<Due>,
    of_lease: BTreeMap<(Key, Limit), Instant>,
}

/// A limit of a lease that is due; ordered by time first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Due(Instant, Key, Limit);

/// A VM's number, as the key of these maps; tests count its comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key(VmId);

impl Ord for Key {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        #[cfg(test)]
        tests::STEPS.with(|steps| steps.set(steps.get() + 1));
        self.0.cmp(&other.0)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Dues {
    /// Sets when `limit` of a lease is due. Replaces an earlier time.
    pub(super) fn set(&mut self, id: VmId, limit: Limit, at: Instant) {
        let key = Key(id);
        if let Some(before) = self.of_lease.insert((key, limit), at) {
            self.in_order.remove(&Due(before, key, limit));
        }
        self.in_order.insert(Due(at, key, limit));
    }

    pub(super) fn forget(&mut self, id: VmId) {
        for limit in [Limit::Deadline, Limit::Idle] {
            if let Some(at) = self.of_lease.remove(&(Key(id), limit)) {
                self.in_order.remove(&Due(at, Key(id), limit));
            }
        }
    }

    /// When the next limit is due.
    pub(super) fn first(&self) -> Option<Instant> {
        self.in_order.first().map(|Due(at, ..)| *at)
    }

    /// Takes the limit that has been due longest, if any is due.
    pub(super) fn pop(&mut self, now: Instant) -> Option<(VmId, Limit)> {
        let Due(_, key, limit) = *self.in_order.first().filter(|Due(at, ..)| *at <= now)?;
        self.in_order.pop_first();
        self.of_lease.remove(&(key, limit));
        Some((key.0, limit))
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::super::{BreakerRules, Event, Ledger, PoolRules, ProfileId, Rules};
    use super::*;

    thread_local! {
        /// Comparisons of this thread.
        pub(super) static STEPS: Cell<u64> = const { Cell::new(0) };
    }

    /// A ledger with `count` leases out.
    fn leased(count: usize) -> (Ledger, Vec<VmId>) {
        let breaker = BreakerRules {
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(1),
            failures: 5,
            cooldown: Duration::from_secs(1),
            cooldown_max: Duration::from_secs(1),
            early: Duration::ZERO,
        };
        let rules = Rules {
            size: count,
            boots_percent: 100,
            refill: true,
            breaker,
            scale: None,
            seed: 1,
        };
        let pool = PoolRules {
            lease_limit: count,
            health_interval: None,
            lease_deadline: Some(Duration::from_secs(60)),
            lease_idle: Some(Duration::from_secs(30)),
        };
        let mut ledger = Ledger::new(pool, [rules]);
        let now = Instant::now();
        let _ = ledger.apply(now, Event::Start);
        let boots = ledger.apply(now, Event::Run);
        assert_eq!(boots.len(), count);
        for number in 1..=count {
            let id = VmId(u64::try_from(number).unwrap());
            let _ = ledger.apply(now, Event::Booted(id));
        }
        let leases = ledger.take_many(now, ProfileId(0), count).unwrap();
        (ledger, leases)
    }

    fn steps_of(run: impl FnOnce()) -> u64 {
        let before = STEPS.get();
        run();
        STEPS.get() - before
    }

    #[test]
    fn a_lease_is_given_back_in_a_logarithm_of_steps_whatever_the_order() {
        for backwards in [false, true] {
            let (mut ledger, mut leases) = leased(8_000);
            if backwards {
                leases.reverse();
            }
            assert_eq!(ledger.dues.in_order.len(), 16_000);
            let now = Instant::now();
            let steps = steps_of(|| {
                for id in &leases {
                    let _ = ledger.note(now, Event::Returned(*id));
                }
            });
            assert!(ledger.dues.in_order.is_empty() && ledger.dues.of_lease.is_empty());
            // Two limits in two trees, each of at most 2^14 keys and 11 keys per node.
            let most = 4 * 8_000 * 11 * 5;
            assert!((8_000..most).contains(&steps), "{steps}");
        }
    }

    #[test]
    fn what_is_set_again_is_due_once_and_what_is_forgotten_never() {
        let mut dues = Dues::default();
        let now = Instant::now();
        let at = |secs| now + Duration::from_secs(secs);
        dues.set(VmId(1), Limit::Idle, at(1));
        dues.set(VmId(1), Limit::Idle, at(3));
        dues.set(VmId(1), Limit::Deadline, at(2));
        dues.set(VmId(2), Limit::Deadline, at(1));
        dues.forget(VmId(2));
        assert_eq!(dues.first(), Some(at(2)));
        assert_eq!(dues.pop(at(1)), None);
        assert_eq!(dues.pop(at(3)), Some((VmId(1), Limit::Deadline)));
        assert_eq!(dues.pop(at(3)), Some((VmId(1), Limit::Idle)));
        assert_eq!((dues.pop(at(9)), dues.first()), (None, None));
    }
}
