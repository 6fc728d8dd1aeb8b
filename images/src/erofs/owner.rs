//! Changes the owners of files in a finished image.
//!
//! `mkfs.erofs` takes owners from the tree, where only root can create files of other users. So all
//! files belong to root at first, and the two numbers are changed in the image. The layout is that
//! of the kernel's `fs/erofs/erofs_fs.h`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::ErofsError;
use super::image::Image;
use crate::cache::io_error;

/// Sets the user and group of the file or directory at `path`, absolute within the image, to `id`.
pub(crate) fn own(image: &Path, path: &str, id: u16) -> Result<(), ErofsError> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(image)
        .map_err(io_error("open", image))?;
    let inode = Image::open(&file, image)?.find(path)?;
    let bytes = match inode.extended {
        true => [u32::from(id).to_le_bytes(), u32::from(id).to_le_bytes()].concat(),
        false => [id.to_le_bytes(), id.to_le_bytes()].concat(),
    };
    let written = file.write_all_at(&bytes, inode.at + 24);
    written.map_err(io_error("write", image))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Returns the offsets of the bytes that differ between two images.
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
        // Directories with one entry, and with several blocks of entries.
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
            // The offset within an inode's slot, and the mode of a directory.
            assert_eq!(first % 32, 24, "{path}");
            assert_eq!(after[first - 19] >> 4, 0o4, "{path}");
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
