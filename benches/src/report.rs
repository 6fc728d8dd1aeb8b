//! Results as JSON and as a table.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::environment::Environment;
use crate::fit::Fit;
use crate::stats::{Ratio, Summary};
use crate::target::{Bound, Statistic, Target};

/// Version of the JSON.
pub const SCHEMA: u32 = 1;

/// One metric of one side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The scenario.
    pub scenario: String,
    /// What was measured.
    pub metric: String,
    /// Unit of the figures.
    pub unit: String,
    /// The side that was measured: `hearth` or a peer.
    pub side: String,
    /// The summary.
    #[serde(flatten)]
    pub summary: Summary,
    /// All samples, in the order taken.
    pub samples: Vec<f64>,
}

/// Two sides of one metric.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RatioRow {
    /// What was measured.
    pub metric: String,
    /// The side in the numerator.
    pub a: String,
    /// The side in the denominator.
    pub b: String,
    /// The ratio.
    #[serde(flatten)]
    pub ratio: Ratio,
}

/// All results of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Version of this format.
    pub schema: u32,
    /// The machine.
    pub env: Environment,
    /// Metrics.
    pub results: Vec<Row>,
    /// Comparisons.
    pub ratios: Vec<RatioRow>,
    /// Figures beside their targets.
    #[serde(default)]
    pub targets: Vec<Target>,
    /// How metrics grow with the swept parameter.
    #[serde(default)]
    pub fits: Vec<Fit>,
    /// Differences between the compared sides.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Metrics that could not be measured, and why.
    pub not_measured: Vec<String>,
}

impl Report {
    /// An empty report.
    #[must_use]
    pub fn new(env: Environment) -> Self {
        Self {
            schema: SCHEMA,
            env,
            results: Vec::new(),
            ratios: Vec::new(),
            targets: Vec::new(),
            fits: Vec::new(),
            notes: Vec::new(),
            not_measured: Vec::new(),
        }
    }

    /// Adds a metric; without samples it counts as not measured.
    pub fn add(&mut self, scenario: &str, metric: &str, unit: &str, side: &str, samples: Vec<f64>) {
        match Summary::of(&samples) {
            Some(summary) => self.results.push(Row {
                scenario: scenario.into(),
                metric: metric.into(),
                unit: unit.into(),
                side: side.into(),
                summary,
                samples,
            }),
            None => self
                .not_measured
                .push(format!("{scenario} {metric} ({side}): no samples")),
        }
    }

    /// Sets the target for a figure of a metric that was added before.
    pub fn expect(&mut self, metric: &str, side: &str, statistic: Statistic, bound: Bound) {
        let mut rows = self.results.iter();
        let row = rows.find(|row| row.metric == metric && row.side == side);
        let figure = row.and_then(|row| match statistic {
            Statistic::P50 => Some(row.summary.p50),
            Statistic::P99 => Some(row.summary.p99),
            // Compares two sides: see `expect_ratio`.
            Statistic::Ratio => None,
        });
        self.targets.push(Target {
            metric: metric.into(),
            side: side.into(),
            unit: row.map_or_else(String::new, |row| row.unit.clone()),
            statistic,
            bound,
            figure,
        });
    }

    /// Sets the target for the ratio of two sides that were compared before.
    pub fn expect_ratio(&mut self, metric: &str, a: &str, b: &str, bound: Bound) {
        let mut ratios = self.ratios.iter();
        let ratio = ratios.find(|row| row.metric == metric && row.a == a && row.b == b);
        self.targets.push(Target {
            metric: metric.into(),
            side: format!("{a} / {b}"),
            unit: "x".into(),
            statistic: Statistic::Ratio,
            bound,
            figure: ratio.map(|row| row.ratio.ratio),
        });
    }

    /// Whether a figure misses its target, or was not measured.
    #[must_use]
    pub fn misses(&self) -> bool {
        self.targets.iter().any(|target| !target.is_met())
    }

    /// Compares two sides of a metric that were added before.
    pub fn compare(&mut self, metric: &str, a: &str, b: &str) {
        // The last row: a row of an earlier scenario with the same name was not measured in turns
        // with the other side.
        let samples = |side: &str| {
            self.results
                .iter()
                .rfind(|row| row.metric == metric && row.side == side)
                .map_or(&[][..], |row| &row.samples)
        };
        match Ratio::of(samples(a), samples(b)) {
            Ok(ratio) => self.ratios.push(RatioRow {
                metric: metric.into(),
                a: a.into(),
                b: b.into(),
                ratio,
            }),
            Err(why) => self
                .not_measured
                .push(format!("{metric}: {a} / {b}: {why}")),
        }
    }
}

/// Formats a figure with a sensible number of digits.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        below if below < 1.0 => format!("{value:.3}"),
        below if below < 10.0 => format!("{value:.2}"),
        _ => format!("{value:.1}"),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let env = &self.env;
        writeln!(
            f,
            "{} x {}, Linux {}, ring 0 {:?}, load {:.1}",
            env.cpus, env.cpu, env.kernel, env.profile, env.load
        )?;
        writeln!(
            f,
            "{:<10} {:<34} {:<12} {:>5} {:>11} {:>11} {:>11} {:>11}  unit",
            "scenario", "metric", "side", "n", "min", "p50", "p99", "max"
        )?;
        for row in &self.results {
            let s = &row.summary;
            let [min, p50, p99, max] = [s.min, s.p50, s.p99, s.max].map(figure);
            writeln!(
                f,
                "{:<10} {:<34} {:<12} {:>5} {min:>11} {p50:>11} {p99:>11} {max:>11}  {}",
                row.scenario, row.metric, row.side, s.n, row.unit
            )?;
        }
        for row in &self.ratios {
            let r = &row.ratio;
            writeln!(
                f,
                "{}: {} / {} = {:.3} (95 % {:.3} to {:.3}, n {})",
                row.metric, row.a, row.b, r.ratio, r.ci95[0], r.ci95[1], r.n
            )?;
        }
        for fit in &self.fits {
            writeln!(f, "{fit}")?;
        }
        for target in &self.targets {
            writeln!(f, "{target}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        for why in &self.not_measured {
            writeln!(f, "NOT MEASURED: {why}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn report() -> Report {
        Report::new(Environment {
            version: "0".into(),
            cpu: "c".into(),
            cpus: 1,
            kernel: "k".into(),
            profile: hearth_vmm::CpuProfile::Native,
            load: 0.0,
            date: String::new(),
            governor: String::new(),
        })
    }

    #[test]
    fn the_json_comes_back_as_it_was() {
        let mut report = report();
        report.add("fork", "first exit", "us", "hearth", vec![2.0; 20]);
        report.add("floor", "first exit", "us", "floor", vec![9.0; 20]);
        report.add("fork", "first exit", "us", "floor", vec![1.0; 20]);
        report.compare("first exit", "hearth", "floor");
        let json = serde_json::to_string(&report).unwrap();
        let back: Report = serde_json::from_str(&json).unwrap();
        assert_eq!(back.results[0].samples, report.results[0].samples);
        assert_eq!(back.ratios[0].ratio.ratio, 2.0);
        assert!(report.to_string().contains("hearth / floor = 2.000"));
    }

    #[test]
    fn what_was_not_measured_is_said_and_never_a_figure() {
        let mut report = report();
        report.add("fork", "pong", "us", "hearth", vec![]);
        report.compare("pong", "hearth", "firecracker");
        assert!(report.results.is_empty() && report.ratios.is_empty());
        assert_eq!(report.to_string().matches("NOT MEASURED").count(), 2);
    }
}
