//! The host's side of a connection to an agent.
//!
//! An [`AgentClient`] sends one request at a time; [`exec`](AgentClient::exec) turns it into an
//! [`Exec`] for as long as a program runs. Several connections to one agent are independent of each
//! other: ping on one while programs run on others.
//!
//! No task is spawned: a connection makes progress only while one of its futures is polled. The
//! caller sets deadlines by wrapping any future here in `tokio::time::timeout`. Everything that the
//! guest sends is bounded: frames by the protocol, output by the pace of its readers.

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

/// Pause between freeze requests while some programs are not frozen yet.
const FREEZE_PAUSE: Duration = Duration::from_millis(2);
/// Most unanswered pings on a connection; a healthy agent stays far below.
const MAX_UNANSWERED: usize = 64;

/// A connection to an agent, ready for a request.
#[derive(Debug)]
pub struct AgentClient<S> {
    connection: Connection<S>,
    /// None if the greetings were exchanged before this client was created
    /// ([`resume`](Self::resume)).
    hello: Option<Hello>,
    /// Nonces of pings without an answer yet, including those whose futures were dropped.
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
    /// The number of programs that run in the guest.
    pub execs: u32,
    /// Whether the guest has set up its file systems, which it does after its first pong.
    pub prepared: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> AgentClient<S> {
    /// Reads the agent's greeting from a new connection and checks its version. This side's
    /// greeting is sent with the first request.
    ///
    /// # Errors
    /// [`HandshakeError::Hello`] if the peer has another version or is no agent;
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

    /// Returns a client for a connection on which both sides have greeted and nothing is in
    /// progress: a clone's copy of the connection that its template's client left open, with all
    /// answers taken.
    pub fn resume(stream: S) -> Self {
        Self {
            connection: Connection::new(stream),
            hello: None,
            unanswered: Vec::new(),
        }
    }

    /// Returns the agent's greeting: identity and boot times. None for a connection that was
    /// [resumed](Self::resume).
    pub fn hello(&self) -> Option<Hello> {
        self.hello
    }

    /// Returns the stream that carries the connection.
    pub fn stream(&self) -> &S {
        self.connection.stream()
    }

    /// Pings the agent. Answers to earlier pings whose futures were dropped are discarded.
    ///
    /// # Errors
    /// [`PingError::NonceInUse`] and [`PingError::Unanswered`] before anything is sent;
    /// [`PingError::Connection`] with `Protocol` for an answer to a nonce that was never sent or
    /// was answered before.
    ///
    /// # Cancel safety
    /// Safe: the client stays usable, and the late answer is discarded.
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

    /// Waits for the answer to a ping that [`refresh_and_ping`](Self::refresh_and_ping) has sent.
    ///
    /// # Errors
    /// [`PingError::NotAsked`] if no such ping is unanswered; otherwise as [`ping`](Self::ping).
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

    /// Makes a clone unique after restore: entropy, wall clock, identity, host name.
    ///
    /// # Errors
    /// [`ConnectionError`]. Parts that the guest's kernel refused are reported in the answer, not
    /// as an error.
    ///
    /// # Cancel safety
    /// Not safe: a later request would take the answer for its own. Drop the client, too.
    pub async fn refresh(&mut self, refresh: Refresh) -> Result<Refreshed, ConnectionError> {
        self.queue_refresh(refresh)?;
        self.refreshed().await
    }

    /// As [`refresh`](Self::refresh), and sends a ping right behind it, so that both cost one round
    /// trip. The ping's answer, which [`pong`](Self::pong) returns, comes from the refreshed guest.
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

    /// Freezes all programs in the guest and what they started, and waits until they are frozen:
    /// none of their instructions runs in a clone of the guest before a [`refresh`](Self::refresh)
    /// of which every part was applied, or a [`thaw`](Self::thaw). Programs that are started
    /// meanwhile run. A root user's process that left its cgroup is not frozen.
    ///
    /// # Errors
    /// [`FreezeError::Refused`] if the guest's kernel cannot freeze programs: some may then be
    /// frozen; [`FreezeError::Connection`].
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

    /// Resumes frozen programs.
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

    /// Returns the next response, mapped by `wanted`, skipping late pongs. A response that `wanted`
    /// maps to `None` breaks the protocol.
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

    /// Asks the guest to end. Resolves when the request was sent; there is no response, the caller
    /// sees how the VM ends.
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

/// Removes a nonce from the unanswered ones. An answer to any other nonce breaks the protocol.
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
