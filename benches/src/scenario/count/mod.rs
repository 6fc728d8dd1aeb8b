//! Counts the cost of each step in instructions, of host kernel, KVM and guest together, on a
//! machine whose clock counts them ([`Meter`]): instructions that ran, and beside them idle time.
//! These can be compared where no processor is fast or quiet enough for times.

mod guests;
mod kvm;
mod peers;
mod pools;

use std::io;
use std::time::Duration;

use super::ScenarioError;
use super::boot::Files;
use super::samples::Samples;
use crate::meter::{Measurement, Meter};
use crate::peer::Peers;
use crate::report::Report;

/// The name of the scenario in results.
pub const SCENARIO: &str = "count";
/// Unit of instructions that ran.
pub const BUSY: &str = "M busy";
/// Unit of idle time.
pub const IDLE: &str = "M idle";
/// Rounds of each kind that are not counted: they touch code and tables for the first time.
const WARM_UP: usize = 2;
/// Idle time before a measurement. It takes no real time here: the clock jumps.
const REST: Duration = Duration::from_millis(200);

/// Optional subjects of a counting run.
#[derive(Clone, Debug)]
pub struct Subjects {
    /// Whether code in Python's warm interpreter is counted, too; its image is built if it is
    /// missing.
    pub python: bool,
    /// Other monitors.
    pub peers: Peers,
}

/// Counts each operation `n` times, and reports its progress.
///
/// # Errors
/// When nothing can be counted here, or a guest cannot be made or does not answer.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    subjects: &Subjects,
    n: usize,
    progress: impl Fn(&str),
) -> Result<(), ScenarioError> {
    let meter = Meter::new().map_err(ScenarioError::at("instructions"))?;
    let mut counts = Counts {
        meter,
        rounds: n,
        samples: Samples::default(),
    };
    progress("first instructions");
    guests::first_instruction(&mut counts, report).await?;
    progress("boots");
    guests::boot(&mut counts, files).await?;
    progress("clones");
    let template = guests::clones(&mut counts, files).await?;
    progress("a clone at work");
    guests::at_work(&mut counts, &template).await?;
    progress("a pool");
    pools::hand_off(&mut counts, files).await?;
    match subjects.python {
        true => {
            progress("a pool with Python");
            pools::python(&mut counts, files).await?;
        }
        false => {
            let why = "count: hand-off to print(6 * 7): was not asked for, see --python";
            report.not_measured.push(why.into());
        }
    }
    counts.samples.report(report, SCENARIO, "hearth");
    progress("other monitors");
    peers::run(meter, report, files, &subjects.peers, n).await
}

/// A counting run: its meter, and the samples so far.
struct Counts {
    meter: Meter,
    rounds: usize,
    samples: Samples,
}

impl Counts {
    /// Returns the numbers of the rounds, and whether each is counted.
    fn rounds(&self) -> impl Iterator<Item = (usize, bool)> + use<> {
        (0..WARM_UP + self.rounds).map(|round| (round, round >= WARM_UP))
    }

    /// Begins a measurement after everything has become idle.
    async fn start(&self) -> Result<Measurement, ScenarioError> {
        tokio::time::sleep(REST).await;
        self.meter.start().map_err(failed)
    }

    /// Ends a measurement of `times` repetitions of `what`, and records it if it is counted.
    fn stop(
        &mut self,
        measurement: Measurement,
        what: &'static str,
        times: usize,
        counted: bool,
    ) -> Result<(), ScenarioError> {
        let (spent, phases) = measurement.stop().map_err(failed)?;
        if counted {
            let each = 1.0 / times as f64;
            self.samples.push(what, BUSY, spent.busy * each);
            self.samples.push(what, IDLE, spent.idle * each);
            for (phase, ran) in phases {
                self.samples.push(phase, "M", ran);
            }
        }
        Ok(())
    }
}

fn failed(error: io::Error) -> ScenarioError {
    ScenarioError::at("instructions")(error)
}
