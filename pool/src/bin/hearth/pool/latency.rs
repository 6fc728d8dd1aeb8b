//! A histogram of times: any number of them in little memory, each to within three per cent.

use std::time::Duration;

/// Buckets between a number and its double.
const STEPS: u64 = 32;
/// Enough for any number of nanoseconds that fits in 64 bits.
const BUCKETS: usize = (64 - STEPS.trailing_zeros() as usize + 1) * STEPS as usize;

/// How many times fell into each bucket.
#[derive(Clone, Debug)]
pub(super) struct Latencies {
    buckets: Box<[u64; BUCKETS]>,
    count: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            buckets: Box::new([0; BUCKETS]),
            count: 0,
        }
    }
}

impl Latencies {
    pub(super) fn add(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get_mut(bucket(nanos)) {
            *bucket += 1;
            self.count += 1;
        }
    }

    /// The smallest recorded time that `percent` per cent of all times do not exceed; `None` if
    /// there are none.
    pub(super) fn percentile(&self, percent: u64) -> Option<Duration> {
        let rank = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let found = self.buckets.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        found.map(|index| Duration::from_nanos(largest(index)))
    }
}

/// The bucket of a number. Small numbers have a bucket each; larger ones share one with the numbers
/// that have the same first bits.
fn bucket(nanos: u64) -> usize {
    let shift = (nanos / STEPS).checked_ilog2().unwrap_or(0);
    let index = u64::from(shift) * STEPS + (nanos >> shift);
    usize::try_from(index).unwrap_or(usize::MAX)
}

/// The largest number in a bucket.
fn largest(index: usize) -> u64 {
    let index = index as u64;
    let shift = (index / STEPS).saturating_sub(1);
    let first = index - shift * STEPS;
    ((first + 1) << shift).wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_in_a_bucket_that_is_about_as_large() {
        let numbers = (0..2000).chain((0..64).flat_map(|bit| {
            let power = 1_u64 << bit;
            [power - 1, power, power + power / 3, power + (power - 1)]
        }));
        for nanos in numbers.chain([u64::MAX]) {
            let (index, most) = (bucket(nanos), largest(bucket(nanos)));
            assert!(index < BUCKETS, "{nanos}");
            assert!(
                nanos <= most && most - nanos <= nanos / STEPS,
                "{nanos}: {most}"
            );
        }
    }

    #[test]
    fn percentiles_are_those_of_the_times() {
        let mut times = Latencies::default();
        assert_eq!(times.percentile(50), None);
        for millis in 1..=100 {
            times.add(Duration::from_millis(millis));
        }
        for percent in [1, 50, 99, 100] {
            let found = times.percentile(percent).unwrap().as_nanos() as f64 / 1e6;
            let right = percent as f64;
            assert!((right..right * 1.04).contains(&found), "{percent}: {found}");
        }
    }
}
