//! A guest that breaks the rules of queues: the device stops.

use super::*;
use crate::virtio::vsock::testing::{RX, TX};
use crate::virtio::{Fault, Progress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Address, length, flags, next.
type Desc = (u64, u32, u16, u16);

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

/// CVE-2019-18960, Kata: only the start of a guest range was checked. Other malformed chains are
/// tried as well.
#[tokio::test]
async fn malformed_tx_chains_are_faults() {
    let end = 4 << 20;
    let outside = "outside guest memory";
    let short = "shorter than its header";
    let attacks: &[(&str, &[Desc], &str)] = &[
        ("starts outside memory", &[(end, 44, 0, 0)], outside),
        ("ends outside memory", &[(end - 43, 44, 0, 0)], outside),
        (
            "payload ends outside memory",
            &[(0x20_0000, 44, NEXT, 1), (end - 10, 100, 0, 0)],
            outside,
        ),
        ("address wraps", &[(u64::MAX - 10, 44, 0, 0)], outside),
        ("length of 4 GiB", &[(0x20_0000, u32::MAX, 0, 0)], outside),
        ("zero length", &[(0x20_0000, 0, 0, 0)], short),
        ("shorter than a header", &[(0x20_0000, 43, 0, 0)], short),
        ("only writable", &[(0x20_0000, 44, WRITE, 0)], short),
        (
            "loop of empty descriptors",
            &[(0x20_0000, 0, NEXT, 1), (0x20_0000, 0, NEXT, 0)],
            short,
        ),
        (
            "next outside the table",
            &[(0x20_0000, 20, NEXT, 9999)],
            short,
        ),
        (
            "indirect table outside memory",
            &[(end, 16, INDIRECT, 0)],
            short,
        ),
        (
            "indirect table of odd size",
            &[(0x20_0000, 17, INDIRECT, 0)],
            short,
        ),
        (
            "empty indirect table",
            &[(0x20_0000, 0, INDIRECT, 0)],
            short,
        ),
    ];
    for (name, descs, why) in attacks {
        let mut guest = Guest::new(Setup::default());
        let (mut stream, _) = connected(&mut guest, 1, 65536).await;
        let fault = attack_tx(&mut guest, descs).unwrap_err().to_string();
        assert!(fault.contains(why), "{name}: {fault}");
        // The host's streams fail instead of waiting for a device that has stopped.
        let error = stream.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{name}");
        // The driver can reset the device and start again.
        guest.reset();
        guest.activate();
        connected(&mut guest, 2, 65536).await;
    }
}

/// A loop of descriptors is read only up to the longest packet.
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

/// Of an indirect table of 65535 descriptors, which was not negotiated, no more are read than of a
/// direct chain. Its packet is accepted if its header is among them.
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
        // More available chains than the queue has entries.
        for _ in 0..200 {
            guest.rings[queue].push(&guest.ram, 0);
        }
        guest.kick();
        let fault = guest.try_pump().unwrap_err().to_string();
        assert!(fault.contains("available ring index"), "{queue}: {fault}");
    }
    let mut guest = Guest::new(Setup::default());
    guest.rings[TX].push(&guest.ram, 5000);
    guest.kick();
    let fault = guest.try_pump().unwrap_err().to_string();
    assert!(
        fault.contains("descriptor index"),
        "a head outside the table: {fault}"
    );
}

#[tokio::test]
async fn rx_buffers_that_hold_no_packet_are_faults() {
    let end = 4 << 20;
    let space = "without space for a packet";
    for (name, addr, len, flags, why) in [
        ("no payload fits", 0x10_0000, 44, WRITE, space),
        ("no header fits", 0x10_0000, 43, WRITE, space),
        ("read-only", 0x10_0000, 4096, 0, space),
        (
            "ends outside memory",
            end - 100,
            101,
            WRITE,
            "outside guest memory",
        ),
    ] {
        let mut guest = Guest::new(Setup {
            rx_buffers: 0,
            ..Setup::default()
        });
        guest.rings[RX].write_desc(&guest.ram, 0, addr, len, flags, 0);
        guest.rings[RX].push(&guest.ram, 0);
        guest.kick();
        // The device does not look at the buffer before it has a packet.
        guest.pump();
        guest.send(guest.socket(1, 2, 10).header(Op::Data), &[]);
        let fault = guest.try_pump().unwrap_err().to_string();
        assert!(fault.contains(why), "{name}: {fault}");
    }
}

/// However many chains are available, a turn serves at most 64: up to 32 of TX, and RX gets the
/// rest.
#[tokio::test]
async fn a_turn_takes_64_chains_in_both_directions_together() {
    let mut guest = Guest::new(Setup {
        rx_buffers: 64,
        ..Setup::default()
    });
    // The packet belongs to no connection: each copy is answered with a reset.
    let packet = guest.socket(1, 2, 10).header(Op::Data).encode();
    let at = 0x3f_0000;
    let place = vm_memory::GuestAddress(at);
    vm_memory::Bytes::write_slice(guest.ram.map(), &packet, place).unwrap();
    guest.rings[TX].write_desc(&guest.ram, 127, at, 44, 0, 0);
    for _ in 0..128 {
        guest.rings[TX].push(&guest.ram, 127);
    }
    for (taken, given, progress) in [
        (32, 32, Progress::More),
        (32, 32, Progress::More),
        // No RX buffers are left, so the resets wait.
        (32, 0, Progress::More),
        (32, 0, Progress::More),
        (0, 0, Progress::Idle),
    ] {
        assert_eq!(guest.device.run().unwrap(), progress);
        let mut used = |queue: usize| {
            let mut count = 0;
            while guest.rings[queue].pop(&guest.ram).is_some() {
                count += 1;
            }
            count
        };
        assert_eq!((used(TX), used(RX)), (taken, given));
    }
}
