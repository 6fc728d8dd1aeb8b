//! Fault injector: the KVM backend with a handle of each of its VMs, through which parked ones are
//! made to end.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use hearth_agent::client::Command;
use hearth_agent::proto::InstanceId;
use hearth_pool::kvm::{CreateError, Guest, GuestRemote, KvmBackend};
use hearth_pool::{Backend, Parking, ProbeError, Profile, Remote, VmId};
use hearth_vmm::{Exit, VsockHost};

use super::ScenarioError;
use super::agent::dial;

/// A way for a guest to end, or to fall silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Its VM is ended from outside.
    Kill,
    /// The guest's kernel panics.
    Panic,
    /// The guest powers off.
    PowerOff,
    /// The guest's vCPUs stop for ever.
    Freeze,
    /// The guest's agent stops; everything else in the guest goes on.
    Wedge,
}

impl Way {
    /// Whether the guest lives on, so that only a check finds the fault.
    #[must_use]
    pub fn is_silent(self) -> bool {
        matches!(self, Self::Freeze | Self::Wedge)
    }
}

/// An agent that does not answer for this long has stopped.
const WEDGED: Duration = Duration::from_millis(500);

/// Makes VMs as [`KvmBackend`] does, and keeps a handle of each for faults.
pub struct Victims {
    kvm: Arc<KvmBackend>,
    hands: Mutex<HashMap<VmId, Hand>>,
    frozen: Mutex<HashSet<InstanceId>>,
}

/// A handle of one VM; it does not keep the VM alive.
struct Hand {
    remote: Arc<GuestRemote>,
    vsock: VsockHost,
    instance: InstanceId,
    exited: BoxFuture<'static, Exit>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Victims {
    /// Wraps `kvm`, which makes the VMs.
    #[must_use]
    pub fn new(kvm: Arc<KvmBackend>) -> Arc<Self> {
        Arc::new(Self {
            kvm,
            hands: Mutex::default(),
            frozen: Mutex::default(),
        })
    }

    /// Returns the youngest VM.
    #[must_use]
    pub fn youngest(&self) -> Option<VmId> {
        lock(&self.hands).keys().max().copied()
    }

    /// Makes the guest fail in this way; returns when it ended or was frozen.
    ///
    /// # Errors
    /// When the guest cannot be made to fail in this way.
    pub async fn end(&self, id: VmId, way: Way) -> Result<Instant, ScenarioError> {
        let Some(hand) = lock(&self.hands).remove(&id) else {
            return Err(ScenarioError::at("victim")("it is not there"));
        };
        // The cause may take longer than the guest's end: a kill waits until nothing of the VM is
        // left.
        let ended = async {
            hand.exited.await;
            Ok(Instant::now())
        };
        let cause = async {
            match way {
                Way::Freeze => {
                    lock(&self.frozen).insert(hand.instance);
                }
                Way::Wedge => wedge(&hand.vsock).await?,
                Way::Kill => hand.remote.kill().await,
                Way::Panic => run(&hand.vsock, "panic").await?,
                Way::PowerOff => run(&hand.vsock, "poweroff").await?,
            }
            Ok(())
        };
        if way.is_silent() {
            cause.await?;
            return Ok(Instant::now());
        }
        let (ended, ()) = tokio::try_join!(ended, cause)?;
        Ok(ended)
    }

    fn is_frozen(&self, vm: &Guest) -> bool {
        lock(&self.frozen).contains(&vm.instance())
    }
}

/// Starts a program that ends its guest.
async fn run(vsock: &VsockHost, program: &str) -> Result<(), ScenarioError> {
    let agent = dial(vsock).await?;
    // The guest may be gone before it has reported that the program runs.
    if let Ok(exec) = agent.exec(Command::new(program)).await {
        let _ = exec.wait().await;
    }
    Ok(())
}

/// Stops the agent, and returns when it is seen to have stopped.
async fn wedge(vsock: &VsockHost) -> Result<(), ScenarioError> {
    let mut agent = dial(vsock).await?;
    let program = vsock.clone();
    // Ends with the guest.
    tokio::spawn(async move { run(&program, "wedge-agent").await });
    for nonce in 1.. {
        match tokio::time::timeout(WEDGED, agent.ping(nonce)).await {
            Ok(pong) => pong.map(drop).map_err(ScenarioError::at("ping"))?,
            Err(_) => break,
        }
    }
    Ok(())
}

impl Backend for Victims {
    type Vm = Guest;
    type Remote = GuestRemote;
    type Error = CreateError;

    async fn prepare(&self, profile: &Profile) -> Result<(), CreateError> {
        self.kvm.prepare(profile).await
    }

    async fn create(&self, profile: &Profile, id: VmId) -> Result<Guest, CreateError> {
        let vm = self.kvm.create(profile, id).await?;
        let hand = Hand {
            remote: Arc::new(self.kvm.remote(&vm)),
            vsock: vm.vm().vsock().clone(),
            instance: vm.instance(),
            exited: vm.exited(),
        };
        lock(&self.hands).insert(id, hand);
        Ok(vm)
    }

    async fn settled(&self) {
        self.kvm.settled().await;
    }

    fn probe(&self, vm: &Guest) -> BoxFuture<'static, Result<(), ProbeError>> {
        if self.is_frozen(vm) {
            // Fails only if the VM has ended, which is a failure of the guest as well.
            let _ = vm.vm().request_pause();
        }
        self.kvm.probe(vm)
    }

    async fn retire(&self, vm: Guest) {
        self.kvm.retire(vm).await;
    }

    fn fits(&self, vm: &Guest, profile: &Profile) -> bool {
        self.kvm.fits(vm, profile)
    }

    fn ended(&self, vm: &Guest) -> BoxFuture<'static, ()> {
        self.kvm.ended(vm)
    }

    fn alive(&self, vm: &Guest) -> bool {
        self.kvm.alive(vm)
    }

    fn remote(&self, vm: &Guest) -> GuestRemote {
        self.kvm.remote(vm)
    }

    fn pause(&self, vm: &Guest) {
        self.kvm.pause(vm);
    }

    fn resume(&self, vm: &Guest) {
        if !self.is_frozen(vm) {
            self.kvm.resume(vm);
        }
    }

    fn parking(&self, profile: &Profile) -> Parking {
        self.kvm.parking(profile)
    }

    fn time_scale(&self) -> u32 {
        self.kvm.time_scale()
    }
}
