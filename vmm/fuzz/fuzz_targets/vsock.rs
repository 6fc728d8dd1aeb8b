//! Guest packets and operations of a host program on its streams, in any order. Headers are the
//! fuzzer's choice; there are few ports, so that both sides often use the same ones.
#![no_main]

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use arbitrary::Arbitrary;
use hearth_vmm::virtio::vsock::packet::{
    HOST_CID, Header, MAX_PAYLOAD, Op as PacketOp, TYPE_STREAM,
};
use hearth_vmm::virtio::vsock::testing::{GUEST_CID, Guest, Setup};
use hearth_vmm::virtio::vsock::{ConnectError, VsockListener, VsockStream};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Runtime;

#[derive(Arbitrary, Debug)]
enum Op {
    /// A stream packet to the host; most operation numbers are defined ones.
    Packet {
        guest_port: u8,
        host_port: u8,
        op: u8,
        flags: u8,
        len: u16,
        buf_alloc: u32,
        fwd_cnt: u32,
    },
    /// Any header, and `len` bytes after it.
    Wild {
        header: [u8; 44],
        len: u16,
    },
    /// A data packet in small descriptors.
    Pieces {
        guest_port: u8,
        host_port: u8,
        len: u8,
        piece: u8,
    },
    Listen(u8),
    Unlisten(u8),
    Accept(u8),
    Connect(u8),
    Poll,
    Write {
        stream: u8,
        len: u16,
    },
    Read {
        stream: u8,
        len: u16,
    },
    Shutdown(u8),
    Drop(u8),
    Wait(u8),
    Reset,
    Restore,
}

type Connecting = Pin<Box<dyn Future<Output = Result<VsockStream, ConnectError>>>>;

#[derive(Default)]
struct Host {
    listeners: Vec<VsockListener>,
    streams: Vec<VsockStream>,
    connecting: Vec<Connecting>,
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_time().build().expect("a runtime")
    })
}

fn header(guest_port: u8, host_port: u8, op: u16, len: u32) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: u32::from(guest_port % 8) + 1,
        dst_port: host(host_port),
        len,
        kind: TYPE_STREAM,
        op,
        ..Header::default()
    }
}

/// A listener's port, or one of the range from which the device's own connections get theirs.
fn host(port: u8) -> u32 {
    match port % 16 {
        low @ 0..8 => u32::from(low) + 1,
        high => (1 << 30) + u32::from(high - 8),
    }
}

/// Does one step. An error means that the device reported a fault of the driver; the run then ends.
fn step(guest: &mut Guest, peer: &mut Host, op: Op) -> Result<(), ()> {
    let mut context = Context::from_waker(Waker::noop());
    let some = |index: u8, len: usize| usize::from(index) % len.max(1);
    match op {
        Op::Packet {
            guest_port,
            host_port,
            op,
            flags,
            len,
            buf_alloc,
            fwd_cnt,
        } if guest.can_send() => {
            // Payload mostly follows data packets (operation 5) only.
            let op = u16::from(op % 9);
            let len = if op == 5 || len > 60_000 { len } else { 0 };
            let header = Header {
                flags: flags.into(),
                buf_alloc,
                fwd_cnt,
                ..header(guest_port, host_port, op, len.into())
            };
            guest.send(header, &vec![7; len.into()]);
        }
        Op::Wild { header, len } if guest.can_send() => {
            guest.send(Header::decode(&header), &vec![1; len.into()]);
        }
        Op::Pieces {
            guest_port,
            host_port,
            len,
            piece,
        } if guest.can_send() => {
            let mut bytes = header(guest_port, host_port, 5, len.into())
                .encode()
                .to_vec();
            bytes.resize(bytes.len() + usize::from(len), 3);
            guest.post_tx(&bytes, usize::from(piece).max(1));
        }
        Op::Packet { .. } | Op::Wild { .. } | Op::Pieces { .. } => {}
        Op::Listen(port) => peer.listeners.extend(guest.host.listen(host(port % 8))),
        Op::Unlisten(at) if !peer.listeners.is_empty() => {
            peer.listeners.swap_remove(some(at, peer.listeners.len()));
        }
        Op::Accept(at) if !peer.listeners.is_empty() => {
            let at = some(at, peer.listeners.len());
            let accept = pin!(peer.listeners[at].accept());
            if let Poll::Ready(Ok(stream)) = accept.poll(&mut context) {
                peer.streams.push(stream);
            }
        }
        Op::Connect(port) => {
            let handle = guest.host.clone();
            let port = u32::from(port % 8) + 1;
            peer.connecting
                .push(Box::pin(async move { handle.connect(port).await }));
        }
        Op::Poll => {
            let _time = runtime().enter();
            let waiting = std::mem::take(&mut peer.connecting);
            for mut connecting in waiting {
                match connecting.as_mut().poll(&mut context) {
                    Poll::Ready(Ok(stream)) => peer.streams.push(stream),
                    Poll::Ready(Err(_)) => {}
                    Poll::Pending => peer.connecting.push(connecting),
                }
            }
        }
        Op::Write { stream, len } if !peer.streams.is_empty() => {
            let at = some(stream, peer.streams.len());
            let _ = Pin::new(&mut peer.streams[at]).poll_write(&mut context, &vec![5; len.into()]);
        }
        Op::Read { stream, len } if !peer.streams.is_empty() => {
            let at = some(stream, peer.streams.len());
            let mut bytes = vec![0; len.into()];
            let mut buffer = ReadBuf::new(&mut bytes);
            let _ = Pin::new(&mut peer.streams[at]).poll_read(&mut context, &mut buffer);
        }
        Op::Shutdown(stream) if !peer.streams.is_empty() => {
            let at = some(stream, peer.streams.len());
            let _ = Pin::new(&mut peer.streams[at]).poll_shutdown(&mut context);
        }
        Op::Drop(stream) if !peer.streams.is_empty() => {
            peer.streams.swap_remove(some(stream, peer.streams.len()));
        }
        Op::Wait(seconds) => guest.wait(Duration::from_secs(u64::from(seconds % 16))),
        Op::Reset => {
            guest.reset();
            guest.activate();
        }
        Op::Restore => {
            *peer = Host::default();
            guest.restore();
        }
        _ => {}
    }
    guest.try_pump().map_err(drop)
}

fuzz_target!(|ops: Vec<Op>| {
    let mut guest = Guest::new(Setup::default());
    // Wild headers have any destination, so their refusals have any source.
    guest.foreign_ok = true;
    let mut peer = Host::default();
    for op in ops.into_iter().take(200) {
        if step(&mut guest, &mut peer, op).is_err() {
            return;
        }
        for (header, payload) in guest.inbox.drain(..) {
            assert!(payload.len() <= MAX_PAYLOAD as usize);
            // A refusal names the type that was refused (as Linux's virtio_transport_reset_no_sock
            // does).
            assert!(header.kind == TYPE_STREAM || header.op == PacketOp::Reset.to_wire());
        }
    }
    // Once the host program has dropped everything and the timeouts have passed, no connection is
    // left.
    drop(peer);
    guest.wait(Duration::from_secs(60));
    assert_eq!(guest.connections(), 0);
});
