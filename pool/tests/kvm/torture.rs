//! Random torture on real guests: tasks acquire, use, drop and cancel, guests are killed, frozen and
//! panic, and every fifth boot fails. Nothing is handed out wrong, and the pool heals.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth_pool::{AcquireError, Pool, VmId};
use hearth_tests::{Footprint, alone, kvm, patience};
use hearth_vmm::leaked_vms;
use tokio::time::{Instant, sleep, timeout};

use crate::rig::{BASE, Rig, alone_in_a_runtime, impatient, stop};

const TASKS: u64 = 16;
const SIZE: usize = 3;
/// Most leases at a time.
const LEASES: usize = 4;
/// Mappings of plain memory that the C library may keep: 40 MiB of stacks of threads that have ended, 20 of 2 MiB
/// with a guard page each, and an arena for each of as many threads as were there at once. What is leaked with
/// each VM is far more: hundreds are made here.
const SLACK: usize = 80;
/// Leases without which it was no torture.
const ENOUGH: usize = 10;

/// xorshift: repeatable by seed, as far as threads allow.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn millis(&mut self, bound: u64) -> Duration {
        Duration::from_millis(self.below(bound))
    }
}

#[derive(Default)]
struct Seen {
    ids: Mutex<HashSet<VmId>>,
    cancelled: AtomicUsize,
    answered: AtomicUsize,
    dead: AtomicUsize,
    sabotaged: Mutex<HashSet<VmId>>,
}

async fn user(pool: Pool<Rig>, seen: Arc<Seen>, over: Arc<AtomicBool>, seed: u64) {
    let mut dice = Dice(seed);
    while !over.load(Ordering::Relaxed) {
        let lease = match dice.below(3) {
            0 => pool.acquire(BASE),
            1 => pool.acquire_timeout(BASE, dice.millis(500)).await,
            _ => {
                // Dropped at whatever await point it has come to.
                let acquire = pool.acquire_timeout(BASE, Duration::from_secs(60));
                match timeout(dice.millis(300), acquire).await {
                    Ok(lease) => lease,
                    Err(_) => {
                        seen.cancelled.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                }
            }
        };
        let lease = match lease {
            Ok(lease) => lease,
            Err(AcquireError::Exhausted { .. } | AcquireError::Timeout { .. }) => {
                sleep(dice.millis(50)).await;
                continue;
            }
            Err(other) => panic!("{other}"),
        };
        let id = lease.id();
        assert!(seen.ids.lock().unwrap().insert(id), "{id} was served twice");
        match dice.below(4) {
            0 => {}
            1 => {
                // Cancelled in the middle of its ping.
                let _ = timeout(dice.millis(10), lease.ping()).await;
            }
            2 => {
                let exec = lease.exec(lease.command("panic")).await;
                drop(exec);
            }
            _ => match lease.ping().await {
                Ok(()) => {
                    seen.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(why) => {
                    let disturbed = seen.sabotaged.lock().unwrap().contains(&id);
                    assert!(disturbed, "{id} was handed out and does not answer: {why}");
                    seen.dead.fetch_add(1, Ordering::Relaxed);
                }
            },
        }
        if dice.below(3) == 0 {
            lease.release().await;
        }
    }
}

async fn saboteur(rig: Rig, seen: Arc<Seen>, over: Arc<AtomicBool>) {
    let mut dice = Dice(77);
    while !over.load(Ordering::Relaxed) {
        sleep(dice.millis(400)).await;
        // One of the youngest: those that still live.
        let Some(victim) = rig.all().into_iter().rev().nth(dice.below(4) as usize) else {
            continue;
        };
        seen.sabotaged.lock().unwrap().insert(victim.id);
        if dice.below(3) == 0 {
            rig.freeze(&victim);
        } else {
            victim.kill().await;
        }
    }
}

async fn torture(time: Duration) {
    let rig = Rig::new().await;
    let mut config = impatient(SIZE);
    (config.max_concurrent_vms, config.health.interval_ms) = (LEASES, 1_000);
    config.health.attempts = 2;
    (
        config.boot.breaker_cooldown_ms,
        config.boot.breaker_cooldown_max_ms,
    ) = (100, 200);
    let detection = patience(Duration::from_millis(config.health.ping_timeout_ms))
        * config.health.attempts
        + Duration::from_secs(1);
    let stuck = patience(Duration::from_secs(5));
    let pool = rig.pool(config).await;
    rig.fail_every(5);
    let (seen, over) = (Arc::<Seen>::default(), Arc::<AtomicBool>::default());
    let mut tasks = tokio::task::JoinSet::new();
    for seed in 1..=TASKS {
        let (pool, seen, over) = (pool.clone(), seen.clone(), over.clone());
        tasks.spawn(user(pool, seen, over, seed * 0x9E37_79B9));
    }
    tasks.spawn(saboteur(rig.clone(), seen.clone(), over.clone()));
    let began = Instant::now();
    let enough = || {
        let served = seen.ids.lock().unwrap().len();
        served >= ENOUGH && seen.answered.load(Ordering::Relaxed) > 0
    };
    while began.elapsed() < time || !enough() {
        assert!(began.elapsed() < time + stuck, "stuck: {:?}", pool.status());
        sleep(Duration::from_millis(50)).await;
        if let Some(ended) = tasks.try_join_next() {
            ended.expect("a task of the torture");
            panic!("a task ended early");
        }
        let status = pool.status();
        let counts = status.profiles[0].counts;
        assert!(counts.ready + counts.checking + counts.booting <= SIZE);
        assert!(counts.leased <= LEASES, "{counts:?}");
    }
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a task of the torture");
    }
    let bound = detection + stuck;
    let began = Instant::now();
    let healed = pool.wait_ready(bound).await;
    healed.unwrap_or_else(|error| panic!("{error}: {:?}", pool.status()));
    let healed = began.elapsed();
    eprintln!(
        "{} served, {} answered, {} dead in use, {} cancelled, {} disturbed, {} made; full \
         again after {healed:?}",
        seen.ids.lock().unwrap().len(),
        seen.answered.load(Ordering::Relaxed),
        seen.dead.load(Ordering::Relaxed),
        seen.cancelled.load(Ordering::Relaxed),
        seen.sabotaged.lock().unwrap().len(),
        rig.all().len(),
    );
    stop(pool).await;
    assert_eq!(leaked_vms(), 0);
}

/// In a process of its own, of which nothing is left but the template.
fn alone_for(time: Duration) {
    if !kvm() || !alone() {
        return;
    }
    // The library's own threads stay; a guest that is dropped starts the last of them.
    alone_in_a_runtime(async {
        let pool = Rig::new().await.pool(impatient(1)).await;
        drop(pool.acquire(BASE).unwrap().into_inner());
        stop(pool).await;
    });
    let before = Footprint::now();
    alone_in_a_runtime(torture(time));
    before.assert_restored(SLACK, patience(Duration::from_secs(5)));
}

#[test]
fn real_guests_are_never_handed_out_wrong_and_the_pool_heals() {
    alone_for(Duration::from_secs(20));
}

#[test]
#[ignore = "long: five minutes of torture on real guests"]
fn real_guests_for_five_minutes() {
    alone_for(Duration::from_secs(300));
}
