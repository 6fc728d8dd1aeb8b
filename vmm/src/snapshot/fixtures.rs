//! For tests and fuzz targets: the state of a VM that never ran, and the reader of a manifest with
//! all that a clone makes of it short of KVM.

use super::cpu::VcpuState;
use super::irqchip::ChipState;
use super::{SerialState, VmState};
use crate::host::CpuProfile;
use crate::limits::Limits;
use crate::vm_inner::Hardware;

/// The state of a VM with `bytes` of memory, but for its devices.
fn without_devices(bytes: u64) -> VmState {
    VmState {
        hardware: Hardware {
            memory_bytes: bytes,
            vcpus: 1,
            console: true,
            pit: true,
            pmu: false,
            profile: CpuProfile::Native,
            limits: Limits::default(),
        },
        vcpus: vec![VcpuState::blank()],
        chips: ChipState::blank(),
        transports: Vec::new(),
        serial: Some(SerialState::default()),
    }
}

/// The state of a VM with `bytes` of memory.
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
pub(super) fn state(bytes: u64) -> VmState {
    use crate::memory::GuestRam;
    use crate::virtio::balloon::BalloonDevice;
    use crate::virtio::mmio::MmioTransport;
    use crate::virtio::vsock::VsockDevice;
    use crate::virtio::{Doorbell, Interrupt, VirtioDevice};

    let ram = GuestRam::new(bytes).unwrap();
    let transport = |device: Box<dyn VirtioDevice>, doorbell| {
        MmioTransport::new(device, ram.clone(), doorbell, Interrupt::new().unwrap()).save()
    };
    let doorbell = || Doorbell::new().unwrap();
    VmState {
        transports: vec![
            transport(Box::new(VsockDevice::new(3, doorbell()).0), doorbell()),
            transport(Box::new(BalloonDevice::new(2, doorbell()).0), doorbell()),
        ],
        ..without_devices(bytes)
    }
}

/// A manifest file whose devices are these bytes; all before them is of a VM that never ran.
#[cfg(feature = "testing")]
pub(crate) fn file_with(devices: &[u8]) -> Vec<u8> {
    let VmState {
        hardware,
        vcpus,
        chips,
        ..
    } = without_devices(2 << 20);
    let origin = super::compat::Origin::default();
    let no_images = Vec::<()>::new();
    // A tuple is encoded as the structs of its members.
    let body = postcard::to_stdvec(&(origin, "", [0u8; 32], no_images, hardware, vcpus, chips));
    let mut body = body.unwrap_or_default();
    body.extend(devices);
    super::manifest::seal_body(&body)
}

/// Reads a manifest file, and restores its devices in memory of their own. Whether it was one, and
/// its devices could be restored.
///
/// # Panics
/// If what was read is not what is written again.
#[cfg(feature = "testing")]
#[allow(clippy::expect_used, reason = "a fuzz target fails by panicking")]
pub(crate) fn read(file: &[u8]) -> bool {
    use super::manifest::{Manifest, encode};

    let Ok(manifest) = Manifest::decode(file) else {
        return false;
    };
    let write = |read: &Manifest| {
        let Manifest {
            origin,
            key,
            memory,
            images,
            state,
        } = read;
        encode(origin, key, *memory, images, state).expect("what was read can be written")
    };
    let written = write(&manifest);
    let again = Manifest::decode(&written).expect("what was written can be read");
    assert_eq!(write(&again), written, "the same each time");
    manifest.is_possible() && crate::devices::restore_devices(&manifest.state).is_ok()
}
