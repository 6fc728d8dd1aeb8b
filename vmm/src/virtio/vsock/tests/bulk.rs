//! Tests with many bytes and many connections.

use std::hash::{DefaultHasher, Hasher};

use super::*;

/// The `len` bytes of the test stream at `from`. The stream has no period that a buffer size
/// divides.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len)
        .map(|at| (at.wrapping_mul(0x9E37_79B1) >> 11) as u8)
        .collect()
}

/// Sends `total` bytes in both directions of one connection at the same time, and compares hashes
/// of the bytes at both ends.
async fn both_ways(setup: Setup, total: usize, guest_window: u32, tx_piece: usize) {
    let mut guest = Guest::new(setup);
    let (stream, mut socket) = connected(&mut guest, 9, guest_window).await;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let sender = tokio::spawn(async move {
        let (mut hash, mut at) = (DefaultHasher::new(), 0);
        while at < total {
            let chunk = pattern(at, (at % 70_001 + 1).min(total - at));
            hash.write(&chunk);
            writer.write_all(&chunk).await.unwrap();
            at += chunk.len();
        }
        writer.shutdown().await.unwrap();
        hash.finish()
    });
    let receiver = tokio::spawn(async move {
        let (mut hash, mut count, mut buf) = (DefaultHasher::new(), 0, vec![0; 50_000]);
        loop {
            let n = reader.read(&mut buf).await.unwrap();
            if n == 0 {
                return (hash.finish(), count);
            }
            hash.write(&buf[..n]);
            count += n;
        }
    });
    let (mut in_hash, mut in_count, mut in_end) = (DefaultHasher::new(), 0, false);
    let (mut out_hash, mut at, mut out_end) = (DefaultHasher::new(), 0, false);
    while !(in_end && out_end) {
        guest.pump();
        while let Some((header, payload)) = guest.inbox.pop_front() {
            socket.hear(&header);
            match Op::from_wire(header.op).unwrap() {
                Op::Data => {
                    in_hash.write(&payload);
                    in_count += payload.len();
                    socket.consumed = socket.consumed.wrapping_add(header.len);
                    if guest.can_send() {
                        guest.send(socket.header(Op::CreditUpdate), &[]);
                    }
                }
                Op::Shutdown => in_end = true,
                Op::CreditRequest => guest.send(socket.header(Op::CreditUpdate), &[]),
                Op::CreditUpdate => {}
                op => panic!("{op:?}"),
            }
            guest.pump();
        }
        while guest.can_send() && at < total && socket.room() > 0 {
            let n = socket
                .room()
                .min(total - at)
                .min(at % 65_537 + 1)
                .min(65536);
            let chunk = pattern(at, n);
            out_hash.write(&chunk);
            let mut bytes = socket.data(n).encode().to_vec();
            bytes.extend(chunk);
            guest.post_tx(&bytes, tx_piece);
            at += n;
        }
        if at == total && !out_end && guest.can_send() {
            guest.send(socket.shutdown(SEND), &[]);
            out_end = true;
        }
        tokio::task::yield_now().await;
    }
    let host_sent = drive(&mut guest, sender).await.unwrap();
    let (host_got, host_count) = drive(&mut guest, receiver).await.unwrap();
    assert_eq!((in_count, in_hash.finish()), (total, host_sent));
    assert_eq!((host_count, host_got), (total, out_hash.finish()));
}

#[tokio::test]
async fn sixty_four_mib_each_way() {
    both_ways(Setup::default(), 64 << 20, 256 * 1024, usize::MAX).await;
}

#[tokio::test]
#[ignore = "long: 1 GiB each way"]
async fn one_gib_each_way() {
    both_ways(Setup::default(), 1 << 30, 256 * 1024, usize::MAX).await;
}

/// FC#5475/#5485: an upload was corrupted where an I/O vector was consumed only in part.
#[tokio::test]
async fn a_packet_may_lie_in_any_number_of_descriptors() {
    for (rx_pieces, tx_piece) in [
        (&[44, 4052][..], 44),
        (&[1, 42, 1, 4000], 1),
        (&[43, 2], 43),
        (&[20, 24, 1000, 1], 700),
        (&[45], 8192),
    ] {
        let setup = Setup {
            rx_pieces,
            ..Setup::default()
        };
        both_ways(setup, 30_000, 5000, tx_piece).await;
    }
}

#[tokio::test]
async fn a_driver_without_event_idx_works_too() {
    let setup = Setup {
        event_idx: false,
        ..Setup::default()
    };
    both_ways(setup, 4 << 20, 10_000, 3000).await;
}

#[tokio::test]
async fn one_rx_buffer_is_enough() {
    let setup = Setup {
        rx_buffers: 1,
        ..Setup::default()
    };
    both_ways(setup, 1 << 20, 10_000, usize::MAX).await;
}

#[tokio::test]
async fn two_thousand_connections_at_once_and_in_sequence() {
    let mut guest = Guest::new(Setup::default());
    let mut open = Vec::new();
    for port in 0..2000 {
        open.push(connected(&mut guest, port, 4096).await);
    }
    assert_eq!(guest.connections(), 2000);
    for (stream, socket) in &mut open {
        stream.write_all(b"ping").await.unwrap();
        let (header, payload) = guest.expect(Op::Data);
        assert!(socket.is_for(&header) && payload == b"ping");
        let data = socket.data(4);
        guest.send(data, b"pong");
        guest.pump();
        let mut pong = [0; 4];
        stream.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, b"pong");
    }
    for (stream, socket) in open {
        drop(stream);
        assert_eq!(shut(&guest.expect(Op::Shutdown).0), ShutdownFlags::BOTH);
        guest.send(socket.header(Op::Reset), &[]);
        guest.pump();
    }
    assert_eq!(guest.connections(), 0);
    let mut listener = guest.host.listen(1).unwrap();
    for port in 0..2000 {
        let socket = guest.socket(port, 1, 4096);
        guest.send(socket.header(Op::Request), &[]);
        guest.expect(Op::Response);
        let stream = listener.accept().await.unwrap();
        guest.send(socket.shutdown(ShutdownFlags::BOTH), &[]);
        guest.expect(Op::Reset);
        drop(stream);
    }
    assert_eq!(guest.connections(), 0);
    guest.expect_nothing();
}
