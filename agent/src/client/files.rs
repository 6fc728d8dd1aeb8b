//! The client's operations on files of the guest.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use serde_bytes::ByteBuf;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    AgentClient,
    error::{ConnectionError, FileError},
    unexpected,
};
use crate::proto::{
    Account, DirEntry, FileReply, FileRequest, FrameError, MAX_CHUNK, Metadata, Place, Put,
    PutMode, Request, Response, User,
};

/// Most entries of one directory that a listing returns: the guest may send any number.
pub const MAX_ENTRIES: usize = 100_000;

/// Longest name that a directory of Linux can have (NAME_MAX), in bytes. A listing therefore holds
/// at most 25.5 MB of names.
const LONGEST_NAME: usize = 255;

impl Place {
    /// Returns a place for a path in the guest; a relative path starts at `/`.
    #[must_use]
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: bytes(path.as_ref()),
            beneath: None,
            by: None,
        }
    }

    /// Returns a place for a relative path that may not lead out of the directory `beneath`,
    /// neither by `..` nor through a link.
    #[must_use]
    pub fn beneath(beneath: impl AsRef<Path>, path: impl AsRef<Path>) -> Self {
        Self {
            path: bytes(path.as_ref()),
            beneath: Some(bytes(beneath.as_ref())),
            by: None,
        }
    }

    /// Sets the account whose rights are used to follow the path and carry out the request. Links
    /// and the like that programs of that user left in the path then lead to nothing that these
    /// programs could not reach themselves. Files that are made belong to that user. Without this,
    /// the agent's rights are used, which are root's: do not do that in places that untrusted
    /// programs can write to.
    #[must_use]
    pub fn by(mut self, account: Account) -> Self {
        self.by = Some(account);
        self
    }
}

impl<P: AsRef<Path>> From<P> for Place {
    fn from(path: P) -> Self {
        Self::new(path)
    }
}

impl Put {
    /// Returns a request to write a file, which replaces an existing one once it is complete.
    #[must_use]
    pub fn new(at: impl Into<Place>) -> Self {
        Self {
            at: at.into(),
            ..Self::default()
        }
    }

    /// Sets how an existing file is treated.
    #[must_use]
    pub fn how(mut self, how: PutMode) -> Self {
        self.how = how;
        self
    }

    /// Sets the permissions (07777).
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = Some(mode);
        self
    }

    /// Sets the user and group that write the file: see [`account`](Self::account).
    #[must_use]
    pub fn owner(self, uid: u32, gid: u32) -> Self {
        self.account(Some(Account::Ids(User {
            uid,
            gid,
            groups: Vec::new(),
        })))
    }

    /// Sets the account that writes the file: its rights are used, and a newly made file belongs to
    /// it; none: root. As [`Place::by`].
    #[must_use]
    pub fn account(mut self, account: Option<Account>) -> Self {
        self.at.by = account;
        self
    }

    /// Sets the owner of a newly made file, who may not be able to write there. Do not use it in
    /// places that untrusted programs can write to: see [`Place::by`].
    #[must_use]
    pub fn given_to(mut self, owner: Account) -> Self {
        self.owner = Some(owner);
        self
    }
}

impl DirEntry {
    /// Returns the entry's name.
    #[must_use]
    pub fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }
}

pub(super) fn bytes(path: &Path) -> ByteBuf {
    ByteBuf::from(path.as_os_str().as_bytes())
}

/// A successful reply about files, as owned data.
pub(super) enum Reply {
    Stat(Metadata),
    Entries(Vec<DirEntry>),
    Data(Vec<u8>),
    Done,
}

/// Files. A future that is dropped half-way leaves answers on the connection that a later request
/// would take for its own: drop the client, too. The file of a put that did not complete is then
/// not there and nothing of it remains, except for content that was appended ([`PutMode::Append`]).
impl<S: AsyncRead + AsyncWrite + Unpin + Send> AgentClient<S> {
    /// Returns the metadata of the file at `at`; a symbolic link there is followed if `follow`.
    ///
    /// # Errors
    /// [`FileError::Failed`] with the reason; [`FileError::Connection`].
    pub async fn stat(
        &mut self,
        at: impl Into<Place>,
        follow: bool,
    ) -> Result<Metadata, FileError> {
        let at = at.into();
        let path = at.path.clone();
        self.ask(FileRequest::Stat { at, follow }, &path)?;
        match self.reply(&path).await? {
            Reply::Stat(metadata) => Ok(metadata),
            _ => Err(unexpected().into()),
        }
    }

    /// Returns the entries of a directory, in no order.
    ///
    /// # Errors
    /// [`FileError::TooMany`] beyond [`MAX_ENTRIES`]; otherwise as [`stat`](Self::stat).
    pub async fn list(&mut self, at: impl Into<Place>) -> Result<Vec<DirEntry>, FileError> {
        let at = at.into();
        let path = at.path.clone();
        self.ask(FileRequest::List { at }, &path)?;
        let mut all = Vec::new();
        loop {
            match self.reply(&path).await? {
                Reply::Entries(some)
                    if some.iter().any(|entry| entry.name.len() > LONGEST_NAME) =>
                {
                    return Err(ConnectionError::Protocol("no name of a file").into());
                }
                Reply::Entries(some) if all.len() + some.len() <= MAX_ENTRIES => all.extend(some),
                Reply::Entries(_) => return Err(FileError::TooMany),
                Reply::Done => return Ok(all),
                _ => return Err(unexpected().into()),
            }
        }
    }

    /// Returns the content of a regular file of at most `most` bytes.
    ///
    /// # Errors
    /// [`FileError::TooLarge`] if it has more; otherwise as [`stat`](Self::stat).
    pub async fn get(&mut self, at: impl Into<Place>, most: usize) -> Result<Vec<u8>, FileError> {
        let mut content = Vec::new();
        // Asking for one byte more detects a larger file.
        let ask = (most as u64).saturating_add(1);
        let got = self.get_into(at, 0..ask, &mut content).await?;
        match got > most as u64 {
            true => Err(FileError::TooLarge { most }),
            false => Ok(content),
        }
    }

    /// Copies a part of a regular file, `0..u64::MAX` for all of it, to `writer`, and returns the
    /// number of bytes. The guest is read no faster than `writer` accepts the data.
    ///
    /// # Errors
    /// [`FileError::Host`] if `writer` fails: drop the client then; otherwise as
    /// [`stat`](Self::stat).
    pub async fn get_into(
        &mut self,
        at: impl Into<Place>,
        part: std::ops::Range<u64>,
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> Result<u64, FileError> {
        let at = at.into();
        let path = at.path.clone();
        let (offset, most) = (part.start, part.end.saturating_sub(part.start));
        self.ask(FileRequest::Get { at, offset, most }, &path)?;
        let mut copied: u64 = 0;
        loop {
            match self.reply(&path).await? {
                Reply::Data(bytes) => {
                    copied = copied.saturating_add(bytes.len() as u64);
                    // A guest that sends more than requested must not fill the host's storage.
                    if copied > most {
                        return Err(unexpected().into());
                    }
                    writer.write_all(&bytes).await.map_err(FileError::host)?;
                }
                Reply::Done => {
                    writer.flush().await.map_err(FileError::host)?;
                    return Ok(copied);
                }
                _ => return Err(unexpected().into()),
            }
        }
    }

    /// Writes a file.
    ///
    /// # Errors
    /// As [`stat`](Self::stat).
    pub async fn put(&mut self, put: Put, content: &[u8]) -> Result<(), FileError> {
        self.put_from(put, &mut &*content).await.map(drop)
    }

    /// Writes a file with all that `reader` provides, and returns the number of bytes.
    ///
    /// # Errors
    /// [`FileError::Host`] if `reader` fails: drop the client then; the file is not written, except
    /// for content that was appended. Otherwise as [`stat`](Self::stat).
    pub async fn put_from(
        &mut self,
        put: Put,
        reader: &mut (impl AsyncRead + Unpin),
    ) -> Result<u64, FileError> {
        let path = put.at.path.clone();
        self.ask(FileRequest::Put(put), &path)?;
        let mut chunk = vec![0; MAX_CHUNK];
        let mut copied: u64 = 0;
        loop {
            let count = reader.read(&mut chunk).await.map_err(FileError::host)?;
            if count == 0 {
                break;
            }
            let bytes = chunk.get(..count).unwrap_or_default();
            self.connection.queue(&Request::FileData(bytes))?;
            copied = copied.saturating_add(count as u64);
            self.connection.flush().await?;
            if self.has_failed().await? {
                break;
            }
        }
        self.connection.queue(&Request::FileEnd)?;
        match self.reply(&path).await? {
            Reply::Done => Ok(copied),
            _ => Err(unexpected().into()),
        }
    }

    /// Makes a directory. With `parents`, missing parent directories are made, too, and a directory
    /// that exists is no error.
    ///
    /// # Errors
    /// As [`stat`](Self::stat).
    pub async fn make_dir(
        &mut self,
        at: impl Into<Place>,
        mode: u32,
        parents: bool,
    ) -> Result<(), FileError> {
        let at = at.into();
        let path = at.path.clone();
        let owner = None;
        let request = FileRequest::MakeDir {
            at,
            mode,
            parents,
            owner,
        };
        self.ask(request, &path)?;
        self.done(&path).await
    }

    /// Makes a symbolic link; an existing file is replaced, unless it is a directory.
    ///
    /// # Errors
    /// As [`stat`](Self::stat).
    pub async fn make_link(
        &mut self,
        at: impl Into<Place>,
        target: impl AsRef<Path>,
    ) -> Result<(), FileError> {
        let at = at.into();
        let path = at.path.clone();
        let request = FileRequest::MakeLink {
            at,
            target: bytes(target.as_ref()),
            owner: None,
        };
        self.ask(request, &path)?;
        self.done(&path).await
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// As [`stat`](Self::stat).
    pub async fn read_link(&mut self, at: impl Into<Place>) -> Result<PathBuf, FileError> {
        let at = at.into();
        let path = at.path.clone();
        self.ask(FileRequest::ReadLink { at }, &path)?;
        let Reply::Data(target) = self.reply(&path).await? else {
            return Err(unexpected().into());
        };
        self.done(&path).await?;
        Ok(OsString::from_vec(target).into())
    }

    /// Removes a file, a link or a directory, which must be empty unless `recursive`.
    ///
    /// # Errors
    /// As [`stat`](Self::stat). A part of a directory may be removed then.
    pub async fn remove(&mut self, at: impl Into<Place>, recursive: bool) -> Result<(), FileError> {
        let at = at.into();
        let path = at.path.clone();
        self.ask(FileRequest::Remove { at, recursive }, &path)?;
        self.done(&path).await
    }

    /// Moves a file or directory within one file system; an existing file at `to` is replaced only
    /// if `replace`.
    ///
    /// # Errors
    /// As [`stat`](Self::stat).
    pub async fn rename(
        &mut self,
        at: impl Into<Place>,
        to: impl AsRef<Path>,
        replace: bool,
    ) -> Result<(), FileError> {
        let at = at.into();
        let path = at.path.clone();
        let to = bytes(to.as_ref());
        self.ask(FileRequest::Rename { at, to, replace }, &path)?;
        self.done(&path).await
    }

    pub(super) fn ask(&mut self, request: FileRequest, path: &[u8]) -> Result<(), FileError> {
        let queued = self.connection.queue(&Request::File(Box::new(request)));
        queued.map_err(|error| match error {
            FrameError::TooLong(_) => FileError::PathTooLong { bytes: path.len() },
            other => other.into(),
        })
    }

    async fn done(&mut self, path: &[u8]) -> Result<(), FileError> {
        match self.reply(path).await? {
            Reply::Done => Ok(()),
            _ => Err(unexpected().into()),
        }
    }

    /// Waits for the next reply; [`FileReply::Failed`] becomes an error.
    pub(super) async fn reply(&mut self, path: &[u8]) -> Result<Reply, FileError> {
        let reply = self.answer(|response| match response {
            Response::File(reply) => Some(match reply {
                FileReply::Stat(metadata) => Ok(Reply::Stat(*metadata)),
                FileReply::Entries(entries) => Ok(Reply::Entries(entries.clone())),
                FileReply::Data(bytes) => Ok(Reply::Data(bytes.to_vec())),
                FileReply::Done => Ok(Reply::Done),
                FileReply::Failed(failure) => Err(*failure),
            }),
            _ => None,
        });
        reply.await?.map_err(|failure| FileError::Failed {
            path: String::from_utf8_lossy(path).into_owned(),
            failure,
        })
    }

    /// Returns whether a reply about files is available now.
    pub(super) async fn has_reply(&mut self) -> Result<bool, ConnectionError> {
        if self.connection.peek()?.is_none() {
            self.connection.fill_now().await?;
        }
        let next = self.connection.peek()?;
        Ok(matches!(next, Some(Response::File(_))))
    }

    /// Returns whether a failure was reported. Before the end of the content, a failure is the only
    /// valid reply.
    async fn has_failed(&mut self) -> Result<bool, ConnectionError> {
        if !self.has_reply().await? {
            return Ok(false);
        }
        match self.connection.peek()? {
            Some(Response::File(FileReply::Failed(_))) => Ok(true),
            Some(Response::File(_)) => Err(unexpected()),
            _ => Ok(false),
        }
    }
}
