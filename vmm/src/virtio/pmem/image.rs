//! A pmem image: an image file as guest memory, mapped once, shared and read-only, for all VMs that
//! use it.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use sha2::{Digest as _, Sha256};
use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use crate::memory::{GAP_END, MIB, ranges};

/// Image sizes are multiples of this: the smallest unit of persistent memory that Linux can
/// hot-plug (`SUBSECTION_SIZE`, include/linux/mmzone.h).
pub const GRANULE: u64 = 2 * MIB;
/// Images start at multiples of this: a memory section of Linux on x86-64 (`SECTION_SIZE_BITS`,
/// arch/x86/include/asm/sparsemem.h), so that no two images, and no image and RAM, share one.
const SECTION: u64 = 128 * MIB;

/// Reasons why an image file cannot be given to a guest.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The file could not be opened.
    #[error("image {path} could not be opened; check that it exists and is readable")]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// The path is a directory, a device, or a pipe.
    #[error("image {0} is not a regular file")]
    NotAFile(PathBuf),
    /// The file's size is zero or not a multiple of 2 MiB.
    #[error(
        "image {path} has {bytes} bytes; it must be a multiple of 2 MiB: `truncate -s %2M {path}` fills it up"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
    },
    /// The host could not map the file.
    #[error("the host could not map image {path}; check ulimit -v and vm.max_map_count")]
    Map {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The images end beyond what the guest's processor can address.
    #[error("memory and images end at {end:#x}, beyond the processor's {bits} address bits")]
    OutOfReach {
        /// First address after the last image.
        end: u64,
        /// Physical address bits of the processor.
        bits: u32,
    },
}

/// A mapped image. Cheap to clone; unmapped when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct PmemImage(Arc<Mapping>);

#[derive(Debug)]
struct Mapping {
    region: MmapRegion,
    bytes: u64,
}

impl PmemImage {
    /// Maps the file at `path` from start to end.
    pub(crate) fn open(path: &Path) -> Result<Self, PmemError> {
        let failed = |source| PmemError::Open {
            path: path.to_owned(),
            source,
        };
        // Opening a pipe without a writer must not block.
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(PmemError::NotAFile(path.to_owned()));
        }
        let bytes = metadata.len();
        let size = usize::try_from(bytes).unwrap_or(0);
        if size == 0 || !bytes.is_multiple_of(GRANULE) {
            return Err(PmemError::Size {
                path: path.to_owned(),
                bytes,
            });
        }
        let region = MmapRegionBuilder::new(size)
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|source| PmemError::Map {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self(Arc::new(Mapping { region, bytes })))
    }

    /// Size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// SHA-256 of the file's content. Reads the file, not the mapping: a file that was truncated is
    /// then an error, and does not end this process.
    pub(crate) fn digest(&self) -> std::io::Result<[u8; 32]> {
        let file = self.0.region.file_offset();
        let file = file.ok_or(std::io::ErrorKind::NotFound)?.file();
        let mut content = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        let mut at = 0;
        while at < self.0.bytes {
            let count = file.read_at(&mut buffer, at)?;
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            content.update(buffer.get(..count).unwrap_or_default());
            at += count as u64;
        }
        Ok(content.finalize().into())
    }

    /// Host address of the mapping.
    pub(crate) fn host_address(&self) -> u64 {
        self.0.region.as_ptr() as u64
    }

    /// Whether two handles share one mapping.
    #[cfg(test)]
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// An image file that a configuration names, and its mapping once there is one. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct PmemFile {
    path: PathBuf,
    image: Arc<Mutex<Option<PmemImage>>>,
}

impl PmemFile {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            image: Arc::default(),
        }
    }

    /// Returns the image; the first call maps the file. A failure is not cached.
    pub(crate) fn image(&self) -> Result<PmemImage, PmemError> {
        let mut slot = self.image.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(image) = &*slot {
            return Ok(image.clone());
        }
        let image = PmemImage::open(&self.path)?;
        *slot = Some(image.clone());
        Ok(image)
    }
}

/// Returns the guest addresses of images of these sizes, in order: above 4 GiB and above all of
/// `memory` bytes of RAM.
pub(crate) fn place(memory: u64, sizes: &[u64], bits: u32) -> Result<Vec<u64>, PmemError> {
    let ram_end = ranges(memory)
        .iter()
        .map(|(start, len)| start.0.saturating_add(*len))
        .max()
        .unwrap_or(0);
    let limit = 1u64.checked_shl(bits).unwrap_or(u64::MAX);
    let mut next = ram_end.max(GAP_END);
    let mut addresses = Vec::with_capacity(sizes.len());
    for size in sizes {
        let start = next.checked_next_multiple_of(SECTION).unwrap_or(u64::MAX);
        next = start.saturating_add(*size);
        if next > limit {
            return Err(PmemError::OutOfReach { end: next, bits });
        }
        addresses.push(start);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    #[test]
    fn sizes_that_a_guest_cannot_plug_in_are_refused_with_what_to_do() {
        for bytes in [0, 1, 4096, GRANULE - 1, GRANULE + 4096] {
            let file = file(bytes);
            let error = PmemImage::open(file.path()).unwrap_err();
            assert!(matches!(error, PmemError::Size { bytes: b, .. } if b == bytes));
            assert!(error.to_string().contains("truncate -s %2M"), "{error}");
        }
        for bytes in [GRANULE, 3 * GRANULE] {
            assert_eq!(PmemImage::open(file(bytes).path()).unwrap().bytes(), bytes);
        }
    }

    #[test]
    fn what_is_not_a_file_is_refused_by_name() {
        for path in ["/", "/dev/null"] {
            let error = PmemImage::open(Path::new(path)).unwrap_err();
            assert!(matches!(error, PmemError::NotAFile(_)), "{error}");
        }
        let error = PmemImage::open(Path::new("/nonexistent/image")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/image"), "{error}");
    }

    #[test]
    fn one_configuration_maps_a_file_once() {
        let file = file(GRANULE);
        let named = PmemFile::new(file.path().to_owned());
        let again = named.clone();
        assert!(named.image().unwrap().is(&again.image().unwrap()));
    }

    #[test]
    fn images_lie_above_memory_and_4_gib_apart_by_sections() {
        let sizes = [GRANULE, SECTION + GRANULE, GRANULE];
        for memory_mib in [32, 128, 3072, 3073, 4096, 8192] {
            let memory = memory_mib * MIB;
            let at = place(memory, &sizes, 46).unwrap();
            let ram_end = ranges(memory).iter().map(|(s, l)| s.0 + l).max().unwrap();
            assert!(at[0] >= ram_end.max(GAP_END), "{memory_mib}");
            assert!(at.iter().all(|a| a.is_multiple_of(SECTION)));
            assert_eq!([at[1] - at[0], at[2] - at[1]], [SECTION, 2 * SECTION]);
        }
        assert_eq!(place(128 * MIB, &[GRANULE], 46).unwrap(), [GAP_END]);
    }

    #[test]
    fn images_beyond_the_processors_reach_are_refused() {
        let most = (1u64 << 36) - GAP_END;
        assert!(place(128 * MIB, &[most], 36).is_ok());
        for sizes in [
            &[most + GRANULE][..],
            &[most, GRANULE],
            &[u64::MAX, u64::MAX],
        ] {
            assert!(matches!(
                place(128 * MIB, sizes, 36),
                Err(PmemError::OutOfReach { bits: 36, .. })
            ));
        }
    }
}
