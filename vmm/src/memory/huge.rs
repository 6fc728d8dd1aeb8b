//! Guest memory in pages of 2 MiB, where the host has them.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::{GuestRam, MIB, MemoryError, PAGE_SIZE, Sharing, memfd_with};

/// Bytes of a huge page.
pub const HUGE_PAGE_SIZE: u64 = 2 * MIB;

/// Source of a guest's pages of 2 MiB. They make a guest that uses much memory faster, because
/// address translation takes fewer steps. A guest that uses little then holds more memory than it
/// needs.
///
/// Clones have ordinary pages for their writes, whatever pages their template has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePages {
    /// Asks the host to use them where it can (`MADV_HUGEPAGE`). It does if
    /// `/sys/kernel/mm/transparent_hugepage/shmem_enabled` is `advise`, `within_size` or `always`.
    /// Otherwise, and where memory is fragmented, pages stay ordinary, without an error.
    Transparent,
    /// Takes them from those that the administrator has reserved (`sysctl vm.nr_hugepages`), all
    /// that the guest's memory needs at once: a boot is refused if there are too few, and a guest
    /// that has started never lacks one. Memory must be a multiple of 2 MiB. The guest's balloon
    /// gives nothing back to the host, the kernel's image is copied into each guest instead of
    /// shared, and a template is a full copy.
    Reserved,
}

impl HugePages {
    /// Creates the memory file for a choice of huge pages.
    pub(super) fn file(choice: Option<Self>) -> std::io::Result<File> {
        match choice {
            Some(Self::Reserved) => memfd_with(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB),
            Some(Self::Transparent) | None => memfd_with(0),
        }
    }

    /// Returns the error for a host that has too few huge pages for `bytes`.
    pub(super) fn too_few(bytes: u64, source: std::io::Error) -> MemoryError {
        let pages = bytes.div_ceil(HUGE_PAGE_SIZE);
        MemoryError::HugePages { pages, source }
    }
}

impl GuestRam {
    /// Advises the host to use huge pages. A host without them uses ordinary ones.
    pub(super) fn advise_huge_pages(&self) {
        for (_, len, host) in self.host_regions() {
            // SAFETY: `[host, host + len)` is one mapping of ours that lives as long as this value;
            // the call changes how its pages are made, not what is in them.
            unsafe {
                let len = usize::try_from(len).unwrap_or(0);
                libc::madvise(host as *mut libc::c_void, len, libc::MADV_HUGEPAGE);
            }
        }
    }

    /// Copies the content that [`GuestRam::overlay`] would map. The range is known to be inside
    /// memory.
    pub(super) fn copy_in(
        &self,
        addr: u64,
        file: &File,
        offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let outside = || MemoryError::OutOfRange { addr, len };
        let mut page = [0; PAGE_SIZE as usize];
        for at in (0..len).step_by(page.len()) {
            file.read_exact_at(&mut page, offset + at)
                .map_err(|source| MemoryError::Create { bytes: len, source })?;
            let written = self.map().write_slice(&page, GuestAddress(addr + at));
            written.map_err(|_| outside())?;
        }
        Ok(())
    }

    /// Returns whether memory consists of reserved huge pages.
    pub(super) fn is_reserved(&self) -> bool {
        self.huge == Some(HugePages::Reserved)
    }

    /// Returns whether clones can map the file of this memory: it holds, or can be given, all
    /// memory that the guest sees, in ordinary pages.
    pub(crate) fn can_be_shared(&self) -> bool {
        self.sharing == Sharing::Shared && !self.is_reserved()
    }
}
