//! Other monitors in turns with Hearth: the same kernel, initramfs, kernel parameters, memory and
//! processors.

use std::time::{Duration, Instant};

use hearth_agent::proto::READY_PORT;
use hearth_vmm::{Host, Template, Vm, VmConfig};

use super::ScenarioError;
use super::agent::{dial, greet, template};
use super::boot::Files;
use crate::peer::{Booted, Channel, Firecracker, PeerError, Peers, Qemu, SERIAL_WORDS};
use crate::report::Report;
use crate::suite::chain;
use crate::target::Bound;

const SCENARIO: &str = "peers";
/// Target: a cold boot's time as a share of a peer's with the same files and kernel parameters.
const COLD: f64 = 0.9;
/// How long a guest may take by default.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// Measures Hearth and each given peer, in turns, `n` times. A peer that fails is reported as not
/// measured.
///
/// # Errors
/// When Hearth's own guest does not come up.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    peers: &Peers,
    n: usize,
) -> Result<(), ScenarioError> {
    let limit = peers.limit.unwrap_or(LIMIT);
    if peers.qemu.is_none() && peers.firecracker.is_none() {
        let why = "other monitors: none was given, see --qemu and --firecracker";
        report.not_measured.push(why.into());
    }
    if let Some(program) = &peers.qemu {
        match Qemu::find(program).await {
            Ok(qemu) => beside_qemu(report, files, &qemu, n, limit).await?,
            Err(error) => missing(report, "QEMU", &error),
        }
    }
    if let Some(program) = &peers.firecracker {
        let dir = tempfile::tempdir().map_err(ScenarioError::at("directory for sockets"))?;
        match Firecracker::find(program, dir.path()).await {
            Ok(firecracker) => beside_firecracker(report, files, &firecracker, n, limit).await?,
            Err(error) => missing(report, "Firecracker", &error),
        }
    }
    Ok(())
}

pub(super) fn missing(report: &mut Report, peer: &str, error: &PeerError) {
    let why = format!("{peer}: {}", chain(error));
    report.not_measured.push(why);
}

/// Returns the kernel parameters for this kind of host.
pub(super) fn boot_words(config: &VmConfig) -> Result<String, ScenarioError> {
    let host = Host::get().map_err(ScenarioError::at("host"))?;
    Ok(config.boot_words(host.profile()).join(" "))
}

pub(super) fn booted<'a>(files: Files<'a>, words: &'a str, limit: Duration) -> Booted<'a> {
    Booted {
        kernel: files.kernel,
        initramfs: files.initramfs,
        root: None,
        words,
        memory_mib: files.shape.memory_mib,
        vcpus: files.shape.vcpus,
        limit,
    }
}

async fn beside_qemu(
    report: &mut Report,
    files: Files<'_>,
    qemu: &Qemu,
    n: usize,
    limit: Duration,
) -> Result<(), ScenarioError> {
    // The same kernel parameters and devices on both sides.
    let (config, metric, way) = match qemu.channel {
        Channel::Vsock => (
            files.config(),
            "cold boot to pong, over vsock",
            "vhost-vsock",
        ),
        Channel::Serial => (
            files.config().console(true).append(SERIAL_WORDS),
            "cold boot to pong, with a serial line",
            "the serial line, byte by byte",
        ),
    };
    let config = config.build();
    let config = config.map_err(ScenarioError::at("configuration"))?;
    config.preload().map_err(ScenarioError::at("image"))?;
    let words = boot_words(&config)?;
    let (mut ours, mut theirs) = (vec![], vec![]);
    for _ in 0..n {
        // The peer goes first: if it fails, no boot of ours is spent.
        match qemu.boot_to_pong(booted(files, &words, limit)).await {
            Ok(took) => theirs.push(super::us(took)),
            Err(error) => {
                missing(report, "QEMU", &error);
                return Ok(());
            }
        }
        ours.push(super::us(to_pong(&config, limit).await?));
    }
    report.add(SCENARIO, metric, "us", "hearth", ours);
    report.add(SCENARIO, metric, "us", "qemu", theirs);
    report.compare(metric, "hearth", "qemu");
    report.expect_ratio(metric, "hearth", "qemu", Bound::AtMost(COLD));
    report.notes.push(format!(
        "{}: a process of its own, whose start and firmware count, with a CPUID and an MP table of its own, and its agent answers \
         over {way}; hearth's guest is one of this process, its files read before, and its agent answers over its own vsock",
        qemu.version
    ));
    Ok(())
}

async fn beside_firecracker(
    report: &mut Report,
    files: Files<'_>,
    firecracker: &Firecracker,
    n: usize,
    limit: Duration,
) -> Result<(), ScenarioError> {
    let config = files.config().build();
    let config = config.map_err(ScenarioError::at("configuration"))?;
    config.preload().map_err(ScenarioError::at("image"))?;
    let words = boot_words(&config)?;
    let guest = booted(files, &words, limit);
    let mut sides = [vec![], vec![], vec![], vec![]];
    let measured = async {
        for _ in 0..n {
            let theirs = firecracker.boot_to_pong(guest).await;
            let theirs = theirs.map_err(Side::Theirs)?;
            let ours = to_pong(&config, limit).await.map_err(Side::Ours)?;
            push(&mut sides, [Some(ours), Some(theirs), None, None]);
        }
        firecracker.snapshot(guest).await.map_err(Side::Theirs)?;
        let template = template(files).await.map_err(Side::Ours)?;
        for _ in 0..n {
            let ours = fork_to_pong(&template).await.map_err(Side::Ours)?;
            let theirs = firecracker.restore_to_pong(limit).await;
            let theirs = theirs.map_err(Side::Theirs)?;
            push(&mut sides, [None, None, Some(ours), Some(theirs)]);
        }
        Ok::<(), Side>(())
    };
    match measured.await {
        Ok(()) => {}
        Err(Side::Ours(error)) => return Err(error),
        Err(Side::Theirs(error)) => {
            missing(report, "Firecracker", &error);
            return Ok(());
        }
    }
    let [booted, their_boot, forked, restored] = sides;
    let metric = "cold boot to pong, beside peers";
    report.add(SCENARIO, metric, "us", "hearth", booted);
    report.add(SCENARIO, metric, "us", "firecracker", their_boot);
    report.compare(metric, "hearth", "firecracker");
    report.expect_ratio(metric, "hearth", "firecracker", Bound::AtMost(COLD));
    let metric = "restore to pong, fresh connection";
    report.add(SCENARIO, metric, "us", "hearth", forked);
    report.add(SCENARIO, metric, "us", "firecracker", restored);
    report.compare(metric, "hearth", "firecracker");
    report.notes.push(format!(
        "{}: a process of its own, whose start counts, and a snapshot in files; hearth forks a template in memory",
        firecracker.version
    ));
    Ok(())
}

/// The side that failed, with its error.
pub(super) enum Side {
    Ours(ScenarioError),
    Theirs(PeerError),
}

fn push(sides: &mut [Vec<f64>; 4], taken: [Option<Duration>; 4]) {
    for (side, took) in sides.iter_mut().zip(taken) {
        side.extend(took.map(super::us));
    }
}

pub(super) async fn to_pong(config: &VmConfig, limit: Duration) -> Result<Duration, ScenarioError> {
    let begin = Instant::now();
    let vm = Vm::create(config).map_err(ScenarioError::at("create"))?;
    let listener = vm.vsock().listen(READY_PORT);
    let mut listener = listener.map_err(ScenarioError::at("listen"))?;
    vm.resume().map_err(ScenarioError::at("resume"))?;
    let stream = tokio::time::timeout(limit, listener.accept()).await;
    let stream = stream.map_err(ScenarioError::at("agent"))?;
    let mut agent = greet(stream.map_err(ScenarioError::at("agent"))?).await?;
    agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
    let took = begin.elapsed();
    vm.destroy();
    Ok(took)
}

pub(super) async fn fork_to_pong(template: &Template) -> Result<Duration, ScenarioError> {
    let begin = Instant::now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let mut agent = dial(vm.vsock()).await?;
    agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
    let took = begin.elapsed();
    drop(agent);
    vm.destroy();
    Ok(took)
}
