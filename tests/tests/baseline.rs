#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Counts that repeat on any machine, however busy, held against `baseline.txt`: exits, ioctls, pages,
//! emulated instructions. What costs a twentieth more than is written there fails.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use hearth_tests::flat::Code;
use hearth_tests::{Guest, kvm, not_measured};
use hearth_vmm::{CpuProfile, Host, Vm, VmConfig};

/// How much more than the baseline is let pass.
const SLACK: f64 = 1.05;
/// Below this part of the baseline, the baseline is to be lowered.
const BETTER: f64 = 0.9;
/// Clones of which the cheapest counts: a busy machine makes some wait, and ticks pass.
const CLONES: usize = 8;
const PAGE: u64 = 4096;
/// Set for the process whose calls are counted: how many VMs it makes.
const MADE: &str = "HEARTH_BASELINE_MADE";

/// Measurements, by name.
type Counts = BTreeMap<&'static str, u64>;

/// Holds them against the committed ones of such hosts. Says what to write there if one is missing or too high.
fn compare(counts: &Counts) {
    let committed = include_str!("../baseline.txt");
    let lines = committed.lines().filter(|line| !line.starts_with('#'));
    let known: BTreeMap<&str, u64> = lines
        .filter_map(|line| {
            let (name, count) = line.split_once(char::is_whitespace)?;
            Some((name, count.trim().parse().expect("a count")))
        })
        .collect();
    let (mut worse, mut missing) = (Vec::new(), Vec::new());
    for (name, count) in counts {
        let Some(&base) = known.get(name) else {
            missing.push(format!("{name} {count}"));
            continue;
        };
        let ratio = *count as f64 / base as f64;
        println!("{name}: {count}, baseline {base} ({ratio:.3})");
        if ratio > SLACK {
            worse.push(format!("{name}: {count} where {base} is the baseline"));
        } else if ratio < BETTER {
            println!("{name}: write {count} into baseline.txt");
        }
    }
    assert!(missing.is_empty(), "baseline.txt lacks: {missing:?}");
    assert!(worse.is_empty(), "costs more than before: {worse:?}");
}

/// The baseline is that of hosts that emulate ring 0; we have none of the other kind.
fn has_baseline() -> bool {
    if !kvm() {
        return false;
    }
    let emulated = Host::get().unwrap().profile() == CpuProfile::Emulated;
    if !emulated {
        not_measured("baseline.txt holds no counts of hardware KVM yet");
    }
    emulated
}

#[tokio::test]
async fn what_a_guest_costs_is_within_its_baseline() {
    if !has_baseline() {
        return;
    }
    let (guest, _) = Guest::boot(|config| config.count_instructions(true)).await;
    let instructions = guest.vm.emulated_instructions().unwrap();
    let mut counts = Counts::from([
        ("boot.exits", guest.vm.exits().total()),
        ("boot.instructions", instructions),
        ("boot.pages", guest.vm.private_bytes().unwrap() / PAGE),
    ]);
    let mut exits = u64::MAX;
    for _ in 0..CLONES {
        let clone = Guest::fork().await;
        exits = exits.min(clone.vm.exits().total());
    }
    counts.insert("fork.exits", exits);
    compare(&counts);
}

#[test]
fn calls_per_vm_are_within_their_baseline() {
    if !has_baseline() {
        return;
    }
    if let Some(made) = std::env::var_os(MADE) {
        return make(made.to_str().unwrap().parse().unwrap());
    }
    if !Path::new("/usr/bin/strace").exists() {
        return not_measured("strace, which counts system calls, is not installed");
    }
    let (few, many) = (ioctls(2) as u64, ioctls(10) as u64);
    // Each VM is forked from a template of its own, which was created before.
    compare(&BTreeMap::from([(
        "create-and-fork.ioctls",
        (many - few) / 8,
    )]));
}

/// Creates so many VMs, and forks each.
fn make(count: usize) {
    for _ in 0..count {
        let config = VmConfig::flat(Code::new().sleep().bytes()).memory_mib(32);
        let vm = Vm::create(&config.build().unwrap()).unwrap();
        let template = vm.into_template().unwrap();
        template.fork().unwrap().destroy();
    }
}

/// Ioctls of a process that makes so many VMs, but for those that let a vCPU run, which depend on time.
fn ioctls(made: usize) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("calls");
    let name = "calls_per_vm_are_within_their_baseline";
    let status = Command::new("strace")
        .args(["-f", "-e", "trace=ioctl", "-o"])
        .arg(&log)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--test-threads=1"])
        .env(MADE, made.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    let text = std::fs::read_to_string(&log).unwrap();
    // The second half of a call that was interrupted by another thread's is a line of its own.
    let begun = text.lines().filter(|line| line.contains(" ioctl("));
    begun.filter(|line| !line.contains("KVM_RUN")).count()
}
