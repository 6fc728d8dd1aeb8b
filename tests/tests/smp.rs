#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Guests with several vCPUs, all of which do work.

use std::time::{Duration, Instant};

use hearth_agent::client::Command;
use hearth_agent::proto::{ExitStatus, Input};
use hearth_tests::{Guest, alone, kvm, vcpu_times, within};
use hearth_vmm::EntryChoice;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

/// Rounds of work on each vCPU. A round is a multiplication that needs the result of the one
/// before: at least 3 cycles.
const ROUNDS: u64 = 300_000_000;
/// Processor time that any processor needs at least for these rounds.
const WORK: Duration = Duration::from_millis(150);

/// Returns the result of the guest's `work-on`.
fn sum(cpu: usize) -> u64 {
    (0..ROUNDS).fold(0xcbf2_9ce4_8422_2325, |sum, _| {
        (sum ^ cpu as u64).wrapping_mul(0x100_0000_01b3)
    })
}

async fn text_of(guest: &Guest, path: &str) -> String {
    let output = guest.run(Command::new("cat").arg(path)).await;
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a program on each vCPU of the only guest of this process, all at once. Fails unless each
/// ran on the vCPU that it asked for, computed the right sum, and kept a thread of the host busy.
async fn every_vcpu_works(guest: &Guest, vcpus: usize) {
    let cpuinfo = text_of(guest, "/proc/cpuinfo").await;
    let processors = cpuinfo.lines().filter(|l| l.starts_with("processor"));
    assert_eq!(processors.count(), vcpus, "{cpuinfo}");
    // The vCPUs are cores of one package, not threads of a core.
    for name in ["cpu cores", "siblings"] {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        // Kernels without topology code do not print it.
        if let Some(line) = line {
            assert!(line.ends_with(&format!(": {vcpus}")), "{line}");
        }
    }

    let mut programs = Vec::new();
    for cpu in 0..vcpus {
        let command = Command::new("work-on").args([cpu.to_string(), ROUNDS.to_string()]);
        let agent = guest.connect().await;
        let exec = agent.exec(command.stdin(Input::Pipe));
        let mut exec = within(10, "start of a program", exec).await.unwrap();
        let (stdin, stdout) = (exec.stdin().unwrap(), exec.stdout().unwrap());
        programs.push((exec, stdin, BufReader::new(stdout)));
    }
    for (cpu, (_, _, said)) in programs.iter_mut().enumerate() {
        let mut line = String::new();
        let read = said.read_line(&mut line);
        within(10, "a program on its processor", read)
            .await
            .unwrap();
        assert_eq!(line, format!("{cpu}\n"));
    }
    // All programs have started and wait for a line.
    let (before, start) = (vcpu_times(), Instant::now());
    for (_, stdin, _) in &mut programs {
        stdin.write_all(b"\n").await.unwrap();
    }
    for (cpu, (exec, _stdin, mut said)) in programs.into_iter().enumerate() {
        let mut text = String::new();
        let read = said.read_to_string(&mut text);
        within(30, "the end of the work", read).await.unwrap();
        assert_eq!(text, format!("{cpu} {:016x}\n", sum(cpu)));
        assert_eq!(exec.wait().await.unwrap().status, ExitStatus::Code(0));
    }
    let (after, took) = (vcpu_times(), start.elapsed());
    assert_eq!(after.len(), vcpus, "{after:?}");
    let worked = after.iter().map(|(name, time)| *time - before[name]);
    let worked: Vec<Duration> = worked.collect();
    eprintln!("{vcpus} vCPUs worked {worked:?} in {took:?}");
    assert!(worked.iter().all(|time| *time >= WORK), "{worked:?}");
}

/// Boots a guest, makes every vCPU work, then every vCPU of a clone.
async fn all_work_and_those_of_a_clone_too(vcpus: u8) {
    let (guest, phases) = Guest::boot(|config| config.vcpus(vcpus)).await;
    eprintln!("{vcpus} vCPUs: {phases:?}");
    every_vcpu_works(&guest, vcpus.into()).await;
    let template = guest.freeze();
    assert_eq!(template.vcpus(), vcpus);
    let clone = Guest::of(&template).await;
    every_vcpu_works(&clone, vcpus.into()).await;
}

#[tokio::test]
async fn two_vcpus_by_pvh_with_a_console() {
    if !kvm() || !alone() {
        return;
    }
    let (guest, _) = Guest::boot(|config| {
        config
            .vcpus(2)
            .entry(EntryChoice::Pvh)
            .memory_mib(96)
            .console(true)
            .append("hearth_test=seen")
    })
    .await;
    let text = guest.vm.console().text();
    assert!(text.contains("Linux version"), "{text}");
    every_vcpu_works(&guest, 2).await;
    let words = text_of(&guest, "/proc/cmdline").await;
    assert!(words.trim_end().ends_with("hearth_test=seen"), "{words}");
}

#[tokio::test]
#[ignore = "long: boots four vCPUs where ring 0 is emulated"]
async fn four_vcpus_work_at_once_and_in_a_clone() {
    if kvm() && alone() {
        all_work_and_those_of_a_clone_too(4).await;
    }
}

#[tokio::test]
#[ignore = "long: boots eight vCPUs where ring 0 is emulated"]
async fn eight_vcpus_work_at_once_and_in_a_clone() {
    if kvm() && alone() {
        all_work_and_those_of_a_clone_too(8).await;
    }
}
