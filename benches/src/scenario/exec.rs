//! From the hand-off of a parked guest to the result of a plain program in it.

use std::time::{Duration, Instant};

use hearth_agent::client::OutputLimits;
use hearth_pool::{Parking, Refill};

use super::ScenarioError;
use super::boot::Files;
use super::pool::{Guest, PROFILE, backend, config, full, start};
use super::samples::Samples;
use crate::report::Report;

/// Size of the pool.
const SIZE: usize = 2;
/// Idle time before a hand-off.
const REST: Duration = Duration::from_millis(20);
/// The program's output.
const WORD: &str = "result";

/// Runs a program in `n` guests, and a second one in each.
///
/// # Errors
/// When a guest cannot be made, or its program prints anything else.
pub async fn run(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let backend = backend(files).await?;
    let pool = start(
        &backend,
        config(files.shape, SIZE, Refill::Automatic),
        Parking::Paused,
    )
    .await?;
    let mut samples = Samples::default();
    // The first one is not counted.
    for round in 0..=n {
        full(&pool).await?;
        tokio::time::sleep(REST).await;
        let begin = Instant::now();
        let guest = pool
            .acquire(PROFILE)
            .map_err(ScenarioError::at("acquire"))?;
        let handed = begin.elapsed();
        let started = program(&guest).await?;
        let ended = begin.elapsed();
        let again = Instant::now();
        program(&guest).await?;
        let again = again.elapsed();
        guest.release().await;
        if round > 0 {
            samples.time("hand-off", handed);
            samples.time("hand-off to a running program", started - begin);
            samples.time("hand-off to its result", ended);
            samples.time("another program in the same guest", again);
        }
    }
    pool.stop().await;
    samples.report(report, "exec", "hearth");
    Ok(())
}

/// Runs a program to its end; returns when it was seen to have started.
async fn program(guest: &Guest) -> Result<Instant, ScenarioError> {
    let command = guest.command("echo").arg(WORD);
    let exec = guest.exec(command).await;
    let exec = exec.map_err(ScenarioError::at("program"))?;
    let started = Instant::now();
    let output = exec.output(OutputLimits::default()).await;
    let output = output.map_err(ScenarioError::at("program"))?;
    match output.status.success() && output.stdout == format!("{WORD}\n").as_bytes() {
        true => Ok(started),
        false => Err(ScenarioError::at("program")("it says something else")),
    }
}
