//! How a guest comes to be: booted, or forked from one that was.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hearth_agent::AgentClient;
use hearth_agent::client::{ConnectionError, FreezeError, OutputLimits, PingError};
use hearth_agent::proto::{InstanceId, Memory, READY_PORT, Refresh};
use hearth_vmm::cache::Entry;
use hearth_vmm::virtio::balloon::FLOOR_MIB;
use hearth_vmm::virtio::vsock::ListenError;
use hearth_vmm::{
    BootError, ConfigError, Exit, LoadError, PauseError, SnapshotError, Template, Vm, VmConfig,
};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::birth::Birth;
use super::guest::{Dialler, Guest, GuestError, Lines};
use super::store::MadeOf;
use super::stream::GuestStream;
use super::{KvmBackend, KvmImage};
use crate::profile::{Balloon, Profile};
use crate::slot::VmId;

/// Bytes of host randomness for a clone: 64 for its kernel's generator, 16 for its boot id.
const ENTROPY: usize = 80;
/// Memory in bytes that a template's guest may hold without use; less is not worth the balloon's time. What is held is
/// some 5 MiB more than it seems: a guest also counts as used what it has never touched.
const WORTH_SQUEEZING: u64 = 4 << 20;
/// How often a template's guest goes through a clone's first steps.
const REHEARSALS: usize = 2;
/// How long a template's guest may take to come to rest before it is frozen.
const REST: Duration = Duration::from_secs(10);
/// Nonce of the ping that proves a clone alive.
const FIRST_NONCE: u64 = 1;
/// Pause between two pings while a template's guest prepares itself.
const PREPARE_PAUSE: Duration = Duration::from_millis(20);

/// Why a guest could not be made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The profile names an image that the backend was not given.
    #[error("there is no image {image:?}; the backend has: {}", known.join(", "))]
    NoImage {
        /// The profile's.
        image: String,
        /// All names.
        known: Vec<String>,
    },
    /// The profile asks for an impossible machine.
    #[error("the profile's machine is not possible")]
    Config(#[from] ConfigError),
    /// Kernel or initramfs.
    #[error("the image cannot be loaded")]
    Load(#[from] LoadError),
    /// The monitor could not make the VM.
    #[error("the VM could not be made")]
    Boot(#[from] BootError),
    /// The VM could not run.
    #[error("the VM does not run")]
    Pause(#[from] PauseError),
    /// The host's end of the agent's port.
    #[error("the host cannot wait for the agent")]
    Listen(#[from] ListenError),
    /// The guest ended before its agent was ready.
    #[error("the guest ended while it booted: {0}")]
    Ended(Exit),
    /// The agent did not get ready in time.
    #[error("the agent was not ready within {0:?}")]
    Late(Duration),
    /// The agent was reached, but not as it should be.
    #[error("the agent cannot be talked to")]
    Agent(#[from] GuestError),
    /// The agent did not answer a ping.
    #[error("the agent does not answer")]
    Ping(#[from] PingError),
    /// The agent did not take up the clone's new identity.
    #[error("the clone could not be made a stranger to its siblings")]
    Refresh(#[from] ConnectionError),
    /// Parts of the clone's new identity were refused by its kernel.
    #[error("the clone's kernel refused a part of its new identity: {0}")]
    Hygiene(String),
    /// The host gave no randomness for the clone.
    #[error("the host gives no randomness")]
    Random(#[from] Errno),
    /// The warm-up command.
    #[error("the warm-up command failed: {0}")]
    WarmUp(String),
    /// The booted guest could not be made a template.
    #[error("the guest could not be made a template")]
    Snapshot(#[from] SnapshotError),
    /// A task of this backend panicked.
    #[error("a task of the backend did not end in order")]
    Task(#[from] tokio::task::JoinError),
}

impl CreateError {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::NoImage { .. } | Self::Load(_) => "image",
            Self::Config(_) => "config",
            Self::Boot(_) | Self::Pause(_) | Self::Listen(_) | Self::Task(_) | Self::Random(_) => {
                "monitor"
            }
            Self::Ended(_) => "ended",
            Self::Late(_) => "timeout",
            Self::Agent(_) | Self::Ping(_) => "agent",
            Self::Refresh(_) | Self::Hygiene(_) => "refresh",
            Self::WarmUp(_) => "warm_up",
            Self::Snapshot(_) => "snapshot",
        }
    }
}

impl KvmBackend {
    fn config(&self, profile: &Profile) -> Result<VmConfig, CreateError> {
        let KvmImage {
            kernel,
            initramfs,
            append,
        } = self.image(profile)?;
        let config = VmConfig::builder(kernel)
            .initramfs(initramfs)
            .memory_mib(profile.memory_mib.into())
            .vcpus(profile.vcpus)
            .append(append);
        Ok(config.build()?)
    }

    pub(super) async fn preload(&self, profile: &Profile) -> Result<(), CreateError> {
        let config = self.config(profile)?;
        Ok(spawn_blocking(move || config.preload()).await??)
    }

    /// A cold boot, to the guest that is warm and, if the profile says so, small.
    pub(super) async fn boot(
        &self,
        profile: &Profile,
        birth: &Birth,
    ) -> Result<Guest, CreateError> {
        let mut guest = self.boot_bare(profile, birth).await?;
        warm_up(&guest, profile).await?;
        if profile.balloon == Balloon::Auto {
            self.inflate(&mut guest, profile).await;
        }
        Ok(guest)
    }

    /// Boots up to the agent's greeting, on the connection that the agent dials.
    async fn boot_bare(&self, profile: &Profile, birth: &Birth) -> Result<Guest, CreateError> {
        let config = self.config(profile)?;
        let vm = alive(birth, move || Vm::create(&config)).await?;
        let mut ready = vm.vsock().listen(READY_PORT)?;
        let exited = vm.exited();
        vm.resume()?;
        let dialled = async {
            tokio::select! {
                biased;
                stream = ready.accept() => Ok(stream?),
                exit = exited => Err(CreateError::Ended(exit)),
            }
        };
        let dialled = timeout(self.boot_timeout, dialled).await;
        let stream = dialled.map_err(|_| CreateError::Late(self.boot_timeout))??;
        let dialler = self.dialler(&vm);
        let stream = GuestStream::new(stream, Arc::clone(&dialler.activity));
        let agent = dialler.greet(stream).await?;
        let instance = agent.hello().unwrap_or_default().instance;
        let guest = Guest::new((vm, birth.gone()), agent, instance, None, dialler);
        Ok(guest.made_for(profile))
    }

    /// The stored template of the profile, or one that is made and stored. A store that fails costs time,
    /// nothing else.
    pub(super) async fn find_or_make_template(
        &self,
        profile: &Profile,
    ) -> Result<Template, CreateError> {
        let Some(store) = self.store.clone() else {
            return self.make_template(profile).await;
        };
        let made_of = MadeOf {
            image: self.image(profile)?.clone(),
            ingredients: profile.into(),
            cpu: self.cpu,
            boot_words: self.config(profile)?.boot_words(self.cpu),
            idle_mib: self.balloon_idle_mib,
        };
        let name = &profile.name;
        let vacancy = match spawn_blocking(move || store.enter(&made_of)).await? {
            Ok(Entry::Found(template)) => {
                tracing::debug!(profile = name, "the template was stored");
                return Ok(template);
            }
            Ok(Entry::Vacant(vacancy)) => {
                if let Some(error) = vacancy.why() {
                    tracing::warn!(profile = name, %error, "a stored template is made again");
                }
                Some(vacancy)
            }
            Err(error) => {
                tracing::warn!(profile = name, %error, "the template cache cannot be used");
                None
            }
        };
        let template = self.make_template(profile).await?;
        let Some(vacancy) = vacancy else {
            return Ok(template);
        };
        let made = template.clone();
        match spawn_blocking(move || vacancy.fill(&made)).await? {
            Ok(kept) => Ok(kept),
            Err(error) => {
                tracing::warn!(profile = name, %error, "the template was not stored");
                Ok(template)
            }
        }
    }

    /// Boots and warms up a guest, and freezes it.
    pub(super) async fn make_template(&self, profile: &Profile) -> Result<Template, CreateError> {
        let birth = self.births.begin();
        let mut guest = self.boot_bare(profile, &birth).await?;
        // Nobody probes a guest that becomes a template.
        let agent = guest.control().take().await;
        let mut agent = agent.ok_or(ConnectionError::Closed)?;
        let mut nonces = 1..;
        let prepared = async {
            for nonce in &mut nonces {
                if agent.ping(nonce).await?.prepared {
                    break;
                }
                sleep(PREPARE_PAUSE).await;
            }
            Ok::<_, PingError>(())
        };
        let limit = self.boot_timeout;
        timeout(limit, prepared)
            .await
            .map_err(|_| CreateError::Late(limit))??;
        warm_up(&guest, profile).await?;
        if profile.balloon == Balloon::Auto {
            let memory = agent.ping(nonces.next().unwrap_or(0)).await?.memory;
            self.squeeze(&mut guest, memory, profile).await;
        }
        let spare = self.rehearse(&guest, &mut agent, nonces).await?;
        self.hold(&mut agent, profile).await?;
        for line in [&agent, &spare] {
            line.stream().mark_durable();
        }
        // Only this task knows the guest: nobody else can hold its VM.
        let vm = guest.into_vm().ok_or(CreateError::Ended(Exit::Killed))?;
        let freeze = move || {
            if !vm.pause_at_rest(REST)? {
                tracing::debug!("a template's guest was busy when it was frozen");
            }
            vm.into_template()
        };
        let template = spawn_blocking(freeze).await??;
        drop((agent, spare));
        birth.done();
        Ok(template)
    }

    /// Does to a template's guest what each clone will go through, so that what the first time takes (pages,
    /// caches) is part of the template. Gives the connection that a clone keeps for its owner.
    async fn rehearse(
        &self,
        guest: &Guest,
        agent: &mut AgentClient<GuestStream>,
        nonces: impl Iterator<Item = u64>,
    ) -> Result<AgentClient<GuestStream>, CreateError> {
        let rehearsal = async {
            for nonce in nonces.take(REHEARSALS) {
                refresh(agent, "template".into(), nonce).await?;
                agent.pong(nonce).await?;
            }
            let mut spare = guest.agent().await?;
            // The agent reads this side's greeting with it.
            spare.ping(FIRST_NONCE).await?;
            Ok(spare)
        };
        let limit = self.boot_timeout;
        let rehearsed = timeout(limit, rehearsal).await;
        rehearsed.map_err(|_| CreateError::Late(limit))?
    }

    /// Has what the warm-up left running stand still: a clone lets it go on once it is a stranger to its siblings.
    async fn hold(
        &self,
        agent: &mut AgentClient<GuestStream>,
        profile: &Profile,
    ) -> Result<(), CreateError> {
        if profile.warm_up.is_empty() {
            return Ok(());
        }
        let limit = self.boot_timeout;
        let held = timeout(limit, agent.freeze()).await;
        match held.map_err(|_| CreateError::Late(limit))? {
            Err(FreezeError::Connection(error)) => Err(error.into()),
            // A kernel of the user's own.
            Err(error) => {
                let name = &profile.name;
                tracing::warn!(profile = name, %error, "what the warm-up left runs in clones at once");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// A clone that is a stranger to its siblings.
    pub(super) async fn fork(
        &self,
        profile: &Profile,
        id: VmId,
        template: Template,
        birth: &Birth,
    ) -> Result<Guest, CreateError> {
        // Never closed: there is always a turn to come.
        let _turn = self.turns.acquire().await;
        let vm = alive(birth, move || template.fork()).await?;
        let dialler = self.dialler(&vm);
        let Lines { mut control, spare } = dialler.resume().await?;
        let instance = refresh(&mut control, id.to_string(), FIRST_NONCE).await?;
        let asked = Some(FIRST_NONCE);
        let guest = Guest::new((vm, birth.gone()), control, instance, asked, dialler);
        let mut guest = guest.with_spare(spare);
        if guest.vm().balloon().actual() > 0 {
            // Its template's balloon did not deflate in time.
            guest.set_inflated();
        }
        Ok(guest.made_for(profile))
    }

    fn dialler(&self, vm: &Vm) -> Dialler {
        let (vsock, timeout) = (vm.vsock().clone(), self.connect_timeout);
        Dialler {
            vsock,
            timeout,
            activity: Arc::default(),
        }
    }

    /// Guest memory that a guest at rest is not left with.
    fn spare_mib(&self, profile: &Profile) -> u32 {
        let left = self.balloon_idle_mib.max(FLOOR_MIB);
        profile.memory_mib.saturating_sub(left)
    }

    /// Takes from a template's guest what its start touched and let go of, so that the template does not
    /// hold it for ever; best effort, bounded. The guest gets its memory back, untouched, before it is
    /// frozen: a clone then has all of it and nothing to do at its hand-off, where deflating costs each
    /// of them processor time, and memory of its own for the kernel's records.
    async fn squeeze(&self, guest: &mut Guest, memory: Memory, profile: &Profile) {
        let in_use = memory.total_bytes.saturating_sub(memory.free_bytes);
        guest.weigh().await;
        let held = guest.private_bytes().unwrap_or(u64::MAX);
        let target = self.spare_mib(profile);
        if target == 0 || held.saturating_sub(in_use) < WORTH_SQUEEZING {
            return;
        }
        let balloon = guest.vm().balloon();
        // What is not deflated here, every clone would have to.
        for (target, limit) in [(target, self.balloon_timeout), (0, self.boot_timeout)] {
            if let Err(error) = balloon.resize(target, limit).await {
                tracing::debug!(%error, "a template keeps more memory than it should");
            }
        }
    }

    /// Best effort, bounded: what was reached in time is kept.
    async fn inflate(&self, guest: &mut Guest, profile: &Profile) {
        let target = self.spare_mib(profile);
        if target == 0 {
            return;
        }
        guest.set_inflated();
        let resized = guest
            .vm()
            .balloon()
            .resize(target, self.balloon_timeout)
            .await;
        if let Err(error) = resized {
            tracing::debug!(%error, "a parked VM keeps more memory than it should");
        }
    }
}

/// Makes a VM off the runtime. It shares the life of its birth, also when nobody waits for it any more.
async fn alive(
    birth: &Birth,
    make: impl FnOnce() -> Result<Vm, BootError> + Send + 'static,
) -> Result<Vm, CreateError> {
    let life = birth.life();
    let make = move || make().inspect(|vm| vm.carry(life));
    Ok(spawn_blocking(make).await??)
}

/// Gives a clone its new identity, and sends a ping behind.
async fn refresh(
    agent: &mut AgentClient<GuestStream>,
    hostname: String,
    nonce: u64,
) -> Result<InstanceId, CreateError> {
    let mut identity = InstanceId([0; 16]);
    fill(&mut identity.0)?;
    let mut entropy = vec![0; ENTROPY];
    fill(&mut entropy)?;
    let refresh = Refresh {
        entropy,
        wall_clock: Some(SystemTime::now().into()),
        instance: Some(identity),
        hostname: Some(hostname),
    };
    let refreshed = agent.refresh_and_ping(refresh, nonce).await;
    let refreshed = refreshed.map_err(|error| match error {
        PingError::Connection(error) => CreateError::Refresh(error),
        other => CreateError::Ping(other),
    })?;
    if !refreshed.all_applied() {
        return Err(CreateError::Hygiene(format!("{refreshed:?}")));
    }
    Ok(identity)
}

/// Host randomness.
fn fill(bytes: &mut [u8]) -> Result<(), Errno> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match getrandom(rest, GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn warm_up(guest: &Guest, profile: &Profile) -> Result<(), CreateError> {
    let Some((program, arguments)) = profile.warm_up.split_first() else {
        return Ok(());
    };
    let command = guest.command(program).args(arguments);
    let exec = guest.exec(command).await?;
    let output = exec
        .output(OutputLimits::default())
        .await
        .map_err(GuestError::from)?;
    if output.status.shell_code() == 0 {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(CreateError::WarmUp(format!(
        "exit code {}: {said}",
        output.status.shell_code()
    )))
}
