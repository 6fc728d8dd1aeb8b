//! What parked guests cost while nothing is asked of them.

use std::time::{Duration, Instant};

use hearth_pool::Parking;
use hearth_tests::{alone, kvm};
use rustix::time::{ClockId, clock_gettime};

use crate::rig::{Rig, alone_in_a_runtime, config, stop};

const SIZE: usize = 8;
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

/// How often any thread of this process gave up its processor by itself: each is a wake-up.
fn wake_ups() -> u64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let counts = threads.filter_map(|thread| {
        let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line?.trim().parse::<u64>().ok()
    });
    counts.sum()
}

async fn idle() {
    for (parking, most) in [
        (Parking::Paused, 1.0),
        (Parking::Running, 2.0 * SIZE as f64),
    ] {
        let pool = Rig::new().await.pool(config(SIZE).park(parking)).await;
        // What filling the pool has left behind ends.
        tokio::time::sleep(WATCHED).await;
        let mut shares = vec![];
        let before = wake_ups();
        for _ in 0..5 {
            shares.push(share(WATCHED).await);
        }
        let woken = (wake_ups() - before) as f64 / (5.0 * WATCHED.as_secs_f64());
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
