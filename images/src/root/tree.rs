//! The files of a root file system, in a directory: what packages bring, and what their scripts would have made.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::RootError;
use crate::cache::{CacheError, io_error};
use crate::command;
use crate::progress::{Event, Progress, Stage};
use crate::recipe::{RecipeError, Text};

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
/// The first of these has its files in the second.
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
/// Not programs that somebody calls.
const NO_APPLETS: [&str; 2] = ["linuxrc", "sbin/init"];

/// Fills `tree`, which must not exist.
pub(super) fn make(
    tree: &Path,
    packages: &[PathBuf],
    recipe: &Text,
    progress: &dyn Progress,
) -> Result<(), RootError> {
    for (link, to) in MERGED {
        make_dir(&tree.join(to), 0o755)?;
        link_to(to, &tree.join(link))?;
    }
    let total = u32::try_from(packages.len()).unwrap_or(u32::MAX);
    for (package, done) in packages.iter().zip(1..) {
        unpack(package, tree)?;
        let stage = Stage::Tree;
        progress.event(Event::Step { stage, done, total });
    }
    for (dir, mode) in DIRECTORIES {
        make_dir(&tree.join(dir), mode)?;
    }
    accounts(tree, recipe)?;
    if recipe.applets {
        applets(tree, recipe)?;
    }
    for path in &recipe.remove {
        remove(&inside(tree, path))?;
    }
    for file in &recipe.files {
        let path = inside(tree, &file.path);
        remove(&path)?;
        if let Some(parent) = path.parent() {
            make_dirs(parent)?;
        }
        match &file.link {
            Some(to) => link_to(to, &path)?,
            None => write(&path, file.content(), file.mode)?,
        }
    }
    Ok(())
}

/// The directories that programs find their libraries by, put down once instead of searched at each start.
pub(super) fn index_libraries(tree: &Path) -> Result<(), RootError> {
    let program = tree.join("usr/sbin/ldconfig");
    if !program.exists() {
        return Ok(());
    }
    // Linked statically; it works on the tree without being its root, too.
    let mut ldconfig = command::open_handed(program);
    let ran = command::run(ldconfig.arg("-r").arg(tree), |_| {});
    ran.map_err(|source| RootError::Tool {
        tool: "ldconfig",
        source,
    })?;
    // Notes on this machine's files.
    Ok(remove(&tree.join("var/cache/ldconfig"))?)
}

fn unpack(package: &Path, tree: &Path) -> Result<(), RootError> {
    let mut tar = command::tool("tar");
    // Packages that were made for separate directories follow the links of merged ones.
    tar.args([
        "--extract",
        "--keep-directory-symlink",
        "--same-permissions",
    ])
    .args(["--no-same-owner", "--file=-", "--anchored"])
    .args(UNWANTED.map(|path| format!("--exclude=./{path}")))
    .arg("--directory")
    .arg(tree);
    let mut deb = command::tool("dpkg-deb");
    deb.arg("--fsys-tarfile").arg(package);
    command::pipe(&mut deb, &mut tar).map_err(RootError::Unpack)
}

/// Users, groups, names.
fn accounts(tree: &Path, recipe: &Text) -> Result<(), CacheError> {
    let mut passwd = "root:*:0:0:root:/root:/bin/sh\nnobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n".to_owned();
    let mut group = "root:*:0:\ntty:*:5:\nnogroup:*:65534:\n".to_owned();
    for user in &recipe.users {
        let (name, uid, home, shell) = (&user.name, user.uid, user.home(), &user.shell);
        passwd += &format!("{name}:*:{uid}:{uid}::{home}:{shell}\n");
        group += &format!("{name}:*:{uid}:\n");
        make_dir(&inside(tree, &home), 0o755)?;
    }
    let hosts = format!("127.0.0.1 localhost {HOST_NAME}\n::1 localhost\n");
    let files = [
        ("etc/passwd", passwd),
        ("etc/group", group),
        ("etc/hostname", format!("{HOST_NAME}\n")),
        ("etc/hosts", hosts),
        // There is no network to ask.
        (
            "etc/nsswitch.conf",
            "passwd: files\ngroup: files\nhosts: files\n".to_owned(),
        ),
    ];
    for (path, text) in files {
        write(&tree.join(path), text.as_bytes(), 0o644)?;
    }
    Ok(())
}

/// A link to busybox for each of its programs that no package has.
fn applets(tree: &Path, recipe: &Text) -> Result<(), RootError> {
    let program = tree.join("usr/bin/busybox");
    if !program.exists() {
        return Err(RootError::Recipe(RecipeError::Invalid {
            recipe: recipe.name.clone(),
            problem: "applets are of busybox: add the package busybox-static".to_owned(),
        }));
    }
    let listed = command::output(command::tool(program).arg("--list-full"));
    let listed = listed.map_err(|source| RootError::Tool {
        tool: "busybox",
        source,
    })?;
    for path in listed.lines().filter(|path| !NO_APPLETS.contains(path)) {
        let link = inside(tree, path);
        if link.symlink_metadata().is_err() && link.parent().is_some_and(Path::is_dir) {
            link_to("/bin/busybox", &link)?;
        }
    }
    Ok(())
}

/// Where an absolute path of the image is.
fn inside(tree: &Path, path: &str) -> PathBuf {
    tree.join(path.trim_start_matches('/'))
}

/// The directory and those that it is in, if they are not there.
pub(super) fn make_dirs(path: &Path) -> Result<(), CacheError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_dirs(parent)?;
    }
    fs::create_dir(path).map_err(io_error("create", path))?;
    set_mode(path, 0o755)
}

fn make_dir(path: &Path, mode: u32) -> Result<(), CacheError> {
    make_dirs(path)?;
    set_mode(path, mode)
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CacheError> {
    fs::write(path, bytes).map_err(io_error("write", path))?;
    set_mode(path, mode)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), CacheError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(io_error("set the mode of", path))
}

fn link_to(to: &str, path: &Path) -> Result<(), CacheError> {
    symlink(to, path).map_err(io_error("create", path))
}

/// Whatever it is; it need not be there.
fn remove(path: &Path) -> Result<(), CacheError> {
    let removed = match path.symlink_metadata() {
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.map_err(io_error("remove", path))
}
