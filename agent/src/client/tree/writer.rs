//! Writing a tree into the guest.

use std::{
    collections::{HashSet, VecDeque},
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
};

use serde_bytes::ByteBuf;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::{Node, TreeCount, TreeEntry, TreeError};
use crate::{
    client::{
        AgentClient,
        error::FileError,
        files::{Reply, bytes},
        unexpected,
    },
    proto::{Account, FileRequest, MAX_CHUNK, Place, Put, Request},
};

/// Most unanswered requests between entries: enough to keep the guest busy, few enough for their
/// answers to fit in its buffer.
const WINDOW: usize = 32;

/// Writes a tree into a directory of the guest, entry by entry. It does not wait for each answer: a
/// failure is reported by a later call, at the latest by [`finish`](Self::finish). Drop the client
/// after an error, and if this is dropped before [`finish`](Self::finish).
#[derive(Debug)]
pub struct TreeWriter<'a, S> {
    client: &'a mut AgentClient<S>,
    dir: PathBuf,
    by: Option<Account>,
    owner: Option<Account>,
    /// Directories that were requested.
    made: HashSet<PathBuf>,
    /// The paths of unanswered requests.
    unanswered: VecDeque<ByteBuf>,
    count: TreeCount,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin + Send> TreeWriter<'a, S> {
    /// Begins with the directory, which is made if it does not exist. Everything is made with the
    /// rights of `account`, or root's if there is none, and belongs to it.
    ///
    /// # Errors
    /// [`FileError::PathTooLong`], as a [`TreeError`].
    pub fn begin(
        client: &'a mut AgentClient<S>,
        dir: PathBuf,
        account: Option<Account>,
    ) -> Result<Self, TreeError> {
        Self::begin_with(client, dir, account, None)
    }

    /// As [`begin`](Self::begin), but everything is made with root's rights, whatever the place,
    /// and given to `owner` when it is made. Not for places that untrusted programs can write to:
    /// see [`Place::by`].
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub fn begin_giving(
        client: &'a mut AgentClient<S>,
        dir: PathBuf,
        owner: Account,
    ) -> Result<Self, TreeError> {
        Self::begin_with(client, dir, None, Some(owner))
    }

    fn begin_with(
        client: &'a mut AgentClient<S>,
        dir: PathBuf,
        by: Option<Account>,
        owner: Option<Account>,
    ) -> Result<Self, TreeError> {
        let mut writer = Self {
            client,
            by,
            owner,
            made: HashSet::new(),
            unanswered: VecDeque::new(),
            count: TreeCount::default(),
            dir,
        };
        let at = Place {
            by: writer.by.clone(),
            ..Place::new(&writer.dir)
        };
        writer.make_dir(at, 0o755)?;
        Ok(writer)
    }

    /// Adds an entry; missing parent directories are made. `content` is read for a regular file,
    /// and must have the entry's size.
    ///
    /// # Errors
    /// [`TreeError`], perhaps of an earlier entry.
    pub async fn add(
        &mut self,
        entry: &TreeEntry,
        content: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), TreeError> {
        let mut names = entry.path.components();
        if entry.path.as_os_str().is_empty()
            || entry.path.as_os_str().as_bytes().contains(&0)
            || !names.all(|name| matches!(name, Component::Normal(_)))
        {
            return Err(TreeError::BadPath(entry.path.clone()));
        }
        let at = self.place(&entry.path);
        match &entry.node {
            Node::Dir => {
                self.made.insert(entry.path.clone());
                self.make_dir(at, entry.mode)?;
            }
            Node::Link { target } => {
                self.make_parent(&entry.path)?;
                let request = FileRequest::MakeLink {
                    at,
                    target: bytes(target),
                    owner: self.owner.clone(),
                };
                self.ask(request, bytes(&entry.path))?;
            }
            Node::File { size } => {
                self.make_parent(&entry.path)?;
                let put = Put {
                    owner: self.owner.clone(),
                    ..Put::new(at).mode(entry.mode)
                };
                self.ask(FileRequest::Put(put), bytes(&entry.path))?;
                self.copy(&entry.path, *size, content).await?;
            }
        }
        self.count.entries += 1;
        self.settle(WINDOW).await
    }

    /// Waits for all answers.
    ///
    /// # Errors
    /// [`TreeError`].
    pub async fn finish(mut self) -> Result<TreeCount, TreeError> {
        self.settle(0).await?;
        Ok(self.count)
    }

    fn place(&self, path: &Path) -> Place {
        Place {
            by: self.by.clone(),
            ..Place::beneath(&self.dir, path)
        }
    }

    fn make_dir(&mut self, at: Place, mode: u32) -> Result<(), TreeError> {
        let path = at.path.clone();
        let request = FileRequest::MakeDir {
            at,
            mode,
            parents: true,
            owner: self.owner.clone(),
        };
        self.ask(request, path)
    }

    /// Makes the entry's parent directory once: an archive need not contain the directories of its
    /// files.
    fn make_parent(&mut self, path: &Path) -> Result<(), TreeError> {
        let Some(parent) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) else {
            return Ok(());
        };
        match self.made.insert(parent.to_owned()) {
            true => self.make_dir(self.place(parent), 0o755),
            false => Ok(()),
        }
    }

    fn ask(&mut self, request: FileRequest, path: ByteBuf) -> Result<(), TreeError> {
        self.client.ask(request, &path)?;
        self.unanswered.push_back(path);
        Ok(())
    }

    /// Sends a file's content, and takes the answers to earlier requests that arrive meanwhile.
    async fn copy(
        &mut self,
        path: &Path,
        size: u64,
        content: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), TreeError> {
        let mut content = content.take(size);
        let mut chunk = vec![0; MAX_CHUNK];
        let mut copied = 0;
        loop {
            let count = content.read(&mut chunk).await.map_err(TreeError::host)?;
            if count == 0 {
                break;
            }
            copied += count as u64;
            let bytes = chunk.get(..count).unwrap_or_default();
            let queued = self.client.connection.queue(&Request::FileData(bytes));
            queued.map_err(FileError::from)?;
            self.client.connection.flush().await?;
            while self.client.has_reply().await? {
                self.answer().await?;
            }
        }
        if copied < size {
            return Err(TreeError::Changed(path.to_owned()));
        }
        self.count.bytes = self.count.bytes.saturating_add(copied);
        let queued = self.client.connection.queue(&Request::FileEnd);
        Ok(queued.map_err(FileError::from)?)
    }

    /// Takes answers until at most `missing` requests are unanswered.
    async fn settle(&mut self, missing: usize) -> Result<(), TreeError> {
        while self.unanswered.len() > missing {
            self.answer().await?;
        }
        Ok(())
    }

    async fn answer(&mut self) -> Result<(), TreeError> {
        let Some(path) = self.unanswered.pop_front() else {
            return Err(unexpected().into());
        };
        match self.client.reply(&path).await? {
            Reply::Done => Ok(()),
            _ => Err(unexpected().into()),
        }
    }
}
