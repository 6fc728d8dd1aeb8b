//! Fixtures for tests and fuzz targets: the state of a VM that never ran, and a manifest reader
//! that restores the devices without KVM.

use crate::hardware::Hardware;
use crate::host::CpuProfile;
use crate::limits::Limits;
use crate::saved::VmState;
use crate::saved::cpu::VcpuState;
use crate::saved::irqchip::ChipState;
use vm_superio::serial::SerialState;

/// The state of a VM with `bytes` of memory, without its devices.
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

/// Returns a manifest file with the encoded `devices`; all fields before them are those of a VM
/// that never ran.
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
    // postcard encodes a tuple like the structs that have these fields.
    let body = postcard::to_stdvec(&(origin, "", [0u8; 32], no_images, hardware, vcpus, chips));
    let mut body = body.unwrap_or_default();
    body.extend(devices);
    super::manifest::seal_body(&body)
}

/// Reads a manifest file, and restores its devices in memory of their own. Returns whether the file
/// is a valid manifest and its devices could be restored.
///
/// # Panics
/// If a manifest changes when it is written and read again.
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
