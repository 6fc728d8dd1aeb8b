//! The content-addressed cache. Its entries are directories that are published by a rename, as a
//! whole, and never changed afterwards.
//!
//! ```text
//! <root>/kernel/<version>-<hash>/   an entry: vmlinux, config, manifest
//! <root>/base/<hash>/               an entry: initramfs.cpio
//! <root>/source/                    downloaded packages, kept for the next build
//! <root>/work/<kind>/<random>/      scratch of one build
//! <root>/lock/<kind>                held while an entry of that kind is built
//! ```
//!
//! A build that is killed leaves only scratch files behind, and perhaps programs that still write
//! there. Its lock is released with the process. The next build of that kind removes the files and
//! works in a directory of another name.
//!
//! An entry is trusted because of its name, so only this user and root may be able to write to the
//! cache.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::progress::{Event, Progress, Stage};

/// The number of links in one path that Linux follows (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// Kinds of entries.
const PUBLISHED: [&str; 4] = ["base", "kernel", "root", "wheels"];

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// Neither `XDG_CACHE_HOME` nor `HOME` names an absolute path.
    #[error(
        "no place for the image cache: set XDG_CACHE_HOME or HOME, or name a directory explicitly"
    )]
    NoHome,
    /// Another user could replace a cached file.
    #[error(
        "{} {who} may write: what guests boot must be this user's alone (chmod go-w it, or set XDG_CACHE_HOME)",
        path.display()
    )]
    NotPrivate {
        /// The cache, something in it, or a directory that it is in.
        path: PathBuf,
        /// Which others may write there.
        who: &'static str,
    },
    /// A file operation failed.
    #[error("cannot {action} {}: check permissions and free space", path.display())]
    Io {
        /// The action that failed.
        action: &'static str,
        /// The path of the action.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

pub(crate) fn io_error(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.into();
    move |source| CacheError::Io {
        action,
        path,
        source,
    }
}

/// A SHA-256 over named parts, each with its length, so that two different lists of parts are never
/// hashed as the same bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Key(Sha256);

impl Key {
    pub(crate) fn part(mut self, name: &str, content: &[u8]) -> Self {
        for bytes in [name.as_bytes(), content] {
            self.0.update((bytes.len() as u64).to_le_bytes());
            self.0.update(bytes);
        }
        self
    }

    /// Returns 32 hexadecimal digits: half of the hash, enough for a name.
    pub(crate) fn name(self) -> String {
        self.0
            .finalize()
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The directory of entries.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// The right to build entries of one kind, released on drop.
#[derive(Debug)]
pub(crate) struct BuildLock {
    kind: String,
    _file: File,
}

impl Cache {
    pub(crate) fn open(dir: Option<PathBuf>) -> Result<Self, CacheError> {
        let root = match dir {
            Some(dir) => std::path::absolute(&dir).map_err(io_error("use", &dir))?,
            None => default_root(
                std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from),
                std::env::var_os("HOME").map(PathBuf::from),
            )?,
        };
        private(&root)?;
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns a directory directly under the root. If it does not exist, it is created for this
    /// user alone (mode 0700).
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf, CacheError> {
        let dir = self.root.join(name);
        let mut builder = DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&dir);
        made.map_err(io_error("create", &dir))?;
        Ok(dir)
    }

    /// Returns the entry's directory, if it has been published.
    pub(crate) fn entry(&self, kind: &str, name: &str) -> Option<PathBuf> {
        let path = self.root.join(kind).join(name);
        path.is_dir().then_some(path)
    }

    /// Returns the names of all published entries of a kind.
    pub(crate) fn names(&self, kind: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join(kind)) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect()
    }

    /// Waits until no other process builds this kind of entry. Look for the entry again afterwards:
    /// another process may have built it in the meantime.
    pub(crate) fn lock(
        &self,
        kind: &str,
        progress: &dyn Progress,
    ) -> Result<BuildLock, CacheError> {
        let path = self.dir("lock")?.join(kind);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress.event(Event::Begin(Stage::Wait));
                file.lock().map_err(io_error("lock", &path))?;
                progress.event(Event::End(Stage::Wait));
            }
            Err(TryLockError::Error(source)) => return Err(io_error("lock", &path)(source)),
        }
        Ok(BuildLock {
            kind: kind.to_owned(),
            _file: file,
        })
    }

    /// Returns an empty directory for the build that holds the lock, removed on drop. First removes
    /// the files of killed builds.
    pub(crate) fn scratch(&self, lock: &BuildLock) -> Result<TempDir, CacheError> {
        let dir = self.dir("work")?.join(&lock.kind);
        fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
        for entry in fs::read_dir(&dir).map_err(io_error("read", &dir))? {
            let left = entry.map_err(io_error("read", &dir))?.path();
            // A program of a killed build may still write there, so that this fails; the next build
            // then removes it.
            let swept = match left.is_dir() && !left.is_symlink() {
                true => fs::remove_dir_all(&left),
                false => fs::remove_file(&left),
            };
            if let Err(error) = swept {
                tracing::warn!(path = %left.display(), %error, "scratch of an earlier build stays");
            }
        }
        tempfile::tempdir_in(&dir).map_err(io_error("create a directory in", &dir))
    }

    /// Publishes `finished`, a directory on the same file system, as the entry of that name. If the
    /// entry exists already, it stays.
    pub(crate) fn publish(
        &self,
        kind: &str,
        name: &str,
        finished: &Path,
    ) -> Result<PathBuf, CacheError> {
        settle(finished)?;
        let parent = self.dir(kind)?;
        let entry = parent.join(name);
        match fs::rename(finished, &entry) {
            Err(_) if entry.is_dir() => {}
            result => result.map_err(io_error("publish", &entry))?,
        }
        File::open(&parent)
            .and_then(|dir| dir.sync_all())
            .map_err(io_error("sync", &parent))?;
        Ok(entry)
    }
}

/// Syncs the files of an entry, as its rename must not become durable before them, and takes write
/// permission from other users.
fn settle(dir: &Path) -> Result<(), CacheError> {
    let entries = fs::read_dir(dir).map_err(io_error("read", dir))?;
    for path in entries
        .map(|entry| Ok(entry?.path()))
        .chain([Ok(dir.to_owned())])
    {
        let path = path.map_err(io_error("read", dir))?;
        let settled = || {
            let file = File::open(&path)?;
            let mode = file.metadata()?.mode() & 0o755;
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            file.sync_all()
        };
        settled().map_err(io_error("sync", &path))?;
    }
    Ok(())
}

/// Refuses a cache that another user could change. Checks the root, the published entries, and each
/// directory and link on the way to the root. Directories that do not exist yet will be created for
/// this user alone.
fn private(root: &Path) -> Result<(), CacheError> {
    reached(root)?;
    PUBLISHED
        .iter()
        .try_for_each(|kind| below(&root.join(kind), 2))
}

/// Checks the target of a path, and all directories and links on the way to it. Follows links as
/// the kernel does.
fn reached(path: &Path) -> Result<(), CacheError> {
    let mut here = PathBuf::new();
    let mut ahead = path.to_owned();
    let mut links = 0;
    loop {
        let mut names = ahead.components();
        let Some(name) = names.next() else {
            return owned(&here, 0);
        };
        let rest = names.as_path().to_owned();
        match name {
            // `here` contains no link, so `..` is its parent.
            Component::ParentDir => _ = here.pop(),
            Component::CurDir => {}
            name => here.push(name),
        }
        // In a sticky directory, such as /tmp, users cannot replace files of others.
        owned(&here, 0o1000)?;
        ahead = match fs::read_link(&here) {
            Ok(_) if links == MAX_LINKS => {
                return Err(io_error("follow", path)(rustix::io::Errno::LOOP.into()));
            }
            Ok(target) => {
                links += 1;
                here.pop();
                target.join(rest)
            }
            // Not a link, or missing.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => rest,
            Err(error) if error.kind() == io::ErrorKind::NotFound => rest,
            Err(error) => return Err(io_error("look at", here)(error)),
        };
    }
}

/// Checks a directory and its contents. With a depth of 2, these are the entries of a kind and
/// their files.
fn below(path: &Path, depth: u32) -> Result<(), CacheError> {
    match path.is_symlink() {
        true => reached(path)?,
        false => owned(path, 0)?,
    }
    if depth == 0 {
        return Ok(());
    }
    match fs::read_dir(path) {
        Ok(mut entries) => entries.try_for_each(|entry| {
            let entry = entry.map_err(io_error("read", path))?;
            below(&entry.path(), depth - 1)
        }),
        // Missing, or a file where an entry would be a directory.
        Err(_) => Ok(()),
    }
}

/// Checks that only this user and root can change the file or directory, if it exists. If its mode
/// has a bit of `excused`, others may write to it.
fn owned(path: &Path, excused: u32) -> Result<(), CacheError> {
    let data = match path.symlink_metadata() {
        Ok(data) => data,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("look at", path)(error)),
    };
    let refused = |who| {
        let path = path.to_owned();
        Err(CacheError::NotPrivate { path, who })
    };
    if data.uid() != 0 && data.uid() != rustix::process::geteuid().as_raw() {
        return refused("belongs to another user, who");
    }
    // The mode of a link has no meaning.
    if data.is_symlink() || data.mode() & excused != 0 {
        return Ok(());
    }
    match data.mode() & 0o022 {
        0 => Ok(()),
        0o020 => refused("is where the group"),
        _ => refused("is where everybody"),
    }
}

fn default_root(xdg: Option<PathBuf>, home: Option<PathBuf>) -> Result<PathBuf, CacheError> {
    // By the XDG base directory rules, a relative path is ignored.
    xdg.filter(|path| path.is_absolute())
        .or_else(|| {
            home.filter(|path| path.is_absolute())
                .map(|home| home.join(".cache"))
        })
        .map(|cache| cache.join("hearth"))
        .ok_or(CacheError::NoHome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Silent;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(dir.path().join("cache"))).unwrap();
        (dir, cache)
    }

    #[test]
    fn a_key_tells_every_difference() {
        let base = || Key::default().part("a", b"bc").part("d", b"");
        assert_eq!(base().name(), base().name());
        assert_eq!(base().name().len(), 32);
        for other in [
            Key::default().part("a", b"bc"),
            Key::default().part("ab", b"c").part("d", b""),
            Key::default().part("a", b"bd").part("d", b""),
            Key::default().part("d", b"").part("a", b"bc"),
        ] {
            assert_ne!(base().name(), other.name());
        }
    }

    #[test]
    fn an_entry_appears_whole_or_not_at_all() {
        let (_dir, cache) = cache();
        let lock = cache.lock("kernel", &Silent).unwrap();
        let scratch = cache.scratch(&lock).unwrap();
        let entry = scratch.path().join("entry");
        fs::create_dir(&entry).unwrap();
        fs::write(entry.join("vmlinux"), b"half").unwrap();
        assert_eq!(cache.entry("kernel", "k1"), None);
        assert!(cache.names("kernel").is_empty());

        let published = cache.publish("kernel", "k1", &entry).unwrap();
        assert_eq!(cache.entry("kernel", "k1"), Some(published.clone()));
        assert_eq!(cache.names("kernel"), ["k1"]);
        assert_eq!(fs::read(published.join("vmlinux")).unwrap(), b"half");
    }

    #[test]
    fn what_a_killed_build_left_is_swept_and_no_name_is_used_twice() {
        let (_dir, cache) = cache();
        let killed = {
            let lock = cache.lock("kernel", &Silent).unwrap();
            cache.scratch(&lock).unwrap().keep()
        };
        fs::create_dir(killed.join("out")).unwrap();
        fs::write(killed.join("out/vmlinux"), b"half").unwrap();
        // Earlier versions left such files.
        fs::write(killed.with_file_name("vmlinux"), b"half").unwrap();
        let lock = cache.lock("kernel", &Silent).unwrap();
        let scratch = cache.scratch(&lock).unwrap();
        assert_ne!(scratch.path(), killed);
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
        let work = scratch.path().parent().unwrap().to_owned();
        assert_eq!(fs::read_dir(&work).unwrap().count(), 1);
        // A program of the killed build that still runs can no longer write there.
        assert!(fs::write(killed.join("out/vmlinux"), b"more").is_err());
        // The scratch of a failed build is removed at once.
        drop(scratch);
        assert_eq!(fs::read_dir(&work).unwrap().count(), 0);
    }

    #[test]
    fn a_cache_that_others_may_write_is_refused() {
        let (dir, cache) = cache();
        let made = cache.root().join("made");
        fs::create_dir_all(&made).unwrap();
        fs::write(made.join("file"), b"").unwrap();
        let file = cache.publish("base", "name", &made).unwrap().join("file");
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
        let open = || Cache::open(Some(cache.root().to_owned()));
        let refused = |path: &Path, bits: u32| {
            let before = mode(path);
            let set = |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            set(before | bits);
            let opened = open();
            set(before);
            match opened.map(drop) {
                Err(CacheError::NotPrivate { path: named, .. }) => named == path,
                Ok(()) => false,
                other => panic!("{other:?}"),
            }
        };
        open().unwrap();
        let entry = file.parent().unwrap();
        for path in [
            cache.root(),
            entry,
            entry.parent().unwrap(),
            &file,
            dir.path(),
        ] {
            for bits in [0o020, 0o002] {
                assert!(refused(path, bits), "{} {bits:o}", path.display());
            }
        }
        // Sticky: others cannot replace its files. But in the cache itself, anybody could add
        // files.
        assert!(!refused(dir.path(), 0o1002));
        assert!(refused(cache.root(), 0o1002));
        // The same through a link to the directory.
        let link = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(dir.path(), link.path().join("link")).unwrap();
        let set = |mode| {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        };
        set(0o777);
        for name in ["link/cache", "link/none/cache"] {
            let opened = Cache::open(Some(link.path().join(name)));
            assert!(
                matches!(opened, Err(CacheError::NotPrivate { .. })),
                "{name}"
            );
        }
        set(0o700);
        open().unwrap();
    }

    #[test]
    fn a_cache_behind_a_link_that_others_may_replace_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in [
            "first",
            "shared",
            "last",
            "last/cache",
            "last/cache/root",
            "own",
        ] {
            DirBuilder::new().mode(0o700).create(at(name)).unwrap();
        }
        let link = |to: &str, name| std::os::unix::fs::symlink(to, at(name)).unwrap();
        // Absolute, relative, and to a directory in the middle of the path.
        link(at("shared/link").to_str().unwrap(), "first/absolute");
        link("../shared/link", "first/relative");
        link("../last/cache", "shared/link");
        link("../shared", "first/dir");
        link("../last/none", "shared/nowhere");
        // A link for one kind of entries only.
        link("../first/relative/root", "own/root");
        let ways = [
            "first/absolute",
            "first/relative",
            "first/relative/new/cache",
            "first/dir/link",
            "first/dir/../last/cache",
            "first/dir/nowhere",
            "own",
        ];
        let open = |way| Cache::open(Some(at(way))).map(drop);
        let set = |mode| {
            fs::set_permissions(at("shared"), fs::Permissions::from_mode(mode)).unwrap();
        };
        for way in ways {
            set(0o755);
            open(way).unwrap();
            set(0o777);
            match open(way) {
                Err(CacheError::NotPrivate { path, .. }) => {
                    assert_eq!(path.file_name(), at("shared").file_name(), "{way}");
                }
                other => panic!("{way}: {other:?}"),
            }
            set(0o1777);
            open(way).unwrap();
        }
        link("circle", "circle");
        let error = open("circle").unwrap_err();
        assert!(error.to_string().contains("circle"), "{error}");
    }

    #[test]
    fn another_user_s_cache_is_refused() {
        let (_dir, cache) = cache();
        let made = cache.dir("base").unwrap();
        if std::os::unix::fs::chown(&made, Some(12_345), None).is_err() {
            use std::io::Write;
            let line = b"\nNOT MEASURED: only root gives files to others\n";
            let _ = io::stderr().write_all(line);
            return;
        }
        let error = Cache::open(Some(cache.root().to_owned())).unwrap_err();
        assert!(error.to_string().contains("another user"), "{error}");
    }

    #[test]
    fn the_first_build_makes_the_cache_and_for_this_user_alone() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("some/where");
        let cache = Cache::open(Some(root.clone())).unwrap();
        assert!(cache.names("kernel").is_empty());
        assert!(!dir.path().join("some").exists());
        drop(cache.lock("kernel", &Silent).unwrap());
        assert_eq!(root.metadata().unwrap().mode() & 0o7777, 0o700);
    }

    #[test]
    fn the_first_published_entry_stays() {
        let (_dir, cache) = cache();
        for content in ["first", "second"] {
            let made = cache.root().join("made");
            fs::create_dir_all(&made).unwrap();
            fs::write(made.join("file"), content).unwrap();
            cache.publish("base", "same", &made).unwrap();
            let _ = fs::remove_dir_all(&made);
        }
        let file = cache.entry("base", "same").unwrap().join("file");
        assert_eq!(fs::read(file).unwrap(), b"first");
    }

    #[test]
    fn two_builds_of_a_kind_take_turns() {
        let (_dir, cache) = cache();
        let first = cache.lock("kernel", &Silent).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = cache.clone();
        let waiting = std::thread::spawn(move || {
            struct Tell(std::sync::mpsc::Sender<Event>);
            impl Progress for Tell {
                fn event(&self, event: Event) {
                    let _ = self.0.send(event);
                }
            }
            other.lock("kernel", &Tell(sender)).map(drop)
        });
        assert_eq!(receiver.recv(), Ok(Event::Begin(Stage::Wait)));
        assert!(receiver.try_recv().is_err(), "the lock was not waited for");
        // A build of another kind does not wait.
        drop(cache.lock("base", &Silent).unwrap());
        drop(first);
        assert_eq!(receiver.recv(), Ok(Event::End(Stage::Wait)));
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn the_place_of_the_cache() {
        let at = |xdg: Option<&str>, home: Option<&str>| {
            default_root(xdg.map(PathBuf::from), home.map(PathBuf::from))
        };
        assert_eq!(at(Some("/x"), Some("/h")).unwrap(), Path::new("/x/hearth"));
        assert_eq!(at(None, Some("/h")).unwrap(), Path::new("/h/.cache/hearth"));
        assert_eq!(
            at(Some("rel"), Some("/h")).unwrap(),
            Path::new("/h/.cache/hearth")
        );
        assert!(matches!(at(None, None), Err(CacheError::NoHome)));
        assert!(matches!(at(None, Some("rel")), Err(CacheError::NoHome)));
    }

    #[test]
    fn a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"").unwrap();
        let error = Cache::open(Some(file.join("cache"))).unwrap_err();
        assert!(error.to_string().contains("file/cache"), "{error}");
    }
}
