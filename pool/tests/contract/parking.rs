//! How VMs are parked, and which setting decides.

use crate::support::*;
use hearth_pool::Parking::{self, Paused, Running};
use hearth_pool::fake::FakeBackend;
use hearth_pool::{PoolConfig, Profile};

#[tokio::test(start_paused = true)]
async fn a_profiles_parking_comes_before_the_pools_and_that_before_the_hosts() {
    let cases: [(Parking, Option<Parking>, Option<Parking>, Parking); 8] = [
        (Running, None, None, Running),
        (Paused, None, None, Paused),
        (Running, Some(Paused), None, Paused),
        (Paused, Some(Running), None, Running),
        (Running, None, Some(Paused), Paused),
        (Paused, None, Some(Running), Running),
        (Paused, Some(Paused), Some(Running), Running),
        (Running, Some(Running), Some(Paused), Paused),
    ];
    for (host, pool, profile, expected) in cases {
        let fake = FakeBackend::new().with_parking(host);
        let mut spec = Profile::new(PY, PY).warm_pool_size(1);
        spec.park = profile;
        let mut config = PoolConfig::new(4).profile(spec).health(quiet());
        config.park = pool;
        let pool = running(&fake, config).await;
        let is_paused = parked(&fake)[0].is_paused();
        assert_eq!(is_paused, expected == Paused, "{host:?}, {profile:?}");
        // However it was parked, its caller receives it running.
        assert!(!pool.acquire(PY).unwrap().handle().is_paused());
        stop_clean(pool, &fake).await;
    }
}

#[tokio::test(start_paused = true)]
async fn profiles_of_one_pool_wait_each_in_their_own_way() {
    let fake = FakeBackend::new().with_parking(Paused);
    let javascript = Profile::new(JS, JS).warm_pool_size(1).park(Running);
    let pool = running(&fake, config(1).profile(javascript)).await;
    for (profile, paused) in [(PY, true), (JS, false)] {
        let vms = fake.live();
        let lease = pool.acquire(profile).unwrap();
        let vm = vms.iter().find(|vm| vm.id() == lease.id()).unwrap();
        // This VM was resumed for its lease; its replacement shows how the profile parks.
        drop(lease);
        pool.wait_ready(secs(1)).await.unwrap();
        assert!(fake.vm(vm.id()).is_none());
        let fresh = fake.live().into_iter().max_by_key(|vm| vm.id()).unwrap();
        assert_eq!(fresh.is_paused(), paused, "{profile}");
    }
    stop_clean(pool, &fake).await;
}
