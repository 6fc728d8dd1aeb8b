//! Kernel and initramfs, read once into a sealed memory file that every VM maps.
//!
//! A VM maps page ranges of the file privately over its own memory. Nothing is copied at boot,
//! pages that guests only read exist once per process, and because the file is sealed, changes to
//! the files on disk cannot reach a running guest.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::kernel::{self, Loaded};
use super::{Entry, EntryChoice, Initrd, LoadError};
use crate::memory::{GAP_START, GuestRam, PAGE_SIZE, seal};

/// The files of an image, and the image after they were read. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct ImageFiles {
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    image: Arc<Mutex<Option<Arc<Image>>>>,
}

impl ImageFiles {
    pub(crate) fn new(kernel: PathBuf, initramfs: Option<PathBuf>) -> Self {
        Self {
            kernel,
            initramfs,
            image: Arc::default(),
        }
    }

    /// Returns the same kernel with another initramfs.
    pub(crate) fn with_initramfs(self, initramfs: PathBuf) -> Self {
        Self::new(self.kernel, Some(initramfs))
    }

    /// Returns the image. Reads the files at the first call; a failure is not cached.
    pub(crate) fn image(&self) -> Result<Arc<Image>, LoadError> {
        let mut slot = self.image.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(image) = &*slot {
            return Ok(Arc::clone(image));
        }
        let image = Arc::new(Image::read(&self.kernel, self.initramfs.as_deref())?);
        *slot = Some(Arc::clone(&image));
        Ok(image)
    }
}

/// A kernel and an initramfs in one sealed memory file.
#[derive(Debug)]
pub(crate) struct Image {
    kernel_path: PathBuf,
    kernel: Loaded,
    /// Bytes of the initramfs, which begins at the kernel's end in the file.
    initramfs: u64,
}

impl Image {
    fn read(kernel_path: &Path, initramfs: Option<&Path>) -> Result<Image, LoadError> {
        let of_kernel = |source| LoadError::Kernel {
            path: kernel_path.to_owned(),
            source,
        };
        let kernel = kernel::load(kernel_path).map_err(of_kernel)?;
        let initramfs = match initramfs {
            Some(path) => {
                append(&kernel.file, kernel.end, path).map_err(|source| LoadError::Initramfs {
                    path: path.to_owned(),
                    source,
                })?
            }
            None => 0,
        };
        seal(&kernel.file).map_err(|e| of_kernel(e.into()))?;
        Ok(Image {
            kernel_path: kernel_path.to_owned(),
            kernel,
            initramfs,
        })
    }

    /// Returns where the first vCPU starts.
    pub(super) fn entry(&self, choice: EntryChoice) -> Result<Entry, LoadError> {
        self.kernel
            .entry(choice)
            .map_err(|source| LoadError::Kernel {
                path: self.kernel_path.clone(),
                source,
            })
    }

    /// Maps kernel and initramfs into `ram`. Returns the location of the initramfs, if there is
    /// one.
    pub(super) fn map_into(&self, ram: &mut GuestRam) -> Result<Option<Initrd>, LoadError> {
        let file = &self.kernel.file;
        let start = place_initramfs(ram.bytes(), self.kernel.end, self.initramfs).ok_or(
            LoadError::DoesNotFit {
                kernel_end: self.kernel.end,
                initramfs: self.initramfs,
                memory: ram.bytes(),
            },
        )?;
        for extent in &self.kernel.extents {
            ram.overlay(extent.start, file, extent.start, extent.end - extent.start)?;
        }
        if self.initramfs == 0 {
            return Ok(None);
        }
        let len = self.initramfs.next_multiple_of(PAGE_SIZE);
        ram.overlay(start, file, self.kernel.end, len)?;
        Ok(Some(Initrd {
            start,
            len: self.initramfs,
        }))
    }
}

/// Opens the file at `path` without blocking. Callers accept only regular files, and a pipe without
/// a writer must not block them.
pub(super) fn open(path: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
}

/// Appends the file at `path` to `file` at `offset` and pads it to whole pages. Returns the number
/// of bytes without the padding.
fn append(file: &File, offset: u64, path: &Path) -> std::io::Result<u64> {
    let mut source = open(path)?;
    let metadata = source.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut target = file;
    target.seek(SeekFrom::Start(offset))?;
    // Read at most the size found above: a file that grows meanwhile cannot fill the host's memory.
    let len = std::io::copy(&mut (&mut source).take(metadata.len()), &mut target)?;
    file.set_len((offset + len).next_multiple_of(PAGE_SIZE))?;
    Ok(len)
}

/// Returns the highest page-aligned address, below the gap and below 2 GiB, at which the initramfs
/// does not overlap the kernel.
fn place_initramfs(memory: u64, kernel_end: u64, len: u64) -> Option<u64> {
    // `initrd_addr_max` of 64-bit kernels is 2 GiB - 1 (arch/x86/boot/header.S).
    let top = memory.min(GAP_START).min(1 << 31);
    let start = top.checked_sub(len)? & !(PAGE_SIZE - 1);
    (start >= kernel_end).then_some(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIB;

    #[test]
    fn an_initramfs_lies_at_the_top_and_never_on_the_kernel() {
        assert_eq!(
            place_initramfs(128 * MIB, 32 * MIB, 5000),
            Some(128 * MIB - 8192)
        );
        assert_eq!(
            place_initramfs(128 * MIB, 32 * MIB, 96 * MIB),
            Some(32 * MIB)
        );
        assert_eq!(place_initramfs(128 * MIB, 32 * MIB, 96 * MIB + 1), None);
        assert_eq!(place_initramfs(128 * MIB, 32 * MIB, u64::MAX), None);
        // Below 2 GiB, however much memory there is and wherever the gap begins.
        for memory in [2048, 2049, 3071, 3072, 3073, 4095, 4096, 4097, 8192] {
            let place = place_initramfs(memory * MIB, 32 * MIB, MIB);
            assert_eq!(place, Some(2047 * MIB), "{memory} MiB");
        }
        let place = place_initramfs(2047 * MIB, 32 * MIB, MIB);
        assert_eq!(place, Some(2046 * MIB));
    }

    #[test]
    fn an_initramfs_that_cannot_be_read_names_its_path() {
        let files = ImageFiles::new("/nonexistent/vmlinux".into(), None);
        let error = files.image().unwrap_err().to_string();
        assert!(error.contains("/nonexistent/vmlinux"), "{error}");
        let file = crate::memory::memfd().unwrap();
        assert!(append(&file, 0, Path::new("/nonexistent")).is_err());
        assert!(append(&file, 0, Path::new("/")).is_err());
    }

    #[test]
    fn an_appended_file_is_filled_up_to_whole_pages() {
        let file = crate::memory::memfd().unwrap();
        let source = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(source.path(), [7u8; 5000]).unwrap();
        assert_eq!(append(&file, 4096, source.path()).unwrap(), 5000);
        assert_eq!(file.metadata().unwrap().len(), 4096 + 8192);
    }
}
