//! The device against a guest's driver on real guest memory. Kinds of fault that users of such
//! devices have reported each have a test here.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::packet::{Op, Shut};
use super::testing::{Guest, Setup, Socket};
use super::*;

/// Polls once.
fn poll<F: Future>(future: Pin<&mut F>) -> Option<F::Output> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// Runs `future`, with the guest pumped whenever it waits.
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

/// A connection that the host opened.
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
    assert_eq!(Shut::from_flags(header.flags), Shut::BOTH);
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
    guest.send(
        socket.shutdown(Shut {
            send: true,
            receive: false,
        }),
        &[],
    );
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
    assert_eq!(
        Shut::from_flags(header.flags),
        Shut {
            send: true,
            receive: false
        }
    );
    guest.send(socket.shutdown(Shut::BOTH), &[]);
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
async fn bulk_both_ways() {
    let mut guest = Guest::new(Setup::default());
    let (stream, mut socket) = connected(&mut guest, 9, 100_000).await;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let pattern = |n: usize| (0..n).map(|i| (i * 7 % 251) as u8).collect::<Vec<u8>>();
    let total = 3_000_000;
    let sent = pattern(total);
    let copy = sent.clone();
    let host = tokio::spawn(async move {
        writer.write_all(&copy).await.unwrap();
        writer.shutdown().await.unwrap();
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        got
    });
    let (mut got, mut at, mut done, mut end_sent) = (Vec::<u8>::new(), 0, false, false);
    while !(done && end_sent) {
        guest.pump();
        while let Some((header, payload)) = guest.inbox.pop_front() {
            socket.hear(&header);
            match Op::from_wire(header.op).unwrap() {
                Op::Data => {
                    got.extend(&payload);
                    socket.consumed += header.len;
                    guest.send(socket.header(Op::CreditUpdate), &[]);
                }
                Op::Shutdown => done = true,
                Op::CreditUpdate | Op::CreditRequest => {}
                op => panic!("{op:?}"),
            }
            guest.pump();
        }
        while guest.can_send() && at < total && socket.room() > 0 {
            let n = socket.room().min(total - at).min(65536);
            let header = socket.data(n);
            guest.send(header, &sent[at..at + n]);
            at += n;
        }
        if at == total && !end_sent && guest.can_send() {
            guest.send(
                socket.shutdown(Shut {
                    send: true,
                    receive: false,
                }),
                &[],
            );
            end_sent = true;
        }
        tokio::task::yield_now().await;
    }
    let echoed = drive(&mut guest, host).await.unwrap();
    assert!(got == sent);
    assert!(echoed == sent);
}
