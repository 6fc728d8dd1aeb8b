//! Compares two runs of the same benchmarks: which metrics became slower, and whether chance
//! explains it.

use std::fmt;

use crate::report::{Report, Row};
use crate::stats::{MIN_SAMPLES, chance};

/// Relative change of the median up to which a metric counts as unchanged, however certain the
/// change is.
pub const LEAST_CHANGE: f64 = 0.05;
/// A difference is believed if chance makes one as large less often than this.
pub const LEAST_CHANCE: f64 = 0.01;

/// Outcome for a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No difference that counts.
    Same,
    /// Better than it was.
    Better,
    /// Worse than it was.
    Worse,
}

/// One metric, before and after.
#[derive(Clone, Debug)]
pub struct Change {
    /// `scenario metric (side)`.
    pub name: String,
    /// Unit of the medians.
    pub unit: String,
    /// Medians, before and after.
    pub medians: [f64; 2],
    /// How often chance alone makes such a difference, 0 to 1.
    pub chance: f64,
    /// The outcome.
    pub verdict: Verdict,
}

/// Comparison of two runs: the metrics of both, and those that could not be compared.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Metrics in both.
    pub changes: Vec<Change>,
    /// Metrics that are in one run only or have too few samples, each with the reason.
    pub not_measured: Vec<String>,
}

impl Comparison {
    /// Compares `new` with `old`.
    #[must_use]
    pub fn of(old: &Report, new: &Report) -> Self {
        let mut comparison = Self::default();
        if (&old.env.cpu, old.env.profile) != (&new.env.cpu, new.env.profile) {
            let why = format!(
                "the runs are from different machines: {} ({:?}), {} ({:?})",
                old.env.cpu, old.env.profile, new.env.cpu, new.env.profile
            );
            comparison.not_measured.push(why);
            return comparison;
        }
        for row in &new.results {
            match old.results.iter().find(|before| name(before) == name(row)) {
                Some(before) => comparison.add(before, row),
                None => comparison.not_measured.push(format!("{}: new", name(row))),
            }
        }
        let gone = |row: &&Row| !new.results.iter().any(|after| name(after) == name(row));
        let gone = old.results.iter().filter(gone);
        let gone = gone.map(|row| format!("{}: no longer measured", name(row)));
        comparison.not_measured.extend(gone);
        comparison
    }

    fn add(&mut self, before: &Row, after: &Row) {
        let n = before.samples.len().min(after.samples.len());
        if n < MIN_SAMPLES {
            let why = format!("{}: {n} samples, {MIN_SAMPLES} are needed", name(after));
            return self.not_measured.push(why);
        }
        let medians = [before.summary.p50, after.summary.p50];
        let chance = chance(&before.samples, &after.samples);
        let [was, is] = medians;
        let verdict = if chance >= LEAST_CHANCE || (is - was).abs() <= LEAST_CHANGE * was.abs() {
            Verdict::Same
        } else if (is > was) == more_is_better(&after.unit) {
            Verdict::Better
        } else {
            Verdict::Worse
        };
        self.changes.push(Change {
            name: name(after),
            unit: after.unit.clone(),
            medians,
            chance,
            verdict,
        });
    }

    /// Whether anything became worse.
    #[must_use]
    pub fn worse(&self) -> bool {
        let mut verdicts = self.changes.iter().map(|change| change.verdict);
        verdicts.any(|verdict| verdict == Verdict::Worse)
    }
}

fn name(row: &Row) -> String {
    format!("{} {} ({})", row.scenario, row.metric, row.side)
}

/// Whether a higher figure is better: true for rates; times, counts and sizes are better when
/// lower.
fn more_is_better(unit: &str) -> bool {
    unit.ends_with("/s")
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for change in &self.changes {
            let [was, is] = change.medians;
            let verdict = match change.verdict {
                Verdict::Same => "same",
                Verdict::Better => "better",
                Verdict::Worse => "WORSE",
            };
            writeln!(
                f,
                "{verdict:<6} {:<56} {was:>12.1} -> {is:>12.1} {} (chance {:.3})",
                change.name, change.unit, change.chance
            )?;
        }
        for why in &self.not_measured {
            writeln!(f, "NOT MEASURED: {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    fn run(unit: &str, samples: Vec<f64>) -> Report {
        let mut report = report();
        report.add("fork", "first exit", unit, "hearth", samples);
        report
    }

    fn noisy(around: f64) -> Vec<f64> {
        (0..40).map(|i| around + f64::from(i * 7 % 11)).collect()
    }

    fn verdict(unit: &str, old: f64, new: f64) -> Verdict {
        let comparison = Comparison::of(&run(unit, noisy(old)), &run(unit, noisy(new)));
        comparison.changes[0].verdict
    }

    #[test]
    fn a_change_is_told_from_noise_and_its_direction_follows_the_unit() {
        assert_eq!(verdict("us", 100.0, 100.0), Verdict::Same);
        assert_eq!(verdict("us", 100.0, 102.0), Verdict::Same, "certain, small");
        assert_eq!(verdict("us", 100.0, 150.0), Verdict::Worse);
        assert_eq!(verdict("us", 150.0, 100.0), Verdict::Better);
        assert_eq!(verdict("VMs/s", 100.0, 150.0), Verdict::Better);
        assert_eq!(verdict("VMs/s", 150.0, 100.0), Verdict::Worse);
    }

    #[test]
    fn a_large_difference_of_wild_samples_is_none() {
        let wild = |shift: f64| (0..12).map(move |i| f64::from(i * 37 % 12) * 100.0 + shift);
        let comparison = Comparison::of(
            &run("us", wild(0.0).collect()),
            &run("us", wild(40.0).collect()),
        );
        assert_eq!(comparison.changes[0].verdict, Verdict::Same);
        assert!(!comparison.worse());
    }

    #[test]
    fn what_cannot_be_compared_says_why() {
        let few = Comparison::of(&run("us", noisy(1.0)), &run("us", vec![1.0; 9]));
        assert!(few.to_string().contains("9 samples, 10 are needed"));
        let mut other = run("us", noisy(1.0));
        other.results[0].metric = "pong".into();
        let apart = Comparison::of(&run("us", noisy(1.0)), &other);
        assert_eq!(apart.not_measured.len(), 2, "{apart}");
        other.env.cpu = "another".into();
        let elsewhere = Comparison::of(&run("us", noisy(1.0)), &other);
        assert!(elsewhere.to_string().contains("different machines"));
        assert!(elsewhere.changes.is_empty());
    }
}
