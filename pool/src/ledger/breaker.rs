//! When failed boots may be retried: backoff first, then a circuit breaker.
//!
//! ```text
//!            failure                     failures in a row reach the limit
//!  Closed ------------> Closed, waits ---------------------------------------> Open, waits
//!    ^                                                                           |   ^
//!    |  success                                                     wait is over |   | failure,
//!    +------------------------------------------------------------- Half open <--+   | waits twice
//!                                                                   (one boot) ------+ as long
//! ```
//!
//! A boot is no success if its VM ends right away. Such an early death counts as a failure (without
//! a wait: the VM is replaced at once). From the first early death on, a boot is a success only
//! when its VM has outlived that time or was used. A half-open breaker waits for this after its
//! boot.

use std::time::Duration;

use tokio::time::Instant;

/// The limits of a profile's backoff and circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BreakerRules {
    /// Shortest wait after a failure.
    pub backoff_min: Duration,
    /// Longest wait while closed.
    pub backoff_max: Duration,
    /// Failures in a row that open the breaker.
    pub failures: u32,
    /// First wait of an open breaker; doubles with each failure that follows.
    pub cooldown: Duration,
    /// Longest wait.
    pub cooldown_max: Duration,
    /// Time after its boot within which the end of a VM that was never leased is an early death;
    /// zero: never.
    pub early: Duration,
}

/// The record of one profile's boots.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Breaker {
    rules: BreakerRules,
    /// Failures since the last success.
    failures: u32,
    /// Times that the breaker opened since the last success.
    trips: u32,
    until: Option<Instant>,
    /// Time of the first early death since the last success.
    suspect: Option<Instant>,
    /// Whether a half-open breaker waits for the VM of its boot to prove itself.
    on_trial: bool,
    jitter: Jitter,
}

impl Breaker {
    pub(crate) fn new(rules: BreakerRules, seed: u64) -> Self {
        Self {
            rules,
            failures: 0,
            trips: 0,
            until: None,
            suspect: None,
            on_trial: false,
            jitter: Jitter::new(seed),
        }
    }

    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }

    pub(crate) fn is_open(&self) -> bool {
        self.trips > 0
    }

    /// When the present wait ends; none if there is no wait.
    pub(crate) fn waits_until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|until| now < *until)
    }

    /// How many boots may run: `normal`, or fewer while the breaker is open or waits.
    pub(crate) fn permits(&self, now: Instant, normal: usize) -> usize {
        if self.waits_until(now).is_some() {
            0
        } else if self.is_open() {
            normal.min(1)
        } else {
            normal
        }
    }

    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
        self.trips = 0;
        self.until = None;
        self.suspect = None;
        self.on_trial = false;
    }

    /// Records that a boot ended and made a VM.
    pub(crate) fn booted(&mut self, now: Instant) {
        if self.suspect.is_none() {
            self.succeeded();
        } else if self.is_open() {
            self.on_trial = true;
            self.until = Some(now + self.rules.early);
        }
    }

    /// Records that a VM made at `born` was used, or has lived long enough.
    pub(crate) fn proved(&mut self, born: Instant) {
        if self.suspect.is_some_and(|since| since <= born) {
            self.succeeded();
        }
    }

    /// Whether there were early deaths since the last success.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect.is_some()
    }

    /// When a VM made at `born` has lived long enough to count as a success; none if there were no
    /// early deaths before `born`.
    pub(crate) fn proves_at(&self, born: Instant) -> Option<Instant> {
        let suspect = self.suspect.filter(|since| *since <= born);
        suspect.map(|_| born + self.rules.early)
    }

    /// Records that a VM made at `born` ended, or failed a check, before it was used.
    pub(crate) fn died(&mut self, now: Instant, born: Instant) {
        if now < born + self.rules.early {
            self.suspect.get_or_insert(now);
            self.count(now, false);
        }
    }

    pub(crate) fn failed(&mut self, now: Instant) {
        self.count(now, true);
    }

    fn count(&mut self, now: Instant, backs_off: bool) {
        self.failures = self.failures.saturating_add(1);
        if self.is_open() && self.waits_until(now).is_some() && !self.on_trial {
            // The boot began before the breaker opened: its failure does not extend the wait.
            return;
        }
        self.on_trial = false;
        if self.is_open() || self.failures >= self.rules.failures {
            self.trips = self.trips.saturating_add(1);
            let cooldown = doubled(self.rules.cooldown, self.trips - 1, self.rules.cooldown_max);
            self.until = Some(now + cooldown);
        } else if backs_off {
            let longest = doubled(
                self.rules.backoff_min,
                self.failures,
                self.rules.backoff_max,
            );
            self.until = Some(now + self.jitter.between(self.rules.backoff_min, longest));
        }
    }
}

/// `base x 2^times`, at most `max`.
pub(crate) fn doubled(base: Duration, times: u32, max: Duration) -> Duration {
    let factor = 1_u32.checked_shl(times).unwrap_or(u32::MAX);
    base.saturating_mul(factor).min(max)
}

/// A small random generator (xorshift64*): it spreads retries and decides nothing that matters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Jitter(u64);

impl Jitter {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Uniform between `low` and `high`, both included; `low` if `high` is smaller.
    pub(crate) fn between(&mut self, low: Duration, high: Duration) -> Duration {
        let span = high.saturating_sub(low).as_micros();
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = u128::from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)) % (span + 1);
        low + Duration::from_micros(u64::try_from(drawn).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: BreakerRules = BreakerRules {
        backoff_min: Duration::from_millis(200),
        backoff_max: Duration::from_secs(10),
        failures: 3,
        cooldown: Duration::from_secs(30),
        cooldown_max: Duration::from_secs(100),
        early: Duration::from_secs(2),
    };

    #[test]
    fn backs_off_then_opens_then_lets_one_try_and_recovers() {
        let start = Instant::now();
        let mut breaker = Breaker::new(RULES, 7);
        assert_eq!(breaker.permits(start, 4), 4);
        breaker.failed(start);
        let wait = breaker.waits_until(start).unwrap() - start;
        assert!(
            (RULES.backoff_min..=RULES.backoff_min * 2).contains(&wait),
            "{wait:?}"
        );
        assert_eq!(breaker.permits(start, 4), 0);
        assert_eq!(breaker.permits(start + wait, 4), 4);

        breaker.failed(start);
        assert!(!breaker.is_open());
        breaker.failed(start);
        assert!(breaker.is_open());
        let mut now = start;
        for seconds in [30, 60, 100, 100] {
            assert_eq!(
                breaker.waits_until(now),
                Some(now + Duration::from_secs(seconds))
            );
            breaker.failed(now); // a late one changes nothing
            now += Duration::from_secs(seconds);
            assert_eq!(breaker.permits(now, 4), 1);
            breaker.failed(now);
        }
        breaker.succeeded();
        assert!(!breaker.is_open());
        assert_eq!(breaker.permits(now, 4), 4);
    }

    #[test]
    fn early_deaths_open_it_and_only_a_vm_that_proves_itself_closes_it() {
        let second = Duration::from_secs(1);
        let mut now = Instant::now();
        let mut breaker = Breaker::new(RULES, 7);
        for died in 1..=3 {
            breaker.booted(now);
            assert_eq!(breaker.permits(now, 4), 4, "replaced at once");
            breaker.died(now + second, now);
            assert_eq!(breaker.failures(), died);
            now += second;
        }
        assert_eq!(
            breaker.waits_until(now),
            Some(now + Duration::from_secs(30))
        );
        now += Duration::from_secs(30);
        assert_eq!(breaker.permits(now, 4), 1);
        breaker.booted(now);
        assert_eq!(breaker.permits(now, 4), 0, "on trial");
        breaker.died(now + second, now);
        now += second;
        assert_eq!(
            breaker.waits_until(now),
            Some(now + Duration::from_secs(60))
        );
        now += Duration::from_secs(60);
        breaker.booted(now);
        assert_eq!(breaker.proves_at(now), Some(now + RULES.early));
        breaker.proved(now);
        assert!(!breaker.is_open());
        assert_eq!((breaker.failures(), breaker.permits(now, 4)), (0, 4));
        breaker.died(now + RULES.early, now);
        assert_eq!(breaker.failures(), 0, "old enough");
    }

    #[test]
    fn jitter_stays_between_its_bounds() {
        let mut jitter = Jitter::new(0);
        let (low, high) = (Duration::from_millis(100), Duration::from_millis(400));
        let drawn: Vec<_> = (0..1000).map(|_| jitter.between(low, high)).collect();
        assert!(drawn.iter().all(|wait| (low..=high).contains(wait)));
        assert!(
            drawn
                .iter()
                .any(|wait| *wait < low + Duration::from_millis(30))
        );
        assert!(
            drawn
                .iter()
                .any(|wait| *wait > high - Duration::from_millis(30))
        );
        assert_eq!(jitter.between(high, low), high);
    }
}
