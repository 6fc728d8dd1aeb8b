//! Points in time that callers choose, however far away.

use std::time::Duration;

use tokio::time::Instant;

/// As good as never, and still a point in time that every clock can tell.
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// `patience` from `now`; far in the future if that is beyond what can be told.
pub(crate) fn after(now: Instant, patience: Duration) -> Instant {
    now + patience.min(FAR)
}
