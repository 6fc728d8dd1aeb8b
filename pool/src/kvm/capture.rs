//! Makes templates: a guest is booted, warmed up, taken through a clone's first steps and frozen.

use std::ops::RangeFrom;
use std::time::Duration;

use hearth_agent::AgentClient;
use hearth_agent::client::{ConnectionError, FreezeError, PingError};
use hearth_agent::proto::Memory;
use hearth_vmm::cache::Entry;
use hearth_vmm::{CpuProfile, Exit, StoreError, Template};
use tokio::time::{Instant, sleep, timeout};

use super::KvmBackend;
use super::guest::Guest;
use super::make::{CreateError, FIRST_NONCE, refresh, warm_up};
use super::session::Session;
use super::store::{MadeOf, Store};
use super::stream::GuestStream;
use super::templates::Unmade;
use super::workers::{WorkError, blocking};
use crate::profile::{Balloon, Profile};

/// Unused memory in bytes that a template's guest may hold on the host; less is not worth the
/// balloon's time. The real amount is some 7 MiB more than measured: the guest also counts as used
/// memory that it has never touched.
const WORTH_SQUEEZING: u64 = 4 << 20;
/// On an emulated host the balloon takes 0.3 s per MiB to inflate and deflate again, so it has to
/// gain at least this fraction (1/32) of what goes through it.
const WORTH_A_SHARE: u64 = 32;
/// How many times a template's guest goes through a clone's first steps.
const REHEARSALS: usize = 2;
/// How long to wait for a template's guest to become idle before it is frozen.
const REST: Duration = Duration::from_secs(10);
/// Pause between two pings while a template's guest prepares itself.
const PREPARE_PAUSE: Duration = Duration::from_millis(20);

/// Pause between two attempts to lock a template that another process makes, which takes seconds.
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// The agent connection of a guest that becomes a template, and the nonces not yet used on it.
struct Line {
    agent: AgentClient<GuestStream>,
    nonces: RangeFrom<u64>,
}

fn panicked(error: WorkError) -> Unmade<CreateError> {
    Unmade::Refused(error.into())
}

impl KvmBackend {
    /// Returns the stored template of the profile, or makes and stores one. A store that fails
    /// costs time, nothing else.
    pub(super) async fn find_or_make_template(
        &self,
        profile: &Profile,
    ) -> Result<Template, Unmade<CreateError>> {
        let Some(store) = self.store.clone() else {
            return self.make_template(profile).await;
        };
        let config = self.config(profile).map_err(Unmade::NoGuest)?;
        let made_of = MadeOf {
            image: self.image(profile).map_err(Unmade::NoGuest)?.clone(),
            ingredients: profile.into(),
            cpu: self.cpu,
            boot_words: config.boot_words(self.cpu),
            idle_mib: self.balloon_idle_mib,
        };
        let name = &profile.name;
        let entered = self.enter(store, made_of).await.map_err(panicked)?;
        let vacancy = match entered {
            Ok(Some(Entry::Found(template))) => {
                tracing::debug!(profile = name, "the template was stored");
                return Ok(template);
            }
            Ok(None) => {
                tracing::warn!(
                    profile = name,
                    "another process has been making the template for too long: it is made here, and not stored"
                );
                None
            }
            Ok(Some(Entry::Vacant(vacancy))) => {
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
        match blocking(move || vacancy.fill(&made))
            .await
            .map_err(panicked)?
        {
            Ok(kept) => Ok(kept),
            Err(error) => {
                tracing::warn!(profile = name, %error, "the template was not stored");
                Ok(template)
            }
        }
    }

    /// Returns the entry, or the right to make it; `None` if another process still makes it after
    /// the time that a boot may take. Cancel-safe: only this future waits for the lock.
    async fn enter(
        &self,
        store: Store,
        made_of: MadeOf,
    ) -> Result<Result<Option<Entry>, StoreError>, WorkError> {
        let made_of = match blocking(move || made_of.name()).await? {
            Ok(made_of) => made_of,
            Err(error) => return Ok(Err(error)),
        };
        let until = Instant::now() + self.boot_timeout;
        loop {
            let (store, named) = (store.clone(), made_of.clone());
            let entered = blocking(move || store.try_enter(&named)).await?;
            if !matches!(entered, Ok(None)) || Instant::now() >= until {
                return Ok(entered);
            }
            sleep(LOCK_PAUSE).await;
        }
    }

    /// Boots and warms up a guest, and freezes it.
    async fn make_template(&self, profile: &Profile) -> Result<Template, Unmade<CreateError>> {
        let birth = self.births.begin();
        let guest = self.boot_bare(profile, &birth).await;
        let guest = guest.map_err(Unmade::NoGuest)?;
        let line = self.prepared(&guest).await.map_err(Unmade::Refused)?;
        warm_up(&guest, profile).await.map_err(Unmade::NoGuest)?;
        // Before the clones' spare connection is opened, so that the order tells the two apart.
        let session = self.start_session(&guest, profile, true).await;
        let session = session.map_err(Unmade::NoGuest)?;
        let frozen = self.freeze(guest, line, session, profile).await;
        let template = frozen.map_err(Unmade::Refused)?;
        birth.done();
        Ok(template)
    }

    /// Waits until the agent has prepared everything that clones begin with.
    async fn prepared(&self, guest: &Guest) -> Result<Line, CreateError> {
        // The pool does not probe a guest that becomes a template.
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
        let prepared = timeout(limit, prepared).await;
        prepared.map_err(|_| CreateError::Late(limit))??;
        Ok(Line { agent, nonces })
    }

    /// Turns a warm guest into its template.
    async fn freeze(
        &self,
        mut guest: Guest,
        line: Line,
        mut session: Option<Session>,
        profile: &Profile,
    ) -> Result<Template, CreateError> {
        let Line {
            mut agent,
            mut nonces,
        } = line;
        if profile.balloon == Balloon::Auto {
            let memory = agent.ping(nonces.next().unwrap_or(0)).await?.memory;
            self.squeeze(&mut guest, memory, profile).await;
        }
        let spare = self.rehearse(&guest, &mut agent, nonces).await?;
        if let Some(session) = &mut session {
            // The steps that a clone's interpreter takes first, and next.
            self.reseed(session).await?;
            session.run("").await?;
            self.reseed(session).await?;
            session.with_stream(GuestStream::mark_durable);
        }
        self.hold(&mut agent, profile).await?;
        for line in [&agent, &spare] {
            line.stream().mark_durable();
        }
        // Only this task knows the guest, so no other one can hold its VM.
        let vm = guest.into_vm().ok_or(CreateError::Ended(Exit::Killed))?;
        let freeze = move || {
            if !vm.pause_at_rest(REST)? {
                tracing::debug!("a template's guest was busy when it was frozen");
            }
            vm.into_template()
        };
        Ok(blocking(freeze).await??)
    }

    /// Takes a template's guest through the steps of each clone, so that the one-time costs (pages,
    /// caches) are in the template. Returns the connection that a clone keeps for its owner.
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
            // With the ping, the agent also reads the host's greeting.
            spare.ping(FIRST_NONCE).await?;
            Ok(spare)
        };
        let limit = self.boot_timeout;
        let rehearsed = timeout(limit, rehearsal).await;
        rehearsed.map_err(|_| CreateError::Late(limit))?
    }

    /// Freezes the processes that the warm-up left running: a clone thaws them once it is unique.
    async fn hold(
        &self,
        agent: &mut AgentClient<GuestStream>,
        profile: &Profile,
    ) -> Result<(), CreateError> {
        if profile.warm_up.is_empty() && profile.session.is_none() {
            return Ok(());
        }
        let limit = self.boot_timeout;
        let held = timeout(limit, agent.freeze()).await;
        match held.map_err(|_| CreateError::Late(limit))? {
            Err(FreezeError::Connection(error)) => Err(error.into()),
            // Possible with a kernel that the user built.
            Err(error) => {
                let name = &profile.name;
                tracing::warn!(profile = name, %error, "what the warm-up left runs in clones at once");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Reclaims memory that the template's guest touched and freed while it started, so that the
    /// template does not hold it for ever; best effort, within time limits. The balloon is deflated
    /// again before the guest is frozen: a clone then has all its memory, untouched, and nothing to
    /// do at its hand-off, where deflating would cost each clone processor time, and private memory
    /// for the kernel's records.
    async fn squeeze(&self, guest: &mut Guest, memory: Memory, profile: &Profile) {
        let in_use = memory.total_bytes.saturating_sub(memory.free_bytes);
        guest.weigh().await;
        let held = guest.private_bytes().unwrap_or(u64::MAX);
        let target = self.spare_mib(profile);
        tracing::debug!(
            held,
            in_use,
            target,
            "what a template's guest holds and uses"
        );
        let share = match self.cpu {
            CpuProfile::Emulated => (u64::from(target) << 20) / WORTH_A_SHARE,
            CpuProfile::Native => 0,
        };
        if target == 0 || held.saturating_sub(in_use) < share.max(WORTH_SQUEEZING) {
            return;
        }
        let balloon = guest.vm().balloon();
        // The balloon that is not deflated here has to be deflated in every clone.
        for (target, limit) in [(target, self.balloon_timeout), (0, self.boot_timeout)] {
            if let Err(error) = balloon.resize(target, limit).await {
                tracing::debug!(%error, "a template keeps more memory than it should");
            }
        }
    }
}
