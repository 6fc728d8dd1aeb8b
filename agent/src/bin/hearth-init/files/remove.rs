//! Removes a directory with all that is in it.

use alloc::vec::Vec;

use hearth_agent::proto::{FileFailure, FileKind};
use rustix::{
    fd::OwnedFd,
    fs::{AtFlags, Mode, OFlags, SeekFrom, openat, seek, unlinkat},
    io::Errno,
};

use super::{entries, place::Spot};

/// Approximate number of entries that one step removes.
const STEP: usize = 64;
/// Deepest nesting of directories that is followed: each level costs a descriptor.
const DEEPEST: usize = 200;

/// A directory that is being removed.
#[derive(Debug)]
pub(crate) struct Removing {
    spot: Spot,
    /// The open directories, from the one to remove down to the current one, each with its name in
    /// its parent.
    open: Vec<(OwnedFd, Vec<u8>)>,
}

impl Removing {
    /// Removes a file, a link or an empty directory; a directory with entries is returned, to be
    /// removed in steps.
    pub(super) fn begin(spot: Spot, recursive: bool) -> Result<Option<Self>, FileFailure> {
        match unlinkat(&spot.dir, spot.name(), AtFlags::empty()) {
            Ok(()) => return Ok(None),
            // EPERM is the error of POSIX for a directory.
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(errno) => return Err(errno.into()),
        }
        match unlinkat(&spot.dir, spot.name(), AtFlags::REMOVEDIR) {
            Ok(()) => Ok(None),
            Err(Errno::NOTEMPTY | Errno::EXIST) if recursive => {
                let dir = enter(&spot.dir, spot.name())?;
                let open = Vec::from([(dir, spot.name().to_vec())]);
                Ok(Some(Self { spot, open }))
            }
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes some entries; returns true once the directory is gone. Entries that are added
    /// meanwhile are removed, too.
    pub(super) fn step(&mut self) -> Result<bool, FileFailure> {
        let mut removed = 0;
        while removed < STEP {
            let Some((dir, _)) = self.open.last() else {
                return Ok(true);
            };
            // From the beginning: positions are not valid once entries are removed.
            seek(dir, SeekFrom::Start(0))?;
            let found = entries(dir)?;
            if found.is_empty() {
                self.leave()?;
                removed += 1;
                continue;
            }
            for entry in found {
                let name = entry.name.as_slice();
                let gone = match entry.kind {
                    FileKind::Dir => unlinkat(dir, name, AtFlags::REMOVEDIR),
                    _ => unlinkat(dir, name, AtFlags::empty()),
                };
                match gone {
                    Ok(()) | Err(Errno::NOENT) => removed += 1,
                    Err(Errno::NOTEMPTY | Errno::EXIST | Errno::ISDIR) => {
                        if self.open.len() >= DEEPEST {
                            return Err(FileFailure::TooDeep);
                        }
                        let inner = enter(dir, name)?;
                        self.open.push((inner, name.to_vec()));
                        break;
                    }
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        Ok(false)
    }

    /// Removes the innermost directory, which is empty.
    fn leave(&mut self) -> Result<(), FileFailure> {
        let Some((_, name)) = self.open.pop() else {
            return Ok(());
        };
        let parent = self.open.last().map_or(&self.spot.dir, |(dir, _)| dir);
        match unlinkat(parent, name.as_slice(), AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            // A new entry was added meanwhile.
            Err(Errno::NOTEMPTY | Errno::EXIST) => {
                let dir = enter(parent, &name)?;
                self.open.push((dir, name));
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Opens a directory, never through a link.
fn enter(dir: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}
