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
    // What came behind the line is the guest's.
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
    // A port that nobody serves is refused, not accepted and dropped.
    let other = guest.socket(1001, 53, 65536);
    guest.send(other.header(Op::Request), &[]);
    let (reset, _) = packet(&mut guest).await;
    assert!(other.is_for(&reset) && reset.op == Op::Reset.to_wire());
    // The end of the VM ends the bridge.
    drop(guest);
    assert_eq!(accepted.read(&mut [0; 8]).await.unwrap(), 0);
}

/// mvm#3533: a path that no Unix socket can have.
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
    // And the failure has left the VM free for another bridge.
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
