//! The directory that becomes an image's root. Its files are not trusted.
//!
//! Each path belongs to the image: the kernel resolves it with the directory as its root
//! (`RESOLVE_IN_ROOT` of openat2(2)), so that neither `..` nor an absolute link leads out of it.
//! Operations apply to a name relative to a directory descriptor. This module never opens
//! a path of this machine that is joined with one of the image.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    self as sys, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, fchmod, linkat, mkdirat,
    openat, openat2, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::cache::{CacheError, io_error};

/// Tries of a lookup: the kernel may return EAGAIN when files are renamed at the same time.
const TRIES: u32 = 32;
/// The limit of nested directories that are removed; a longer path cannot be opened.
const MAX_DEPTH: u32 = 2048;

#[derive(Debug)]
pub(super) struct TreeRoot {
    dir: OwnedFd,
    /// The path on this machine: for messages, and for programs of this machine that read the
    /// tree.
    path: PathBuf,
}

impl TreeRoot {
    /// Creates `path`, which must not exist, as a directory that only this user may enter, since
    /// its files may have set-id bits. The tree's root is a directory in it.
    pub(super) fn create(path: &Path) -> Result<Self, CacheError> {
        let root = path.join("root");
        let make = || {
            sys::mkdir(path, Mode::RWXU)?;
            sys::mkdir(&root, Mode::RWXU)?;
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            sys::open(&root, flags, Mode::empty())
        };
        let dir = make().map_err(|errno| io_error("create", path)(errno.into()))?;
        Ok(Self { dir, path: root })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Creates the directory and its parents, if they do not exist.
    pub(super) fn make_dirs(&self, path: &Path) -> Result<(), CacheError> {
        self.made(path)
            .map(drop)
            .map_err(self.failed("create", path))
    }

    /// Like `make_dirs`, and sets the directory's mode.
    pub(super) fn make_dir(&self, path: &Path, mode: u32) -> Result<(), CacheError> {
        let make = || fchmod(&self.made(path)?, Mode::from_raw_mode(mode));
        make().map_err(self.failed("create", path))
    }

    /// Writes a file with this content. Replaces an existing file, but not a directory.
    pub(super) fn write(
        &self,
        path: &Path,
        mut content: impl Read,
        mode: u32,
    ) -> Result<(), CacheError> {
        let mut write = || {
            let (dir, name) = self.place_for(path)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mut file = File::from(openat(&dir, name, flags, Mode::RUSR | Mode::WUSR)?);
            io::copy(&mut content, &mut file)?;
            fchmod(&file, Mode::from_raw_mode(mode))?;
            Ok(())
        };
        write().map_err(self.io_failed("write", path))
    }

    /// Creates a symbolic link with this text. Replaces an existing file, but not a directory.
    pub(super) fn symlink(
        &self,
        text: impl rustix::path::Arg,
        path: &Path,
    ) -> Result<(), CacheError> {
        let link = || {
            let (dir, name) = self.place_for(path)?;
            symlinkat(text, dir, name)
        };
        link().map_err(self.failed("create", path))
    }

    /// Creates a hard link to a file.
    pub(super) fn hard_link(&self, file: &Path, path: &Path) -> Result<(), CacheError> {
        let link = || {
            let (from, known) = self.parent_of(file)?;
            let (dir, name) = self.place_for(path)?;
            linkat(from, known, dir, name, AtFlags::empty())
        };
        link().map_err(self.failed("create", path))
    }

    /// Removes the file, or the directory with its contents, if it exists.
    pub(super) fn remove(&self, path: &Path) -> Result<(), CacheError> {
        let remove = || {
            let (dir, name) = self.parent_of(path)?;
            remove_all(dir.as_fd(), name, 0)
        };
        match remove() {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            result => result.map_err(self.failed("remove", path)),
        }
    }

    /// Returns whether the name exists, even as a dangling link.
    pub(super) fn has(&self, path: &Path) -> bool {
        let found = || {
            let (dir, name) = self.parent_of(path)?;
            statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        };
        found().is_ok()
    }

    pub(super) fn is_dir(&self, path: &Path) -> bool {
        self.directory(path).is_ok()
    }

    /// Returns the names in a directory, sorted, or `None` if it does not exist.
    pub(super) fn names(&self, path: &Path) -> Result<Option<Vec<OsString>>, CacheError> {
        let read = || {
            let mut names = Vec::new();
            for entry in Dir::read_from(self.directory(path)?)? {
                let name = entry?.file_name().to_bytes().to_vec();
                names.push(OsString::from_vec(name));
            }
            names.retain(|name| name != "." && name != "..");
            names.sort();
            Ok(names)
        };
        match read() {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            result => result.map(Some).map_err(self.failed("read", path)),
        }
    }

    /// Reads at most `limit` bytes of a regular file. Links are followed.
    pub(super) fn read(&self, path: &Path, limit: u64) -> Result<Vec<u8>, CacheError> {
        let read = || {
            // Without `NONBLOCK`, opening a pipe would wait for its other end.
            let file = File::from(self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
            if !file.metadata()?.is_file() {
                return Err(Errno::INVAL.into());
            }
            let mut content = Vec::new();
            file.take(limit).read_to_end(&mut content)?;
            Ok(content)
        };
        read().map_err(self.io_failed("read", path))
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = match path.as_os_str().is_empty() {
            true => Path::new("/"),
            false => path,
        };
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = flags | OFlags::CLOEXEC;
        let mut tries = 1;
        loop {
            match openat2(&self.dir, path, flags, Mode::empty(), how) {
                Err(Errno::AGAIN) if tries < TRIES => tries += 1,
                result => return result,
            }
        }
    }

    fn directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Returns the opened parent directory of a path, and the last name of the path.
    fn parent_of<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), Errno> {
        let (dir, name) = split(path)?;
        Ok((self.directory(dir)?, name))
    }

    /// Like `parent_of`, but creates the directory if needed and removes a file of that name.
    fn place_for<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), Errno> {
        let (dir, name) = split(path)?;
        let dir = self.made(dir)?;
        match unlinkat(&dir, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok((dir, name)),
            Err(errno) => Err(errno),
        }
    }

    fn made(&self, path: &Path) -> Result<OwnedFd, Errno> {
        match self.directory(path) {
            Err(Errno::NOENT) => {}
            result => return result,
        }
        let mut so_far = PathBuf::new();
        let mut dir = self.directory(&so_far)?;
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir => continue,
                Component::Normal(name) => so_far.push(name),
                Component::ParentDir | Component::Prefix(_) => return Err(Errno::INVAL),
            }
            let next = match self.directory(&so_far) {
                Err(Errno::NOENT) => {
                    let (_, name) = split(&so_far)?;
                    mkdirat(&dir, name, Mode::RWXU)?;
                    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let new = openat(&dir, name, flags, Mode::empty())?;
                    // The mode does not depend on this process's umask.
                    fchmod(&new, Mode::from_raw_mode(0o755))?;
                    Ok(new)
                }
                result => result,
            };
            dir = next?;
        }
        Ok(dir)
    }

    fn failed(&self, action: &'static str, path: &Path) -> impl FnOnce(Errno) -> CacheError {
        let failed = self.io_failed(action, path);
        move |errno| failed(errno.into())
    }

    fn io_failed(&self, action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
        // The path is for messages only: nothing is opened by it.
        let shown = path.strip_prefix("/").unwrap_or(path);
        io_error(action, self.path.join(shown))
    }
}

/// Splits a path into its parent and its last name.
fn split(path: &Path) -> Result<(&Path, &OsStr), Errno> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    Ok((path.parent().unwrap_or(Path::new("")), name))
}

fn remove_all(
    dir: BorrowedFd<'_>,
    name: impl rustix::path::Arg + Copy,
    depth: u32,
) -> Result<(), Errno> {
    let data = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(data.st_mode) != FileType::Directory {
        return unlinkat(dir, name, AtFlags::empty());
    }
    if depth == MAX_DEPTH {
        return Err(Errno::LOOP);
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = openat(dir, name, flags, Mode::empty())?;
    for entry in Dir::read_from(&inner)? {
        let entry = entry?;
        if ![c".", c".."].contains(&entry.file_name()) {
            remove_all(inner.as_fd(), entry.file_name(), depth + 1)?;
        }
    }
    unlinkat(dir, name, AtFlags::REMOVEDIR)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// Returns a tree in which every name leads out of it, and the target of these names: a
    /// directory with a file.
    fn hostile() -> (tempfile::TempDir, TreeRoot, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "witness").unwrap();
        let tree = TreeRoot::create(&dir.path().join("tree")).unwrap();
        let at = |name: &str| tree.path().join(name);
        symlink(&outside, at("absolute")).unwrap();
        symlink("../../outside", at("above")).unwrap();
        symlink("../../../../../../../../..", at("far")).unwrap();
        symlink("/proc/self/root", at("magic")).unwrap();
        symlink(outside.join("file"), at("file")).unwrap();
        (dir, tree, outside)
    }

    #[test]
    fn no_path_of_a_tree_leads_out_of_it() {
        let (dir, tree, outside) = hostile();
        let far = Path::new("far").join(outside.strip_prefix("/").unwrap());
        let magic = Path::new("magic").join(outside.strip_prefix("/").unwrap());
        let ways = ["absolute", "/above", "../../outside", "/../../outside"].map(PathBuf::from);
        for way in ways.into_iter().chain([far, magic, outside.clone()]) {
            for name in ["file", "new", "deep/new"] {
                let path = way.join(name);
                // Whether it is done within the tree or refused does not matter for this machine.
                let _ = tree.remove(&path);
                let _ = tree.write(&path, &b"mine"[..], 0o4777);
                let _ = tree.make_dir(&path, 0o777);
                let _ = tree.symlink("nowhere", &path);
                let _ = tree.hard_link(&path, Path::new("stolen"));
                let _ = tree.hard_link(Path::new("file"), &path);
            }
            let _ = tree.remove(&way);
        }
        tree.write(Path::new("/file"), &b"mine"[..], 0o644).unwrap();
        assert_eq!(fs::read(tree.path().join("file")).unwrap(), b"mine");
        assert_eq!(fs::read(outside.join("file")).unwrap(), b"witness");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
        let private = fs::symlink_metadata(dir.path().join("tree")).unwrap();
        assert_eq!(private.permissions().mode() & 0o7777, 0o700);
        let seen = tree.read(&outside.join("file"), 100);
        assert_ne!(seen.unwrap_or_default(), b"witness");
    }

    #[test]
    fn a_link_to_a_directory_of_the_tree_is_that_directory() {
        let (_dir, tree, _) = hostile();
        tree.make_dir(Path::new("usr/bin"), 0o755).unwrap();
        tree.symlink("/usr/bin", Path::new("bin")).unwrap();
        tree.write(Path::new("/bin/tool"), &b"tool"[..], 0o4755)
            .unwrap();
        assert_eq!(tree.read(Path::new("usr/bin/tool"), 3).unwrap(), b"too");
        assert!(tree.is_dir(Path::new("bin")) && tree.has(Path::new("bin/tool")));
        tree.hard_link(Path::new("bin/tool"), Path::new("new/tool"))
            .unwrap();
        tree.remove(Path::new("bin")).unwrap();
        assert!(tree.has(Path::new("usr/bin/tool")) && !tree.has(Path::new("bin")));
        tree.remove(Path::new("usr")).unwrap();
        assert!(!tree.has(Path::new("usr")));
        tree.remove(Path::new("usr/none")).unwrap();
    }
}
