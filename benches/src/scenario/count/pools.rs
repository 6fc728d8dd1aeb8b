//! The hand-off of a parked guest, up to its first answer and to the result of code, and the making
//! of the next one.

use hearth_pool::kvm::KvmImage;
use hearth_pool::{Language, Parking, Refill};

use super::Counts;
use crate::scenario::boot::Files;
use crate::scenario::pool::{self, PROFILE};
use crate::scenario::{ScenarioError, languages};

/// Counts with a pool of one guest that is filled by hand, so that nothing else runs.
pub(super) async fn hand_off(counts: &mut Counts, files: Files<'_>) -> Result<(), ScenarioError> {
    let backend = pool::backend(files).await?;
    let config = pool::config(files.shape, 1, Refill::Manual);
    let pool = pool::start(&backend, config, Parking::Paused).await?;
    for (_, counted) in counts.rounds() {
        let run = counts.start().await?;
        pool::fill(&pool, 1).await?;
        counts.stop(run, "refill, each guest", 1, counted)?;

        let mut run = counts.start().await?;
        let guest = pool.acquire(PROFILE);
        run.phase("hand-off: acquire");
        let guest = guest.map_err(ScenarioError::at("acquire"))?;
        guest.ping().await.map_err(ScenarioError::at("ping"))?;
        run.phase("hand-off: pong");
        counts.stop(run, "hand-off to pong", 1, counted)?;

        let run = counts.start().await?;
        guest.release().await;
        counts.stop(run, "release", 1, counted)?;
    }
    pool.stop().await;
    Ok(())
}

/// Counts the same with code in the guest's warm interpreter.
pub(super) async fn python(counts: &mut Counts, files: Files<'_>) -> Result<(), ScenarioError> {
    let language = Language::Python;
    let root = languages::root(language).await?;
    let image = KvmImage::new(files.kernel, files.initramfs).root(&root);
    let pool = languages::pool(image, language, Default::default()).await?;
    for (_, counted) in counts.rounds() {
        let run = counts.start().await?;
        languages::made(&pool, language).await?;
        counts.stop(run, "refill, each guest with Python", 1, counted)?;

        let mut run = counts.start().await?;
        let guest = languages::acquire(&pool, language)?;
        run.phase("hand-off with Python: acquire");
        let (_, session) = languages::first(&guest, language).await?;
        run.phase("hand-off with Python: print(6 * 7)");
        counts.stop(run, "hand-off to print(6 * 7)", 1, counted)?;
        drop(session);
        guest.release().await;
    }
    pool.stop().await;
    Ok(())
}
