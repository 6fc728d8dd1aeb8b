//! The host's side of a connection to an agent.
//!
//! An [`AgentClient`] asks one thing at a time; [`exec`](AgentClient::exec) turns it into an
//! [`Exec`] for as long as a program runs. Several connections to one agent are independent of each
//! other: ping on one while programs run on others.
//!
//! No task is spawned: whoever awaits drives the connection. Deadlines are the caller's: wrap any
//! future here in `tokio::time::timeout`. Everything that the guest sends is bounded: frames by the
//! protocol, output by the readers' pace.

mod command;
mod connection;
mod error;
mod exec;
mod files;
mod output;
mod session;
mod shared;
mod tree;

use std::{io, time::Duration};

use tokio::io::{AsyncRead, AsyncWrite};

pub use self::{
    command::Command,
    error::{ConnectionError, ExecError, FileError, FreezeError, HandshakeError, PingError},
    exec::{Exec, ExecOutput, ExecStdin},
    files::MAX_ENTRIES,
    output::{Output, OutputLimits},
    session::{Call, CallEnd, Language, Outcome, OutputStream, SEED_BYTES, Session, SessionError},
    tree::{Node, TreeCount, TreeEntry, TreeError, TreeLimits, TreeReader, TreeWriter},
};
use self::{connection::Connection, shared::Shared};
use crate::proto::{
    self, Applied, FrameError, Hello, InstanceId, Memory, Refresh, Refreshed, Request, Response,
    ShutdownKind, Standstill,
};

/// Pause before programs that do not stand still yet are asked for again.
const FREEZE_PAUSE: Duration = Duration::from_millis(2);
/// Pings that may wait for their answers; a healthy agent never comes near.
const MAX_UNANSWERED: usize = 64;

/// A connection to an agent, ready for a request.
#[derive(Debug)]
pub struct AgentClient<S> {
    connection: Connection<S>,
    /// None where the greetings were exchanged before this client's time.
    hello: Option<Hello>,
    /// Nonces of pings that were given up before their answers came.
    unanswered: Vec<u64>,
}

/// The answer to a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pong {
    /// The guest's identity.
    pub instance: InstanceId,
    /// Time since the guest booted.
    pub uptime: Duration,
    /// The guest's memory.
    pub memory: Memory,
    /// Programs that run in the guest.
    pub execs: u32,
    /// Whether the guest has set up its file systems: it does so after its first pong.
    pub prepared: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> AgentClient<S> {
    /// Reads the agent's greeting from a fresh connection and checks its version. This side's
    /// greeting leaves with the first request.
    ///
    /// # Errors
    /// [`HandshakeError::Hello`] if the agent has another version or is none;
    /// [`HandshakeError::Connection`].
    ///
    /// # Cancel safety
    /// Dropping the future closes the stream.
    pub async fn handshake(stream: S) -> Result<Self, HandshakeError> {
        let mut connection = Connection::new(stream);
        connection.frame().await?;
        let payload = connection
            .take_frame()
            .map_err(ConnectionError::from)?
            .unwrap_or_default();
        let hello = Hello::decode(payload)?;
        connection.queue_hello().map_err(ConnectionError::from)?;
        Ok(Self {
            connection,
            hello: Some(hello),
            unanswered: Vec::new(),
        })
    }

    /// Goes on with a connection on which both sides have greeted and nothing is under way: what a
    /// clone has of the connection that its template's client left open, all answers taken.
    pub fn resume(stream: S) -> Self {
        Self {
            connection: Connection::new(stream),
            hello: None,
            unanswered: Vec::new(),
        }
    }

    /// The agent's greeting: identity and boot times. None of a connection that was
    /// [resumed](Self::resume).
    pub fn hello(&self) -> Option<Hello> {
        self.hello
    }

    /// The stream that carries the connection.
    pub fn stream(&self) -> &S {
        self.connection.stream()
    }

    /// Asks whether the agent is alive. Answers to earlier pings that were given up are discarded.
    ///
    /// # Errors
    /// [`PingError::NonceInUse`] and [`PingError::Unanswered`] before anything is sent;
    /// [`PingError::Connection`] with `Protocol` for an answer to a nonce that was never sent
    /// or was answered before.
    ///
    /// # Cancel safety
    /// Safe: the client stays usable, the late answer is discarded.
    pub async fn ping(&mut self, nonce: u64) -> Result<Pong, PingError> {
        self.queue_ping(nonce)?;
        self.pong(nonce).await
    }

    fn queue_ping(&mut self, nonce: u64) -> Result<(), PingError> {
        if self.unanswered.contains(&nonce) {
            return Err(PingError::NonceInUse(nonce));
        }
        if self.unanswered.len() >= MAX_UNANSWERED {
            return Err(PingError::Unanswered(self.unanswered.len()));
        }
        self.connection
            .queue(&Request::Ping { nonce })
            .map_err(ConnectionError::from)?;
        self.unanswered.push(nonce);
        Ok(())
    }

    /// The answer to a ping that [`refresh_and_ping`](Self::refresh_and_ping) has sent.
    ///
    /// # Errors
    /// [`PingError::NotAsked`] if no such ping waits for its answer; otherwise as
    /// [`ping`](Self::ping).
    ///
    /// # Cancel safety
    /// As [`ping`](Self::ping).
    pub async fn pong(&mut self, nonce: u64) -> Result<Pong, PingError> {
        if !self.unanswered.contains(&nonce) {
            return Err(PingError::NotAsked(nonce));
        }
        loop {
            self.connection.frame().await?;
            match self.connection.take()? {
                Some(Response::Pong(pong)) => {
                    strike(&mut self.unanswered, pong.nonce)?;
                    if pong.nonce == nonce {
                        return Ok(pong.into());
                    }
                }
                Some(_) => return Err(unexpected().into()),
                None => {}
            }
        }
    }

    /// Starts a program and waits until it runs.
    ///
    /// # Errors
    /// [`ExecError::Failed`] with the reason if the guest could not start it;
    /// [`ExecError::TooLarge`] before anything is sent; [`ExecError::Connection`].
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection; a program that has started is killed with all
    /// that it started.
    pub async fn exec(mut self, command: Command) -> Result<Exec<S>, ExecError> {
        let bound = command.guest_bound();
        let Command { exec, host_margin } = command;
        let piped = exec.stdin == proto::Input::Pipe;
        let results = exec.results;
        self.connection
            .queue(&Request::Exec(Box::new(exec)))
            .map_err(|error| match error {
                FrameError::TooLong(bytes) => ExecError::TooLarge { bytes },
                other => ConnectionError::from(other).into(),
            })?;
        loop {
            self.connection.frame().await?;
            match self.connection.take()? {
                Some(Response::Started { pid }) => {
                    let shared = Shared::new(self, piped, results);
                    return Ok(Exec::new(shared, pid, bound, host_margin));
                }
                Some(Response::Failed(failure)) => return Err(failure.into()),
                Some(Response::Pong(pong)) => strike(&mut self.unanswered, pong.nonce)?,
                Some(_) => return Err(unexpected().into()),
                None => {}
            }
        }
    }

    /// Makes a clone a stranger to its siblings: entropy, wall clock, identity, host name.
    ///
    /// # Errors
    /// [`ConnectionError`]. What the guest's kernel refused is in the answer, not an error.
    ///
    /// # Cancel safety
    /// Not safe: the answer would be taken for another request's. Drop the client, too.
    pub async fn refresh(&mut self, refresh: Refresh) -> Result<Refreshed, ConnectionError> {
        self.queue_refresh(refresh)?;
        self.refreshed().await
    }

    /// As [`refresh`](Self::refresh), and sends a ping right behind, so that both cost one round
    /// trip: its answer, which [`pong`](Self::pong) gives, comes from the refreshed guest.
    ///
    /// # Errors
    /// As [`refresh`](Self::refresh) and [`ping`](Self::ping).
    ///
    /// # Cancel safety
    /// As [`refresh`](Self::refresh).
    pub async fn refresh_and_ping(
        &mut self,
        refresh: Refresh,
        nonce: u64,
    ) -> Result<Refreshed, PingError> {
        self.queue_refresh(refresh)?;
        self.queue_ping(nonce)?;
        Ok(self.refreshed().await?)
    }

    fn queue_refresh(&mut self, refresh: Refresh) -> Result<(), ConnectionError> {
        Ok(self
            .connection
            .queue(&Request::Refresh(Box::new(refresh)))?)
    }

    async fn refreshed(&mut self) -> Result<Refreshed, ConnectionError> {
        self.answer(|response| match response {
            Response::Refreshed(refreshed) => Some(*refreshed),
            _ => None,
        })
        .await
    }

    /// Has all programs in the guest, and what they started, stand still, and waits until they do:
    /// no instruction of theirs runs in a clone of the guest before a
    /// [`refresh`](Self::refresh) of which every part was applied, or a [`thaw`](Self::thaw).
    /// Programs that are started meanwhile run. A root user's process that left its cgroup is not
    /// held.
    ///
    /// # Errors
    /// [`FreezeError::Refused`] if the guest's kernel cannot: some may then stand still;
    /// [`FreezeError::Connection`].
    ///
    /// # Cancel safety
    /// As [`refresh`](Self::refresh).
    pub async fn freeze(&mut self) -> Result<(), FreezeError> {
        loop {
            self.connection
                .queue(&Request::Freeze)
                .map_err(ConnectionError::from)?;
            let standstill = self.answer(|response| match response {
                Response::Frozen(standstill) => Some(*standstill),
                _ => None,
            });
            match standstill.await? {
                Standstill::All => return Ok(()),
                Standstill::NotYet => tokio::time::sleep(FREEZE_PAUSE).await,
                Standstill::Refused { errno } => return Err(FreezeError::Refused { errno }),
            }
        }
    }

    /// Lets programs that stand still go on.
    ///
    /// # Errors
    /// As [`freeze`](Self::freeze).
    ///
    /// # Cancel safety
    /// As [`refresh`](Self::refresh).
    pub async fn thaw(&mut self) -> Result<(), FreezeError> {
        self.connection
            .queue(&Request::Thaw)
            .map_err(ConnectionError::from)?;
        let thawed = self.answer(|response| match response {
            Response::Thawed(thawed) => Some(*thawed),
            _ => None,
        });
        match thawed.await? {
            Applied::Failed { errno } => Err(FreezeError::Refused { errno }),
            Applied::Done | Applied::NotAsked => Ok(()),
        }
    }

    /// The answer that `wanted` knows, past late pongs.
    async fn answer<T>(
        &mut self,
        wanted: impl Fn(&Response<'_>) -> Option<T>,
    ) -> Result<T, ConnectionError> {
        loop {
            self.connection.frame().await?;
            match self.connection.take()? {
                Some(Response::Pong(pong)) => strike(&mut self.unanswered, pong.nonce)?,
                Some(response) => return wanted(&response).ok_or_else(unexpected),
                None => {}
            }
        }
    }

    /// Asks the guest to end. Resolves when the request has left; how the VM ends is the answer.
    ///
    /// # Errors
    /// [`ConnectionError`] if the request could not be sent.
    ///
    /// # Cancel safety
    /// The request may or may not have been sent.
    pub async fn shutdown(mut self, kind: ShutdownKind) -> Result<S, ConnectionError> {
        self.connection.queue(&Request::Shutdown(kind))?;
        self.connection.flush().await?;
        Ok(self.connection.into_stream())
    }
}

impl From<proto::Pong> for Pong {
    fn from(pong: proto::Pong) -> Self {
        Self {
            instance: pong.instance,
            uptime: Duration::from_micros(pong.uptime_us),
            memory: pong.memory,
            execs: pong.execs,
            prepared: pong.prepared,
        }
    }
}

/// Crosses a nonce off; an answer to one that is not outstanding is no agent's of ours.
fn strike(unanswered: &mut Vec<u64>, nonce: u64) -> Result<(), ConnectionError> {
    let known = unanswered.iter().position(|&sent| sent == nonce);
    let place = known.ok_or(ConnectionError::Protocol(
        "pong with a nonce that was not sent or was answered before",
    ))?;
    unanswered.swap_remove(place);
    Ok(())
}

fn unexpected() -> ConnectionError {
    ConnectionError::Protocol("answer to a question that was not asked")
}

/// An error for a stream of a program that has been cancelled.
fn cancelled() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the program was cancelled")
}
