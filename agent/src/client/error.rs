//! Errors of the host's side, one type per operation.

use std::{io, sync::Arc, time::Duration};

use super::files::MAX_ENTRIES;
use crate::proto::{FileFailure, FrameError, HelloError, MAX_FRAME, Rejection, SpawnFailure};

/// Why a connection to the agent can no longer be used.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The agent or the VM has ended.
    #[error("the agent closed the connection: the guest ended or was killed")]
    Closed,
    /// The stream failed.
    #[error("the connection to the agent failed")]
    Io(#[source] Arc<io::Error>),
    /// The agent sent something that the protocol does not allow. Do not trust this guest.
    #[error("the agent broke the protocol: {0}")]
    Protocol(&'static str),
    /// The agent sent a bad frame. Do not trust this guest.
    #[error("the agent sent a bad frame")]
    Frame(#[source] FrameError),
    /// The agent reports that this side broke the protocol.
    #[error("the agent refused the connection")]
    Rejected(#[source] Rejection),
}

impl From<io::Error> for ConnectionError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(Arc::new(error)),
        }
    }
}

impl From<FrameError> for ConnectionError {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

impl From<ConnectionError> for io::Error {
    fn from(error: ConnectionError) -> Self {
        let kind = match &error {
            ConnectionError::Closed => io::ErrorKind::ConnectionReset,
            ConnectionError::Io(inner) => inner.kind(),
            _ => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

/// Why no client could be created on a stream.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// This side does not accept the agent's greeting.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// The connection failed before the greeting was complete.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

/// Why a ping failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PingError {
    /// A ping with this nonce is still unanswered: use another nonce.
    #[error("nonce {0} is still unanswered: use another")]
    NonceInUse(u64),
    /// No ping with this nonce is unanswered.
    #[error("no ping with nonce {0} waits for its answer: send one first")]
    NotAsked(u64),
    /// Too many pings are unanswered, so no other is sent.
    #[error("{0} pings are unanswered: the agent does not respond")]
    Unanswered(usize),
    /// The connection failed, or the agent broke the protocol.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

impl PingError {
    /// Returns whether the agent sent an answer that no healthy agent sends (to a nonce never sent,
    /// a second one to a nonce, a malformed one): do not retry.
    #[must_use]
    pub fn is_protocol(&self) -> bool {
        matches!(
            self,
            Self::Connection(ConnectionError::Protocol(_) | ConnectionError::Frame(_))
        )
    }
}

/// Why the programs in a guest could not be frozen or resumed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// The guest's kernel refused.
    #[error(
        "the guest's kernel refused (errno {errno}): it needs cgroups (version 2) to hold programs"
    )]
    Refused {
        /// The system's error number; EOPNOTSUPP without cgroups.
        errno: i32,
    },
    /// The connection failed, or the agent broke the protocol.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

/// Why a program could not be run, or its end is unknown.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The guest could not start the program.
    #[error(transparent)]
    Failed(#[from] SpawnFailure),
    /// Arguments and environment do not fit in a frame.
    #[error(
        "arguments and environment take {bytes} bytes, at most {MAX_FRAME} are allowed: pass large data as stdin"
    )]
    TooLarge {
        /// Their encoded size.
        bytes: u64,
    },
    /// The guest has not reported the program's end this long after the program's timeout, grace
    /// and linger time were over.
    #[error("the guest is overdue by {0:?} with the end of a program")]
    Overdue(Duration),
    /// The connection failed, or the agent broke the protocol.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

/// Why an operation on a file of the guest failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The guest reported a failure. The connection can be used for the next request.
    #[error("{path}, in the guest")]
    Failed {
        /// The path as given by the caller.
        path: String,
        /// The reason.
        #[source]
        failure: FileFailure,
    },
    /// The file is larger than the caller allows. The connection can be used for the next request.
    #[error("the guest's file has more than {most} bytes: allow more, or copy it with get_into")]
    TooLarge {
        /// The limit that the caller gave.
        most: usize,
    },
    /// The directory has more than [`MAX_ENTRIES`] entries. Drop the client.
    #[error(
        "the guest's directory has more than {MAX_ENTRIES} entries: let a program in the guest look at it"
    )]
    TooMany,
    /// The path does not fit in a frame.
    #[error("a path of {bytes} bytes: Linux knows none of more than 4095")]
    PathTooLong {
        /// Its length.
        bytes: usize,
    },
    /// The caller's own reader or writer failed. Drop the client.
    #[error("the host's side of the copy failed")]
    Host(#[source] io::Error),
    /// The connection failed, or the agent broke the protocol.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
}

impl FileError {
    pub(super) fn host(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl From<FrameError> for FileError {
    fn from(error: FrameError) -> Self {
        Self::Connection(error.into())
    }
}
