//! An on-disk cache of templates, keyed by the inputs that they are made from.
//!
//! ```text
//! <root>/<key>/        an entry: a template's directory; published whole by a rename
//! <root>/lock/<key>    locked while the entry is made or removed
//! <root>/work/<key>    scratch of the holder of that lock; the next holder removes it
//! ```
//!
//! Locks are the system's (`flock`) and are released when the process that holds them ends, however
//! it ends. A user of an entry holds a shared lock on its manifest; only an entry without such a
//! lock is evicted.

use std::fs::{self, DirBuilder, File, FileTimes, TryLockError};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::Template;
use super::compat::Origin;
use super::manifest::FORMAT;
use super::store::{MANIFEST, Scratch, StoreError, io_error, is_private};

const LOCKS: &str = "lock";
const WORK: &str = "work";
/// Suffix in [`WORK`] of a replaced or evicted entry, until it is removed.
const OLD: &str = ".old";
/// Hexadecimal digits of a key.
const KEY_DIGITS: usize = 64;

/// Name of an entry: a SHA-256 over all inputs of a template. The format version is part of every
/// key. The host is not: an entry from an incompatible host is refused with the reason.
#[derive(Clone, Debug)]
#[must_use]
pub struct TemplateKey(Sha256);

impl Default for TemplateKey {
    fn default() -> Self {
        Self::new()
    }
}

impl TemplateKey {
    /// Returns the key of a template without inputs.
    pub fn new() -> Self {
        Self(Sha256::new()).part("format", FORMAT.to_le_bytes())
    }

    /// Adds an input: memory, vCPUs, CPU profile, command line... Name and content are hashed with
    /// their lengths, so that no two different lists of inputs have the same key.
    pub fn part(mut self, name: &str, content: impl AsRef<[u8]>) -> Self {
        for bytes in [name.as_bytes(), content.as_ref()] {
            self.0.update((bytes.len() as u64).to_le_bytes());
            self.0.update(bytes);
        }
        self
    }

    /// Adds the content of a file: kernel, initramfs, image.
    ///
    /// # Errors
    /// [`StoreError::Io`] when it cannot be read.
    pub fn file(self, name: &str, path: impl AsRef<Path>) -> Result<Self, StoreError> {
        let path = path.as_ref();
        let mut content = Sha256::new();
        let mut buffer = vec![0; 1 << 16];
        let mut file = File::open(path).map_err(io_error("open", path))?;
        loop {
            match file.read(&mut buffer).map_err(io_error("read", path))? {
                0 => break,
                count => content.update(buffer.get(..count).unwrap_or_default()),
            }
        }
        Ok(self.part(name, content.finalize()))
    }

    /// Returns the key as 64 hexadecimal digits.
    #[must_use]
    pub fn name(&self) -> String {
        let digest = self.0.clone().finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A directory of templates by [`TemplateKey`], shared by any number of processes.
#[derive(Clone, Debug)]
pub struct TemplateCache {
    root: PathBuf,
    limit: u64,
}

/// Result of [`TemplateCache::enter`].
#[derive(Debug)]
pub enum Entry {
    /// The template, checked.
    Found(Template),
    /// No usable entry, and the right to make it.
    Vacant(Vacancy),
}

/// How [`TemplateCache::get_or_build`] obtained a template.
#[derive(Debug)]
pub enum Found {
    /// The entry existed.
    There,
    /// There was no entry; it was made.
    Built,
    /// The existing entry was unusable; it was made again.
    Rebuilt(StoreError),
}

/// A template and how it was obtained.
#[derive(Debug)]
pub struct Cached {
    /// The template. Its entry is not evicted while it lives.
    pub template: Template,
    /// How it was obtained.
    pub found: Found,
}

/// Error of [`TemplateCache::get_or_build`].
#[derive(Debug, thiserror::Error)]
pub enum CacheError<E: std::error::Error + 'static> {
    /// The cache cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The template could not be made.
    #[error("the template could not be made")]
    Build(#[source] E),
}

/// The right to make one entry: no other process or thread makes it meanwhile. Dropping it passes
/// the right to the next caller that waits for it.
#[derive(Debug)]
pub struct Vacancy {
    cache: TemplateCache,
    key: String,
    why: Option<StoreError>,
    _lock: File,
}

/// Keeps an entry from being evicted. Its file is never read: only the lock on it matters.
#[derive(Debug)]
pub(super) struct Lease {
    _manifest: File,
}

impl TemplateCache {
    /// Opens the cache in `root`, and creates it if it does not exist. `limit` is the most bytes
    /// that its entries may take on disk: when one is added, the least recently used entries that
    /// are not in use are removed until the rest fits. The entry just added stays even if it alone
    /// is larger.
    ///
    /// # Errors
    /// [`StoreError::Io`]; [`StoreError::NotPrivate`] if other users can write to the cache: a
    /// template that they put there would run.
    pub fn open(root: impl AsRef<Path>, limit: u64) -> Result<Self, StoreError> {
        let root = root.as_ref();
        let root = std::path::absolute(root).map_err(io_error("use", root))?;
        for dir in [root.clone(), root.join(LOCKS), root.join(WORK)] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(io_error("create", &dir))?;
            let own = fs::symlink_metadata(&dir).map_err(io_error("read", &dir))?;
            if !own.is_dir() || !is_private(own.uid(), own.mode()) {
                return Err(StoreError::NotPrivate(dir));
            }
        }
        Ok(Self { root, limit })
    }

    /// Returns the entry of `key`, or the right to make it. Blocks while another process or thread
    /// makes it, so that an entry is made once; from async code use `spawn_blocking`.
    ///
    /// # Errors
    /// [`StoreError::Host`] without KVM; [`StoreError::Io`] when a lock cannot be taken. An
    /// unusable entry is not an error: see [`Vacancy::why`].
    pub fn enter(&self, key: &TemplateKey) -> Result<Entry, StoreError> {
        self.enter_with(key, &[])
    }

    /// As [`TemplateCache::enter`], for a guest with the pmem images `images` (see
    /// [`Template::load_with`]). Their content should be part of the key: otherwise an entry made
    /// with other images is unusable, and is made again.
    ///
    /// # Errors
    /// As [`TemplateCache::enter`].
    pub fn enter_with(&self, key: &TemplateKey, images: &[&Path]) -> Result<Entry, StoreError> {
        let here = Origin::here()?;
        let key = key.name();
        if let Ok(Some(template)) = self.load(&key, &here, images) {
            return Ok(Entry::Found(template));
        }
        let path = self.lock_path(&key);
        let lock = open_lock(&path)?;
        lock.lock().map_err(io_error("lock", &path))?;
        Ok(self.enter_locked(key, lock, &here, images))
    }

    /// As [`TemplateCache::enter_with`], but does not wait: returns `None` while another process or
    /// thread makes the entry. A thread that waits for a lock cannot be interrupted, so async code
    /// should call this again from time to time.
    ///
    /// # Errors
    /// As [`TemplateCache::enter`].
    pub fn try_enter_with(
        &self,
        key: &TemplateKey,
        images: &[&Path],
    ) -> Result<Option<Entry>, StoreError> {
        let here = Origin::here()?;
        let key = key.name();
        if let Ok(Some(template)) = self.load(&key, &here, images) {
            return Ok(Some(Entry::Found(template)));
        }
        let path = self.lock_path(&key);
        let lock = open_lock(&path)?;
        match lock.try_lock() {
            Ok(()) => Ok(Some(self.enter_locked(key, lock, &here, images))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
        }
    }

    fn enter_locked(&self, key: String, lock: File, here: &Origin, images: &[&Path]) -> Entry {
        // The entry may have been made meanwhile.
        let why = match self.load(&key, here, images) {
            Ok(Some(template)) => return Entry::Found(template),
            Ok(None) => None,
            Err(why) => Some(why),
        };
        Entry::Vacant(Vacancy {
            cache: self.clone(),
            key,
            why,
            _lock: lock,
        })
    }

    /// Returns the entry of `key`, made by `build` if there is no usable one. Blocks as
    /// [`TemplateCache::enter`] does.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn get_or_build<E: std::error::Error + 'static>(
        &self,
        key: &TemplateKey,
        build: impl FnOnce() -> Result<Template, E>,
    ) -> Result<Cached, CacheError<E>> {
        let mut vacancy = match self.enter(key)? {
            Entry::Found(template) => {
                let found = Found::There;
                return Ok(Cached { template, found });
            }
            Entry::Vacant(vacancy) => vacancy,
        };
        let why = vacancy.why.take();
        let template = vacancy.fill(&build().map_err(CacheError::Build)?)?;
        let found = why.map_or(Found::Built, Found::Rebuilt);
        Ok(Cached { template, found })
    }

    /// Bytes that the entries take on disk.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn size(&self) -> Result<u64, StoreError> {
        Ok(self.entries()?.iter().map(|entry| entry.bytes).sum())
    }

    fn lock_path(&self, key: &str) -> PathBuf {
        self.root.join(LOCKS).join(key)
    }

    /// Loads the entry and marks it as used now; `None` if there is none.
    fn load(
        &self,
        key: &str,
        here: &Origin,
        images: &[&Path],
    ) -> Result<Option<Template>, StoreError> {
        let dir = self.root.join(key);
        let path = dir.join(MANIFEST);
        let manifest = match File::open(&path) {
            Ok(manifest) => manifest,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !dir.exists() => return Ok(None),
            Err(e) => return Err(io_error("open", path)(e)),
        };
        // Only an eviction holds this lock exclusively: the entry is about to be removed.
        if manifest.try_lock_shared().is_err() {
            return Ok(None);
        }
        // The entry was replaced between open and lock: the lock would protect nothing.
        let inode = |of: std::io::Result<fs::Metadata>| of.map(|of| (of.dev(), of.ino())).ok();
        if inode(manifest.metadata()) != inode(fs::symlink_metadata(&path)) {
            return Ok(None);
        }
        // A failure only makes the order of eviction slightly wrong.
        let _ = manifest.set_times(FileTimes::new().set_modified(SystemTime::now()));
        let lease = Lease {
            _manifest: manifest,
        };
        Ok(Some(
            Template::load_entry(&dir, here, key, images)?.kept_by(lease),
        ))
    }

    fn entries(&self) -> Result<Vec<Present>, StoreError> {
        let listing = fs::read_dir(&self.root).map_err(io_error("list", &self.root))?;
        let present = listing.filter_map(|entry| {
            let key = entry.ok()?.file_name().into_string().ok()?;
            is_key(&key).then(|| Present::of(&self.root, key))
        });
        Ok(present.collect())
    }

    /// Removes entries, the least recently used first, until the rest is within the limit; `keep`
    /// stays.
    fn evict(&self, keep: &str) -> Result<(), StoreError> {
        let mut entries = self.entries()?;
        entries.sort_by_key(|entry| entry.used);
        let mut bytes: u64 = entries.iter().map(|entry| entry.bytes).sum();
        for entry in entries.iter().filter(|entry| entry.key != keep) {
            if bytes <= self.limit {
                break;
            }
            if self.try_remove(&entry.key) {
                bytes = bytes.saturating_sub(entry.bytes);
            }
        }
        Ok(())
    }

    /// Removes an entry that is neither being made nor in use. Returns whether it was removed.
    fn try_remove(&self, key: &str) -> bool {
        let Ok(lock) = open_lock(&self.lock_path(key)) else {
            return false;
        };
        if lock.try_lock().is_err() {
            return false;
        }
        let dir = self.root.join(key);
        // An entry without a manifest has no users.
        if let Ok(manifest) = File::open(dir.join(MANIFEST))
            && manifest.try_lock().is_err()
        {
            return false;
        }
        // Renamed first: a half-removed entry never has an entry's name.
        let old = self.work(key, OLD);
        let _ = remove(&old);
        let gone = fs::rename(&dir, &old).is_ok();
        let _ = remove(&old);
        gone
    }

    /// Removes the scratch directories of processes that were killed.
    fn sweep(&self) {
        let Ok(listing) = fs::read_dir(self.root.join(WORK)) else {
            return;
        };
        for entry in listing.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let key = name.strip_suffix(OLD).unwrap_or(name);
            if let Ok(lock) = open_lock(&self.lock_path(key))
                && is_key(key)
                && lock.try_lock().is_ok()
            {
                let _ = remove(&entry.path());
            }
        }
    }

    fn work(&self, key: &str, suffix: &str) -> PathBuf {
        self.root.join(WORK).join(format!("{key}{suffix}"))
    }
}

impl Vacancy {
    /// Returns why the existing entry cannot be used; `None` if there was none.
    #[must_use]
    pub fn why(&self) -> Option<&StoreError> {
        self.why.as_ref()
    }

    /// Makes `template` the entry, in place of an unusable one. The returned template keeps the
    /// entry from being evicted. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError`]; the template is then not in the cache.
    pub fn fill(self, template: &Template) -> Result<Template, StoreError> {
        let cache = &self.cache;
        cache.sweep();
        let (dir, old) = (cache.root.join(&self.key), cache.work(&self.key, OLD));
        // Left by a process that was killed; its lock is held here now.
        for left in [&old, &cache.work(&self.key, "")] {
            remove(left).map_err(io_error("remove", left))?;
        }
        let scratch = Scratch::new(cache.work(&self.key, ""))?;
        template.write_into(&scratch.path, &self.key)?;
        // Locked before other processes see the entry.
        let manifest = scratch.path.join(MANIFEST);
        let lease = File::open(&manifest)
            .and_then(|file| file.lock_shared().map(|()| file))
            .map_err(io_error("lock", &manifest))?;
        match fs::rename(&dir, &old) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error("replace", &dir)(e));
            }
            _ => {}
        }
        scratch.publish(&dir)?;
        let _ = remove(&old);
        if let Err(error) = cache.evict(&self.key) {
            tracing::warn!(%error, "the template cache may exceed its limit");
        }
        let lease = Lease { _manifest: lease };
        Ok(template.kept_by(lease))
    }
}

/// An entry on disk.
struct Present {
    key: String,
    bytes: u64,
    used: SystemTime,
}

impl Present {
    fn of(root: &Path, key: String) -> Self {
        let dir = root.join(&key);
        let files = fs::read_dir(&dir).into_iter().flatten().flatten();
        let bytes = files
            .filter_map(|file| file.metadata().ok())
            .map(|file| file.blocks() * 512)
            .sum();
        let used = fs::metadata(dir.join(MANIFEST)).and_then(|manifest| manifest.modified());
        Self {
            key,
            bytes,
            // An entry without a manifest is evicted first.
            used: used.unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

/// Removes the file or directory at `path`, if there is one.
fn remove(path: &Path) -> std::io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn is_key(name: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    name.len() == KEY_DIGITS && name.bytes().all(digit)
}

fn open_lock(path: &Path) -> Result<File, StoreError> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(io_error("open", path))
}
