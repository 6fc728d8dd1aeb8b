//! Attacks on the socket device by packets with false content; those on single connections are in
//! `vsock/tests/hostile.rs`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::vsock::VsockStream;
use crate::virtio::vsock::packet::{Header, Op};
use crate::virtio::vsock::testing::{Guest, RX, Setup, Socket, TX};

/// Address of the tests' own packets, beyond the memory that [`Guest`] uses.
const PACKET: u64 = 0x3f_0000;
const PORT: u32 = 5;

/// Returns a connection that the guest opened.
async fn accepted(guest: &mut Guest, port: u32) -> (VsockStream, Socket) {
    let mut listener = guest.host.listen(PORT).unwrap();
    let mut socket = guest.socket(port, PORT, 65536);
    guest.send(socket.header(Op::Request), &[]);
    let (response, _) = guest.expect(Op::Response);
    socket.hear(&response);
    (listener.accept().await.unwrap(), socket)
}

/// Another vCPU changes a header while the device reads it: the device copies the header once, so
/// that it sees one value or the other, never a length that grew after it was checked.
#[tokio::test]
async fn a_header_changed_while_it_is_read_is_one_or_the_other() {
    let mut guest = Guest::new(Setup::default());
    let stop = Arc::new(AtomicBool::new(false));
    let (memory, over) = (guest.ram.clone(), Arc::clone(&stop));
    let other_vcpu = std::thread::spawn(move || {
        let len = GuestAddress(PACKET + 24);
        while !over.load(Ordering::Relaxed) {
            for value in [u32::MAX, 10, 11] {
                memory.map().store(value, len, Ordering::Relaxed).unwrap();
            }
        }
    });
    let (mut taken, mut refused) = (0, 0);
    for port in 0..50_000 {
        let (mut stream, mut socket) = accepted(&mut guest, port).await;
        let bytes = [&socket.data(10).encode()[..], &[7; 10]].concat();
        guest
            .ram
            .map()
            .write_slice(&bytes, GuestAddress(PACKET))
            .unwrap();
        guest.rings[TX].write_desc(&guest.ram, 127, PACKET, 54, 0, 0);
        // Waits until the other thread has changed it; otherwise the device would always read the
        // value written above.
        let seen = || {
            guest
                .ram
                .map()
                .read_obj::<u32>(GuestAddress(PACKET + 24))
                .unwrap()
        };
        while seen() == 10 {
            std::thread::yield_now();
        }
        guest.push(TX, 127);
        guest.pump();
        let mut data = [0; 64];
        match stream.read(&mut data).await {
            Ok(n) => {
                assert_eq!(data[..n], [7; 10]);
                taken += 1;
                guest.send(socket.header(Op::Reset), &[]);
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                guest.expect(Op::Reset);
                refused += 1;
            }
        }
        guest.expect_nothing();
        if taken > 20 && refused > 20 {
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    other_vcpu.join().unwrap();
    assert!(taken > 0 && refused > 0, "{taken} taken, {refused} refused");
    assert_eq!(guest.connections(), 0);
}

/// More consumed than was sent, or no buffer at all: the guest stalls its own connection, which
/// asks for credit once, not at every false update.
#[tokio::test]
async fn credit_that_cannot_be_stalls_its_own_connection() {
    for (attack, window, ahead) in [
        ("more consumed than sent", u32::MAX - 1, 1),
        ("2 GiB more consumed than sent", u32::MAX >> 1, 1 << 31),
        ("no buffer at all", 0, 0),
    ] {
        let mut guest = Guest::new(Setup::default());
        let (mut stream, socket) = accepted(&mut guest, 1).await;
        let lie = Header {
            buf_alloc: window,
            fwd_cnt: ahead,
            ..socket.header(Op::CreditUpdate)
        };
        guest.send(lie, &[]);
        guest.pump();
        stream.write_all(b"hello").await.unwrap();
        guest.expect(Op::CreditRequest);
        for _ in 0..100 {
            guest.send(lie, &[]);
            guest.expect_nothing();
        }
        // A correct update resumes the connection.
        guest.send(socket.header(Op::CreditUpdate), &[]);
        let (_, data) = guest.expect(Op::Data);
        assert_eq!(data, b"hello", "{attack}");
    }
}

#[tokio::test]
async fn a_flood_of_credit_requests_has_one_answer_at_a_time() {
    let mut guest = Guest::new(Setup {
        rx_buffers: 4,
        ..Setup::default()
    });
    guest.refill = false;
    let (_stream, socket) = accepted(&mut guest, 1).await;
    let mut answers = 0;
    for _ in 0..1000 {
        guest.send(socket.header(Op::CreditRequest), &[]);
        guest.pump();
        answers += guest.inbox.drain(..).count();
    }
    // One answer for each free buffer, then one pending; the guest could go on sending.
    assert_eq!(answers, 3);
    for at in 0..4 {
        guest.post_rx(at);
    }
    guest.expect(Op::CreditUpdate);
    guest.expect_nothing();
}

#[tokio::test]
async fn a_shutdown_with_flags_that_do_not_exist_is_what_its_known_flags_say() {
    for (flags, ends) in [(u32::MAX, true), (!3, false), (0x8000_0001, false)] {
        let mut guest = Guest::new(Setup::default());
        let (_stream, socket) = accepted(&mut guest, 1).await;
        let header = Header {
            flags,
            ..socket.header(Op::Shutdown)
        };
        guest.send(header, &[]);
        if ends {
            guest.expect(Op::Reset);
        }
        guest.expect_nothing();
        assert_eq!(guest.connections(), usize::from(!ends), "{flags:#x}");
    }
}

#[tokio::test]
async fn a_reset_in_the_middle_of_a_transfer_ends_its_streams_and_no_more() {
    let mut guest = Guest::new(Setup {
        rx_buffers: 2,
        ..Setup::default()
    });
    guest.refill = false;
    let (mut stream, mut socket) = accepted(&mut guest, 1).await;
    // Both directions: to the guest more than it has buffers for, from the guest 1000 bytes.
    stream.write_all(&[5; 60_000]).await.unwrap();
    let data = socket.data(1000);
    guest.send(data, &[6; 1000]);
    guest.pump();
    guest.reset();
    let error = stream.write_all(&[5; 300_000]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // Received data stays readable; then comes the error.
    let mut bytes = Vec::new();
    let error = stream.read_to_end(&mut bytes).await.unwrap_err();
    assert_eq!(
        (bytes.len(), error.kind()),
        (1000, io::ErrorKind::ConnectionReset)
    );
    guest.refill = true;
    guest.inbox.clear();
    guest.activate();
    assert_eq!(guest.connections(), 0);
    accepted(&mut guest, 1).await;
}

/// The packet is written where the guest said, over the guest's own index.
#[tokio::test]
async fn a_packet_delivered_over_the_ring_needs_a_reset() {
    let mut guest = Guest::new(Setup {
        rx_buffers: 0,
        ..Setup::default()
    });
    // The driver ring of queue 0 in `Ring`.
    let driver = 0x5000;
    guest.rings[RX].write_desc(&guest.ram, 0, driver, 4096, 2, 0);
    guest.push(RX, 0);
    for _ in 0..2 {
        guest.send(guest.socket(1, 2, 10).header(Op::Data), &[]);
    }
    let fault = guest.try_pump().unwrap_err().to_string();
    assert!(fault.contains("available ring index"), "{fault}");
    let source: u64 = guest.ram.map().read_obj(GuestAddress(driver)).unwrap();
    assert_eq!(source, 2, "the packet lies over the ring");
    guest.reset();
    guest.activate();
    guest.post_rx(0);
    accepted(&mut guest, 1).await;
}
