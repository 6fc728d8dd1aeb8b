//! Writes files.

use alloc::{format, rc::Rc, string::String};
use core::sync::atomic::{AtomicU32, Ordering};

use hearth_agent::proto::{FileFailure, Put, PutMode};
use rustix::{
    fd::OwnedFd,
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Uid, chownat, fchmod, fchown, openat,
        renameat, renameat_with, statat, symlinkat, unlinkat,
    },
    io::{Errno, write},
};

use super::{is_regular, place::Spot};
use crate::account::owner;

/// Permissions of a new file.
const USUAL: u32 = 0o644;
/// Most retries with another name for an incomplete file.
const ATTEMPTS: u32 = 64;

/// A file that is being written.
#[derive(Debug)]
pub(crate) struct Putting {
    file: OwnedFd,
    /// The temporary file to rename at the end; `None` when appending.
    unfinished: Option<Unfinished>,
}

/// A file under a temporary name. It is removed on drop, unless it was renamed.
#[derive(Debug)]
struct Unfinished {
    spot: Spot,
    name: String,
    replace: bool,
    /// Whether it was renamed.
    done: bool,
}

impl Putting {
    pub(super) fn begin(put: &Put, base: Option<&Rc<OwnedFd>>) -> Result<Self, FileFailure> {
        let spot = Spot::of_entry(&put.at, base)?;
        let mode = put.mode.map(|mode| mode & 0o7777);
        let owner = owner(put.owner.as_ref())?;
        if put.how == PutMode::Append {
            let file = extend(&spot, mode, owner)?;
            return Ok(Self {
                file,
                unfinished: None,
            });
        }
        let there = statat(&spot.dir, spot.name(), AtFlags::SYMLINK_NOFOLLOW).ok();
        let there =
            there.map(|stat| (FileType::from_raw_mode(stat.st_mode), stat.st_mode & 0o7777));
        let kept = match (there, put.how) {
            (Some(_), PutMode::Create) => return Err(FileFailure::Exists),
            (Some((FileType::Directory, _)), _) => return Err(FileFailure::NotAFile),
            (Some((FileType::RegularFile, mode)), _) => Some(mode),
            _ => None,
        };
        let (file, name) = create(&spot)?;
        let putting = Self {
            file,
            unfinished: Some(Unfinished {
                spot,
                name,
                replace: put.how == PutMode::Replace,
                done: false,
            }),
        };
        settle(&putting.file, mode.or(kept).or(Some(USUAL)), owner)?;
        Ok(putting)
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), FileFailure> {
        while !bytes.is_empty() {
            match write(&self.file, bytes) {
                Ok(0) => return Err(FileFailure::Full),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<(), FileFailure> {
        let Some(mut unfinished) = self.unfinished else {
            return Ok(());
        };
        let flags = match unfinished.replace {
            true => RenameFlags::empty(),
            false => RenameFlags::NOREPLACE,
        };
        let Unfinished { spot, name, .. } = &unfinished;
        renameat_with(&spot.dir, name.as_str(), &spot.dir, spot.name(), flags)?;
        unfinished.done = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.done {
            // The agent's rights suffice and are safe: the directory is open, and the name is
            // looked up only there.
            let _ = unlinkat(&self.spot.dir, self.name.as_str(), AtFlags::empty());
        }
    }
}

/// Makes a symbolic link, which atomically replaces what is there.
pub(super) fn link(
    spot: &Spot,
    target: &[u8],
    owner: Option<(Uid, Gid)>,
) -> Result<(), FileFailure> {
    let ((), name) = beside(|name| symlinkat(target, &spot.dir, name))?;
    let name = name.as_str();
    let named = match owner {
        Some((uid, gid)) => {
            let itself = AtFlags::SYMLINK_NOFOLLOW;
            chownat(&spot.dir, name, Some(uid), Some(gid), itself)
        }
        None => Ok(()),
    };
    let named = named.and_then(|()| renameat(&spot.dir, name, &spot.dir, spot.name()));
    if named.is_err() {
        let _ = unlinkat(&spot.dir, name, AtFlags::empty());
    }
    Ok(named?)
}

/// Opens a file for appending. An existing one keeps its owner and permissions: it may not be the
/// file that was meant.
fn extend(
    spot: &Spot,
    mode: Option<u32>,
    owner: Option<(Uid, Gid)>,
) -> Result<OwnedFd, FileFailure> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = match spot.open(flags) {
        Err(Errno::NOENT) => {
            let created = Mode::from_raw_mode(mode.unwrap_or(USUAL));
            match spot.open_with(flags | OFlags::CREATE | OFlags::EXCL, created) {
                Ok(file) => {
                    settle(&file, mode, owner)?;
                    return Ok(file);
                }
                // Another process made it first, or it is a dangling link.
                Err(Errno::EXIST) => spot.open(flags),
                Err(errno) => Err(errno),
            }
        }
        opened => opened,
    };
    let file = opened.map_err(|errno| match errno {
        // A pipe without a reader.
        Errno::NXIO => FileFailure::NotAFile,
        other => other.into(),
    })?;
    is_regular(&file)?;
    Ok(file)
}

/// Makes a new file in the directory of the one that it will become.
fn create(spot: &Spot) -> Result<(OwnedFd, String), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    beside(|name| openat(&spot.dir, name, flags, Mode::from_raw_mode(0o600)))
}

/// Calls `make` with names in turn until one is not taken.
fn beside<T>(make: impl Fn(&str) -> Result<T, Errno>) -> Result<(T, String), Errno> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let mut attempts = 0;
    loop {
        let name = format!(".hearth-put-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        match make(&name) {
            Ok(made) => return Ok((made, name)),
            Err(Errno::EXIST) if attempts < ATTEMPTS => attempts += 1,
            Err(errno) => return Err(errno),
        }
    }
}

/// Sets owner and permissions. The owner comes first: changing it clears set-user-id.
fn settle(file: &OwnedFd, mode: Option<u32>, owner: Option<(Uid, Gid)>) -> Result<(), Errno> {
    if let Some((uid, gid)) = owner {
        fchown(file, Some(uid), Some(gid))?;
    }
    match mode {
        Some(mode) => fchmod(file, Mode::from_raw_mode(mode)),
        None => Ok(()),
    }
}
