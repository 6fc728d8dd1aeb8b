//! Access to the monitor's internals for fuzz targets.
#![allow(missing_docs)]

use std::path::Path;

use crate::boot::{self, KernelError};
use crate::snapshot::fixtures;
use crate::virtio::VirtioDevice;
use crate::virtio::pmem::{PmemDevice, PmemError, PmemImage};

/// Reads the file as a kernel, as a boot does.
///
/// # Errors
/// As for a boot from this file.
pub fn check_kernel(path: &Path) -> Result<(), KernelError> {
    boot::check_kernel(path)
}

/// Returns a template's manifest file with `devices` as its encoded devices.
#[must_use]
pub fn template_with(devices: &[u8]) -> Vec<u8> {
    fixtures::file_with(devices)
}

/// Reads a template's manifest file, and restores the devices that it describes. Returns whether
/// both succeeded.
///
/// # Panics
/// If the manifest changes when it is written and read again.
#[must_use]
pub fn read_template(file: &[u8]) -> bool {
    fixtures::read(file)
}

/// Creates the pmem device of a read-only image at guest address `address`.
///
/// # Errors
/// As for opening a pmem file.
pub fn image_device(path: &Path, address: u64) -> Result<Box<dyn VirtioDevice>, PmemError> {
    Ok(Box::new(PmemDevice::new(PmemImage::open(path)?, address)))
}
