//! A bridge between a guest's vsock ports and Unix sockets of the host, in Firecracker's
//! convention, so that clients written for it work unchanged:
//!
//! - A client connects to the socket at `PATH`, writes `CONNECT <port>\n`, and reads `OK <host
//!   port>\n` once the guest has accepted; if the guest does not accept, the bridge closes the
//!   connection.
//! - A guest that connects to the host's port `N` is connected to the program that listens on the
//!   socket at `PATH_N`, or refused if there is none.
//!
//! Each direction ends by itself: when it is closed, or its receiver takes no more, the other one
//! continues. When a socket is closed as a whole, so is the one on the other side: the next write
//! there fails. A connection costs two descriptors.
//!
//! Every program that may open the socket may talk to the guest: put the socket into a private
//! directory.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use super::host::{ListenError, VsockHost};
use super::listener::{VsockAnyListener, VsockIncoming};
use super::stream::VsockStream;
use super::unix_end::UnixEnd;

/// Longest path of the bridge's socket in bytes. The operating system allows 107; `PATH_N` with the
/// longest port must fit as well.
pub const MAX_PATH: usize = 107 - "_4294967295".len();
/// Most connections of one bridge at a time that clients of the host opened, and separately the
/// most that the guest opened: neither side takes the other's places. One more client waits; one
/// more connection of the guest is refused.
pub const MAX_BRIDGED: usize = 1024;
/// Longest first line of a client: `CONNECT 4294967295\n`.
const MAX_LINE: usize = 19;
/// How long a client may take to send its first line.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after an accept that failed, as it does when the host has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a bridge could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The path is longer than a Unix socket's can be with a port appended.
    #[error(
        "the Unix socket path has {0} bytes; use one of at most {MAX_PATH} (the system takes 107, and a port is added)"
    )]
    PathTooLong(usize),
    /// The socket could not be created.
    #[error("cannot listen on the Unix socket {path}; remove it if it is left over")]
    Bind {
        /// The path.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The VM's ports cannot be listened on.
    #[error("cannot bridge this VM's vsock ports")]
    Listen(#[from] ListenError),
}

/// A running bridge. Dropping it ends its connections and removes its socket.
#[derive(Debug)]
pub struct UnixBridge {
    path: PathBuf,
    server: AbortHandle,
}

impl UnixBridge {
    /// Starts a bridge on a socket at `path`, which must not exist. The bridge ends by itself when
    /// the VM does. Needs a tokio runtime with I/O and timers to be running.
    ///
    /// # Errors
    /// See [`BridgeError`].
    pub fn bind(host: VsockHost, path: impl Into<PathBuf>) -> Result<Self, BridgeError> {
        Self::with_places(host, path.into(), MAX_BRIDGED)
    }

    /// Starts a bridge with this many places for each side's connections.
    pub(super) fn with_places(
        host: VsockHost,
        path: PathBuf,
        places: usize,
    ) -> Result<Self, BridgeError> {
        let len = path.as_os_str().as_bytes().len();
        if len > MAX_PATH {
            return Err(BridgeError::PathTooLong(len));
        }
        let from_guest = host.listen_any()?;
        let from_host = UnixListener::bind(&path).map_err(|source| BridgeError::Bind {
            path: path.clone(),
            source,
        })?;
        let server = tokio::spawn(serve(host, path.clone(), from_host, from_guest, places));
        Ok(Self {
            path,
            server: server.abort_handle(),
        })
    }

    /// The path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnixBridge {
    fn drop(&mut self) {
        self.server.abort();
        // The file may have been removed already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Accepts connections from both sides until the VM ends; the bridged connections end with this
/// future.
async fn serve(
    host: VsockHost,
    path: PathBuf,
    from_host: UnixListener,
    mut from_guest: VsockAnyListener,
    places: usize,
) {
    let guests = Arc::new(Semaphore::new(places));
    let clients = Arc::new(Semaphore::new(places));
    let mut bridged = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = bridged.join_next() => {}
            incoming = from_guest.next() => {
                let Ok(incoming) = incoming else { return };
                if let Ok(place) = Arc::clone(&guests).try_acquire_owned() {
                    let path = path.clone();
                    bridged.spawn(async move {
                        let outcome = to_host(incoming, &path).await;
                        tracing::debug!(?outcome, "vsock connection of the guest's ended");
                        drop(place);
                    });
                }
            }
            client = accept(&from_host, &clients) => {
                let Ok((client, place)) = client else {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                };
                let host = host.clone();
                bridged.spawn(async move {
                    let outcome = to_guest(client, &host).await;
                    tracing::debug!(?outcome, "vsock connection of a client's ended");
                    drop(place);
                });
            }
        }
    }
}

/// Waits for a place, then for the next client. Cancel-safe.
async fn accept(
    listener: &UnixListener,
    places: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (client, _) = listener.accept().await?;
    Ok((client, place))
}

async fn to_guest(mut client: UnixStream, host: &VsockHost) -> io::Result<()> {
    let port = tokio::time::timeout(LINE_TIMEOUT, read_request(&mut client)).await??;
    let end = UnixEnd::of(&client)?;
    let stream = host.connect(port).await.map_err(io::Error::other)?;
    let ok = format!("OK {}\n", stream.host_port());
    client.write_all(ok.as_bytes()).await?;
    join(client, &end, &stream).await;
    Ok(())
}

/// Reads `CONNECT <port>\n` and not a byte more: the following bytes are for the guest.
async fn read_request(client: &mut UnixStream) -> io::Result<u32> {
    let mut line = Vec::with_capacity(MAX_LINE);
    while line.last() != Some(&b'\n') {
        if line.len() == MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.push(client.read_u8().await?);
    }
    std::str::from_utf8(&line)
        .ok()
        .and_then(|line| line.strip_prefix("CONNECT "))
        .and_then(|rest| rest.strip_suffix('\n'))
        .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|port| port.parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

async fn to_host(incoming: VsockIncoming, path: &Path) -> io::Result<()> {
    let mut path = path.as_os_str().to_owned();
    path.push(format!("_{}", incoming.host_port()));
    // On failure, the drop of `incoming` refuses the guest.
    let server = UnixStream::connect(path).await?;
    let end = UnixEnd::of(&server)?;
    join(server, &end, &incoming.accept()).await;
    Ok(())
}

/// Moves bytes both ways until both directions have ended.
async fn join(mut socket: UnixStream, end: &UnixEnd, stream: &VsockStream) {
    let (from_socket, to_socket) = socket.split();
    tokio::join!(
        async {
            pass(from_socket, stream, stream.refused()).await;
            end.shut_receive();
        },
        async {
            pass(stream, to_socket, end.refused()).await;
            stream.shut_receive();
        },
    );
}

/// Moves bytes one way until `from` ends or `refused` resolves, then shuts `to` down.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    refused: impl Future<Output = ()>,
) {
    tokio::select! {
        // A receiver that takes no more does not get the remaining bytes either.
        biased;
        () = refused => {}
        moved = tokio::io::copy(&mut from, &mut to) => {
            tracing::trace!(?moved, "one direction of a bridged connection ended");
        }
    }
    // Fails if the receiver is gone.
    let _ = to.shutdown().await;
}
