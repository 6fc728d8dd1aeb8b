//! A backend of real guests in which tests can inject faults while guests are parked.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use hearth_agent::AgentClient;
use hearth_agent::client::{Command, Output, OutputLimits};
use hearth_agent::proto::{AGENT_PORT, InstanceId, Refresh};
use hearth_images::{Images, Silent};
use hearth_pool::config::{BootConfig, HealthConfig};
use hearth_pool::kvm::{CreateError, Guest, GuestRemote, KvmBackend, KvmBackendBuilder, KvmImage};
use hearth_pool::{
    Backend, Counts, Demand, EventKind, Making, Parking, Phase, Pool, PoolConfig, PoolEvent,
    ProbeError, Profile, Refill, Remote, VmId,
};
use hearth_tests::within;
use hearth_vmm::virtio::balloon::Balloon;
use hearth_vmm::virtio::vsock::VsockStream;
use hearth_vmm::{VmStatus, VsockHost};
use tokio::sync::OnceCell;
use tokio::sync::broadcast::Receiver;

pub(crate) const BASE: &str = "base";

/// Returns a builder for backends of the base image.
pub(crate) async fn builder(config: &PoolConfig) -> KvmBackendBuilder {
    let image = tokio::task::spawn_blocking(|| Images::open(None)?.base(&Silent));
    let image = image.await.unwrap().expect("the base image");
    let image = KvmImage::new(image.kernel, image.initramfs);
    let builder = KvmBackend::builder(config).expect("a host that runs guests");
    builder.image(BASE, image)
}

/// The backend that makes the VMs of most pools of this binary. It holds the one template, which is
/// stored for the next run and for tests in separate processes.
async fn shared_backend() -> Arc<KvmBackend> {
    static BACKEND: OnceCell<Arc<KvmBackend>> = OnceCell::const_new();
    let make = || async {
        let config = config(1);
        let backend = builder(&config).await.build();
        backend
            .prepare(&config.profiles[0])
            .await
            .expect("a template");
        Arc::new(backend)
    };
    Arc::clone(BACKEND.get_or_init(make).await)
}

/// A configuration of one profile with `size` VMs, without periodic health checks.
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

/// The same, but a guest that is silent for half a second (on hardware) is unhealthy.
pub(crate) fn impatient(size: usize) -> PoolConfig {
    let mut config = config(size);
    (config.health.ping_timeout_ms, config.health.attempts) = (500, 1);
    config
}

/// Forwards everything to the real backend and keeps a handle of each VM that it made.
#[derive(Clone)]
pub(crate) struct Rig {
    kvm: Arc<KvmBackend>,
    vms: Arc<Mutex<BTreeMap<VmId, Victim>>>,
    /// Guests whose vCPUs are paused and stay so, even if the pool resumes them.
    frozen: Arc<Mutex<HashSet<InstanceId>>>,
    /// Every n-th boot fails; 0: none.
    failing: Arc<AtomicU64>,
    boots: Arc<AtomicU64>,
    /// The pool is no longer notified of the ends of VMs.
    deaf: Arc<AtomicBool>,
    /// The status of each VM when the pool last checked that it was alive, before it was resumed.
    found: Arc<Mutex<HashMap<InstanceId, VmStatus>>>,
}

/// A handle of one VM, parked or leased.
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
        Self::of(shared_backend().await)
    }

    pub(crate) fn of(kvm: Arc<KvmBackend>) -> Self {
        Self {
            kvm,
            vms: Arc::default(),
            frozen: Arc::default(),
            failing: Arc::default(),
            boots: Arc::default(),
            deaf: Arc::default(),
            found: Arc::default(),
        }
    }

    /// From now on the pool is not notified when a parked guest ends: only a check can find it.
    pub(crate) fn deafen(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    /// The status of a leased VM when the pool took it out of the stock.
    pub(crate) fn found(&self, vm: &Guest) -> VmStatus {
        self.found.lock().unwrap()[&vm.instance()].clone()
    }

    /// Starts a pool and waits until it is full.
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

    /// Returns all VMs that were made, the oldest first.
    pub(crate) fn all(&self) -> Vec<Victim> {
        self.vms.lock().unwrap().values().cloned().collect()
    }

    pub(crate) fn vm(&self, id: VmId) -> Victim {
        self.vms.lock().unwrap()[&id].clone()
    }

    /// Pauses the vCPUs for good: a VM that is parked paused stays so, another is paused at its
    /// next check.
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

/// Opens a connection to a guest's agent, bypassing the pool.
async fn agent_of(vsock: &VsockHost) -> AgentClient<VsockStream> {
    let stream = within(5, "connect", vsock.connect(AGENT_PORT)).await;
    AgentClient::handshake(stream.unwrap()).await.unwrap()
}

impl Victim {
    /// Ends the guest, and resolves when it has ended.
    pub(crate) async fn kill(&self) {
        self.remote.kill().await;
    }

    /// Returns the host's port of a new connection to the agent: ports are assigned in order.
    pub(crate) async fn port(&self) -> u32 {
        let stream = within(5, "connect", self.vsock.connect(AGENT_PORT)).await;
        stream.unwrap().host_port()
    }

    /// Sets the guest's clock, bypassing the pool.
    pub(crate) async fn set_clock(&self, time: SystemTime) {
        let mut agent = agent_of(&self.vsock).await;
        let wrong = Refresh {
            entropy: vec![],
            wall_clock: Some(time.into()),
            instance: None,
            hostname: None,
        };
        within(5, "clock", agent.refresh(wrong)).await.unwrap();
    }

    /// Starts a program that soon stops the guest's agent.
    pub(crate) fn wedge(&self) -> tokio::task::JoinHandle<()> {
        let vsock = self.vsock.clone();
        tokio::spawn(async move {
            let agent = agent_of(&vsock).await;
            // The agent may be stopped before it reports that the program has started.
            if let Ok(exec) = agent.exec(Command::new("wedge-agent")).await {
                let _ = exec.wait().await;
            }
        })
    }

    /// Runs a program in the guest, bypassing the pool, if the guest still can; resolves when
    /// either ends.
    pub(crate) async fn run_if_it_can(&self, program: &str) {
        let Ok(stream) = self.vsock.connect(AGENT_PORT).await else {
            return;
        };
        let Ok(agent) = AgentClient::handshake(stream).await else {
            return;
        };
        if let Ok(exec) = agent.exec(Command::new(program)).await {
            let _ = exec.wait().await;
        }
    }

    /// Runs a program that ends the guest, bypassing the pool.
    pub(crate) async fn die_of(&self, program: &str) {
        let agent = agent_of(&self.vsock).await;
        // The guest may be gone before it reports that the program has started.
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
            // Fails only if the VM has ended, which the probe reports.
            let _ = vm.vm().pause();
        }
        self.kvm.probe(vm)
    }

    async fn retire(&self, vm: Guest) {
        self.kvm.retire(vm).await;
    }

    fn fits(&self, vm: &Guest, profile: &Profile) -> bool {
        self.kvm.fits(vm, profile)
    }

    fn making(&self, profile: &Profile) -> Making {
        self.kvm.making(profile)
    }

    fn no_template(&self, profile: &Profile) -> Option<Arc<dyn Error + Send + Sync>> {
        self.kvm.no_template(profile)
    }

    fn failure_kind(&self, error: &CreateError) -> &'static str {
        self.kvm.failure_kind(error)
    }

    fn ended(&self, vm: &Guest) -> BoxFuture<'static, ()> {
        if self.deaf.load(Ordering::Relaxed) {
            return Box::pin(std::future::pending());
        }
        self.kvm.ended(vm)
    }

    fn alive(&self, vm: &Guest) -> bool {
        let (instance, status) = (vm.instance(), vm.vm().status());
        self.found.lock().unwrap().insert(instance, status);
        self.kvm.alive(vm)
    }

    fn private_bytes(&self, vm: &Guest) -> Option<u64> {
        self.kvm.private_bytes(vm)
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

/// Returns the reason of this VM's next, or last, failed check.
pub(crate) async fn verdict_on(events: &mut Receiver<PoolEvent>, id: VmId) -> ProbeError {
    loop {
        let event = within(10, "a verdict", events.recv()).await.unwrap();
        if let EventKind::Unhealthy(error) = event.kind
            && event.vm == Some(id)
        {
            return error;
        }
    }
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

/// Runs the steps in a separate runtime, whose threads end with it.
pub(crate) fn alone_in_a_runtime(steps: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(steps);
}
