//! Memory that a guest gives back to its host: through its balloon on request, and through free
//! page reporting without one. The private memory of the host falls by what the guest touched
//! before; untouched pages return nothing.

use std::pin::pin;
use std::time::{Duration, Instant};

use hearth_agent::client::{Command, OutputLimits};
use hearth_vmm::Vm;
use tokio::time::{sleep, timeout};

use super::ScenarioError;
use super::agent::{dial, renew, resume, template};
use super::boot::Files;
use super::samples::Samples;
use crate::report::Report;

/// The change of the balloon in one step, in MiB.
const STEP_MIB: u32 = 4;
/// Memory that a program touches and frees, in MiB.
const TOUCHED_MIB: u32 = 16;
/// Time limit of a step.
const STUCK: Duration = Duration::from_secs(120);
/// The guest's kernel waits two seconds before it reports; after twice that time without a report
/// it has reported everything.
const QUIET: Duration = Duration::from_secs(4);
/// Interval at which the memory of a guest is measured.
const LOOK: Duration = Duration::from_millis(20);
const MIB: f64 = 1048576.0;

/// Inflates and deflates the balloon `n` times, and has `touches` programs leave freed memory
/// behind for each way to give it back.
///
/// # Errors
/// When the guest cannot be made, or the balloon does not reach its size.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    n: usize,
    touches: usize,
) -> Result<(), ScenarioError> {
    let template = template(files).await?.count_instructions(true);
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let mut agent = resume(&vm)?;
    renew(&mut agent, 0).await?;
    let mut samples = Samples::default();
    for _ in 0..n {
        resized(&vm, STEP_MIB, "inflate", &mut samples).await?;
        resized(&vm, 0, "deflate", &mut samples).await?;
    }
    for _ in 0..touches {
        given(&vm, &mut samples).await?;
        reported(&vm, &mut samples).await?;
    }
    samples.report(report, "balloon", "hearth");
    Ok(())
}

/// Measures one step of the balloon, in time and in emulated instructions.
async fn resized(
    vm: &Vm,
    mib: u32,
    metric: &'static str,
    samples: &mut Samples,
) -> Result<(), ScenarioError> {
    let (begin, before) = (Instant::now(), vm.emulated_instructions());
    resize(vm, mib).await?;
    let step = f64::from(STEP_MIB);
    samples.push(metric, "MiB/s", step / begin.elapsed().as_secs_f64());
    if let Some((after, before)) = vm.emulated_instructions().zip(before) {
        let each = (after - before) as f64 / step;
        samples.push(metric, "instructions per MiB", each);
    }
    Ok(())
}

async fn resize(vm: &Vm, mib: u32) -> Result<(), ScenarioError> {
    let resized = vm.balloon().resize(mib, STUCK).await;
    resized.map_err(ScenarioError::at("balloon"))
}

/// Measures the memory that returns to the host when the balloon takes as much as a program has
/// just freed.
async fn given(vm: &Vm, samples: &mut Samples) -> Result<(), ScenarioError> {
    let peak = touched(vm).await?;
    resize(vm, TOUCHED_MIB).await?;
    let metric = "returned by a balloon of 16 MiB";
    samples.push(metric, "MiB", peak.mib - private_mib(vm)?);
    resize(vm, 0).await
}

/// Measures the memory that returns to the host through page reporting, without a request.
async fn reported(vm: &Vm, samples: &mut Samples) -> Result<(), ScenarioError> {
    // Pages that were freed before are not counted.
    all_reported(vm, vm.balloon().reported()).await;
    let first = vm.balloon().reported();
    let peak = touched(vm).await?;
    let last = all_reported(vm, first).await;
    let mib = f64::from(vm.balloon().reported() - first);
    samples.push("reported of 16 MiB that were freed", "MiB", mib);
    let metric = "returned by page reporting";
    samples.push(metric, "MiB", peak.mib - private_mib(vm)?);
    if let Some(last) = last {
        // From the moment of the peak, so the time that the guest's kernel waits is included.
        let metric = "page reporting";
        samples.push(metric, "MiB/s", mib / (last - peak.at).as_secs_f64());
    }
    Ok(())
}

/// Waits until the guest has nothing more to report. Returns the time of its last report beyond
/// `had`, if there was one.
async fn all_reported(vm: &Vm, had: u32) -> Option<Instant> {
    let (mut seen, mut since, mut last) = (had, Instant::now(), None);
    while since.elapsed() < QUIET {
        let now = vm.balloon().reported();
        if now != seen {
            (seen, since) = (now, Instant::now());
            last = Some(since);
        }
        sleep(LOOK).await;
    }
    last
}

/// The most memory that a guest had while a program ran.
struct Peak {
    mib: f64,
    at: Instant,
}

/// Runs a program that writes to memory and exits, and returns the peak: a guest may report freed
/// memory before the host sees the program's end.
async fn touched(vm: &Vm) -> Result<Peak, ScenarioError> {
    let command = Command::new("alloc").arg(TOUCHED_MIB.to_string());
    let agent = dial(vm.vsock()).await?;
    let output = async {
        let exec = agent.exec(command).await?;
        exec.output(OutputLimits::default()).await
    };
    let mut output = pin!(timeout(STUCK, output));
    let mut peak = Peak {
        mib: private_mib(vm)?,
        at: Instant::now(),
    };
    let output = loop {
        tokio::select! {
            output = &mut output => break output,
            () = sleep(LOOK) => {}
        }
        let (mib, at) = (private_mib(vm)?, Instant::now());
        if mib > peak.mib {
            peak = Peak { mib, at };
        }
    };
    let output = output.map_err(ScenarioError::at("memory of a program"))?;
    let output = output.map_err(ScenarioError::at("memory of a program"))?;
    match output.status.success() {
        true => Ok(peak),
        false => Err(ScenarioError::at("memory of a program")(
            "the guest had none",
        )),
    }
}

fn private_mib(vm: &Vm) -> Result<f64, ScenarioError> {
    let bytes = vm.private_bytes();
    let bytes = bytes.map_err(ScenarioError::at("private memory"))?;
    Ok(bytes as f64 / MIB)
}
