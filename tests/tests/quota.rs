#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! A guest that uses all the processor time it gets: how much it gets, and how much is left for its
//! neighbours.

use std::time::{Duration, Instant};

use hearth_tests::flat::Code;
use hearth_tests::{Guest, alone, kvm, patience, vcpu_times, within};
use hearth_vmm::{Exit, Vm, VmConfig, VmStatus};

/// Returns the processor time of this process's vCPU threads.
fn vcpu_time() -> Duration {
    vcpu_times().values().sum()
}

/// Returns how long the only vCPU of this process takes to use `amount` of processor time.
async fn time_to_use(amount: Duration) -> Duration {
    let (start, before) = (Instant::now(), vcpu_time());
    let used = async {
        while vcpu_time() < before + amount {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within(30, "use of the processor", used).await;
    start.elapsed()
}

fn boot(code: Code, percent: u32) -> Vm {
    let config = VmConfig::flat(code.bytes()).memory_mib(32).console(true);
    Vm::boot(&config.cpu_quota(percent).build().unwrap()).unwrap()
}

/// A loop without exits, one that writes to a port, and one that notifies a device.
fn hogs() -> [(&'static str, Code); 3] {
    let start = Code::new().device(0);
    // l: ...; jmp l
    let print = [0xb0, b'.', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf7];
    let kick = [0xc7, 0x43, 0x50, 0, 0, 0, 0, 0xeb, 0xf7];
    [
        ("spinning", Code::new().spin()),
        ("printing", Code::new().raw(&print)),
        ("kicking", start.raw(&kick)),
    ]
}

#[tokio::test]
async fn a_guest_that_never_rests_gets_its_share_and_no_more() {
    if !kvm() || !alone() {
        return;
    }
    for (name, code) in hogs() {
        let vm = boot(code, 10);
        // The guest gets 10 ms at once and then 10 ms in each 100 ms, in slices of 5 ms.
        let took = time_to_use(Duration::from_millis(70)).await;
        eprintln!("{name}: 70 ms of a processor in {took:?}");
        assert!(took >= Duration::from_millis(450), "{name}: {took:?}");
        vm.destroy();
    }
}

#[tokio::test]
async fn a_guest_that_rests_by_quota_can_be_paused_resumed_forked_and_ended() {
    if !kvm() || !alone() {
        return;
    }
    let vm = boot(Code::new().spin(), 1);
    time_to_use(Duration::from_millis(20)).await;
    let stuck = patience(Duration::from_secs(4));
    for _ in 0..5 {
        let start = Instant::now();
        vm.pause().unwrap();
        assert!(start.elapsed() < stuck);
        vm.resume().unwrap();
    }
    let clone = vm.snapshot().unwrap().fork().unwrap();
    vm.kill();
    assert_eq!(within(1, "end", vm.exited()).await, Exit::Killed);
    vm.destroy();
    let took = time_to_use(Duration::from_millis(20)).await;
    assert!(took >= Duration::from_millis(400), "a clone's: {took:?}");
    drop(clone);
}

/// Returns how long pings of `guest` take. A pause before each spreads them over a quota's period.
async fn pings(guest: &mut Guest, count: u64) -> Vec<Duration> {
    let mut times = Vec::new();
    for nonce in 1..=count {
        tokio::time::sleep(Duration::from_millis(7)).await;
        let start = Instant::now();
        within(5, "pong", guest.agent.ping(nonce)).await.unwrap();
        times.push(start.elapsed());
    }
    times
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::test]
async fn a_guest_beside_one_that_never_rests_answers_nearly_as_fast_as_alone() {
    if !kvm() || !alone() {
        return;
    }
    // Highest allowed cost of a ping beside a hog, as a multiple of one while the hog is paused.
    const MOST: u32 = 3;
    let mut neighbour = Guest::fork().await;
    pings(&mut neighbour, 10).await;
    for (name, code) in hogs() {
        let hog = boot(code, 10);
        // Alternates between both, so that other load on the host affects both.
        let (mut idle, mut busy) = (Vec::new(), Vec::new());
        for _ in 0..6 {
            hog.pause().unwrap();
            idle.extend(pings(&mut neighbour, 10).await);
            hog.resume().unwrap();
            busy.extend(pings(&mut neighbour, 10).await);
        }
        let (idle, busy) = (median(idle), median(busy));
        eprintln!("{name}: a neighbour's ping {idle:?} while it is paused, {busy:?} while it runs");
        assert!(busy <= idle * MOST, "{name}: {idle:?} alone, {busy:?}");
        assert_eq!(hog.status(), VmStatus::Running, "{name}");
        hog.destroy();
    }
}
