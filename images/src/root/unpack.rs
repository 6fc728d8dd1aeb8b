//! Unpacks packages into a tree, member by member. Each path is resolved within the tree; devices,
//! pipes and sockets are left out.

use std::cell::Cell;
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

/// Files that programs do not need: documentation, translations, data of Debian's tools.
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
/// The limit of bytes that one package or wheel may write into a tree, and of its unpacked archive:
/// a small compressed file can expand to much more.
const MAX_BYTES: u64 = 8 << 30;
/// The minimum that a member counts beside its content: it limits a package to two million members.
const MEMBER_BYTES: u64 = 4096;
/// The limit of bytes of one member's headers, which are held in memory: long names, attributes,
/// and the map of a sparse file.
const MAX_HEADERS: u64 = 1 << 20;

/// Unpacks a Debian package. None of its scripts is run.
pub(super) fn package(package: &Path, tree: &TreeRoot) -> Result<(), RootError> {
    let mut deb = command::tool("dpkg-deb");
    deb.arg("--fsys-tarfile").arg(package);
    command::read(&mut deb, |archive| members(archive, tree, MAX_BYTES))
        .map_err(RootError::Unpack)
        .flatten()
}

fn members(archive: impl Read, tree: &TreeRoot, most: u64) -> Result<(), RootError> {
    let left = Cell::new(most);
    // The bytes that may still be read from the archive for the next member's headers.
    let next = Cell::new(MAX_HEADERS);
    let mut archive = tar::Archive::new(Counted(archive, &next));
    let entries = archive.entries().map_err(RootError::Archive)?;
    for entry in entries {
        let entry = entry.map_err(RootError::Archive)?;
        let headers = MAX_HEADERS - next.get();
        charge(&left, headers.max(MEMBER_BYTES)).map_err(RootError::Archive)?;
        // For content, `left` counts the bytes that are returned. A sparse file returns more than
        // is read.
        next.set(u64::MAX);
        let mut entry = Counted(entry, &left);
        member(&mut entry, tree)?;
        // Content that is not written counts as well, but not as headers of the next member.
        io::copy(&mut entry, &mut io::sink()).map_err(RootError::Archive)?;
        next.set(MAX_HEADERS);
    }
    // Data behind the end of the archive counts, too.
    let mut rest = Counted(archive.into_inner().0, &left);
    io::copy(&mut rest, &mut io::sink()).map_err(RootError::Archive)?;
    Ok(())
}

fn member<R: Read>(
    entry: &mut Counted<'_, tar::Entry<'_, R>>,
    tree: &TreeRoot,
) -> Result<(), RootError> {
    let path = within(&entry.0.path_bytes())?;
    if UNWANTED.iter().any(|unwanted| path.starts_with(unwanted)) {
        return Ok(());
    }
    let mode = entry.0.header().mode().map_err(RootError::Archive)? & 0o7777;
    let target = entry.0.link_name_bytes().map(|target| target.into_owned());
    let target = || target.ok_or_else(|| RootError::Archive(io::ErrorKind::InvalidData.into()));
    match entry.0.header().entry_type() {
        // The path may be a link of the merged `/usr`, such as `bin`, which is followed.
        EntryType::Directory => tree.make_dir(&path, mode)?,
        EntryType::Symlink => tree.symlink(&*target()?, &path)?,
        EntryType::Link => tree.hard_link(&within(&target()?)?, &path)?,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            tree.write(&path, entry, mode)?;
        }
        _ => {}
    }
    Ok(())
}

/// Unpacks a wheel into a directory of the tree. Its directory `NAME.data` has files for several
/// places: libraries are unpacked, others (programs, headers) are dropped.
pub(super) fn wheel(wheel: &Path, tree: &TreeRoot, dir: &Path) -> Result<(), RootError> {
    let file = File::open(wheel).map_err(io_error("open", wheel))?;
    let invalid = |error: zip::result::ZipError| RootError::Archive(error.into());
    let mut archive = zip::ZipArchive::new(file).map_err(invalid)?;
    let left = Cell::new(MAX_BYTES);
    for index in 0..archive.len() {
        let member = archive.by_index(index).map_err(invalid)?;
        charge(&left, MEMBER_BYTES).map_err(RootError::Archive)?;
        let is_dir = member.is_dir();
        let Some(path) = placed(&within(member.name_raw())?) else {
            continue;
        };
        let path = dir.join(path);
        if is_dir {
            tree.make_dirs(&path)?;
            continue;
        }
        tree.write(&path, Counted(member, &left), 0o644)?;
    }
    Ok(())
}

/// A reader that fails when more bytes are read than are left.
struct Counted<'l, R>(R, &'l Cell<u64>);

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.read(buffer)?;
        charge(self.1, read as u64)?;
        Ok(read)
    }
}

fn charge(left: &Cell<u64>, bytes: u64) -> io::Result<()> {
    let less = left.get().checked_sub(bytes).ok_or_else(|| {
        let most =
            "it is more than 8 GiB unpacked, or one of its files has more than 1 MiB of headers";
        io::Error::new(io::ErrorKind::FileTooLarge, most)
    })?;
    left.set(less);
    Ok(())
}

/// Returns the path for a file of a wheel, or `None` if the file is dropped.
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

/// Converts a member's name to a path in the image.
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
    use crate::cache::CacheError;

    /// Makes a tar archive of these members: name, kind, and content or link target.
    fn archive(members: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, kind, text) in members {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            // Written directly: the crate's setters refuse such names.
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
            // Whether it is refused or done within the tree does not matter for this machine.
            let _ = members(&*archive(attack), &tree, MAX_BYTES);
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
        members(&*first, &tree, MAX_BYTES).unwrap();
        let second = [
            ("./bin/", Directory, ""),
            ("bin/tool", Regular, "second"),
            ("same", Link, "./bin/tool"),
        ];
        members(&*archive(&second), &tree, MAX_BYTES).unwrap();
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
    fn a_package_that_is_more_unpacked_than_may_be_is_an_error() {
        let unpack = |archive: &[u8], most| {
            let dir = tempfile::tempdir().unwrap();
            let tree = TreeRoot::create(&dir.path().join("tree")).unwrap();
            members(archive, &tree, most)
        };
        let too_large = |unpacked: Result<(), RootError>| match unpacked.unwrap_err() {
            RootError::Archive(error) | RootError::Cache(CacheError::Io { source: error, .. }) => {
                assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{error}");
            }
            error => panic!("{error}"),
        };
        let content = "x".repeat(50_000);
        let plain = archive(&[("file", EntryType::Regular, &content)]);
        unpack(&plain, 60_000).unwrap();
        too_large(unpack(&plain, 49_999));
        // Many empty members.
        let names: Vec<_> = (0..100).map(|number| number.to_string()).collect();
        let empty: Vec<_> = names
            .iter()
            .map(|name| (name.as_str(), EntryType::Regular, ""))
            .collect();
        unpack(&archive(&empty), 101 * MEMBER_BYTES).unwrap();
        too_large(unpack(&archive(&empty), 99 * MEMBER_BYTES));
        // Data behind the end.
        let behind = [archive(&[]), vec![0; 50_000]].concat();
        unpack(&behind, 60_000).unwrap();
        too_large(unpack(&behind, 50_000));
        // A file that is one hole: 4 GiB in a kilobyte.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNUSparse);
        header.set_path("holes").unwrap();
        header.set_mode(0o644);
        header.set_size(0);
        let sparse = header.as_gnu_mut().unwrap();
        sparse.sparse[0].offset.copy_from_slice(b"40000000000\0");
        sparse.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
        sparse.realsize.copy_from_slice(b"40000000000\0");
        header.set_cksum();
        let mut holes = tar::Builder::new(Vec::new());
        holes.append(&header, io::empty()).unwrap();
        too_large(unpack(&holes.into_inner().unwrap(), 70_000));
    }

    #[test]
    fn headers_that_are_more_than_a_member_may_have_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let with_header = |kind: EntryType, bytes: usize| {
            // Whatever is read of it is no whole header, and refused for that if it is short.
            let content = io::repeat(b'x').take(bytes as u64);
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_path("header").unwrap();
            header.set_size(bytes as u64);
            header.set_cksum();
            let mut builder = tar::Builder::new(Vec::new());
            builder.append(&header, content).unwrap();
            let mut archive = builder.into_inner().unwrap();
            // Without its end marker.
            archive.truncate(archive.len() - 1024);
            archive.extend(self::archive(&[("file", EntryType::Regular, "text")]));
            let read = Cell::new(u64::MAX);
            let path = dir.path().join(format!("{kind:?}{bytes}"));
            let tree = TreeRoot::create(&path).unwrap();
            let unpacked = members(Counted(&*archive, &read), &tree, MAX_BYTES);
            (unpacked, u64::MAX - read.get())
        };
        for kind in [
            EntryType::GNULongName,
            EntryType::GNULongLink,
            EntryType::XHeader,
        ] {
            let (unpacked, read) = with_header(kind, 4 << 20);
            let Err(RootError::Archive(error)) = unpacked else {
                panic!("{kind:?}");
            };
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{kind:?}");
            assert!(read < 2 * MAX_HEADERS, "{kind:?}: {read}");
        }
        with_header(EntryType::GNULongLink, 500_000).0.unwrap();
        // The map of a sparse file: 21 empty entries in each extension block.
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(EntryType::GNUSparse);
        header.set_path("sparse").unwrap();
        header.set_size(0);
        header.as_gnu_mut().unwrap().isextended[0] = 1;
        header.set_cksum();
        let mut part = [0; 512];
        part[504] = 1;
        let blocks = std::iter::repeat_n(part, 4096).flatten();
        let sparse: Vec<u8> = header.as_bytes().iter().copied().chain(blocks).collect();
        let tree = TreeRoot::create(&dir.path().join("sparse")).unwrap();
        let Err(RootError::Archive(error)) = members(&*sparse, &tree, MAX_BYTES) else {
            panic!("it was taken");
        };
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{error}");
    }

    #[test]
    fn more_than_an_archive_may_hold_is_an_error() {
        let left = Cell::new(4);
        let mut counted = Counted(&b"1234"[..], &left);
        assert_eq!(io::copy(&mut counted, &mut io::sink()).unwrap(), 4);
        let left = Cell::new(4);
        let mut counted = Counted(&b"12345"[..], &left);
        let error = io::copy(&mut counted, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
