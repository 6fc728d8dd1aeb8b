//! The KVM backend, with a hand on each of its VMs, so that parked ones can be made to end.

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

/// How a guest ends, or goes silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Its VM is ended from outside.
    Kill,
    /// Its kernel panics.
    Panic,
    /// It switches itself off.
    PowerOff,
    /// Its vCPUs stop for ever.
    Freeze,
    /// Its agent stops; all else in it goes on.
    Wedge,
}

impl Way {
    /// Whether the guest lives on and must be asked to be found out.
    #[must_use]
    pub fn is_silent(self) -> bool {
        matches!(self, Self::Freeze | Self::Wedge)
    }
}

/// An agent that does not answer for so long has stopped.
const WEDGED: Duration = Duration::from_millis(500);

/// Makes VMs as [`KvmBackend`] does, and keeps a hand on them.
pub struct Victims {
    kvm: Arc<KvmBackend>,
    hands: Mutex<HashMap<VmId, Hand>>,
    frozen: Mutex<HashSet<InstanceId>>,
}

/// A hand on one VM; does not keep it.
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
    /// Of VMs that `kvm` makes.
    #[must_use]
    pub fn new(kvm: Arc<KvmBackend>) -> Arc<Self> {
        Arc::new(Self {
            kvm,
            hands: Mutex::default(),
            frozen: Mutex::default(),
        })
    }

    /// The youngest VM.
    #[must_use]
    pub fn youngest(&self) -> Option<VmId> {
        lock(&self.hands).keys().max().copied()
    }

    /// Brings `way` about and gives the moment when the guest ended, or was frozen.
    ///
    /// # Errors
    /// When the guest cannot be made to end so.
    pub async fn end(&self, id: VmId, way: Way) -> Result<Instant, ScenarioError> {
        let Some(hand) = lock(&self.hands).remove(&id) else {
            return Err(ScenarioError::at("victim")("it is not there"));
        };
        // What brings it about takes longer than the guest: a kill waits until nothing of it is
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
    // The guest may be gone before it has said that the program runs.
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
            // Fails only if it has ended, which is no better.
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
