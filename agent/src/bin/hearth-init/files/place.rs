//! Looks up paths.

use alloc::{rc::Rc, vec::Vec};

use hearth_agent::proto::{Account, FileFailure, Place};
use rustix::{
    fd::OwnedFd,
    fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2},
    io::Errno,
};

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// Links of `/proc/<pid>` (magic links) lead anywhere, so they are not followed.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// The directory that a connection's requests must stay beneath, kept while consecutive requests
/// name the same one. It is looked up only once: by the next request, a program of the guest may
/// have put something else at its path.
#[derive(Debug, Default)]
pub(crate) struct Base(Option<(Vec<u8>, Option<Account>, Rc<OwnedFd>)>);

impl Base {
    /// Forgets the directory, as the next request is not about files.
    pub(crate) fn forget(&mut self) {
        self.0 = None;
    }

    /// Returns the directory that a place is to stay beneath, if any.
    pub(super) fn of(&mut self, place: &Place) -> Result<Option<Rc<OwnedFd>>, FileFailure> {
        let known = self.0.take();
        let Some(path) = &place.beneath else {
            return Ok(None);
        };
        let known = known.filter(|(known, by, _)| *known == path.as_slice() && *by == place.by);
        let dir = match known {
            Some((.., dir)) => dir,
            None => {
                let links = links(place, ResolveFlags::empty());
                Rc::new(openat2(
                    CWD,
                    path.as_slice(),
                    DIRECTORY,
                    Mode::empty(),
                    links,
                )?)
            }
        };
        self.0 = Some((path.to_vec(), place.by.clone(), Rc::clone(&dir)));
        Ok(Some(dir))
    }
}

/// Returns the restrictions of a lookup. A request for a user does not follow magic links: they
/// would be resolved as the agent's.
fn links(place: &Place, flags: ResolveFlags) -> ResolveFlags {
    match place.by {
        Some(_) => flags | ResolveFlags::NO_MAGICLINKS,
        None => flags,
    }
}

/// A name in an open directory.
#[derive(Debug)]
pub(super) struct Spot {
    pub(super) dir: OwnedFd,
    name: Vec<u8>,
    /// The directory that links may not lead out of, and the path from there.
    beneath: Option<(Rc<OwnedFd>, Vec<u8>)>,
    /// The restrictions of the lookup.
    links: ResolveFlags,
}

impl Spot {
    /// Looks up the parent of a path, from `base` if the path must stay beneath it. `/`, `.` and
    /// `..` are allowed.
    pub(super) fn find(place: &Place, base: Option<&Rc<OwnedFd>>) -> Result<Self, FileFailure> {
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
        let Some(base) = base else {
            let links = links(place, ResolveFlags::empty());
            let parent: &[u8] = if parent.is_empty() { b"/" } else { parent };
            // Relative paths begin at the root, regardless of the agent's working directory.
            let root = open("/", DIRECTORY, Mode::empty())?;
            return Ok(Self {
                dir: openat2(&root, parent, DIRECTORY, Mode::empty(), links)?,
                name: name.to_vec(),
                beneath: None,
                links,
            });
        };
        let parent: &[u8] = if parent.is_empty() { b"." } else { parent };
        Ok(Self {
            dir: openat2(&**base, parent, DIRECTORY, Mode::empty(), BENEATH)?,
            name: name.to_vec(),
            beneath: Some((Rc::clone(base), path.to_vec())),
            links: BENEATH,
        })
    }

    /// As [`find`](Self::find), for requests that change the directory: the path must name an entry
    /// of it.
    pub(super) fn of_entry(place: &Place, base: Option<&Rc<OwnedFd>>) -> Result<Self, FileFailure> {
        match split(&place.path).1 {
            b"" | b"." | b".." => Err(FileFailure::BadPath),
            _ => Self::find(place, base),
        }
    }

    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// Opens the file, and follows links.
    pub(super) fn open(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.open_with(flags, Mode::empty())
    }

    pub(super) fn open_with(&self, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC;
        match &self.beneath {
            Some((base, path)) => openat2(&**base, path.as_slice(), flags, mode, self.links),
            None => openat2(&self.dir, self.name(), flags, mode, self.links),
        }
    }
}

/// Splits a path before its last name. Slashes at the end are ignored.
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
