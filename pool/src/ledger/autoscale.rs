//! Moves the size of a pool between bounds with demand.
//!
//! The rule, applied at the end of each window:
//! - callers missed `m > 0` VMs that were not ready: grow by `m`, at most to twice the size;
//! - no caller missed any and at least `l > 0` VMs were ready all the time: shrink by half of `l`,
//!   rounded up;
//! - otherwise: stay.
//!
//! Callers that more warm VMs would not have helped do not count as demand (the limit on leases,
//! the host's limits, a profile that is drained, a pool that does not run).
//!
//! The size thus grows at once with a burst that exceeded it, and shrinks slowly when VMs are not
//! needed.

use std::time::Duration;

use tokio::time::Instant;

/// Bounds and window of the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ScaleRules {
    /// Smallest size.
    pub min: usize,
    /// Largest size.
    pub max: usize,
    /// How long demand is observed before the size moves.
    pub window: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scale {
    rules: ScaleRules,
    ends: Option<Instant>,
    misses: usize,
    low: usize,
}

impl Scale {
    pub(crate) fn new(rules: ScaleRules) -> Self {
        Self {
            rules,
            ends: None,
            misses: 0,
            low: 0,
        }
    }

    /// Begins a window with `ready` VMs.
    pub(crate) fn begin(&mut self, now: Instant, ready: usize) {
        self.ends = Some(now + self.rules.window);
        self.misses = 0;
        self.low = ready;
    }

    pub(crate) fn ends(&self) -> Option<Instant> {
        self.ends
    }

    pub(crate) fn missed(&mut self, vms: usize) {
        self.misses = self.misses.saturating_add(vms);
    }

    pub(crate) fn saw_ready(&mut self, ready: usize) {
        self.low = self.low.min(ready);
    }

    /// Returns the new size, if the window is over, and begins the next window.
    pub(crate) fn decide(&mut self, now: Instant, size: usize, ready: usize) -> Option<usize> {
        if self.ends.is_none_or(|ends| now < ends) {
            return None;
        }
        let next = if self.misses > 0 {
            size.saturating_add(self.misses.min(size.max(1)))
        } else {
            size.saturating_sub(self.low.div_ceil(2))
        };
        self.begin(now, ready);
        Some(next.clamp(self.rules.min, self.rules.max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_with_misses_shrinks_with_idle_stock_and_keeps_its_bounds() {
        let rules = ScaleRules {
            min: 2,
            max: 10,
            window: Duration::from_secs(10),
        };
        let mut scale = Scale::new(rules);
        let mut now = Instant::now();
        scale.begin(now, 4);
        assert_eq!(scale.decide(now, 4, 4), None, "the window is not over");
        scale.missed(1);
        scale.missed(2);
        now += rules.window;
        assert_eq!(scale.decide(now, 4, 4), Some(7));
        scale.missed(100);
        now += rules.window;
        assert_eq!(
            scale.decide(now, 7, 7),
            Some(10),
            "at most twice, at most max"
        );
        now += rules.window;
        assert_eq!(
            scale.decide(now, 10, 10),
            Some(6),
            "seven were never needed: four go"
        );
        scale.saw_ready(0);
        now += rules.window;
        assert_eq!(
            scale.decide(now, 6, 6),
            Some(6),
            "all were needed once: stay"
        );
        now += rules.window;
        assert_eq!(scale.decide(now, 3, 3), Some(2), "not below min");
    }
}
