//! Deadlines from timeouts of any length.

use std::time::Duration;

use tokio::time::Instant;

/// 30 years: in effect never, but within the range of every clock.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// Returns `now` plus `patience`, which is capped at 30 years so that the sum cannot overflow.
pub(crate) fn after(now: Instant, patience: Duration) -> Instant {
    now + patience.min(FAR)
}
