//! Random stress test on the fake backend, in real time and on several threads: sixteen tasks
//! acquire, use, drop and cancel, a saboteur kills, freezes and wedges VMs, an operator resizes,
//! drains, stops and starts, demand changes the sizes, leases have time limits, and a fifth of all
//! boots fails. At the end nothing is lost, no VM was handed out wrongly, and the pool fills up.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth_pool::config::{BootConfig, HealthConfig, LeaseConfig};
use hearth_pool::fake::{Boot, FakeBackend, FakeHost, FakeVmError, Ping};
use hearth_pool::{
    AcquireError, Autoscale, Parking, Phase, Pool, PoolConfig, Profile, StartError, VmId,
};
use tokio::time::{Instant, sleep, timeout};

const PROFILES: [&str; 2] = ["python", "javascript"];
const TASKS: u64 = 16;
const SIZE: usize = 6;
const LARGEST: usize = 8;

/// A xorshift generator: repeatable by seed, as far as threads allow.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(u64::try_from(len).unwrap())).unwrap()
    }

    fn micros(&mut self, bound: u64) -> Duration {
        Duration::from_micros(self.below(bound))
    }
}

#[derive(Default)]
struct Seen {
    ids: Mutex<HashSet<VmId>>,
    served: AtomicUsize,
    cancelled: AtomicUsize,
    died_in_use: AtomicUsize,
    sabotaged: AtomicUsize,
    restarts: AtomicUsize,
}

impl Seen {
    /// Records the first use of a VM; each VM is used once.
    fn first_use(&self, id: VmId) {
        assert!(
            self.ids.lock().unwrap().insert(id),
            "{id} was handed out twice"
        );
        self.served.fetch_add(1, Ordering::Relaxed);
    }
}

fn config() -> PoolConfig {
    let mut health = HealthConfig::default();
    (health.interval_ms, health.ping_timeout_ms) = (50, 200);
    (health.backoff_min_ms, health.backoff_max_ms) = (1, 10);
    let mut boot = BootConfig::default();
    (boot.backoff_min_ms, boot.backoff_max_ms, boot.timeout_ms) = (1, 20, 200);
    (boot.breaker_cooldown_ms, boot.breaker_cooldown_max_ms) = (100, 200);
    boot.early_death_ms = 20;
    let mut lease = LeaseConfig::default();
    (lease.deadline_ms, lease.idle_ms) = (20, 5);
    let mut config = PoolConfig::new(12).health(health).boot(boot).lease(lease);
    config.limits.vms = 20;
    let scale = Autoscale::between(2, LARGEST).window(Duration::from_millis(100));
    for profile in PROFILES {
        let profile = Profile::new(profile, "image").warm_pool_size(SIZE);
        config = config.profile(profile.autoscale(scale.clone()));
    }
    config.park(Parking::Paused)
}

async fn user(pool: Pool<FakeBackend>, seen: Arc<Seen>, over: Arc<AtomicBool>, seed: u64) {
    let mut dice = Dice(seed);
    while !over.load(Ordering::Relaxed) {
        let profile = PROFILES[dice.index(2)];
        let leases = match dice.below(4) {
            0 => pool.acquire(profile).map(|lease| vec![lease]),
            1 => pool.acquire_many(profile, dice.index(4)),
            2 => {
                let patience = dice.micros(20_000);
                pool.acquire_timeout(profile, patience)
                    .await
                    .map(|lease| vec![lease])
            }
            _ => {
                // Cancelled at whichever await point it has reached.
                let acquire = pool.acquire_timeout(profile, Duration::from_secs(5));
                match timeout(dice.micros(3_000), acquire).await {
                    Ok(result) => result.map(|lease| vec![lease]),
                    Err(_) => {
                        seen.cancelled.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                }
            }
        };
        let leases = match leases {
            Ok(leases) => leases,
            // No VM is ready, or the operator has changed the pool.
            Err(
                AcquireError::Exhausted { .. }
                | AcquireError::Timeout { .. }
                | AcquireError::Draining(_)
                | AcquireError::Stopping
                | AcquireError::NotStarted,
            ) => {
                sleep(dice.micros(500)).await;
                continue;
            }
            Err(other) => panic!("{other}"),
        };
        for lease in leases {
            seen.first_use(lease.id());
            assert_eq!(lease.made_for(), profile, "a wrong VM");
            match lease.work() {
                Ok(1) => {}
                Ok(used) => panic!("{} was used before: {used}", lease.id()),
                // The saboteur may be faster, but the pool must not be the cause.
                Err(FakeVmError::Ended | FakeVmError::Stuck) => {
                    assert!(
                        !lease.handle().is_paused(),
                        "{} was not resumed",
                        lease.id()
                    );
                    seen.died_in_use.fetch_add(1, Ordering::Relaxed);
                }
            }
            if dice.below(2) == 0 {
                sleep(dice.micros(2_000)).await;
            }
            match dice.below(3) {
                0 => lease.release().await,
                1 => {
                    // Cancelled in the middle of its own ping.
                    let _ = timeout(dice.micros(300), lease.ping()).await;
                    drop(lease);
                }
                _ => drop(lease),
            }
        }
    }
}

async fn saboteur(fake: FakeBackend, seen: Arc<Seen>, over: Arc<AtomicBool>, seed: u64) {
    let mut dice = Dice(seed);
    while !over.load(Ordering::Relaxed) {
        sleep(dice.micros(2_000)).await;
        let vms = fake.live();
        if vms.is_empty() {
            continue;
        }
        let vm = &vms[dice.index(vms.len())];
        seen.sabotaged.fetch_add(1, Ordering::Relaxed);
        match dice.below(6) {
            0 => vm.kill(),
            1 => vm.freeze(),
            2 => vm.script_pings([Ping::Lost, Ping::Silence]),
            3 => vm.script_pings([Ping::Wrong("wedged")]),
            4 => vm.script_pings([Ping::Dies]),
            _ => vm.script_pings([Ping::Panic]),
        }
    }
}

/// Makes an operator's calls: health-check rounds and boots by hand, sizes, drains, stops and
/// starts. Some of them are cancelled.
async fn operator(
    pool: Pool<FakeBackend>,
    fake: FakeBackend,
    seen: Arc<Seen>,
    over: Arc<AtomicBool>,
    seed: u64,
) {
    let mut dice = Dice(seed);
    while !over.load(Ordering::Relaxed) {
        sleep(dice.micros(5_000)).await;
        let profile = PROFILES[dice.index(2)];
        let patience = dice.micros(3_000);
        match dice.below(8) {
            0 => drop(timeout(patience, pool.check(profile, 3)).await),
            1 => drop(timeout(patience, pool.replenish(profile)).await),
            2 => drop(timeout(patience, pool.offer(profile, fake.make(profile))).await),
            3 => pool.resize(profile, dice.index(LARGEST + 1)).unwrap(),
            4 => fake.script(profile, [Boot::After(patience)]),
            5 => {
                let given_up = timeout(patience / 2, pool.drain(profile, patience)).await;
                drop(given_up);
                pool.undrain(profile).unwrap();
            }
            6 if dice.below(16) == 0 => {
                drop(timeout(patience / 2, pool.stop_within(patience)).await);
                restart(&pool, &mut dice).await;
                seen.restarts.fetch_add(1, Ordering::Relaxed);
            }
            _ if dice.below(16) > 0 => {}
            _ => {
                let boots = [Boot::Panic, Boot::Hang, Boot::Frozen, Boot::Dead];
                fake.script(profile, [boots[dice.index(boots.len())].clone()]);
            }
        }
    }
}

/// Starts the pool until it runs; some starts are cancelled.
async fn restart(pool: &Pool<FakeBackend>, dice: &mut Dice) {
    loop {
        let start = if dice.below(2) == 0 {
            timeout(dice.micros(1_000), pool.start()).await
        } else {
            Ok(pool.start().await)
        };
        match start {
            Ok(Ok(_) | Err(StartError::Running)) => return,
            Ok(Err(StartError::Stopping | StartError::NoVm(_))) | Err(_) => {
                sleep(dice.micros(1_000)).await;
            }
            Ok(Err(other)) => panic!("{other}"),
        }
    }
}

/// Checks invariants of the contract, which hold at every moment, as long as the test runs.
async fn auditor(pool: Pool<FakeBackend>, over: Arc<AtomicBool>, looks: Arc<AtomicU64>) {
    while !over.load(Ordering::Relaxed) {
        let status = pool.status();
        assert!(status.leased <= 12, "{status:?}");
        assert!(status.usage.vms <= 20, "{status:?}");
        for profile in &status.profiles {
            let counts = profile.counts;
            assert!(
                counts.ready + counts.checking + counts.booting <= counts.size,
                "{counts:?}"
            );
        }
        looks.fetch_add(1, Ordering::Relaxed);
        tokio::task::yield_now().await;
        sleep(Duration::from_micros(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_lost_and_nothing_is_handed_out_wrong() {
    torture(Duration::from_secs(20)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "long: five minutes of torture"]
async fn nothing_is_lost_in_five_minutes() {
    torture(Duration::from_secs(300)).await;
}

async fn torture(time: Duration) {
    // Offered VMs would come back under numbers of their own; the fake's are unique while they
    // live.
    let fake = FakeBackend::new();
    let pool = Pool::with_host(fake.clone(), config(), FakeHost::new(None)).unwrap();
    pool.start().await.unwrap();
    fake.fail_percent(20, 0xfeed);
    let (seen, over, looks) = (
        Arc::<Seen>::default(),
        Arc::<AtomicBool>::default(),
        Arc::default(),
    );
    let mut tasks = tokio::task::JoinSet::new();
    for seed in 1..=TASKS {
        tasks.spawn(user(
            pool.clone(),
            seen.clone(),
            over.clone(),
            seed * 0x9E37_79B9,
        ));
    }
    tasks.spawn(saboteur(fake.clone(), seen.clone(), over.clone(), 77));
    tasks.spawn(operator(
        pool.clone(),
        fake.clone(),
        seen.clone(),
        over.clone(),
        99,
    ));
    tasks.spawn(auditor(pool.clone(), over.clone(), Arc::clone(&looks)));
    let ends = Instant::now() + time;
    while Instant::now() < ends {
        sleep(Duration::from_millis(100)).await;
        if let Some(ended) = tasks.try_join_next() {
            ended.expect("a task of the torture");
            panic!("a task ended early");
        }
    }
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a task of the torture");
    }
    for profile in PROFILES {
        fake.unscript(profile);
        pool.resize(profile, SIZE).unwrap();
    }
    // Boots still fail one time in five.
    let full = pool.wait_ready(Duration::from_secs(5)).await;
    full.unwrap_or_else(|error| panic!("5 s after the end: {error}; {:?}", pool.status()));
    let status = pool.status();
    assert_eq!(status.leased, 0, "{status:?}");
    pool.stop().await;
    let status = pool.status();
    assert_eq!((status.phase, status.usage.vms), (Phase::Stopped, 0));
    assert!(fake.live().is_empty(), "{:?}", fake.live());
    for profile in PROFILES {
        let tally = fake.tally(profile);
        assert_eq!(tally.live, 0, "{tally:?}");
        assert_eq!(tally.created, tally.retired + tally.dropped, "{tally:?}");
        assert!(
            tally.most_booting <= 4,
            "half of the largest size: {tally:?}"
        );
        eprintln!("{profile}: {tally:?}");
    }
    let load = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    eprintln!(
        "{} served, {} cancelled, {} died in use, {} sabotaged, {} restarts, {} looks",
        load(&seen.served),
        load(&seen.cancelled),
        load(&seen.died_in_use),
        load(&seen.sabotaged),
        load(&seen.restarts),
        looks.load(Ordering::Relaxed)
    );
    assert!(load(&seen.served) > 1_000 && load(&seen.cancelled) > 100);
    assert!(load(&seen.restarts) > 10);
}
