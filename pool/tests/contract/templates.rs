//! What a pool reports of profiles whose template cannot be made.

use crate::support::*;
use hearth_pool::fake::FakeBackend;
use hearth_pool::{EventKind, Making, Pool};

#[tokio::test(start_paused = true)]
async fn a_profile_whose_template_cannot_be_made_boots_cold_and_says_so_until_it_can() {
    let fake = FakeBackend::new().with_making(Making::Fork);
    fake.refuse_template(PY, Some("the host is out of memory"));
    let pool = make(&fake, config(2));
    let mut events = pool.subscribe();
    let mut told = || {
        let mut told = Vec::new();
        while let Ok(event) = events.try_recv() {
            match event.kind {
                EventKind::TemplateFailed(why) => told.push(why.to_string()),
                EventKind::TemplateMade => told.push("made".into()),
                _ => {}
            }
        }
        told
    };
    let why = |pool: &Pool<FakeBackend>| {
        let status = pool.status();
        let why = status.profile(PY).unwrap().no_template.as_ref();
        why.map(ToString::to_string)
    };
    pool.start().await.expect("cold boots do");
    assert_eq!(ready(&pool), 2);
    assert_eq!(told(), ["the host is out of memory"], "once");
    assert_eq!(why(&pool).unwrap(), "the host is out of memory");
    // Another attempt fails.
    fake.refuse_template(PY, Some("it still is"));
    drop(pool.acquire(PY).unwrap());
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!(told(), ["it still is"]);
    fake.refuse_template(PY, None);
    drop(pool.acquire(PY).unwrap());
    pool.wait_ready(secs(1)).await.unwrap();
    assert_eq!((told(), why(&pool)), (vec!["made".to_owned()], None));
    stop_clean(pool, &fake).await;
}
