//! Templates on disk by what they are made of.
//!
//! ```text
//! <root>/<key>/        an entry: a template's directory; published whole by a rename
//! <root>/lock/<key>    locked while the entry is made or taken away
//! <root>/work/<key>    scratch of whoever holds that lock; whoever gets the lock next removes it
//! ```
//!
//! Locks are the system's (`flock`) and go with the process that holds them, however it ends.
//! Whoever uses an entry holds a shared lock on its manifest; only an entry that nobody holds is
//! evicted.

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
/// What a replaced or evicted entry is called in [`WORK`] until it is removed.
const OLD: &str = ".old";
/// Hexadecimal digits of a key.
const KEY_DIGITS: usize = 64;

/// Names an entry: a SHA-256 over all that a template is made of. The version of the format is part
/// of every key; the host is not, because an entry of another one is refused with the reason.
#[derive(Clone, Debug)]
#[must_use]
pub struct TemplateKey(Sha256);

impl Default for TemplateKey {
    fn default() -> Self {
        Self::new()
    }
}

impl TemplateKey {
    /// The key of a template that is made of nothing yet.
    pub fn new() -> Self {
        Self(Sha256::new()).part("format", FORMAT.to_le_bytes())
    }

    /// Adds an ingredient: memory, vCPUs, CPU profile, command line... Its name and length count,
    /// so that no two lists of ingredients have the same key.
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

    /// 64 hexadecimal digits.
    #[must_use]
    pub fn name(&self) -> String {
        let digest = self.0.clone().finalize();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A directory of templates by [`TemplateKey`], for any number of processes at once.
#[derive(Clone, Debug)]
pub struct TemplateCache {
    root: PathBuf,
    limit: u64,
}

/// What [`TemplateCache::enter`] finds.
#[derive(Debug)]
pub enum Entry {
    /// The template, checked.
    Found(Template),
    /// Nothing that can be used, and the right to make it.
    Vacant(Vacancy),
}

/// How [`TemplateCache::get_or_build`] came by a template.
#[derive(Debug)]
pub enum Found {
    /// It was there.
    There,
    /// It was made.
    Built,
    /// What was there could not be used; it was made again.
    Rebuilt(StoreError),
}

/// A template and how it was come by.
#[derive(Debug)]
pub struct Cached {
    /// The template. Its entry is not evicted while it lives.
    pub template: Template,
    /// How it was come by.
    pub found: Found,
}

/// Why [`TemplateCache::get_or_build`] gives no template.
#[derive(Debug, thiserror::Error)]
pub enum CacheError<E: std::error::Error + 'static> {
    /// The cache cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The template could not be made.
    #[error("the template could not be made")]
    Build(#[source] E),
}

/// The right to make one entry: no other process or thread makes it meanwhile. Dropping it gives
/// the right to the next.
#[derive(Debug)]
pub struct Vacancy {
    cache: TemplateCache,
    key: String,
    why: Option<StoreError>,
    _lock: File,
}

/// Keeps an entry from being evicted. Never looked at: it is the lock on this file that counts.
#[derive(Debug)]
pub(super) struct Lease {
    _manifest: File,
}

impl TemplateCache {
    /// The cache in `root`, which is made if it is not there. `limit` is what its entries may take
    /// on disk, in bytes: when one is added, the least recently used ones that nobody uses go until
    /// the rest fits. The one just added stays even if it alone is larger.
    ///
    /// # Errors
    /// [`StoreError::Io`]; [`StoreError::NotPrivate`] where other users can write to it: what they
    /// put there would run.
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

    /// The entry of `key`, or the right to make it. Blocks while another process or thread makes
    /// it, so that an entry is made once; from async code use `spawn_blocking`.
    ///
    /// # Errors
    /// [`StoreError::Host`] without KVM; [`StoreError::Io`] when locks cannot be had. An entry that
    /// cannot be used is no error but [`Vacancy::why`].
    pub fn enter(&self, key: &TemplateKey) -> Result<Entry, StoreError> {
        self.enter_with(key, &[])
    }

    /// As [`TemplateCache::enter`], for a guest that is given `images` (see
    /// [`Template::load_with`]): their content should be part of the key, or an entry of others
    /// is made again.
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

    /// As [`TemplateCache::enter_with`], but does not wait: None while another process or thread
    /// makes the entry. A thread that waits for a lock cannot be called back, so async code
    /// tries again from time to time.
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
        // It may have been made meanwhile.
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

    /// The entry of `key`, made by `build` if there is none that can be used. Blocks as
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

    /// The entry, marked as used now; `None` if there is none.
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
        // Whoever evicts it holds it alone; then it is as good as gone.
        if manifest.try_lock_shared().is_err() {
            return Ok(None);
        }
        // Replaced between the two: the lock would keep nothing.
        let inode = |of: std::io::Result<fs::Metadata>| of.map(|of| (of.dev(), of.ino())).ok();
        if inode(manifest.metadata()) != inode(fs::symlink_metadata(&path)) {
            return Ok(None);
        }
        // An order of eviction that is a little wrong is no reason to fail.
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

    /// Removes entries, the longest unused first, until the rest is within the limit; `keep` stays.
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

    /// Removes an entry that nobody makes or uses.
    fn try_remove(&self, key: &str) -> bool {
        let Ok(lock) = open_lock(&self.lock_path(key)) else {
            return false;
        };
        if lock.try_lock().is_err() {
            return false;
        }
        let dir = self.root.join(key);
        // An entry without a manifest is nobody's.
        if let Ok(manifest) = File::open(dir.join(MANIFEST))
            && manifest.try_lock().is_err()
        {
            return false;
        }
        // By a rename first: half an entry never has an entry's name.
        let old = self.work(key, OLD);
        let _ = remove(&old);
        let gone = fs::rename(&dir, &old).is_ok();
        let _ = remove(&old);
        gone
    }

    /// Removes what processes left behind that were killed.
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
    /// Why what was there cannot be used; `None` if nothing was there.
    #[must_use]
    pub fn why(&self) -> Option<&StoreError> {
        self.why.as_ref()
    }

    /// Makes `template` the entry, in place of what was there. What is given back keeps the entry
    /// from being evicted. Blocks for the disk.
    ///
    /// # Errors
    /// [`StoreError`]; the entry is then not there.
    pub fn fill(self, template: &Template) -> Result<Template, StoreError> {
        let cache = &self.cache;
        cache.sweep();
        let (dir, old) = (cache.root.join(&self.key), cache.work(&self.key, OLD));
        // Of one that was killed; the lock is ours.
        for left in [&old, &cache.work(&self.key, "")] {
            remove(left).map_err(io_error("remove", left))?;
        }
        let scratch = Scratch::new(cache.work(&self.key, ""))?;
        template.write_into(&scratch.path, &self.key)?;
        // Held before others see it.
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

/// An entry as it lies on disk.
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
            // One without a manifest goes first.
            used: used.unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

/// Removes whatever is there.
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
