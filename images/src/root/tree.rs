//! Builds the directory tree of a root file system: the files of packages, and those that their
//! scripts would create.

use std::path::{Path, PathBuf};

use super::tree_root::TreeRoot;
use super::{RootError, applets, unpack};
use crate::cache::CacheError;
use crate::progress::{Event, Progress, Stage};
use crate::recipe::Text;

/// Links of the merged `/usr`: each name and its target.
const MERGED: [(&str, &str); 4] = [
    ("bin", "usr/bin"),
    ("sbin", "usr/sbin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
];
/// Directories that every system has, with their modes.
const DIRECTORIES: [(&str, u32); 11] = [
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];
const HOST_NAME: &str = "hearth";

/// Fills an empty tree.
pub(super) fn fill(
    tree: &TreeRoot,
    packages: &[PathBuf],
    recipe: &Text,
    progress: &dyn Progress,
) -> Result<(), RootError> {
    for (link, to) in MERGED {
        tree.make_dirs(Path::new(to))?;
        tree.symlink(to, Path::new(link))?;
    }
    let total = u32::try_from(packages.len()).unwrap_or(u32::MAX);
    for (package, done) in packages.iter().zip(1..) {
        unpack::package(package, tree)?;
        let stage = Stage::Tree;
        progress.event(Event::Step { stage, done, total });
    }
    // Overrides the mode that packages give to the root.
    tree.make_dir(Path::new("/"), 0o755)?;
    for (dir, mode) in DIRECTORIES {
        tree.make_dir(Path::new(dir), mode)?;
    }
    accounts(tree, recipe)?;
    if recipe.applets {
        applets::link(tree, recipe)?;
    }
    for path in &recipe.remove {
        tree.remove(Path::new(path))?;
    }
    for file in &recipe.files {
        let path = Path::new(&file.path);
        tree.remove(path)?;
        match &file.link {
            Some(to) => tree.symlink(to, path)?,
            None => tree.write(path, file.content(), file.mode)?,
        }
    }
    Ok(())
}

/// Writes the files of users, groups and host names.
fn accounts(tree: &TreeRoot, recipe: &Text) -> Result<(), CacheError> {
    let mut passwd = "root:*:0:0:root:/root:/bin/sh\nnobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n".to_owned();
    let mut group = "root:*:0:\ntty:*:5:\nnogroup:*:65534:\n".to_owned();
    for user in &recipe.users {
        let (name, uid, home, shell) = (&user.name, user.uid, user.home(), &user.shell);
        passwd += &format!("{name}:*:{uid}:{uid}::{home}:{shell}\n");
        group += &format!("{name}:*:{uid}:\n");
        tree.make_dir(Path::new(&home), 0o755)?;
    }
    let hosts = format!("127.0.0.1 localhost {HOST_NAME}\n::1 localhost\n");
    let files = [
        ("etc/passwd", passwd),
        ("etc/group", group),
        ("etc/hostname", format!("{HOST_NAME}\n")),
        ("etc/hosts", hosts),
        // There is no network for other lookups.
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files\n".to_owned(),
        ),
    ];
    for (path, text) in files {
        tree.write(Path::new(path), text.as_bytes(), 0o644)?;
    }
    Ok(())
}
