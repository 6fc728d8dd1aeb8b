//! `print(6 * 7)` in a new interpreter, in a guest that is made on demand from a capture. Hearth in
//! turns with Firecracker: the same kernel, initramfs, image and agent.

use std::path::Path;
use std::time::{Duration, Instant};

use hearth_agent::client::OutputLimits;
use hearth_agent::proto::ROOT_WORD;
use hearth_pool::{Language, Profile};
use hearth_vmm::Template;

use super::agent::{dial, template_of};
use super::boot::{Files, Shape};
use super::languages::{SCENARIO, WORD, program};
use super::peers::{Side, boot_words, booted, missing};
use super::{ScenarioError, us};
use crate::peer::{Booted, Firecracker, Peers};
use crate::report::Report;

/// How long a guest may take by default; this covers a boot.
const LIMIT: Duration = Duration::from_secs(300);

/// Takes `n` samples of each side. A peer that fails is reported as not measured.
///
/// # Errors
/// When Hearth's own guest cannot be made, or prints anything else.
pub(super) async fn run(
    report: &mut Report,
    files: Files<'_>,
    (root, language): (&Path, Language),
    peers: &Peers,
    n: usize,
) -> Result<(), ScenarioError> {
    let Some(firecracker) = &peers.firecracker else {
        return Ok(());
    };
    let limit = peers.limit.unwrap_or(LIMIT);
    let metric = format!("capture to print(6 * 7), fresh connection ({language})");
    match in_turns(files, (root, language), firecracker, n, limit).await {
        Ok((version, ours, theirs)) => {
            report.add(SCENARIO, &metric, "us", "hearth", ours);
            report.add(SCENARIO, &metric, "us", "firecracker", theirs);
            report.compare(&metric, "hearth", "firecracker");
            report.notes.push(format!(
                "{metric}: {version} is a process of its own, whose start counts, and its snapshot lies in files; hearth forks a \
                 template in memory; neither gives its clone a new identity"
            ));
        }
        Err(Side::Ours(error)) => return Err(error),
        Err(Side::Theirs(error)) => missing(report, &format!("{metric} (firecracker)"), &error),
    }
    Ok(())
}

/// Returns the peer's version, and the samples of both sides.
async fn in_turns(
    files: Files<'_>,
    (root, language): (&Path, Language),
    firecracker: &Path,
    n: usize,
    limit: Duration,
) -> Result<(String, Vec<f64>, Vec<f64>), Side> {
    let shape = Shape {
        memory_mib: Profile::of(language).memory_mib,
        ..files.shape
    };
    let files = Files { shape, ..files };
    let config = || files.config().pmem(root).append(ROOT_WORD);
    let built = config().build().map_err(ScenarioError::at("configuration"));
    let words = boot_words(&built.map_err(Side::Ours)?).map_err(Side::Ours)?;
    let guest = Booted {
        root: Some(root),
        ..booted(files, &words, limit)
    };
    // The peer goes first: if it fails, no boot of ours is spent.
    let dir = tempfile::tempdir().map_err(|error| Side::Theirs(error.into()))?;
    let firecracker = Firecracker::find(firecracker, dir.path()).await;
    let firecracker = firecracker.map_err(Side::Theirs)?;
    firecracker.snapshot(guest).await.map_err(Side::Theirs)?;
    let template = template_of(config()).await.map_err(Side::Ours)?;
    let (mut ours, mut theirs) = (vec![], vec![]);
    for _ in 0..n {
        let program = program(language);
        let restored = firecracker.restore_to_result(program, WORD, limit).await;
        theirs.push(us(restored.map_err(Side::Theirs)?));
        let forked = fork_to_result(&template, language).await;
        ours.push(us(forked.map_err(Side::Ours)?));
    }
    Ok((firecracker.version, ours, theirs))
}

async fn fork_to_result(
    template: &Template,
    language: Language,
) -> Result<Duration, ScenarioError> {
    let begin = Instant::now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let agent = dial(vm.vsock()).await?;
    let exec = agent.exec(program(language)).await;
    let output = exec
        .map_err(ScenarioError::at("program"))?
        .output(OutputLimits::default())
        .await;
    let output = output.map_err(ScenarioError::at("program"))?;
    let took = begin.elapsed();
    vm.destroy();
    match output.stdout == WORD {
        true => Ok(took),
        false => Err(ScenarioError::at("program")(format!("it says {output:?}"))),
    }
}
