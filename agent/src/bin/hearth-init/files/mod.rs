//! The host's access to files of the guest: they are read, written, listed, made and removed.
//!
//! A request that may take long is a [`Task`] that does a bounded step in each turn of the loop, so
//! that pings are answered meanwhile. Paths are looked up with the [`Rights`] that the request
//! names; open files need none.

mod place;
mod put;
mod remove;

use alloc::{ffi::CString, rc::Rc, vec, vec::Vec};
use core::mem::MaybeUninit;

use hearth_agent::proto::{
    DirEntry, FileFailure, FileKind, FileReply, FileRequest, FrameError, MAX_CHUNK, Metadata,
    Place, Response,
};
use rustix::{
    fd::OwnedFd,
    fs::{
        FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Stat, Uid, fchmod, fchown,
        fstat, mkdirat, openat, readlinkat, renameat_with, seek,
    },
    io::{Errno, read},
};
use serde_bytes::ByteBuf;

pub(crate) use self::place::Base;
use self::{place::Spot, put::Putting, remove::Removing};
use crate::{
    account::{self, Unknown},
    channel::Output,
    guest::Guest,
    rights::Rights,
};

/// Bytes of directory entries that are read in one step.
const ENTRIES: usize = 4096;
/// Most components of a path of which one request makes the missing directories.
const MAX_PARENTS: usize = 256;

/// A request in progress.
#[derive(Debug)]
pub(crate) struct Task {
    kind: Kind,
    rights: Rights,
}

#[derive(Debug)]
enum Kind {
    Getting {
        file: OwnedFd,
        rest: u64,
    },
    Listing(OwnedFd),
    /// The target of a link, which is still to be sent.
    Told(CString),
    Removing(Removing),
    Putting(Putting),
    /// A file that could not be written: the rest of its content is discarded.
    Discarding,
}

/// Begins a request. Returns a task if the request is not finished with that.
pub(crate) fn begin(
    request: FileRequest,
    guest: &mut Guest,
    base: &mut Base,
    output: &mut Output,
) -> Result<Option<Task>, FrameError> {
    guest.prepare();
    // The host sends the content even if the request fails.
    let is_put = matches!(request, FileRequest::Put(_));
    let started = guest.rights(request.at().by.as_ref()).and_then(|rights| {
        let started = rights.with(|| {
            let base = base.of(request.at())?;
            start(request, base.as_ref())
        });
        Ok((started??, rights))
    });
    match started {
        Ok((Started::Done(reply), _)) => {
            output.push(&Response::File(reply))?;
            Ok(None)
        }
        Ok((Started::Task(kind), rights)) => Ok(Some(Task { kind, rights })),
        Err(failure) => {
            fail(failure, output)?;
            Ok(is_put.then(|| Task {
                kind: Kind::Discarding,
                rights: Rights::default(),
            }))
        }
    }
}

enum Started {
    Done(FileReply<'static>),
    Task(Kind),
}

fn start(request: FileRequest, base: Option<&Rc<OwnedFd>>) -> Result<Started, FileFailure> {
    let done = || Ok(Started::Done(FileReply::Done));
    Ok(Started::Task(match request {
        FileRequest::Stat { at, follow } => {
            let spot = Spot::find(&at, base)?;
            let links = match follow {
                true => OFlags::empty(),
                false => OFlags::NOFOLLOW,
            };
            let stat = fstat(spot.open(OFlags::PATH | links)?)?;
            return Ok(Started::Done(FileReply::Stat(metadata(&stat))));
        }
        FileRequest::List { at } => {
            Kind::Listing(Spot::find(&at, base)?.open(OFlags::RDONLY | OFlags::DIRECTORY)?)
        }
        FileRequest::Get { at, offset, most } => {
            // Without NONBLOCK, opening would wait for a writer of a pipe, or for the holder of a
            // lease on a file.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
            let file = Spot::find(&at, base)?.open(flags)?;
            is_regular(&file)?;
            if offset > 0 {
                seek(&file, SeekFrom::Start(offset))?;
            }
            Kind::Getting { file, rest: most }
        }
        FileRequest::Put(put) => Kind::Putting(Putting::begin(&put, base)?),
        FileRequest::MakeDir {
            at,
            mode,
            parents,
            owner,
        } => {
            let mode = Mode::from_raw_mode(mode & 0o7777);
            let owner = account::owner(owner.as_ref())?;
            if parents {
                make_parents(&at, base, mode, owner)?;
                return done();
            }
            let spot = Spot::of_entry(&at, base)?;
            make_dir(&spot, mode, owner)?;
            return done();
        }
        FileRequest::Remove { at, recursive } => {
            let spot = Spot::of_entry(&at, base)?;
            match Removing::begin(spot, recursive)? {
                Some(removing) => Kind::Removing(removing),
                None => return done(),
            }
        }
        FileRequest::Rename { at, to, replace } => {
            let from = Spot::of_entry(&at, base)?;
            let to = Spot::of_entry(&Place { path: to, ..at }, base)?;
            let flags = match replace {
                true => RenameFlags::empty(),
                false => RenameFlags::NOREPLACE,
            };
            renameat_with(&from.dir, from.name(), &to.dir, to.name(), flags)?;
            return done();
        }
        FileRequest::MakeLink { at, target, owner } => {
            let owner = account::owner(owner.as_ref())?;
            put::link(&Spot::of_entry(&at, base)?, &target, owner)?;
            return done();
        }
        FileRequest::ReadLink { at } => {
            let spot = Spot::of_entry(&at, base)?;
            let target = readlinkat(&spot.dir, spot.name(), Vec::new());
            Kind::Told(target.map_err(|errno| match errno {
                Errno::INVAL => FileFailure::NotALink,
                other => other.into(),
            })?)
        }
    }))
}

/// Makes a directory. Its permissions are those asked for, regardless of the umask.
fn make_dir(spot: &Spot, mode: Mode, owner: Option<(Uid, Gid)>) -> Result<(), Errno> {
    mkdirat(&spot.dir, spot.name(), mode)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = openat(&spot.dir, spot.name(), flags, Mode::empty())?;
    if let Some((uid, gid)) = owner {
        fchown(&dir, Some(uid), Some(gid))?;
    }
    fchmod(dir, mode)
}

fn make_parents(
    at: &Place,
    base: Option<&Rc<OwnedFd>>,
    mode: Mode,
    owner: Option<(Uid, Gid)>,
) -> Result<(), FileFailure> {
    let path = at.path.as_slice();
    let ends = path
        .iter()
        .enumerate()
        .filter_map(|(index, &byte)| (byte == b'/' && index > 0).then_some(index));
    let mut last = Ok(());
    for (made, end) in ends.chain([path.len()]).enumerate() {
        if made >= MAX_PARENTS {
            return Err(FileFailure::TooDeep);
        }
        let part = Place {
            path: ByteBuf::from(path.get(..end).unwrap_or_default()),
            beneath: None,
            by: at.by.clone(),
        };
        last = match Spot::of_entry(&part, base) {
            // `a/./b` and the like.
            Err(FileFailure::BadPath) => continue,
            Err(failure) => return Err(failure),
            Ok(spot) => match make_dir(&spot, mode, owner) {
                Err(Errno::EXIST) => {
                    // A link to a directory counts as one.
                    spot.open(OFlags::PATH | OFlags::DIRECTORY).map(drop)
                }
                other => other,
            },
        };
    }
    Ok(last?)
}

impl Task {
    /// Whether the task makes progress without further requests.
    pub(crate) fn is_active(&self) -> bool {
        !matches!(self.kind, Kind::Putting(_) | Kind::Discarding)
    }

    /// Does a bounded part of the remaining work; returns true once it is done.
    pub(crate) fn step(
        &mut self,
        scratch: &mut Vec<u8>,
        output: &mut Output,
    ) -> Result<bool, FrameError> {
        let stepped = match &mut self.kind {
            Kind::Getting { file, rest } => get(file, rest, scratch, output),
            Kind::Listing(dir) => list(dir, output),
            Kind::Told(target) => output
                .push(&Response::File(FileReply::Data(target.to_bytes())))
                .map(|()| true)
                .map_err(Stop::Frame),
            Kind::Removing(removing) => {
                let stepped = self.rights.with(|| removing.step());
                let stepped = stepped.map_err(FileFailure::from).and_then(|it| it);
                stepped.map_err(Stop::from)
            }
            Kind::Putting(_) | Kind::Discarding => return Ok(false),
        };
        match stepped {
            Ok(false) => return Ok(false),
            Ok(true) => output.push(&Response::File(FileReply::Done))?,
            Err(Stop::Failed(failure)) => fail(failure, output)?,
            Err(Stop::Frame(error)) => return Err(error),
        }
        Ok(true)
    }

    /// Takes content. Returns `None` if there is no file to put it in.
    pub(crate) fn data(
        &mut self,
        bytes: &[u8],
        output: &mut Output,
    ) -> Option<Result<(), FrameError>> {
        match &mut self.kind {
            Kind::Putting(putting) => {
                if let Err(failure) = putting.write(bytes) {
                    self.kind = Kind::Discarding;
                    return Some(fail(failure, output));
                }
                Some(Ok(()))
            }
            Kind::Discarding => Some(Ok(())),
            _ => None,
        }
    }

    /// Finishes the file: its content is complete. Returns `None` if the task is not a put.
    pub(crate) fn end(self, output: &mut Output) -> Option<Result<(), FrameError>> {
        match self.kind {
            Kind::Putting(putting) => {
                let finished = self.rights.with(|| putting.finish());
                let finished = finished.map_err(FileFailure::from).and_then(|it| it);
                Some(match finished {
                    Ok(()) => output.push(&Response::File(FileReply::Done)),
                    Err(failure) => fail(failure, output),
                })
            }
            Kind::Discarding => Some(Ok(())),
            _ => None,
        }
    }
}

impl From<Unknown> for FileFailure {
    fn from(_: Unknown) -> Self {
        Self::NoUser
    }
}

/// The error of a step.
enum Stop {
    Failed(FileFailure),
    Frame(FrameError),
}

impl From<FileFailure> for Stop {
    fn from(failure: FileFailure) -> Self {
        Self::Failed(failure)
    }
}

impl From<FrameError> for Stop {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

fn get(
    file: &OwnedFd,
    rest: &mut u64,
    scratch: &mut Vec<u8>,
    output: &mut Output,
) -> Result<bool, Stop> {
    if scratch.len() < MAX_CHUNK {
        scratch.resize(MAX_CHUNK, 0);
    }
    let wanted = usize::try_from(*rest).unwrap_or(usize::MAX).min(MAX_CHUNK);
    let room = scratch.get_mut(..wanted).unwrap_or_default();
    if room.is_empty() {
        return Ok(true);
    }
    let count = match read(file, &mut *room) {
        Ok(count) => count,
        Err(Errno::INTR) => return Ok(false),
        Err(errno) => return Err(FileFailure::from(errno).into()),
    };
    if count == 0 {
        return Ok(true);
    }
    let bytes = room.get(..count).unwrap_or_default();
    output.push(&Response::File(FileReply::Data(bytes)))?;
    *rest = rest.saturating_sub(count as u64);
    Ok(false)
}

fn list(dir: &OwnedFd, output: &mut Output) -> Result<bool, Stop> {
    let entries = entries(dir)?;
    if entries.is_empty() {
        return Ok(true);
    }
    output.push(&Response::File(FileReply::Entries(entries)))?;
    Ok(false)
}

/// Returns the next few entries of a directory; none at its end.
fn entries(dir: &OwnedFd) -> Result<Vec<DirEntry>, FileFailure> {
    let mut buffer = vec![MaybeUninit::uninit(); ENTRIES];
    let mut raw = RawDir::new(dir, &mut buffer);
    let mut found = Vec::new();
    while let Some(entry) = raw.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            found.push(DirEntry {
                name: ByteBuf::from(name),
                kind: kind(entry.file_type()),
            });
        }
        if raw.is_buffer_empty() && !found.is_empty() {
            break;
        }
    }
    Ok(found)
}

fn is_regular(file: &OwnedFd) -> Result<(), FileFailure> {
    match FileType::from_raw_mode(fstat(file)?.st_mode) {
        FileType::RegularFile => Ok(()),
        _ => Err(FileFailure::NotAFile),
    }
}

fn kind(file_type: FileType) -> FileKind {
    match file_type {
        FileType::RegularFile => FileKind::File,
        FileType::Directory => FileKind::Dir,
        FileType::Symlink => FileKind::Link,
        _ => FileKind::Other,
    }
}

fn metadata(stat: &Stat) -> Metadata {
    Metadata {
        kind: kind(FileType::from_raw_mode(stat.st_mode)),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_s: stat.st_mtime,
        modified_ns: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
    }
}

fn fail(failure: FileFailure, output: &mut Output) -> Result<(), FrameError> {
    output.push(&Response::File(FileReply::Failed(failure)))
}
