//! Turns the memory of a paused guest into a file that clones can map.
//!
//! A VM that booted by itself and is not needed any more hands over its memory file: only the few
//! MB that it maps from the kernel image are copied in. The memory of a VM that goes on, or is
//! itself a clone, is copied: the pages that its file holds and those that it wrote, nothing else.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use sha2::{Digest as _, Sha256};
use vm_memory::{Bytes, GuestAddress};

use super::manifest::Digest;
use crate::memory::{
    GAP_END, GAP_START, GuestRam, PAGE_SIZE, Sharing, check_file_size, file_offset, memfd,
};
use crate::pagemap::each_own_page;

/// Bytes per step of a copy.
const CHUNK: u64 = 1 << 20;

/// Writes the parts of `ram` that are mapped from other files into its own file, which then holds
/// all of it. Only for shared memory whose VM will not run again.
pub(super) fn complete(ram: &GuestRam) -> std::io::Result<()> {
    check_file_size(ram.bytes())?;
    for (addr, len) in ram.overlays() {
        copy(ram, &(*addr..addr + len), ram.file(), &|| true)?;
    }
    Ok(())
}

/// Returns a new memory file with a copy of all of `ram`; holes stay holes. Fails as soon as
/// `goes_on` returns false.
pub(super) fn copy_out(ram: &GuestRam, goes_on: impl Fn() -> bool) -> std::io::Result<File> {
    check_file_size(ram.bytes())?;
    let target = memfd()?;
    target.set_len(ram.bytes())?;
    let mut ranges = data_ranges(ram.file(), ram.bytes())?;
    ranges.extend(ram.overlays().iter().map(|(addr, len)| *addr..addr + len));
    if ram.sharing() == Sharing::Private {
        ranges.extend(written_ranges(ram)?);
    }
    for range in ranges {
        copy(ram, &range, &target, &goes_on)?;
    }
    Ok(target)
}

/// Copies a range of guest addresses, as the guest sees it, into `target` at its file offset.
fn copy(
    ram: &GuestRam,
    range: &Range<u64>,
    target: &File,
    goes_on: &impl Fn() -> bool,
) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    let mut addr = range.start;
    while addr < range.end {
        if !goes_on() {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let len = CHUNK.min(range.end - addr);
        resize(&mut buffer, len)?;
        ram.map()
            .read_slice(&mut buffer, GuestAddress(addr))
            .map_err(std::io::Error::other)?;
        target.write_all_at(&buffer, file_offset(addr))?;
        addr += len;
    }
    Ok(())
}

/// As [`Vec::resize`], but memory that the host refuses (`ulimit -v`) is an error, not the end of
/// the program.
fn resize(buffer: &mut Vec<u8>, len: u64) -> std::io::Result<()> {
    let len = usize::try_from(len).unwrap_or(0);
    let refused = |_| std::io::Error::from_raw_os_error(libc::ENOMEM);
    let more = len.saturating_sub(buffer.len());
    buffer.try_reserve_exact(more).map_err(refused)?;
    buffer.resize(len, 0);
    Ok(())
}

fn guest_address(offset: u64) -> u64 {
    if offset < GAP_START {
        offset
    } else {
        offset - GAP_START + GAP_END
    }
}

/// Copies the pages of `from` that are not all zeroes into `to`, which is all holes. Returns the
/// SHA-256 of the length and of each such page with its offset: it does not depend on which pages
/// of zeroes are holes. `bytes` is the length of both files, in whole pages.
pub(super) fn copy_pages(from: &File, to: &File, bytes: u64) -> std::io::Result<Digest> {
    const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let mut hash = Sha256::new();
    hash.update(bytes.to_le_bytes());
    let mut buffer = Vec::new();
    for range in whole_pages(data_offsets(from, bytes)?) {
        let mut offset = range.start;
        while offset < range.end {
            let len = CHUNK.min(range.end - offset);
            resize(&mut buffer, len)?;
            from.read_exact_at(&mut buffer, offset)?;
            for run in buffer
                .as_chunks::<{ PAGE_SIZE as usize }>()
                .0
                .chunk_by(|one, next| (*one == ZEROES) == (*next == ZEROES))
            {
                if run.first() != Some(&ZEROES) {
                    for (page, place) in run.iter().zip(0u64..) {
                        hash.update((offset + place * PAGE_SIZE).to_le_bytes());
                        hash.update(page);
                    }
                    to.write_all_at(run.as_flattened(), offset)?;
                }
                offset += run.as_flattened().len() as u64;
            }
        }
    }
    Ok(hash.finalize().into())
}

/// Widens ranges to whole pages, and merges those that then meet or overlap.
fn whole_pages(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut wide: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        let start = range.start & !(PAGE_SIZE - 1);
        let end = range.end.next_multiple_of(PAGE_SIZE);
        match wide.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => wide.push(start..end),
        }
    }
    wide
}

/// Returns the ranges of `file` that hold data, as offsets below `bytes`.
fn data_offsets(file: &File, bytes: u64) -> std::io::Result<Vec<Range<u64>>> {
    use rustix::fs::SeekFrom as At;
    let mut ranges = Vec::new();
    let mut offset = 0;
    while offset < bytes {
        let data = match rustix::fs::seek(file, At::Data(offset)) {
            Ok(data) => data.min(bytes),
            // There is no data beyond `offset`: lseek(2).
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let hole = rustix::fs::seek(file, At::Hole(data))?.min(bytes);
        if data < hole {
            ranges.push(data..hole);
        }
        offset = hole.max(offset + 1);
    }
    Ok(ranges)
}

/// Returns the ranges of `file` that hold data, as guest addresses; none crosses the gap.
fn data_ranges(file: &File, bytes: u64) -> std::io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    for Range { start, end } in data_offsets(file, bytes)? {
        if start < GAP_START && end > GAP_START {
            ranges.push(start..GAP_START);
            ranges.push(GAP_END..guest_address(end));
        } else {
            ranges.push(guest_address(start)..guest_address(start) + (end - start));
        }
    }
    Ok(ranges)
}

/// Returns the ranges of pages that a clone wrote.
fn written_ranges(ram: &GuestRam) -> std::io::Result<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    each_own_page(ram, |addr| match ranges.last_mut() {
        Some(last) if last.end == addr => last.end += PAGE_SIZE,
        _ => ranges.push(addr..addr + PAGE_SIZE),
    })?;
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::MIB;

    /// Bytes of a file that are data, not holes.
    fn held(file: &File) -> u64 {
        let ranges = data_ranges(file, 4 * MIB).unwrap();
        ranges.iter().map(|s| s.end - s.start).sum()
    }

    fn byte(ram: &GuestRam, addr: u64) -> u8 {
        ram.map().read_obj(GuestAddress(addr)).unwrap()
    }

    #[test]
    fn a_copy_holds_file_pages_overlays_and_written_pages_and_nothing_else() {
        let mut ram = GuestRam::new(4 * MIB).unwrap();
        ram.map().write_obj(1u8, GuestAddress(MIB)).unwrap();
        let image = memfd().unwrap();
        image.set_len(4096).unwrap();
        image.write_all_at(&[2], 0).unwrap();
        ram.overlay(2 * MIB, &image, 0, 4096).unwrap();
        let first = Arc::new(copy_out(&ram, || true).unwrap());
        // Before a hole is read: a read through a mapping fills it with zeroes.
        assert_eq!(held(&first), 2 * 4096);
        let clone = GuestRam::map_file(Arc::clone(&first), 4 * MIB, Sharing::Private).unwrap();
        assert_eq!(
            [
                byte(&clone, MIB),
                byte(&clone, 2 * MIB),
                byte(&clone, 3 * MIB)
            ],
            [1, 2, 0]
        );
        clone.map().write_obj(3u8, GuestAddress(3 * MIB)).unwrap();
        clone.map().write_obj(4u8, GuestAddress(MIB)).unwrap();
        let second = Arc::new(copy_out(&clone, || true).unwrap());
        assert_eq!(held(&second), 3 * 4096);
        let again = GuestRam::map_file(Arc::clone(&second), 4 * MIB, Sharing::Private).unwrap();
        assert_eq!(
            [
                byte(&again, MIB),
                byte(&again, 2 * MIB),
                byte(&again, 3 * MIB)
            ],
            [4, 2, 3]
        );
    }

    #[test]
    fn copied_pages_leave_zeroes_out_and_hash_the_same_however_holes_lie() {
        let bytes = 4 * MIB;
        let full = tempfile::tempfile().unwrap();
        full.set_len(bytes).unwrap();
        // Data, zeroes that are written out, and an end that is not a hole.
        full.write_all_at(&vec![0; 3 << 20], 0).unwrap();
        full.write_all_at(b"one", 4095).unwrap();
        full.write_all_at(b"two", 2 * MIB).unwrap();
        full.write_all_at(b"!", bytes - 1).unwrap();
        let sparse = memfd().unwrap();
        sparse.set_len(bytes).unwrap();
        let digest = copy_pages(&full, &sparse, bytes).unwrap();
        assert_eq!(held(&sparse), 4 * 4096);
        let again = memfd().unwrap();
        again.set_len(bytes).unwrap();
        assert_eq!(copy_pages(&sparse, &again, bytes).unwrap(), digest);
        let [mut one, mut other] = [vec![0; 4 << 20], vec![0; 4 << 20]];
        full.read_exact_at(&mut one, 0).unwrap();
        again.read_exact_at(&mut other, 0).unwrap();
        assert!(one == other);
        // A page that moved or changed, or another length, gives another digest.
        let nowhere = || {
            let file = memfd().unwrap();
            file.set_len(2 * bytes).unwrap();
            file
        };
        full.set_len(2 * bytes).unwrap();
        assert_ne!(copy_pages(&full, &nowhere(), 2 * bytes).unwrap(), digest);
        full.write_all_at(b"\0\0\0", 2 * MIB).unwrap();
        full.write_all_at(b"two", 2 * MIB + 4096).unwrap();
        assert_ne!(copy_pages(&full, &nowhere(), bytes).unwrap(), digest);
    }

    #[test]
    fn completing_writes_overlays_into_the_file() {
        let mut ram = GuestRam::new(MIB).unwrap();
        let image = memfd().unwrap();
        image.set_len(8192).unwrap();
        image.write_all_at(&[7; 8192], 0).unwrap();
        ram.overlay(8192, &image, 0, 8192).unwrap();
        ram.map().write_obj(9u8, GuestAddress(8192)).unwrap();
        complete(&ram).unwrap();
        let file = Arc::clone(ram.file());
        drop(ram);
        let clone = GuestRam::map_file(file, MIB, Sharing::Private).unwrap();
        assert_eq!(
            [byte(&clone, 8191), byte(&clone, 8192), byte(&clone, 8193)],
            [0, 9, 7]
        );
    }

    #[test]
    fn memory_beyond_the_gap_is_copied_to_its_place() {
        let ram = GuestRam::new(GAP_START + MIB).unwrap();
        ram.map()
            .write_obj(5u8, GuestAddress(GAP_END + 4096))
            .unwrap();
        ram.map()
            .write_obj(6u8, GuestAddress(GAP_START - 1))
            .unwrap();
        let file = Arc::new(copy_out(&ram, || true).unwrap());
        let clone = GuestRam::map_file(file, GAP_START + MIB, Sharing::Private).unwrap();
        assert_eq!(
            [byte(&clone, GAP_END + 4096), byte(&clone, GAP_START - 1)],
            [5, 6]
        );
    }
}
