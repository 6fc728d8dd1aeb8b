#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Clones of a real guest: unique, isolated from each other, and healthy at whatever moment their
//! template was captured.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hearth_agent::client::Command;
use hearth_agent::proto::{Input, InstanceId, Refresh};
use hearth_tests::{Guest, kvm, noise, within};
use hearth_vmm::{CpuProfile, Host, StoreError, Template, Vm, VmStatus};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const MIB: u64 = 1 << 20;
/// Clones that run at once: where ring 0 is emulated, more of them than processors starve each
/// other.
const AT_ONCE: usize = 2;
/// Largest allowed difference in nanoseconds between a clone's wall clock and the host's.
const CLOCK_SLACK_NS: i128 = 50_000_000;

/// Target of a balloon that is captured while it inflates: large enough that this takes a while,
/// and no larger, because the clones continue to inflate.
fn balloon_mib() -> u32 {
    match Host::get().unwrap().profile() {
        CpuProfile::Native => 64,
        CpuProfile::Emulated => 12,
    }
}

fn applet(words: &[&str]) -> Command {
    let (program, args) = words.split_first().unwrap();
    Command::new(program).args(args)
}

async fn text_of(guest: &Guest, words: &[&str]) -> String {
    let output = guest.run(applet(words)).await;
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `case` on `count` clones of `template`, a few at a time, and returns the results.
async fn on_clones<T, F>(template: &Template, count: usize, case: fn(Vm) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut runs = JoinSet::new();
    for _ in 0..count {
        let turn = Arc::clone(&turns).acquire_owned().await.unwrap();
        let vm = template.fork().unwrap();
        runs.spawn(async move {
            let outcome = case(vm).await;
            drop(turn);
            outcome
        });
    }
    runs.join_all().await
}

/// Values that must differ from clone to clone.
struct Identity {
    /// 244 bits of the kernel's random numbers, read by the first program in the clone.
    drawn: String,
    boot_id: String,
    machine_id: String,
}

/// Refreshes the clone and returns its identity. Fails if that is not the one it was given, or if
/// its clock differs from the host's.
async fn identity(vm: Vm) -> Identity {
    let mut guest = Guest::refreshed(vm).await;
    let text = text_of(
        &guest,
        &[
            "cat",
            "/proc/sys/kernel/random/uuid",
            "/proc/sys/kernel/random/uuid",
            "/proc/sys/kernel/random/boot_id",
            "/etc/machine-id",
            "/proc/timer_list",
        ],
    )
    .await;
    let lines: Vec<&str> = text.lines().collect();
    let [one, other, boot_id, machine_id, timers @ ..] = lines.as_slice() else {
        panic!("{text}");
    };
    assert_ne!(one, other);
    assert_eq!(*machine_id, guest.instance.to_string());
    // The offset of CLOCK_REALTIME, the second clock in the list, to the monotonic clock. No guest
    // here is suspended, so a pong's uptime is the monotonic clock.
    let mut offsets = timers.iter().filter_map(|line| {
        let rest = line.trim_start().strip_prefix(".offset:")?;
        rest.trim().strip_suffix(" nsecs")?.parse::<i128>().ok()
    });
    let offset = offsets.nth(1).expect("the offset of the wall clock");
    let since_epoch = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        i128::try_from(now.as_nanos()).unwrap()
    };
    let before = since_epoch();
    let pong = within(5, "pong", guest.agent.ping(1)).await.unwrap();
    let after = since_epoch();
    let there = offset + i128::try_from(pong.uptime.as_nanos()).unwrap();
    let (early, late) = (before - there, there - after);
    assert!(
        early <= CLOCK_SLACK_NS && late <= CLOCK_SLACK_NS,
        "the clone's clock is {early} ns behind or {late} ns ahead"
    );
    assert_eq!(pong.instance, guest.instance);
    Identity {
        drawn: format!("{one} {other}"),
        boot_id: (*boot_id).to_owned(),
        machine_id: (*machine_id).to_owned(),
    }
}

async fn clones_are_strangers(count: usize) {
    let template = Guest::template().await;
    let identities = on_clones(template, count, identity).await;
    assert_eq!(identities.len(), count);
    for (what, of) in [
        ("random bytes", (|i| &i.drawn) as fn(&Identity) -> &String),
        ("boot id", |i| &i.boot_id),
        ("machine id", |i| &i.machine_id),
    ] {
        let distinct: HashSet<&String> = identities.iter().map(of).collect();
        assert_eq!(distinct.len(), count, "two clones share their {what}");
    }
}

/// Refreshes the clone and returns the identity that it reports, which must be the one it was
/// given.
async fn given(vm: Vm) -> InstanceId {
    let mut guest = Guest::refreshed(vm).await;
    let pong = within(5, "pong", guest.agent.ping(1)).await.unwrap();
    assert_eq!(pong.instance, guest.instance);
    pong.instance
}

/// Time that passes on the host between capture and fork does not pass in the clone: otherwise all
/// its timers would be due at once, and after a restart of the host its time would stand still.
#[tokio::test(flavor = "multi_thread")]
async fn a_clones_monotonic_clock_goes_on_from_the_capture() {
    if !kvm() {
        return;
    }
    let template = Guest::template().await;
    let mut uptimes = Vec::new();
    for pause in [0, 20] {
        tokio::time::sleep(Duration::from_secs(pause)).await;
        let mut guest = Guest::of(template).await;
        let pong = within(5, "pong", guest.agent.ping(1)).await.unwrap();
        uptimes.push(pong.uptime);
    }
    // Both clones took about as long to answer.
    let apart = uptimes[1].abs_diff(uptimes[0]);
    assert!(apart < Duration::from_secs(10), "{uptimes:?}");
}

/// Regression: the kernel's boot spaces its timer interrupts a second apart, and the last of them
/// was still to come in every clone. Until then, sleeping programs woke up late.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_has_timers_of_high_resolution_from_its_first_moment() {
    if !kvm() {
        return;
    }
    let guest = Guest::fork().await;
    let timers = text_of(&guest, &["cat", "/proc/timer_list"]).await;
    assert!(timers.contains(".hres_active    : 1"), "{timers}");
}

/// A program in a clone costs seconds where ring 0 is emulated, so only some of the fifty clones
/// run one.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_clones_have_identities_of_their_own_and_some_run_programs_that_draw() {
    if !kvm() {
        return;
    }
    clones_are_strangers(8).await;
    let template = Guest::template().await;
    let identities = on_clones(template, 42, given).await;
    let distinct: HashSet<_> = identities.iter().map(|id| id.0).collect();
    assert_eq!(distinct.len(), 42);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: a program in each of 1,000 clones"]
async fn a_thousand_clones_are_strangers_with_the_hosts_time() {
    if kvm() {
        clones_are_strangers(1000).await;
    }
}

/// Fails unless the clone answers, and ends the programs that its template ran.
async fn is_healthy(vm: Vm) {
    let mut guest = Guest::refreshed(vm).await;
    // Programs that the template ran for its host end when the agent sees that the connection is
    // closed.
    let quiet = async {
        let mut nonce = 10;
        while guest.agent.ping(nonce).await.unwrap().execs > 0 {
            nonce += 1;
        }
    };
    within(10, "end of the template's programs", quiet).await;
    assert_eq!(guest.vm.status(), VmStatus::Running);
}

/// As [`is_healthy`], and runs a program and uses the balloon, which the template may have been
/// inflating.
async fn works(vm: Vm) {
    let guest = Guest::refreshed(vm).await;
    assert_eq!(text_of(&guest, &["echo", "alive"]).await, "alive\n");
    let limit = hearth_tests::patience(Duration::from_secs(10));
    guest.vm.balloon().resize(0, limit).await.unwrap();
    guest.vm.balloon().resize(2, limit).await.unwrap();
    assert_eq!(guest.vm.status(), VmStatus::Running);
}

/// Activity in a guest while it is captured.
#[derive(Clone, Copy, Debug)]
struct Busy {
    traffic: bool,
    program: bool,
    balloon: bool,
}

/// Captures a guest while it is busy: it continues undisturbed, and `forks` clones of the template
/// are healthy.
async fn captured_while(busy: Busy, forks: usize) {
    let guest = Guest::fork().await;
    let mut stream = None;
    let mut programs = Vec::new();
    if busy.traffic {
        let mut server = guest
            .connect()
            .await
            .exec(applet(&["vsock-echo", "3000"]))
            .await
            .unwrap();
        let mut line = [0; 10];
        let mut stdout = server.stdout().unwrap();
        within(5, "echo server", stdout.read_exact(&mut line))
            .await
            .unwrap();
        programs.push((server, stdout));
        stream = Some(guest.vm.vsock().connect(3000).await.unwrap());
    }
    if busy.program {
        // Writes as fast as its output is read.
        let fill = applet(&["fill", "200000000"]).stdin(Input::Null);
        let mut fill = guest.connect().await.exec(fill).await.unwrap();
        let mut stdout = fill.stdout().unwrap();
        let mut some = vec![0; 100_000];
        within(10, "output", stdout.read_exact(&mut some))
            .await
            .unwrap();
        programs.push((fill, stdout));
    }
    let balloon = guest.vm.balloon().clone();
    if busy.balloon {
        balloon.set_target(balloon_mib()).unwrap();
        let begun = async {
            while balloon.actual() < 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        within(10, "begin of the inflation", begun).await;
    }
    let bytes = noise(400_000, 11);
    // Reads the balloon's size right after the capture: it goes on inflating while the traffic
    // ends.
    let captured = || (guest.vm.snapshot().unwrap(), balloon.actual());
    let (template, inflated) = match stream {
        None => captured(),
        Some(stream) => {
            let (mut reader, mut writer) = tokio::io::split(stream);
            let mut back = vec![0; bytes.len()];
            let (captured, (), ()) = within(60, "traffic", async {
                let (half, rest) = bytes.split_at(bytes.len() / 2);
                // Half of the bytes are being sent, none of them has been read yet.
                let begun = tokio::sync::Notify::new();
                let capture = async {
                    begun.notified().await;
                    captured()
                };
                let send = async {
                    let (first, second) = half.split_at(1000);
                    writer.write_all(first).await.unwrap();
                    begun.notify_one();
                    writer.write_all(second).await.unwrap();
                    writer.write_all(rest).await.unwrap();
                };
                let receive = async {
                    reader.read_exact(&mut back).await.unwrap();
                };
                tokio::join!(capture, send, receive)
            })
            .await;
            assert!(back == bytes, "a capture disturbs the traffic of its guest");
            captured
        }
    };
    if busy.balloon {
        assert!(
            inflated < balloon_mib(),
            "the capture came after the inflation"
        );
    }
    if let Some((_, stdout)) = programs.last_mut()
        && busy.program
    {
        let mut more = vec![0; 100_000];
        within(10, "more output", stdout.read_exact(&mut more))
            .await
            .unwrap();
        assert!(
            more.iter()
                .enumerate()
                .all(|(i, b)| *b == ((i + 100_000) & 0xff) as u8)
        );
    }
    assert_eq!(guest.vm.status(), VmStatus::Running);
    drop((programs, guest));
    on_clones(&template, forks - 2, is_healthy).await;
    on_clones(&template, 2, works).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_in_the_middle_of_everything_gives_healthy_clones() {
    if !kvm() {
        return;
    }
    let everything = Busy {
        traffic: true,
        program: true,
        balloon: true,
    };
    captured_while(everything, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: 100 clones of each of four captures"]
async fn captures_in_the_middle_of_each_thing_give_healthy_clones() {
    if !kvm() {
        return;
    }
    for number in 0..4 {
        let busy = Busy {
            traffic: number == 0 || number == 3,
            program: number == 1 || number == 3,
            balloon: number == 2 || number == 3,
        };
        eprintln!("{busy:?}");
        captured_while(busy, 100).await;
    }
}

/// Gives the clone a host name.
async fn name(guest: &mut Guest, name: &str) {
    let refresh = Refresh {
        hostname: Some(name.into()),
        ..Refresh::default()
    };
    let refreshed = within(5, "refresh", guest.agent.refresh(refresh)).await;
    assert!(refreshed.unwrap().all_applied());
}

async fn name_of(guest: &Guest) -> String {
    let name = text_of(guest, &["cat", "/proc/sys/kernel/hostname"]).await;
    name.trim_end().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn clones_of_clones_of_clones_inherit_and_do_not_mix() {
    if !kvm() {
        return;
    }
    let root = Guest::template().await;
    let before = root.footprint();
    let mut first = Guest::of(root).await;
    let original = name_of(&first).await;
    name(&mut first, "first").await;
    // Branched while it runs: later changes in the original do not reach the branch.
    let branched = first.vm.snapshot().unwrap();
    name(&mut first, "later").await;
    let mut second = Guest::of(&branched).await;
    assert_eq!(name_of(&second).await, "first");
    name(&mut second, "second").await;
    let frozen = second.freeze();
    let mut third = Guest::of(&frozen).await;
    let sibling = Guest::of(&frozen).await;
    assert_eq!(name_of(&third).await, "second");
    name(&mut third, "third").await;
    assert_eq!(name_of(&sibling).await, "second");
    assert_eq!(name_of(&first).await, "later");
    assert_eq!(name_of(&Guest::of(root).await).await, original);
    // Each generation holds its parent's pages and those that it wrote; holes are not filled on the
    // way.
    for template in [&branched, &frozen] {
        let bytes = template.footprint();
        assert!(
            bytes < before + 24 * MIB,
            "{before} bytes, a generation later {bytes}"
        );
    }
}

/// A template that is saved here is loaded by another process, with and without a copy. It has none
/// of the changes that clones made meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_saved_template_is_forked_by_another_process() {
    if !kvm() {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let (first, second) = (scratch.path().join("first"), scratch.path().join("second"));
    let template = Guest::template().await;
    let start = Instant::now();
    template.save(&first).unwrap();
    eprintln!(
        "saved {} bytes in {:?}",
        template.footprint(),
        start.elapsed()
    );
    let again = template.save(&first);
    assert!(matches!(again, Err(StoreError::Exists(_))), "{again:?}");
    let mut machine_ids = HashSet::new();
    for trusted in [&[][..], &["trusted"]] {
        let child = std::process::Command::new(env!("CARGO_BIN_EXE_fork-template"))
            .arg(&first)
            .args(trusted)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success(), "{errors}");
        assert!(machine_ids.insert(child.stdout));
    }
    // The saved bytes are the same, although clones have written to their own memory.
    on_clones(template, 2, is_healthy).await;
    template.save(&second).unwrap();
    let manifest = |dir: &std::path::Path| std::fs::read(dir.join("manifest")).unwrap();
    assert!(
        manifest(&first) == manifest(&second),
        "the template changed"
    );
    // The directory holds nothing but the two templates, and only pages that are not zero take
    // space.
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 2);
    let start = Instant::now();
    let loaded = Template::load(&first).unwrap();
    eprintln!("loaded in {:?}", start.elapsed());
    assert!(loaded.footprint() <= template.footprint());
    assert!(loaded.footprint() < loaded.memory_bytes() / 2);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: boots a guest of its own"]
async fn clones_of_a_guest_with_two_vcpus_are_healthy() {
    if !kvm() {
        return;
    }
    let guest = Guest::prepared(|config| config.vcpus(2)).await;
    let template = guest.freeze();
    assert_eq!(template.vcpus(), 2);
    on_clones(&template, 8, is_healthy).await;
    on_clones(&template, 2, works).await;
    let guest = Guest::of(&template).await;
    let cpus = text_of(&guest, &["cat", "/proc/stat"]).await;
    assert!(cpus.contains("cpu1 "), "{cpus}");
}
