//! Measures the activity of a whole machine, host kernel, KVM and guests together: in instructions,
//! on a machine whose clock counts them.
//!
//! Such a machine is QEMU's with one processor and `-icount shift=0,sleep=off`: its clock advances
//! by 1 ns per instruction, and jumps to the next timer while the processor idles. So instructions
//! and idle time can be told apart, and the instructions repeat to a few thousandths, whatever else
//! runs on the host below.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::cpu;
use crate::stats::median;

/// Instructions of the loop whose time shows whether the clock counts instructions.
const LOOP: u64 = 2_000_000;
/// Relative deviation of the loop's time that is accepted: timers interrupt it.
const TOLERANCE: f64 = 0.03;
/// The scheduler's statistics (`Documentation/scheduler/sched-stats.rst` of Linux).
const SCHEDULER: &str = "/proc/schedstat";
/// Empty measurements that are made to find the cost of measuring.
const EMPTY: usize = 21;

/// Why nothing can be counted here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeterError {
    /// The clock does not count instructions.
    #[error(
        "this machine's clock does not count instructions (a loop of {LOOP} takes {0:?}); `.ci/hardware/test 'count/*'` \
         makes one whose does"
    )]
    Clock(Duration),
    /// More than one processor.
    #[error("instructions are counted on a machine with one processor, and this one has {0}")]
    Processors(usize),
    /// The scheduler's statistics cannot be read.
    #[error("{SCHEDULER} cannot be read: the host's kernel needs CONFIG_SCHEDSTATS")]
    Scheduler(#[source] io::Error),
}

/// Instructions, in millions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Instructions that ran on the machine.
    pub busy: f64,
    /// Instructions that could have run while the processor was idle.
    pub idle: f64,
}

/// Measures the machine's activity.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    /// Cost of measuring, in millions of instructions: the median of empty measurements.
    own: f64,
}

impl Meter {
    /// Checks that the clock counts instructions, and finds the cost of measuring.
    ///
    /// # Errors
    /// Where instructions cannot be counted.
    pub fn new() -> Result<Self, MeterError> {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        if processors > 1 {
            return Err(MeterError::Processors(processors));
        }
        // The fastest of three: the first one also takes the page faults of its code.
        let took = (0..3).map(|_| timed_loop()).min().unwrap_or_default();
        let nanoseconds = took.as_nanos() as f64;
        if (nanoseconds / LOOP as f64 - 1.0).abs() > TOLERANCE {
            return Err(MeterError::Clock(took));
        }
        let bare = Self::default();
        let mut empty = Vec::new();
        for _ in 0..EMPTY {
            let spent = bare.start().and_then(Measurement::stop);
            empty.push(spent.map_err(MeterError::Scheduler)?.0.busy);
        }
        Ok(Self {
            own: median(&empty),
        })
    }

    /// Begins a measurement.
    ///
    /// # Errors
    /// When the scheduler's statistics cannot be read.
    pub fn start(&self) -> io::Result<Measurement> {
        let ran = ran()?;
        Ok(Measurement {
            own: self.own,
            ran,
            phases: Vec::new(),
            process: cpu::process(),
            begin: Instant::now(),
        })
    }
}

/// A running measurement.
#[derive(Debug)]
pub struct Measurement {
    own: f64,
    ran: Duration,
    phases: Vec<(&'static str, f64)>,
    process: Duration,
    begin: Instant,
}

/// Millions of instructions that this process ran in each phase, in order.
pub type Phases = Vec<(&'static str, f64)>;

impl Measurement {
    /// Ends a phase.
    pub fn phase(&mut self, name: &'static str) {
        let now = cpu::process();
        self.phases.push((name, millions(now - self.process)));
        self.process = now;
    }

    /// Ends the measurement.
    ///
    /// # Errors
    /// When the scheduler's statistics cannot be read.
    pub fn stop(self) -> io::Result<(Spent, Phases)> {
        let whole = millions(self.begin.elapsed());
        let busy = (millions(ran()? - self.ran) - self.own).max(0.0);
        let idle = (whole - busy).max(0.0);
        Ok((Spent { busy, idle }, self.phases))
    }
}

/// Converts a duration to millions of instructions: one takes a nanosecond.
pub(crate) fn millions(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1e6
}

/// Returns for how long the processor has run anything but its idle loop. The scheduler adds this
/// up at a context switch, so this thread sleeps for a moment first.
fn ran() -> io::Result<Duration> {
    std::thread::sleep(Duration::from_micros(1));
    ran_by(&fs::read_to_string(SCHEDULER)?)
        .ok_or_else(|| io::Error::other(format!("{SCHEDULER} does not say what cpu0 ran")))
}

/// Returns the seventh of cpu0's nine numbers: the time spent running tasks, in nanoseconds.
fn ran_by(text: &str) -> Option<Duration> {
    let numbers = text.lines().find_map(|line| line.strip_prefix("cpu0 "))?;
    let nanoseconds = numbers.split_whitespace().nth(6)?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

fn timed_loop() -> Duration {
    let begin = Instant::now();
    // SAFETY: the loop counts a register of its own down to zero; it touches no memory and no
    // stack.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!(
            "2:",
            "dec {count}",
            "jnz 2b",
            count = inout(reg) LOOP / 2 => _,
            options(nomem, nostack),
        );
    }
    begin.elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ran_is_found_among_the_schedulers_figures() {
        let text = "version 16\ntimestamp 4294893293\ncpu0 0 0 0 0 0 0 3729933674 58622390 1554\ncpu1 0 0 0 0 0 0 1 2 3\n";
        assert_eq!(ran_by(text), Some(Duration::from_nanos(3_729_933_674)));
        assert_eq!(ran_by("version 16\ntimestamp 1\n"), None);
        assert_eq!(ran_by("cpu0 1 2 3"), None);
    }

    #[test]
    fn a_clock_that_counts_something_else_is_refused() {
        // Only by chance does a processor run this many instructions in as many nanoseconds.
        match Meter::new() {
            Err(error) => assert!(error.to_string().contains("instructions"), "{error}"),
            Ok(meter) => assert!(meter.own > 0.0),
        }
    }
}
