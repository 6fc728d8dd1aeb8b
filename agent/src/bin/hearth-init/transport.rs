//! Where connections come from: vsock in a guest, a Unix socket in tests without one.
//!
//! A guest without vsock, which a monitor other than ours may give it, has one connection: the
//! serial line that init was started on. The kernel must be quiet there.

use alloc::{borrow::ToOwned, vec::Vec};

use hearth_agent::proto::{AGENT_PORT, READY_PORT};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{OFlags, fcntl_setfl},
    io::{Errno, fcntl_dupfd_cloexec},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, connect,
        listen, socket_with,
    },
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use crate::sys::{VsockAddr, peer_cid, stdin};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A way to the host.
#[derive(Debug)]
pub(crate) enum Transport {
    Vsock,
    Unix(Vec<u8>),
}

impl Transport {
    pub(crate) fn vsock() -> Self {
        Self::Vsock
    }

    pub(crate) fn unix(path: &[u8]) -> Self {
        Self::Unix(path.to_owned())
    }

    /// Starts listening.
    pub(crate) fn listen(&self) -> Result<OwnedFd, Errno> {
        let socket = match self {
            Self::Vsock => {
                let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, FLAGS, None)?;
                bind(
                    &socket,
                    &VsockAddr {
                        cid: VsockAddr::ANY_CID,
                        port: AGENT_PORT,
                    },
                )?;
                socket
            }
            Self::Unix(path) => {
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, FLAGS, None)?;
                bind(&socket, &SocketAddrUnix::new(path.as_slice())?)?;
                socket
            }
        };
        listen(&socket, BACKLOG)?;
        Ok(socket)
    }

    /// Starts a connection to the host; it is writable when established. None if there is no host
    /// to dial.
    pub(crate) fn dial(&self) -> Result<Option<OwnedFd>, Errno> {
        let Self::Vsock = self else { return Ok(None) };
        let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, FLAGS, None)?;
        match connect(
            &socket,
            &VsockAddr {
                cid: VsockAddr::HOST_CID,
                port: READY_PORT,
            },
        ) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(Some(socket)),
            Err(Errno::NODEV) => serial_line().map(Some),
            Err(errno) => Err(errno),
        }
    }

    /// Takes a connection that waits; none if its peer is not the host: programs in the guest have
    /// no business here.
    pub(crate) fn accept(&self, listener: impl AsFd) -> Result<Option<OwnedFd>, Errno> {
        let (socket, peer) = acceptfrom_with(listener, FLAGS)?;
        let from_host = match self {
            Self::Vsock => peer.as_ref().and_then(peer_cid) == Some(VsockAddr::HOST_CID),
            Self::Unix(_) => true,
        };
        Ok(from_host.then_some(socket))
    }
}

/// The line that init was started on, with nothing added to or taken from what passes.
fn serial_line() -> Result<OwnedFd, Errno> {
    let mut modes = tcgetattr(stdin())?;
    modes.make_raw();
    tcsetattr(stdin(), OptionalActions::Now, &modes)?;
    let line = fcntl_dupfd_cloexec(stdin(), 3)?;
    fcntl_setfl(&line, OFlags::NONBLOCK)?;
    Ok(line)
}
