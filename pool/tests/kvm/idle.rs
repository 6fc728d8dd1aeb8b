//! What parked guests cost while nothing is asked of them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::{Duration, Instant};

use hearth_pool::Parking;
use hearth_tests::{alone, kvm};
use hearth_vmm::{CpuProfile, Host};
use rustix::time::{ClockId, clock_gettime};

use crate::rig::{Rig, alone_in_a_runtime, config, stop};

const SIZE: usize = 8;
/// Percent of a core that a running guest may use.
const RUNNING: f64 = 2.0;
/// The same where the guest's kernel is emulated, which makes each of its few wake-ups cost milliseconds:
/// guests are parked paused there unless somebody asks for this.
const RUNNING_EMULATED: f64 = 8.0;
const WATCHED: Duration = Duration::from_secs(5);

/// Processor time of this process so far.
fn spent() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Percent of a core that this process used in `time`.
async fn share(time: Duration) -> f64 {
    let (begin, before) = (Instant::now(), spent());
    tokio::time::sleep(time).await;
    100.0 * (spent() - before).as_secs_f64() / begin.elapsed().as_secs_f64()
}

/// How often each thread of this process gave up its processor by itself: each is a wake-up.
fn wake_ups() -> BTreeMap<OsString, u64> {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let counts = threads.filter_map(|thread| {
        let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        Some((thread.file_name(), count?.trim().parse().ok()?))
    });
    counts.collect()
}

/// Wake-ups since `before`, of threads that are still there.
fn woken_since(before: &BTreeMap<OsString, u64>) -> u64 {
    let now = wake_ups().into_iter();
    let grown = now.map(|(thread, count)| count - before.get(&thread).copied().unwrap_or(0));
    grown.sum()
}

async fn idle() {
    let each = match Host::get().unwrap().profile() {
        CpuProfile::Native => RUNNING,
        CpuProfile::Emulated => RUNNING_EMULATED,
    };
    let running = each * SIZE as f64;
    for (parking, most) in [(Parking::Paused, 1.0), (Parking::Running, running)] {
        let pool = Rig::new().await.pool(config(SIZE).park(parking)).await;
        // What filling the pool has left behind ends.
        tokio::time::sleep(WATCHED).await;
        let mut shares = vec![];
        let before = wake_ups();
        for _ in 0..5 {
            shares.push(share(WATCHED).await);
        }
        let woken = woken_since(&before) as f64 / (5.0 * WATCHED.as_secs_f64());
        shares.sort_by(f64::total_cmp);
        eprintln!(
            "{parking:?}: {shares:.2?} % of a core for {SIZE} guests, {woken:.1} wake-ups a second"
        );
        assert!(shares[2] < most, "{parking:?}: {shares:.2?} % of a core");
        if parking == Parking::Paused {
            // This very test wakes once for each sleep, and the count costs a few.
            assert!(woken < 3.0, "{woken:.1} wake-ups a second");
        }
        stop(pool).await;
    }
}

#[test]
#[ignore = "long: a minute of idleness"]
fn parked_guests_cost_next_to_nothing() {
    if kvm() && alone() {
        alone_in_a_runtime(idle());
    }
}
