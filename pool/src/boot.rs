//! One boot, for the refill loop and `replenish`: create the VM, then check it for the first time.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::backend::Backend;
use crate::error::BootFailure;
use crate::health;
use crate::ledger::ProfileId;
use crate::shared::Shared;
use crate::slot::VmId;

/// A failed boot. If a VM was created, it is to be destroyed.
pub(crate) struct Failed<B: Backend> {
    pub(crate) why: BootFailure,
    /// The backend's label for its error.
    pub(crate) kind: Option<&'static str>,
    pub(crate) vm: Option<B::Vm>,
}

impl<B: Backend> Failed<B> {
    fn early(why: BootFailure) -> Self {
        Self {
            why,
            kind: None,
            vm: None,
        }
    }
}

/// Creates a VM and checks it. Never panics. Once `cancelled`, it waits at most for [`settled`].
pub(crate) async fn boot<B: Backend>(
    shared: Arc<Shared<B>>,
    profile: ProfileId,
    id: VmId,
    cancelled: CancellationToken,
) -> Result<B::Vm, Failed<B>> {
    let steps = AssertUnwindSafe(steps(&shared, profile, id, &cancelled));
    // A panic drops the VM if there is one already, which is safe.
    let booted = steps.catch_unwind().await;
    let booted = booted.unwrap_or_else(|_| Err(Failed::early(BootFailure::Panicked)));
    if matches!(booted, Err(Failed { vm: None, .. })) {
        settled(&shared).await;
    }
    booted
}

/// Waits until nothing is left of failed boots in the backend, at most for the retire timeout. A
/// panic of the backend ends the wait.
pub(crate) async fn settled<B: Backend>(shared: &Shared<B>) {
    let settled = async { shared.backend.settled().await };
    let settled = AssertUnwindSafe(settled).catch_unwind();
    if let Ok(Err(_)) = timeout(shared.times.retire, settled).await {
        tracing::error!(what = "settled", "the backend panicked");
    }
}

async fn steps<B: Backend>(
    shared: &Shared<B>,
    profile: ProfileId,
    id: VmId,
    cancelled: &CancellationToken,
) -> Result<B::Vm, Failed<B>> {
    let Some(profile) = shared.profile(profile) else {
        return Err(Failed::early(BootFailure::Cancelled));
    };
    let limit = shared.times.boot;
    let created = tokio::select! {
        biased;
        () = cancelled.cancelled() => return Err(Failed::early(BootFailure::Cancelled)),
        created = timeout(limit, shared.backend.create(&profile.spec, id)) => created,
    };
    let vm = match created {
        Ok(Ok(vm)) => vm,
        Ok(Err(error)) => {
            let kind = Some(shared.backend.failure_kind(&error));
            return Err(Failed {
                why: BootFailure::Backend(Arc::new(error)),
                kind,
                vm: None,
            });
        }
        Err(_) => return Err(Failed::early(BootFailure::TimedOut(limit))),
    };
    let proof = health::check(shared.check_rules, || Some(shared.backend.probe(&vm)));
    let why = tokio::select! {
        biased;
        () = cancelled.cancelled() => BootFailure::Cancelled,
        verdict = proof => match verdict {
            Ok(took) => {
                profile.metrics.ping.record(took);
                return Ok(vm);
            }
            Err(error) => BootFailure::Unhealthy(error),
        },
    };
    Err(Failed {
        why,
        kind: None,
        vm: Some(vm),
    })
}
