//! The interpreter that a profile keeps warm in its guests.

use std::time::{Duration, SystemTime};

use hearth_agent::Command;
use hearth_agent::client::{self, Call, CallEnd, SEED_BYTES};
use tokio::time::timeout;

use super::KvmBackend;
use super::guest::{Guest, GuestError};
use super::make::{CreateError, fill};
use super::stream::GuestStream;
use crate::profile::{Language, Profile};

/// An interpreter in a guest.
pub type Session = client::Session<GuestStream>;

/// How far behind a template's clock is while its interpreter starts. OpenSSL takes new random
/// state when its own is older than an hour, and has no other way to learn that it is in a clone;
/// there it sees the right time.
const IN_THE_PAST: Duration = Duration::from_secs(24 * 60 * 60);

/// The language as the guest has it.
pub(super) fn in_guest(language: Language) -> client::Language {
    match language {
        Language::Python => client::Language::Python,
        Language::Javascript => client::Language::Javascript,
        Language::Shell => client::Language::Shell,
    }
}

/// Code that prints, and leaves nothing behind.
fn rehearsal(language: Language) -> &'static str {
    match language {
        Language::Python => "print(6 * 7)",
        Language::Javascript => "console.log(6 * 7)",
        Language::Shell => "echo $((6 * 7))",
    }
}

impl Guest {
    /// The interpreter of the guest's profile, with what its prelude left: warm the first time, a
    /// new one, without the prelude, from then on.
    ///
    /// # Errors
    /// [`GuestError::NoSession`] if the profile has none; [`GuestError::Session`] if a new one does
    /// not start.
    pub async fn session(&self) -> Result<Session, GuestError> {
        if let Some(session) = self.take_session() {
            session.with_stream(GuestStream::mark_owned);
            return Ok(session);
        }
        let language = self.made_for_session().ok_or(GuestError::NoSession)?;
        self.session_in(language).await
    }

    /// A new interpreter of any language that the guest's image has.
    ///
    /// # Errors
    /// [`GuestError::Session`].
    pub async fn session_in(&self, language: Language) -> Result<Session, GuestError> {
        let command = self.session_command(language);
        Ok(Session::start(self.agent().await?, command).await?)
    }

    pub(super) fn session_command(&self, language: Language) -> Command {
        self.in_environment(in_guest(language).command())
    }
}

impl KvmBackend {
    /// Starts the profile's interpreter in a guest that becomes a template, if `is_template`, or
    /// will be handed out itself.
    pub(super) async fn start_session(
        &self,
        guest: &Guest,
        profile: &Profile,
        is_template: bool,
    ) -> Result<Option<Session>, CreateError> {
        let Some(language) = profile.session else {
            return Ok(None);
        };
        let mut command = guest.session_command(language);
        let now = SystemTime::now();
        if is_template {
            command = command.wall_clock(now.checked_sub(IN_THE_PAST).unwrap_or(now));
        }
        let started = async {
            let mut session = Session::start(guest.agent().await?, command).await?;
            // What code does first takes twice as long as ever after. Before the prelude: it finds
            // everything as it was.
            session.run(rehearsal(language)).await?;
            let outcome = session.run(Call::new(&*profile.prelude)).await?;
            match outcome.end {
                CallEnd::Nothing | CallEnd::Value(_) => Ok(session),
                CallEnd::Error(error) => Err(CreateError::WarmUp(error)),
                CallEnd::Exited(status) => {
                    let said = String::from_utf8_lossy(&outcome.stderr).into_owned();
                    Err(CreateError::WarmUp(format!(
                        "the prelude ended the interpreter ({status}): {said}"
                    )))
                }
            }
        };
        let limit = self.boot_timeout;
        let session = timeout(limit, started).await;
        Ok(Some(session.map_err(|_| CreateError::Late(limit))??))
    }

    /// Makes the random state of a clone's interpreter its own.
    pub(super) async fn reseed(&self, session: &mut Session) -> Result<(), CreateError> {
        let mut seed = [0; SEED_BYTES];
        fill(&mut seed)?;
        let limit = self.boot_timeout;
        let reseeded = timeout(limit, session.reseed(&seed)).await;
        Ok(reseeded.map_err(|_| CreateError::Late(limit))??)
    }
}
