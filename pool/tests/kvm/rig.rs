//! A backend of real guests that can be disturbed while they are parked.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use hearth_agent::AgentClient;
use hearth_agent::client::{Command, Output, OutputLimits};
use hearth_agent::proto::{AGENT_PORT, InstanceId};
use hearth_images::{Images, Silent};
use hearth_pool::config::{BootConfig, HealthConfig};
use hearth_pool::kvm::{CreateError, Guest, GuestRemote, KvmBackend, KvmImage};
use hearth_pool::{
    Backend, Counts, Demand, Parking, Phase, Pool, PoolConfig, ProbeError, Profile, Refill, Remote,
    VmId,
};
use hearth_tests::within;
use hearth_vmm::VsockHost;
use hearth_vmm::virtio::balloon::Balloon;
use tokio::sync::OnceCell;

pub(crate) const BASE: &str = "base";

/// What all pools of this binary make their VMs with; holds the one template.
async fn shared_backend() -> Arc<KvmBackend> {
    static BACKEND: OnceCell<Arc<KvmBackend>> = OnceCell::const_new();
    let make = || async {
        let config = config(1);
        let image = tokio::task::spawn_blocking(|| Images::open(None)?.base(&Silent));
        let image = image.await.unwrap().expect("the base image");
        let image = KvmImage {
            kernel: image.kernel,
            initramfs: image.initramfs,
            append: String::new(),
        };
        let builder = KvmBackend::builder(&config).expect("a host that runs guests");
        let backend = builder.image(BASE, image).build();
        backend
            .prepare(&config.profiles[0])
            .await
            .expect("a template");
        Arc::new(backend)
    };
    Arc::clone(BACKEND.get_or_init(make).await)
}

/// One profile of so many VMs; no health passes by itself.
pub(crate) fn config(size: usize) -> PoolConfig {
    let mut health = HealthConfig::default();
    health.interval_ms = 0;
    (
        health.attempts,
        health.backoff_min_ms,
        health.backoff_max_ms,
    ) = (2, 1, 10);
    let mut boot = BootConfig::default();
    (boot.backoff_min_ms, boot.backoff_max_ms) = (1, 20);
    PoolConfig::new(16)
        .profile(
            Profile::new(BASE, BASE)
                .memory_mib(128)
                .warm_pool_size(size),
        )
        .health(health)
        .boot(boot)
}

/// The same, but gives up on a guest that is silent for half a second on hardware.
pub(crate) fn impatient(size: usize) -> PoolConfig {
    let mut config = config(size);
    (config.health.ping_timeout_ms, config.health.attempts) = (500, 1);
    config
}

/// Hands on everything to the real backend and keeps a hand on each VM of one pool.
#[derive(Clone)]
pub(crate) struct Rig {
    kvm: Arc<KvmBackend>,
    vms: Arc<Mutex<BTreeMap<VmId, Victim>>>,
    /// Guests whose vCPUs are stopped and stay so, whatever the pool asks for.
    frozen: Arc<Mutex<HashSet<InstanceId>>>,
    /// Every n-th boot fails; 0: none.
    failing: Arc<AtomicU64>,
    boots: Arc<AtomicU64>,
}

/// A hand on one VM, wherever it is.
#[derive(Clone)]
pub(crate) struct Victim {
    pub(crate) id: VmId,
    instance: InstanceId,
    remote: Arc<GuestRemote>,
    vsock: VsockHost,
    pub(crate) balloon: Balloon,
}

impl Rig {
    pub(crate) async fn new() -> Self {
        Self {
            kvm: shared_backend().await,
            vms: Arc::default(),
            frozen: Arc::default(),
            failing: Arc::default(),
            boots: Arc::default(),
        }
    }

    /// A running pool, full.
    pub(crate) async fn pool(&self, config: PoolConfig) -> Pool<Rig> {
        let manual = config.refill == Refill::Manual;
        let pool = Pool::new(self.clone(), config).unwrap();
        pool.start().await.unwrap();
        if !manual {
            within(10, "a full pool", pool.wait_ready(Duration::MAX))
                .await
                .unwrap();
        }
        pool
    }

    /// All VMs that have been made, the oldest first.
    pub(crate) fn all(&self) -> Vec<Victim> {
        self.vms.lock().unwrap().values().cloned().collect()
    }

    pub(crate) fn vm(&self, id: VmId) -> Victim {
        self.vms.lock().unwrap()[&id].clone()
    }

    /// Stops the vCPUs for good: at once while it is parked paused, else at its next check.
    pub(crate) fn freeze(&self, vm: &Victim) {
        self.frozen.lock().unwrap().insert(vm.instance);
    }

    /// From now on every `nth` boot fails; 0: none.
    pub(crate) fn fail_every(&self, nth: u64) {
        self.failing.store(nth, Ordering::Relaxed);
    }

    fn is_frozen(&self, vm: &Guest) -> bool {
        self.frozen.lock().unwrap().contains(&vm.instance())
    }

    fn keep(&self, id: VmId, vm: &Guest) {
        let victim = Victim {
            id,
            instance: vm.instance(),
            remote: Arc::new(self.kvm.remote(vm)),
            vsock: vm.vm().vsock().clone(),
            balloon: vm.vm().balloon().clone(),
        };
        self.vms.lock().unwrap().insert(id, victim);
    }
}

impl Victim {
    /// Resolves when the guest runs no more.
    pub(crate) async fn kill(&self) {
        self.remote.kill().await;
    }

    /// Lets the guest run a program behind the pool's back; it ends the guest.
    pub(crate) async fn die_of(&self, program: &str) {
        let stream = within(5, "connect", self.vsock.connect(AGENT_PORT)).await;
        let agent = AgentClient::handshake(stream.unwrap()).await.unwrap();
        // The guest may be gone before the program's start is told.
        if let Ok(exec) = agent.exec(Command::new(program)).await {
            let ended = within(6, program, exec.wait()).await;
            assert!(ended.is_err(), "{program} ended, the guest did not");
        }
    }
}

impl Backend for Rig {
    type Vm = Guest;
    type Remote = GuestRemote;
    type Error = CreateError;

    async fn prepare(&self, profile: &Profile) -> Result<(), CreateError> {
        self.kvm.prepare(profile).await
    }

    async fn create(&self, profile: &Profile, id: VmId) -> Result<Guest, CreateError> {
        let nth = self.failing.load(Ordering::Relaxed);
        if self.boots.fetch_add(1, Ordering::Relaxed).checked_rem(nth) == Some(0) {
            return Err(CreateError::WarmUp("its turn to fail".into()));
        }
        let vm = self.kvm.create(profile, id).await?;
        self.keep(id, &vm);
        Ok(vm)
    }

    async fn settled(&self) {
        self.kvm.settled().await;
    }

    fn probe(&self, vm: &Guest) -> BoxFuture<'static, Result<(), ProbeError>> {
        if self.is_frozen(vm) {
            // Fails only if it has ended, which is no worse.
            let _ = vm.vm().pause();
        }
        self.kvm.probe(vm)
    }

    async fn retire(&self, vm: Guest) {
        self.kvm.retire(vm).await;
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

    fn hand_off(&self, vm: &Guest) {
        if !self.is_frozen(vm) {
            self.kvm.hand_off(vm);
        }
    }

    fn parking(&self, profile: &Profile) -> Parking {
        self.kvm.parking(profile)
    }

    fn demand(&self, profile: &Profile) -> Demand {
        self.kvm.demand(profile)
    }

    fn time_scale(&self) -> u32 {
        self.kvm.time_scale()
    }
}

pub(crate) fn counts(pool: &Pool<Rig>) -> Counts {
    pool.status().profile(BASE).expect("the profile").counts
}

/// Waits until the pool is full again.
pub(crate) async fn full(pool: &Pool<Rig>) {
    within(10, "a full pool", pool.wait_ready(Duration::MAX))
        .await
        .unwrap_or_else(|error| panic!("{error}: {:?}", pool.status()));
}

/// Runs a program in the guest of a lease.
pub(crate) async fn run(guest: &Guest, command: Command) -> Output {
    let exec = within(6, "start of a program", guest.exec(command)).await;
    let output = exec.unwrap().output(OutputLimits::default());
    within(10, "end of a program", output).await.unwrap()
}

pub(crate) async fn stop(pool: Pool<Rig>) {
    within(10, "stop", pool.stop()).await;
    let status = pool.status();
    assert_eq!((status.phase, status.usage.vms), (Phase::Stopped, 0));
}
