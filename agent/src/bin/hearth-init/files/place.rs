//! Where a path leads.

use alloc::vec::Vec;

use hearth_agent::proto::{FileFailure, Place};
use rustix::{
    fd::OwnedFd,
    fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2},
    io::Errno,
};

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// Links that belong to a process lead anywhere.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// A name in a directory that was found.
#[derive(Debug)]
pub(super) struct Spot {
    pub(super) dir: OwnedFd,
    name: Vec<u8>,
    /// The directory that links may not lead out of, and the way from there.
    beneath: Option<(OwnedFd, Vec<u8>)>,
}

impl Spot {
    /// Where a path leads; `/`, `.` and `..` are places, too.
    pub(super) fn find(place: &Place) -> Result<Self, FileFailure> {
        let path = place.path.as_slice();
        if path.is_empty() || path.contains(&0) {
            return Err(FileFailure::BadPath);
        }
        let (parent, name) = split(path);
        let name = if name.is_empty() {
            b".".as_slice()
        } else {
            name
        };
        let Some(base) = &place.beneath else {
            let parent: &[u8] = if parent.is_empty() { b"/" } else { parent };
            // Relative ones begin at the root, whatever the agent's directory is.
            let root = open("/", DIRECTORY, Mode::empty())?;
            let dir = openat2(
                &root,
                parent,
                DIRECTORY,
                Mode::empty(),
                ResolveFlags::empty(),
            )?;
            return Ok(Self {
                dir,
                name: name.to_vec(),
                beneath: None,
            });
        };
        let base = openat2(
            CWD,
            base.as_slice(),
            DIRECTORY,
            Mode::empty(),
            ResolveFlags::empty(),
        )?;
        let parent: &[u8] = if parent.is_empty() { b"." } else { parent };
        let dir = openat2(&base, parent, DIRECTORY, Mode::empty(), BENEATH)?;
        Ok(Self {
            dir,
            name: name.to_vec(),
            beneath: Some((base, path.to_vec())),
        })
    }

    /// As [`find`](Self::find), for what changes the directory: the path must name an entry of it.
    pub(super) fn of_entry(place: &Place) -> Result<Self, FileFailure> {
        match split(&place.path).1 {
            b"" | b"." | b".." => Err(FileFailure::BadPath),
            _ => Self::find(place),
        }
    }

    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// Opens what is there, through links.
    pub(super) fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.open_with(flags, Mode::empty())
    }

    pub(super) fn open_with(&self, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        match &self.beneath {
            Some((base, path)) => openat2(base, path.as_slice(), flags, mode, BENEATH),
            None => openat2(&self.dir, self.name(), flags, mode, ResolveFlags::empty()),
        }
    }
}

/// A path's last name, and what is before it. Slashes at the end count for nothing.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path
        .iter()
        .rposition(|&byte| byte != b'/')
        .map_or(0, |last| last + 1);
    let path = path.get(..end).unwrap_or_default();
    let start = path
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |slash| slash + 1);
    path.split_at_checked(start).unwrap_or_default()
}
