//! Guests without a pool: up to the first instruction beside the baseline, a cold boot, and a clone
//! that answers requests.

use hearth_agent::proto::READY_PORT;
use hearth_agent::{Command, client::OutputLimits};
use hearth_vmm::{Template, Vm, VmConfig};

use super::kvm::{Kvm, Names};
use super::{BUSY, Counts, SCENARIO};
use crate::meter::millions;
use crate::report::Report;
use crate::scenario::ScenarioError;
use crate::scenario::agent::{dial, greet, renew, resume, template};
use crate::scenario::boot::Files;
use crate::scenario::floor::Floor;
use crate::scenario::fork::{CODE, first_exit};
use crate::scenario::{exchange::Exchange, vsock};

const FIRST: &str = "fork to first instruction";
const SHELL: &str = "shell to first instruction";
/// Repetitions in one measurement of a short operation: a tick of the host's clock would weigh
/// heavily on a single one.
const MANY: usize = 40;
const MIB: u32 = 1 << 20;
/// The shortest question and answer.
const LEAST: u32 = crate::scenario::exchange::HEAD as u32;

/// Counts up to a flat guest's first instruction, from nothing and from a prepared VM, in turns
/// with bare ioctls.
pub(super) async fn first_instruction(
    counts: &mut Counts,
    report: &mut Report,
) -> Result<(), ScenarioError> {
    let floor = Floor::new()?;
    let config = VmConfig::flat(CODE).memory_mib(128).build();
    let vm = Vm::create(&config.map_err(ScenarioError::at("configuration"))?);
    let template = vm.map_err(ScenarioError::at("create"))?.into_template();
    let template = template.map_err(ScenarioError::at("template"))?;
    let (mut whole, mut from_shell) = (vec![], vec![]);
    for (_, counted) in counts.rounds() {
        let run = counts.start().await?;
        let vm = template.fork().map_err(ScenarioError::at("fork"))?;
        first_exit(&vm).await?;
        counts.stop(run, FIRST, 1, counted)?;
        vm.destroy();
        let shell = template.prepare().map_err(ScenarioError::at("shell"))?;
        let run = counts.start().await?;
        let vm = shell.fork().map_err(ScenarioError::at("fork"))?;
        first_exit(&vm).await?;
        counts.stop(run, SHELL, 1, counted)?;
        vm.destroy();
        // The baseline ends its VM itself, after it has read the clock.
        let times = floor.fork()?;
        if counted {
            whole.push(millions(times.whole));
            from_shell.push(millions(times.from_shell));
        }
    }
    let side = "floor, with waits";
    report.add(SCENARIO, FIRST, BUSY, side, whole);
    report.add(SCENARIO, SHELL, BUSY, side, from_shell);
    Ok(())
}

const BOOT: &str = "cold boot to pong";
const OF_BOOT: Names = Names {
    monitor: "cold boot: exits to the monitor",
    memory: "cold boot: memory touched",
    exits: "cold boot: exits to KVM",
    faults: "cold boot: faults of guest memory",
    small: "cold boot: mapped, of 4 KiB",
    large: "cold boot: mapped, of 2 MiB",
};

pub(super) async fn boot(counts: &mut Counts, files: Files<'_>) -> Result<(), ScenarioError> {
    let config = files.config().build();
    let config = config.map_err(ScenarioError::at("configuration"))?;
    config.preload().map_err(ScenarioError::at("image"))?;
    for (_, counted) in counts.rounds() {
        let before = Kvm::now();
        let mut run = counts.start().await?;
        let vm = Vm::create(&config).map_err(ScenarioError::at("create"))?;
        let listener = vm.vsock().listen(READY_PORT);
        let mut listener = listener.map_err(ScenarioError::at("listen"))?;
        run.phase("cold boot: create");
        vm.resume().map_err(ScenarioError::at("resume"))?;
        let stream = listener.accept().await;
        run.phase("cold boot: to the agent's call");
        let mut agent = greet(stream.map_err(ScenarioError::at("agent"))?).await?;
        agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
        run.phase("cold boot: greeting and pong");
        counts.stop(run, BOOT, 1, counted)?;
        if counted {
            counts.vm(&vm, before, &OF_BOOT)?;
            let hello = agent.hello().unwrap_or_default();
            let entered = hello.started_us as f64 / 1e3;
            let metric = "cold boot: kernel entry to init (guest clock)";
            counts.samples.push(metric, "M", entered);
        }
        drop(agent);
        vm.destroy();
    }
    Ok(())
}

const PONG: &str = "fork to pong";
const OF_FORK: Names = Names {
    monitor: "fork: exits to the monitor",
    memory: "fork: memory written",
    exits: "fork: exits to KVM",
    faults: "fork: faults of guest memory",
    small: "fork: mapped, of 4 KiB",
    large: "fork: mapped, of 2 MiB",
};

/// Counts clones of one template, up to their first answer to a ping.
pub(super) async fn clones(
    counts: &mut Counts,
    files: Files<'_>,
) -> Result<Template, ScenarioError> {
    let template = template(files).await?;
    let first = template.fork().map_err(ScenarioError::at("fork"))?;
    renew(&mut resume(&first)?, 1).await?;
    let set = first.working_set();
    let set = set.map_err(ScenarioError::at("working set"))?;
    first.destroy();
    let prefetched = template.clone().prefetch(set);
    for (_, counted) in counts.rounds() {
        let before = Kvm::now();
        let mut run = counts.start().await?;
        let vm = template.fork().map_err(ScenarioError::at("fork"))?;
        run.phase("fork: fork call");
        renew(&mut resume(&vm)?, 1).await?;
        run.phase("fork: reseed and pong");
        counts.stop(run, PONG, 1, counted)?;
        if counted {
            counts.vm(&vm, before, &OF_FORK)?;
        }
        vm.destroy();

        let run = counts.start().await?;
        let vm = template.fork().map_err(ScenarioError::at("fork"))?;
        let mut agent = dial(vm.vsock()).await?;
        agent.ping(1).await.map_err(ScenarioError::at("ping"))?;
        counts.stop(run, "fork to pong, fresh connection", 1, counted)?;
        drop(agent);
        vm.destroy();

        let run = counts.start().await?;
        let vm = prefetched.fork().map_err(ScenarioError::at("fork"))?;
        renew(&mut resume(&vm)?, 1).await?;
        counts.stop(run, "fork to pong, prefetched", 1, counted)?;
        vm.destroy();

        let ways = [
            (&template, "shell to pong"),
            (&prefetched, "shell to pong, prefetched"),
        ];
        for (template, what) in ways {
            let shell = template.prepare().map_err(ScenarioError::at("shell"))?;
            let run = counts.start().await?;
            let vm = shell.fork().map_err(ScenarioError::at("fork"))?;
            renew(&mut resume(&vm)?, 1).await?;
            counts.stop(run, what, 1, counted)?;
            vm.destroy();
        }
    }
    Ok(template)
}

/// Counts a clone that answers requests and runs programs.
pub(super) async fn at_work(counts: &mut Counts, template: &Template) -> Result<(), ScenarioError> {
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let mut agent = resume(&vm)?;
    renew(&mut agent, 0).await?;
    let _program = vsock::program(&vm).await?;
    let mut stream = vsock::connect(&vm).await?;
    for (round, counted) in counts.rounds() {
        let run = counts.start().await?;
        for nonce in 1..=MANY {
            let pong = agent.ping((round * MANY + nonce) as u64).await;
            pong.map_err(ScenarioError::at("ping"))?;
        }
        counts.stop(run, "ping", MANY, counted)?;

        let run = counts.start().await?;
        for _ in 0..MANY {
            let mut fresh = dial(vm.vsock()).await?;
            fresh.ping(1).await.map_err(ScenarioError::at("ping"))?;
        }
        counts.stop(run, "ping on a fresh connection", MANY, counted)?;

        let ways = [
            ("1 MiB to the guest", MIB, LEAST),
            ("1 MiB from the guest", LEAST, MIB),
        ];
        for (what, asked, answered) in ways {
            let run = counts.start().await?;
            let exchange = Exchange { asked, answered };
            vsock::within(exchange.on(&mut stream)).await?;
            counts.stop(run, what, 1, counted)?;
        }

        let run = counts.start().await?;
        for _ in 0..MANY {
            plain_program(&vm).await?;
        }
        counts.stop(run, "exec of `true`", MANY, counted)?;
    }
    Ok(())
}

/// Runs a program that does nothing, on a connection of its own as every program has.
async fn plain_program(vm: &Vm) -> Result<(), ScenarioError> {
    let agent = dial(vm.vsock()).await?;
    let exec = agent.exec(Command::new("true")).await;
    let exec = exec.map_err(ScenarioError::at("program"))?;
    let output = exec.output(OutputLimits::default()).await;
    let output = output.map_err(ScenarioError::at("program"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(ScenarioError::at("program")("it failed")),
    }
}
