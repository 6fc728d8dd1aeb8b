//! From the request for a guest with a warm interpreter to the result of `print(6 * 7)` in it, by
//! language; and the same without a pool, and without a template.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use hearth_agent::Command;
use hearth_agent::client::{CallEnd, SEED_BYTES, Session};
use hearth_images::{Images, Recipe, Silent};
use hearth_pool::kvm::{KvmBackend, KvmImage, Source};
use hearth_pool::{Balloon, Language, Parking, Pool, PoolConfig, Profile, Refill, Replenished};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_blocking;

use super::agent::refresh;
use super::boot::Files;
use super::pool::{Guest, Guests};
use super::samples::Samples;
use super::{ScenarioError, restored};
use crate::peer::Peers;
use crate::report::Report;

pub(super) const SCENARIO: &str = "exec";
/// The code's output.
pub(super) const WORD: &[u8] = b"42\n";

/// Number of samples.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    /// Guests from a pool.
    pub warm: usize,
    /// Guests that boot; each takes some ten seconds where ring 0 is emulated, Node.js more than a
    /// minute.
    pub cold: usize,
}

/// Measures each language. A language whose image or guest cannot be made counts as not measured.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    languages: &[Language],
    rounds: Rounds,
    peers: &Peers,
) {
    if peers.firecracker.is_none() {
        let why = "exec: Firecracker's restore to print(6 * 7): none was given, see --firecracker";
        report.not_measured.push(why.into());
    }
    for language in languages {
        if let Err(error) = one(report, files, *language, rounds, peers).await {
            let why = crate::suite::chain(&error);
            report.not_measured.push(format!("exec {language}: {why}"));
        }
    }
}

async fn one(
    report: &mut Report,
    files: Files<'_>,
    language: Language,
    rounds: Rounds,
    peers: &Peers,
) -> Result<(), ScenarioError> {
    let root = root(language).await?;
    let image = KvmImage::new(files.kernel, files.initramfs).root(&root);
    let mut samples = Samples::default();
    warm(&mut samples, image.clone(), language, rounds.warm).await?;
    cold(&mut samples, image, language, rounds.cold).await?;
    samples.report(report, SCENARIO, language.as_str());
    restored::run(report, files, (&root, language), peers, rounds.warm).await
}

/// Returns the language's image, which is built if it is missing.
pub(super) async fn root(language: Language) -> Result<PathBuf, ScenarioError> {
    let recipe = Recipe::built_in(language.as_str()).map_err(ScenarioError::at("recipe"))?;
    let root = spawn_blocking(move || Images::open(None)?.root(&recipe, &Silent));
    let root = root.await.map_err(ScenarioError::at("image"))?;
    root.map_err(ScenarioError::at("image"))
}

/// Returns a pool of one guest that is filled by hand.
pub(super) async fn pool(
    image: KvmImage,
    language: Language,
    source: Source,
) -> Result<Guests, ScenarioError> {
    let mut profile = Profile::of(language).warm_pool_size(1);
    if source == Source::Boot {
        // This guest is not kept parked.
        profile = profile.balloon(Balloon::Off);
    }
    let config = PoolConfig::new(1)
        .profile(profile)
        .refill(Refill::Manual)
        .park(Parking::Paused);
    let builder = KvmBackend::builder(&config).map_err(ScenarioError::at("host"))?;
    let backend = builder.source(source).image(language.as_str(), image);
    let pool = Pool::new(Arc::new(backend.build()), config);
    let pool = pool.map_err(ScenarioError::at("configuration"))?;
    pool.start().await.map_err(ScenarioError::at("start"))?;
    Ok(pool)
}

pub(super) async fn made(pool: &Guests, language: Language) -> Result<(), ScenarioError> {
    match pool.replenish(language.as_str()).await {
        Ok(Replenished::Failed(why)) => Err(ScenarioError::at("guest")(why)),
        Ok(_) => Ok(()),
        Err(error) => Err(ScenarioError::at("guest")(error)),
    }
}

pub(super) fn acquire(pool: &Guests, language: Language) -> Result<Guest, ScenarioError> {
    pool.acquire(language).map_err(ScenarioError::at("acquire"))
}

/// Measures the time before the hand-off, the hand-off and the code; then repeats the parts of the
/// clone refresh in the guest, to time each.
async fn warm(
    samples: &mut Samples,
    image: KvmImage,
    language: Language,
    n: usize,
) -> Result<(), ScenarioError> {
    let pool = pool(image, language, Source::default()).await?;
    // The first one is not counted.
    for round in 0..=n {
        let fork = Instant::now();
        made(&pool, language).await?;
        let ready = fork.elapsed();
        let begin = Instant::now();
        let guest = acquire(&pool, language)?;
        let handed = begin.elapsed();
        let (sent, mut session) = first(&guest, language).await?;
        let result = begin.elapsed();
        let again = Instant::now();
        answer(&mut session, language).await?;
        let again = again.elapsed();

        let kernel = Instant::now();
        let mut agent = guest.agent().await.map_err(ScenarioError::at("agent"))?;
        let refreshed = agent.refresh(refresh()).await;
        refreshed.map_err(ScenarioError::at("reseed"))?;
        let kernel = kernel.elapsed();
        let interpreter = Instant::now();
        let reseeded = session.reseed(&[1; SEED_BYTES]).await;
        reseeded.map_err(ScenarioError::at("reseed"))?;
        let interpreter = interpreter.elapsed();
        drop(session);
        guest.release().await;
        if round > 0 {
            samples.time("fork to ready, before the hand-off", ready);
            samples.time("of that: hygiene of the kernel", kernel);
            samples.time("of that: hygiene of the interpreter", interpreter);
            samples.time("warm hand-off", handed);
            samples.time("hand-off to code sent", sent - begin);
            samples.time("hand-off to print(6 * 7)", result);
            samples.time("print(6 * 7) once more", again);
            samples.time("fork on demand to print(6 * 7)", ready + result);
        }
    }
    parked(samples, &pool, language, n).await?;
    pool.stop().await;
    Ok(())
}

/// Measures the private memory of a parked guest.
async fn parked(
    samples: &mut Samples,
    pool: &Guests,
    language: Language,
    n: usize,
) -> Result<(), ScenarioError> {
    for _ in 0..n {
        made(pool, language).await?;
        let guest = acquire(pool, language)?;
        let bytes = guest.vm().private_bytes();
        let bytes = bytes.map_err(ScenarioError::at("private memory"))?;
        samples.push("private memory when parked", "KiB", bytes as f64 / 1024.0);
        guest.release().await;
    }
    Ok(())
}

async fn cold(
    samples: &mut Samples,
    image: KvmImage,
    language: Language,
    n: usize,
) -> Result<(), ScenarioError> {
    let pool = pool(image, language, Source::Boot).await?;
    for _ in 0..n {
        let begin = Instant::now();
        made(&pool, language).await?;
        let guest = acquire(&pool, language)?;
        let (_, session) = first(&guest, language).await?;
        samples.time("cold boot to print(6 * 7)", begin.elapsed());
        drop(session);
        guest.release().await;
    }
    pool.stop().await;
    Ok(())
}

/// Makes the first call in the guest's warm interpreter; returns the session, and the time just
/// before the code is sent.
pub(super) async fn first(
    guest: &Guest,
    language: Language,
) -> Result<(Instant, hearth_pool::kvm::Session), ScenarioError> {
    let session = guest.session().await;
    let mut session = session.map_err(ScenarioError::at("session"))?;
    let sent = Instant::now();
    answer(&mut session, language).await?;
    Ok((sent, session))
}

async fn answer<S>(session: &mut Session<S>, language: Language) -> Result<(), ScenarioError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let outcome = session.run(code(language)).await;
    let outcome = outcome.map_err(ScenarioError::at("code"))?;
    match (outcome.end, outcome.stdout == WORD) {
        (CallEnd::Nothing | CallEnd::Value(_), true) => Ok(()),
        (end, _) => Err(ScenarioError::at("code")(format!("it ended with {end:?}"))),
    }
}

fn code(language: Language) -> &'static str {
    match language {
        Language::Javascript => "console.log(6 * 7)",
        Language::Shell => "echo $((6 * 7))",
        _ => "print(6 * 7)",
    }
}

/// Returns a command that runs the same code in an interpreter of its own.
pub(super) fn program(language: Language) -> Command {
    let (name, flag) = match language {
        Language::Javascript => ("node", "-e"),
        Language::Shell => ("bash", "-c"),
        _ => ("python3", "-c"),
    };
    Command::new(name).args([flag, code(language)])
}
