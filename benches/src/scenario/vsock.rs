//! Bytes between the host and a program in a guest, by size, in turns with the same bytes over a
//! Unix socket pair to a thread of this process. Neither side processes the bytes.

use std::io;
use std::os::unix::net::UnixStream as Socket;
use std::time::{Duration, Instant};

use hearth_agent::client::{Command, Exec};
use hearth_vmm::Vm;
use hearth_vmm::virtio::vsock::VsockStream;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::agent::{dial, renew, resume, template};
use super::boot::Files;
use super::exchange::{Exchange, HEAD, serve};
use super::{ScenarioError, us};
use crate::report::Report;

const SCENARIO: &str = "vsock";
/// The port on which the guest's program listens.
const PORT: u32 = 3000;
/// The program's output when it listens.
const LISTENING: &[u8] = b"listening\n";
/// Rounds that are not counted: both ends allocate memory, and the guest's kernel touches its code
/// for the first time.
const WARM_UP: usize = 2;
/// Time limit of an exchange.
const STUCK: Duration = Duration::from_secs(120);
/// The shortest question and answer.
const LEAST: u32 = HEAD as u32;

/// The measured quantity of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Measure {
    /// Time from the question to its answer's end.
    RoundTrip,
    /// Bytes per time; a few bytes go the other way.
    Throughput,
}

/// One metric and its exchange.
struct Kind {
    metric: &'static str,
    measure: Measure,
    exchange: Exchange,
}

const fn both(metric: &'static str, size: u32) -> Kind {
    one(metric, Measure::RoundTrip, size, size)
}

const fn to_guest(metric: &'static str, size: u32) -> Kind {
    one(metric, Measure::Throughput, size, LEAST)
}

const fn from_guest(metric: &'static str, size: u32) -> Kind {
    one(metric, Measure::Throughput, LEAST, size)
}

const fn one(metric: &'static str, measure: Measure, asked: u32, answered: u32) -> Kind {
    let exchange = Exchange { asked, answered };
    Kind {
        metric,
        measure,
        exchange,
    }
}

const KINDS: [Kind; 9] = [
    both("round trip of 64 B", 64),
    both("round trip of 4 KiB", 4 << 10),
    both("round trip of 64 KiB", 64 << 10),
    to_guest("4 KiB to the guest", 4 << 10),
    to_guest("64 KiB to the guest", 64 << 10),
    to_guest("1 MiB to the guest", 1 << 20),
    from_guest("4 KiB from the guest", 4 << 10),
    from_guest("64 KiB from the guest", 64 << 10),
    from_guest("1 MiB from the guest", 1 << 20),
];

/// Makes `n` exchanges of each kind on each side, in turns, and `n` fresh connections.
///
/// # Errors
/// When the guest cannot be made, or a stream ends.
pub async fn run(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let template = template(files).await?.count_instructions(true);
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let mut agent = resume(&vm)?;
    renew(&mut agent, 0).await?;
    // Dropping this value ends the program.
    let _program = program(&vm).await?;
    let mut guest = connect(&vm).await?;
    let mut unix = unix_pair().map_err(ScenarioError::at("Unix socket pair"))?;
    let mut series = KINDS.map(|kind| (kind, Series::default()));
    let mut fresh = Vec::new();
    for round in 0..WARM_UP + n {
        for (kind, series) in &mut series {
            let before = vm.emulated_instructions();
            let took = within(kind.exchange.on(&mut guest)).await?;
            let after = vm.emulated_instructions();
            let peer = within(kind.exchange.on(&mut unix)).await?;
            if round >= WARM_UP {
                series.guest.push(kind.figure(took));
                series.unix.push(kind.figure(peer));
                let spent = after.zip(before).map(|(after, before)| after - before);
                series.instructions.extend(spent.map(|count| count as f64));
            }
        }
    }
    // The program serves one connection at a time.
    drop(guest);
    for _ in 0..n {
        let begin = Instant::now();
        let mut stream = connect(&vm).await?;
        let shortest = Exchange {
            asked: LEAST,
            answered: LEAST,
        };
        within(shortest.on(&mut stream)).await?;
        fresh.push(us(begin.elapsed()));
    }
    for (kind, series) in series {
        kind.report(report, series);
    }
    report.add(SCENARIO, "connect and first answer", "us", "hearth", fresh);
    Ok(())
}

/// The samples of one kind.
#[derive(Default)]
struct Series {
    guest: Vec<f64>,
    unix: Vec<f64>,
    instructions: Vec<f64>,
}

impl Kind {
    fn figure(&self, took: Duration) -> f64 {
        match self.measure {
            Measure::RoundTrip => us(took),
            Measure::Throughput => {
                let bytes = self.exchange.asked.max(self.exchange.answered);
                f64::from(bytes) / f64::from(1 << 20) / took.as_secs_f64()
            }
        }
    }

    fn report(&self, report: &mut Report, series: Series) {
        let metric = self.metric;
        let unit = match self.measure {
            Measure::RoundTrip => "us",
            Measure::Throughput => "MiB/s",
        };
        report.add(SCENARIO, metric, unit, "hearth", series.guest);
        report.add(SCENARIO, metric, unit, "unix", series.unix);
        if !series.instructions.is_empty() {
            let unit = "instructions";
            report.add(SCENARIO, metric, unit, "hearth", series.instructions);
        }
        // Either way, the ratio is how many times slower Hearth is.
        match self.measure {
            Measure::RoundTrip => report.compare(metric, "hearth", "unix"),
            Measure::Throughput => report.compare(metric, "unix", "hearth"),
        }
    }
}

/// Starts the guest's program, and waits until it listens.
pub(super) async fn program(vm: &Vm) -> Result<Exec<VsockStream>, ScenarioError> {
    let command = Command::new("vsock-exchange").arg(PORT.to_string());
    let exec = dial(vm.vsock()).await?.exec(command).await;
    let mut exec = exec.map_err(ScenarioError::at("guest's program"))?;
    let stdout = exec.stdout().ok_or("no output");
    let mut stdout = stdout.map_err(ScenarioError::at("guest's program"))?;
    let mut line = [0; LISTENING.len()];
    within(stdout.read_exact(&mut line)).await?;
    match line == *LISTENING {
        true => Ok(exec),
        false => Err(ScenarioError::at("guest's program")("it does not listen")),
    }
}

pub(super) async fn connect(vm: &Vm) -> Result<VsockStream, ScenarioError> {
    let stream = vm.vsock().connect(PORT).await;
    stream.map_err(ScenarioError::at("connect"))
}

/// Returns one end of a pair; a thread answers at the other end until this end is dropped.
fn unix_pair() -> io::Result<UnixStream> {
    let (here, there) = Socket::pair()?;
    std::thread::Builder::new()
        .name("unix-peer".into())
        .spawn(move || serve(there))?;
    here.set_nonblocking(true)?;
    UnixStream::from_std(here)
}

pub(super) async fn within<T>(
    step: impl Future<Output = io::Result<T>>,
) -> Result<T, ScenarioError> {
    let done = tokio::time::timeout(STUCK, step).await;
    let done = done.map_err(ScenarioError::at("exchange"))?;
    done.map_err(ScenarioError::at("exchange"))
}
