#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]
//! The guests' kernel as a bzImage.

use std::io::Write;

use hearth_tests::{Guest, kernel_path, kvm, within};
use hearth_vmm::VmConfig;

/// A bzImage (Documentation/arch/x86/boot.rst) around `kernel`: a setup sector after the boot
/// sector, then the kernel, packed with gzip.
fn bzimage(kernel: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(kernel).unwrap();
    let payload = packer.finish().unwrap();
    let mut file = vec![0u8; 1024];
    file[0x1f1] = 1;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    file.extend(payload);
    file
}

#[tokio::test]
#[ignore = "long: boots a guest from nothing"]
async fn a_real_guest_boots_from_a_bzimage() {
    if !kvm() {
        return;
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let kernel = std::fs::read(kernel_path()).unwrap();
    file.write_all(&bzimage(&kernel)).unwrap();
    let (mut guest, phases) = Guest::boot_from(VmConfig::builder(file.path())).await;
    within(5, "ping", guest.agent.ping(7)).await.unwrap();
    eprintln!("unpacked and read in {:?}", phases.create.image);
}
