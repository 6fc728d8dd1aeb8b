//! A tree on its way out of the guest.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{Node, TreeCount, TreeEntry, TreeError, TreeLimits};
use crate::{
    client::{AgentClient, error::ConnectionError, error::FileError},
    proto::{FileKind, Place},
};

/// Longest path, as Linux has it.
const LONGEST: usize = 4095;

/// Reads a tree in the guest, entry by entry, directories before what is in them, each in the order of names. Links are not followed.
/// The guest may change the tree meanwhile, and may say what it likes: names are checked to be names.
#[derive(Debug)]
pub struct TreeReader<'a, S> {
    client: &'a mut AgentClient<S>,
    dir: PathBuf,
    limits: TreeLimits,
    count: TreeCount,
    /// Directories from the top down, each with the names that are still to come, last first.
    open: Vec<Vec<PathBuf>>,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin + Send> TreeReader<'a, S> {
    /// Begins with a directory of the guest, which is no entry itself.
    ///
    /// # Errors
    /// [`TreeError`], if there is no such directory, for example.
    pub async fn begin(
        client: &'a mut AgentClient<S>,
        dir: PathBuf,
        limits: TreeLimits,
    ) -> Result<Self, TreeError> {
        let mut reader = Self {
            client,
            dir,
            limits,
            count: TreeCount::default(),
            open: Vec::new(),
        };
        reader.enter(Place::new(&reader.dir), Path::new("")).await?;
        Ok(reader)
    }

    /// The next entry; none at the end.
    ///
    /// # Errors
    /// [`TreeError`].
    pub async fn next(&mut self) -> Result<Option<TreeEntry>, TreeError> {
        let path = loop {
            match self.open.last_mut().map(Vec::pop) {
                Some(Some(path)) => break path,
                Some(None) => drop(self.open.pop()),
                None => return Ok(None),
            }
        };
        let at = || Place::beneath(&self.dir, &path);
        let found = self.client.stat(at(), false).await?;
        let node = match found.kind {
            FileKind::File => Node::File { size: found.size },
            FileKind::Link => Node::Link {
                target: self.client.read_link(at()).await?,
            },
            FileKind::Dir if self.open.len() > self.limits.depth => {
                let most = self.limits.depth;
                return Err(TreeError::TooDeep { path, most });
            }
            FileKind::Dir => {
                self.enter(at(), &path).await?;
                Node::Dir
            }
            FileKind::Other => return Err(TreeError::NotPlain(path)),
        };
        Ok(Some(TreeEntry {
            path,
            mode: found.mode & 0o7777,
            modified_s: found.modified_s,
            node,
        }))
    }

    /// Writes the content of a regular file that [`next`](Self::next) gave, as many bytes as it had then.
    ///
    /// # Errors
    /// [`TreeError::TooLarge`] before anything is written; [`TreeError::Changed`] if it became shorter; otherwise [`TreeError`].
    pub async fn content(
        &mut self,
        entry: &TreeEntry,
        writer: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), TreeError> {
        let Node::File { size } = entry.node else {
            return Ok(());
        };
        let bytes = self.count.bytes.saturating_add(size);
        if bytes > self.limits.bytes {
            return Err(TreeError::TooLarge(self.limits.bytes));
        }
        self.count.bytes = bytes;
        if size == 0 {
            return Ok(());
        }
        let at = Place::beneath(&self.dir, &entry.path);
        match self.client.get_into(at, 0..size, writer).await? {
            copied if copied < size => Err(TreeError::Changed(entry.path.clone())),
            _ => Ok(()),
        }
    }

    /// What was read.
    #[must_use]
    pub fn count(&self) -> TreeCount {
        self.count
    }

    async fn enter(&mut self, at: Place, path: &Path) -> Result<(), TreeError> {
        let entries = match self.client.list(at).await {
            Ok(entries) => entries,
            Err(FileError::TooMany) => return Err(TreeError::TooMany(self.limits.entries)),
            Err(error) => return Err(error.into()),
        };
        self.count.entries = self.count.entries.saturating_add(entries.len());
        if self.count.entries > self.limits.entries {
            return Err(TreeError::TooMany(self.limits.entries));
        }
        let mut paths = Vec::with_capacity(entries.len());
        for entry in entries {
            let path = path.join(name(&entry.name)?);
            if path.as_os_str().len() > LONGEST {
                return Err(TreeError::BadPath(path));
            }
            paths.push(path);
        }
        paths.sort_unstable_by(|one, other| other.cmp(one));
        self.open.push(paths);
        Ok(())
    }
}

/// A name that a directory can have: what else the guest says is no file system's word.
fn name(bytes: &[u8]) -> Result<&OsStr, ConnectionError> {
    match bytes {
        b"" | b"." | b".." => Err(ConnectionError::Protocol("no name of a file")),
        _ if bytes.contains(&b'/') || bytes.contains(&0) => {
            Err(ConnectionError::Protocol("no name of a file"))
        }
        _ => Ok(OsStr::from_bytes(bytes)),
    }
}
