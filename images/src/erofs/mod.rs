//! Makes images that guests read in place: EROFS, uncompressed.

mod image;
mod owner;

use std::fs::File;
use std::path::Path;

use self::image::Image;
use crate::cache::{CacheError, io_error};
use crate::command::{self, CommandError};

pub(crate) use owner::own;

/// The size of an image is a multiple of this: guests plug images in by units of 2 MiB.
const GRANULE: u64 = 2 << 20;
/// Options of mkfs.erofs. The same tree gives the same bytes: no times, no random numbers, no
/// extended attributes of this machine. No superblock checksum: owners are changed later. No end of
/// a file beside its inode: guests could not map the file.
const FIXED: [&str; 7] = [
    "-T0",
    "-U00000000-0000-0000-0000-000000000000",
    "-x-1",
    "-Enosbcrc",
    "-Enoinline_data",
    "--all-root",
    "--quiet",
];

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// `mkfs.erofs` is missing or failed.
    #[error(
        "the image was not made; mkfs.erofs is in the package erofs-utils (sudo apt-get install -y erofs-utils)"
    )]
    Mkfs(#[source] CommandError),
    /// The image does not have the expected layout.
    #[error("the image that mkfs.erofs made has no {0} where it should be")]
    Layout(&'static str),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] CacheError),
}

/// Makes `image` from the files in `tree`. All files belong to root, and guests can map each of
/// them directly from the image.
pub(crate) fn make(tree: &Path, image: &Path) -> Result<(), ErofsError> {
    let mut mkfs = command::tool("mkfs.erofs");
    command::run(mkfs.args(FIXED).arg(image).arg(tree), |_| {}).map_err(ErofsError::Mkfs)?;
    let open = File::options().read(true).write(true).open(image);
    let file = open.map_err(io_error("open", image))?;
    // Older versions of mkfs.erofs ignore options that they do not know.
    Image::open(&file, image)?.check_in_place()?;
    let whole = || {
        let bytes = file.metadata()?.len();
        file.set_len(bytes.next_multiple_of(GRANULE))?;
        file.sync_all()
    };
    whole().map_err(io_error("write", image))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_file_can_be_mapped_as_it_lies_in_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        // Less than a block, blocks and a rest, whole blocks, an empty file.
        fs::create_dir_all(tree.join("in/side")).unwrap();
        for bytes in [100, 9000, 8192, 0] {
            fs::write(tree.join(format!("in/side/{bytes}")), vec![1; bytes]).unwrap();
        }
        std::os::unix::fs::symlink("nowhere", tree.join("link")).unwrap();
        if let Err(error) = make(&tree, &image) {
            use std::io::Write;
            let line = format!("\nNOT MEASURED: {error}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
            return;
        }
        let check = || {
            let file = File::open(&image).unwrap();
            Image::open(&file, &image).unwrap().check_in_place()
        };
        check().unwrap();
        // The default of mkfs.erofs.
        let mut mkfs = command::tool("mkfs.erofs");
        let plain = FIXED.iter().filter(|word| !word.contains("inline"));
        command::run(mkfs.args(plain).arg(&image).arg(&tree), |_| {}).unwrap();
        let error = check().unwrap_err();
        assert!(error.to_string().contains("whole blocks"), "{error}");
    }
}
