#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Many VMs, one after the other and all at once: that they leave nothing behind, and what each
//! costs.
//!
//! `cargo test -p hearth-tests --test many_vms -- --nocapture` prints the figures.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use hearth_tests::flat::Code;
use hearth_tests::{Footprint, Guest, alone, available_kib, kvm, patience, private_kib, within};
use hearth_vmm::{Exit, Template, Vm, VmConfig, VmStatus, leaked_vms};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Anonymous mappings that the C library may keep or make: stacks and arenas for threads.
const ARENAS: usize = 8;

/// A guest whose first instruction causes an exit, so that it can be seen, and which then sleeps
/// for ever.
fn sleeper() -> VmConfig {
    let code = Code::new().raw(&[0xe6, 0x80]).sleep(); // out 0x80, al
    let config = VmConfig::flat(code.bytes()).memory_mib(32);
    config.build().unwrap()
}

/// Waits until the guest has executed its first instruction.
async fn runs(vm: &Vm) {
    let first = async {
        while vm.exits().pio.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
    };
    within(5, "first instruction", first).await;
}

/// Boots `count` VMs one after the other, lets each run, kills it, and in turn destroys or drops
/// it.
async fn create_start_kill_and_drop(config: &VmConfig, count: usize) {
    for round in 0..count {
        let vm = Vm::boot(config).unwrap();
        runs(&vm).await;
        vm.kill();
        assert_eq!(within(5, "end", vm.exited()).await, Exit::Killed);
        if round.is_multiple_of(2) {
            vm.destroy();
        }
    }
}

/// Returns the footprint of the process once nothing is left of the VMs that it dropped. They are
/// torn down in turn, and a VM's drop guards are dropped last.
fn settled() -> Footprint {
    let (said, gone) = mpsc::channel::<()>();
    let last = Vm::boot(&sleeper()).unwrap();
    last.on_drop(said);
    drop(last);
    let limit = patience(Duration::from_secs(10));
    assert_eq!(
        gone.recv_timeout(limit),
        Err(RecvTimeoutError::Disconnected)
    );
    Footprint::now()
}

/// Runs `stretches` times `each` cycles. After each stretch the process must hold no more than at
/// first. RSS may grow by 1 MiB in all: allocators move a little, and 10,000 VMs that each left 128
/// bytes would exceed that.
async fn cycles_leave_nothing(stretches: usize, each: usize) {
    let config = sleeper();
    // The first cycles create the process-wide parts: event threads, teardown threads, arenas.
    create_start_kill_and_drop(&config, 100).await;
    let before = settled();
    for stretch in 1..=stretches {
        create_start_kill_and_drop(&config, each).await;
        before.assert_restored(ARENAS, Duration::from_secs(10));
        let now = Footprint::now();
        let [fds, threads, mappings] =
            [&now.fds, &now.threads, &now.mappings].map(|counts| counts.values().sum::<usize>());
        let (cycles, rss) = (stretch * each, now.rss_kib);
        eprintln!("{cycles} VMs: {fds} fds, {threads} threads, {mappings} mappings, {rss} KiB");
        let grown = rss.saturating_sub(before.rss_kib);
        assert!(grown < 1024, "{grown} KiB resident more after {cycles} VMs");
    }
    assert_eq!(leaked_vms(), 0);
}

#[tokio::test]
async fn three_hundred_vms_leave_nothing() {
    if kvm() && alone() {
        cycles_leave_nothing(3, 100).await;
    }
}

#[tokio::test]
#[ignore = "long: 10,000 VMs"]
async fn ten_thousand_vms_leave_nothing() {
    if kvm() && alone() {
        cycles_leave_nothing(10, 1000).await;
    }
}

/// Prepares `count` VMs: half of them become clones that run, a quarter become clones that never
/// run, and a quarter are dropped unused.
async fn use_shells(template: &Template, count: usize) {
    let shells = (0..count).map(|_| template.prepare().unwrap());
    for (number, shell) in shells.collect::<Vec<_>>().into_iter().enumerate() {
        match number % 4 {
            0 => drop(shell),
            1 => shell.fork_paused().unwrap().destroy(),
            _ => {
                let vm = shell.fork().unwrap();
                runs(&vm).await;
                vm.destroy();
            }
        }
    }
}

#[tokio::test]
async fn shells_leave_nothing_whether_they_become_clones_or_not() {
    if !kvm() || !alone() {
        return;
    }
    let vm = Vm::create(&sleeper()).unwrap();
    let template = vm.into_template().unwrap();
    use_shells(&template, 40).await;
    let before = settled();
    for _ in 0..3 {
        use_shells(&template, 40).await;
        before.assert_restored(ARENAS, Duration::from_secs(10));
    }
    assert_eq!(leaked_vms(), 0);
}

/// Boots and forks, in turns, `count` VMs, and waits until all run.
async fn crowd(config: &VmConfig, template: &Template, count: usize) -> Vec<Vm> {
    let mut vms = Vec::new();
    for index in 0..count {
        let boots = index.is_multiple_of(2);
        vms.push(if boots {
            Vm::boot(config).unwrap()
        } else {
            template.fork().unwrap()
        });
    }
    for (index, vm) in vms.iter().enumerate() {
        // A clone continues after that instruction.
        if index.is_multiple_of(2) {
            runs(vm).await;
        }
        assert_eq!(vm.status(), VmStatus::Running);
    }
    vms
}

/// Raises the limit to the maximum: a VM takes about 16 descriptors, and the default limit is meant
/// for processes that need no more.
fn as_many_descriptors_as_are_allowed() {
    let most = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[tokio::test]
async fn two_hundred_vms_live_at_once_with_a_thread_for_each_vcpu_and_no_more() {
    const VMS: usize = 200;
    /// Process-wide threads: event threads (`vmm::reactor` starts two at most), two teardown
    /// threads, the one that wakes tasks of the embedding program, the one that spawns all threads,
    /// and, where `KVM_CREATE_VM` waits, the one that creates spare VMs.
    const LASTING: usize = 7;
    /// Idle threads for vCPUs (`vmm::vcpu::thread_pool` keeps two at most).
    const SPARES: usize = 2;
    const KVM_WORKER: &str = "kvm-nx-lpage-re";
    if !kvm() || !alone() {
        return;
    }
    as_many_descriptors_as_are_allowed();
    let config = sleeper();
    let first = Vm::boot(&config).unwrap();
    runs(&first).await;
    let template = first.into_template().unwrap();
    // Start the same number first: the C library keeps the stacks of threads that ended, up to 40
    // MiB.
    drop(crowd(&config, &template, VMS).await);
    let before = settled();
    let vms = crowd(&config, &template, VMS).await;
    let mut threads = Footprint::now().threads;
    assert_eq!(threads.remove("hearth-vcpu0"), Some(VMS));
    // Threads of KVM itself, on hosts whose processors are affected by iTLB multihit (large pages
    // can stop them): one for each VM.
    let of_kvm = threads.remove(KVM_WORKER).unwrap_or(0);
    assert!(of_kvm <= VMS, "{of_kvm}");
    let mut lasting = before.threads.clone();
    lasting.remove(KVM_WORKER);
    for counts in [&mut threads, &mut lasting] {
        let spares = counts.remove("hearth-spare").unwrap_or(0);
        assert!((1..=SPARES).contains(&spares), "{spares}");
    }
    let count: usize = lasting.values().sum();
    assert_eq!(threads, lasting, "threads that serve all VMs");
    // Two of these are the test's.
    assert!(count <= LASTING + 2, "{lasting:?}");
    drop(vms);
    before.assert_restored(ARENAS, Duration::from_secs(30));
    assert_eq!(leaked_vms(), 0);
}

/// Makes `count` VMs in a process that has had one, and fails if each costs a MiB or more of the
/// process's own memory. Prints that cost, and by how much the host's available memory fell: both
/// without guest memory.
async fn cost_less_than_a_mib(count: u64, make: impl AsyncFn() -> Vm) {
    /// Other processes use the host's memory meanwhile, so the median of this many rounds counts.
    const ROUNDS: usize = 5;
    drop(make().await);
    let (mut private, mut guest, mut fallen) = (0, 0, Vec::new());
    for _ in 0..ROUNDS {
        settled();
        // The host's kernel frees memory a little later.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let (before, available) = (private_kib(), available_kib());
        let mut vms = Vec::new();
        for _ in 0..count {
            vms.push(make().await);
        }
        let fall = available.saturating_sub(available_kib()) / count;
        // The first round has the highest cost, because later ones reuse memory that the C library
        // keeps.
        private = private.max(private_kib().saturating_sub(before) / count);
        let guests = vms.iter().map(|vm| vm.private_bytes().unwrap() >> 10);
        guest = guests.sum::<u64>() / count;
        fallen.push(fall.saturating_sub(guest));
    }
    fallen.sort_unstable();
    let middle = fallen[ROUNDS / 2];
    eprintln!(
        "per VM of {count}: {private} KiB private, MemAvailable falls by {middle} KiB {fallen:?}, beside {guest} KiB \
         of its guest"
    );
    assert!(private < 1024, "{private} KiB");
}

#[tokio::test]
async fn a_booted_vm_costs_less_than_a_mib_beside_its_memory() {
    if !kvm() || !alone() {
        return;
    }
    let config = sleeper();
    let make = async || {
        let vm = Vm::boot(&config).unwrap();
        runs(&vm).await;
        vm
    };
    cost_less_than_a_mib(100, make).await;
}

#[tokio::test]
async fn a_clone_of_linux_costs_less_than_a_mib_beside_its_memory() {
    if !kvm() || !alone() {
        return;
    }
    let template = Guest::template().await;
    // Each clone has an open connection to its agent that was used.
    let make = async || {
        let Guest { vm, mut agent, .. } = Guest::of(template).await;
        within(5, "pong", agent.ping(1)).await.unwrap();
        vm.request_pause().unwrap();
        vm.on_drop(agent);
        vm
    };
    cost_less_than_a_mib(25, make).await;
}
