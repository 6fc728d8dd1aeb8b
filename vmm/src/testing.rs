//! What fuzz targets reach of the monitor's inside.
#![allow(missing_docs)]

use std::path::Path;

use crate::boot::{self, KernelError};
use crate::snapshot::fixtures;
use crate::virtio::VirtioDevice;
use crate::virtio::pmem::{PmemDevice, PmemError, PmemImage};

/// Reads the file as a kernel, as a boot would.
///
/// # Errors
/// Those of a boot.
pub fn check_kernel(path: &Path) -> Result<(), KernelError> {
    boot::check_kernel(path)
}

/// A template's manifest file whose devices are these bytes.
#[must_use]
pub fn template_with(devices: &[u8]) -> Vec<u8> {
    fixtures::file_with(devices)
}

/// Reads a template's manifest file, and restores the devices that it describes. Whether all of
/// that was possible.
///
/// # Panics
/// If what was read is not what is written again.
#[must_use]
pub fn read_template(file: &[u8]) -> bool {
    fixtures::read(file)
}

/// The device of a read-only image, which lies at guest address `address`.
///
/// # Errors
/// Those of an image file.
pub fn image_device(path: &Path, address: u64) -> Result<Box<dyn VirtioDevice>, PmemError> {
    Ok(Box::new(PmemDevice::new(PmemImage::open(path)?, address)))
}
