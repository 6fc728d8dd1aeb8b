//! Kernel files: detects their format by content, never by name, and loads them into a memory file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::GuestAddress;

use super::bzimage::{self, BzImageError};
use super::{Entry, EntryChoice, EntryMode};
use crate::layout;
use crate::memory::{GAP_START, GuestRam, MemoryError, PAGE_SIZE};

/// File format, as detected by a file's first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFormat {
    /// A 64-bit x86 ELF executable (`vmlinux`).
    Elf,
    /// A Linux `bzImage`.
    BzImage,
    /// An ELF file for another processor or of another class.
    ForeignElf,
    /// A compressed file of the named kind.
    Compressed(&'static str),
    /// An unknown format.
    Unknown,
}

impl std::fmt::Display for KernelFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Elf => f.write_str("a 64-bit x86 ELF file"),
            Self::BzImage => f.write_str("a bzImage"),
            Self::ForeignElf => f.write_str("an ELF file that is not 64-bit x86"),
            Self::Compressed(kind) => write!(f, "a {kind}-compressed file"),
            Self::Unknown => f.write_str("no kernel format that we know"),
        }
    }
}

/// Why a kernel file is refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It could not be opened or read.
    #[error("cannot be read; check that it exists and is readable")]
    Read(#[from] std::io::Error),
    /// It is empty.
    #[error("is empty")]
    Empty,
    /// It is not a regular file.
    #[error("is not a regular file")]
    NotAFile,
    /// It is neither a 64-bit ELF file nor a bzImage.
    #[error("is {0}; a 64-bit ELF vmlinux or a bzImage is needed")]
    Format(KernelFormat),
    /// It is a bzImage whose kernel cannot be unpacked.
    #[error("is a bzImage that cannot be used: {0}")]
    BzImage(#[from] BzImageError),
    /// It is a bzImage that does not contain a 64-bit ELF kernel.
    #[error("is a bzImage with {0} inside; a 64-bit kernel is needed")]
    Inside(KernelFormat),
    /// It is an ELF file that cannot be loaded (truncated, no segments, damaged header).
    #[error("is damaged or truncated: {0}")]
    Elf(String),
    /// The host has no memory for it.
    #[error("cannot be held in memory")]
    Memory(#[source] MemoryError),
    /// PVH was chosen and the kernel has no PVH note.
    #[error("has no PVH entry point; build it with CONFIG_PVH=y or use the 64-bit entry")]
    NoPvh,
}

/// A kernel in a memory file, in which offsets are guest addresses.
#[derive(Debug)]
pub(super) struct Loaded {
    /// The file; its length is `end`, in whole pages.
    pub(super) file: Arc<File>,
    /// Address of the first instruction for the 64-bit protocol.
    pub(super) start: u64,
    /// Address of the first instruction for PVH, if the kernel has such an entry.
    pub(super) pvh: Option<u64>,
    /// Page-aligned, sorted ranges of the file that hold content.
    pub(super) extents: Vec<Range<u64>>,
    /// First free page after the kernel and its bss.
    pub(super) end: u64,
}

impl Loaded {
    /// Returns where the first vCPU starts.
    pub(super) fn entry(&self, choice: EntryChoice) -> Result<Entry, KernelError> {
        match (choice, self.pvh) {
            (EntryChoice::Pvh, Some(address)) => Ok(Entry {
                address,
                mode: EntryMode::Pvh,
            }),
            (EntryChoice::Pvh, None) => Err(KernelError::NoPvh),
            (EntryChoice::Auto | EntryChoice::Linux64, _) => Ok(Entry {
                address: self.start,
                mode: EntryMode::Linux64,
            }),
        }
    }
}

/// Maximum number of program headers; real kernels have about five.
const MAX_SEGMENTS: u16 = 64;
const PT_LOAD: u32 = 1;

/// Detects a file's format by its first bytes.
pub(super) fn sniff(head: &[u8]) -> KernelFormat {
    match head {
        // ELF specification: magic, class 2 (64-bit), little endian; machine 62 (x86-64).
        [0x7f, b'E', b'L', b'F', 2, 1, ..] if head.get(18..20) == Some(&[62, 0]) => {
            KernelFormat::Elf
        }
        [0x7f, b'E', b'L', b'F', ..] => KernelFormat::ForeignElf,
        [0x1f, 0x8b, ..] => KernelFormat::Compressed("gzip"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => KernelFormat::Compressed("xz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => KernelFormat::Compressed("zstd"),
        [b'B', b'Z', b'h', ..] => KernelFormat::Compressed("bzip2"),
        // boot.rst: the setup header's magic.
        _ if head.get(0x202..0x206) == Some(b"HdrS") => KernelFormat::BzImage,
        _ => KernelFormat::Unknown,
    }
}

/// Reads the kernel at `path` into a memory file.
pub(super) fn load(path: &Path) -> Result<Loaded, KernelError> {
    let mut file = super::image::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(KernelError::NotAFile);
    }
    if metadata.len() == 0 {
        return Err(KernelError::Empty);
    }
    let mut head = read_head(&mut file)?;
    match sniff(&head) {
        KernelFormat::Elf => {}
        KernelFormat::BzImage => {
            file = bzimage::unpack(&file, &head, metadata.len())?;
            head = read_head(&mut file)?;
            match sniff(&head) {
                KernelFormat::Elf => {}
                other => return Err(KernelError::Inside(other)),
            }
        }
        other => return Err(KernelError::Format(other)),
    }
    let file_len = file.metadata()?.len();
    let (extents, end) = check_segments(&mut file, &head, file_len)?;
    let memory = GuestRam::new(end).map_err(KernelError::Memory)?;
    file.seek(SeekFrom::Start(0))?;
    let loaded = Elf::load(
        memory.map(),
        None,
        &mut file,
        Some(GuestAddress(layout::HIGH_START)),
    )
    .map_err(|e| KernelError::Elf(e.to_string()))?;
    let pvh = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Some(address.0),
        _ => None,
    };
    let file = Arc::clone(memory.file());
    Ok(Loaded {
        file,
        start: loaded.kernel_load.0,
        pvh,
        extents,
        end,
    })
}

/// Reads the first KiB, by which the format is detected.
fn read_head(file: &mut File) -> std::io::Result<Vec<u8>> {
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(0x400).read_to_end(&mut head)?;
    Ok(head)
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], KernelError> {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or_else(|| KernelError::Elf("the file ends inside its header".into()))
}

/// Checks every loadable segment before anything is written: it must lie inside the file, above 1
/// MiB and below the gap. Returns the page ranges that hold content and the first page after all
/// segments, in whatever order they are.
fn check_segments(
    file: &mut File,
    head: &[u8],
    file_len: u64,
) -> Result<(Vec<Range<u64>>, u64), KernelError> {
    // Elf64_Ehdr and Elf64_Phdr (ELF-64 object file format, version 1.5).
    let table = u64::from_le_bytes(bytes_at(head, 32)?);
    let entry_size = u16::from_le_bytes(bytes_at(head, 54)?);
    let count = u16::from_le_bytes(bytes_at(head, 56)?);
    if entry_size != 56 || count == 0 || count > MAX_SEGMENTS {
        return Err(KernelError::Elf(format!(
            "{count} program headers of {entry_size} bytes"
        )));
    }
    file.seek(SeekFrom::Start(table))?;
    let mut headers = vec![0u8; usize::from(entry_size) * usize::from(count)];
    file.read_exact(&mut headers)
        .map_err(|_| KernelError::Elf("the file ends inside its program headers".into()))?;
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut kernel_end = 0;
    for header in headers.chunks_exact(56) {
        if u32::from_le_bytes(bytes_at(header, 0)?) != PT_LOAD {
            continue;
        }
        let offset = u64::from_le_bytes(bytes_at(header, 8)?);
        let address = u64::from_le_bytes(bytes_at(header, 24)?);
        let in_file = u64::from_le_bytes(bytes_at(header, 32)?);
        let in_memory = u64::from_le_bytes(bytes_at(header, 40)?);
        if offset.checked_add(in_file).is_none_or(|end| end > file_len) {
            return Err(KernelError::Elf(
                "a segment reaches beyond the end of the file".into(),
            ));
        }
        let end = address
            .checked_add(in_memory.max(in_file))
            .filter(|end| *end <= GAP_START)
            .ok_or_else(|| KernelError::Elf(format!("a segment at {address:#x} beyond 3 GiB")))?;
        if address < layout::HIGH_START {
            return Err(KernelError::Elf(format!(
                "a segment at {address:#x}, below 1 MiB"
            )));
        }
        if in_file > 0 {
            let page = address & !(PAGE_SIZE - 1);
            extents.push(page..(address + in_file).next_multiple_of(PAGE_SIZE));
        }
        kernel_end = kernel_end.max(end.next_multiple_of(PAGE_SIZE));
    }
    if extents.is_empty() {
        return Err(KernelError::Elf("no loadable segment".into()));
    }
    Ok((merge(extents), kernel_end))
}

/// Sorts ranges and joins those that touch or overlap.
fn merge(mut extents: Vec<Range<u64>>) -> Vec<Range<u64>> {
    extents.sort_by_key(|e| e.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for extent in extents {
        match merged.last_mut() {
            Some(last) if extent.start <= last.end => last.end = last.end.max(extent.end),
            _ => merged.push(extent),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIB;
    use std::io::Write;

    /// An ELF file with the given (address, content, bytes in memory) segments.
    fn elf(segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let mut file = vec![0u8; 64];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        file[6] = 1;
        file[16..18].copy_from_slice(&2u16.to_le_bytes());
        file[18..20].copy_from_slice(&62u16.to_le_bytes());
        file[24..32].copy_from_slice(&(16 * MIB).to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[52..54].copy_from_slice(&64u16.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        let mut offset = 64 + 56 * segments.len() as u64;
        for (address, content, in_memory) in segments {
            let mut header = [0u8; 56];
            header[..4].copy_from_slice(&1u32.to_le_bytes());
            header[8..16].copy_from_slice(&offset.to_le_bytes());
            header[16..24].copy_from_slice(&address.to_le_bytes());
            header[24..32].copy_from_slice(&address.to_le_bytes());
            header[32..40].copy_from_slice(&(content.len() as u64).to_le_bytes());
            header[40..48].copy_from_slice(&in_memory.to_le_bytes());
            file.extend_from_slice(&header);
            offset += content.len() as u64;
        }
        for (_, content, _) in segments {
            file.extend_from_slice(content);
        }
        file
    }

    fn try_load(bytes: &[u8]) -> Result<Loaded, KernelError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        load(file.path())
    }

    #[test]
    fn unsorted_segments_still_give_the_true_end() {
        let loaded = try_load(&elf(&[
            (18 * MIB, b"data", 2 * MIB),
            (16 * MIB, b"text", 4),
        ]))
        .unwrap();
        assert_eq!(loaded.end, 20 * MIB);
        assert_eq!(loaded.start, 16 * MIB);
        let page = |at| at..at + PAGE_SIZE;
        assert_eq!(loaded.extents, [page(16 * MIB), page(18 * MIB)]);
        let mut text = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&*loaded.file, &mut text, 16 * MIB).unwrap();
        assert_eq!(&text, b"text");
    }

    #[test]
    fn a_truncated_kernel_is_refused_at_every_length() {
        let whole = elf(&[(16 * MIB, &[0x90; 300], 300)]);
        for len in 1..whole.len() {
            assert!(
                try_load(&whole[..len]).is_err(),
                "{len} bytes were accepted"
            );
        }
        assert!(try_load(&whole).is_ok());
    }

    #[test]
    fn segments_outside_memory_are_refused_before_anything_is_written() {
        assert!(matches!(
            try_load(&elf(&[(16 * MIB, b"x", GAP_START)])),
            Err(KernelError::Elf(_))
        ));
        assert!(matches!(
            try_load(&elf(&[(u64::MAX, b"x", 4)])),
            Err(KernelError::Elf(_))
        ));
        assert!(matches!(
            try_load(&elf(&[(0x1000, b"x", 4)])),
            Err(KernelError::Elf(_))
        ));
        assert!(matches!(try_load(&elf(&[])), Err(KernelError::Elf(_))));
    }

    #[test]
    fn formats_are_told_by_content() {
        let mut bz = vec![0u8; 0x400];
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(sniff(&bz), KernelFormat::BzImage);
        for (bytes, name) in [
            (bz.clone(), "bzImage"),
            (vec![0x1f, 0x8b, 8], "gzip"),
            (b"#!/bin/sh\n".to_vec(), "no kernel"),
            (
                vec![
                    0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0,
                ],
                "not 64-bit",
            ),
        ] {
            let error = try_load(&bytes).err().unwrap();
            assert!(error.to_string().contains(name), "{error}");
        }
        assert!(matches!(try_load(b""), Err(KernelError::Empty)));
    }

    /// A bzImage around `kernel`.
    fn bzimage(kernel: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(kernel).unwrap();
        let payload = packer.finish().unwrap();
        let mut file = vec![0u8; 1024];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend(payload);
        file
    }

    #[test]
    fn a_bzimage_is_loaded_as_the_kernel_inside_it() {
        let kernel = elf(&[(16 * MIB, b"text", 4), (18 * MIB, b"data", MIB)]);
        let [inside, plain] = [bzimage(&kernel), kernel].map(|bytes| try_load(&bytes).unwrap());
        assert_eq!(
            (inside.start, inside.end, &inside.extents),
            (plain.start, plain.end, &plain.extents)
        );
        let mut text = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&*inside.file, &mut text, 16 * MIB).unwrap();
        assert_eq!(&text, b"text");
    }

    #[test]
    fn a_bzimage_without_a_64_bit_kernel_is_refused_by_what_is_inside() {
        let mut foreign = elf(&[(16 * MIB, b"text", 4)]);
        foreign[4] = 1;
        for (inside, name) in [(foreign, "not 64-bit"), (bzimage(b"x"), "a bzImage inside")] {
            let error = try_load(&bzimage(&inside)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_kernel_without_a_pvh_note_cannot_be_entered_by_pvh() {
        let loaded = try_load(&elf(&[(16 * MIB, b"text", 4)])).unwrap();
        assert!(matches!(
            loaded.entry(EntryChoice::Pvh),
            Err(KernelError::NoPvh)
        ));
        assert!(loaded.entry(EntryChoice::Auto).is_ok());
    }
}
