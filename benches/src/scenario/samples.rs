//! Samples of one side, gathered round by round.

use std::time::Duration;

use super::us;
use crate::report::Report;

/// Samples by metric and unit, in the order of first use.
#[derive(Debug, Default)]
pub(super) struct Samples {
    rows: Vec<(&'static str, &'static str, Vec<f64>)>,
}

impl Samples {
    /// Adds a sample.
    pub(super) fn push(&mut self, metric: &'static str, unit: &'static str, value: f64) {
        let mut rows = self.rows.iter_mut();
        match rows.find(|row| (row.0, row.1) == (metric, unit)) {
            Some(row) => row.2.push(value),
            None => self.rows.push((metric, unit, vec![value])),
        }
    }

    /// Adds a time, in microseconds.
    pub(super) fn time(&mut self, metric: &'static str, took: Duration) {
        self.push(metric, "us", us(took));
    }

    /// Adds all metrics to the report.
    pub(super) fn report(self, report: &mut Report, scenario: &str, side: &str) {
        for (metric, unit, samples) in self.rows {
            report.add(scenario, metric, unit, side, samples);
        }
    }
}
