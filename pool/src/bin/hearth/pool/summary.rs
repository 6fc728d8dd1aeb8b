//! The results of a pool under load.

use std::fmt;
use std::time::Duration;

use hearth_pool::Counts;
use serde::Serialize;

use super::latency::Latencies;
use super::load::Tally;

#[derive(Debug, Serialize)]
pub(super) struct Summary {
    profile: String,
    /// Number of concurrent tasks.
    load: usize,
    /// Number of guests to keep warm.
    size: usize,
    /// Time until the pool was full.
    start_us: u64,
    /// Duration of the load.
    load_us: u64,
    hits: u64,
    misses: u64,
    runs: u64,
    failures: u64,
    last_failure: Option<String>,
    runs_per_second: f64,
    boots: u64,
    boot_failures: u64,
    /// Times from asking for a guest to having it.
    acquire_us: Percentiles,
    /// Times from the request to the program's end.
    run_us: Percentiles,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    p50: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

impl Summary {
    pub(super) fn new(
        profile: &str,
        load: usize,
        start: Duration,
        took: Duration,
        counts: Counts,
        tally: &Tally,
    ) -> Self {
        Self {
            profile: profile.to_owned(),
            load,
            size: counts.size,
            start_us: micros(start),
            load_us: micros(took),
            hits: tally.hits,
            misses: tally.misses,
            runs: tally.runs,
            failures: tally.failures,
            last_failure: tally.last_failure.clone(),
            runs_per_second: tally.runs as f64 / took.as_secs_f64().max(1e-9),
            boots: counts.boots,
            boot_failures: counts.boot_failures,
            acquire_us: Percentiles::of(&tally.acquire),
            run_us: Percentiles::of(&tally.run),
        }
    }

    /// Whether no run failed.
    pub(super) fn is_good(&self) -> bool {
        self.failures == 0
    }

    pub(super) fn line(&self) -> String {
        // Cannot fail: there are only numbers and strings.
        serde_json::to_string(self).unwrap_or_default()
    }
}

impl Percentiles {
    fn of(times: &Latencies) -> Self {
        let percentile = |percent| {
            let time = times.percentile(percent)?;
            Some(time.as_nanos() as f64 / 1e3)
        };
        Self {
            p50: percentile(50),
            p99: percentile(99),
            max: percentile(100),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |micros: u64| micros as f64 / 1e6;
        let times = |times: &Percentiles| {
            let [p50, p99, max] = [times.p50, times.p99, times.max]
                .map(|micros| time(micros.map(|micros| Duration::from_secs_f64(micros / 1e6))));
            format!("p50 {p50}  p99 {p99}  longest {max}")
        };
        writeln!(
            f,
            "profile    {}, {} warm, {} tasks",
            self.profile, self.size, self.load
        )?;
        writeln!(
            f,
            "start      {:.1} s until the pool was full",
            seconds(self.start_us)
        )?;
        writeln!(
            f,
            "load       {} runs in {:.1} s, {:.1} a second",
            self.runs,
            seconds(self.load_us),
            self.runs_per_second
        )?;
        writeln!(
            f,
            "guests     {} found ready, {} waited for",
            self.hits, self.misses
        )?;
        writeln!(
            f,
            "           {} made, {} not",
            self.boots, self.boot_failures
        )?;
        writeln!(f, "acquire    {}", times(&self.acquire_us))?;
        writeln!(f, "run        {}", times(&self.run_us))?;
        match &self.last_failure {
            Some(why) => writeln!(f, "failures   {}, the last: {why}", self.failures),
            None => Ok(()),
        }
    }
}

/// Formats a time with a suitable unit.
pub(super) fn time(time: Option<Duration>) -> String {
    match time {
        None => "-".to_owned(),
        Some(time) => format!("{time:.1?}"),
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
