//! How a metric grows with the swept parameter: a line through medians, with a bootstrap confidence
//! interval.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::stats::{SplitMix, median, quantile};

/// Resamples of the bootstrap.
const RESAMPLES: usize = 1000;
/// Growth over the whole sweep, as a share of the first median, up to which a metric counts as
/// flat.
const LEAST_GROWTH: f64 = 0.05;

/// The line of one metric of one side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// The scenario.
    pub scenario: String,
    /// What was measured.
    pub metric: String,
    /// Its unit.
    pub unit: String,
    /// The side that was measured.
    pub side: String,
    /// Unit of the swept parameter: MiB, vCPU, VM.
    pub per: String,
    /// Value and median of each point.
    pub points: Vec<[f64; 2]>,
    /// The metric where the swept parameter is zero.
    pub base: f64,
    /// Growth of the metric for each unit of the swept parameter.
    pub slope: f64,
    /// 95 % confidence interval of the slope.
    pub ci95: [f64; 2],
}

impl Fit {
    /// Fits a line to samples at each value; `None` for fewer than two values.
    #[must_use]
    pub fn of(points: &[(f64, &[f64])]) -> Option<Self> {
        let medians = |of: &dyn Fn(&[f64]) -> Vec<f64>| -> Vec<[f64; 2]> {
            let points = points.iter();
            points.map(|(at, all)| [*at, median(&of(all))]).collect()
        };
        let seen = medians(&|samples| samples.to_vec());
        let (base, slope) = line(&seen)?;
        let random = std::cell::RefCell::new(SplitMix::new());
        let mut slopes: Vec<f64> = (0..RESAMPLES)
            .filter_map(|_| line(&medians(&|samples| random.borrow_mut().resample(samples))))
            .map(|(_, slope)| slope)
            .collect();
        slopes.sort_by(f64::total_cmp);
        let ci95 = [quantile(&slopes, 0.025)?, quantile(&slopes, 0.975)?];
        Some(Self {
            scenario: String::new(),
            metric: String::new(),
            unit: String::new(),
            side: String::new(),
            per: String::new(),
            points: seen,
            base,
            slope,
            ci95,
        })
    }

    /// Whether no growth of the metric was seen: the slope's interval includes zero, or it grows by
    /// at most 5 % over the sweep.
    #[must_use]
    pub fn is_flat(&self) -> bool {
        let [low, high] = self.ci95;
        let (Some([from, first]), Some([to, _])) = (self.points.first(), self.points.last()) else {
            return true;
        };
        (low <= 0.0 && high >= 0.0)
            || (self.slope * (to - from)).abs() <= LEAST_GROWTH * first.abs()
    }
}

/// Returns the intercept and the slope of the least-squares line through the points.
fn line(points: &[[f64; 2]]) -> Option<(f64, f64)> {
    let n = points.len() as f64;
    let mean = |of: usize| points.iter().filter_map(|point| point.get(of)).sum::<f64>() / n;
    let (x, y) = (mean(0), mean(1));
    let spread: f64 = points.iter().map(|[at, _]| (at - x).powi(2)).sum();
    let both = points.iter().map(|[at, is]| (at - x) * (is - y));
    let slope = both.sum::<f64>() / spread;
    // One value has no slope.
    (spread > 0.0).then_some((y - slope * x, slope))
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            scenario,
            metric,
            unit,
            side,
            per,
            base,
            slope,
            ci95: [low, high],
            ..
        } = self;
        let verdict = if self.is_flat() { "flat" } else { "grows" };
        let verdict = if *slope < 0.0 && !self.is_flat() {
            "falls"
        } else {
            verdict
        };
        write!(
            f,
            "{scenario} {metric} ({side}) {verdict}: {base:.1} {unit} and {slope:.4} per {per} \
             (95 % {low:.4} to {high:.4})"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noisy(at: f64, around: f64) -> (f64, Vec<f64>) {
        let noise = (0..25).map(|i| f64::from(i % 5) - 2.0);
        (at, noise.map(|noise| around + noise).collect())
    }

    fn fit(points: &[(f64, Vec<f64>)]) -> Fit {
        let points: Vec<(f64, &[f64])> = points.iter().map(|(at, all)| (*at, &all[..])).collect();
        Fit::of(&points).unwrap()
    }

    #[test]
    fn growth_is_seen_and_its_rate_covered() {
        let fit = fit(&[128.0, 256.0, 512.0].map(|at| noisy(at, 100.0 + 0.5 * at)));
        assert!((fit.slope - 0.5).abs() < 0.01 && (fit.base - 100.0).abs() < 2.0);
        assert!(fit.ci95[0] <= 0.5 && 0.5 <= fit.ci95[1], "{:?}", fit.ci95);
        assert!(!fit.is_flat());
        assert!(fit.to_string().contains("grows"));
    }

    #[test]
    fn what_does_not_grow_is_flat() {
        let flat = fit(&[1.0, 2.0, 4.0].map(|at| noisy(at, 100.0)));
        assert!(flat.is_flat(), "{flat}");
        // A certain growth, but too small to matter.
        let little = fit(&[1.0, 2.0, 4.0].map(|at| noisy(at, 100_000.0 + 10.0 * at)));
        assert!(little.is_flat(), "{little}");
        let falls = fit(&[1.0, 2.0, 4.0].map(|at| noisy(at, 100.0 - 10.0 * at)));
        assert!(falls.to_string().contains("falls"), "{falls}");
    }

    #[test]
    fn one_value_gives_no_line() {
        assert_eq!(Fit::of(&[(1.0, &[1.0, 2.0])]), None);
        assert_eq!(Fit::of(&[(1.0, &[1.0]), (1.0, &[2.0])]), None);
        assert_eq!(Fit::of(&[]), None);
    }
}
