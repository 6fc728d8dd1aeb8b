//! One health check of one VM: a limited number of probes with growing, jittered waits between
//! them.

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;
use tokio::time::{Instant, sleep, timeout};

use crate::backend::ProbeError;
use crate::config::HealthConfig;
use crate::ledger::breaker::{Jitter, doubled};

/// The limits of a check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CheckRules {
    attempts: u32,
    backoff_min: Duration,
    backoff_max: Duration,
    ping_timeout: Duration,
}

impl CheckRules {
    pub(crate) fn new(config: &HealthConfig, time_scale: u32) -> Self {
        Self {
            attempts: config.attempts,
            backoff_min: Duration::from_millis(config.backoff_min_ms),
            backoff_max: Duration::from_millis(config.backoff_max_ms),
            ping_timeout: Duration::from_millis(config.ping_timeout_ms).saturating_mul(time_scale),
        }
    }

    /// Returns a random wait between `backoff_min` and a bound that doubles with each attempt, up
    /// to `backoff_max`.
    fn wait(&self, attempt: u32, jitter: &mut Jitter) -> Duration {
        jitter.between(
            self.backoff_min,
            doubled(self.backoff_min, attempt, self.backoff_max),
        )
    }
}

/// Probes a VM until a probe succeeds, a probe fails for good, or all attempts are used up. Each
/// call of `probe` begins one; it returns none if the VM is no longer in its slot. A backend that
/// panics fails the check.
///
/// Returns how long the successful probe took.
pub(crate) async fn check<P>(
    rules: CheckRules,
    probe: impl FnMut() -> Option<P>,
) -> Result<Duration, ProbeError>
where
    P: Future<Output = Result<(), ProbeError>>,
{
    AssertUnwindSafe(attempts(rules, probe))
        .catch_unwind()
        .await
        .unwrap_or(Err(ProbeError::Wrong("the probe panicked")))
}

async fn attempts<P>(
    rules: CheckRules,
    mut probe: impl FnMut() -> Option<P>,
) -> Result<Duration, ProbeError>
where
    P: Future<Output = Result<(), ProbeError>>,
{
    let mut jitter = Jitter::new(RandomState::new().hash_one(0));
    let mut last = ProbeError::Lost;
    for attempt in 1..=rules.attempts {
        let Some(answer) = probe() else {
            return Err(ProbeError::Dead);
        };
        let began = Instant::now();
        match timeout(rules.ping_timeout, answer).await {
            Ok(Ok(())) => return Ok(began.elapsed()),
            Ok(Err(error)) if !error.is_transient() => return Err(error),
            Ok(Err(error)) => last = error,
            Err(_) => last = ProbeError::TimedOut(rules.ping_timeout),
        }
        if attempt < rules.attempts {
            sleep(rules.wait(attempt, &mut jitter)).await;
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use super::*;

    fn rules() -> CheckRules {
        CheckRules::new(&HealthConfig::default(), 1)
    }

    #[tokio::test(start_paused = true)]
    async fn one_lost_ping_is_retried_three_are_not() {
        for (lost, attempts, healthy) in [(0, 1, true), (1, 2, true), (2, 3, true), (3, 3, false)] {
            let mut asked = 0;
            let verdict = check(rules(), || {
                asked += 1;
                Some(ready(if asked > lost {
                    Ok(())
                } else {
                    Err(ProbeError::Lost)
                }))
            })
            .await;
            assert_eq!((verdict.is_ok(), asked), (healthy, attempts));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_answer_is_not_retried() {
        let mut asked = 0;
        let verdict = check(rules(), || {
            asked += 1;
            Some(ready(Err(ProbeError::Wrong("nonce"))))
        })
        .await;
        assert_eq!((verdict, asked), (Err(ProbeError::Wrong("nonce")), 1));
    }

    #[tokio::test]
    async fn a_probe_that_panics_proves_nothing() {
        let lazy = check(rules(), || {
            Some(async { std::panic::resume_unwind(Box::new(())) })
        });
        let eager = check(rules(), || -> Option<std::future::Ready<_>> {
            std::panic::resume_unwind(Box::new(()))
        });
        for verdict in [lazy.await, eager.await] {
            assert_eq!(verdict, Err(ProbeError::Wrong("the probe panicked")));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_takes_three_timeouts_and_two_waits() {
        let began = Instant::now();
        let verdict = check(rules(), || Some(std::future::pending())).await;
        assert_eq!(verdict, Err(ProbeError::TimedOut(Duration::from_secs(5))));
        let took = began.elapsed();
        let (least, most) = (Duration::from_millis(15_200), Duration::from_millis(15_700));
        assert!((least..=most).contains(&took), "{took:?}");
    }

    #[test]
    fn waits_are_jittered_between_the_bounds_and_grow() {
        let mut jitter = Jitter::new(3);
        for attempt in 1..40 {
            let wait = rules().wait(attempt, &mut jitter);
            let bounds = Duration::from_millis(100)..=Duration::from_millis(2_000);
            assert!(bounds.contains(&wait), "{attempt}: {wait:?}");
        }
        let longest = |attempt| {
            let mut jitter = Jitter::new(5);
            (0..200)
                .map(|_| rules().wait(attempt, &mut jitter))
                .max()
                .unwrap()
        };
        assert!(longest(1) <= Duration::from_millis(200));
        assert!(longest(5) > Duration::from_millis(1_500));
    }
}
