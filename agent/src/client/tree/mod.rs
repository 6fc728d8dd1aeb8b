//! Trees of files: as a tar stream, or entry by entry.
//!
//! The agent knows single files only, so that it stays small. Trees are put together here. What is
//! put into the guest goes there without waiting for each answer, and no path leads out of the tree
//! in the guest ([`Place::beneath`]). What comes out of the guest is what a stranger says: its
//! names are checked, its links are not followed, and its size is bounded by [`TreeLimits`].

mod reader;
mod tar;
mod writer;

use std::{io, path::PathBuf};

use tokio::io::{AsyncRead, AsyncWrite};

pub use self::{reader::TreeReader, writer::TreeWriter};
use super::{AgentClient, error::ConnectionError, error::FileError};
use crate::proto::{Account, Place};

/// An entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeEntry {
    /// The way from the top of the tree: names with slashes between them, none of them `.` or
    /// `..`.
    pub path: PathBuf,
    /// Permissions (07777).
    pub mode: u32,
    /// When its content last changed, in whole seconds since 1970-01-01 00:00 UTC.
    pub modified_s: i64,
    /// What it is.
    pub node: Node,
}

/// What an entry of a tree is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir,
    /// A regular file.
    File {
        /// Its bytes.
        size: u64,
    },
    /// A symbolic link.
    Link {
        /// What it points to, which may be anywhere.
        target: PathBuf,
    },
}

/// How much of a tree in the guest is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeLimits {
    /// Bytes of all files.
    pub bytes: u64,
    /// Entries.
    pub entries: usize,
    /// Directories inside each other.
    pub depth: usize,
}

impl Default for TreeLimits {
    /// 4 GiB, 100,000 entries, 64 levels.
    fn default() -> Self {
        Self {
            bytes: 4 << 30,
            entries: 100_000,
            depth: 64,
        }
    }
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TreeCount {
    /// Files, directories and links.
    pub entries: usize,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Why a tree was not copied, or not all of it. Drop the client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// Something was not done with a file of the guest.
    #[error(transparent)]
    File(#[from] FileError),
    /// The tree has more bytes than were allowed.
    #[error("the files have more than {0} bytes: allow more, or copy fewer")]
    TooLarge(u64),
    /// The tree has more entries than were allowed.
    #[error("there are more than {0} files and directories: allow more, or copy fewer")]
    TooMany(usize),
    /// Directories are nested deeper than was allowed.
    #[error("{}: directories are nested more than {most} deep", path.display())]
    TooDeep {
        /// Where.
        path: PathBuf,
        /// What was allowed.
        most: usize,
    },
    /// Something that is neither a file nor a directory nor a symbolic link (in a tar archive: a
    /// hard link, too).
    #[error("{}: neither a file nor a directory nor a symbolic link: leave it out", .0.display())]
    NotPlain(PathBuf),
    /// A file became shorter while it was copied.
    #[error("{}: became shorter while it was copied", .0.display())]
    Changed(PathBuf),
    /// A path that leads out of the tree, or is none.
    #[error("{}: not a path within the tree", .0.display())]
    BadPath(PathBuf),
    /// The stream is no tar archive, or ends too early.
    #[error("not a tar archive, or a damaged one: {0}")]
    BadArchive(&'static str),
}

impl From<ConnectionError> for TreeError {
    fn from(error: ConnectionError) -> Self {
        Self::File(error.into())
    }
}

impl TreeError {
    fn host(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::BadArchive("it ends too early"),
            _ => Self::File(FileError::Host(error)),
        }
    }
}

/// Trees. After an error drop the client: answers may still be on their way. The same goes for a
/// future that is dropped.
impl<S: AsyncRead + AsyncWrite + Unpin + Send> AgentClient<S> {
    /// Unpacks a tar archive (ustar, pax or GNU, not compressed) into a directory of the guest,
    /// which is made if it is not there. Files and links that are there are replaced.
    /// Everything is made with the rights of `account`, or else root's, and belongs to it. Of the
    /// archive's metadata the permissions count. Nothing is written outside of the directory,
    /// whatever names and links the archive or the directory has; archives with devices and
    /// hard links are refused.
    ///
    /// # Errors
    /// [`TreeError`]; a part may be there then.
    pub async fn put_tree(
        &mut self,
        dir: impl Into<PathBuf>,
        account: Option<Account>,
        archive: &mut (impl AsyncRead + Unpin),
    ) -> Result<TreeCount, TreeError> {
        let mut writer = TreeWriter::begin(self, dir.into(), account)?;
        let mut tar = tar::Reader::new(archive);
        while let Some(entry) = tar.next().await? {
            writer.add(&entry, &mut tar).await?;
            tar.skip_rest().await?;
        }
        writer.finish().await
    }

    /// Packs a directory of the guest into a tar archive (ustar, with pax headers where that does
    /// not do): files, directories and symbolic links, all root's; with the rights that the
    /// place names ([`Place::by`](crate::proto::Place::by)). Links are packed as links, and point
    /// where they point: unpack it with care.
    ///
    /// # Errors
    /// [`TreeError`]; what was written is then a part of an archive.
    pub async fn get_tree(
        &mut self,
        dir: impl Into<Place>,
        limits: TreeLimits,
        archive: &mut (impl AsyncWrite + Unpin),
    ) -> Result<TreeCount, TreeError> {
        let mut reader = TreeReader::begin(self, dir, limits).await?;
        while let Some(entry) = reader.next().await? {
            tar::write_header(&entry, archive).await?;
            if let Node::File { size } = entry.node {
                reader.content(&entry, archive).await?;
                tar::pad(size, archive).await?;
            }
        }
        tar::finish(archive).await?;
        Ok(reader.count())
    }
}
