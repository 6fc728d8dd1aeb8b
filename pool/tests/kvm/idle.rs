//! What parked guests cost while they are not used.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::{Duration, Instant};

use hearth_pool::Parking;
use hearth_tests::{alone, kvm};
use rustix::time::{ClockId, clock_gettime};

use crate::rig::{Rig, alone_in_a_runtime, config, stop};

const SIZE: usize = 20;
/// Percent of a core that the whole process may use while its guests are paused.
const PAUSED: f64 = 1.0;
/// Percent of a core that a running guest may use.
const RUNNING: f64 = 2.0;
/// Length and number of the measured intervals.
const WATCHED: Duration = Duration::from_secs(5);
const TIMES: u32 = 6;

/// Processor time of this process so far, of all its threads, in the kernel and out of it: the same
/// as `getrusage` reports, but in nanoseconds. The vCPUs are threads of this process.
fn spent() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Percent of a core that this process uses during `time`.
async fn share(time: Duration) -> f64 {
    let (begin, before) = (Instant::now(), spent());
    tokio::time::sleep(time).await;
    100.0 * (spent() - before).as_secs_f64() / begin.elapsed().as_secs_f64()
}

/// How often each thread of this process gave up its processor voluntarily: each is a wake-up.
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

/// Wake-ups since `before`, of threads that still exist.
fn woken_since(before: &BTreeMap<OsString, u64>) -> u64 {
    let now = wake_ups().into_iter();
    let grown = now.map(|(thread, count)| count - before.get(&thread).copied().unwrap_or(0));
    grown.sum()
}

async fn idle() {
    for parking in [Parking::Paused, Parking::Running] {
        let pool = Rig::new().await.pool(config(SIZE).park(parking)).await;
        // Waits until the work that filling the pool left behind is over.
        tokio::time::sleep(WATCHED).await;
        let mut shares = vec![];
        let (begin, before, woken) = (Instant::now(), spent(), wake_ups());
        for _ in 0..TIMES {
            shares.push(share(WATCHED).await);
        }
        let watched = begin.elapsed().as_secs_f64();
        let whole = 100.0 * (spent() - before).as_secs_f64() / watched;
        let woken = woken_since(&woken) as f64 / watched;
        // Guests do what little they do in bursts, so the mean is above the median, which the
        // contract bounds.
        let each = whole / SIZE as f64;
        eprintln!(
            "{parking:?}: {whole:.2} % of a core over {watched:.0} s for {SIZE} guests, {each:.3} % each, \
             {woken:.1} wake-ups a second; in pieces: {shares:.2?}"
        );
        match parking {
            Parking::Paused => {
                assert!(whole < PAUSED, "{whole} % of a core, {shares:.2?}");
                // This test itself wakes once for each sleep, and the measurement costs a few more.
                assert!(woken < 3.0, "{woken:.1} wake-ups a second");
            }
            Parking::Running => assert!(each < RUNNING, "{each} % each, {shares:.2?}"),
        }
        stop(pool).await;
    }
}

#[test]
#[ignore = "long: more than a minute of idleness"]
fn parked_guests_cost_next_to_nothing() {
    if kvm() && alone() {
        alone_in_a_runtime(idle());
    }
}
