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

/// How far a template's clock is set back while its interpreter starts. OpenSSL reseeds its random
/// state when that is older than an hour, and has no other way to learn that it is in a clone; a
/// clone's clock is right, so the state looks old there.
const IN_THE_PAST: Duration = Duration::from_secs(24 * 60 * 60);

/// The agent protocol's name for the language.
pub(super) fn in_guest(language: Language) -> client::Language {
    match language {
        Language::Python => client::Language::Python,
        Language::Javascript => client::Language::Javascript,
        Language::Shell => client::Language::Shell,
    }
}

/// Code that prints, and leaves nothing behind in the interpreter.
fn rehearsal(language: Language) -> &'static str {
    match language {
        Language::Python => "print(6 * 7)",
        Language::Javascript => "console.log(6 * 7)",
        Language::Shell => "echo $((6 * 7))",
    }
}

impl Guest {
    /// Returns the interpreter of the guest's profile. The first call returns the warm one, in the
    /// state that the prelude left; later calls start a new one, without the prelude.
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

    /// Starts a new interpreter of any language that the guest's image has.
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
    /// Starts the profile's interpreter in a guest that becomes a template (`is_template`), or that
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
            // The first run takes twice as long as later ones. This one leaves nothing behind, so
            // the prelude still finds a fresh interpreter.
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

    /// Gives the interpreter of a clone its own random state.
    pub(super) async fn reseed(&self, session: &mut Session) -> Result<(), CreateError> {
        let mut seed = [0; SEED_BYTES];
        fill(&mut seed)?;
        let limit = self.boot_timeout;
        let reseeded = timeout(limit, session.reseed(&seed)).await;
        Ok(reseeded.map_err(|_| CreateError::Late(limit))??)
    }
}
