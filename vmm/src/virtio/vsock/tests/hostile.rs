//! A guest that breaks the rules: of connections (its own suffer), and of queues (the device stops).

use super::*;
use crate::virtio::Fault;
use crate::virtio::vsock::packet::HOST_CID;
use crate::virtio::vsock::testing::{GUEST_CID, RX, TX};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Address, length, flags, next.
type Desc = (u64, u32, u16, u16);

/// Each must end this connection with a reset, and no other.
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
    // What was within the credit is there, the byte beyond is not.
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
    // Even where the guest guesses the ports of a connect that was not sent yet.
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
    // Speaking for somebody else is not answered at all.
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
    // A narrow window is held to like a wide one.
    let mut narrow = guest.socket(4000, 5, 1000);
    let data = narrow.data(40_000);
    guest.send(data, &[0; 40_000]);
    guest.expect(Op::Reset);
    // A wide one that is free again is given again.
    guest.send(guest.socket(0, 5, 0).header(Op::Reset), &[]);
    guest.send(guest.socket(1 << 21, 5, 0).header(Op::Request), &[]);
    let (response, _) = guest.expect(Op::Response);
    assert_eq!(response.buf_alloc, WIDE_WINDOW);
}

/// Resets are neither dropped nor piled up: TX waits until the guest takes them.
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

/// Puts a TX chain at 0 and kicks.
fn attack_tx(guest: &mut Guest, descs: &[Desc]) -> Result<(), Fault> {
    for (at, (addr, len, flags, next)) in descs.iter().enumerate() {
        let at = u16::try_from(at).unwrap();
        guest.rings[TX].write_desc(&guest.ram, at, *addr, *len, *flags, *next);
    }
    guest.rings[TX].push(&guest.ram, 0);
    guest.kick();
    guest.try_pump()
}

/// CVE-2019-18960, Kata: only the start of a guest range was checked. And what else a chain can be.
#[tokio::test]
async fn malformed_tx_chains_are_faults() {
    let end = 4 << 20;
    let attacks: &[(&str, &[Desc])] = &[
        ("starts outside memory", &[(end, 44, 0, 0)]),
        ("ends outside memory", &[(end - 43, 44, 0, 0)]),
        (
            "payload ends outside memory",
            &[(0x20_0000, 44, NEXT, 1), (end - 10, 100, 0, 0)],
        ),
        ("address wraps", &[(u64::MAX - 10, 44, 0, 0)]),
        ("length of 4 GiB", &[(0x20_0000, u32::MAX, 0, 0)]),
        ("zero length", &[(0x20_0000, 0, 0, 0)]),
        ("shorter than a header", &[(0x20_0000, 43, 0, 0)]),
        ("only writable", &[(0x20_0000, 44, WRITE, 0)]),
        (
            "loop of empty descriptors",
            &[(0x20_0000, 0, NEXT, 1), (0x20_0000, 0, NEXT, 0)],
        ),
        ("next outside the table", &[(0x20_0000, 20, NEXT, 9999)]),
        ("indirect table outside memory", &[(end, 16, INDIRECT, 0)]),
        (
            "indirect table of odd size",
            &[(0x20_0000, 17, INDIRECT, 0)],
        ),
        ("empty indirect table", &[(0x20_0000, 0, INDIRECT, 0)]),
    ];
    for (name, descs) in attacks {
        let mut guest = Guest::new(Setup::default());
        let (mut stream, _) = connected(&mut guest, 1, 65536).await;
        assert!(attack_tx(&mut guest, descs).is_err(), "{name}");
        // The host's streams do not wait for a device that stopped.
        let error = stream.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{name}");
        // And the driver can begin again.
        guest.reset();
        guest.activate();
        connected(&mut guest, 2, 65536).await;
    }
}

/// A loop whose header repeats is a packet of as many bytes as the queue allows.
#[tokio::test]
async fn a_loop_of_full_descriptors_ends() {
    let mut guest = Guest::new(Setup::default());
    let header = guest.socket(1, 2, 10).header(Op::CreditUpdate);
    let at = vm_memory::GuestAddress(0x20_0000);
    vm_memory::Bytes::write_slice(guest.ram.map(), &header.encode(), at).unwrap();
    attack_tx(
        &mut guest,
        &[(0x20_0000, 44, NEXT, 1), (0x20_0000, 1 << 20, NEXT, 0)],
    )
    .unwrap();
    guest.expect(Op::Reset);
}

/// An indirect table of 65535 descriptors, which was not negotiated, costs no more than a direct
/// chain, and its packet is one if it comes early enough.
#[tokio::test]
async fn a_huge_indirect_table_is_not_walked() {
    for (header_at, reaches) in [(0, true), (100, true), (500, false)] {
        let mut guest = Guest::new(Setup::default());
        let table = 0x28_0000;
        let mut entries = Vec::new();
        for at in 0..65_535u16 {
            let len: u32 = if at == header_at { 44 } else { 0 };
            entries.extend(0x20_0000u64.to_le_bytes());
            entries.extend(len.to_le_bytes());
            entries.extend(NEXT.to_le_bytes());
            entries.extend((at + 1).to_le_bytes());
        }
        let write = |at, bytes: &[u8]| {
            let at = vm_memory::GuestAddress(at);
            vm_memory::Bytes::write_slice(guest.ram.map(), bytes, at).unwrap();
        };
        let header = guest.socket(1, 2, 10).header(Op::Data);
        write(table, &entries);
        write(0x20_0000, &header.encode());
        let outcome = attack_tx(&mut guest, &[(table, 65_535 * 16, INDIRECT, 0)]);
        assert_eq!(outcome.is_ok(), reaches, "{header_at}");
    }
}

#[tokio::test]
async fn ring_indices_that_lie_are_faults() {
    for queue in [RX, TX] {
        let mut guest = Guest::new(Setup {
            rx_buffers: 0,
            ..Setup::default()
        });
        guest.send(guest.socket(1, 2, 10).header(Op::Data), &[]);
        guest.pump();
        // More available than the queue is long.
        for _ in 0..200 {
            guest.rings[queue].push(&guest.ram, 0);
        }
        guest.kick();
        assert!(guest.try_pump().is_err(), "{queue}");
    }
    let mut guest = Guest::new(Setup::default());
    guest.rings[TX].push(&guest.ram, 5000);
    guest.kick();
    assert!(guest.try_pump().is_err(), "a head outside the table");
}

#[tokio::test]
async fn rx_buffers_that_hold_no_packet_are_faults() {
    let end = 4 << 20;
    for (name, addr, len, flags) in [
        ("no payload fits", 0x10_0000, 44, WRITE),
        ("no header fits", 0x10_0000, 43, WRITE),
        ("read-only", 0x10_0000, 4096, 0),
        ("ends outside memory", end - 100, 101, WRITE),
    ] {
        let mut guest = Guest::new(Setup {
            rx_buffers: 0,
            ..Setup::default()
        });
        guest.rings[RX].write_desc(&guest.ram, 0, addr, len, flags, 0);
        guest.rings[RX].push(&guest.ram, 0);
        guest.kick();
        // Not looked at before there is a packet.
        guest.pump();
        guest.send(guest.socket(1, 2, 10).header(Op::Data), &[]);
        assert!(guest.try_pump().is_err(), "{name}");
    }
}
