//! The same scenario at several sizes, and how its cost grows.

use std::str::FromStr;

use crate::fit::Fit;
use crate::report::{Report, Row};
use crate::scenario::boot::Shape;

/// The swept parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Memory of a guest in MiB.
    Memory,
    /// Processors of a guest.
    Vcpus,
    /// Guests at a time.
    Guests,
}

impl Key {
    /// Returns the unit of the parameter.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Memory => "MiB",
            Self::Vcpus => "vCPU",
            Self::Guests => "VM",
        }
    }
}

/// The swept parameter and its values: `memory=128,256,512`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// The swept parameter.
    pub key: Key,
    /// Its values, in the order given.
    pub values: Vec<u32>,
}

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage =
            || "say memory=, vcpus= or guests= and two or more numbers, such as memory=128,256";
        let (key, values) = text.split_once('=').ok_or_else(usage)?;
        let key = match key {
            "memory" => Key::Memory,
            "vcpus" => Key::Vcpus,
            "guests" => Key::Guests,
            _ => return Err(usage().into()),
        };
        let values: Result<Vec<u32>, _> = values.split(',').map(str::parse).collect();
        let values = values.map_err(|_| usage())?;
        let most = match key {
            Key::Vcpus => u8::MAX.into(),
            Key::Memory | Key::Guests => u32::MAX,
        };
        if values.len() < 2 || values.iter().any(|value| !(1..=most).contains(value)) {
            return Err(usage().into());
        }
        Ok(Self { key, values })
    }
}

/// Sizes at which a scenario is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// Size of each guest.
    pub shape: Shape,
    /// Guests at a time, instead of the number that was asked for otherwise.
    pub guests: Option<usize>,
}

impl Point {
    fn at(key: Key, value: u32) -> Self {
        let mut point = Self::default();
        match key {
            Key::Memory => point.shape.memory_mib = value,
            Key::Vcpus => point.shape.vcpus = u8::try_from(value).unwrap_or(u8::MAX),
            Key::Guests => point.guests = usize::try_from(value).ok(),
        }
        point
    }
}

impl Sweep {
    /// Runs `scenario` at each value. The value is added to the side of each row, and a line is
    /// fitted to each metric.
    ///
    /// # Errors
    /// Those of the scenario.
    pub fn run<E>(
        &self,
        report: &mut Report,
        mut scenario: impl FnMut(&mut Report, Point) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rows: Vec<(u32, Row)> = Vec::new();
        for &value in &self.values {
            let mut part = Report::new(report.env.clone());
            scenario(&mut part, Point::at(self.key, value))?;
            let side = |side: &str| format!("{side}, {value} {}", self.key.unit());
            for row in part.results {
                let marked = Row {
                    side: side(&row.side),
                    ..row.clone()
                };
                report.results.push(marked);
                rows.push((value, row));
            }
            for mut ratio in part.ratios {
                (ratio.a, ratio.b) = (side(&ratio.a), side(&ratio.b));
                report.ratios.push(ratio);
            }
            for mut target in part.targets {
                target.side = side(&target.side);
                report.targets.push(target);
            }
            report.notes.extend(part.notes);
            let missing = part.not_measured.into_iter();
            report.not_measured.extend(missing.map(|why| side(&why)));
        }
        report.fits.extend(self.fits(&rows));
        Ok(())
    }

    /// Fits a line to each metric of each side.
    fn fits(&self, rows: &[(u32, Row)]) -> Vec<Fit> {
        let same = |a: &Row, b: &Row| {
            (&a.scenario, &a.metric, &a.unit, &a.side) == (&b.scenario, &b.metric, &b.unit, &b.side)
        };
        let mut fits = Vec::new();
        for (index, (_, row)) in rows.iter().enumerate() {
            let before = rows.get(..index).unwrap_or_default();
            if before.iter().any(|(_, other)| same(row, other)) {
                continue;
            }
            let points = rows.iter().filter(|(_, other)| same(row, other));
            let points: Vec<(f64, &[f64])> = points
                .map(|(value, row)| (f64::from(*value), &row.samples[..]))
                .collect();
            fits.extend(Fit::of(&points).map(|fit| Fit {
                scenario: row.scenario.clone(),
                metric: row.metric.clone(),
                unit: row.unit.clone(),
                side: row.side.clone(),
                per: self.key.unit().into(),
                ..fit
            }));
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_sweep_is_read_or_refused_with_its_form() {
        let sweep: Sweep = "memory=128,256,512".parse().unwrap();
        assert_eq!(
            (sweep.key, sweep.values),
            (Key::Memory, vec![128, 256, 512])
        );
        for bad in [
            "memory",
            "size=1,2",
            "memory=1",
            "memory=a,b",
            "memory=",
            "guests=0,1",
            "vcpus=1,256",
        ] {
            let error = bad.parse::<Sweep>().unwrap_err();
            assert!(error.contains("memory=128,256"), "{bad}: {error}");
        }
    }

    #[test]
    fn each_point_has_its_rows_and_each_metric_its_line() {
        let mut report = report();
        let sweep: Sweep = "memory=128,256,512".parse().unwrap();
        let scenario = |report: &mut Report, point: Point| {
            let mib = f64::from(point.shape.memory_mib);
            report.add("s", "grows", "us", "hearth", vec![10.0 + mib; 12]);
            report.add("s", "flat", "us", "hearth", vec![5.0; 12]);
            report.add("s", "flat", "us", "floor", vec![5.0; 12]);
            report.compare("flat", "hearth", "floor");
            Ok::<(), std::convert::Infallible>(())
        };
        sweep.run(&mut report, scenario).unwrap();
        assert_eq!(
            (report.results.len(), report.ratios.len(), report.fits.len()),
            (9, 3, 3)
        );
        assert_eq!(report.results[3].side, "hearth, 256 MiB");
        assert!((report.fits[0].slope - 1.0).abs() < 1e-9);
        let text = report.to_string();
        assert!(
            text.contains("s grows (hearth) grows: 10.0 us and 1.0000 per MiB"),
            "{text}"
        );
        assert!(text.contains("s flat (floor) flat: 5.0 us"), "{text}");
    }
}
