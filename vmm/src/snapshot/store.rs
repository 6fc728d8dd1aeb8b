//! A template as a directory: `manifest` (see [`manifest`](super::manifest)) and `memory`, the
//! guest's memory from its first page on, with holes where it is zero.
//!
//! The content of the directory is untrusted: every part is checked against its checksum before
//! anything of it is used. The checksums detect damage, not malice: a user who can write the
//! directory can make a template of their own.

use std::fs::{self, DirBuilder, File};
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags, openat};

use super::Template;
use super::compat::{Difference, Origin};
use super::images;
use super::manifest::{self, Defect, Manifest};
use super::memory::copy_pages;
use crate::advice::advice;
use crate::config::{MAX_MEMORY_MIB, MAX_VCPUS};
use crate::host::HostError;
use crate::memory::{MIB, check_file_size, memfd, seal};
use crate::saved::VmState;
use crate::virtio::pmem::{MAX_IMAGES, PmemError};

pub(super) const MANIFEST: &str = "manifest";
const MEMORY: &str = "memory";

/// Error of saving or loading a template. No guest has run, and no half-written template is in its
/// place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {action} {}: check permissions and free space{}", path.display(), advice(source))]
    Io {
        /// The operation that failed.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The path exists already.
    #[error("{} exists; remove it first or choose another name", .0.display())]
    Exists(PathBuf),
    /// Not a directory with a template.
    #[error("{} is not a template", .0.display())]
    NotATemplate(PathBuf),
    /// Written by another version of this library.
    #[error("{} has format version {found}, this library reads {}; save it again", path.display(), manifest::FORMAT)]
    Version {
        /// The template.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A part is not what was written: damaged, truncated, or of another template.
    #[error("{} is damaged, cut off or of another template; save it again", .0.display())]
    Damaged(PathBuf),
    /// The template was made on another kind of host.
    #[error("{} cannot run here: {difference}; save it again on this host", path.display())]
    Foreign {
        /// The template.
        path: PathBuf,
        /// The difference.
        difference: Difference,
    },
    /// The number of images is not that of the guest (see
    /// [`VmConfigBuilder::pmem`](crate::VmConfigBuilder::pmem)). The files of images are not part
    /// of a template.
    #[error(
        "the guest of {} was given {wanted} images, {given} are named; load it with those of its configuration, in their order",
        path.display()
    )]
    Images {
        /// The template.
        path: PathBuf,
        /// Number of images that the guest was given.
        wanted: usize,
        /// Number of images that were passed.
        given: usize,
    },
    /// An image is not the one that the guest was given.
    #[error("{} is not the image that the guest of {} was given", image.display(), path.display())]
    OtherImage {
        /// The template.
        path: PathBuf,
        /// The image.
        image: PathBuf,
    },
    /// An image cannot be used as a pmem device.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// Other users can write to a template that is to be trusted ([`Template::load_trusted`]), or
    /// to a template cache.
    #[error("{} can be written by others than this user; make it private or use load", .0.display())]
    NotPrivate(PathBuf),
    /// The host's KVM could not be queried.
    #[error(transparent)]
    Host(#[from] HostError),
}

pub(super) fn io_error(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.into();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}

impl Template {
    /// Writes the template to `dir`, which must not exist (or be empty): all of it or nothing, even
    /// if the host fails meanwhile. The guest's images are not part of it. A process that is killed
    /// leaves a directory `.NAME.PID.NUMBER.unfinished` beside it, with the guest's memory in it,
    /// which the next save beside it removes. Pages of zeroes take no space. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), StoreError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let dir = std::path::absolute(&dir).map_err(io_error("use", dir.as_ref()))?;
        let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
            return Err(StoreError::Exists(dir));
        };
        sweep(parent);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let scratch = format!(
            ".{}.{}.{number}{UNFINISHED}",
            name.to_string_lossy(),
            std::process::id()
        );
        let scratch = Scratch::new(parent.join(scratch))?;
        self.write_into(&scratch.path, "")?;
        scratch.publish(&dir)
    }

    /// Reads a template that [`Template::save`] wrote: a copy with verified checksums, in sealed
    /// memory. Later changes of the files do not matter. The host's limits (processor quota,
    /// seccomp) are not stored: clones have the defaults. Blocks on the disk, and for about 1 ms
    /// per MiB.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::Images`] if the guest was given any.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::load_with(dir, &[])
    }

    /// As [`Template::load`], for a guest with the pmem images `images`: those of its
    /// configuration, in their order. They are mapped, not copied, as at a boot; their content must
    /// be what it was when the template was saved (checking it takes some 1 ms per MiB).
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::OtherImage`] for an image with another content.
    pub fn load_with(dir: impl AsRef<Path>, images: &[&Path]) -> Result<Self, StoreError> {
        Self::load_for(dir.as_ref(), &Origin::here()?, images)
    }

    pub(super) fn load_for(
        dir: &Path,
        here: &Origin,
        images: &[&Path],
    ) -> Result<Self, StoreError> {
        Self::read(dir, Stored::open(dir, here)?, images)
    }

    /// As [`Template::load_for`], but refuses a template that was written as the entry of another
    /// key.
    pub(super) fn load_entry(
        dir: &Path,
        here: &Origin,
        key: &str,
        images: &[&Path],
    ) -> Result<Self, StoreError> {
        let stored = Stored::open(dir, here)?;
        if stored.manifest.key != key {
            return Err(StoreError::Damaged(dir.join(MANIFEST)));
        }
        Self::read(dir, stored, images)
    }

    fn read(dir: &Path, mut stored: Stored, given: &[&Path]) -> Result<Self, StoreError> {
        let Manifest {
            state,
            images: named,
            ..
        } = &mut stored.manifest;
        images::bring(dir, state, named, given, false)?;
        let path = dir.join(MEMORY);
        let bytes = stored.manifest.state.hardware.memory_bytes;
        let target = memfd().map_err(io_error("make memory for", &path))?;
        check_file_size(bytes)
            .and_then(|()| target.set_len(bytes))
            .map_err(io_error("make memory for", &path))?;
        let digest = copy_pages(&stored.memory, &target, bytes).map_err(|e| match e.kind() {
            // The file became shorter while it was read.
            ErrorKind::UnexpectedEof => StoreError::Damaged(path.clone()),
            _ => io_error("read", &path)(e),
        })?;
        if digest != stored.manifest.memory {
            return Err(StoreError::Damaged(path));
        }
        seal(&target).map_err(io_error("seal memory of", &path))?;
        Ok(Self::with(stored.manifest.state, Arc::new(target)))
    }

    /// As [`Template::load`], but maps the memory file instead of copying and checking it: it takes
    /// no time, and no memory but the page cache's. For files that only this user can write, in a
    /// directory that only this user can write.
    ///
    /// While the template or a VM forked from it exists, the file must not be written or shortened:
    /// the effect of a write on guests is undefined, and this process gets SIGBUS for pages that
    /// are gone. Deleting or replacing the directory is harmless.
    ///
    /// # Errors
    /// [`StoreError`]; [`StoreError::NotPrivate`] if other users can write.
    pub fn load_trusted(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::load_trusted_with(dir, &[])
    }

    /// As [`Template::load_trusted`], for a guest with the pmem images `images`; see
    /// [`Template::load_with`]. Only the size of the images is checked.
    ///
    /// # Errors
    /// As [`Template::load_trusted`]; [`StoreError::OtherImage`] for an image of another size.
    pub fn load_trusted_with(dir: impl AsRef<Path>, images: &[&Path]) -> Result<Self, StoreError> {
        Self::load_trusted_for(dir.as_ref(), &Origin::here()?, images)
    }

    pub(super) fn load_trusted_for(
        dir: &Path,
        here: &Origin,
        given: &[&Path],
    ) -> Result<Self, StoreError> {
        let stored = Stored::open(dir, here)?;
        if !stored.private {
            return Err(StoreError::NotPrivate(dir.to_owned()));
        }
        let Manifest {
            mut state,
            images: named,
            ..
        } = stored.manifest;
        images::bring(dir, &mut state, &named, given, true)?;
        Ok(Self::with(state, Arc::new(stored.memory)))
    }

    /// Writes the parts into an empty directory and waits until the disk has their content.
    pub(super) fn write_into(&self, dir: &Path, key: &str) -> Result<(), StoreError> {
        write_parts(
            dir,
            &self.frozen.state,
            &self.frozen.memory,
            &Origin::here()?,
            key,
        )
    }
}

/// The parts of a template's directory, with the manifest checked.
struct Stored {
    manifest: Manifest,
    /// The memory file. Its length is that of the manifest; its content is not checked.
    memory: File,
    /// Whether only this user can write the directory and its files. Checked on the open files,
    /// not by name: other users may replace what a name refers to.
    private: bool,
}

/// Whether only this user can write the file or directory.
pub(super) fn is_private(uid: u32, mode: u32) -> bool {
    uid == rustix::process::geteuid().as_raw() && mode & 0o022 == 0
}

impl Stored {
    fn open(dir: &Path, here: &Origin) -> Result<Self, StoreError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let at = match rustix::fs::open(dir, flags, Mode::empty()) {
            Ok(at) => at,
            Err(rustix::io::Errno::NOTDIR) => return Err(StoreError::NotATemplate(dir.to_owned())),
            Err(e) => return Err(io_error("open", dir)(e.into())),
        };
        let path = dir.join(MANIFEST);
        let own = rustix::fs::fstat(&at).map_err(|e| io_error("read", dir)(e.into()))?;
        let (file, metadata) = open_part(&at, MANIFEST, &path)?;
        let mut private =
            is_private(own.st_uid, own.st_mode) && is_private(metadata.uid(), metadata.mode());
        if metadata.len() > manifest::MAX_BYTES {
            return Err(StoreError::Damaged(path));
        }
        let mut bytes = Vec::new();
        file.take(manifest::MAX_BYTES)
            .read_to_end(&mut bytes)
            .map_err(io_error("read", &path))?;
        let manifest = Manifest::decode(&bytes).map_err(|defect| match defect {
            Defect::Magic => StoreError::NotATemplate(dir.to_owned()),
            Defect::Version(found) => StoreError::Version {
                path: dir.to_owned(),
                found,
            },
            Defect::Damaged => StoreError::Damaged(path.clone()),
        })?;
        if let Some(difference) = manifest.origin.difference(here) {
            return Err(StoreError::Foreign {
                path: dir.to_owned(),
                difference,
            });
        }
        if !manifest.is_possible() {
            return Err(StoreError::Damaged(path));
        }
        let path = dir.join(MEMORY);
        let (memory, metadata) = open_part(&at, MEMORY, &path)?;
        private &= is_private(metadata.uid(), metadata.mode());
        if metadata.len() != manifest.state.hardware.memory_bytes {
            return Err(StoreError::Damaged(path));
        }
        Ok(Self {
            manifest,
            memory,
            private,
        })
    }
}

impl Manifest {
    /// Whether this can be the manifest of a template on disk, as far as can be told without KVM.
    pub(super) fn is_possible(&self) -> bool {
        let hardware = self.state.hardware;
        hardware.memory_bytes > 0
            && hardware.memory_bytes.is_multiple_of(MIB)
            && hardware.memory_bytes / MIB <= MAX_MEMORY_MIB
            && (1..=MAX_VCPUS).contains(&hardware.vcpus)
            && self.state.vcpus.len() == usize::from(hardware.vcpus)
            && self.images.len() <= MAX_IMAGES
            && images::fit(&self.state, &self.images)
    }
}

/// Opens a part, which must be a regular file.
fn open_part(dir: &OwnedFd, name: &str, path: &Path) -> Result<(File, fs::Metadata), StoreError> {
    // The open must not block if the part is a pipe.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match openat(dir, name, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Err(StoreError::NotATemplate(path.to_owned())),
        Err(rustix::io::Errno::LOOP) => return Err(StoreError::Damaged(path.to_owned())),
        Err(e) => return Err(io_error("open", path)(e.into())),
    };
    let metadata = file.metadata().map_err(io_error("read", path))?;
    if !metadata.is_file() {
        return Err(StoreError::Damaged(path.to_owned()));
    }
    Ok((file, metadata))
}

pub(super) fn write_parts(
    dir: &Path,
    state: &VmState,
    memory: &File,
    here: &Origin,
    key: &str,
) -> Result<(), StoreError> {
    let create = |name: &str| {
        let path = dir.join(name);
        let mut options = File::options();
        let file = options.write(true).create_new(true).mode(0o600).open(&path);
        file.map_err(io_error("create", &path)).map(|f| (f, path))
    };
    let images = images::name(dir, state)?;
    let (file, path) = create(MEMORY)?;
    let bytes = state.hardware.memory_bytes;
    let write = || {
        check_file_size(bytes)?;
        file.set_len(bytes)?;
        let digest = copy_pages(memory, &file, bytes)?;
        file.sync_all()?;
        Ok(digest)
    };
    let memory = write().map_err(io_error("write", &path))?;
    let (mut file, path) = create(MANIFEST)?;
    let encoded =
        manifest::encode(here, key, memory, &images, state).map_err(std::io::Error::other);
    encoded
        .and_then(|bytes| {
            check_file_size(bytes.len() as u64)?;
            std::io::Write::write_all(&mut file, &bytes)
        })
        .and_then(|()| file.sync_all())
        .map_err(io_error("write", &path))
}

fn open_dir(dir: &Path) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?.into())
}

/// Suffix of a directory that [`Template::save`] has not finished; no template has such a name by
/// chance.
const UNFINISHED: &str = ".unfinished";

/// Removes unfinished saves in `parent` whose processes were killed: their directories are not
/// locked. An empty directory is kept: it may be new and not locked yet.
fn sweep(parent: &Path) {
    let Ok(listing) = fs::read_dir(parent) else {
        return;
    };
    for entry in listing.flatten() {
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        if !name.starts_with('.') || !name.ends_with(UNFINISHED) {
            continue;
        }
        let path = entry.path();
        let Ok(held) = open_dir(&path) else { continue };
        if held.try_lock().is_err() {
            continue;
        }
        let own = held
            .metadata()
            .is_ok_and(|dir| is_private(dir.uid(), dir.mode()));
        let empty = fs::read_dir(&path).is_ok_and(|mut files| files.next().is_none());
        if own && !empty {
            remove_parts(&held, &path);
        }
    }
}

/// A private directory for the parts of a template. Removed at drop unless it was published.
pub(super) struct Scratch {
    pub(super) path: PathBuf,
    /// Held open, so that the directory can be emptied and synced without another descriptor. Its
    /// lock shows that its maker is alive, until it is published or this process ends. On a file
    /// system without such locks, `sweep` gets no lock either, and removes nothing.
    dir: File,
    is_published: bool,
}

impl Scratch {
    pub(super) fn new(path: PathBuf) -> Result<Self, StoreError> {
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(io_error("create", &path))?;
        match open_dir(&path) {
            Ok(dir) => {
                let _ = dir.lock();
                Ok(Self {
                    path,
                    dir,
                    is_published: false,
                })
            }
            Err(error) => {
                let _ = fs::remove_dir(&path);
                Err(io_error("open", path)(error))
            }
        }
    }

    /// Renames the directory to `to`, unless that exists (an empty directory is replaced), and
    /// waits until the rename is on disk. After an error the directory does not have that name.
    pub(super) fn publish(mut self, to: &Path) -> Result<(), StoreError> {
        let parent = to.parent().unwrap_or(to);
        // Opened before the rename: a descriptor may not be available.
        let parent = File::open(parent).map_err(io_error("open", parent))?;
        self.dir.sync_all().map_err(io_error("write", &self.path))?;
        fs::rename(&self.path, to).map_err(|error| match error.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
                StoreError::Exists(to.to_owned())
            }
            _ => io_error("create", to)(error),
        })?;
        if let Err(error) = parent.sync_all() {
            let _ = fs::rename(to, &self.path);
            return Err(io_error("write", to)(error));
        }
        self.is_published = true;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.is_published {
            remove_parts(&self.dir, &self.path);
        }
    }
}

/// Removes a template's directory without another descriptor. A directory that contains anything
/// else stays.
fn remove_parts(dir: &File, path: &Path) {
    for part in [MANIFEST, MEMORY] {
        let _ = rustix::fs::unlinkat(dir, part, AtFlags::empty());
    }
    let _ = fs::remove_dir(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_of_dead_savers_is_swept_and_of_living_ones_and_all_else_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, parts: &[&str]| {
            // Not locked, as after its process was killed.
            let path = parent.path().join(name);
            DirBuilder::new().mode(0o700).create(&path).unwrap();
            for part in parts {
                fs::write(path.join(part), "x").unwrap();
            }
            path
        };
        let dead = make(".base.123.0.unfinished", &[MEMORY, MANIFEST]);
        let half = make(".my.base.9.17.unfinished", &[MEMORY]);
        let fresh = make(".base.123.1.unfinished", &[]);
        let alive = make(".base.123.2.unfinished", &[MEMORY]);
        let lock = open_dir(&alive).unwrap();
        lock.lock().unwrap();
        let foreign = make(".base.123.3.unfinished", &[MEMORY, "diary"]);
        let others = [
            make("base", &[MEMORY, MANIFEST]),
            make(".python.3.14", &[MEMORY, MANIFEST]),
            make("base.1.2.unfinished", &[MEMORY]),
        ];
        let link = parent.path().join(".base.5.5.unfinished");
        std::os::unix::fs::symlink(&others[0], link).unwrap();
        sweep(parent.path());
        for gone in [&dead, &half] {
            assert!(!gone.exists(), "{}", gone.display());
        }
        for kept in others.iter().chain([&fresh, &alive]) {
            assert!(kept.exists(), "{}", kept.display());
        }
        assert!(others.iter().all(|other| other.join(MEMORY).exists()));
        assert!(others[1].join(MANIFEST).exists());
        assert!(foreign.join("diary").exists());
        drop(lock);
        sweep(parent.path());
        assert!(!alive.exists(), "its process has ended since");
    }
}
