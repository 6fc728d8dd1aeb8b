//! Reading a tree out of the guest.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{Node, TreeCount, TreeEntry, TreeError, TreeLimits};
use crate::{
    client::{AgentClient, error::ConnectionError, error::FileError, files::bytes},
    proto::{FileKind, Place},
};

/// Longest path that Linux accepts, in bytes.
const LONGEST: usize = 4095;
/// Most bytes of pending names, over all open directories.
const MOST_HELD: usize = 32 << 20;

/// Reads a tree in the guest, entry by entry: directories before their content, each in the order
/// of names. Links are not followed. The guest may change the tree meanwhile and is not trusted:
/// names are checked to be valid.
#[derive(Debug)]
pub struct TreeReader<'a, S> {
    client: &'a mut AgentClient<S>,
    dir: Place,
    limits: TreeLimits,
    count: TreeCount,
    /// Open directories from the top down.
    open: Vec<Level>,
    /// Bytes of all pending names in `open`.
    held: usize,
}

/// A directory that is being read.
#[derive(Debug)]
struct Level {
    /// The path relative to the top of the tree.
    path: PathBuf,
    /// The pending names, last first.
    names: Vec<OsString>,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin + Send> TreeReader<'a, S> {
    /// Begins reading a directory of the guest, which is itself not an entry. It is read with the
    /// rights that the place names ([`Place::by`]).
    ///
    /// # Errors
    /// [`TreeError`], for example if there is no such directory; [`TreeError::BadPath`] for a place
    /// that is beneath another one.
    pub async fn begin(
        client: &'a mut AgentClient<S>,
        dir: impl Into<Place>,
        limits: TreeLimits,
    ) -> Result<Self, TreeError> {
        let dir = dir.into();
        if dir.beneath.is_some() {
            let path = OsString::from_vec(dir.path.into_vec());
            return Err(TreeError::BadPath(path.into()));
        }
        let mut reader = Self {
            client,
            dir,
            limits,
            count: TreeCount::default(),
            open: Vec::new(),
            held: 0,
        };
        reader.enter(Path::new("")).await?;
        Ok(reader)
    }

    /// Returns the next entry; none at the end.
    ///
    /// # Errors
    /// [`TreeError`].
    pub async fn next(&mut self) -> Result<Option<TreeEntry>, TreeError> {
        let path = loop {
            let Some(level) = self.open.last_mut() else {
                return Ok(None);
            };
            if let Some(name) = level.names.pop() {
                self.held = self.held.saturating_sub(name.len());
                break level.path.join(name);
            }
            self.open.pop();
        };
        let at = self.place(&path);
        let found = self.client.stat(at.clone(), false).await?;
        let node = match found.kind {
            FileKind::File => Node::File { size: found.size },
            FileKind::Link => Node::Link {
                target: self.client.read_link(at).await?,
            },
            FileKind::Dir if self.open.len() > self.limits.depth => {
                let most = self.limits.depth;
                return Err(TreeError::TooDeep { path, most });
            }
            FileKind::Dir => {
                self.enter(&path).await?;
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

    /// Writes the content of a regular file that [`next`](Self::next) returned, as many bytes as it
    /// had then.
    ///
    /// # Errors
    /// [`TreeError::TooLarge`] before anything is written; [`TreeError::Changed`] if it became
    /// shorter; otherwise [`TreeError`].
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
        let at = self.place(&entry.path);
        match self.client.get_into(at, 0..size, writer).await? {
            copied if copied < size => Err(TreeError::Changed(entry.path.clone())),
            _ => Ok(()),
        }
    }

    /// Returns the number of entries found and of bytes read so far.
    #[must_use]
    pub fn count(&self) -> TreeCount {
        self.count
    }

    /// Returns a place in the tree. All places, also that of the top itself, are beneath the same
    /// directory, so that the agent keeps using the one that it found first.
    fn place(&self, path: &Path) -> Place {
        let path = match path.as_os_str() {
            top if top.is_empty() => Path::new("."),
            _ => path,
        };
        Place {
            path: bytes(path),
            beneath: Some(self.dir.path.clone()),
            by: self.dir.by.clone(),
        }
    }

    async fn enter(&mut self, path: &Path) -> Result<(), TreeError> {
        let at = self.place(path);
        let entries = match self.client.list(at).await {
            Ok(entries) => entries,
            Err(FileError::TooMany) => return Err(TreeError::TooMany(self.limits.entries)),
            Err(error) => return Err(error.into()),
        };
        self.count.entries = self.count.entries.saturating_add(entries.len());
        if self.count.entries > self.limits.entries {
            return Err(TreeError::TooMany(self.limits.entries));
        }
        let mut names = Vec::with_capacity(entries.len());
        for entry in entries {
            let name = name(&entry.name)?;
            self.held = self.held.saturating_add(name.len());
            if path.as_os_str().len() + 1 + name.len() > LONGEST {
                return Err(TreeError::BadPath(path.join(name)));
            }
            names.push(name.to_owned());
        }
        if self.held > MOST_HELD {
            return Err(TreeError::TooMany(self.limits.entries));
        }
        names.sort_unstable_by(|one, other| other.cmp(one));
        // Duplicate names are refused: a program that unpacks the tree would take the second for
        // another file, and a link for the directory of that name.
        if names
            .windows(2)
            .any(|pair| matches!(pair, [one, other] if one == other))
        {
            return Err(ConnectionError::Protocol("a name twice in a directory").into());
        }
        let path = path.to_owned();
        self.open.push(Level { path, names });
        Ok(())
    }
}

/// Checks that the guest sent a name that a directory can contain.
fn name(bytes: &[u8]) -> Result<&OsStr, ConnectionError> {
    match bytes {
        b"" | b"." | b".." => Err(ConnectionError::Protocol("no name of a file")),
        _ if bytes.contains(&b'/') || bytes.contains(&0) => {
            Err(ConnectionError::Protocol("no name of a file"))
        }
        _ => Ok(OsStr::from_bytes(bytes)),
    }
}
