//! A recorder of metrics that tests can read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use metrics::{
    Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata,
    SharedString, Unit,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// One metric with one set of labels; its value is `None` until something was recorded.
#[derive(Debug)]
struct Cell {
    key: Key,
    kind: Kind,
    value: Mutex<Option<f64>>,
}

impl Cell {
    fn change(&self, change: impl FnOnce(f64) -> f64) {
        let mut value = self.value.lock().unwrap();
        *value = Some(change(value.unwrap_or(0.0)));
    }

    fn value(&self) -> Option<f64> {
        *self.value.lock().unwrap()
    }
}

fn float(count: u64) -> f64 {
    f64::from(u32::try_from(count).unwrap())
}

impl CounterFn for Cell {
    fn increment(&self, by: u64) {
        self.change(|sum| sum + float(by));
    }

    fn absolute(&self, value: u64) {
        self.change(|_| float(value));
    }
}

impl GaugeFn for Cell {
    fn increment(&self, by: f64) {
        self.change(|sum| sum + by);
    }

    fn decrement(&self, by: f64) {
        self.change(|sum| sum - by);
    }

    fn set(&self, value: f64) {
        self.change(|_| value);
    }
}

impl HistogramFn for Cell {
    fn record(&self, value: f64) {
        self.change(|sum| sum + value);
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Vec<Arc<Cell>>>>);

impl Recorder {
    fn cells(&self) -> MutexGuard<'_, Vec<Arc<Cell>>> {
        self.0.lock().unwrap()
    }

    fn cell(&self, key: &Key, kind: Kind) -> Arc<Cell> {
        let mut cells = self.cells();
        let known = cells.iter().find(|cell| cell.key == *key);
        if let Some(known) = known {
            return Arc::clone(known);
        }
        let cell = Arc::new(Cell {
            key: key.clone(),
            kind,
            value: Mutex::default(),
        });
        cells.push(Arc::clone(&cell));
        cell
    }

    /// Returns names and kinds of all recorded metrics.
    pub(crate) fn kinds(&self) -> Vec<(String, Kind)> {
        let cells = self.cells();
        let recorded = cells.iter().filter(|cell| cell.value().is_some());
        recorded
            .map(|cell| (cell.key.name().to_owned(), cell.kind))
            .collect()
    }

    /// Returns the values of a metric by one of its labels.
    pub(crate) fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, f64> {
        let cells = self.cells();
        let named = cells.iter().filter(|cell| cell.key.name() == name);
        let labelled = named.filter_map(|cell| {
            let mut labels = cell.key.labels();
            let found = labels.find(|found| found.key() == label)?;
            Some((found.value().to_owned(), cell.value()?))
        });
        labelled.collect()
    }

    /// Returns the sum of a metric over all labels.
    pub(crate) fn sum(&self, name: &str) -> f64 {
        let cells = self.cells();
        let named = cells.iter().filter(|cell| cell.key.name() == name);
        named.filter_map(|cell| cell.value()).sum()
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.cell(key, Kind::Counter))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.cell(key, Kind::Gauge))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.cell(key, Kind::Histogram))
    }
}
