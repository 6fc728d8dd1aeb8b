#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! A guest that takes all the processor time that it gets, and what it gets.

use std::time::{Duration, Instant};

use hearth_tests::flat::Code;
use hearth_tests::{alone, kvm, patience, within};
use hearth_vmm::{Exit, Vm, VmConfig};

/// Processor time of this process's vCPU threads (proc(5), schedstat: nanoseconds first).
fn vcpu_time() -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let times = threads.filter_map(|thread| {
        let path = thread.ok()?.path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let spent = std::fs::read_to_string(path.join("schedstat")).ok()?;
        let spent = spent.split(' ').next()?.parse::<u64>().ok()?;
        name.starts_with("hearth-vcpu").then_some(spent)
    });
    Duration::from_nanos(times.sum())
}

/// How long the only vCPU of this process takes to use `amount` of processor time.
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

/// A loop without exits; one that writes to a port; one that rings a device's bell.
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
        // 10 ms at once and then 10 in each 100, in slices of 5.
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
