//! A guest with an agent, which a lease gives access to.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use hearth_agent::client::{
    ExecError, FileError, HandshakeError, SessionError, TreeCount, TreeError, TreeLimits,
};
use hearth_agent::proto::{AGENT_PORT, Account, InstanceId, Place, Put};
use hearth_agent::{AgentClient, Command, Exec};
use hearth_vmm::virtio::vsock::{ConnectError, VsockStream};
use hearth_vmm::{Exit, Vm, VsockHost};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::activity::Activity;
use super::birth::Gone;
use super::control::Control;
use super::session::Session;
use super::stream::GuestStream;
use super::templates::Ingredients;
use super::workers::blocking;
use crate::profile::{Language, Profile};

/// Why a request to the guest failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// No connection to a port of the guest.
    #[error("no connection to the guest")]
    Connect(#[from] ConnectError),
    /// The peer did not greet as an agent does.
    #[error("the agent did not answer as an agent does")]
    Handshake(#[from] HandshakeError),
    /// The agent did not greet within this time.
    #[error("the agent did not greet within {0:?}")]
    Silent(Duration),
    /// The program could not be run.
    #[error("the program could not be run")]
    Exec(#[from] ExecError),
    /// A file in the guest could not be read, written or changed.
    #[error("a file in the guest could not be read or written")]
    File(#[from] FileError),
    /// The guest's profile has no session.
    #[error(
        "no interpreter is kept warm in this guest: give its profile a session, or ask for one by language"
    )]
    NoSession,
    /// An interpreter did not start, or cannot go on.
    #[error("the guest's interpreter cannot be used")]
    Session(#[from] SessionError),
    /// A tree of files could not be copied.
    #[error("a directory could not be copied")]
    Tree(#[from] TreeError),
}

/// A running guest with its agent. Dropping it ends the guest.
pub struct Guest {
    /// Shared only while the guest is being ended.
    vm: Arc<Vm>,
    gone: Gone,
    control: Arc<Control<GuestStream>>,
    /// A connection that a clone inherits from its template, for the first caller that asks for
    /// one.
    spare: Mutex<Option<AgentClient<GuestStream>>>,
    /// The interpreter of the profile, for the first caller that asks for it.
    session: Mutex<Option<Session>>,
    instance: InstanceId,
    activity: Arc<Activity>,
    connect_timeout: Duration,
    made_of: Option<Ingredients>,
    handed_out: AtomicBool,
    inflated: bool,
    private_bytes: Option<u64>,
}

impl Guest {
    pub(super) fn new(
        (vm, gone): (Vm, Gone),
        agent: AgentClient<GuestStream>,
        instance: InstanceId,
        asked: Option<u64>,
        dialler: Dialler,
    ) -> Self {
        Self {
            vm: Arc::new(vm),
            gone,
            control: Arc::new(Control::new(agent, instance, asked)),
            spare: Mutex::default(),
            session: Mutex::default(),
            instance,
            activity: dialler.activity,
            connect_timeout: dialler.timeout,
            made_of: None,
            handed_out: AtomicBool::new(false),
            inflated: false,
            private_bytes: None,
        }
    }

    /// Remembers the profile's inputs.
    pub(super) fn made_for(mut self, profile: &Profile) -> Self {
        self.made_of = Some(profile.into());
        self
    }

    /// Whether it was made from the same inputs as `profile`'s, and never handed out.
    pub(super) fn fits(&self, profile: &Profile) -> bool {
        let unused = !self.handed_out.load(Ordering::Acquire);
        unused && self.made_of == Some(profile.into())
    }

    /// Marks the guest as handed out.
    pub(super) fn set_handed_out(&self) {
        self.handed_out.store(true, Ordering::Release);
    }

    pub(super) fn with_spare(mut self, spare: Option<AgentClient<GuestStream>>) -> Self {
        self.spare = Mutex::new(spare);
        self
    }

    pub(super) fn with_session(mut self, session: Option<Session>) -> Self {
        self.session = Mutex::new(session);
        self
    }

    pub(super) fn take_session(&self) -> Option<Session> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        session.take()
    }

    pub(super) fn made_for_session(&self) -> Option<Language> {
        self.made_of.as_ref()?.session
    }

    /// Adds the environment of the guest's profile, except for variables that the command sets
    /// itself.
    pub(super) fn in_environment(&self, command: Command) -> Command {
        let of_profile = self.made_of.iter().flat_map(|made_of| &made_of.env);
        of_profile.fold(command, |command, (name, value)| {
            command.env_default(name, value)
        })
    }

    pub(super) fn set_inflated(&mut self) {
        self.inflated = true;
    }

    pub(super) fn is_inflated(&self) -> bool {
        self.inflated
    }

    /// Measures the private memory of the VM.
    pub(super) async fn weigh(&mut self) {
        let vm = Arc::clone(&self.vm);
        let weighed = blocking(move || vm.private_bytes().ok());
        self.private_bytes = weighed.await.ok().flatten();
    }

    pub(super) fn private_bytes(&self) -> Option<u64> {
        self.private_bytes
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The guest's identity, random for each guest.
    #[must_use]
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Resolves when the guest has ended.
    pub fn exited(&self) -> BoxFuture<'static, Exit> {
        exit_of(&self.vm)
    }

    /// Connects to a port that a program in the guest listens on.
    ///
    /// # Errors
    /// [`GuestError::Connect`].
    pub async fn connect(&self, port: u32) -> Result<GuestStream, GuestError> {
        let stream = self.dialler().connect(port).await?;
        stream.mark_owned();
        Ok(stream)
    }

    /// Returns a separate connection to the agent, for everything that the agent can do.
    ///
    /// # Errors
    /// The reason why there is none.
    pub async fn agent(&self) -> Result<AgentClient<GuestStream>, GuestError> {
        let spare = self
            .spare
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let agent = match spare {
            Some(agent) => agent,
            None => self.dialler().agent().await?,
        };
        agent.stream().mark_owned();
        Ok(agent)
    }

    /// Returns a command; refine it and give it to [`exec`](Self::exec). It runs as the default
    /// user of the guest's image, unless [`user_name`](Command::user_name) says otherwise (`root`,
    /// say).
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        Command::new(program).usual_user()
    }

    /// Starts a program, with the present time and the environment of the guest's profile, except
    /// for variables that the command sets itself; a command that clears the environment gets none
    /// of the profile's. Requests that go to the agent by another way get neither.
    ///
    /// # Errors
    /// The reason why it did not start.
    pub async fn exec(&self, command: Command) -> Result<Exec<GuestStream>, GuestError> {
        let command = self.in_environment(command.wall_clock(SystemTime::now()));
        let agent = self.agent().await?;
        agent.stream().mark_running();
        Ok(agent.exec(command).await?)
    }

    /// Writes a file in the guest, with the rights of the default user of the guest's image unless
    /// `put` names another (root, say, where the default user may not write). An existing file is
    /// replaced once the new one is complete, unless `put` says otherwise. For more (streams,
    /// directories, paths that may not lead out) use the [`agent`](Self::agent).
    ///
    /// # Errors
    /// [`GuestError::File`] with the guest's reason.
    pub async fn put(&self, put: Put, content: &[u8]) -> Result<(), GuestError> {
        let account = put.at.by.clone().or(Some(Account::Usual));
        Ok(self
            .agent()
            .await?
            .put(put.account(account), content)
            .await?)
    }

    /// Reads a file of at most `most` bytes in the guest, with the rights of the default user of
    /// the guest's image.
    ///
    /// # Errors
    /// [`GuestError::File`] with the guest's reason, or if the file is larger.
    pub async fn get(&self, at: impl AsRef<Path>, most: usize) -> Result<Vec<u8>, GuestError> {
        let at = Place::new(at).by(Account::Usual);
        Ok(self.agent().await?.get(at, most).await?)
    }

    /// Unpacks a tar archive into a directory of the guest, for the default user of the guest's
    /// image, as [`AgentClient::put_tree`] does.
    ///
    /// # Errors
    /// [`GuestError::Tree`].
    pub async fn put_tree(
        &self,
        dir: impl Into<PathBuf>,
        archive: &mut (impl AsyncRead + Unpin),
    ) -> Result<TreeCount, GuestError> {
        let owner = Some(Account::Usual);
        Ok(self.agent().await?.put_tree(dir, owner, archive).await?)
    }

    /// Packs a directory of the guest into a tar archive, as [`AgentClient::get_tree`] does, with
    /// the rights of the default user of the guest's image.
    ///
    /// # Errors
    /// [`GuestError::Tree`].
    pub async fn get_tree(
        &self,
        dir: impl Into<PathBuf>,
        limits: TreeLimits,
        archive: &mut (impl AsyncWrite + Unpin),
    ) -> Result<TreeCount, GuestError> {
        let dir = Place::new(dir.into()).by(Account::Usual);
        Ok(self.agent().await?.get_tree(dir, limits, archive).await?)
    }

    /// Returns the VM alone; the connection to the agent ends. `None` if the guest is being ended
    /// at the same time.
    #[must_use]
    pub fn into_vm(self) -> Option<Vm> {
        Arc::try_unwrap(self.vm).ok()
    }

    /// Returns a handle that can end the guest without owning it.
    pub(super) fn end(&self) -> End {
        End {
            vm: Arc::downgrade(&self.vm),
            gone: self.gone.clone(),
        }
    }

    pub(super) fn control(&self) -> &Arc<Control<GuestStream>> {
        &self.control
    }

    pub(super) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    pub(super) fn dialler(&self) -> Dialler {
        let (vsock, activity) = (self.vm.vsock().clone(), Arc::clone(&self.activity));
        Dialler {
            vsock,
            timeout: self.connect_timeout,
            activity,
        }
    }
}

/// A handle that can end a guest, and does not keep it alive.
pub(super) struct End {
    vm: Weak<Vm>,
    gone: Gone,
}

impl End {
    /// Ends the guest and resolves when nothing of it is left, though a [`Guest`] value may still
    /// exist. Cancel-safe: the guest ends even if the future is dropped.
    pub(super) async fn bring_about(&self) {
        if let Some(vm) = self.vm.upgrade() {
            vm.kill();
            // If there is no thread, or the work panics, the VM is dropped: a teardown thread tears
            // it down.
            let _ = blocking(move || vm.teardown()).await;
        }
        self.gone.clone().wait().await;
    }
}

/// Boxed, so that the type does not capture the borrow, which the future does not hold.
pub(super) fn exit_of(vm: &Vm) -> BoxFuture<'static, Exit> {
    Box::pin(vm.exited())
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest")
            .field("instance", &self.instance)
            .finish_non_exhaustive()
    }
}

/// Connects to a guest without keeping it alive.
pub(super) struct Dialler {
    pub(super) vsock: VsockHost,
    pub(super) timeout: Duration,
    pub(super) activity: Arc<Activity>,
}

/// The agent connections that a clone begins with.
pub(super) struct Lines {
    pub(super) control: AgentClient<GuestStream>,
    pub(super) spare: Option<AgentClient<GuestStream>>,
    /// The connection of the interpreter.
    pub(super) session: Option<GuestStream>,
}

impl Dialler {
    async fn connect(&self, port: u32) -> Result<GuestStream, GuestError> {
        let stream = self.vsock.connect_timeout(port, self.timeout).await?;
        Ok(GuestStream::new(stream, Arc::clone(&self.activity)))
    }

    pub(super) async fn agent(&self) -> Result<AgentClient<GuestStream>, GuestError> {
        self.greet(self.connect(AGENT_PORT).await?).await
    }

    /// Reattaches the connections that a clone inherits; one more if the template had a session.
    pub(super) async fn resume(&self, with_session: bool) -> Result<Lines, GuestError> {
        let mut streams = self.vsock.reattach_all();
        // In the order in which they were made.
        streams.sort_by_key(VsockStream::host_port);
        // The agent opened the control connection, the pool opened the others.
        let (ours, theirs): (Vec<_>, Vec<_>) = streams
            .into_iter()
            .partition(|stream| stream.guest_port() == AGENT_PORT);
        let stream = |stream| GuestStream::new(stream, Arc::clone(&self.activity));
        let control = theirs
            .into_iter()
            .next()
            .map(|line| AgentClient::resume(stream(line)));
        let complete = !with_session || ours.len() == 2;
        let mut ours = ours.into_iter().filter(|_| complete).map(stream);
        let session = if with_session { ours.next() } else { None };
        let spare = ours.next().map(AgentClient::resume);
        let control = match control {
            Some(control) => control,
            None => self.agent().await?,
        };
        Ok(Lines {
            control,
            spare,
            session,
        })
    }

    pub(super) async fn greet(
        &self,
        stream: GuestStream,
    ) -> Result<AgentClient<GuestStream>, GuestError> {
        let greeting = timeout(self.timeout, AgentClient::handshake(stream)).await;
        Ok(greeting.map_err(|_| GuestError::Silent(self.timeout))??)
    }

    /// Connects for a probe, which only reports the connection as lost, not the reason.
    pub(super) async fn dial(self) -> Option<AgentClient<GuestStream>> {
        self.agent().await.ok()
    }
}
