//! Where no more threads can be started, pools report an error, and nothing else is lost.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hearth_pool::kvm::KvmBackend;
use hearth_pool::{Backend, Pool, PoolConfig, VmId};
use hearth_tests::{Cgroup, alone, error_chain, kvm, not_measured, within};

use crate::rig::{BASE, builder, config};

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Returns how many more threads the first guest takes; with fewer, it is an error.
async fn first_guest(pids: &Cgroup, backend: &KvmBackend, config: &PoolConfig) -> u64 {
    let profile = &config.profiles[0];
    for more in 0..16 {
        pids.leave_threads(more);
        let made = async {
            backend.prepare(profile).await?;
            backend.create(profile, VmId(1)).await
        };
        match within(60, "a guest or an error", made).await {
            Ok(guest) => {
                pids.limit("max");
                within(10, "a guest's end", backend.retire(guest)).await;
                return more;
            }
            Err(error) => {
                let text = error_chain(&error);
                assert!(text.contains("thread"), "{more}: {text}");
            }
        }
    }
    panic!("16 threads are not enough");
}

async fn steps(pids: &Cgroup) {
    let config = config(2);
    let backend = builder(&config).await.build();
    let threads = first_guest(pids, &backend, &config).await;
    assert!(threads > 0, "a guest without a thread");
    // The pool's boots fail, and succeed when the limit is raised.
    let pool = Pool::new(backend, config).unwrap();
    pids.leave_threads(0);
    let started = within(30, "start", pool.start()).await;
    let waited = pool.wait_ready(Duration::from_secs(2)).await;
    eprintln!("{threads} threads for a guest; {started:?}, {waited:?}");
    assert!(waited.is_err(), "{waited:?}");
    pids.limit("max");
    if started.is_err() {
        within(30, "start", pool.start()).await.unwrap();
    }
    within(60, "a full pool", pool.wait_ready(Duration::MAX))
        .await
        .unwrap();
    let lease = pool.acquire(BASE).unwrap();
    within(10, "a ping", lease.ping()).await.unwrap();
    drop(lease);
    within(10, "stop", pool.stop()).await;
}

#[test]
#[ignore = "long: a boot for each number of threads"]
fn a_limit_on_threads_is_an_error_of_the_vm_and_never_a_panic() {
    if !kvm() || !alone() {
        return;
    }
    let pids = Cgroup::pids("pool", "max").and_then(|mut pids| pids.join().map(|()| pids));
    let Some(pids) = pids else {
        return not_measured("no cgroup with pids.max may be made here");
    };
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        hook(panic);
    }));
    // A runtime without worker threads.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().build().unwrap();
    runtime.block_on(steps(&pids));
    assert_eq!(PANICS.load(Ordering::Relaxed), 0);
}
