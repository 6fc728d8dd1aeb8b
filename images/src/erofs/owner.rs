//! Gives files of a finished image to users.
//!
//! `mkfs.erofs` takes owners from the tree, where none but root can make other users' files. So all belong to root first, and
//! the two numbers are changed in the image: `fs/erofs/erofs_fs.h` of the kernel has the layout.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::ErofsError;
use crate::cache::io_error;

const SUPERBLOCK: u64 = 1024;
const MAGIC: u32 = 0xE0F5_E1E2;
/// Bytes of a slot, which inode numbers count.
const SLOT: u64 = 32;
const DIRENT: usize = 12;
/// Directories are smaller, by far.
const MAX_DIRECTORY: u64 = 16 << 20;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;

/// Makes the file or directory at `path`, absolute within the image, belong to the user and group of that number.
pub(crate) fn own(image: &Path, path: &str, id: u16) -> Result<(), ErofsError> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(image)
        .map_err(io_error("open", image))?;
    let image = Image::open(&file, image)?;
    let mut inode = image.inode(image.root)?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        inode = image.inode(image.entry(&inode, name)?)?;
    }
    image.set_owner(&inode, id)
}

struct Image<'a> {
    file: &'a File,
    path: &'a Path,
    block_bits: u8,
    meta: u64,
    root: u64,
}

struct Inode {
    at: u64,
    /// The longer form: 64 bytes, numbers of 32 bits.
    extended: bool,
    layout: u16,
    attributes: u64,
    bytes: u64,
    block: u64,
}

impl<'a> Image<'a> {
    fn open(file: &'a File, path: &'a Path) -> Result<Self, ErofsError> {
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
        Ok(Inode {
            at,
            extended: format & 1 != 0,
            layout: (format >> 1) & 7,
            attributes: match attributes {
                0 => 0,
                count => 12 + 4 * u64::from(count - 1),
            },
            bytes: field(8)?.into(),
            block: field(16)?.into(),
        })
    }

    /// The number of the inode that a directory has under a name.
    fn entry(&self, directory: &Inode, name: &str) -> Result<u64, ErofsError> {
        let content = self.content(directory)?;
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
                let found = begin
                    .zip(end)
                    .and_then(|(begin, end)| block.get(begin..end));
                // The last name of a block may be followed by zeros.
                let found = found.and_then(|found| found.split(|byte| *byte == 0).next());
                if found == Some(name.as_bytes()) {
                    return Ok(number);
                }
            }
        }
        Err(ErofsError::Layout("file that is to be owned by a user"))
    }

    /// Whole blocks from one place; if the layout says so, the rest behind the inode.
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

    fn set_owner(&self, inode: &Inode, id: u16) -> Result<(), ErofsError> {
        let bytes = match inode.extended {
            true => [u32::from(id).to_le_bytes(), u32::from(id).to_le_bytes()].concat(),
            false => [id.to_le_bytes(), id.to_le_bytes()].concat(),
        };
        let written = self.file.write_all_at(&bytes, inode.at + 24);
        written.map_err(io_error("write", self.path))?;
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// What changed between two images: the place of each byte.
    fn changed(before: &[u8], after: &[u8]) -> Vec<usize> {
        assert_eq!(before.len(), after.len());
        let pairs = before.iter().zip(after).enumerate();
        pairs
            .filter(|(_, (a, b))| a != b)
            .map(|(at, _)| at)
            .collect()
    }

    #[test]
    fn the_owner_of_one_directory_changes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        // Directories of one entry and of several blocks of them.
        fs::create_dir_all(tree.join("home/user")).unwrap();
        for number in 0..2000 {
            fs::create_dir(tree.join(format!("home/somebody-{number:04}"))).unwrap();
        }
        if let Err(error) = super::super::make(&tree, &image) {
            use std::io::Write;
            let line = format!("\nNOT MEASURED: {error}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
            return;
        }
        let before = fs::read(&image).unwrap();
        for path in [
            "/home/user",
            "/home/somebody-0000",
            "/home/somebody-1999",
            "/",
        ] {
            own(&image, path, 0x1234).unwrap();
            let after = fs::read(&image).unwrap();
            let changed = changed(&before, &after);
            let [first, ..] = changed[..] else {
                panic!("nothing changed")
            };
            assert_eq!(changed, [first, first + 1, first + 2, first + 3], "{path}");
            // An inode's slot, and a directory's mode.
            assert_eq!(first % 32, 24, "{path}");
            assert_eq!(u16_at(&after, first - 20).unwrap() >> 12, 0o4, "{path}");
            own(&image, path, 0).unwrap();
            assert!(fs::read(&image).unwrap() == before);
        }
        let none = own(&image, "/home/none", 1).unwrap_err();
        assert!(matches!(none, ErofsError::Layout(_)), "{none}");
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 16).unwrap();
        assert!(matches!(
            own(file.path(), "/", 1),
            Err(ErofsError::Layout("superblock"))
        ));
    }
}
