//! The state of a VM as a template's file contains it, and that of open connections.

use hearth_vmm::memory::GuestRam;
use hearth_vmm::testing::{read_template, template_with};
use hearth_vmm::virtio::balloon::BalloonDevice;
use hearth_vmm::virtio::mmio::MmioTransport;
use hearth_vmm::virtio::vsock::VsockDevice;
use hearth_vmm::virtio::vsock::packet::Op;
use hearth_vmm::virtio::vsock::testing::{GUEST_CID, Guest, Setup};
use hearth_vmm::virtio::{DeviceState, Doorbell, Interrupt, VirtioDevice};

use super::Walk;

/// As in the files that the fuzz target generates.
const MEMORY_MIB: u32 = 2;
const CONNECTIONS: u32 = 32;

/// Reads a manifest, writes it, reads and writes that again, and restores the devices.
pub(super) fn manifest() -> Walk {
    let ram = GuestRam::new(u64::from(MEMORY_MIB) << 20).unwrap();
    let saved = |device: Box<dyn VirtioDevice>, doorbell| {
        MmioTransport::new(device, ram.clone(), doorbell, Interrupt::new().unwrap()).save()
    };
    let doorbell = || Doorbell::new().unwrap();
    let vsock = saved(
        Box::new(VsockDevice::new(GUEST_CID, doorbell()).0),
        doorbell(),
    );
    let balloon = saved(
        Box::new(BalloonDevice::new(MEMORY_MIB, doorbell()).0),
        doorbell(),
    );
    let no_serial_port = None::<()>;
    let devices = postcard::to_stdvec(&(vec![vsock, balloon], no_serial_port)).unwrap();
    let file = template_with(&devices);
    assert!(read_template(&file));
    Box::new(move || assert!(read_template(&file)))
}

/// Saves, writes, reads and restores open connections.
pub(super) fn sockets() -> Walk {
    let mut guest = Guest::new(Setup::default());
    let mut listener = guest.host.listen(4000).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_time().build().unwrap();
    let mut streams = Vec::new();
    for port in 0..CONNECTIONS {
        let socket = guest.socket(1000 + port, 4000, 64 << 10);
        guest.send(socket.header(Op::Request), &[]);
        guest.pump();
        let stream = runtime.block_on(listener.accept()).unwrap();
        stream.mark_durable();
        streams.push(stream);
        guest.expect(Op::Response);
    }
    Box::new(move || {
        assert_eq!(streams.len(), CONNECTIONS as usize);
        let state = DeviceState::Vsock(guest.device.save());
        let bytes = postcard::to_stdvec(&state).unwrap();
        let Ok(DeviceState::Vsock(state)) = postcard::from_bytes(&bytes) else {
            panic!("what was written is read");
        };
        let (_, host) = VsockDevice::restore(&state, Doorbell::new().unwrap());
        drop(host);
    })
}
