//! Carries the host's Unix sockets over streams, as a host program would.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use hearth_vmm::virtio::vsock::{VsockHost, VsockStream};
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// Speaks as the bridge does at `path`, with what a host program has: streams that it reads,
/// writes, shuts and drops.
pub(super) async fn serve(host: VsockHost, path: PathBuf) {
    let from_host = UnixListener::bind(&path).unwrap();
    let mut from_guest = host.listen_any().unwrap();
    loop {
        tokio::select! {
            client = from_host.accept() => {
                tokio::spawn(to_guest(client.unwrap().0, host.clone()));
            }
            incoming = from_guest.next() => {
                let Ok(incoming) = incoming else { return };
                let port = incoming.host_port();
                // Without a server it is dropped, and so refused.
                let server = UnixStream::connect(format!("{}_{port}", path.display()));
                if let Ok(server) = server.await {
                    tokio::spawn(relay(server, incoming.accept()));
                }
            }
        }
    }
}

/// Connects a client where it asks to; one that is refused is hung up on.
async fn to_guest(client: UnixStream, host: VsockHost) {
    // The client says nothing more before it is answered.
    let mut client = BufReader::new(client);
    let mut line = String::new();
    client.read_line(&mut line).await.unwrap();
    let port = line.trim_end().strip_prefix("CONNECT ").unwrap();
    let Ok(stream) = host.connect(port.parse().unwrap()).await else {
        return;
    };
    let mut client = client.into_inner();
    client.write_all(b"OK 0\n").await.unwrap();
    relay(client, stream).await;
}

/// Moves bytes both ways. The end of one direction is told by a shutdown, that of the whole socket
/// by a drop.
async fn relay(mut socket: UnixStream, stream: VsockStream) {
    let end = socket.as_fd().try_clone_to_owned().unwrap();
    let (mut from_socket, mut to_socket) = socket.split();
    let (mut to_guest, mut from_guest) = (&stream, &stream);
    let outward = async {
        tokio::select! {
            _ = tokio::io::copy(&mut from_socket, &mut to_guest) => {}
            // What is on its way from the guest still arrives.
            () = broken(&stream) => {
                let _ = rustix::net::shutdown(&end, rustix::net::Shutdown::Read);
                return Ok(());
            }
        }
        let mut polled = [PollFd::new(&end, PollFlags::empty())];
        rustix::event::poll(&mut polled, Some(&Timespec::default())).unwrap();
        if polled[0].revents().contains(PollFlags::HUP) {
            return Err(());
        }
        to_guest.shutdown().await.map_err(drop)
    };
    let inward = async {
        let _ = tokio::io::copy(&mut from_guest, &mut to_socket).await;
        let _ = to_socket.shutdown().await;
        Ok(())
    };
    let _ = tokio::try_join!(outward, inward);
}

/// Resolves once the guest takes no more: a write of nothing says so.
async fn broken(stream: &VsockStream) {
    let mut stream = stream;
    while stream.write(&[]).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
