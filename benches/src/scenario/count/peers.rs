//! Firecracker, its process included, in turns with Hearth.

use super::{BUSY, IDLE, REST, SCENARIO, failed};
use crate::meter::{Meter, Spent};
use crate::peer::{Firecracker, Peers};
use crate::report::Report;
use crate::scenario::ScenarioError;
use crate::scenario::agent::template;
use crate::scenario::boot::Files;
use crate::scenario::peers::{LIMIT, Side, boot_words, booted, fork_to_pong, missing, to_pong};

const BOOT: &str = "cold boot to pong, beside peers";
const RESTORE: &str = "restore to pong, fresh connection";

/// Counts what it takes to boot and to restore a guest, `n` times each, on both sides.
pub(super) async fn run(
    meter: Meter,
    report: &mut Report,
    files: Files<'_>,
    peers: &Peers,
    n: usize,
) -> Result<(), ScenarioError> {
    let Some(program) = &peers.firecracker else {
        let why = "count: Firecracker: none was given, see --firecracker";
        report.not_measured.push(why.into());
        return Ok(());
    };
    let dir = tempfile::tempdir().map_err(ScenarioError::at("directory for sockets"))?;
    let counted = async {
        let found = Firecracker::find(program, dir.path()).await;
        let firecracker = found.map_err(Side::Theirs)?;
        in_turns(meter, report, files, peers, &firecracker, n).await
    };
    match counted.await {
        Ok(()) => Ok(()),
        Err(Side::Ours(error)) => Err(error),
        Err(Side::Theirs(error)) => {
            missing(report, "Firecracker", &error);
            Ok(())
        }
    }
}

async fn in_turns(
    meter: Meter,
    report: &mut Report,
    files: Files<'_>,
    peers: &Peers,
    firecracker: &Firecracker,
    n: usize,
) -> Result<(), Side> {
    let limit = peers.limit.unwrap_or(LIMIT);
    let config = files.config().build();
    let config = config.map_err(ScenarioError::at("configuration"));
    let config = config.map_err(Side::Ours)?;
    let preloaded = config.preload().map_err(ScenarioError::at("image"));
    preloaded.map_err(Side::Ours)?;
    let words = boot_words(&config).map_err(Side::Ours)?;
    let guest = booted(files, &words, limit);
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..n {
        let booted = firecracker.boot_to_pong(guest);
        theirs.push(spent(meter, booted, Side::Theirs).await?);
        ours.push(spent(meter, to_pong(&config, limit), Side::Ours).await?);
    }
    add(report, BOOT, &ours, &theirs);
    firecracker.snapshot(guest).await.map_err(Side::Theirs)?;
    let template = template(files).await.map_err(Side::Ours)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..n {
        let restored = firecracker.restore_to_pong(limit);
        theirs.push(spent(meter, restored, Side::Theirs).await?);
        ours.push(spent(meter, fork_to_pong(&template), Side::Ours).await?);
    }
    add(report, RESTORE, &ours, &theirs);
    report.notes.push(format!(
        "{}: a process of its own, whose start and end count; hearth's guest is one of this process",
        firecracker.version
    ));
    Ok(())
}

/// Measures one step; its failure counts as that side's.
async fn spent<T, E>(
    meter: Meter,
    step: impl Future<Output = Result<T, E>>,
    side: fn(E) -> Side,
) -> Result<Spent, Side> {
    let ours = |error| Side::Ours(failed(error));
    tokio::time::sleep(REST).await;
    let run = meter.start().map_err(ours)?;
    step.await.map_err(side)?;
    Ok(run.stop().map_err(ours)?.0)
}

/// Adds the counts of both sides, and the ratio of what ran: of the rows that are added last.
fn add(report: &mut Report, metric: &str, ours: &[Spent], theirs: &[Spent]) {
    for (side, samples) in [("hearth", ours), ("firecracker", theirs)] {
        let idle = samples.iter().map(|spent| spent.idle).collect();
        report.add(SCENARIO, metric, IDLE, side, idle);
        let busy = samples.iter().map(|spent| spent.busy).collect();
        report.add(SCENARIO, metric, BUSY, side, busy);
    }
    report.compare(metric, "hearth", "firecracker");
}
