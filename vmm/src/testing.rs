//! What fuzz targets reach of the monitor's inside.
#![allow(missing_docs)]

use std::path::Path;

use crate::boot::{self, KernelError};

/// Reads the file as a kernel, as a boot would.
///
/// # Errors
/// Those of a boot.
pub fn check_kernel(path: &Path) -> Result<(), KernelError> {
    boot::check_kernel(path)
}
