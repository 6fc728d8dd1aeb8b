//! What a pool needs from whatever makes its VMs.
//!
//! The pool decides *when*; a backend knows *how*. [`crate::fake::FakeBackend`] scripts every
//! answer for tests, the KVM backend boots or forks real guests.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use crate::config::{PoolConfig, Problem};
use crate::profile::{Demand, Parking, Profile};
use crate::slot::VmId;

/// Makes, proves, parks and destroys the VMs of a pool.
///
/// # Rules for implementors
/// - Methods that return no future ([`alive`](Self::alive), [`pause`](Self::pause),
///   [`resume`](Self::resume), [`fits`](Self::fits), [`remote`](Self::remote),
///   [`making`](Self::making), [`no_template`](Self::no_template),
///   [`private_bytes`](Self::private_bytes), [`Remote::activity`]) and the part of
///   [`probe`](Self::probe) and [`ended`](Self::ended) that makes the future run under the pool's
///   lock: they must not block, and must not call back into the pool, nor run code that may (a log
///   goes to the program's subscriber). The same holds for [`hand_off`](Self::hand_off), which runs
///   in the caller of acquire.
/// - `pause` and `resume` are *requests* and keep their order: the last one wins.
/// - Dropping any future, or a VM, at any moment is safe and leaves nothing behind.
pub trait Backend: Send + Sync + 'static {
    /// One VM. Its owner is the only one: the slot while parked, the lease while out.
    type Vm: Send + Sync + 'static;
    /// A handle that does not keep the VM alive; see [`Remote`].
    type Remote: Remote;
    /// Why a VM could not be made.
    type Error: Error + Send + Sync + 'static;

    /// Gets ready to make VMs of `profile` (image, template). Called once per start, before the
    /// first [`create`](Self::create) of that profile; a second call should find its work done.
    fn prepare(&self, profile: &Profile) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Makes one VM and does all that a fresh VM needs (boot or fork, handshake, random state,
    /// identity, warm-up command). The pool bounds it in time and probes the VM before parking it.
    fn create(
        &self,
        profile: &Profile,
        id: VmId,
    ) -> impl Future<Output = Result<Self::Vm, Self::Error>> + Send;

    /// Resolves when nothing is left of VMs whose [`create`](Self::create) failed or was dropped. A
    /// boot that came to nothing keeps its place in the limits until then, and a pool that
    /// stops waits for it.
    fn settled(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Asks the VM once whether it works. The future must not borrow the VM: the VM may be handed
    /// out, and the probe dropped, at any moment. The pool adds the timeout and the retries.
    fn probe(&self, vm: &Self::Vm) -> BoxFuture<'static, Result<(), ProbeError>>;

    /// Destroys the VM and resolves when nothing of it remains. Runs off every caller's path.
    fn retire(&self, vm: Self::Vm) -> impl Future<Output = ()> + Send;

    /// Whether a VM that is offered to a pool is what `profile` describes, and nobody has had it
    /// yet.
    fn fits(&self, _vm: &Self::Vm, _profile: &Profile) -> bool {
        true
    }

    /// Resolves when the VM has ended by itself or was killed, at once if it already has.
    fn ended(&self, vm: &Self::Vm) -> BoxFuture<'static, ()>;

    /// Whether the VM still runs, as far as one can tell without asking it. Called on the acquire
    /// path: a load, not a system call.
    fn alive(&self, vm: &Self::Vm) -> bool;

    /// The handle by which the pool ends a VM that somebody else owns.
    fn remote(&self, vm: &Self::Vm) -> Self::Remote;

    /// Asks for the vCPUs to stop, because the VM is parked and the policy says paused.
    fn pause(&self, _vm: &Self::Vm) {}

    /// Asks for the vCPUs to go on, because the VM is about to be checked.
    fn resume(&self, vm: &Self::Vm);

    /// Signals that the VM now belongs to a caller: resume, start to deflate, return.
    fn hand_off(&self, vm: &Self::Vm) {
        self.resume(vm);
    }

    /// What of a pool's configuration contradicts the one that this backend was made with. Nothing,
    /// unless a backend says otherwise.
    fn conflicts(&self, _config: &PoolConfig) -> Vec<Problem> {
        Vec::new()
    }

    /// How VMs of `profile` wait when neither the profile nor the pool's configuration says.
    fn parking(&self, _profile: &Profile) -> Parking {
        Parking::Running
    }

    /// What one VM of `profile` takes from the host's limits.
    fn demand(&self, profile: &Profile) -> Demand {
        profile.demand()
    }

    /// Factor on every timeout; more than 1 where guests run slowly.
    fn time_scale(&self) -> u32 {
        1
    }

    /// How VMs of `profile` come to be, once the profile is prepared (metrics, spans). Asked before
    /// each [`create`](Self::create), under the pool's lock: it must not block.
    fn making(&self, _profile: &Profile) -> Making {
        Making::Boot
    }

    /// Why VMs of `profile` boot from cold although they should be copies of a template: none could
    /// be made. The backend tries again from time to time; each failure is another value. Asked
    /// after each preparation and each boot, under the pool's lock: it must not block.
    fn no_template(&self, _profile: &Profile) -> Option<Arc<dyn Error + Send + Sync>> {
        None
    }

    /// A short, fixed label for the kind of `error` (metrics).
    fn failure_kind(&self, _error: &Self::Error) -> &'static str {
        "backend"
    }

    /// Memory in bytes that this VM shares with nobody, if cheap to tell (metrics).
    fn private_bytes(&self, _vm: &Self::Vm) -> Option<u64> {
        None
    }
}

/// Several pools may share a backend, and with it what it has prepared.
impl<B: Backend> Backend for Arc<B> {
    type Vm = B::Vm;
    type Remote = B::Remote;
    type Error = B::Error;

    async fn prepare(&self, profile: &Profile) -> Result<(), B::Error> {
        (**self).prepare(profile).await
    }

    async fn create(&self, profile: &Profile, id: VmId) -> Result<B::Vm, B::Error> {
        (**self).create(profile, id).await
    }

    async fn settled(&self) {
        (**self).settled().await;
    }

    fn probe(&self, vm: &B::Vm) -> BoxFuture<'static, Result<(), ProbeError>> {
        (**self).probe(vm)
    }

    async fn retire(&self, vm: B::Vm) {
        (**self).retire(vm).await;
    }

    fn fits(&self, vm: &B::Vm, profile: &Profile) -> bool {
        B::fits(self, vm, profile)
    }

    fn ended(&self, vm: &B::Vm) -> BoxFuture<'static, ()> {
        (**self).ended(vm)
    }

    fn alive(&self, vm: &B::Vm) -> bool {
        (**self).alive(vm)
    }

    fn remote(&self, vm: &B::Vm) -> B::Remote {
        (**self).remote(vm)
    }

    fn pause(&self, vm: &B::Vm) {
        (**self).pause(vm);
    }

    fn resume(&self, vm: &B::Vm) {
        (**self).resume(vm);
    }

    fn hand_off(&self, vm: &B::Vm) {
        (**self).hand_off(vm);
    }

    fn conflicts(&self, config: &PoolConfig) -> Vec<Problem> {
        (**self).conflicts(config)
    }

    fn parking(&self, profile: &Profile) -> Parking {
        (**self).parking(profile)
    }

    fn demand(&self, profile: &Profile) -> Demand {
        (**self).demand(profile)
    }

    fn time_scale(&self) -> u32 {
        (**self).time_scale()
    }

    fn making(&self, profile: &Profile) -> Making {
        (**self).making(profile)
    }

    fn no_template(&self, profile: &Profile) -> Option<Arc<dyn Error + Send + Sync>> {
        (**self).no_template(profile)
    }

    fn failure_kind(&self, error: &B::Error) -> &'static str {
        (**self).failure_kind(error)
    }

    fn private_bytes(&self, vm: &B::Vm) -> Option<u64> {
        (**self).private_bytes(vm)
    }
}

/// How a VM comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Making {
    /// It boots from cold.
    Boot,
    /// It is a copy of a template.
    Fork,
}

/// A weak handle to one VM, wherever it is. A VM that it ends, or has ended already, gives up what
/// it holds of the host (threads, descriptors, memory): its owner is left with a value that knows
/// how it ended.
pub trait Remote: Send + Sync + 'static {
    /// Ends the VM, whoever owns it; resolves when nothing of it runs any more. Ending an ended VM
    /// is fine.
    fn kill(&self) -> impl Future<Output = ()> + Send;

    /// A number that changes whenever the VM does something for its owner, and at each reading
    /// while a request of the owner's is open: silence is not idleness then. The idle limit of
    /// leases compares two readings. A constant means "cannot tell" and makes every lease idle.
    fn activity(&self) -> u64;
}

/// Why a probe did not prove a VM healthy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// No answer, or the connection was lost: may be bad luck, so it is tried again.
    #[error("the guest did not answer")]
    Lost,
    /// No answer within the ping timeout (set by the pool): tried again.
    #[error("the guest did not answer within {0:?}")]
    TimedOut(Duration),
    /// The guest answered something it must not: not tried again.
    #[error("the guest answered wrongly: {0}")]
    Wrong(&'static str),
    /// The VM is gone: not tried again.
    #[error("the guest has ended")]
    Dead,
}

impl ProbeError {
    /// Whether another attempt may tell otherwise.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Lost | Self::TimedOut(_) => true,
            Self::Wrong(_) | Self::Dead => false,
        }
    }
}
