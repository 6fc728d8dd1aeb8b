//! A backend that panics costs VMs, never the pool.

use crate::support::*;
use hearth_pool::fake::{FakeBackend, Method};
use hearth_pool::{OfferRefusal, Parking, Phase};

#[tokio::test(start_paused = true)]
async fn a_panic_of_the_backend_in_any_method_costs_at_most_one_vm() {
    for method in [
        Method::Remote,
        Method::Ended,
        Method::Alive,
        Method::Pause,
        Method::Resume,
        Method::PrivateBytes,
        Method::Retire,
    ] {
        let fake = FakeBackend::new();
        let pool = running(&fake, config(2).park(Parking::Paused)).await;
        fake.panic_in(method);
        // These steps call every method: checks, a hand-off, a return, a refill.
        let _ = pool.check(PY, 1).await.unwrap();
        drop(pool.acquire(PY));
        pool.wait_ready(secs(5))
            .await
            .unwrap_or_else(|error| panic!("{method:?}: {error}"));
        assert_eq!(pool.status().phase, Phase::Running, "{method:?}");
        drop(pool.acquire(PY).unwrap());
        stop_clean(pool, &fake).await;
        let tally = fake.tally(PY);
        assert!(tally.created <= 5, "{method:?}: {tally:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_offered_vm_that_the_backend_panics_on_comes_back() {
    let fake = FakeBackend::new();
    let pool = by_hand(&fake, config(1)).await;
    fake.panic_in(Method::Remote);
    let refused = pool.offer(PY, fake.make(PY)).await.unwrap_err();
    assert!(matches!(refused.why, OfferRefusal::Unhealthy(_)));
    assert!(refused.vm.is_some());
    drop(refused);
    stop_clean(pool, &fake).await;
}
