//! The content-addressed cache: entries are directories, published whole by a
//! rename, never changed afterwards.
//!
//! ```text
//! <root>/kernel/<version>-<hash>/   an entry: vmlinux, config, manifest
//! <root>/base/<hash>/               an entry: initramfs.cpio
//! <root>/source/                    downloaded packages, kept for the next build
//! <root>/work/<kind>/               scratch of one build, emptied by the next
//! <root>/lock/<kind>                held while an entry of that kind is built
//! ```
//!
//! A build that is interrupted leaves only scratch behind: the lock goes with
//! its process, and the next build of that kind starts from an empty scratch.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::progress::{Event, Progress, Stage};

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// Neither `XDG_CACHE_HOME` nor `HOME` names an absolute path.
    #[error(
        "no place for the image cache: set XDG_CACHE_HOME or HOME, or name a directory explicitly"
    )]
    NoHome,
    /// A file operation failed.
    #[error("cannot {action} {}: check permissions and free space", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
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

/// A SHA-256 over named parts, each with its length, so that no two lists of
/// parts run into the same bytes.
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

    /// 32 hexadecimal digits: half of the hash, enough for a name.
    pub(crate) fn name(self) -> String {
        self.0
            .finalize()
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Where entries live.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// The right to build entries of one kind; gone when dropped.
#[derive(Debug)]
pub(crate) struct BuildLock {
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
        fs::create_dir_all(&root).map_err(io_error("create", &root))?;
        Ok(Self { root })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A directory directly under the root, created.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf, CacheError> {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
        Ok(dir)
    }

    /// The entry's directory, if it has been published.
    pub(crate) fn entry(&self, kind: &str, name: &str) -> Option<PathBuf> {
        let path = self.root.join(kind).join(name);
        path.is_dir().then_some(path)
    }

    /// The names of all published entries of a kind.
    pub(crate) fn names(&self, kind: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.root.join(kind)) else {
            return Vec::new();
        };
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect()
    }

    /// Waits until no other process builds this kind of entry. Look for the
    /// entry again afterwards: it may have been built meanwhile.
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
        Ok(BuildLock { _file: file })
    }

    /// An empty scratch directory for the build that holds `_lock`.
    pub(crate) fn scratch(&self, kind: &str, _lock: &BuildLock) -> Result<PathBuf, CacheError> {
        let dir = self.dir("work")?.join(kind);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("empty", &dir)(error));
            }
            _ => {}
        }
        fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
        Ok(dir)
    }

    /// Makes `finished`, a directory on the same file system, the entry of
    /// that name. If another process was faster, its entry stays.
    pub(crate) fn publish(
        &self,
        kind: &str,
        name: &str,
        finished: &Path,
    ) -> Result<PathBuf, CacheError> {
        sync_all(finished)?;
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

/// A rename must not become durable before the files that it publishes.
fn sync_all(dir: &Path) -> Result<(), CacheError> {
    for entry in fs::read_dir(dir).map_err(io_error("read", dir))? {
        let path = entry.map_err(io_error("read", dir))?.path();
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(io_error("sync", &path))?;
    }
    Ok(())
}

fn default_root(xdg: Option<PathBuf>, home: Option<PathBuf>) -> Result<PathBuf, CacheError> {
    // The XDG base directory rules: a relative path is ignored.
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
        let scratch = cache.scratch("kernel", &lock).unwrap();
        let entry = scratch.join("entry");
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
    fn what_an_interrupted_build_left_is_swept_by_the_next() {
        let (_dir, cache) = cache();
        {
            let lock = cache.lock("kernel", &Silent).unwrap();
            let scratch = cache.scratch("kernel", &lock).unwrap();
            fs::create_dir(scratch.join("out")).unwrap();
            fs::write(scratch.join("out/vmlinux"), b"half").unwrap();
        }
        let lock = cache.lock("kernel", &Silent).unwrap();
        let scratch = cache.scratch("kernel", &lock).unwrap();
        assert_eq!(fs::read_dir(scratch).unwrap().count(), 0);
    }

    #[test]
    fn the_first_published_entry_stays() {
        let (_dir, cache) = cache();
        for content in ["first", "second"] {
            let made = cache.root().join("made");
            fs::create_dir(&made).unwrap();
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
        // Another kind does not wait.
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
