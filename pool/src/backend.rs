//! The interface between a pool and the implementation that makes its VMs.
//!
//! The pool decides *when* VMs are made, checked and destroyed; a backend knows *how*.
//! [`crate::fake::FakeBackend`] scripts every answer for tests, the KVM backend boots or forks real
//! guests.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use crate::config::{PoolConfig, Problem};
use crate::profile::{Demand, Parking, Profile};
use crate::slot::VmId;

/// Makes, probes, parks and destroys the VMs of a pool.
///
/// # Rules for implementors
/// - Methods that return no future ([`alive`](Self::alive), [`pause`](Self::pause),
///   [`resume`](Self::resume), [`fits`](Self::fits), [`remote`](Self::remote),
///   [`making`](Self::making), [`no_template`](Self::no_template),
///   [`private_bytes`](Self::private_bytes), [`Remote::activity`]) and the part of
///   [`probe`](Self::probe) and [`ended`](Self::ended) that makes the future run under the pool's
///   lock: they must not block, and must not call back into the pool, nor run code that may
///   (logging runs the program's subscriber). The same holds for [`hand_off`](Self::hand_off),
///   which runs on the thread that calls acquire.
/// - `pause` and `resume` are *requests* and keep their order: the last one wins.
/// - It must be safe to drop any future, or a VM, at any moment, and nothing may be left behind.
pub trait Backend: Send + Sync + 'static {
    /// One VM. It has exactly one owner: the slot while it is parked, the lease while it is leased.
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
    /// failed boot keeps its reservation until then, and a pool that stops waits for it.
    fn settled(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Asks the VM once whether it works. The future must not borrow the VM: the VM may be handed
    /// out, and the probe dropped, at any moment. The pool adds the timeout and the retries.
    fn probe(&self, vm: &Self::Vm) -> BoxFuture<'static, Result<(), ProbeError>>;

    /// Destroys the VM and resolves when nothing of it remains. Runs in the pool's tasks, never in
    /// a caller's.
    fn retire(&self, vm: Self::Vm) -> impl Future<Output = ()> + Send;

    /// Whether a VM that is offered to a pool matches `profile` and has never been handed out.
    fn fits(&self, _vm: &Self::Vm, _profile: &Profile) -> bool {
        true
    }

    /// Resolves when the VM has ended by itself or was killed, at once if it already has.
    fn ended(&self, vm: &Self::Vm) -> BoxFuture<'static, ()>;

    /// Whether the VM still runs, as far as is known without asking the guest. Called on the
    /// acquire path: it should be a memory load, not a system call.
    fn alive(&self, vm: &Self::Vm) -> bool;

    /// Returns the handle by which the pool ends a VM that it does not own.
    fn remote(&self, vm: &Self::Vm) -> Self::Remote;

    /// Requests that the vCPUs stop, because the VM is parked and its profile parks VMs paused.
    fn pause(&self, _vm: &Self::Vm) {}

    /// Requests that the vCPUs run again, because the VM is about to be checked.
    fn resume(&self, vm: &Self::Vm);

    /// Signals that the VM now belongs to a caller: resumes the vCPUs, starts to deflate the
    /// balloon, if any, and returns without waiting.
    fn hand_off(&self, vm: &Self::Vm) {
        self.resume(vm);
    }

    /// Returns the settings of a pool's configuration that contradict the configuration of this
    /// backend. None by default.
    fn conflicts(&self, _config: &PoolConfig) -> Vec<Problem> {
        Vec::new()
    }

    /// How VMs of `profile` are parked when neither the profile nor the pool's configuration says.
    fn parking(&self, _profile: &Profile) -> Parking {
        Parking::Running
    }

    /// The share of the host's limits that one VM of `profile` takes.
    fn demand(&self, profile: &Profile) -> Demand {
        profile.demand()
    }

    /// Factor on every timeout; more than 1 where guests run slowly.
    fn time_scale(&self) -> u32 {
        1
    }

    /// How VMs of `profile` are made once the profile is prepared (for metrics and spans). Called
    /// before each [`create`](Self::create), under the pool's lock: it must not block.
    fn making(&self, _profile: &Profile) -> Making {
        Making::Boot
    }

    /// Why VMs of `profile` boot from cold instead of being forked: the error of making their
    /// template. The backend retries from time to time; each failure is a new [`Arc`]. Called after
    /// each preparation and each boot, under the pool's lock: it must not block.
    fn no_template(&self, _profile: &Profile) -> Option<Arc<dyn Error + Send + Sync>> {
        None
    }

    /// A short, fixed label for the kind of `error` (metrics).
    fn failure_kind(&self, _error: &Self::Error) -> &'static str {
        "backend"
    }

    /// Memory in bytes that this VM does not share, if that is cheap to find out (metrics).
    fn private_bytes(&self, _vm: &Self::Vm) -> Option<u64> {
        None
    }
}

/// Several pools may share a backend and all that it has prepared.
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

/// How a VM is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Making {
    /// It boots from cold.
    Boot,
    /// It is a fork: a copy of a template.
    Fork,
}

/// A weak handle to one VM, whether parked or leased. Ending the VM releases its threads,
/// descriptors and memory, also if it has ended by itself before; its owner keeps the handle of an
/// ended VM, which knows how it ended.
pub trait Remote: Send + Sync + 'static {
    /// Ends the VM and resolves when nothing of it runs any more. The VM may have ended already.
    fn kill(&self) -> impl Future<Output = ()> + Send;

    /// A number that changes whenever the VM does something for its owner. While a request of the
    /// owner is open it changes at each reading, because a VM that is silent then is not idle. The
    /// idle limit of leases compares two readings. A constant means "cannot tell" and makes every
    /// lease idle.
    fn activity(&self) -> u64;
}

/// Why a probe did not prove a VM healthy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// No answer, or the connection was lost: may be transient, so it is retried.
    #[error("the guest did not answer")]
    Lost,
    /// No answer within the ping timeout (set by the pool): retried.
    #[error("the guest did not answer within {0:?}")]
    TimedOut(Duration),
    /// The guest gave a wrong answer: not retried.
    #[error("the guest answered wrongly: {0}")]
    Wrong(&'static str),
    /// The VM has ended: not retried.
    #[error("the guest has ended")]
    Dead,
}

impl ProbeError {
    /// Whether another attempt may succeed.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Lost | Self::TimedOut(_) => true,
            Self::Wrong(_) | Self::Dead => false,
        }
    }
}
