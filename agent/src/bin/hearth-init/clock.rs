//! The guest's clocks.

use core::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// A time of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instant(Duration);

impl Instant {
    pub(crate) fn now() -> Self {
        Self(duration(clock_gettime(ClockId::Monotonic)))
    }

    pub(crate) fn checked_add(self, time: Duration) -> Option<Self> {
        self.0.checked_add(time).map(Self)
    }

    pub(crate) fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Returns the wall clock: CLOCK_REALTIME, since 1970.
pub(crate) fn since_epoch() -> Duration {
    duration(clock_gettime(ClockId::Realtime))
}

/// Returns CLOCK_BOOTTIME in microseconds.
pub(crate) fn uptime_us() -> u64 {
    u64::try_from(duration(clock_gettime(ClockId::Boottime)).as_micros()).unwrap_or(u64::MAX)
}

/// Sleeps for `time`, also across interrupting signals.
pub(crate) fn sleep(time: Duration) {
    let Ok(mut left) = Timespec::try_from(time) else {
        return;
    };
    while let rustix::thread::NanosleepRelativeResult::Interrupted(rest) =
        rustix::thread::nanosleep(&left)
    {
        left = rest;
    }
}

fn duration(time: Timespec) -> Duration {
    Duration::try_from(time).unwrap_or_default()
}
