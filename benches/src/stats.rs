//! Summaries of samples, and ratios with a bootstrap confidence interval.

use serde::{Deserialize, Serialize};

/// Fewest samples of each side for a ratio.
pub const MIN_SAMPLES: usize = 10;
/// A confidence interval whose upper end is more than this many times its lower end is refused: the
/// machine was too noisy.
pub const MOST_SPREAD: f64 = 2.0;
/// Resamples of the bootstrap.
const RESAMPLES: usize = 2000;

/// Order statistics of one metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of samples.
    pub n: usize,
    /// Smallest.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Summary {
    /// Summarises samples; `None` if there are none.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        Some(Self {
            n: sorted.len(),
            min: *sorted.first()?,
            p50: quantile(&sorted, 0.50)?,
            p95: quantile(&sorted, 0.95)?,
            p99: quantile(&sorted, 0.99)?,
            max: *sorted.last()?,
        })
    }
}

/// A ratio of medians.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Median of side A over median of side B.
    pub ratio: f64,
    /// 95 % confidence interval of the ratio.
    pub ci95: [f64; 2],
    /// Samples of the smaller side.
    pub n: usize,
}

impl Ratio {
    /// Returns the ratio of the medians of `a` and `b`, or the reason why it would mean nothing.
    ///
    /// # Errors
    /// Fewer than [`MIN_SAMPLES`] on a side, a median of zero, or an interval wider than
    /// [`MOST_SPREAD`].
    pub fn of(a: &[f64], b: &[f64]) -> Result<Self, String> {
        let n = a.len().min(b.len());
        if n < MIN_SAMPLES {
            return Err(format!(
                "{n} samples on a side; a ratio needs {MIN_SAMPLES}"
            ));
        }
        if median(b) <= 0.0 {
            return Err("the other side's median is zero".into());
        }
        let mut random = SplitMix::new();
        let mut ratios: Vec<f64> = (0..RESAMPLES)
            .map(|_| median(&random.resample(a)) / median(&random.resample(b)))
            .collect();
        ratios.sort_by(f64::total_cmp);
        let bound = |q| quantile(&ratios, q).unwrap_or(f64::NAN);
        let [low, high] = [bound(0.025), bound(0.975)];
        // A rate may have a median of zero in a resample: then a bound may be zero, infinite or no
        // number.
        if !(low > 0.0 && high <= low * MOST_SPREAD) {
            return Err(format!(
                "too noisy: the ratio lies between {low:.3} and {high:.3}"
            ));
        }
        Ok(Self {
            ratio: median(a) / median(b),
            ci95: [low, high],
            n,
        })
    }
}

/// Returns how often chance alone sets the medians of two samples as far apart as they are, between
/// 1/2,001 and 1: a two-sided permutation test over 2,000 random divisions of all samples.
#[must_use]
pub fn chance(a: &[f64], b: &[f64]) -> f64 {
    let apart = |a: &[f64], b: &[f64]| (median(a) - median(b)).abs();
    let seen = apart(a, b);
    let mut all = [a, b].concat();
    let mut random = SplitMix::new();
    let as_far = (0..RESAMPLES).filter(|_| {
        random.shuffle(&mut all);
        let (a, b) = all.split_at(a.len());
        apart(a, b) >= seen
    });
    // The division as measured counts as one of them.
    (as_far.count() + 1) as f64 / (RESAMPLES + 1) as f64
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Returns the median; zero for no samples.
pub(crate) fn median(samples: &[f64]) -> f64 {
    quantile(&sorted(samples), 0.5).unwrap_or(0.0)
}

/// Returns the q-quantile of sorted samples, interpolated linearly between neighbours.
pub(crate) fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let at = q * last as f64;
    let (low, high) = (
        sorted.get(at.floor() as usize)?,
        sorted.get(at.ceil() as usize)?,
    );
    Some(low + (high - low) * at.fract())
}

/// SplitMix64 (Steele, Lea, Flood 2014): random enough for drawing samples.
pub(crate) struct SplitMix(u64);

impl SplitMix {
    /// Starts from a fixed seed: the same samples give the same interval.
    pub(crate) fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Shuffles the samples (Fisher and Yates).
    fn shuffle(&mut self, samples: &mut [f64]) {
        for last in (1..samples.len()).rev() {
            samples.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }

    /// Draws as many samples, with replacement.
    pub(crate) fn resample(&mut self, samples: &[f64]) -> Vec<f64> {
        let n = samples.len() as u64;
        (0..n)
            .filter_map(|_| samples.get((self.next() % n) as usize).copied())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_known_distribution() {
        let samples: Vec<f64> = (0..=1000).rev().map(f64::from).collect();
        let summary = Summary::of(&samples).unwrap();
        assert_eq!(
            (summary.min, summary.p50, summary.p95, summary.max),
            (0.0, 500.0, 950.0, 1000.0)
        );
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[3.0]).unwrap().p99, 3.0);
    }

    #[test]
    fn a_ratio_covers_the_truth_and_a_doubled_side_gives_two() {
        let b: Vec<f64> = (0..200).map(|i| 100.0 + f64::from(i % 20)).collect();
        let a: Vec<f64> = b.iter().map(|x| x * 2.0).collect();
        let ratio = Ratio::of(&a, &b).unwrap();
        assert!((ratio.ratio - 2.0).abs() < 1e-9);
        assert!(ratio.ci95[0] <= 2.0 && 2.0 <= ratio.ci95[1]);
        assert!(ratio.ci95[1] - ratio.ci95[0] < 0.2);
        assert_eq!(Ratio::of(&a, &b).unwrap(), ratio, "repeatable");
    }

    #[test]
    fn chance_is_certain_of_equals_and_doubts_what_lies_apart() {
        let low: Vec<f64> = (0..30).map(f64::from).collect();
        let high: Vec<f64> = low.iter().map(|x| x + 100.0).collect();
        assert_eq!(chance(&low, &low), 1.0);
        assert!(chance(&low, &high) < 0.001);
        assert_eq!(chance(&low, &high), chance(&low, &high), "repeatable");
    }

    #[test]
    fn chance_is_fair_where_there_is_no_difference() {
        // Of 200 pairs from one distribution, about a tenth have a chance below 0.1.
        let mut random = SplitMix(7);
        let mut draw = || (0..15).map(|_| (random.next() % 10_000) as f64).collect();
        let low = (0..200).filter(|_| {
            let (a, b): (Vec<f64>, Vec<f64>) = (draw(), draw());
            chance(&a, &b) < 0.1
        });
        let low = low.count();
        assert!((6..=40).contains(&low), "{low} of 200");
    }

    #[test]
    fn a_noisy_side_gives_no_ratio() {
        let calm = vec![1.0; 20];
        let noisy: Vec<f64> = (0..20).map(|i| f64::from(i * i + 1)).collect();
        let why = Ratio::of(&noisy, &calm).unwrap_err();
        assert!(why.contains("too noisy"), "{why}");
        assert!(Ratio::of(&calm, &calm).is_ok());
    }

    #[test]
    fn too_few_samples_or_a_zero_median_give_no_ratio() {
        assert!(Ratio::of(&[1.0; 9], &[1.0; 100]).is_err());
        assert!(Ratio::of(&[1.0; 10], &[0.0; 10]).is_err());
    }
}
