#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Counts that repeat on any machine, however busy, compared with `baseline.txt`: exits, ioctls,
//! pages, emulated instructions. A count that exceeds its baseline by more than a twentieth fails.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hearth_tests::flat::Code;
use hearth_tests::{Guest, kvm, not_measured, within};
use hearth_vmm::{CpuProfile, Host, Vm, VmConfig};

/// Largest allowed ratio of a count to its baseline.
const SLACK: f64 = 1.05;
/// Below this ratio to the baseline, the baseline should be lowered.
const BETTER: f64 = 0.9;
/// Clones of which the cheapest counts: on a busy machine some of them wait, and timer ticks pass
/// meanwhile.
const CLONES: usize = 8;
const PAGE: u64 = 4096;
/// Environment variable that is set for the process whose calls are counted: the kind of VMs that
/// it makes, and how many.
const MADE: &str = "HEARTH_BASELINE_MADE";
/// The kinds: VMs that are each created, made a template and forked; clones of one template;
/// prepared VMs that are dropped unused.
const KINDS: [&str; 3] = ["create-and-fork", "fork", "shell"];

/// Measurements, by name.
type Counts = BTreeMap<&'static str, u64>;

/// Compares the counts with the committed ones. Prints the new count if the committed one is
/// missing or too high.
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

/// Returns whether there is a baseline for this host: only hosts that emulate ring 0 were measured.
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
    let [mut forked, mut resumed] = [Exits::MOST; 2];
    let mut pages = u64::MAX;
    for _ in 0..CLONES {
        let mut clone = Guest::fork().await;
        settled(&clone.vm).await;
        let parked = Exits::of(&clone.vm);
        forked = forked.min(parked);
        clone.vm.pause().unwrap();
        pages = pages.min(clone.vm.private_bytes().unwrap() / PAGE);
        clone.vm.resume().unwrap();
        within(5, "pong", clone.agent.ping(1)).await.unwrap();
        settled(&clone.vm).await;
        resumed = resumed.min(Exits::of(&clone.vm).since(parked));
    }
    counts.insert("fork.device_exits", forked.of_devices);
    counts.insert("fork.register_exits", forked.of_registers);
    counts.insert("resume.device_exits", resumed.of_devices);
    counts.insert("resume.register_exits", resumed.of_registers);
    counts.insert("fork.pages", pages);
    compare(&counts);
}

/// Exits of a guest. How often registers are saved depends on how often the guest's kernel switches
/// between programs: more often where more timer ticks pass.
#[derive(Clone, Copy)]
struct Exits {
    of_devices: u64,
    of_registers: u64,
}

impl Exits {
    const MOST: Self = Self {
        of_devices: u64::MAX,
        of_registers: u64::MAX,
    };

    fn of(vm: &Vm) -> Self {
        let exits = vm.exits();
        let [pio, mmio, registers] =
            [&exits.pio, &exits.mmio, &exits.registers].map(|count| count.load(Relaxed));
        Self {
            of_devices: pio + mmio,
            of_registers: registers,
        }
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            of_devices: self.of_devices - earlier.of_devices,
            of_registers: self.of_registers - earlier.of_registers,
        }
    }

    /// Returns the lower count of each kind.
    fn min(self, other: Self) -> Self {
        Self {
            of_devices: self.of_devices.min(other.of_devices),
            of_registers: self.of_registers.min(other.of_registers),
        }
    }
}

/// Waits until a guest is idle. After its answer has arrived, the guest may still have to take the
/// interrupt that acknowledges it; how soon it does depends on how busy the machine is.
async fn settled(vm: &Vm) {
    let mut exits = vm.exits().total();
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(30)).await;
        let now = vm.exits().total();
        if now == exits {
            return;
        }
        exits = now;
    }
    panic!("the guest does not go to sleep");
}

#[test]
fn calls_per_vm_are_within_their_baseline() {
    if !has_baseline() {
        return;
    }
    if let Ok(made) = std::env::var(MADE) {
        let (kind, count) = made.split_once(' ').unwrap();
        return make(kind, count.parse().unwrap());
    }
    if !Path::new("/usr/bin/strace").exists() {
        return not_measured("strace, which counts system calls, is not installed");
    }
    let each = KINDS.map(|kind| (ioctls(kind, 10) - ioctls(kind, 2)) as u64 / 8);
    let [create_and_fork, fork, shell] = each;
    compare(&BTreeMap::from([
        ("create-and-fork.ioctls", create_and_fork),
        ("fork.ioctls", fork),
        ("fork-from-shell.ioctls", fork - shell),
    ]));
}

/// Makes `count` VMs of this kind.
fn make(kind: &str, count: usize) {
    let template = || {
        let config = VmConfig::flat(Code::new().sleep().bytes()).memory_mib(32);
        let vm = Vm::create(&config.build().unwrap()).unwrap();
        vm.into_template().unwrap()
    };
    let first = template();
    for _ in 0..count {
        match kind {
            "create-and-fork" => template().fork().unwrap().destroy(),
            "fork" => first.fork().unwrap().destroy(),
            "shell" => drop(first.prepare().unwrap()),
            _ => panic!("{kind}"),
        }
    }
}

/// Returns the number of ioctls of a process that makes `made` VMs. Left out are those that depend
/// on time: `KVM_RUN`, and `KVM_KVMCLOCK_CTRL`, which tells a guest that ran that it was stopped.
fn ioctls(kind: &str, made: usize) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("calls");
    let name = "calls_per_vm_are_within_their_baseline";
    let status = Command::new("strace")
        .args(["-f", "-e", "trace=ioctl", "-o"])
        .arg(&log)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--test-threads=1"])
        .env(MADE, format!("{kind} {made}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    let text = std::fs::read_to_string(&log).unwrap();
    // The second half of a call that another thread's call interrupted is on a line of its own.
    let begun = text.lines().filter(|line| line.contains(" ioctl("));
    let depend_on_time =
        |line: &&str| line.contains("KVM_RUN") || line.contains("KVM_KVMCLOCK_CTRL");
    begun.filter(|line| !depend_on_time(line)).count()
}
