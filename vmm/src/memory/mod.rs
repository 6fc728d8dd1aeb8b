//! Guest memory: a memfd, mapped once, in at most two regions around the MMIO gap.
//!
//! A cold VM maps its own memfd shared, so that it can become a template without a copy. A clone
//! maps the template's memfd `MAP_PRIVATE`: pages that it writes are its own, pages that it only
//! reads are shared.
//!
//! Memory is not reserved (`MAP_NORESERVE`): a page costs the host nothing until it is touched, so
//! that guests may be given more in sum than the host has, and no setting of `vm.overcommit_memory`
//! but 2 limits them. A host that then runs out of memory kills processes. The creator of the VMs
//! must bound the sum (the pool's `limits.memory_mib`). Only [`HugePages::Reserved`] is reserved: a
//! host that has none left at a guest's first touch could only kill this process.

mod huge;

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use rustix::process::{Resource, getrlimit};

use crate::advice::advice;
pub use huge::{HUGE_PAGE_SIZE, HugePages};

/// Start of the hole below 4 GiB in which devices and interrupt controllers live.
pub const GAP_START: u64 = 0xC000_0000;
/// End of the hole; guest memory beyond [`GAP_START`] continues here.
pub const GAP_END: u64 = 0x1_0000_0000;
/// Like `MADV_DONTNEED`, for locked pages too (include/uapi/asm-generic/mman-common.h, since Linux
/// 5.18).
const MADV_DONTNEED_LOCKED: libc::c_int = 24;
/// Bytes in a guest page.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;

/// Why guest memory could not be created, or could not be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero, not whole pages, or does not fit the host's address space.
    #[error("guest memory of {0} bytes is not possible; use whole MiB")]
    Size(u64),
    /// The host refused the memory file.
    #[error(
        "the host could not create guest memory of {bytes} bytes{}",
        advice(source)
    )]
    Create {
        /// Bytes asked for.
        bytes: u64,
        /// The host's error.
        source: std::io::Error,
    },
    /// The host refused to map the memory file.
    #[error("the host could not map guest memory; check vm.overcommit_memory and ulimit -v")]
    Map(#[from] vm_memory::mmap::FromRangesError),
    /// The host refused to map one region of the memory file.
    #[error(
        "the host could not map a region of guest memory; check ulimit -v and vm.max_map_count"
    )]
    MapRegion(#[from] MmapRegionError),
    /// A range that the guest gave is not inside one region of its memory.
    #[error("range of {len} bytes at {addr:#x} is not inside guest memory")]
    OutOfRange {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The host has too few reserved pages of 2 MiB.
    #[error(
        "the host has not {pages} free pages of 2 MiB; set them aside with `sysctl vm.nr_hugepages=N` (N for all VMs \
         together), or do without `HugePages::Reserved`"
    )]
    HugePages {
        /// Pages that the VM needs.
        pages: u64,
        /// The host's error.
        source: std::io::Error,
    },
    /// The host could not take pages back.
    #[error("the host could not release guest pages")]
    Discard(#[source] std::io::Error),
}

/// How the pages of a [`GuestRam`] relate to its memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Writes go to the file (a VM that booted by itself).
    Shared,
    /// Writes go to private copies; the file is a template's (a clone).
    Private,
}

/// A guest's physical memory. Cheap to clone; unmapped when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct GuestRam {
    map: Arc<GuestMemoryMmap>,
    file: Arc<File>,
    sharing: Sharing,
    bytes: u64,
    huge: Option<HugePages>,
    /// Ranges that are private copies of another file (see [`GuestRam::overlay`]).
    overlays: Vec<(u64, u64)>,
}

/// Returns the (guest address, length) pairs that `bytes` of memory occupy.
#[must_use]
pub fn ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    if bytes <= GAP_START {
        vec![(GuestAddress(0), bytes)]
    } else {
        vec![
            (GuestAddress(0), GAP_START),
            (GuestAddress(GAP_END), bytes - GAP_START),
        ]
    }
}

/// Returns the offset in a memory file of guest address `addr`, which must be inside memory.
pub(crate) fn file_offset(addr: u64) -> u64 {
    if addr < GAP_END {
        addr
    } else {
        addr - GAP_END + GAP_START
    }
}

impl GuestRam {
    /// Creates zeroed memory of `bytes` bytes in a memfd of its own. Pages are allocated when first
    /// touched; no swap or overcommit reservation is made (`MAP_NORESERVE`).
    ///
    /// # Errors
    /// [`MemoryError`] when `bytes` is zero, not whole pages, or the host refuses.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        Self::with_pages(bytes, None)
    }

    /// As [`GuestRam::new`], with huge pages if `huge` is set.
    ///
    /// # Errors
    /// As [`GuestRam::new`]; [`MemoryError::HugePages`] when the host has too few of them.
    pub fn with_pages(bytes: u64, huge: Option<HugePages>) -> Result<Self, MemoryError> {
        let reserved = huge == Some(HugePages::Reserved);
        let page = if reserved { HUGE_PAGE_SIZE } else { PAGE_SIZE };
        if bytes == 0 || !bytes.is_multiple_of(page) || i64::try_from(bytes).is_err() {
            return Err(MemoryError::Size(bytes));
        }
        let failed = |source| match reserved {
            true => HugePages::too_few(bytes, source),
            false => MemoryError::Create { bytes, source },
        };
        check_file_size(bytes).map_err(|source| MemoryError::Create { bytes, source })?;
        let file = HugePages::file(huge).map_err(failed)?;
        file.set_len(bytes).map_err(failed)?;
        let ram = Self::map_regions(Arc::new(file), bytes, Sharing::Shared, huge)?;
        if huge == Some(HugePages::Transparent) {
            ram.advise_huge_pages();
        }
        Ok(ram)
    }

    /// Maps `bytes` bytes of `file` from its start. The file must be at least that long and must
    /// never shrink while mapped (a template's memfd is sealed).
    ///
    /// # Errors
    /// [`MemoryError`] when the file is shorter or the host refuses the mapping.
    pub fn map_file(file: Arc<File>, bytes: u64, sharing: Sharing) -> Result<Self, MemoryError> {
        let len = file
            .metadata()
            .map_err(|source| MemoryError::Create { bytes, source })?
            .len();
        if len < bytes {
            return Err(MemoryError::Size(bytes));
        }
        Self::map_regions(file, bytes, sharing, None)
    }

    fn map_regions(
        file: Arc<File>,
        bytes: u64,
        sharing: Sharing,
        huge: Option<HugePages>,
    ) -> Result<Self, MemoryError> {
        let share_flag = match sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE,
        };
        // Without `MAP_NORESERVE`, a mapping of huge pages reserves all of them, or fails.
        let reserve_flag = match huge {
            Some(HugePages::Reserved) => 0,
            Some(HugePages::Transparent) | None => libc::MAP_NORESERVE,
        };
        let mut regions = Vec::new();
        let mut offset = 0;
        for (start, len) in ranges(bytes) {
            let size = usize::try_from(len).map_err(|_| MemoryError::Size(bytes))?;
            let mapping = MmapRegionBuilder::new(size)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(reserve_flag | share_flag)
                .build()
                .map_err(|error| match error {
                    MmapRegionError::Mmap(source) if reserve_flag == 0 => {
                        HugePages::too_few(bytes, source)
                    }
                    error => error.into(),
                })?;
            let region = GuestRegionMmap::new(mapping, start).ok_or(MemoryError::Size(bytes))?;
            regions.push(region);
            offset += len;
        }
        let map = GuestMemoryMmap::from_regions(regions).map_err(|_| MemoryError::Size(bytes))?;
        let ram = Self {
            map: Arc::new(map),
            file,
            sharing,
            bytes,
            huge,
            overlays: Vec::new(),
        };
        for (addr, len, _) in ram.host_regions() {
            ram.keep_in_process(addr, len)?;
        }
        Ok(ram)
    }

    /// Excludes `[addr, addr + len)` from children that the embedding program forks and from its
    /// core dumps. A child that executes no other program would hold the memory after the VM is
    /// gone, and make the guest copy each page that it writes. A core dump would be gigabytes
    /// longer, with content that does not concern its reader.
    fn keep_in_process(&self, addr: u64, len: u64) -> Result<(), MemoryError> {
        self.advise(addr, len, libc::MADV_DONTFORK)?;
        self.advise(addr, len, libc::MADV_DONTDUMP)
    }

    /// Advises the host about `[addr, addr + len)`. `advice` (one of `MADV_DONTFORK`,
    /// `MADV_DONTDUMP`, `MADV_POPULATE_*`) leaves the range's content as it is.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when the range is not inside one region; [`MemoryError::Create`]
    /// when the host refuses.
    pub(crate) fn advise(
        &self,
        addr: u64,
        len: u64,
        advice: libc::c_int,
    ) -> Result<(), MemoryError> {
        if !self.contains(addr, len) {
            return Err(MemoryError::OutOfRange { addr, len });
        }
        let host = self.host_address(addr, len)?;
        // SAFETY: `[addr, addr + len)` was checked to lie inside one region's mapping, which
        // `self.map` keeps alive; such advice changes mapping and inheritance, but no content.
        let done = unsafe {
            let len = usize::try_from(len).unwrap_or(0);
            libc::madvise(host.cast(), len, advice)
        };
        match done {
            0 => Ok(()),
            _ => Err(MemoryError::Create {
                bytes: len,
                source: std::io::Error::last_os_error(),
            }),
        }
    }

    /// Maps `file` from `offset` on over `[addr, addr + len)`, as a private copy that is made page
    /// by page when the guest writes. Nothing is copied now, unless memory consists of reserved
    /// huge pages, over which no smaller pages can be mapped. `file` must never shrink or change (a
    /// sealed memfd). All three numbers are whole pages.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when the range is not inside one region or not whole pages;
    /// [`MemoryError::Create`] when the host refuses.
    pub(crate) fn overlay(
        &mut self,
        addr: u64,
        file: &File,
        offset: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let whole = [addr, offset, len]
            .iter()
            .all(|n| n.is_multiple_of(PAGE_SIZE));
        if len == 0 || !whole || !self.contains(addr, len) {
            return Err(MemoryError::OutOfRange { addr, len });
        }
        if self.is_reserved() {
            return self.copy_in(addr, file, offset, len);
        }
        let host = self.host_address(addr, len)?;
        // SAFETY: `[addr, addr + len)` was checked to lie inside one mapping of ours, so the fixed
        // mapping replaces only pages that this value owns; there are no Rust references to guest
        // memory, and dropping the region unmaps the whole range whatever is mapped there.
        let mapped = unsafe {
            libc::mmap(
                host.cast(),
                usize::try_from(len).unwrap_or(0),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset.cast_signed(),
            )
        };
        if mapped == libc::MAP_FAILED {
            let source = std::io::Error::last_os_error();
            return Err(MemoryError::Create { bytes: len, source });
        }
        self.keep_in_process(addr, len)?;
        self.overlays.push((addr, len));
        Ok(())
    }

    /// Returns the ranges (guest address, bytes) that are private copies of another file.
    pub(crate) fn overlays(&self) -> &[(u64, u64)] {
        &self.overlays
    }

    /// Returns each region's guest address, bytes and host address.
    pub(crate) fn host_regions(&self) -> Vec<(u64, u64, u64)> {
        self.map
            .iter()
            .map(|region| {
                let host = region
                    .get_host_address(vm_memory::MemoryRegionAddress(0))
                    .map_or(0, |host| host as u64);
                (region.start_addr().raw_value(), region.len(), host)
            })
            .collect()
    }

    fn host_address(&self, addr: u64, len: u64) -> Result<*mut u8, MemoryError> {
        let outside = MemoryError::OutOfRange { addr, len };
        let Some(region) = self.map.find_region(GuestAddress(addr)) else {
            return Err(outside);
        };
        let in_region = addr - region.start_addr().raw_value();
        region
            .get_host_address(vm_memory::MemoryRegionAddress(in_region))
            .map_err(|_| outside)
    }

    /// Returns the mapped memory, for reads and writes that are checked against its regions.
    #[must_use]
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Returns the file behind the memory.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Returns the total bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns how pages relate to the file.
    #[must_use]
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// Returns whether `[addr, addr + len)` lies inside one region. An empty range is inside if
    /// `addr` is.
    #[must_use]
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.map
            .find_region(GuestAddress(addr))
            .is_some_and(|region| len <= region.len() - (addr - region.start_addr().raw_value()))
    }

    /// Gives the pages of `[addr, addr + len)` back to the host. The guest then reads zeroes there,
    /// or the content of the template or kernel image: never another VM's data. Only whole pages
    /// inside the range are released, and no reserved huge pages: the guest could not be sure to
    /// get them again.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when the range is not inside one region;
    /// [`MemoryError::Discard`] when the host refuses, which it does before Linux 5.18 in a process
    /// that has locked its memory.
    pub fn discard(&self, addr: u64, len: u64) -> Result<(), MemoryError> {
        if !self.contains(addr, len) {
            return Err(MemoryError::OutOfRange { addr, len });
        }
        let start = addr.next_multiple_of(PAGE_SIZE);
        let end = (addr + len) & !(PAGE_SIZE - 1);
        if start >= end || self.is_reserved() {
            return Ok(());
        }
        let host = self.host_address(start, end - start)?;
        let give_back = |advice| {
            // SAFETY: `[start, end)` was checked to lie inside one region's mapping, which
            // `self.map` keeps alive; guest memory is only ever accessed volatilely.
            unsafe {
                let len = usize::try_from(end - start).unwrap_or(0);
                libc::madvise(host.cast(), len, advice)
            }
        };
        let mut done = give_back(libc::MADV_DONTNEED);
        if done != 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            // The embedding program has locked its memory (mlockall(2)).
            done = give_back(MADV_DONTNEED_LOCKED);
        }
        if done == 0 && self.sharing == Sharing::Shared {
            // SAFETY: plain system call on an fd that `self.file` keeps open; it touches memory
            // only through the kernel's page cache.
            done = unsafe {
                libc::fallocate(
                    self.file.as_raw_fd(),
                    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                    file_offset(start).cast_signed(),
                    (end - start).cast_signed(),
                )
            };
        }
        if done == 0 {
            Ok(())
        } else {
            Err(MemoryError::Discard(std::io::Error::last_os_error()))
        }
    }
}

/// Checks the process's limit of file size. Linux kills a program with a signal if it extends a
/// file beyond the limit, or writes there.
///
/// # Errors
/// When this process may not create a file of `bytes`.
pub(crate) fn check_file_size(bytes: u64) -> std::io::Result<()> {
    match getrlimit(Resource::Fsize).current {
        Some(limit) if bytes > limit => Err(std::io::Error::from_raw_os_error(libc::EFBIG)),
        _ => Ok(()),
    }
}

/// Creates a memfd that can be sealed.
pub(crate) fn memfd() -> std::io::Result<File> {
    memfd_with(0)
}

/// Creates a sealable memfd with `flags`. Since Linux 6.3 its content, which a guest writes, can
/// neither be executed on the host nor be made executable.
fn memfd_with(flags: libc::c_uint) -> std::io::Result<File> {
    let create = |flags| {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags;
        // SAFETY: the name is a NUL-terminated literal; the returned fd is checked before it is
        // owned.
        unsafe { libc::memfd_create(c"hearth-guest".as_ptr(), flags) }
    };
    let mut fd = create(flags | libc::MFD_NOEXEC_SEAL);
    if fd < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        // Before Linux 6.3.
        fd = create(flags);
    }
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned to us and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Makes a memfd immutable: it can then be mapped by any number of VMs without a check.
///
/// # Errors
/// The host's error; `EBUSY` while a writable mapping exists.
pub(crate) fn seal(file: &File) -> std::io::Result<()> {
    use rustix::fs::SealFlags;
    let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(file, all).map_err(Into::into)
}

/// Returns the bytes that are allocated for `file`.
pub(crate) fn allocated(file: &File) -> u64 {
    file.metadata().map_or(0, |metadata| {
        std::os::unix::fs::MetadataExt::blocks(&metadata) * 512
    })
}

#[cfg(test)]
mod tests;
