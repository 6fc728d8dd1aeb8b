//! Makes guests: boots them, or forks them from the template of one that was booted.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt;
use hearth_agent::AgentClient;
use hearth_agent::client::{ConnectionError, OutputLimits, PingError, SessionError};
use hearth_agent::proto::{InstanceId, READY_PORT, ROOT_WORD, Refresh, layer_word};
use hearth_vmm::virtio::balloon::FLOOR_MIB;
use hearth_vmm::virtio::vsock::ListenError;
use hearth_vmm::{
    BootError, ConfigError, Exit, LoadError, PauseError, SnapshotError, Template, Vm, VmConfig,
};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::time::timeout;

use super::birth::Birth;
use super::guest::{Dialler, Guest, GuestError, Lines};
use super::session::Session;
use super::stream::GuestStream;
use super::workers::{WorkError, blocking};
use super::{KvmBackend, KvmImage};
use crate::profile::{Balloon, Profile};
use crate::slot::VmId;

/// Bytes of host randomness for a clone: 64 for its kernel's generator, 16 for its boot id.
const ENTROPY: usize = 80;
/// Nonce of the ping that proves that a clone is alive.
pub(super) const FIRST_NONCE: u64 = 1;
/// Why a guest could not be made. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The profile names an image that the backend was not given.
    #[error("there is no image {image:?}; the backend has: {}", known.join(", "))]
    NoImage {
        /// The image that the profile names.
        image: String,
        /// The names of all images that the backend has.
        known: Vec<String>,
    },
    /// The profile asks for an impossible VM.
    #[error("the profile's machine is not possible")]
    Config(#[from] ConfigError),
    /// The kernel or the initramfs cannot be loaded.
    #[error("the image cannot be loaded")]
    Load(#[from] LoadError),
    /// The monitor could not make the VM.
    #[error("the VM could not be made")]
    Boot(#[from] BootError),
    /// The VM could not run.
    #[error("the VM does not run")]
    Pause(#[from] PauseError),
    /// The host could not listen on the agent's port.
    #[error("the host cannot wait for the agent")]
    Listen(#[from] ListenError),
    /// The guest ended before its agent was ready.
    #[error("the guest ended before it was ready: {0}")]
    Ended(Exit),
    /// The agent did not get ready in time.
    #[error("the agent was not ready within {0:?}")]
    Late(Duration),
    /// The connection to the agent, or a request to it, failed.
    #[error("the agent cannot be talked to")]
    Agent(#[from] GuestError),
    /// The agent did not answer a ping.
    #[error("the agent does not answer")]
    Ping(#[from] PingError),
    /// The agent did not take up the clone's new identity.
    #[error("the clone could not be made a stranger to its siblings")]
    Refresh(#[from] ConnectionError),
    /// The clone's kernel refused parts of its new identity.
    #[error("the clone's kernel refused a part of its new identity: {0}")]
    Hygiene(String),
    /// The host gave no randomness for the clone.
    #[error("the host gives no randomness")]
    Random(#[from] Errno),
    /// The warm-up command or the prelude failed.
    #[error("the warm-up command failed: {0}")]
    WarmUp(String),
    /// The profile's interpreter did not start or work.
    #[error("the guest's interpreter is not to be had")]
    Session(#[from] SessionError),
    /// A clone does not have the interpreter that its template had.
    #[error("the interpreter's connection did not survive the fork")]
    LostSession,
    /// The booted guest could not be made a template.
    #[error("the guest could not be made a template")]
    Snapshot(#[from] SnapshotError),
    /// There was no thread to make it on, or the work panicked.
    #[error("the backend could not do its work")]
    Work(#[from] WorkError),
}

impl CreateError {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::NoImage { .. } | Self::Load(_) => "image",
            Self::Config(_) => "config",
            Self::Boot(_) | Self::Pause(_) | Self::Listen(_) | Self::Work(_) | Self::Random(_) => {
                "monitor"
            }
            Self::Ended(_) => "ended",
            Self::Late(_) => "timeout",
            Self::Agent(_) | Self::Ping(_) => "agent",
            Self::Refresh(_) | Self::Hygiene(_) => "refresh",
            Self::WarmUp(_) => "warm_up",
            Self::Session(_) | Self::LostSession => "session",
            Self::Snapshot(_) => "snapshot",
        }
    }
}

impl KvmBackend {
    pub(super) fn config(&self, profile: &Profile) -> Result<VmConfig, CreateError> {
        let KvmImage {
            kernel,
            initramfs,
            root,
            layer_mib,
            append,
        } = self.image(profile)?;
        let config = VmConfig::builder(kernel)
            .initramfs(initramfs)
            .memory_mib(profile.memory_mib.into())
            .vcpus(profile.vcpus)
            .append(append);
        let config = match root {
            Some(root) => config.pmem(root).append(ROOT_WORD),
            None => config,
        };
        let config = match layer_mib {
            Some(mib) => config.append(&layer_word((*mib).into())),
            None => config,
        };
        let config = match self.place.clone() {
            Some(place) => config.place_vcpus(move |thread| place(thread)),
            None => config,
        };
        Ok(config.build()?)
    }

    pub(super) async fn preload(&self, profile: &Profile) -> Result<(), CreateError> {
        let config = self.config(profile)?;
        Ok(blocking(move || config.preload()).await??)
    }

    /// Boots a guest from cold, warms it up and, if the profile says so, inflates its balloon.
    pub(super) async fn boot(
        &self,
        profile: &Profile,
        birth: &Birth,
    ) -> Result<Guest, CreateError> {
        let mut guest = self.boot_bare(profile, birth).await?;
        warm_up(&guest, profile).await?;
        let session = self.start_session(&guest, profile, false).await?;
        guest = guest.with_session(session);
        if profile.balloon == Balloon::Auto {
            self.inflate(&mut guest, profile).await;
        }
        Ok(guest)
    }

    /// Boots a guest up to the agent's greeting, on the connection that the agent opens.
    pub(super) async fn boot_bare(
        &self,
        profile: &Profile,
        birth: &Birth,
    ) -> Result<Guest, CreateError> {
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

    /// Forks a clone and makes it unique.
    pub(super) async fn fork(
        &self,
        profile: &Profile,
        id: VmId,
        template: Template,
        birth: &Birth,
    ) -> Result<Guest, CreateError> {
        // Never fails: the semaphore is never closed.
        let _turn = self.turns.acquire().await;
        let template = match self.place.clone() {
            Some(place) => template.place_vcpus(move |thread| place(thread)),
            None => template,
        };
        let vm = alive(birth, move || template.fork()).await?;
        let exited = vm.exited();
        let settled = self.settle(vm, profile, id, birth).await;
        // If the clone has ended, that is the error to report.
        settled.map_err(|error| exited.now_or_never().map_or(error, CreateError::Ended))
    }

    /// Gives a running clone its own identity.
    async fn settle(
        &self,
        vm: Vm,
        profile: &Profile,
        id: VmId,
        birth: &Birth,
    ) -> Result<Guest, CreateError> {
        let dialler = self.dialler(&vm);
        let Lines {
            mut control,
            spare,
            session,
        } = dialler.resume(profile.session.is_some()).await?;
        let instance = refresh(&mut control, id.to_string(), FIRST_NONCE).await?;
        let asked = Some(FIRST_NONCE);
        let guest = Guest::new((vm, birth.gone()), control, instance, asked, dialler);
        let mut guest = guest.with_spare(spare).made_for(profile);
        if let Some(language) = profile.session {
            let stream = session.ok_or(CreateError::LostSession)?;
            let mut session = Session::resume(stream, guest.session_command(language));
            self.reseed(&mut session).await?;
            guest = guest.with_session(Some(session));
        }
        if guest.vm().balloon().actual() > 0 {
            // The template's balloon did not deflate in time.
            guest.set_inflated();
        }
        Ok(guest)
    }

    fn dialler(&self, vm: &Vm) -> Dialler {
        let (vsock, timeout) = (vm.vsock().clone(), self.connect_timeout);
        Dialler {
            vsock,
            timeout,
            activity: Arc::default(),
        }
    }

    /// Balloon target in MiB: the guest memory beyond what an idle guest keeps.
    pub(super) fn spare_mib(&self, profile: &Profile) -> u32 {
        let left = self.balloon_idle_mib.max(FLOOR_MIB);
        profile.memory_mib.saturating_sub(left)
    }

    /// Best effort, within a time limit: the size reached by then is kept.
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

/// Makes a VM on a worker thread. The VM holds a part of `birth` until it is torn down,
/// even if the future is dropped.
async fn alive(
    birth: &Birth,
    make: impl FnOnce() -> Result<Vm, BootError> + Send + 'static,
) -> Result<Vm, CreateError> {
    let life = birth.life();
    let make = move || make().inspect(|vm| vm.on_drop(life));
    Ok(blocking(make).await??)
}

/// Gives a clone its new identity, and sends a ping behind it without waiting for the answer.
pub(super) async fn refresh(
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

/// Fills `bytes` with randomness from the host.
pub(super) fn fill(bytes: &mut [u8]) -> Result<(), Errno> {
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

pub(super) async fn warm_up(guest: &Guest, profile: &Profile) -> Result<(), CreateError> {
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
