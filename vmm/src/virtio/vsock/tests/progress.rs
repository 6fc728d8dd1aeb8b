//! Sending that must go on by itself, and sending that must stop.

use std::time::Duration;

use super::*;
use crate::virtio::vsock::muxer::MAX_REFUSALS;

/// A guest that has shut down receiving gets no data, even with credit, and writes fail.
#[tokio::test]
async fn a_guest_that_shut_down_receiving_gets_no_data() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 4).await;
    stream.write_all(&[9; 10]).await.unwrap();
    assert_eq!(guest.expect(Op::Data).1.len(), 4);
    while guest.recv().is_some() {}
    // The shutdown packet brings credit for all bytes that are still buffered.
    socket.consumed = 4;
    socket.window = 4096;
    guest.send(socket.shutdown(RECEIVE), &[]);
    guest.expect_nothing();
    guest.send(socket.header(Op::CreditUpdate), &[]);
    guest.expect_nothing();
    let error = stream.write(b"more").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    // The other direction is open.
    let data = socket.data(2);
    guest.send(data, b"ok");
    guest.pump();
    let mut text = [0; 2];
    assert_eq!(stream.read(&mut text).await.unwrap(), 2);
    assert_eq!(&text, b"ok");
}

/// TX stops when the queue of refusals is full. One kick frees all of it at once, and no other
/// follows.
#[tokio::test]
async fn tx_goes_on_when_one_kick_frees_all_refusals() {
    const EXTRA: usize = 5;
    let mut guest = Guest::new(Setup {
        rx_buffers: 0,
        ..Setup::default()
    });
    for port in 0..MAX_REFUSALS + EXTRA {
        let socket = guest.socket(u32::try_from(port).unwrap(), 77, 100);
        guest.send(socket.header(Op::Request), &[]);
        guest.pump();
    }
    assert_eq!(guest.tx_waiting(), EXTRA, "TX stopped");
    // As many buffers as there are refusals, and a single kick.
    guest.refill = false;
    for at in 0..u16::try_from(MAX_REFUSALS).unwrap() {
        guest.post_rx(at);
    }
    let mut refused = 0;
    while guest.recv().is_some() {
        refused += 1;
    }
    assert_eq!(refused, MAX_REFUSALS, "all buffers are used");
    assert_eq!(
        guest.tx_waiting(),
        0,
        "TX went on without a kick of its own"
    );
}

/// A guest that takes no data gets a reset 8 s after the drop of the stream, whatever other packets
/// it sends meanwhile.
#[tokio::test]
async fn talk_without_progress_does_not_defer_the_close_timeout() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, socket) = connected(&mut guest, 1, 1).await;
    stream.write_all(&[0; 3]).await.unwrap();
    guest.pump();
    drop(stream);
    guest.pump();
    let deadline = guest.device.deadline().unwrap();
    for op in [Op::CreditUpdate, Op::CreditRequest, Op::CreditUpdate] {
        guest.send(socket.header(op), &[]);
        while guest.recv().is_some() {}
        assert_eq!(guest.device.deadline(), Some(deadline), "{op:?}");
    }
    guest.wait(CLOSE_TIMEOUT + Duration::from_secs(1));
    guest.expect(Op::Reset);
    assert_eq!(guest.connections(), 0);
}
