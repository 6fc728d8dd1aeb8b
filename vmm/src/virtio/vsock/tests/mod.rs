//! Tests of the device with a guest's driver on real guest memory. Each kind of fault that users of
//! such devices have reported has a test here.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

mod bulk;
mod faults;
mod hostile;
mod model;
mod progress;
mod queues;
mod restore;
mod unix;

use super::packet::{Header, Op, ShutdownFlags};
use super::testing::{Guest, Setup, Socket};
use super::*;
use crate::virtio::VirtioDevice;

const SEND: ShutdownFlags = ShutdownFlags {
    send: true,
    receive: false,
};
const RECEIVE: ShutdownFlags = ShutdownFlags {
    send: false,
    receive: true,
};

fn shut(header: &Header) -> ShutdownFlags {
    ShutdownFlags::from_flags(header.flags)
}

/// Polls the future once.
fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Option<F::Output> {
    // Outside tokio's cooperative budget, which would report ready operations as pending.
    let future = std::pin::pin!(tokio::task::unconstrained(future));
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// Runs `future`, and pumps the guest whenever the future is pending.
async fn drive<F: Future>(guest: &mut Guest, future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    loop {
        tokio::select! {
            biased;
            output = &mut future => return output,
            () = tokio::task::yield_now() => guest.pump(),
        }
    }
}

/// Opens a connection from the host.
async fn connected(guest: &mut Guest, port: u32, window: u32) -> (VsockStream, Socket) {
    let host = guest.host.clone();
    let mut connecting = Box::pin(host.connect(port));
    assert!(poll(connecting.as_mut()).is_none());
    let (request, _) = guest.expect(Op::Request);
    let socket = Socket::answering(&request, window);
    guest.send(socket.header(Op::Response), &[]);
    let stream = drive(guest, connecting).await.unwrap();
    (stream, socket)
}

#[tokio::test]
async fn the_host_connects_writes_reads_and_closes() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1024, 65536).await;
    stream.write_all(b"ping").await.unwrap();
    let (header, payload) = guest.expect(Op::Data);
    assert_eq!(payload, b"ping");
    assert_eq!((header.dst_port, header.buf_alloc), (1024, WIDE_WINDOW));
    socket.consumed += 4;
    let answer = socket.data(4);
    guest.send(answer, b"pong");
    guest.pump();
    let mut buf = [0; 8];
    assert_eq!(stream.read(&mut buf).await.unwrap(), 4);
    assert_eq!(&buf[..4], b"pong");
    drop(stream);
    let (header, _) = guest.expect(Op::Shutdown);
    assert_eq!(ShutdownFlags::from_flags(header.flags), ShutdownFlags::BOTH);
    assert_eq!(header.fwd_cnt, 4);
    guest.send(socket.header(Op::Reset), &[]);
    guest.expect_nothing();
}

#[tokio::test]
async fn the_guest_connects_to_a_listener() {
    let mut guest = Guest::new(Setup::default());
    let mut listener = guest.host.listen(52).unwrap();
    let mut socket = guest.socket(4000, 52, 65536);
    guest.send(socket.header(Op::Request), &[]);
    let (response, _) = guest.expect(Op::Response);
    socket.hear(&response);
    let mut stream = listener.accept().await.unwrap();
    assert_eq!((stream.host_port(), stream.guest_port()), (52, 4000));
    let data = socket.data(5);
    guest.send(data, b"hello");
    guest.send(socket.shutdown(SEND), &[]);
    let mut text = String::new();
    drive(&mut guest, stream.read_to_string(&mut text))
        .await
        .unwrap();
    assert_eq!(text, "hello");
    stream.write_all(b"bye").await.unwrap();
    stream.shutdown().await.unwrap();
    let (_, payload) = guest.expect(Op::Data);
    assert_eq!(payload, b"bye");
    let (header, _) = guest.expect(Op::Shutdown);
    assert_eq!(ShutdownFlags::from_flags(header.flags), SEND);
    guest.send(socket.shutdown(ShutdownFlags::BOTH), &[]);
    guest.expect(Op::Reset);
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    let error = stream.write(b"x").await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    drop(stream);
    guest.expect_nothing();
}

#[tokio::test]
async fn connect_is_refused_at_once_when_nothing_listens() {
    let mut guest = Guest::new(Setup::default());
    let host = guest.host.clone();
    let mut connecting = Box::pin(host.connect(7));
    assert!(poll(connecting.as_mut()).is_none());
    let (request, _) = guest.expect(Op::Request);
    guest.send(request.refusal().unwrap(), &[]);
    let outcome = drive(&mut guest, connecting).await;
    assert_eq!(outcome.unwrap_err(), ConnectError::Refused(7));
}

#[tokio::test]
async fn both_sides_close_their_sending_direction_and_then_all() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    stream.write_all(b"last").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(guest.expect(Op::Data).1, b"last");
    assert_eq!(shut(&guest.expect(Op::Shutdown).0), SEND);
    let error = stream.write(b"more").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    let data = socket.data(2);
    guest.send(data, b"ok");
    guest.send(socket.shutdown(SEND), &[]);
    guest.expect_nothing();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "ok");
    drop(stream);
    assert_eq!(shut(&guest.expect(Op::Shutdown).0), ShutdownFlags::BOTH);
    guest.send(socket.header(Op::Reset), &[]);
    guest.expect_nothing();
    assert_eq!(guest.connections(), 0);
}

#[tokio::test]
async fn a_reset_is_an_error_and_not_the_end_of_the_data() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    let data = socket.data(3);
    guest.send(data, b"abc");
    guest.send(socket.header(Op::Reset), &[]);
    guest.expect_nothing();
    let mut bytes = Vec::new();
    let error = stream.read_to_end(&mut bytes).await.unwrap_err();
    assert_eq!(
        (error.kind(), bytes.as_slice()),
        (io::ErrorKind::ConnectionReset, &b"abc"[..])
    );
    let error = stream.write(b"x").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_guest_that_stops_receiving_breaks_the_writers_pipe() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, socket) = connected(&mut guest, 1, 10).await;
    let mut write = Box::pin(stream.write_all(&[1; 300_000]));
    assert!(poll(write.as_mut()).is_none());
    assert_eq!(guest.expect(Op::Data).1.len(), 10);
    guest.send(socket.shutdown(RECEIVE), &[]);
    let error = drive(&mut guest, write).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn what_was_written_before_the_drop_arrives() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 1000).await;
    stream.write_all(&[7; 2500]).await.unwrap();
    drop(stream);
    assert_eq!(guest.expect(Op::Data).1.len(), 1000);
    // The guest learns at once that the host has stopped reading and has more data to send.
    assert_eq!(shut(&guest.expect(Op::Shutdown).0), RECEIVE);
    guest.expect(Op::CreditRequest);
    for (n, left) in [(1000, 500), (500, 0)] {
        guest.expect_nothing();
        socket.consumed += 1000;
        guest.send(socket.header(Op::CreditUpdate), &[]);
        assert_eq!(guest.expect(Op::Data).1.len(), n);
        if left > 0 {
            guest.expect(Op::CreditRequest);
        }
    }
    assert_eq!(shut(&guest.expect(Op::Shutdown).0), ShutdownFlags::BOTH);
    // Data in flight is discarded, but does not cause a reset.
    let data = socket.data(3);
    guest.send(data, b"abc");
    guest.expect_nothing();
    guest.send(socket.header(Op::Reset), &[]);
    guest.expect_nothing();
    assert_eq!(guest.connections(), 0);
}

#[tokio::test]
async fn closing_ends_streams_connects_and_accepts() {
    let mut guest = Guest::new(Setup::default());
    let host = guest.host.clone();
    let mut listener = host.listen(5).unwrap();
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    let data = socket.data(3);
    guest.send(data, b"end");
    guest.pump();
    let pending = tokio::spawn({
        let host = host.clone();
        async move { host.connect(9).await }
    });
    tokio::task::yield_now().await;
    host.close();
    assert_eq!(pending.await.unwrap().unwrap_err(), ConnectError::VmEnded);
    assert_eq!(listener.accept().await.unwrap_err(), ListenError::VmEnded);
    assert_eq!(host.connect(1).await.unwrap_err(), ConnectError::VmEnded);
    assert_eq!(host.listen(6).unwrap_err(), ListenError::VmEnded);
    let mut bytes = Vec::new();
    let error = stream.read_to_end(&mut bytes).await.unwrap_err();
    assert_eq!(
        (error.kind(), bytes.as_slice()),
        (io::ErrorKind::ConnectionAborted, &b"end"[..])
    );
    // The device may still run once, and the parts may be dropped in any order.
    guest.kick();
    guest.pump();
    drop(guest);
    let error = stream.write(b"x").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    assert_eq!(host.connect(1).await.unwrap_err(), ConnectError::VmEnded);
}

#[tokio::test]
async fn dropping_the_device_wakes_who_waits() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, _) = connected(&mut guest, 1, 65536).await;
    let reading = tokio::spawn(async move { stream.read(&mut [0; 8]).await });
    tokio::task::yield_now().await;
    drop(guest);
    let error = reading.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn a_driver_reset_ends_what_the_guest_knew_and_keeps_what_it_did_not() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, _) = connected(&mut guest, 1, 65536).await;
    let host = guest.host.clone();
    let mut asked = Box::pin(host.connect(2));
    assert!(poll(asked.as_mut()).is_none());
    guest.expect(Op::Request);
    let mut waiting = Box::pin(host.connect(3));
    assert!(poll(waiting.as_mut()).is_none());
    guest.reset();
    let error = stream.read(&mut [0; 8]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(asked.await.unwrap_err(), ConnectError::Refused(2));
    guest.activate();
    let (request, _) = guest.expect(Op::Request);
    assert_eq!(request.dst_port, 3);
    let socket = Socket::answering(&request, 1000);
    guest.send(socket.header(Op::Response), &[]);
    drop(drive(&mut guest, waiting).await.unwrap());
    guest.expect(Op::Shutdown);
    assert_eq!(guest.connections(), 1);
}

#[tokio::test]
async fn a_listener_that_goes_closes_what_it_did_not_accept() {
    let mut guest = Guest::new(Setup::default());
    let listener = guest.host.listen(5).unwrap();
    assert_eq!(guest.host.listen(5).unwrap_err(), ListenError::InUse(5));
    let socket = guest.socket(100, 5, 1000);
    guest.send(socket.header(Op::Request), &[]);
    guest.expect(Op::Response);
    drop(listener);
    assert_eq!(shut(&guest.expect(Op::Shutdown).0), ShutdownFlags::BOTH);
    guest.send(socket.header(Op::Reset), &[]);
    let other = guest.socket(101, 5, 1000);
    guest.send(other.header(Op::Request), &[]);
    let (reset, _) = guest.expect(Op::Reset);
    assert!(other.is_for(&reset));
    guest.host.listen(5).unwrap();
}

#[test]
fn configuration_space_is_the_context_id_and_nothing_else() {
    let guest = Guest::inactive(Setup::default());
    let read = |offset, len| {
        let mut bytes = vec![0xAA; len];
        guest.device.read_config(offset, &mut bytes);
        bytes
    };
    assert_eq!(read(0, 8), [3, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(0, 12), [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(7, 3), [0; 3]);
    assert_eq!(read(u64::MAX, 4), [0; 4]);
    assert!(read(1, 0).is_empty());
    assert_eq!(
        (guest.device.device_type(), guest.device.features()),
        (19, 1 << 32 | 1 << 29)
    );
}

#[test]
fn the_device_needs_all_its_queues() {
    let mut guest = Guest::inactive(Setup::default());
    for missing in 0..3 {
        let mut activation = guest.activation([(0, 0); 3]);
        activation.queues[missing] = None;
        assert!(guest.device.activate(activation).is_err());
    }
}

#[test]
fn handles_are_what_tokio_tasks_need() {
    fn assert<T: Send + Sync + Unpin + 'static>() {}
    assert::<VsockStream>();
    assert::<VsockListener>();
    assert::<VsockHost>();
}

#[tokio::test]
async fn the_host_decides_on_ports_without_a_listener() {
    let mut guest = Guest::new(Setup::default());
    let mut named = guest.host.listen(5).unwrap();
    let mut any = guest.host.listen_any().unwrap();
    assert_eq!(guest.host.listen_any().unwrap_err(), ListenError::AnyInUse);
    let ask = |guest: &mut Guest, guest_port, host_port| {
        let socket = guest.socket(guest_port, host_port, 1000);
        guest.send(socket.header(Op::Request), &[]);
        guest.pump();
        socket
    };
    ask(&mut guest, 1, 5);
    guest.expect(Op::Response);
    named.accept().await.unwrap();
    guest.expect(Op::Shutdown);
    // The guest gets no answer before the host has decided.
    let socket = ask(&mut guest, 2, 6);
    guest.expect_nothing();
    let incoming = any.next().await.unwrap();
    assert_eq!((incoming.host_port(), incoming.guest_port()), (6, 2));
    guest.expect_nothing();
    let mut stream = incoming.accept();
    stream.write_all(b"hi").await.unwrap();
    assert!(socket.is_for(&guest.expect(Op::Response).0));
    guest.expect(Op::Data);
    // Requests that are refused, reset by the guest, and never taken from the listener.
    ask(&mut guest, 3, 7);
    drop(any.next().await.unwrap());
    guest.expect(Op::Reset);
    let socket = ask(&mut guest, 4, 7);
    guest.send(socket.header(Op::Reset), &[]);
    guest.pump();
    let error = any.next().await.unwrap().accept().read(&mut [0]).await;
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    ask(&mut guest, 5, 7);
    drop(any);
    guest.expect(Op::Reset);
    ask(&mut guest, 6, 7);
    guest.expect(Op::Reset);
    guest.expect_nothing();
    assert_eq!(guest.connections(), 2);
}

#[tokio::test]
async fn a_guest_that_always_has_data_does_not_starve_other_tasks() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    let data = socket.data(65536);
    guest.send(data, &[0; 65536]);
    guest.pump();
    let mut reads = Box::pin(async {
        for _ in 0..65536 {
            stream.read_exact(&mut [0]).await.unwrap();
        }
    });
    let mut others = 0;
    tokio::select! {
        biased;
        () = &mut reads => {}
        () = async { loop { tokio::task::yield_now().await; others += 1; } } => {}
    }
    assert!(others > 100, "{others}");
}

/// A waker that calls back into its device, as wakers may.
#[derive(Debug)]
struct Busy {
    host: VsockHost,
    woken: std::sync::atomic::AtomicUsize,
}

impl std::task::Wake for Busy {
    fn wake(self: Arc<Self>) {
        assert_eq!(self.host.listen(7).map(|listener| listener.port()), Ok(7));
        let _ = self.host.reattach_all();
        self.woken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

/// Regression: the event thread held the device's lock while it called wakers, and deadlocked.
#[tokio::test]
async fn a_waker_finds_no_lock_of_the_device_held() {
    let mut guest = Guest::new(Setup::default());
    let (mut stream, mut socket) = connected(&mut guest, 1, 65536).await;
    let mut listener = guest.host.listen(5).unwrap();
    let busy = Arc::new(Busy {
        host: guest.host.clone(),
        woken: Default::default(),
    });
    let waker = Waker::from(Arc::clone(&busy));
    let mut cx = Context::from_waker(&waker);
    let woken = || busy.woken.load(std::sync::atomic::Ordering::SeqCst);
    // Data wakes a reader.
    let mut bytes = [0; 8];
    let mut into = ReadBuf::new(&mut bytes);
    assert!(
        Pin::new(&mut stream)
            .poll_read(&mut cx, &mut into)
            .is_pending()
    );
    let data = socket.data(1);
    guest.send(data, &[1]);
    guest.pump();
    assert_eq!(woken(), 1);
    // A request wakes the task that accepts.
    let mut accepting = Box::pin(listener.accept());
    assert!(accepting.as_mut().poll(&mut cx).is_pending());
    let request = guest.socket(1000, 5, 65536);
    guest.send(request.header(Op::Request), &[]);
    guest.pump();
    assert_eq!(woken(), 2);
    let accepted = accepting.as_mut().poll(&mut cx);
    assert!(accepted.is_ready());
    guest.expect(Op::Response);
    // The response wakes the task that connects.
    let host = guest.host.clone();
    let mut connecting = Box::pin(host.connect(2));
    assert!(connecting.as_mut().poll(&mut cx).is_pending());
    let (request, _) = guest.expect(Op::Request);
    let answer = Socket::answering(&request, 65536);
    guest.send(answer.header(Op::Response), &[]);
    guest.pump();
    assert_eq!(woken(), 3);
    assert!(connecting.as_mut().poll(&mut cx).is_ready());
}
