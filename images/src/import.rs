//! Makes an image that guests read in place (EROFS, uncompressed) from a user's root file system.

use std::path::{Path, PathBuf};

use crate::cache::{CacheError, io_error};
use crate::command::{self, CommandError};
use crate::erofs::{self, ErofsError};

/// Why no image was made. No partial image is left at the output path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The source does not exist, or is not a directory or archive.
    #[error("{}: neither a directory nor a tar archive", .0.display())]
    Source(PathBuf),
    /// The output path exists already.
    #[error("{} exists; remove it first or choose another name", .0.display())]
    Exists(PathBuf),
    /// The image could not be made.
    #[error(transparent)]
    Image(#[from] ErofsError),
    /// `tar` is missing or failed.
    #[error("the archive was not unpacked")]
    Tar(#[source] CommandError),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] CacheError),
}

/// Makes the image `output` from a directory or from a tar archive (compressed or not), such as
/// that of `docker export`. All files belong to root. The files in an archive's `dev` are left out,
/// because the guest's kernel creates devices. Does not need root. Blocks.
///
/// # Errors
/// [`ImportError`].
pub fn import(source: &Path, output: &Path) -> Result<(), ImportError> {
    if output.exists() {
        return Err(ImportError::Exists(output.to_owned()));
    }
    // Programs do not start in the caller's directory.
    let absolute = |path: &Path| std::path::absolute(path).map_err(io_error("use", path));
    let (source, output) = (&absolute(source)?, &absolute(output)?);
    let near = match output.parent() {
        Some(dir) => dir,
        None => Path::new("/"),
    };
    // The file system that has room for the image most likely has room for its sources, too.
    let scratch = tempfile::tempdir_in(near).map_err(io_error("make a directory in", near))?;
    let tree = if source.is_dir() {
        source.to_owned()
    } else if source.is_file() {
        unpack(source, &scratch.path().join("tree"))?
    } else {
        return Err(ImportError::Source(source.to_owned()));
    };
    let image = scratch.path().join("image");
    erofs::make(&tree, &image)?;
    std::fs::rename(&image, output).map_err(io_error("write", output))?;
    Ok(())
}

fn unpack(archive: &Path, tree: &Path) -> Result<PathBuf, ImportError> {
    std::fs::create_dir(tree).map_err(io_error("create", tree))?;
    let mut tar = command::tool("tar");
    tar.args(["--extract", "--no-same-owner", "--exclude=dev/*", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(tree);
    command::run(&mut tar, |_| {}).map_err(ImportError::Tar)?;
    Ok(tree.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn have_mkfs() -> bool {
        let there = command::output(command::tool("mkfs.erofs").arg("--help")).is_ok();
        if !there {
            use std::io::Write;
            let line = b"\nNOT MEASURED: no mkfs.erofs\n";
            let _ = std::io::stderr().write_all(line);
        }
        there
    }

    #[test]
    fn a_directory_and_its_archive_give_the_same_image_each_time() {
        if !have_mkfs() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("tree/etc")).unwrap();
        fs::write(at("tree/etc/name"), "value").unwrap();
        std::os::unix::fs::symlink("etc/name", at("tree/link")).unwrap();
        let tar = [
            "--create",
            "--file",
            "archive.tar",
            "--directory",
            "tree",
            ".",
        ];
        command::run(command::tool("tar").args(tar).current_dir(&dir), |_| {}).unwrap();
        import(&at("tree"), &at("one")).unwrap();
        import(&at("tree"), &at("two")).unwrap();
        import(&at("archive.tar"), &at("three")).unwrap();
        let one = fs::read(at("one")).unwrap();
        assert_eq!(one.len(), 2 << 20);
        // EROFS_SUPER_MAGIC_V1 (fs/erofs/erofs_fs.h) after 1 KiB.
        assert_eq!(one[1024..1028], 0xE0F5_E1E2_u32.to_le_bytes());
        assert!(one == fs::read(at("two")).unwrap());
        assert!(one == fs::read(at("three")).unwrap());
        assert!(matches!(
            import(&at("tree"), &at("one")),
            Err(ImportError::Exists(_))
        ));
        let names = fs::read_dir(&dir).unwrap().count();
        assert_eq!(names, 5, "nothing is left over");
    }

    #[test]
    fn a_hostile_archive_changes_nothing_on_this_machine() {
        use tar::EntryType::{Link, Regular, Symlink};
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "witness").unwrap();
        let (out, file) = (outside.to_str().unwrap(), outside.join("file"));
        let file = file.to_str().unwrap();
        let attacks: [&[(&str, tar::EntryType, &str)]; 6] = [
            &[("a", Symlink, out), ("a/file", Regular, "")],
            &[("a", Symlink, "../../outside"), ("a/new", Regular, "")],
            &[("../../outside/file", Regular, "")],
            &[(file, Regular, "")],
            &[("a", Link, file), ("a", Regular, "")],
            &[("a", Symlink, file), ("a", Regular, "")],
        ];
        for members in attacks {
            let archive = dir.path().join("archive.tar");
            let mut builder = tar::Builder::new(fs::File::create(&archive).unwrap());
            for (name, kind, link) in members {
                let mut header = tar::Header::new_gnu();
                header.set_entry_type(*kind);
                header.set_mode(0o4777);
                header.set_size(0);
                // Written directly: the crate's setters refuse such names.
                let fields = header.as_gnu_mut().unwrap();
                fields.name[..name.len()].copy_from_slice(name.as_bytes());
                fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
                header.set_cksum();
                builder.append(&header, &[][..]).unwrap();
            }
            builder.finish().unwrap();
            let _ = import(&archive, &dir.path().join("image"));
            assert_eq!(
                fs::read(outside.join("file")).unwrap(),
                b"witness",
                "{members:?}"
            );
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{members:?}");
            let _ = fs::remove_file(dir.path().join("image"));
            assert_eq!(fs::read_dir(&dir).unwrap().count(), 2, "{members:?}");
        }
    }

    #[test]
    fn what_is_neither_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let none = import(&dir.path().join("none"), &out);
        assert!(matches!(none, Err(ImportError::Source(_))), "{none:?}");
        let text = dir.path().join("text");
        fs::write(&text, "no archive").unwrap();
        assert!(matches!(import(&text, &out), Err(ImportError::Tar(_))));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }
}
