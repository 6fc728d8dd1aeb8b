//! A guest that breaks the rules of connections: only its own connections are affected.

use super::*;
use crate::virtio::vsock::packet::HOST_CID;
use crate::virtio::vsock::testing::GUEST_CID;

/// Each violation must reset its own connection and no other.
#[tokio::test]
async fn violations_reset_their_connection_and_no_other() {
    type Attack = fn(&mut Socket) -> (Header, usize);
    let attacks: &[(&str, Attack)] = &[
        ("unknown operation", |s| {
            (
                Header {
                    op: 8,
                    ..s.header(Op::Data)
                },
                0,
            )
        }),
        ("operation zero", |s| {
            (
                Header {
                    op: 0,
                    ..s.header(Op::Data)
                },
                0,
            )
        }),
        ("operation 65535", |s| {
            (
                Header {
                    op: u16::MAX,
                    ..s.header(Op::Data)
                },
                0,
            )
        }),
        ("a second request", |s| (s.header(Op::Request), 0)),
        ("a second response", |s| (s.header(Op::Response), 0)),
        ("longer than its chain", |s| {
            (
                Header {
                    len: 11,
                    ..s.header(Op::Data)
                },
                10,
            )
        }),
        ("length of 4 GiB", |s| {
            (
                Header {
                    len: u32::MAX,
                    ..s.header(Op::Data)
                },
                10,
            )
        }),
        ("over the packet limit", |s| (s.data(65537), 65537)),
        ("shutdown longer than its chain", |s| {
            (
                Header {
                    len: 5,
                    ..s.shutdown(SEND)
                },
                0,
            )
        }),
    ];
    let mut guest = Guest::new(Setup::default());
    let (mut other, mut other_socket) = connected(&mut guest, 99, 65536).await;
    for (name, attack) in attacks {
        let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
        let (header, payload) = attack(&mut socket);
        guest.send(header, &vec![1; payload]);
        let (reset, _) = guest.expect(Op::Reset);
        assert!(socket.is_for(&reset), "{name}");
        let error = stream.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{name}");
        guest.expect_nothing();
        assert_eq!(guest.connections(), 1, "{name}");
    }
    let data = other_socket.data(2);
    guest.send(data, b"ok");
    guest.pump();
    other.read_exact(&mut [0; 2]).await.unwrap();
}

#[tokio::test]
async fn more_data_than_credit_is_a_reset() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    for _ in 0..4 {
        let data = socket.data(65536);
        guest.send(data, &[5; 65536]);
        guest.pump();
    }
    let data = socket.data(1);
    guest.send(data, &[6]);
    guest.expect(Op::Reset);
    // The bytes within the credit are there, the byte beyond it is not.
    let mut bytes = Vec::new();
    let error = stream.read_to_end(&mut bytes).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(bytes == vec![5; 4 * 65536]);
}

#[tokio::test]
async fn data_after_the_end_of_data_is_a_reset() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    guest.send(socket.shutdown(SEND), &[]);
    let data = socket.data(1);
    guest.send(data, &[6]);
    guest.expect(Op::Reset);
    assert!(stream.read(&mut [0; 8]).await.is_err());
}

#[tokio::test]
async fn a_response_nobody_asked_for_is_refused() {
    let mut guest = Guest::new(Setup::default());
    let host = guest.host.clone();
    // Also if the guest guesses the ports of a connect whose request was not sent yet.
    guest.refill = false;
    for _ in 0..16 {
        let socket = guest.socket(1, 77, 10);
        guest.send(socket.header(Op::Response), &[]);
        guest.expect(Op::Reset);
    }
    let mut connecting = Box::pin(host.connect(5));
    assert!(poll(connecting.as_mut()).is_none());
    guest.pump();
    let guess = guest.socket(5, 1 << 30, 10);
    guest.send(guess.header(Op::Response), &[]);
    guest.pump();
    let outcome = poll(connecting.as_mut()).unwrap();
    assert_eq!(outcome.unwrap_err(), ConnectError::Refused(5));
}

#[tokio::test]
async fn packets_for_no_connection_are_refused_and_resets_are_not_answered() {
    let mut guest = Guest::new(Setup::default());
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Request,
    ] {
        let socket = guest.socket(10, 20, 1000);
        guest.send(socket.header(op), &[]);
        let (reset, _) = guest.expect(Op::Reset);
        assert!(socket.is_for(&reset), "{op:?}");
    }
    let socket = guest.socket(10, 20, 1000);
    guest.send(socket.header(Op::Reset), &[]);
    guest.expect_nothing();
}

#[tokio::test]
async fn foreign_addresses_and_types_reach_nobody() {
    let mut guest = Guest::new(Setup::default());
    let mut listener = guest.host.listen(5).unwrap();
    let request = guest.socket(1, 5, 1000).header(Op::Request);
    // A packet with a foreign source CID is not answered at all.
    for src_cid in [0, 1, HOST_CID, GUEST_CID + 1, u64::MAX, GUEST_CID | 1 << 32] {
        guest.send(Header { src_cid, ..request }, &[]);
        guest.expect_nothing();
    }
    for dst_cid in [0, 1, GUEST_CID, 4, u64::MAX, HOST_CID | 1 << 32] {
        guest.send(Header { dst_cid, ..request }, &[]);
        guest.pump_raw();
        let (reset, _) = guest.inbox.pop_front().unwrap();
        assert_eq!((reset.src_cid, reset.op), (dst_cid, Op::Reset.to_wire()));
    }
    for kind in [0, 2, 3, u16::MAX] {
        guest.send(Header { kind, ..request }, &[]);
        let (reset, _) = guest.expect(Op::Reset);
        assert_eq!(reset.kind, kind);
    }
    assert_eq!(guest.connections(), 0);
    assert!(poll(Box::pin(listener.accept()).as_mut()).is_none());
}

#[tokio::test]
async fn a_flood_of_requests_fills_the_backlog_and_no_more() {
    let mut guest = Guest::new(Setup::default());
    let mut listener = guest.host.listen(5).unwrap();
    let (mut accepted, mut refused) = (0, 0);
    for port in 0..10_000 {
        let socket = guest.socket(port, 5, 1000);
        guest.send(socket.header(Op::Request), &[]);
        match Op::from_wire(guest.recv().unwrap().0.op).unwrap() {
            Op::Response => accepted += 1,
            Op::Reset => refused += 1,
            op => panic!("{op:?}"),
        }
    }
    assert_eq!((accepted, refused), (BACKLOG, 10_000 - BACKLOG));
    assert_eq!(guest.connections(), BACKLOG);
    listener.accept().await.unwrap();
}

#[tokio::test]
async fn the_table_has_an_end_and_windows_shrink_before_it() {
    let mut guest = Guest::new(Setup::default());
    let mut listener = guest.host.listen(5).unwrap();
    let mut streams = Vec::new();
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
        let socket = guest.socket(port, 5, 1000);
        guest.send(socket.header(Op::Request), &[]);
        let (response, _) = guest.expect(Op::Response);
        let wide = streams.len() < WIDE_CONNECTIONS;
        assert_eq!(
            response.buf_alloc,
            if wide { WIDE_WINDOW } else { NARROW_WINDOW }
        );
        streams.push(listener.accept().await.unwrap());
    }
    let socket = guest.socket(1 << 20, 5, 1000);
    guest.send(socket.header(Op::Request), &[]);
    guest.expect(Op::Reset);
    let full = guest.host.connect(1).await.unwrap_err();
    assert_eq!(full, ConnectError::TooMany);
    // A narrow window is enforced like a wide one.
    let mut narrow = guest.socket(4000, 5, 1000);
    let data = narrow.data(40_000);
    guest.send(data, &[0; 40_000]);
    guest.expect(Op::Reset);
    // A wide window is given out again once both ends have released its connection.
    guest.send(guest.socket(0, 5, 0).header(Op::Reset), &[]);
    guest.pump();
    drop(streams.swap_remove(0));
    guest.send(guest.socket(1 << 21, 5, 0).header(Op::Request), &[]);
    let (response, _) = guest.expect(Op::Response);
    assert_eq!(response.buf_alloc, WIDE_WINDOW);
}

/// A connection that the guest has reset counts towards the limits while the host holds its end,
/// which may hold unread bytes. Otherwise each reset would make room for as many bytes again.
#[tokio::test]
async fn connections_that_the_guest_resets_are_counted_while_the_host_holds_them() {
    const EACH: usize = NARROW_WINDOW as usize;
    let mut guest = Guest::new(Setup::default());
    let mut listener = guest.host.listen(5).unwrap();
    let mut held = Vec::new();
    let mut bytes = 0;
    let mut refused = 0;
    for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() + 500 {
        let mut socket = guest.socket(port, 5, 1000);
        guest.send(socket.header(Op::Request), &[]);
        let (answer, _) = guest.recv().unwrap();
        if Op::from_wire(answer.op) == Some(Op::Reset) {
            refused += 1;
            continue;
        }
        socket.hear(&answer);
        // All bytes that the guest may send.
        while socket.room() > 0 {
            let len = socket.room().min(EACH);
            let data = socket.data(len);
            guest.send(data, &vec![7; len]);
            bytes += len;
            while let Some((update, _)) = guest.recv() {
                socket.hear(&update);
            }
        }
        guest.send(socket.header(Op::Reset), &[]);
        guest.pump();
        held.push(listener.accept().await.unwrap());
    }
    assert_eq!(guest.connections(), 0, "the guest has let go of all");
    let wide = WIDE_CONNECTIONS * WIDE_WINDOW as usize;
    assert_eq!(
        (refused, bytes),
        (500, wide + (MAX_CONNECTIONS - WIDE_CONNECTIONS) * EACH),
        "184 MiB"
    );
    assert_eq!(bytes, 184 << 20);
    // Connections in a backlog count as well: these are not accepted.
    for _ in 0..BACKLOG {
        held.pop();
    }
    for port in 0..200 {
        let socket = guest.socket(1 << 20 | port, 5, 1000);
        guest.send(socket.header(Op::Request), &[]);
        guest.send(socket.header(Op::Reset), &[]);
        guest.pump();
    }
    assert_eq!(guest.connections(), 0);
    let full = guest.host.connect(1).await.unwrap_err();
    assert_eq!(full, ConnectError::TooMany);
    // The place of a stream that the host drops is free again.
    held.pop();
    let mut connecting = Box::pin(guest.host.connect(1));
    assert!(poll(connecting.as_mut()).is_none());
    drop(connecting);
    drop(listener);
    held.clear();
    let mut socket = guest.socket(7, 5, 1000);
    let mut listener = guest.host.listen(5).unwrap();
    guest.inbox.clear();
    guest.send(socket.header(Op::Request), &[]);
    let (response, _) = guest.expect(Op::Response);
    socket.hear(&response);
    assert_eq!(socket.room(), WIDE_WINDOW as usize);
    listener.accept().await.unwrap();
}

/// Resets are neither dropped nor queued without bound: TX waits until the guest takes them.
#[tokio::test]
async fn a_guest_that_takes_no_resets_stops_its_own_sending() {
    for event_idx in [true, false] {
        let mut guest = Guest::new(Setup {
            rx_buffers: 0,
            event_idx,
            ..Setup::default()
        });
        guest.refill = false;
        let mut sent = 0;
        while guest.can_send() {
            guest.send(guest.socket(sent, 9, 10).header(Op::Data), &[]);
            guest.pump();
            sent += 1;
        }
        assert!((64..100).contains(&sent), "{sent}");
        let runs = guest.runs;
        guest.pump();
        assert_eq!(guest.runs, runs);
        for port in 0..sent {
            guest.post_rx(u16::try_from(port % 16).unwrap());
            let (reset, _) = guest.expect(Op::Reset);
            assert_eq!(reset.dst_port, port);
        }
        assert!(guest.can_send());
        guest.expect_nothing();
    }
}
