//! The transport of connections: vsock in a guest, a Unix socket in tests without one.
//!
//! A guest without vsock, as under another monitor, has one connection: the serial line that init
//! was started on. The kernel must write nothing there.

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

/// Most connections that wait to be accepted.
const BACKLOG: i32 = 128;
const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// The kind of socket that leads to the host.
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

    /// Starts a connection to the host; the socket is writable once it is established. Returns
    /// `None` if there is no host to connect to.
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

    /// Accepts a waiting connection. Returns `None` if the peer is not the host: programs in the
    /// guest may not connect.
    pub(crate) fn accept(&self, listener: impl AsFd) -> Result<Option<OwnedFd>, Errno> {
        let (socket, peer) = acceptfrom_with(listener, FLAGS)?;
        let from_host = match self {
            Self::Vsock => peer.as_ref().and_then(peer_cid) == Some(VsockAddr::HOST_CID),
            Self::Unix(_) => true,
        };
        Ok(from_host.then_some(socket))
    }
}

/// Returns the serial line that init was started on, in raw mode.
fn serial_line() -> Result<OwnedFd, Errno> {
    let mut modes = tcgetattr(stdin())?;
    modes.make_raw();
    tcsetattr(stdin(), OptionalActions::Now, &modes)?;
    let line = fcntl_dupfd_cloexec(stdin(), 3)?;
    fcntl_setfl(&line, OFlags::NONBLOCK)?;
    Ok(line)
}
