//! Packets between a host's stream and a driver that plays the guest: muxer, queues and memory.

use hearth_vmm::virtio::vsock::packet::{Header, Op};
use hearth_vmm::virtio::vsock::testing::{Guest, Setup, Socket};
use hearth_vmm::virtio::vsock::{VsockListener, VsockStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;

use super::Walk;

const HOST_PORT: u32 = 4000;
/// One page, less the header that the driver's buffer holds as well.
const LEN: usize = 4096 - 44;
/// The guest's receive buffer. The guest consumes each packet at once, and reports that with each
/// answer.
const WINDOW: u32 = 256 << 10;

struct Rig {
    runtime: Runtime,
    guest: Guest,
    listener: VsockListener,
    ports: u32,
}

impl Rig {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_time().build().unwrap();
        let guest = Guest::new(Setup::default());
        let listener = guest.host.listen(HOST_PORT).unwrap();
        Self {
            runtime,
            guest,
            listener,
            ports: 1000,
        }
    }

    /// The guest connects, the host accepts.
    fn connect(&mut self) -> (Socket, VsockStream) {
        self.ports += 1;
        let mut socket = self.guest.socket(self.ports, HOST_PORT, WINDOW);
        let request = socket.header(Op::Request);
        self.guest.send(request, &[]);
        self.guest.pump();
        let stream = self.runtime.block_on(self.listener.accept()).unwrap();
        let (answer, _) = self.guest.expect(Op::Response);
        socket.hear(&answer);
        (socket, stream)
    }

    /// Takes the host's credit updates.
    fn hear(&mut self, socket: &mut Socket) {
        while let Some((header, _)) = self.guest.recv() {
            socket.hear(&header);
        }
    }
}

pub(super) fn to_guest() -> Walk {
    let mut rig = Rig::new();
    let (mut socket, mut stream) = rig.connect();
    let bytes = vec![7; LEN];
    Box::new(move || {
        let write = stream.write_all(&bytes);
        rig.runtime.block_on(write).unwrap();
        let (header, payload) = rig.guest.expect(Op::Data);
        assert_eq!(payload.len(), LEN);
        socket.hear(&header);
        socket.consumed = socket.consumed.wrapping_add(header.len);
        let update: Header = socket.header(Op::CreditUpdate);
        rig.guest.send(update, &[]);
        rig.guest.pump();
    })
}

pub(super) fn from_guest() -> Walk {
    let mut rig = Rig::new();
    let (mut socket, mut stream) = rig.connect();
    let bytes = vec![7; LEN];
    let mut taken = vec![0; LEN];
    Box::new(move || {
        assert!(socket.room() >= LEN);
        let header = socket.data(LEN);
        rig.guest.send(header, &bytes);
        rig.guest.pump();
        let read = stream.read_exact(&mut taken);
        rig.runtime.block_on(read).unwrap();
        rig.hear(&mut socket);
    })
}

pub(super) fn connect() -> Walk {
    let mut rig = Rig::new();
    Box::new(move || {
        let (socket, stream) = rig.connect();
        drop(stream);
        rig.guest.expect(Op::Shutdown);
        rig.guest.send(socket.header(Op::Reset), &[]);
        rig.guest.pump();
    })
}
