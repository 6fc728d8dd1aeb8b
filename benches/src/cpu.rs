//! Processor time of this process.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Processor time of all threads of this process so far, ended ones included.
#[must_use]
pub fn process() -> Duration {
    // Processor time is never negative.
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_and_sleep_does_not() {
        let begin = process();
        while process() - begin < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        assert!(process() - begin >= Duration::from_millis(20));
    }
}
