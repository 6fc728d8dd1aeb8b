//! Relays the host's Unix sockets over vsock streams, as a host program would.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use hearth_vmm::virtio::vsock::{VsockHost, VsockStream};
use rustix::event::{PollFd, PollFlags, Timespec};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// Speaks the bridge's protocol at `path`, with the means of a host program: streams that it reads,
/// writes, shuts down and drops.
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
                // Without a server the connection is dropped, and so refused.
                let server = UnixStream::connect(format!("{}_{port}", path.display()));
                if let Ok(server) = server.await {
                    tokio::spawn(relay(server, incoming.accept()));
                }
            }
        }
    }
}

/// Connects a client to the port that it names; if that is refused, closes the client's socket.
async fn to_guest(client: UnixStream, host: VsockHost) {
    // The client sends nothing more before it gets an answer.
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

/// Moves bytes both ways. The end of one direction becomes a shutdown, that of the whole socket a
/// drop.
async fn relay(mut socket: UnixStream, stream: VsockStream) {
    let end = socket.as_fd().try_clone_to_owned().unwrap();
    let (mut from_socket, mut to_socket) = socket.split();
    let (mut to_guest, mut from_guest) = (&stream, &stream);
    let outward = async {
        tokio::select! {
            _ = tokio::io::copy(&mut from_socket, &mut to_guest) => {}
            // Bytes already on their way from the guest still arrive.
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

/// Resolves when the guest no longer accepts bytes; an empty write shows it.
async fn broken(stream: &VsockStream) {
    let mut stream = stream;
    while stream.write(&[]).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
