//! Snapshots: the effect of a restore on the guest's connections, and reattaching to them.

use std::time::Duration;

use super::*;
use crate::virtio::vsock::testing::EVENT;

fn through_serde(state: &VsockState) -> VsockState {
    let raw = RawVsockState::from(state.clone());
    VsockState::try_from(raw).unwrap()
}

/// CH#7759/#7958: a guest's read hung for ever after a restore.
#[tokio::test]
async fn the_restored_guest_sees_its_connections_end() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, _) = connected(&mut guest, 1, 65536).await;
    stream.write_all(b"seen").await.unwrap();
    guest.expect(Op::Data);
    // A connection whose request the host has not answered is not ended by the transport reset.
    let _listener = guest.host.listen(5).unwrap();
    guest.refill = false;
    let waiting = guest.socket(77, 5, 1000);
    let state = {
        let mut twin = Guest::new(Setup {
            rx_buffers: 0,
            ..Setup::default()
        });
        let _listener = twin.host.listen(5).unwrap();
        twin.send(waiting.header(Op::Request), &[]);
        twin.pump();
        twin.device.save()
    };
    assert_eq!(state.conns()[0].outcome, RestoreOutcome::Refused);
    guest.refill = true;
    let mut restored = guest.restored();
    restored.pump();
    assert_eq!(restored.events, [0]);
    restored.expect_nothing();
    assert_eq!(restored.connections(), 0);
}

/// When Linux handles the reset, it ends all its connections, new ones included, without a packet
/// to the host: a connect that overtook the reset hung for ever.
#[tokio::test]
async fn a_connect_right_after_a_restore_waits_until_the_guest_handled_the_reset() {
    for event_idx in [true, false] {
        let setup = Setup {
            event_idx,
            ..Setup::default()
        };
        let mut guest = Guest::new(setup);
        let (_stream, _) = connected(&mut guest, 1, 65536).await;
        while guest.recv().is_some() {}
        let mut restored = guest.restored();
        restored.handles_events = false;
        let host = restored.host.clone();
        let connecting = tokio::spawn(async move { host.connect(2).await.is_ok() });
        tokio::task::yield_now().await;
        restored.pump();
        assert_eq!(restored.events, [0]);
        restored.kick();
        restored.expect_nothing();
        // The guest handles the event: its kick releases the request.
        for head in std::mem::take(&mut restored.events_idle) {
            restored.push(EVENT, head);
        }
        let (request, _) = restored.expect(Op::Request);
        assert_eq!(request.dst_port, 2);
        connecting.abort();
    }
}

#[tokio::test]
async fn the_transport_reset_is_owed_again_by_a_clone_of_a_clone_and_waited_for_however_long() {
    let mut guest = Guest::new(Setup::default());
    connected(&mut guest, 1, 65536).await;
    guest.pump();
    guest.inbox.clear();
    guest.handles_events = false;
    let mut restored = guest.restored();
    let host = restored.host.clone();
    let mut connecting = Box::pin(host.connect(2));
    assert!(poll(connecting.as_mut()).is_none());
    restored.expect_nothing();
    assert_eq!(restored.events, [0]);
    // In a snapshot of this clone the reset is still pending.
    let mut again = restored.restored();
    assert_eq!(
        poll(connecting.as_mut()).unwrap().unwrap_err(),
        ConnectError::VmEnded
    );
    let host = again.host.clone();
    let mut connecting = Box::pin(host.connect(2));
    assert!(poll(connecting.as_mut()).is_none());
    again.expect_nothing();
    assert_eq!(again.events, [0, 0]);
    again.push(EVENT, 0);
    let (request, _) = again.expect(Op::Request);
    assert_eq!(request.dst_port, 2);
    // Also if the clone was parked for hours before it ran.
    let mut third = again.restored();
    let host = third.host.clone();
    let mut connecting = Box::pin(host.connect(3));
    assert!(poll(connecting.as_mut()).is_none());
    third.expect_nothing();
    third.wait(Duration::from_secs(7200));
    third.expect_nothing();
    third.push(EVENT, 1);
    assert_eq!(third.expect(Op::Request).0.dst_port, 3);
    assert_eq!(third.device.deadline(), None);
}

/// FC#5688: the first connects after a restore were reset, because host ports were used again.
#[tokio::test]
async fn host_ports_go_on_in_sequence_after_a_restore() {
    let mut guest = Guest::new(Setup::default());
    let (_, first) = connected(&mut guest, 1, 65536).await;
    while guest.recv().is_some() {}
    let mut restored = guest.restored();
    restored.pump();
    restored.inbox.clear();
    let (_, second) = connected(&mut restored, 1, 65536).await;
    assert_eq!(second.host_port, first.host_port + 1);
}

/// FC#5958: TX stalled after a restore, because the kick that the device had missed was not
/// repeated.
#[tokio::test]
async fn a_packet_that_was_available_before_the_snapshot_is_served_after_it() {
    for event_idx in [true, false] {
        let mut guest = Guest::new(Setup {
            event_idx,
            ..Setup::default()
        });
        guest.pump();
        let socket = guest.socket(1, 2, 10);
        guest.send(socket.header(Op::Data), &[]);
        let mut restored = guest.restored();
        let (reset, _) = restored.expect(Op::Reset);
        assert!(socket.is_for(&reset));
        restored.send(socket.header(Op::Data), &[]);
        restored.expect(Op::Reset);
    }
}

#[tokio::test]
async fn a_durable_connection_goes_on_with_exact_credit() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1024, 1000).await;
    let (_other, other_socket) = connected(&mut guest, 7, 1000).await;
    stream.mark_durable();
    stream.write_all(&[1; 600]).await.unwrap();
    guest.expect(Op::Data);
    socket.consumed = 400;
    let data = socket.data(5000);
    guest.send(data, &[2; 5000]);
    guest.pump();
    stream.read_exact(&mut [0; 5000]).await.unwrap();
    guest.expect_nothing();
    let ports = (stream.guest_port(), stream.host_port());
    let mut restored = guest.restored();
    // The other connection ends by a reset packet: a transport reset would end the durable one too.
    let (reset, _) = restored.expect(Op::Reset);
    assert!(other_socket.is_for(&reset));
    assert!(restored.events.is_empty());
    let mut again = restored.host.reattach(ports.0, ports.1).unwrap();
    assert!(restored.host.reattach(ports.0, ports.1).is_none());
    again.write_all(&[3; 900]).await.unwrap();
    // 1000 of window, 600 sent, 400 consumed: 800 are left.
    let (header, payload) = restored.expect(Op::Data);
    assert_eq!((payload.len(), header.fwd_cnt), (800, 5000));
    let data = socket.data(2);
    restored.send(data, b"hi");
    restored.pump();
    let mut hi = [0; 2];
    again.read_exact(&mut hi).await.unwrap();
    assert_eq!(&hi, b"hi");
    // The stream from before the restore belongs to a VM that has ended.
    let error = stream.read(&mut hi).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn a_clone_of_a_clone_goes_on_too() {
    let mut guest = Guest::new(Setup::default());
    let (stream, mut socket) = connected(&mut guest, 1024, 1000).await;
    stream.mark_durable();
    let (guest_port, host_port) = (1024, stream.host_port());
    for round in 0..3 {
        guest = guest.restored();
        // Every other round does not reattach the connection.
        if round % 2 == 1 {
            let mut again = guest.host.reattach(guest_port, host_port).unwrap();
            again.write_all(b"x").await.unwrap();
            guest.expect(Op::Data);
            socket.consumed += 1;
            guest.send(socket.header(Op::CreditUpdate), &[]);
            guest.pump();
            std::mem::forget(again);
        }
    }
    assert!(guest.host.reattach(guest_port, host_port).is_some());
}

#[tokio::test]
async fn a_durable_connection_with_something_in_flight_is_reset() {
    type Disturb = fn(&mut Guest, &mut Socket);
    let disturb: &[(&str, Disturb)] = &[
        ("unread data", |g, s| {
            let data = s.data(1);
            g.send(data, &[1]);
        }),
        ("closed half", |g, s| g.send(s.shutdown(SEND), &[])),
    ];
    for (name, disturb) in disturb {
        let mut guest = Guest::new(Setup::default());
        let (stream, mut socket) = connected(&mut guest, 1024, 1000).await;
        stream.mark_durable();
        disturb(&mut guest, &mut socket);
        guest.pump();
        let port = stream.host_port();
        let mut restored = guest.restored();
        restored.pump();
        assert_eq!(restored.events, [0], "{name}");
        assert!(restored.host.reattach(1024, port).is_none(), "{name}");
    }
    // A byte was written, but the guest has no room for it.
    let mut guest = Guest::new(Setup::default());
    let (mut stream, _) = connected(&mut guest, 1024, 0).await;
    stream.mark_durable();
    stream.write_all(b"x").await.unwrap();
    guest.pump();
    assert_eq!(guest.device.save().conns()[0].outcome, RestoreOutcome::Lost);
}

#[tokio::test]
async fn a_snapshot_without_connections_disturbs_nobody() {
    let mut guest = Guest::new(Setup::default()).restored();
    guest.pump();
    assert!(guest.events.is_empty() && guest.inbox.is_empty());
}

#[tokio::test]
async fn a_credit_announcement_that_was_due_is_not_lost_by_a_restore() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1024, 1000).await;
    stream.mark_durable();
    for _ in 0..4 {
        let data = socket.data(65_000);
        guest.send(data, &[0; 65_000]);
        guest.pump();
    }
    // The host has read the data but not announced that: the guest counts 2 KiB of credit left.
    stream.read_exact(&mut vec![0; 260_000]).await.unwrap();
    let mut restored = guest.restored();
    let (update, _) = restored.expect(Op::CreditUpdate);
    assert_eq!(update.fwd_cnt, 260_000);
}

#[test]
fn a_bad_state_is_refused_field_by_field() {
    let credit = CreditState {
        window: WIDE_WINDOW,
        consumed: 0,
        announced: 0,
        sent: 0,
        allocated: 0,
        forwarded: 0,
    };
    let conn = |host_port, outcome| ConnState {
        host_port,
        guest_port: 1,
        outcome,
    };
    let good = RawVsockState {
        guest_cid: 3,
        next_port: 1 << 30,
        reset_pending: false,
        conns: vec![
            conn(9, RestoreOutcome::Durable(credit)),
            conn(10, RestoreOutcome::Lost),
        ],
    };
    let state = VsockState::try_from(good.clone()).unwrap();
    assert_eq!(through_serde(&state), state);
    let bad = |change: &dyn Fn(&mut RawVsockState)| {
        let mut raw = good.clone();
        change(&mut raw);
        VsockState::try_from(raw).unwrap_err()
    };
    for cid in [0, 2, 0xFFFF_FFFF, u64::MAX] {
        assert_eq!(bad(&|raw| raw.guest_cid = cid), StateError::Cid(cid));
    }
    for port in [0, (1 << 30) - 1, u32::MAX] {
        assert_eq!(bad(&|raw| raw.next_port = port), StateError::Port(port));
    }
    assert_eq!(
        bad(&|raw| raw.conns.push(conn(10, RestoreOutcome::Refused))),
        StateError::Twice { host: 10, guest: 1 }
    );
    assert!(matches!(
        bad(&|raw| raw.conns = (0..5000)
            .map(|port| conn(port, RestoreOutcome::Lost))
            .collect()),
        StateError::TooMany(5000)
    ));
    for window in [0, 1, WIDE_WINDOW + 1, u32::MAX] {
        let outcome = RestoreOutcome::Durable(CreditState { window, ..credit });
        assert_eq!(
            bad(&|raw| raw.conns[0].outcome = outcome),
            StateError::Window(window)
        );
    }
    let wide = |raw: &mut RawVsockState| {
        raw.conns = (0..300)
            .map(|port| conn(port, RestoreOutcome::Durable(credit)))
            .collect();
    };
    assert_eq!(bad(&wide), StateError::Window(WIDE_WINDOW));
    let outcome = RestoreOutcome::Durable(CreditState {
        announced: 1,
        ..credit
    });
    assert_eq!(
        bad(&|raw| raw.conns[0].outcome = outcome),
        StateError::Credit { host: 9, guest: 1 }
    );
}
