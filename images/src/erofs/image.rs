//! Reads the parts of a finished image that builds need: inodes and directories, as in the kernel's
//! `fs/erofs/erofs_fs.h`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::ErofsError;
use crate::cache::io_error;

const SUPERBLOCK: u64 = 1024;
const MAGIC: u32 = 0xE0F5_E1E2;
/// Bytes of a slot, the unit of inode numbers.
const SLOT: u64 = 32;
const DIRENT: usize = 12;
/// A limit far above the size of real directories.
const MAX_DIRECTORY: u64 = 16 << 20;
/// A limit of nested directories; a longer path cannot be opened.
const MAX_DEPTH: u32 = 2048;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;
const TYPE: u16 = 0o170_000;
const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;

pub(super) struct Image<'a> {
    file: &'a File,
    path: &'a Path,
    block_bits: u8,
    meta: u64,
    root: u64,
}

pub(super) struct Inode {
    /// The offset in the image.
    pub(super) at: u64,
    /// Whether the inode has the extended form: 64 bytes, with 32-bit numbers.
    pub(super) extended: bool,
    layout: u16,
    mode: u16,
    attributes: u64,
    bytes: u64,
    block: u64,
}

impl Inode {
    fn is(&self, kind: u16) -> bool {
        self.mode & TYPE == kind
    }
}

impl<'a> Image<'a> {
    pub(super) fn open(file: &'a File, path: &'a Path) -> Result<Self, ErofsError> {
        let mut image = Self {
            file,
            path,
            block_bits: 0,
            meta: 0,
            root: 0,
        };
        let head = image.read(SUPERBLOCK, 128)?;
        let field = |at| u32_at(&head, at).ok_or(ErofsError::Layout("superblock"));
        let bits = field(12)?.to_le_bytes();
        let [block_bits, ..] = bits;
        if field(0)? != MAGIC || !(9..=16).contains(&block_bits) {
            return Err(ErofsError::Layout("superblock"));
        }
        image.block_bits = block_bits;
        image.root = (field(12)? >> 16).into();
        image.meta = u64::from(field(40)?) << block_bits;
        Ok(image)
    }

    /// Returns the inode at `path`. Links are not followed.
    pub(super) fn find(&self, path: &str) -> Result<Inode, ErofsError> {
        let mut inode = self.inode(self.root)?;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let entries = self.entries(&inode)?;
            let found = entries.iter().find(|(known, _)| known == name.as_bytes());
            let (_, number) = found.ok_or(ErofsError::Layout("file of that name"))?;
            inode = self.inode(*number)?;
        }
        Ok(inode)
    }

    /// Fails unless guests can map each regular file directly from the image. The kernel maps files
    /// that are stored in whole blocks. If the end of a file is stored beside its inode, the kernel
    /// copies the file into the guest's memory instead (`erofs_set_aops` and `erofs_inode_set_dax`
    /// require `FLAT_PLAIN` or `CHUNK_BASED`).
    pub(super) fn check_in_place(&self) -> Result<(), ErofsError> {
        self.check_below(self.root, 0)
    }

    fn check_below(&self, number: u64, depth: u32) -> Result<(), ErofsError> {
        if depth > MAX_DEPTH {
            return Err(ErofsError::Layout("end of its directories"));
        }
        let inode = self.inode(number)?;
        if inode.is(REGULAR) && ![FLAT_PLAIN, CHUNK_BASED].contains(&inode.layout) {
            return Err(ErofsError::Layout("whole blocks of a file"));
        }
        if !inode.is(DIRECTORY) {
            return Ok(());
        }
        for (name, child) in self.entries(&inode)? {
            if ![&b"."[..], b".."].contains(&name.as_slice()) {
                self.check_below(child, depth + 1)?;
            }
        }
        Ok(())
    }

    fn read(&self, at: u64, len: usize) -> Result<Vec<u8>, ErofsError> {
        let mut bytes = vec![0; len];
        let read = self.file.read_exact_at(&mut bytes, at);
        read.map_err(io_error("read", self.path))?;
        Ok(bytes)
    }

    fn inode(&self, number: u64) -> Result<Inode, ErofsError> {
        let at = number
            .checked_mul(SLOT)
            .and_then(|bytes| bytes.checked_add(self.meta))
            .ok_or(ErofsError::Layout("inode"))?;
        let head = self.read(at, 32)?;
        let field = |at| u32_at(&head, at).ok_or(ErofsError::Layout("inode"));
        let [format, attributes] = halves(field(0)?);
        let [mode, _] = halves(field(4)?);
        Ok(Inode {
            at,
            extended: format & 1 != 0,
            layout: (format >> 1) & 7,
            mode,
            attributes: match attributes {
                0 => 0,
                count => 12 + 4 * u64::from(count - 1),
            },
            bytes: field(8)?.into(),
            block: field(16)?.into(),
        })
    }

    /// Returns the names in a directory, with their inode numbers.
    fn entries(&self, directory: &Inode) -> Result<Vec<(Vec<u8>, u64)>, ErofsError> {
        if !directory.is(DIRECTORY) {
            return Err(ErofsError::Layout("directory"));
        }
        let content = self.content(directory)?;
        let mut all = Vec::new();
        for block in content.chunks(1 << self.block_bits) {
            // The first name begins where the entries end.
            let entries = usize::from(u16_at(block, 8).unwrap_or(0)) / DIRENT;
            for index in 0..entries {
                let at = index * DIRENT;
                let number = u64_at(block, at).ok_or(ErofsError::Layout("entry"))?;
                let begin = u16_at(block, at + 8).map(usize::from);
                let end = match index + 1 < entries {
                    true => u16_at(block, at + DIRENT + 8).map(usize::from),
                    false => Some(block.len()),
                };
                let name = begin
                    .zip(end)
                    .and_then(|(begin, end)| block.get(begin..end))
                    // The last name of a block may be padded with zeros.
                    .and_then(|name| name.split(|byte| *byte == 0).next())
                    .ok_or(ErofsError::Layout("name"))?;
                all.push((name.to_owned(), number));
            }
        }
        Ok(all)
    }

    /// Reads a directory: contiguous whole blocks and, in the inline layout, the rest behind the
    /// inode.
    fn content(&self, inode: &Inode) -> Result<Vec<u8>, ErofsError> {
        if inode.bytes > MAX_DIRECTORY {
            return Err(ErofsError::Layout("directory"));
        }
        let tail = match inode.layout {
            FLAT_PLAIN => 0,
            FLAT_INLINE => inode.bytes % (1 << self.block_bits),
            _ => return Err(ErofsError::Layout("directory")),
        };
        let len = |bytes: u64| usize::try_from(bytes).map_err(|_| ErofsError::Layout("directory"));
        let mut content = self.read(inode.block << self.block_bits, len(inode.bytes - tail)?)?;
        let head = if inode.extended { 64 } else { 32 };
        content.extend(self.read(inode.at + head + inode.attributes, len(tail)?)?);
        Ok(content)
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_le_bytes();
    [u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])]
}
