//! One test for each kind of fault that users of such devices have reported.

use std::time::Duration;

use super::*;
use crate::virtio::vsock::testing::TX;

/// FC#1751: throughput fell to zero once the host's stream would have blocked.
#[tokio::test]
async fn a_slow_reader_throttles_and_does_not_stop_the_stream() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    // The guest fills the whole window; the host has read nothing.
    for _ in 0..4 {
        let data = socket.data(65536);
        guest.send(data, &[5; 65536]);
        guest.pump();
    }
    socket.host_window = WIDE_WINDOW;
    assert_eq!(socket.room(), 0);
    guest.expect_nothing();
    // The first byte read reopens the window, without a credit request.
    stream.read_exact(&mut [0]).await.unwrap();
    let (update, _) = guest.expect(Op::CreditUpdate);
    socket.hear(&update);
    assert_eq!(socket.room(), 1);
    // Later reads reopen it in large steps, not each time.
    for _ in 0..64 {
        stream.read_exact(&mut [0; 4095]).await.unwrap();
    }
    let mut updates = 0;
    while let Some((header, _)) = guest.recv() {
        socket.hear(&header);
        updates += 1;
    }
    assert!((1..=4).contains(&updates), "{updates}");
    assert!(socket.room() > 65536);
}

/// FC#1751, in the other direction: the guest's buffer is full.
#[tokio::test]
async fn a_guest_that_does_not_read_makes_the_writer_wait() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 10_000).await;
    let bytes = vec![9; 600_000];
    let mut write = Box::pin(stream.write_all(&bytes));
    assert!(poll(write.as_mut()).is_none());
    let mut got = 0;
    while let Some((header, payload)) = guest.recv() {
        got += payload.len();
        if header.op == Op::CreditRequest.to_wire() {
            break;
        }
    }
    assert_eq!(got, 10_000);
    assert!(poll(write.as_mut()).is_none());
    guest.expect_nothing();
    loop {
        socket.consumed = u32::try_from(got).unwrap();
        guest.send(socket.header(Op::CreditUpdate), &[]);
        while let Some((_, payload)) = guest.recv() {
            got += payload.len();
        }
        if poll(write.as_mut()).is_some() {
            break;
        }
    }
    while got < bytes.len() {
        socket.consumed = u32::try_from(got).unwrap();
        guest.send(socket.header(Op::CreditUpdate), &[]);
        while let Some((_, payload)) = guest.recv() {
            got += payload.len();
        }
    }
    assert_eq!(got, bytes.len());
}

/// FC#6031: the event thread spun while the guest had no RX buffer, and after a close.
#[tokio::test]
async fn a_guest_without_rx_buffers_costs_no_runs_and_loses_no_packet() {
    for event_idx in [true, false] {
        let mut guest = Guest::new(Setup {
            event_idx,
            rx_buffers: 0,
            ..Setup::default()
        });
        guest.refill = false;
        let host = guest.host.clone();
        let mut connecting = Box::pin(host.connect(1));
        assert!(poll(connecting.as_mut()).is_none());
        guest.pump();
        let runs = guest.runs;
        guest.pump();
        assert!(guest.runs == runs && runs <= 4, "{runs}");
        assert!(guest.device.deadline().is_none());
        // Each buffer that the guest provides gets one packet, without an extra kick.
        guest.post_rx(0);
        let (request, _) = guest.expect(Op::Request);
        let socket = Socket::answering(&request, 1000);
        guest.send(socket.header(Op::Response), &[]);
        let mut stream = drive(&mut guest, connecting).await.unwrap();
        stream.write_all(b"abc").await.unwrap();
        drop(stream);
        guest.pump();
        let runs = guest.runs;
        guest.kick();
        guest.pump();
        assert_eq!(guest.runs, runs + 1);
        guest.post_rx(1);
        guest.expect(Op::Data);
        guest.post_rx(2);
        guest.expect(Op::Shutdown);
        guest.send(socket.header(Op::Reset), &[]);
        guest.pump();
        let runs = guest.runs;
        guest.pump();
        assert_eq!((guest.runs, guest.connections()), (runs, 0));
    }
}

/// The device asks for no kicks for RX buffers while it has nothing to send.
#[tokio::test]
async fn rx_buffers_are_provided_without_kicks_while_there_are_enough() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 1 << 30).await;
    let kicks = guest.kicks;
    for _ in 0..100 {
        stream.write_all(&[0; 1000]).await.unwrap();
        guest.expect(Op::Data);
    }
    assert_eq!(guest.kicks, kicks);
    // Each TX packet to an idle device does need a kick.
    for _ in 0..10 {
        let data = socket.data(1);
        guest.send(data, &[0]);
        guest.pump();
    }
    assert_eq!(guest.kicks, kicks + 10);
}

/// FC#5995: 50 connects at once stalled the monitor.
#[tokio::test(start_paused = true)]
async fn connects_that_the_guest_ignores_block_nothing_and_time_out() {
    let mut guest = Guest::new(Setup::default());
    let pending: Vec<_> = (0..500)
        .map(|port| {
            let host = guest.host.clone();
            tokio::spawn(async move { host.connect(port).await })
        })
        .collect();
    let mut requests = 0;
    while requests < 500 {
        tokio::task::yield_now().await;
        while let Some((header, _)) = guest.recv() {
            assert_eq!(header.op, Op::Request.to_wire());
            requests += 1;
        }
    }
    // Other connections are served meanwhile.
    let (mut stream, mut socket) = connected(&mut guest, 1000, 65536).await;
    let data = socket.data(1);
    guest.send(data, &[1]);
    guest.pump();
    stream.read_exact(&mut [0]).await.unwrap();
    for (port, connect) in pending.into_iter().enumerate() {
        let timed_out = ConnectError::TimedOut {
            port: u32::try_from(port).unwrap(),
            waited: CONNECT_TIMEOUT,
        };
        assert_eq!(connect.await.unwrap().unwrap_err(), timed_out);
    }
    // The guest gets a reset for each connect that timed out, and its late response is refused.
    for _ in 0..500 {
        let (reset, _) = guest.expect(Op::Reset);
        let late = Socket::answering(&reset, 1000);
        guest.send(late.header(Op::Response), &[]);
        guest.expect(Op::Reset);
    }
    assert_eq!(guest.connections(), 1);
}

/// FC#1253/#1472: a connect before the guest listens was closed silently.
#[tokio::test]
async fn a_connect_before_the_guest_listens_is_refused_or_retried() {
    let mut guest = Guest::new(Setup::default());
    let host = guest.host.clone();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    let retry = tokio::spawn(async move { host.connect_retry(5, deadline).await });
    let mut refusals = 0;
    let stream = loop {
        tokio::task::yield_now().await;
        if let Some((request, _)) = guest.recv()
            && request.op == Op::Request.to_wire()
        {
            if refusals < 5 {
                refusals += 1;
                guest.send(request.refusal().unwrap(), &[]);
                guest.pump();
                continue;
            }
            let socket = Socket::answering(&request, 1000);
            guest.send(socket.header(Op::Response), &[]);
            break drive(&mut guest, retry).await.unwrap();
        }
    };
    stream.unwrap();
    let host = guest.host.clone();
    let soon = tokio::time::Instant::now() + Duration::from_millis(5);
    let retry = tokio::spawn(async move { host.connect_retry(6, soon).await });
    while !retry.is_finished() {
        tokio::task::yield_now().await;
        if let Some((packet, _)) = guest.recv()
            && packet.op == Op::Request.to_wire()
        {
            guest.send(packet.refusal().unwrap(), &[]);
        }
    }
    let outcome = retry.await.unwrap().unwrap_err();
    assert_eq!(outcome, ConnectError::Refused(6));
}

/// The guest's driver is initialised late.
#[tokio::test(start_paused = true)]
async fn a_connect_waits_for_the_driver_and_gives_up_in_time() {
    let mut guest = Guest::inactive(Setup::default());
    let host = guest.host.clone();
    let limit = Duration::from_secs(1);
    for _ in 0..2 * MAX_CONNECTIONS {
        let mut cancelled = Box::pin(host.connect(1));
        assert!(poll(cancelled.as_mut()).is_none());
        drop(cancelled);
        guest.pump();
    }
    assert_eq!(guest.connections(), 0);
    let outcome = host.connect_timeout(1, limit).await;
    let timed_out = ConnectError::TimedOut {
        port: 1,
        waited: limit,
    };
    assert_eq!(outcome.unwrap_err(), timed_out);
    let mut waiting = Box::pin(host.connect_timeout(2, limit));
    assert!(poll(waiting.as_mut()).is_none());
    guest.activate();
    let (request, _) = guest.expect(Op::Request);
    assert_eq!(request.dst_port, 2);
    let socket = Socket::answering(&request, 1000);
    guest.send(socket.header(Op::Response), &[]);
    guest.pump();
    drive(&mut guest, waiting).await.unwrap();
}

/// LK#112: after thousands of half-closed connections none could connect.
#[tokio::test]
async fn half_closed_connections_are_reaped() {
    let mut guest = Guest::new(Setup::default());
    let host = guest.host.clone();
    for round in 0..2 {
        for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
            let (mut stream, socket) = connected(&mut guest, port, 10).await;
            match port % 3 {
                // The guest never answers the close.
                0 => {}
                // It never takes the bytes that were written before.
                1 => stream.write_all(&[0; 20]).await.unwrap(),
                // It has closed its own half.
                _ => guest.send(socket.shutdown(SEND), &[]),
            }
            drop(stream);
            while guest.recv().is_some() {}
        }
        assert_eq!(guest.connections(), MAX_CONNECTIONS, "{round}");
        let full = host.connect(1).await.unwrap_err();
        assert_eq!(full, ConnectError::TooMany);
        guest.wait(CLOSE_TIMEOUT - Duration::from_secs(1));
        let deadline = guest.device.deadline();
        assert!(deadline.is_some());
        guest.wait(CLOSE_TIMEOUT + Duration::from_secs(1));
        for _ in 0..MAX_CONNECTIONS {
            guest.expect(Op::Reset);
        }
        guest.expect_nothing();
        assert_eq!(guest.connections(), 0);
        assert_eq!(guest.device.deadline(), None);
    }
}

/// A slow guest gets all bytes, as long as it takes some before each timeout.
#[tokio::test]
async fn progress_defers_the_close_timeout() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 1).await;
    stream.write_all(&[0; 3]).await.unwrap();
    drop(stream);
    guest.wait(CLOSE_TIMEOUT / 2);
    while guest.recv().is_some() {}
    for _ in 0..2 {
        socket.consumed += 1;
        guest.send(socket.header(Op::CreditUpdate), &[]);
        assert_eq!(guest.expect(Op::Data).1.len(), 1);
        while guest.recv().is_some() {}
    }
    guest.wait(CLOSE_TIMEOUT + Duration::from_secs(1));
    guest.expect(Op::Reset);
    assert_eq!(guest.connections(), 0);
}

/// tokio-vsock#24: a connect that succeeded before it was established.
#[tokio::test]
async fn a_connect_succeeds_only_when_the_guest_has_answered() {
    let mut guest = Guest::new(Setup::default());
    let host = guest.host.clone();
    let mut connecting = Box::pin(host.connect(1));
    for _ in 0..10 {
        assert!(poll(connecting.as_mut()).is_none());
        guest.pump();
    }
    let (request, _) = guest.expect(Op::Request);
    assert!(poll(connecting.as_mut()).is_none());
    let socket = Socket::answering(&request, 1000);
    guest.send(socket.header(Op::Response), &[]);
    guest.pump();
    assert!(poll(connecting.as_mut()).unwrap().is_ok());
}

/// vhost-device#494: an echo stalled because the guest's credit request was not answered.
#[tokio::test]
async fn a_credit_request_is_answered() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    let data = socket.data(1000);
    guest.send(data, &[0; 1000]);
    guest.pump();
    stream.read_exact(&mut [0; 1000]).await.unwrap();
    guest.expect_nothing();
    guest.send(socket.header(Op::CreditRequest), &[]);
    let (update, _) = guest.expect(Op::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (WIDE_WINDOW, 1000));
    guest.expect_nothing();
}

/// vhost-device#494: 1 MiB of echo, through a guest that reads and writes in turn.
#[tokio::test]
async fn an_echo_of_one_mib_does_not_stall() {
    let mut guest = Guest::new(Setup::default());
    let (stream, mut socket) = connected(&mut guest, 1, 64 * 1024).await;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let bytes: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 253) as u8).collect();
    let sent = bytes.clone();
    let write = tokio::spawn(async move { writer.write_all(&sent).await });
    let read = tokio::spawn(async move {
        let mut back = vec![0; 1 << 20];
        reader.read_exact(&mut back).await.map(|_| back)
    });
    let mut pending = std::collections::VecDeque::new();
    while !read.is_finished() {
        tokio::task::yield_now().await;
        while let Some((header, payload)) = guest.recv() {
            socket.hear(&header);
            pending.extend(payload);
        }
        let n = pending.len().min(socket.room()).min(4096);
        if n > 0 {
            let echo: Vec<u8> = pending.drain(..n).collect();
            socket.consumed += u32::try_from(n).unwrap();
            let data = socket.data(n);
            guest.send(data, &echo);
        } else {
            guest.send(socket.header(Op::CreditRequest), &[]);
        }
    }
    write.await.unwrap().unwrap();
    assert!(read.await.unwrap().unwrap() == bytes);
}

/// Credit arithmetic wrapped when a guest shrank its buffer.
#[tokio::test]
async fn a_guest_that_shrinks_its_buffer_gets_no_more_than_it_holds() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 5000).await;
    stream.write_all(&[0; 20_000]).await.unwrap();
    let mut got = 0;
    while let Some((_, payload)) = guest.recv() {
        got += payload.len();
    }
    assert_eq!(got, 5000);
    socket.window = 100;
    guest.send(socket.header(Op::CreditUpdate), &[]);
    guest.expect_nothing();
    socket.consumed = 4950;
    guest.send(socket.header(Op::CreditUpdate), &[]);
    assert_eq!(guest.expect(Op::Data).1.len(), 50);
    // False claims: more bytes consumed than were sent, and a buffer of 4 GiB.
    socket.consumed = 100_000;
    socket.window = u32::MAX;
    guest.send(socket.header(Op::CreditUpdate), &[]);
    while let Some((header, payload)) = guest.recv() {
        assert_ne!(header.op, Op::Reset.to_wire());
        got += payload.len();
    }
    assert!(got <= 20_000);
}

/// A connection that always has data does not starve the others.
#[tokio::test]
async fn connections_send_in_turn() {
    let mut guest = Guest::new(Setup {
        rx_buffers: 1,
        ..Setup::default()
    });
    let mut streams = Vec::new();
    for port in 0..5 {
        streams.push(connected(&mut guest, port, 1 << 20).await);
    }
    guest.refill = false;
    for (stream, _) in &mut streams {
        stream.write_all(&[0; 100_000]).await.unwrap();
    }
    let mut order = Vec::new();
    for _ in 0..20 {
        let (header, _) = guest.expect(Op::Data);
        order.push(header.dst_port);
        guest.post_rx(0);
    }
    for turn in order.chunks(5).skip(1) {
        let mut ports = turn.to_vec();
        ports.sort_unstable();
        assert_eq!(ports, [0, 1, 2, 3, 4], "{order:?}");
    }
}

/// All packets that are available are received. More available chains than the queue has entries
/// are a fault.
#[tokio::test]
async fn a_full_window_is_received_and_more_chains_than_entries_are_a_fault() {
    let mut guest = Guest::new(Setup::default());
    // Four TX packets of one connection that fill its window, all available at once.
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    for _ in 0..4 {
        let data = socket.data(65536);
        guest.send(data, &[5; 65536]);
    }
    let before = guest.runs;
    guest.pump();
    assert!(guest.runs > before);
    let mut all = vec![0; 4 * 65536];
    stream.read_exact(&mut all).await.unwrap();
    // The queue's size bounds a run as well: 1000 available chains exceed it, which is a fault.
    for _ in 0..1000 {
        guest.rings[TX].push(&guest.ram, 0);
    }
    guest.kick();
    assert!(guest.try_pump().is_err());
}
