//! Interpreters that are warm in every guest of a pool, and have different random state.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hearth_agent::client::{Call, CallEnd, Outcome};
use hearth_images::{DebianError, Images, ImagesError, Recipe, RootError, Silent};
use hearth_pool::kvm::{Guest, KvmBackend, KvmImage, Session};
use hearth_pool::{Language, Pool, PoolConfig, Profile};
use hearth_tests::{error_chain, kvm, not_measured, patience, within};

/// Returns the language's image; `None`, with a note, if Debian's mirror cannot be reached.
async fn image(language: Language) -> Option<KvmImage> {
    let found = tokio::task::spawn_blocking(move || {
        let images = Images::open(None)?;
        let base = images.base(&Silent)?;
        let root = images.root(&Recipe::built_in(language.as_str()).unwrap(), &Silent)?;
        Ok::<_, ImagesError>(KvmImage::new(base.kernel, base.initramfs).root(root))
    });
    match found.await.unwrap() {
        Ok(image) => Some(image),
        Err(
            error @ ImagesError::Root(RootError::Debian(
                DebianError::Fetch { .. } | DebianError::NoMirror,
            )),
        ) => {
            not_measured(&error_chain(&error));
            None
        }
        Err(error) => panic!("{}", error_chain(&error)),
    }
}

/// Starts a pool of `size` guests of the language's built-in profile.
async fn pool(language: Language, prelude: &str, size: usize) -> Option<Pool<Arc<KvmBackend>>> {
    if !kvm() {
        return None;
    }
    let image = image(language).await?;
    let profile = Profile::of(language).prelude(prelude).warm_pool_size(size);
    let config = PoolConfig::new(8).profile(profile);
    let backend = KvmBackend::builder(&config).unwrap();
    let backend = backend.image(language.as_str(), image).build();
    let pool = Pool::new(Arc::new(backend), config).unwrap();
    within(400, "start", pool.start()).await.unwrap();
    Some(pool)
}

async fn run(session: &mut Session, code: &str) -> Outcome {
    let call = Call::new(code).timeout(patience(Duration::from_secs(60)));
    session.run(call).await.unwrap()
}

async fn value(session: &mut Session, code: &str) -> String {
    match run(session, code).await.end {
        CallEnd::Value(value) => value,
        other => panic!("{code}: {other:?}"),
    }
}

/// Returns the value of each expression in each of `guests` guests, which are used one by one.
async fn drawn(
    pool: &Pool<Arc<KvmBackend>>,
    language: Language,
    guests: usize,
    code: &[&str],
) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for _ in 0..guests {
        let guest = pool
            .acquire_timeout(language, patience(Duration::from_secs(60)))
            .await
            .unwrap();
        let mut session = guest.session().await.unwrap();
        let mut values = Vec::new();
        for code in code {
            values.push(value(&mut session, code).await);
        }
        all.push(values);
    }
    all
}

/// Asserts that each draw has a different value in every guest, and in the template.
fn all_differ(drawn: &[Vec<String>]) {
    for (index, of_first) in drawn[0].iter().enumerate() {
        let values: BTreeSet<_> = drawn.iter().map(|values| &values[index]).collect();
        assert_eq!(
            values.len(),
            drawn.len(),
            "draw {index}, like {of_first}: {drawn:?}"
        );
    }
}

const PYTHON: &str = "import random, uuid, secrets, ssl, tempfile
def draws():
    return [random.random(), uuid.uuid4().hex, secrets.token_hex(), ssl.RAND_bytes(16).hex(), next(tempfile._get_candidate_names())]
of_template = draws()
hooked = 0
import hearth
def again():
    global hooked
    hooked += 1
hearth.on_clone(again)";

#[tokio::test]
async fn python_is_warm_in_every_guest_and_draws_what_nobody_else_does() {
    let Some(pool) = pool(Language::Python, PYTHON, 2).await else {
        return;
    };
    let guest = pool.acquire(Language::Python).unwrap();
    let mut session = guest.session().await.unwrap();
    assert_eq!(
        run(&mut session, "print('hello'); 6 * 7").await.stdout,
        b"hello\n"
    );
    assert_eq!(value(&mut session, "6 * 7").await, "42");
    // Two reseeds in the template, and one in the clone.
    assert_eq!(value(&mut session, "hooked").await, "3");
    let outcome = run(
        &mut session,
        "import os, time; os.getuid(), abs(time.time() - NOW) < 30"
            .replace("NOW", &now())
            .as_str(),
    )
    .await;
    assert_eq!(outcome.end, CallEnd::Value("(1000, True)".into()));
    session
        .run(Call::new("while True: pass").timeout(Duration::from_millis(200)))
        .await
        .unwrap();
    assert_eq!(
        value(&mut session, "hooked").await,
        "3",
        "the state is kept"
    );
    drop((session, guest));
    let calls = [
        "draws()[0]",
        "draws()[1]",
        "draws()[2]",
        "draws()[3]",
        "draws()[4]",
    ];
    let mut drawn = drawn(&pool, Language::Python, 3, &calls).await;
    let guest = pool
        .acquire_timeout(Language::Python, patience(Duration::from_secs(60)))
        .await
        .unwrap();
    let mut session = guest.session().await.unwrap();
    let mut template = Vec::new();
    for index in 0..calls.len() {
        template.push(value(&mut session, &format!("of_template[{index}]")).await);
    }
    drawn.push(template);
    all_differ(&drawn);
    drop((session, guest));
    within(60, "stop", pool.stop()).await;
}

fn now() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_secs_f64().to_string()
}

const JAVASCRIPT: &str = "const crypto_ = require('crypto');
const draws = () => [Math.random(), crypto_.randomBytes(16).toString('hex'), crypto_.randomUUID(), crypto_.webcrypto.getRandomValues(new Uint32Array(4)).join(), crypto_.randomInt(2 ** 47), crypto_.generateKeyPairSync('ed25519').publicKey.export({ format: 'jwk' }).x];
const ofTemplate = draws();";

#[tokio::test]
#[ignore = "long: Node.js takes a minute to start where ring 0 is emulated"]
async fn javascript_is_warm_in_every_guest_and_draws_what_nobody_else_does() {
    let Some(pool) = pool(Language::Javascript, JAVASCRIPT, 2).await else {
        return;
    };
    let calls = [
        "draws()[0]",
        "draws()[1]",
        "draws()[2]",
        "draws()[3]",
        "draws()[4]",
        "draws()[5]",
    ];
    let mut drawn = drawn(&pool, Language::Javascript, 3, &calls).await;
    let guest = pool
        .acquire_timeout(Language::Javascript, patience(Duration::from_secs(60)))
        .await
        .unwrap();
    let mut session = guest.session().await.unwrap();
    assert_eq!(
        run(&mut session, "console.log('hello')").await.stdout,
        b"hello\n"
    );
    assert_eq!(value(&mut session, "6 * 7").await, "42");
    let mut template = Vec::new();
    for index in 0..calls.len() {
        template.push(value(&mut session, &format!("ofTemplate[{index}]")).await);
    }
    drawn.push(template);
    all_differ(&drawn);
    drop((session, guest));
    within(60, "stop", pool.stop()).await;
}

#[tokio::test]
async fn a_shell_is_warm_in_every_guest_and_a_second_session_is_a_new_one() {
    let Some(pool) = pool(Language::Shell, "answer=42", 1).await else {
        return;
    };
    let guest: &Guest = &pool.acquire(Language::Shell).unwrap();
    let mut session = guest.session().await.unwrap();
    let outcome = run(
        &mut session,
        "echo $answer; echo $(( $(echo 5 | tr 5 6) * 7 ))",
    )
    .await;
    assert_eq!(String::from_utf8_lossy(&outcome.stdout), "42\n42\n");
    let mut second = guest.session().await.unwrap();
    assert_eq!(run(&mut second, "echo [$answer]").await.stdout, b"[]\n");
    assert_eq!(run(&mut session, "echo [$answer]").await.stdout, b"[42]\n");
    let outcome = run(&mut session, "exit 3").await;
    assert!(matches!(outcome.end, CallEnd::Exited(_)));
    let outcome = run(&mut session, "echo again").await;
    assert_eq!(
        (outcome.restarted, &*outcome.stdout),
        (true, &b"again\n"[..])
    );
    drop((session, second));
    within(60, "stop", pool.stop()).await;
}
