//! The Unix-socket bridge, with real sockets and a guest on this thread.

use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};

use super::*;
use crate::virtio::vsock::unix::{BridgeError, MAX_PATH, UnixBridge};

/// Pumps the guest until it has a packet.
async fn packet(guest: &mut Guest) -> (Header, Vec<u8>) {
    for _ in 0..5000 {
        if let Some(packet) = guest.recv() {
            return packet;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("no packet for the guest");
}

#[tokio::test]
async fn a_client_connects_to_the_guest_as_it_would_to_firecracker() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut guest = Guest::new(Setup::default());
    let bridge = UnixBridge::bind(guest.host.clone(), &path).unwrap();
    let mut client = UnixStream::connect(bridge.path()).await.unwrap();
    client.write_all(b"CONNECT 1024\nfirst").await.unwrap();
    let (request, _) = packet(&mut guest).await;
    assert_eq!(
        (request.op, request.dst_port),
        (Op::Request.to_wire(), 1024)
    );
    let mut socket = Socket::answering(&request, 65536);
    guest.send(socket.header(Op::Response), &[]);
    // Bytes after the line are for the guest.
    let (_, payload) = packet(&mut guest).await;
    assert_eq!(payload, b"first");
    let data = socket.data(5);
    guest.send(data, b"hello");
    guest.send(socket.shutdown(SEND), &[]);
    guest.pump();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, format!("OK {}\nhello", request.src_port));
    client.write_all(b"last").await.unwrap();
    drop(client);
    let (_, payload) = packet(&mut guest).await;
    assert_eq!(payload, b"last");
    let (end, _) = packet(&mut guest).await;
    assert_eq!(end.op, Op::Shutdown.to_wire());
    drop(bridge);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_client_is_hung_up_on_when_the_guest_refuses_or_the_line_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut guest = Guest::new(Setup::default());
    let _bridge = UnixBridge::bind(guest.host.clone(), &path).unwrap();
    let mut client = UnixStream::connect(&path).await.unwrap();
    client.write_all(b"CONNECT 7\n").await.unwrap();
    let (request, _) = packet(&mut guest).await;
    guest.send(request.refusal().unwrap(), &[]);
    guest.pump();
    assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    for line in [
        "connect 7\n",
        "CONNECT\n",
        "CONNECT \n",
        "CONNECT +7\n",
        "CONNECT 7 \n",
        "CONNECT 4294967296\n",
        "CONNECT 00000000000000000007\n",
        "GET / HTTP/1.1\r\n\r\n",
    ] {
        let mut client = UnixStream::connect(&path).await.unwrap();
        client.write_all(line.as_bytes()).await.unwrap();
        let end = client.read(&mut [0; 8]).await;
        assert!(matches!(end, Ok(0) | Err(_)), "{line:?}");
        guest.expect_nothing();
    }
}

#[tokio::test]
async fn the_guest_connects_to_the_socket_of_its_port() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut guest = Guest::new(Setup::default());
    let _bridge = UnixBridge::bind(guest.host.clone(), &path).unwrap();
    let server = UnixListener::bind(dir.path().join("v.sock_52")).unwrap();
    let mut socket = guest.socket(1000, 52, 65536);
    guest.send(socket.header(Op::Request), &[]);
    let (response, _) = packet(&mut guest).await;
    assert_eq!(response.op, Op::Response.to_wire());
    let (mut accepted, _) = server.accept().await.unwrap();
    let data = socket.data(4);
    guest.send(data, b"ping");
    guest.pump();
    accepted.read_exact(&mut [0; 4]).await.unwrap();
    accepted.write_all(b"pong").await.unwrap();
    assert_eq!(packet(&mut guest).await.1, b"pong");
    // A port without a server is refused, not accepted and dropped.
    let other = guest.socket(1001, 53, 65536);
    guest.send(other.header(Op::Request), &[]);
    let (reset, _) = packet(&mut guest).await;
    assert!(other.is_for(&reset) && reset.op == Op::Reset.to_wire());
    // The end of the VM ends the bridge.
    drop(guest);
    assert_eq!(accepted.read(&mut [0; 8]).await.unwrap(), 0);
}

/// A client with a connection to the guest's port 1024.
async fn client_of(guest: &mut Guest, bridge: &UnixBridge, window: u32) -> (UnixStream, Socket) {
    let mut client = UnixStream::connect(bridge.path()).await.unwrap();
    client.write_all(b"CONNECT 1024\n").await.unwrap();
    let (request, _) = packet(guest).await;
    let socket = Socket::answering(&request, window);
    guest.send(socket.header(Op::Response), &[]);
    guest.pump();
    let ok = format!("OK {}\n", request.src_port);
    let mut said = vec![0; ok.len()];
    client.read_exact(&mut said).await.unwrap();
    assert_eq!(said, ok.as_bytes());
    (client, socket)
}

/// Pumps until the host's kernel reports that the client's peer takes no more; returns the error of
/// the client's first write after that.
async fn broken(guest: &mut Guest, client: &mut UnixStream) -> io::ErrorKind {
    use rustix::net::{SendFlags, send};
    for _ in 0..5000 {
        guest.pump();
        tokio::time::sleep(Duration::from_millis(1)).await;
        // An empty send transfers nothing, but fails if the peer takes no more.
        if let Err(error) = send(&*client, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            assert_eq!(error, rustix::io::Errno::PIPE);
            return client.write_all(b"x").await.unwrap_err().kind();
        }
    }
    panic!("the client can write for ever");
}

/// A client gets the whole answer of a guest that has shut down receiving, also after its own write
/// failed.
#[tokio::test]
async fn the_guests_answer_arrives_although_it_takes_no_more() {
    const ANSWER: usize = 250_000;
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(Setup::default());
    let bridge = UnixBridge::bind(guest.host.clone(), dir.path().join("v.sock")).unwrap();
    let (mut client, mut socket) = client_of(&mut guest, &bridge, 65536).await;
    guest.send(socket.shutdown(RECEIVE), &[]);
    // The client's write fails before the guest has answered anything.
    let error = broken(&mut guest, &mut client).await;
    assert_eq!(error, io::ErrorKind::BrokenPipe);
    let reading = tokio::spawn(async move {
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        (answer, client)
    });
    let mut sent = 0;
    while sent < ANSWER {
        let len = socket.room().min(ANSWER - sent).min(30_000);
        if len > 0 {
            let data = socket.data(len);
            guest.send(data, &vec![sent as u8; len]);
            sent += len;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
        while let Some((update, _)) = guest.recv() {
            assert_ne!(update.op, Op::Reset.to_wire());
            assert!(!shut(&update).receive || update.op != Op::Shutdown.to_wire());
            socket.hear(&update);
        }
    }
    guest.send(socket.shutdown(SEND), &[]);
    guest.pump();
    let (answer, _client) = reading.await.unwrap();
    assert_eq!(answer.len(), ANSWER);
}

/// The guest is told that a client takes no more, also if it has not written to it, and gets all
/// bytes that the client writes.
#[tokio::test]
async fn a_clients_data_arrives_although_it_takes_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(Setup::default());
    let bridge = UnixBridge::bind(guest.host.clone(), dir.path().join("v.sock")).unwrap();
    for lost in [false, true] {
        let (mut client, mut socket) = client_of(&mut guest, &bridge, 65536).await;
        rustix::net::shutdown(&client, rustix::net::Shutdown::Read).unwrap();
        if lost {
            let data = socket.data(4);
            guest.send(data, b"lost");
        }
        let (end, _) = packet(&mut guest).await;
        assert_eq!((end.op, shut(&end)), (Op::Shutdown.to_wire(), RECEIVE));
        client.write_all(b"more").await.unwrap();
        assert_eq!(packet(&mut guest).await.1, b"more");
        drop(client);
        let (end, _) = packet(&mut guest).await;
        assert_eq!(
            (end.op, shut(&end)),
            (Op::Shutdown.to_wire(), ShutdownFlags::BOTH)
        );
        guest.inbox.clear();
    }
}

#[tokio::test]
async fn a_socket_closed_as_a_whole_is_so_on_the_other_side() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new(Setup::default());
    let bridge = UnixBridge::bind(guest.host.clone(), dir.path().join("v.sock")).unwrap();
    // The client closes, at once or after shutting down sending: the guest is told of both
    // directions without sending a packet.
    for half_first in [false, true] {
        let (mut client, _) = client_of(&mut guest, &bridge, 65536).await;
        client.write_all(b"last").await.unwrap();
        if half_first {
            client.shutdown().await.unwrap();
        }
        assert_eq!(packet(&mut guest).await.1, b"last");
        if half_first {
            let (end, _) = packet(&mut guest).await;
            assert_eq!((end.op, shut(&end)), (Op::Shutdown.to_wire(), SEND));
            // A half-closed connection stays half-closed.
            for _ in 0..20 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                guest.expect_nothing();
            }
        }
        drop(client);
        let mut told = ShutdownFlags::default();
        while told != ShutdownFlags::BOTH {
            let (end, _) = packet(&mut guest).await;
            assert_eq!(end.op, Op::Shutdown.to_wire());
            told = told.with(shut(&end));
        }
        guest.inbox.clear();
    }
    // The guest closes, at once or after shutting down sending: the client's next write fails.
    for first in [ShutdownFlags::BOTH, SEND] {
        let (mut client, mut socket) = client_of(&mut guest, &bridge, 65536).await;
        let data = socket.data(4);
        guest.send(data, b"last");
        guest.send(socket.shutdown(first), &[]);
        guest.pump();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"last");
        if first == SEND {
            client.write_all(b"still").await.unwrap();
            assert_eq!(packet(&mut guest).await.1, b"still");
            guest.send(socket.shutdown(ShutdownFlags::BOTH), &[]);
        }
        assert_eq!(
            broken(&mut guest, &mut client).await,
            io::ErrorKind::BrokenPipe
        );
        guest.inbox.clear();
    }
}

/// mvm#3533: a path that is too long for a Unix socket.
#[tokio::test]
async fn a_path_that_is_too_long_or_taken_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let guest = Guest::new(Setup::default());
    let long = dir.path().join("x".repeat(MAX_PATH));
    let error = UnixBridge::bind(guest.host.clone(), long).unwrap_err();
    assert!(matches!(error, BridgeError::PathTooLong(len) if len > MAX_PATH));
    assert!(error.to_string().contains("107"), "{error}");
    let path = dir.path().join("v.sock");
    std::fs::write(&path, "precious").unwrap();
    let error = UnixBridge::bind(guest.host.clone(), &path).unwrap_err();
    assert!(matches!(error, BridgeError::Bind { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    // After the failures the VM can still get a bridge.
    let bridge = UnixBridge::bind(guest.host.clone(), dir.path().join("w")).unwrap();
    let second = UnixBridge::bind(guest.host.clone(), dir.path().join("y")).unwrap_err();
    assert!(matches!(second, BridgeError::Listen(ListenError::AnyInUse)));
    guest.host.close();
    let ended = UnixBridge::bind(guest.host.clone(), dir.path().join("z")).unwrap_err();
    assert!(matches!(ended, BridgeError::Listen(ListenError::VmEnded)));
    drop(bridge);
}

#[tokio::test]
async fn a_guest_that_takes_all_its_places_leaves_the_hosts() {
    const PLACES: usize = 3;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut guest = Guest::new(Setup::default());
    let _bridge = UnixBridge::with_places(guest.host.clone(), path.clone(), PLACES).unwrap();
    let server = UnixListener::bind(dir.path().join("v.sock_52")).unwrap();
    let mut held = Vec::new();
    for port in 0..=PLACES as u32 {
        let socket = guest.socket(1000 + port, 52, 65536);
        guest.send(socket.header(Op::Request), &[]);
        let (answer, _) = packet(&mut guest).await;
        assert!(socket.is_for(&answer));
        let taken = held.len() < PLACES;
        let wanted = if taken { Op::Response } else { Op::Reset };
        assert_eq!(answer.op, wanted.to_wire(), "{port}");
        if taken {
            held.push(server.accept().await.unwrap());
        }
    }
    let mut client = UnixStream::connect(&path).await.unwrap();
    client.write_all(b"CONNECT 80\n").await.unwrap();
    let (request, _) = packet(&mut guest).await;
    assert_eq!((request.op, request.dst_port), (Op::Request.to_wire(), 80));
}
