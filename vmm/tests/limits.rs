#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! VMs under the host's resource limits: an operation works, or returns a typed error that names
//! the limit. Nothing panics, hangs or is left behind, and a raised limit takes effect.
//!
//! Limits apply to a process: each case runs in a child process, another run of this binary.

use std::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hearth_vmm::{Exit, Template, Vm, VmConfig, VmStatus};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The environment variable with the limit and the level of a child.
const CASE: &str = "HEARTH_TEST_LIMIT";
/// Most rounds until a process holds no more than after those before: enough for the idle threads
/// that it keeps, and some more.
const ROUNDS: usize = 20;

/// `in al, 0x64` for ever.
const GUEST: [u8; 4] = [0xe4, 0x64, 0xeb, 0xfc];

fn not_measured(reason: &str) {
    // Past the test harness's output capture: the summary of `make test` counts these lines.
    let line = format!("\nNOT MEASURED: {reason}\n");
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists();
    if !there {
        not_measured("no /dev/kvm");
    }
    there
}

/// A limit that a child sets itself.
#[derive(Clone, Copy, Debug)]
enum Limit {
    /// `level` threads more than there are.
    Threads,
    /// `level` descriptors more than there are.
    Descriptors,
    /// `level` MiB of address space more than are mapped.
    AddressSpace,
    /// Files of at most `level` MiB.
    FileSize,
    /// `level` KiB of locked memory.
    LockedMemory,
    /// `level` queued signals.
    Signals,
    /// No `/proc`; the level has no effect.
    Proc,
}

impl Limit {
    const ALL: [Limit; 7] = [
        Self::Threads,
        Self::Descriptors,
        Self::AddressSpace,
        Self::FileSize,
        Self::LockedMemory,
        Self::Signals,
        Self::Proc,
    ];

    /// The part of the error that names the limit to check.
    fn advice(self) -> &'static str {
        match self {
            Self::Threads => "ulimit -u",
            Self::Descriptors => "ulimit -n",
            Self::AddressSpace => "ulimit -v",
            Self::FileSize => "ulimit -f",
            Self::LockedMemory => "nothing fails",
            // Only the timer of a CPU quota needs a queued signal.
            Self::Signals => "ulimit -i",
            Self::Proc => "/proc",
        }
    }

    fn resource(self) -> Option<Resource> {
        match self {
            Self::Threads => Some(Resource::Nproc),
            Self::Descriptors => Some(Resource::Nofile),
            Self::AddressSpace => Some(Resource::As),
            Self::FileSize => Some(Resource::Fsize),
            Self::LockedMemory => Some(Resource::Memlock),
            Self::Signals => Some(Resource::Sigpending),
            Self::Proc => None,
        }
    }

    /// Sets the limit at `level`.
    fn set(self, level: u64, held: &Held) {
        let soft = match self {
            Self::Threads => held.threads() + level,
            Self::Descriptors => held.free_number(level),
            Self::AddressSpace => held.address_space() + (level << 20),
            Self::FileSize => level << 20,
            Self::LockedMemory => level << 10,
            Self::Signals => level,
            Self::Proc => {
                let none = MountFlags::empty();
                return mount("none", "/proc", "tmpfs", none, None).unwrap();
            }
        };
        self.set_soft(Some(soft));
    }

    fn lift(self) {
        if let Self::Proc = self {
            unmount("/proc", UnmountFlags::empty()).unwrap();
        }
        let hard = self.resource().map(|resource| getrlimit(resource).maximum);
        self.set_soft(hard.flatten());
    }

    fn set_soft(self, soft: Option<u64>) {
        let Some(resource) = self.resource() else {
            return;
        };
        let maximum = getrlimit(resource).maximum;
        let limit = Rlimit {
            current: soft,
            maximum,
        };
        setrlimit(resource, limit).unwrap();
    }

    /// Prepares the child so that the limit applies to it; false where that is not possible.
    fn applies(self) -> bool {
        let is_root = rustix::process::geteuid().is_root();
        match self {
            Self::Threads => {
                if !is_root {
                    return false;
                }
                // Root's threads are not limited. The threads of this user id are the child's
                // alone.
                let user = 1_000_000 + std::process::id();
                // SAFETY: the call changes the user ids of this process alone, which is a child.
                assert_eq!(unsafe { libc::setresuid(user, 0, 0) }, 0);
                drop_capabilities();
                true
            }
            Self::Proc => {
                // SAFETY: a mount namespace for the calling thread and those that it starts.
                let own = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0;
                let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                own && mount_change("/", private).is_ok()
            }
            _ => true,
        }
    }
}

/// Drops the capabilities that lift a user's limit of threads.
fn drop_capabilities() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).unwrap();
    let lifting = CapabilitySet::SYS_RESOURCE | CapabilitySet::SYS_ADMIN;
    sets.effective -= lifting;
    sets.permitted -= lifting;
    set_capabilities(None, sets).unwrap();
}

/// Files that tell what the process holds, opened while there is a `/proc`.
struct Held {
    task: File,
    fd: File,
    status: File,
}

impl Held {
    fn open() -> Self {
        let open = |name: &str| File::open(format!("/proc/self/{name}")).unwrap();
        Self {
            task: open("task"),
            fd: open("fd"),
            status: open("status"),
        }
    }

    fn threads(&self) -> u64 {
        entries(&self.task)
    }

    fn descriptors(&self) -> u64 {
        // Without the descriptor that reads the directory.
        entries(&self.fd) - 1
    }

    /// The free descriptor number with exactly `level` free ones below it; those of closed files
    /// are free, too.
    fn free_number(&self, level: u64) -> u64 {
        let lowest: Vec<_> = (0..=level).map(|_| self.fd.try_clone().unwrap()).collect();
        lowest.iter().map(|fd| fd.as_raw_fd() as u64).max().unwrap()
    }

    fn address_space(&self) -> u64 {
        self.status("VmSize:") << 10
    }

    fn status(&self, name: &str) -> u64 {
        use std::os::unix::fs::FileExt;
        let mut text = [0; 8192];
        let len = self.status.read_at(&mut text, 0).unwrap();
        let text = String::from_utf8_lossy(&text[..len]).into_owned();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.unwrap().split_whitespace().next().unwrap();
        number.parse().unwrap()
    }

    /// The numbers of threads and descriptors, and MiB of address space.
    fn all(&self) -> [u64; 3] {
        let mib = self.address_space() >> 20;
        [self.threads(), self.descriptors(), mib]
    }
}

fn entries(dir: impl AsFd) -> u64 {
    let dir = rustix::fs::Dir::read_from(dir).unwrap();
    dir.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name().to_bytes();
        !matches!(name, b"." | b"..")
    })
    .count() as u64
}

fn config() -> VmConfig {
    VmConfig::flat(GUEST).memory_mib(32).build().unwrap()
}

/// An error with its causes.
fn text(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause: &&(dyn Error + 'static)| {
        (*cause).source()
    });
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Asserts that a new VM runs.
fn runs(vm: &Vm) {
    assert_eq!(ends(vm), None);
}

/// Waits until a new VM runs; returns how it ended if it did not.
fn ends(vm: &Vm) -> Option<Exit> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let begin = vm.exits().total();
    while vm.exits().total() < begin + 5 {
        match vm.status() {
            VmStatus::Running => {}
            VmStatus::Paused => panic!("made to run, but it is paused"),
            VmStatus::Ended(exit) => return Some(exit),
        }
        assert!(Instant::now() < deadline, "made, but it does not run");
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}

/// Errors of the operations that were tried.
#[derive(Default)]
struct Refusals(Vec<String>);

impl Refusals {
    fn note<T, E: Error + 'static>(&mut self, what: &str, result: Result<T, E>) -> Option<T> {
        result
            .map_err(|error| self.0.push(format!("{what}: {}", text(&error))))
            .ok()
    }

    fn boot(&mut self) -> Option<Vm> {
        let vm = self.note("boot", Vm::boot(&config()));
        let vm = vm.inspect(runs);
        let metered = VmConfig::flat(GUEST).memory_mib(32).cpu_quota(50);
        let metered = Vm::boot(&metered.build().unwrap());
        if let Some(metered) = self.note("boot with a quota", metered) {
            runs(&metered);
            metered.destroy();
        }
        vm
    }

    /// Does everything that can be done with a VM and its template. Returns whether `dir` holds a
    /// saved template afterwards.
    fn use_up(&mut self, vm: &Vm, template: &Template, dir: &Path) -> bool {
        if let Some(clone) = self.note("fork", template.fork()) {
            match ends(&clone) {
                None => drop(self.note("snapshot of a clone", clone.snapshot())),
                // A fork does not wait for KVM's thread, so only this error comes later.
                Some(Exit::NoThread) => self.0.push(format!("fork: {}", Exit::NoThread)),
                Some(exit) => panic!("the clone ended: {exit}"),
            }
            clone.destroy();
        }
        let prepared = self.note("prepared VM", template.prepare());
        if let Some(clone) = prepared.and_then(|vm| self.note("fork of a prepared VM", vm.fork())) {
            runs(&clone);
            clone.destroy();
        }
        drop(self.note("snapshot", vm.snapshot()));
        runs(vm);
        let saved = dir.join("saved");
        let is_saved = self.note("save", template.save(&saved)).is_some();
        if is_saved {
            drop(self.note("load", Template::load(&saved)));
        }
        is_saved
    }
}

/// Asserts that a failed save leaves no files, and removes a saved template.
fn clear(dir: &Path, is_saved: bool) {
    let entries = entries(File::open(dir).unwrap());
    assert_eq!(entries, u64::from(is_saved), "files in {dir:?}");
    if is_saved {
        std::fs::remove_dir_all(dir.join("saved")).unwrap();
    }
}

/// Does all operations without a limit: none may fail.
fn everything(dir: &Path) {
    let mut refused = Refusals::default();
    if let Some(vm) = refused.boot() {
        let template = vm.snapshot().unwrap();
        clear(dir, refused.use_up(&vm, &template, dir));
        vm.destroy();
    }
    assert_eq!(refused.0, [""; 0], "without a limit");
}

/// The child of a case: prints the errors.
#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    let (name, level) = case.split_once(' ').unwrap();
    let limit = Limit::ALL.into_iter().find(|l| format!("{l:?}") == name);
    let (limit, level) = (limit.unwrap(), level.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let held = Held::open();
    if !limit.applies() {
        println!("not applicable");
        return;
    }
    // Boots in a process that has made no VM yet.
    let mut refused = Refusals::default();
    let boots = || {
        limit.set(level, &held);
        if let Some(vm) = refused.boot() {
            vm.destroy();
        }
        limit.lift();
        settled(&held)
    };
    nothing_is_left(std::iter::repeat_with(boots));
    everything(dir.path());
    // All operations in a process that has made VMs before.
    let vm = Vm::boot(&config()).unwrap();
    let template = vm.snapshot().unwrap();
    // A save alone: no resource is free because an operation before has just closed it.
    limit.set(level, &held);
    let saved = refused.note("save", template.save(dir.path().join("saved")));
    limit.lift();
    clear(dir.path(), saved.is_some());
    let uses = || {
        limit.set(level, &held);
        if let Some(other) = refused.boot() {
            other.destroy();
        }
        let is_saved = refused.use_up(&vm, &template, dir.path());
        limit.lift();
        clear(dir.path(), is_saved);
        settled(&held)
    };
    nothing_is_left(std::iter::repeat_with(uses));
    everything(dir.path());
    assert_eq!(hearth_vmm::leaked_vms(), 0);
    for refusal in refused.0 {
        println!("refused: {refusal}");
    }
    println!("done");
}

/// Repeats rounds until three in succession add nothing. A process keeps some threads for the next
/// VM, and may start one more in each round that reaches the limit, but their number is bounded.
fn nothing_is_left(mut held_after_each: impl Iterator<Item = [u64; 3]>) {
    let mut counts = Vec::new();
    let (mut most, mut calm) = ([0; 3], 0);
    while calm < 3 {
        assert!(
            counts.len() < ROUNDS,
            "threads, descriptors, MiB of address space: {counts:?}"
        );
        let held = held_after_each.next().unwrap();
        counts.push(held);
        let grown = most.into_iter().zip(held).any(|(most, now)| now > most);
        calm = if grown { 0 } else { calm + 1 };
        most = std::array::from_fn(|kind| most[kind].max(held[kind]));
    }
}

/// What the process holds once that no longer changes: threads that are ending need a moment.
fn settled(held: &Held) -> [u64; 3] {
    let deadline = Instant::now() + Duration::from_secs(2);
    let (mut counts, mut since) = (held.all(), Instant::now());
    while since.elapsed() < Duration::from_millis(50) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
        let now = held.all();
        if now != counts {
            (counts, since) = (now, Instant::now());
        }
    }
    counts
}

/// Runs the case in a child. Returns the errors; `None` where the limit cannot be set.
fn refused_at(limit: Limit, level: u64) -> Option<Vec<String>> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(CASE, format!("{limit:?} {level}"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    let status = output.status;
    assert!(
        status.success(),
        "{limit:?} at {level}: {status}\n{out}{errors}"
    );
    if out.lines().any(|line| line.ends_with("not applicable")) {
        return None;
    }
    assert!(
        out.lines().any(|line| line.ends_with("done")),
        "{limit:?} at {level}: {out}{errors}"
    );
    let refused = out.lines().filter_map(|line| line.split_once("refused: "));
    Some(refused.map(|(_, refusal)| refusal.to_owned()).collect())
}

/// Runs the case at each level; returns the levels that had errors.
fn sweep(limit: Limit, levels: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut refused = Vec::new();
    if !kvm() {
        return refused;
    }
    for level in levels {
        let Some(refusals) = refused_at(limit, level) else {
            not_measured(&format!("{limit:?}: this user cannot limit a child so"));
            return refused;
        };
        for refusal in &refusals {
            println!("{limit:?} at {level}: {refusal}");
            assert!(
                refusal.contains(limit.advice()),
                "{limit:?} at {level}: {refusal}"
            );
        }
        if !refusals.is_empty() {
            refused.push(level);
        }
    }
    refused
}

#[test]
fn too_few_threads_are_a_typed_error() {
    let refused = sweep(Limit::Threads, 0..=9);
    assert!(refused.is_empty() || refused.contains(&0));
}

#[test]
fn too_few_descriptors_are_a_typed_error() {
    // Every level up to one that is enough: at each of them another file cannot be opened.
    let refused = sweep(Limit::Descriptors, 0..=18);
    assert!(!refused.contains(&18));
}

#[test]
fn too_little_address_space_is_a_typed_error() {
    sweep(Limit::AddressSpace, [2, 20, 40, 100]);
}

#[test]
fn too_small_files_are_a_typed_error_and_no_signal() {
    let refused = sweep(Limit::FileSize, [0, 31, 32]);
    assert!(refused.is_empty() || refused == [0, 31]);
}

#[test]
fn no_locked_memory_is_needed() {
    assert_eq!(sweep(Limit::LockedMemory, [0]), [0; 0]);
}

/// Pausing, capturing and ending a VM send signals, too.
#[test]
fn no_queued_signal_is_needed_but_for_a_quota() {
    for level in [0, 1] {
        let refused = match kvm() {
            true => refused_at(Limit::Signals, level).unwrap(),
            false => return,
        };
        let quota = |refusal: &String| refusal.starts_with("boot with a quota: ");
        assert!(refused.iter().all(quota), "{refused:?}");
        let advice = Limit::Signals.advice();
        assert!(refused.iter().all(|r| r.contains(advice)), "{refused:?}");
    }
}

#[test]
fn without_proc_all_that_needs_it_is_a_typed_error() {
    sweep(Limit::Proc, [0]);
}
