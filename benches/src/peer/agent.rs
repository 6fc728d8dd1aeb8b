//! The agent in a peer's guest, which is Hearth's own: its answers are the proof that the guest is
//! up.

use std::time::{Duration, Instant};

use hearth_agent::AgentClient;
use hearth_agent::client::{ConnectionError, HandshakeError, PingError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::process::Child;

use super::{PeerError, ended};

/// A guest's clock may run fast by one part in so many: its kernel measures the frequency by a
/// timer if no monitor reports it, and on an emulated host that measurement is off by some per
/// cent.
const DRIFT: u32 = 10;
/// How long a peer may take to exit after its guest closed the connection.
const ENDING: Duration = Duration::from_secs(1);

/// A stream to an agent.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// Reads the agent's greeting.
pub(super) async fn handshake<S: Stream>(stream: S) -> Result<AgentClient<S>, PeerError> {
    let agent = AgentClient::handshake(stream).await;
    agent.map_err(|error| match error {
        HandshakeError::Connection(ConnectionError::Closed) => PeerError::HungUp,
        error => PeerError::Lies(format!("its agent's greeting: {error}")),
    })
}

/// Reads the greeting of a guest's agent; the guest must have booted since `begin` by its own
/// clock, too.
pub(super) async fn greeted<S: Stream>(
    stream: S,
    begin: Instant,
) -> Result<AgentClient<S>, PeerError> {
    let agent = handshake(stream).await?;
    let booted = Duration::from_micros(agent.hello().unwrap_or_default().started_us);
    let passed = begin.elapsed();
    if booted.is_zero() || booted > passed + passed / DRIFT {
        let lie = format!("a boot of {booted:?} in {passed:?}");
        return Err(PeerError::Lies(lie));
    }
    Ok(agent)
}

/// Pings the agent; returns whether the guest has prepared everything.
pub(super) async fn pinged<S: Stream>(
    agent: &mut AgentClient<S>,
    nonce: u64,
) -> Result<bool, PeerError> {
    match agent.ping(nonce).await {
        Ok(pong) => Ok(pong.prepared),
        Err(PingError::Connection(ConnectionError::Closed)) => Err(PeerError::HungUp),
        Err(error) => Err(PeerError::Lies(format!("its agent's pong: {error}"))),
    }
}

/// Returns the time from `begin` until the agent of a guest that booted since then has answered.
pub(super) async fn answered<S: Stream>(stream: S, begin: Instant) -> Result<Duration, PeerError> {
    let mut agent = greeted(stream, begin).await?;
    pinged(&mut agent, 1).await?;
    Ok(begin.elapsed())
}

/// Awaits `up`, within `limit` and while the process lives; then kills the process.
pub(super) async fn done<T>(
    child: &mut Child,
    limit: Duration,
    up: impl Future<Output = Result<T, PeerError>>,
) -> Result<T, PeerError> {
    let up = tokio::time::timeout(limit, up);
    let mut up = tokio::select! {
        up = up => up.unwrap_or(Err(PeerError::Silent(limit))),
        _ = child.wait() => Err(ended(child).await),
    };
    // A process that exits closes the connection first: the exit is the error to report.
    if matches!(up, Err(PeerError::HungUp))
        && tokio::time::timeout(ENDING, child.wait()).await.is_ok()
    {
        up = Err(ended(child).await);
    }
    // The process is gone before the next one is measured.
    let _ = child.kill().await;
    up
}
