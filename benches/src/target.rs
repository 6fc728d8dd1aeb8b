//! Targets of figures, and whether they are met.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The figure of a metric that is compared with its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Statistic {
    /// The median.
    P50,
    /// The 99th percentile.
    P99,
    /// The median over that of another side.
    Ratio,
}

/// The bound of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// The figure is not more.
    AtMost(f64),
    /// The figure is not less.
    AtLeast(f64),
}

impl Bound {
    fn admits(self, figure: f64) -> bool {
        match self {
            Self::AtMost(most) => figure <= most,
            Self::AtLeast(least) => figure >= least,
        }
    }
}

/// One figure beside its target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    /// The metric that was measured.
    pub metric: String,
    /// The side that was measured; for a ratio, both.
    pub side: String,
    /// Unit of figure and bound.
    pub unit: String,
    /// The figure that is compared.
    pub statistic: Statistic,
    /// The target.
    pub bound: Bound,
    /// The measured figure; `None` if it was not measured.
    pub figure: Option<f64>,
}

impl Target {
    /// Whether the figure was measured and meets its target.
    #[must_use]
    pub fn is_met(&self) -> bool {
        self.figure.is_some_and(|figure| self.bound.admits(figure))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            metric, side, unit, ..
        } = self;
        let verdict = match self.figure {
            Some(_) if self.is_met() => "met",
            Some(_) => "MISSED",
            None => "NOT MEASURED",
        };
        let statistic = match self.statistic {
            Statistic::P50 => "p50",
            Statistic::P99 => "p99",
            Statistic::Ratio => "ratio",
        };
        write!(f, "target {verdict}: {metric} ({side}) {statistic}")?;
        if let Some(figure) = self.figure {
            write!(f, " {figure:.2}")?;
        }
        match self.bound {
            Bound::AtMost(most) => write!(f, ", at most {most} {unit}"),
            Bound::AtLeast(least) => write!(f, ", at least {least} {unit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_figure_is_judged_by_its_bound_and_one_that_is_missing_is_not_met() {
        let mut report = report();
        report.add("s", "speed", "VMs/s", "a", vec![60.0; 12]);
        report.add("s", "speed", "VMs/s", "b", vec![20.0; 12]);
        report.compare("speed", "a", "b");
        assert!(!report.misses());
        report.expect("speed", "a", Statistic::P50, Bound::AtLeast(50.0));
        report.expect("speed", "a", Statistic::P99, Bound::AtMost(60.0));
        report.expect_ratio("speed", "a", "b", Bound::AtMost(3.0));
        assert!(!report.misses(), "{report}");
        report.expect("speed", "b", Statistic::P50, Bound::AtLeast(50.0));
        assert!(report.misses());
        report.targets.pop();
        report.expect("speed", "c", Statistic::P50, Bound::AtLeast(50.0));
        assert!(report.misses());
        let text = report.to_string();
        assert!(
            text.contains("target met: speed (a) p50 60.00, at least 50 VMs/s"),
            "{text}"
        );
        assert!(
            text.contains("target met: speed (a / b) ratio 3.00, at most 3 x"),
            "{text}"
        );
        assert!(
            text.contains("target NOT MEASURED: speed (c) p50"),
            "{text}"
        );
    }
}
