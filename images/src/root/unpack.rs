//! What packages hold, put into a tree member by member: each path is the tree's, and devices, pipes and sockets are left out.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use tar::EntryType;

use super::RootError;
use super::tree_root::TreeRoot;
use crate::cache::io_error;
use crate::command;

/// Files that programs do without: texts for people, translations, notes of Debian's tools.
const UNWANTED: [&str; 9] = [
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/info",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/menu",
    "usr/share/gdb",
];
/// A wheel may hold more than it weighs.
const MAX_WHEEL_BYTES: u64 = 8 << 30;

/// Unpacks a Debian package; none of its scripts is run.
pub(super) fn package(package: &Path, tree: &TreeRoot) -> Result<(), RootError> {
    let mut deb = command::tool("dpkg-deb");
    deb.arg("--fsys-tarfile").arg(package);
    command::read(&mut deb, |archive| members(archive, tree))
        .map_err(RootError::Unpack)
        .flatten()
}

fn members(archive: impl Read, tree: &TreeRoot) -> Result<(), RootError> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().map_err(RootError::Archive)?;
    for entry in entries {
        let mut entry = entry.map_err(RootError::Archive)?;
        let path = within(&entry.path_bytes())?;
        if UNWANTED.iter().any(|unwanted| path.starts_with(unwanted)) {
            continue;
        }
        let mode = entry.header().mode().map_err(RootError::Archive)? & 0o7777;
        let target = entry.link_name_bytes().map(|target| target.into_owned());
        let target = || target.ok_or_else(|| RootError::Archive(io::ErrorKind::InvalidData.into()));
        match entry.header().entry_type() {
            // Packages that were made for separate directories follow the links of merged ones.
            EntryType::Directory => tree.make_dir(&path, mode)?,
            EntryType::Symlink => tree.symlink(&*target()?, &path)?,
            EntryType::Link => tree.hard_link(&within(&target()?)?, &path)?,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                tree.write(&path, &mut entry, mode)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Unpacks a wheel into a directory of the tree. Parts for several places come in a directory `NAME.data`: those for this
/// place are taken from there, others (programs, headers) are dropped.
pub(super) fn wheel(wheel: &Path, tree: &TreeRoot, dir: &Path) -> Result<(), RootError> {
    let file = File::open(wheel).map_err(io_error("open", wheel))?;
    let invalid = |error: zip::result::ZipError| RootError::Archive(error.into());
    let mut archive = zip::ZipArchive::new(file).map_err(invalid)?;
    let mut left = MAX_WHEEL_BYTES;
    for index in 0..archive.len() {
        let member = archive.by_index(index).map_err(invalid)?;
        let is_dir = member.is_dir();
        let Some(path) = placed(&within(member.name_raw())?) else {
            continue;
        };
        let path = dir.join(path);
        if is_dir {
            tree.make_dirs(&path)?;
            continue;
        }
        let mut counted = Counted(member, left);
        tree.write(&path, &mut counted, 0o644)?;
        left = counted.1;
    }
    Ok(())
}

/// A reader that fails when more than so many bytes come.
struct Counted<R>(R, u64);

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        let left = u64::try_from(read)
            .ok()
            .and_then(|read| self.1.checked_sub(read));
        self.1 = left.ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(read)
    }
}

/// Where a file of a wheel belongs.
fn placed(path: &Path) -> Option<PathBuf> {
    let mut names = path.components();
    let first = Path::new(names.next()?.as_os_str());
    if first.extension() != Some(OsStr::new("data")) {
        return Some(path.to_owned());
    }
    let part = names.next()?.as_os_str();
    let taken = part == "purelib" || part == "platlib";
    (taken && !names.as_path().as_os_str().is_empty()).then(|| names.as_path().to_owned())
}

/// A member's name as a path of the image.
fn within(name: &[u8]) -> Result<PathBuf, RootError> {
    let path = Path::new(OsStr::from_bytes(name));
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let name = path.display().to_string();
                return Err(RootError::Member { name });
            }
        }
    }
    Ok(clean)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    /// A tar archive of these members: name, kind, and content or what a link says.
    fn archive(members: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, kind, text) in members {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            // As it is: the crate's own setters refuse what is tried here.
            let field = &mut header.as_gnu_mut().unwrap().name;
            field[..name.len()].copy_from_slice(name.as_bytes());
            let content = match kind {
                EntryType::Symlink | EntryType::Link => {
                    let field = &mut header.as_gnu_mut().unwrap().linkname;
                    field[..text.len()].copy_from_slice(text.as_bytes());
                    ""
                }
                _ => text,
            };
            header.set_size(content.len() as u64);
            header.set_cksum();
            archive.append(&header, content.as_bytes()).unwrap();
        }
        archive.into_inner().unwrap()
    }

    #[test]
    fn a_package_writes_nothing_outside_of_its_tree() {
        use EntryType::{Block, Char, Directory, Fifo, Link, Regular, Symlink};
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "witness").unwrap();
        let out = outside.to_str().unwrap();
        let file = format!("{out}/file");
        let attacks: [&[(&str, EntryType, &str)]; 9] = [
            &[("a", Symlink, out), ("a/file", Regular, "mine")],
            &[("a", Symlink, "../../outside"), ("a/file", Regular, "mine")],
            &[("a", Symlink, "/proc/self/cwd"), ("a/new", Regular, "mine")],
            &[("../../outside/file", Regular, "mine")],
            &[(&file, Regular, "mine")],
            &[("a", Link, &file), ("a", Regular, "mine")],
            &[("a", Link, "../../outside/file"), ("a", Regular, "mine")],
            &[
                ("a", Symlink, &file),
                ("b", Link, "a"),
                ("b", Regular, "mine"),
                ("a", Directory, ""),
            ],
            &[("a", Block, ""), ("b", Char, ""), ("c", Fifo, "")],
        ];
        for (number, attack) in attacks.into_iter().enumerate() {
            let tree = TreeRoot::create(&dir.path().join(format!("tree{number}"))).unwrap();
            // Refused or done within the tree: the same to this machine.
            let _ = members(&*archive(attack), &tree);
            assert_eq!(
                fs::read(outside.join("file")).unwrap(),
                b"witness",
                "{attack:?}"
            );
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{attack:?}");
        }
        let devices = dir.path().join("tree8/root");
        assert_eq!(fs::read_dir(devices).unwrap().count(), 0);
    }

    #[test]
    fn members_replace_what_earlier_packages_have() {
        use EntryType::{Directory, Link, Regular, Symlink};
        let dir = tempfile::tempdir().unwrap();
        let tree = TreeRoot::create(&dir.path().join("tree")).unwrap();
        let first = archive(&[
            ("./", Directory, ""),
            ("./usr/bin/", Directory, ""),
            ("./bin", Symlink, "usr/bin"),
            ("./usr/bin/tool", Regular, "first"),
            ("./usr/share/doc/tool/text", Regular, "text"),
        ]);
        members(&*first, &tree).unwrap();
        let second = [
            ("./bin/", Directory, ""),
            ("bin/tool", Regular, "second"),
            ("same", Link, "./bin/tool"),
        ];
        members(&*archive(&second), &tree).unwrap();
        let at = |path: &str| tree.path().join(path);
        assert_eq!(fs::read(at("usr/bin/tool")).unwrap(), b"second");
        assert_eq!(fs::read(at("same")).unwrap(), b"second");
        assert!(fs::symlink_metadata(at("bin")).unwrap().is_symlink());
        assert!(!at("usr/share").exists());
    }

    #[test]
    fn a_wheel_stays_in_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let tree = TreeRoot::create(&dir.path().join("tree")).unwrap();
        tree.symlink(outside.to_str().unwrap(), Path::new("packages/link"))
            .unwrap();
        let zipped = |names: &[&str]| {
            let file = dir.path().join("a.whl");
            let mut zip = zip::ZipWriter::new(File::create(&file).unwrap());
            let options = zip::write::SimpleFileOptions::default();
            for name in names {
                zip.start_file(*name, options).unwrap();
                zip.write_all(b"code").unwrap();
            }
            zip.finish().unwrap();
            file
        };
        let to = Path::new("/packages");
        let good = ["a/b.py", "a.data/purelib/c.py", "a.data/scripts/d"];
        wheel(&zipped(&good), &tree, to).unwrap();
        assert!(tree.has(&to.join("a/b.py")) && tree.has(&to.join("c.py")));
        assert!(!tree.has(&to.join("a.data")) && !tree.has(&to.join("d")));
        for bad in ["../../../outside/x", "link/x"] {
            let _ = wheel(&zipped(&[bad]), &tree, to);
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        let text = dir.path().join("text.whl");
        fs::write(&text, "no archive").unwrap();
        let error = wheel(&text, &tree, to).unwrap_err();
        assert!(matches!(error, RootError::Archive(_)), "{error}");
    }

    #[test]
    fn more_than_a_wheel_may_hold_is_an_error() {
        let mut counted = Counted(&b"1234"[..], 4);
        assert_eq!(io::copy(&mut counted, &mut io::sink()).unwrap(), 4);
        let mut counted = Counted(&b"12345"[..], 4);
        let error = io::copy(&mut counted, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
