//! Random torture on real guests: tasks acquire, use, drop and cancel; guests are killed, frozen,
//! panic, power off, or have their agent crashed, stopped or starved; and every fifth boot fails.
//! No guest is handed out twice or broken, and the pool heals.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth_pool::{
    AcquireError, Backend, EventKind, Parking, Pool, PoolConfig, PoolEvent, ProbeError, VmId,
};
use hearth_tests::{Footprint, alone, kvm, patience, within};
use hearth_vmm::leaked_vms;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::rig::{BASE, Rig, Victim, alone_in_a_runtime, impatient, stop};

const TASKS: u64 = 16;
const SIZE: usize = 3;
/// Most concurrent leases.
const LEASES: usize = 4;
/// Anonymous mappings that the C library may keep: 40 MiB of stacks of threads that have ended, 20
/// of 2 MiB with a guard page each, and an arena for each of as many threads as existed at once. A
/// leak with each VM would be far more: hundreds are made here.
const SLACK: usize = 80;
/// Fewest leases that make the test meaningful.
const ENOUGH: usize = 10;
/// How long the pool may take to fill once the last bad guest is found, on a host where a fork
/// takes no longer than [`FORK`].
const REFILL: Duration = Duration::from_secs(5);
/// From the beginning of a fork to its first pong: 26 ms on two idle processors of an emulated
/// host, less on hardware.
const FORK: Duration = Duration::from_millis(50);

/// How long callers acquire as fast as they can, before they hold back for twice the time that it
/// takes to find a silent guest.
const RUSH: Duration = Duration::from_secs(3);

/// The fault that is injected in a guest, parked or leased.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Way {
    Kill,
    Freeze,
    /// Runs a program in the guest that ends it, or silences its agent.
    Run(&'static str),
}

const WAYS: [Way; 7] = [
    Way::Kill,
    Way::Freeze,
    Way::Run("panic"),
    Way::Run("poweroff"),
    Way::Run("crash-agent"),
    Way::Run("wedge-agent"),
    Way::Run("starve-agent"),
];

/// xorshift: repeatable by seed, apart from the threads' timing.
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
    /// How often each fault was injected.
    ways: Mutex<BTreeMap<Way, usize>>,
    /// Parked guests whose end the pool noticed, and (below) those that it found silent.
    ended: AtomicUsize,
    silent: AtomicUsize,
    /// Whether callers hold back. While they do not, every parked guest is handed out at once, and
    /// faults of parked guests are never seen.
    calm: AtomicBool,
    forks: Mutex<Vec<Duration>>,
}

impl Seen {
    fn median_fork(&self) -> Duration {
        let mut forks = self.forks.lock().unwrap();
        forks.sort();
        forks[forks.len() / 2]
    }

    fn enough(&self) -> bool {
        let served = self.ids.lock().unwrap().len();
        let some = [&self.answered, &self.ended, &self.silent];
        let some = some.iter().all(|count| count.load(Ordering::Relaxed) > 0);
        let ways = self.ways.lock().unwrap().len();
        served >= ENOUGH && some && ways == WAYS.len()
    }
}

/// Counts events of the pool until the pool is gone.
async fn watcher(mut events: Receiver<PoolEvent>, seen: Arc<Seen>) {
    loop {
        let kind = match events.recv().await {
            Ok(event) => event.kind,
            Err(RecvError::Lagged(_)) => continue,
            Err(RecvError::Closed) => return,
        };
        let count = match kind {
            EventKind::Ready(took) => {
                seen.forks.lock().unwrap().push(took);
                continue;
            }
            EventKind::Ended => &seen.ended,
            EventKind::Unhealthy(ProbeError::TimedOut(_)) => &seen.silent,
            _ => continue,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

async fn user(pool: Pool<Rig>, seen: Arc<Seen>, over: Arc<AtomicBool>, seed: u64) {
    let mut dice = Dice(seed);
    while !over.load(Ordering::Relaxed) {
        if seen.calm.load(Ordering::Relaxed) {
            sleep(dice.millis(100)).await;
            continue;
        }
        let lease = match dice.below(3) {
            0 => pool.acquire(BASE),
            1 => pool.acquire_timeout(BASE, dice.millis(500)).await,
            _ => {
                // Dropped at any await point.
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
                // Cancelled during its ping.
                let _ = timeout(dice.millis(10), lease.ping()).await;
            }
            2 => {
                // A guest that was frozen meanwhile never answers: the caller has to set a time
                // limit.
                let exec = lease.exec(lease.command("panic"));
                let _ = timeout(patience(Duration::from_secs(1)), exec).await;
            }
            _ => match lease.ping().await {
                Ok(()) => {
                    seen.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(why) => {
                    let disturbed = seen.sabotaged.lock().unwrap().contains(&id);
                    if disturbed {
                        seen.dead.fetch_add(1, Ordering::Relaxed);
                    } else {
                        // The host may be busy: a slow guest is fine, a silent one is not.
                        let what = format!("{id} was handed out and does not answer: {why}");
                        let answers = async { while lease.ping().await.is_err() {} };
                        within(5, &what, answers).await;
                    }
                }
            },
        }
        if dice.below(3) == 0 {
            lease.release().await;
        }
    }
}

struct Saboteur {
    rig: Rig,
    seen: Arc<Seen>,
    dice: Dice,
    /// Programs in guests; aborted when the torture ends.
    programs: JoinSet<()>,
}

impl Saboteur {
    async fn go(&mut self, way: Way, victim: Victim) {
        self.seen.sabotaged.lock().unwrap().insert(victim.id);
        *self.seen.ways.lock().unwrap().entry(way).or_default() += 1;
        match way {
            Way::Kill => victim.kill().await,
            Way::Freeze => self.rig.freeze(&victim),
            Way::Run(program) => {
                let runs = async move { victim.run_if_it_can(program).await };
                self.programs.spawn(runs);
            }
        }
    }

    fn any_way(&mut self) -> Way {
        WAYS[self.dice.below(WAYS.len() as u64) as usize]
    }

    /// While guests come and go: sometimes injects a fault in one of the four youngest.
    async fn in_the_rush(&mut self) {
        sleep(self.dice.millis(400)).await;
        let nth = self.dice.below(4) as usize;
        let way = self.any_way();
        if let Some(victim) = self.rig.all().into_iter().rev().nth(nth) {
            self.go(way, victim).await;
        }
    }

    /// Injects a fault in each of the youngest `SIZE` VMs, the parked ones; one of them is a
    /// freeze, which only a check finds.
    async fn in_the_calm(&mut self) {
        let parked = self.rig.all().into_iter().rev().take(SIZE);
        for (index, victim) in parked.enumerate() {
            let way = self.any_way();
            let way = if index == 0 { Way::Freeze } else { way };
            self.go(way, victim).await;
        }
    }
}

async fn sabotage(rig: Rig, pool: Pool<Rig>, seen: Arc<Seen>, over: Arc<AtomicBool>) {
    let (dice, programs) = (Dice(77), JoinSet::new());
    let mut saboteur = Saboteur {
        rig,
        seen,
        dice,
        programs,
    };
    let mut done = false;
    while !over.load(Ordering::Relaxed) {
        while saboteur.programs.try_join_next().is_some() {}
        if !saboteur.seen.calm.load(Ordering::Relaxed) {
            done = false;
            saboteur.in_the_rush().await;
            continue;
        }
        let full = timeout(Duration::from_millis(50), pool.wait_ready(Duration::MAX));
        if full.await.is_ok() && !done && pool.status().leased == 0 {
            done = true;
            saboteur.in_the_calm().await;
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Longest time for which a dead or silent parked guest goes unnoticed: until the next health-check
/// round, and through all of its check.
fn detection(config: &PoolConfig, scale: u32) -> Duration {
    let (health, ms) = (&config.health, Duration::from_millis);
    let pings = ms(health.ping_timeout_ms) * scale * health.attempts;
    let pauses = ms(health.backoff_max_ms) * (health.attempts - 1);
    ms(health.interval_ms) + pings + pauses
}

/// Resolves when the pool is full of guests that have all just answered.
async fn proven_full(pool: &Pool<Rig>) {
    loop {
        pool.wait_ready(Duration::MAX).await.unwrap();
        if pool.check(BASE, SIZE).await.unwrap().healthy == SIZE {
            return;
        }
    }
}

async fn torture(time: Duration, parking: Parking) {
    let rig = Rig::new().await;
    let mut config = impatient(SIZE).park(parking);
    (config.max_concurrent_vms, config.health.interval_ms) = (LEASES, 1_000);
    (config.health.ping_timeout_ms, config.health.attempts) = (100, 2);
    (
        config.boot.breaker_cooldown_ms,
        config.boot.breaker_cooldown_max_ms,
    ) = (100, 200);
    let detection = detection(&config, rig.time_scale());
    let stuck = patience(Duration::from_secs(5));
    let pool = rig.pool(config).await;
    rig.fail_every(5);
    let (seen, over) = (Arc::<Seen>::default(), Arc::<AtomicBool>::default());
    let watching = tokio::spawn(watcher(pool.subscribe(), seen.clone()));
    let mut tasks = JoinSet::new();
    for seed in 1..=TASKS {
        let (pool, seen, over) = (pool.clone(), seen.clone(), over.clone());
        tasks.spawn(user(pool, seen, over, seed * 0x9E37_79B9));
    }
    tasks.spawn(sabotage(
        rig.clone(),
        pool.clone(),
        seen.clone(),
        over.clone(),
    ));
    let began = Instant::now();
    while began.elapsed() < time || !seen.enough() {
        let cycle = began.elapsed().as_secs_f64() % (RUSH + 2 * detection).as_secs_f64();
        seen.calm
            .store(cycle > RUSH.as_secs_f64(), Ordering::Relaxed);
        let ways = || seen.ways.lock().unwrap().clone();
        assert!(
            began.elapsed() < time + stuck,
            "stuck: {:?}, {:?}, {:?} ends, {:?} silences",
            pool.status(),
            ways(),
            seen.ended,
            seen.silent
        );
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
    // The 5 s are for forks that take milliseconds. Where forks take longer, because other programs
    // need the processors, refilling takes longer in proportion, and that is no fault of the pool.
    let fork = seen.median_fork();
    let slower = (fork.as_secs_f64() / FORK.as_secs_f64()).max(1.0);
    let bound = detection + REFILL.mul_f64(slower);
    let began = Instant::now();
    let healed = timeout(bound, proven_full(&pool)).await;
    healed.unwrap_or_else(|_| panic!("not healed in {bound:?}: {:?}", pool.status()));
    let healed = began.elapsed();
    eprintln!(
        "{parking:?}: {} served, {} answered, {} dead in use, {} cancelled, {} disturbed ({:?}), {} ends and {} \
         silences of parked guests found, {} made in {fork:?} each; full again after {healed:?} of {bound:?}",
        seen.ids.lock().unwrap().len(),
        seen.answered.load(Ordering::Relaxed),
        seen.dead.load(Ordering::Relaxed),
        seen.cancelled.load(Ordering::Relaxed),
        seen.sabotaged.lock().unwrap().len(),
        seen.ways.lock().unwrap(),
        seen.ended.load(Ordering::Relaxed),
        seen.silent.load(Ordering::Relaxed),
        rig.all().len(),
    );
    watching.abort();
    stop(pool).await;
    assert_eq!(leaked_vms(), 0);
}

/// Runs the torture in a separate process, of which only the template may be left.
fn alone_for(time: Duration) {
    if !kvm() || !alone() {
        return;
    }
    // The library's own threads stay; dropping a guest starts the last of them.
    alone_in_a_runtime(async {
        let pool = Rig::new().await.pool(impatient(1)).await;
        drop(pool.acquire(BASE).unwrap().into_inner());
        stop(pool).await;
    });
    let before = Footprint::now();
    // Programs run in guests that are parked running, and rarely in those that are parked paused.
    for parking in [Parking::Running, Parking::Paused] {
        alone_in_a_runtime(torture(time / 2, parking));
    }
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
