//! Counts the host memory that is private to a VM, from `/proc/self/pagemap`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::memory::{GuestRam, PAGE_SIZE, Sharing, allocated};

/// Bits of an entry of `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
const OF_A_FILE: u64 = 1 << 61;
/// Bytes of one entry, and of one read of the file.
const ENTRY: u64 = 8;
const CHUNK: u64 = 64 << 10;

/// Returns the bytes of host memory that hold guest memory which no other VM shares: the pages that
/// a clone has written, or all pages that a cold VM has touched.
pub(crate) fn private_bytes(ram: &GuestRam) -> io::Result<u64> {
    let mut pages = 0;
    each_own_page(ram, |_| pages += 1)?;
    let file = match ram.sharing() {
        Sharing::Shared => allocated(ram.file()),
        Sharing::Private => 0,
    };
    Ok(pages * PAGE_SIZE + file)
}

/// The backing of a touched page of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// Not a page of the memory's file: written through a private mapping. Present or swapped out.
    Own,
    /// A page of the memory's file that is mapped.
    OfFile,
}

/// Calls `see` with the guest address of each page that is private to the VM, in ascending order.
pub(crate) fn each_own_page(ram: &GuestRam, mut see: impl FnMut(u64)) -> io::Result<()> {
    each_page(ram, |addr, page| {
        if page == Page::Own {
            see(addr);
        }
    })
}

/// Calls `see` with the guest address and the backing of each page that the VM has touched, in
/// ascending order.
pub(crate) fn each_page(ram: &GuestRam, mut see: impl FnMut(u64, Page)) -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap").map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            let cause = "/proc/self/pagemap is not there: is /proc mounted?";
            io::Error::new(io::ErrorKind::NotFound, cause)
        }
        // Kept as it is: its errno shows the remedy.
        _ => error,
    })?;
    let mut buffer = vec![0; CHUNK as usize];
    for (mut addr, len, host) in ram.host_regions() {
        let (mut at, end) = (host / PAGE_SIZE * ENTRY, (host + len) / PAGE_SIZE * ENTRY);
        while at < end {
            let count = CHUNK.min(end - at) as usize;
            let chunk = buffer.get_mut(..count).unwrap_or_default();
            pagemap.read_exact_at(chunk, at)?;
            for entry in chunk.as_chunks().0.iter().copied().map(u64::from_ne_bytes) {
                if entry & PRESENT_OR_SWAPPED != 0 {
                    let is_own = entry & OF_A_FILE == 0;
                    see(addr, if is_own { Page::Own } else { Page::OfFile });
                }
                addr += PAGE_SIZE;
            }
            at += count as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::MIB;

    #[test]
    fn a_clone_has_what_it_wrote_and_its_origin_what_it_touched() {
        let origin = GuestRam::new(4 * MIB).unwrap();
        assert_eq!(private_bytes(&origin).unwrap(), 0);
        let page = |number: u64| GuestAddress(number * PAGE_SIZE);
        for number in 0..8 {
            origin.map().write_obj(1u8, page(number)).unwrap();
        }
        assert_eq!(private_bytes(&origin).unwrap(), 8 * PAGE_SIZE);
        let file = Arc::clone(origin.file());
        let clone = GuestRam::map_file(file, 4 * MIB, Sharing::Private).unwrap();
        for number in 0..8 {
            // Pages that are only read stay shared.
            assert_eq!(clone.map().read_obj::<u8>(page(number)).unwrap(), 1);
        }
        assert_eq!(private_bytes(&clone).unwrap(), 0);
        for number in [0, 7, 700] {
            clone.map().write_obj(2u8, page(number)).unwrap();
        }
        assert_eq!(private_bytes(&clone).unwrap(), 3 * PAGE_SIZE);
    }
}
