//! Attacks on the socket device by its packets.

use hearth_tests::flat::Code;
use hearth_tests::{kvm, within};
use hearth_vmm::virtio::mmio::register;
use hearth_vmm::virtio::vsock::packet::Op;
use tokio::io::AsyncReadExt;

use crate::driver::*;

const RX: u32 = 0;
const TX: u32 = 1;
/// Where packets to the guest are written, a page each.
const INBOX: u32 = 0x48_0000;
/// Port of the host's listener.
const PORT: u32 = 5;
/// Size of the host's receive buffer for a connection.
const WINDOW: usize = 256 << 10;

/// A packet's header (virtio 1.2 section 5.10.6).
#[derive(Clone, Copy)]
struct Header {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    len: u32,
    kind: u16,
    op: u16,
}

impl Header {
    fn new(op: u16) -> Self {
        Self {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x11,
            len: 0,
            kind: 1,
            op,
        }
    }

    fn store(self, code: Code, at: u32) -> Code {
        code.store64(at, self.src_cid)
            .store64(at + 8, self.dst_cid)
            .store(at + 16, self.src_port)
            .store(at + 20, PORT)
            .store(at + 24, self.len)
            .store16(at + 28, self.kind)
            .store16(at + 30, self.op)
            .store(at + 36, 0x1_0000)
    }
}

/// Starts a socket device with two buffers for packets to the guest.
fn listening() -> Code {
    let [_, driver, _] = rings(RX);
    let code = (0..2).fold(live(VSOCK), |code, index| {
        let place = (u64::from(INBOX + 0x1000 * index), 4096);
        descriptor(code, RX, index, place, WRITE, 0)
    });
    code.store(driver + 4, 1 << 16).store16(driver + 2, 2)
}

/// Waits for packet number `count` (from 0) and prints its operation and its destination port.
fn hear(code: Code, count: u16) -> Code {
    let at = INBOX + 0x1000 * u32::from(count);
    code.await_change16(rings(RX)[2] + 2, count)
        .print_byte(at + 30)
        .print_byte(at + 20)
}

const RESET: u8 = 3;

#[tokio::test]
async fn packets_that_cannot_be_read_need_a_reset() {
    if !kvm() {
        return;
    }
    let buffer = u64::from(BUFFER);
    let short = "shorter than its header";
    let outside = "outside guest memory";
    for (attack, place, flags, why) in [
        ("a packet shorter than its header", (buffer, 43), 0, short),
        ("a packet of no bytes", (buffer, 0), 0, short),
        ("a packet to be written", (buffer, 44), WRITE, short),
        ("a packet outside memory", (END, 44), 0, outside),
        (
            "a packet over the end of memory",
            (END - 40, 44),
            0,
            outside,
        ),
        ("a packet of 4 GiB", (buffer, u32::MAX), 0, outside),
    ] {
        let code = descriptor(live(VSOCK), TX, 0, place, flags, 0);
        assert_reset(attack, VSOCK, offer(code, TX, 0, 1), why).await;
    }
}

#[tokio::test]
async fn packets_that_lie_are_answered_with_a_reset_of_their_connection() {
    if !kvm() {
        return;
    }
    let data = Header::new(Op::Data.to_wire());
    for (attack, header) in [
        ("data for no connection", data),
        (
            "more payload than there is",
            Header {
                len: u32::MAX,
                ..data
            },
        ),
        ("an operation that does not exist", Header::new(99)),
        (
            "a type of socket that does not exist",
            Header { kind: 9, ..data },
        ),
        ("to another guest", Header { dst_cid: 4, ..data }),
        ("a request that nobody listens for", Header::new(1)),
        ("a response that nobody asked for", Header::new(2)),
    ] {
        let code = header.store(listening(), BUFFER);
        let code = descriptor(code, TX, 0, (BUFFER.into(), 44), 0, 0);
        let code = hear(offer(code, TX, 0, 1), 0);
        let (said, vm) = printed(code.report(1).spin()).await;
        assert_eq!(said, [RESET, 0x11], "{attack}");
        assert_no_fault(attack, &vm);
    }
}

/// The forged packet gets no answer; the valid one that follows it does.
#[tokio::test]
async fn a_packet_in_another_guests_name_reaches_nobody() {
    if !kvm() {
        return;
    }
    for src_cid in [0, 2, 4, u64::MAX, 3 | 1 << 32] {
        let foreign = Header {
            src_cid,
            ..Header::new(1)
        };
        let own = Header {
            src_port: 0x22,
            ..Header::new(1)
        };
        let code = own.store(foreign.store(listening(), BUFFER), BUFFER + 64);
        let code = descriptor(code, TX, 0, (BUFFER.into(), 44), 0, 0);
        let code = descriptor(code, TX, 1, (u64::from(BUFFER) + 64, 44), 0, 0);
        let code = code.store(rings(TX)[1] + 4, 1 << 16);
        let code = code.store16(rings(TX)[1] + 2, 2);
        let code = hear(code.write(register::QUEUE_NOTIFY, TX), 0);
        let (said, vm) = printed(code.report(1).spin()).await;
        assert_eq!(said, [RESET, 0x22], "{src_cid:#x}");
        assert_no_fault("in another guest's name", &vm);
    }
}

#[tokio::test]
async fn more_data_than_credit_resets_its_connection() {
    if !kvm() {
        return;
    }
    let code = Header::new(Op::Request.to_wire()).store(listening(), BUFFER);
    let payload = (u64::from(BUFFER) + 0x1000, 0x1_0000);
    let code = descriptor(code, TX, 0, (BUFFER.into(), 44), NEXT, 1);
    let code = hear(offer(descriptor(code, TX, 1, payload, 0, 0), TX, 0, 1), 0);
    // The host granted credit for four times 64 KiB; the fifth exceeds it. All use the same chain.
    let code = code
        .store(BUFFER + 24, 0x1_0000)
        .store16(BUFFER + 30, Op::Data.to_wire())
        .store16(rings(TX)[1] + 2, 6)
        .write(register::QUEUE_NOTIFY, TX);
    let vm = create(hear(code, 1).report(1).spin(), None);
    let mut listener = vm.vsock().listen(PORT).unwrap();
    let (said, accepted) = tokio::join!(run(&vm), listener.accept());
    assert_eq!(said, [Op::Response.to_wire() as u8, 0x11, RESET, 0x11]);
    assert_no_fault("more data than credit", &vm);
    let mut bytes = Vec::new();
    let mut stream = accepted.unwrap();
    let ended = within(5, "end of the stream", stream.read_to_end(&mut bytes)).await;
    assert_eq!(
        ended.unwrap_err().kind(),
        std::io::ErrorKind::ConnectionReset
    );
    assert_eq!(
        bytes.len(),
        WINDOW,
        "what was promised, and not a byte more"
    );
}
