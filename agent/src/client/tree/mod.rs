//! Trees of files, copied as a tar stream or entry by entry.
//!
//! The agent handles single files only, so that it stays small; trees are assembled here. Files are
//! written into the guest without waiting for each answer, and no path leads out of the tree in the
//! guest ([`Place::beneath`]). Data from the guest is not trusted: names are checked, links are not
//! followed, and the size is bounded by [`TreeLimits`].

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
    /// The path relative to the top of the tree: names with slashes between them, none of them `.`
    /// or `..`.
    pub path: PathBuf,
    /// Permissions (07777).
    pub mode: u32,
    /// When its content last changed, in whole seconds since 1970-01-01 00:00 UTC.
    pub modified_s: i64,
    /// The kind of entry.
    pub node: Node,
}

/// The kind of an entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir,
    /// A regular file.
    File {
        /// Its size in bytes.
        size: u64,
    },
    /// A symbolic link.
    Link {
        /// The path that the link points to, which may be anywhere.
        target: PathBuf,
    },
}

/// Limits on a tree that is read from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeLimits {
    /// Most bytes of all files.
    pub bytes: u64,
    /// Most entries.
    pub entries: usize,
    /// Most levels of nested directories.
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

/// The amount of what was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TreeCount {
    /// Files, directories and links.
    pub entries: usize,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Why a tree was not copied, or only a part of it. Drop the client.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// An operation on a file of the guest failed.
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
        /// The directory that is too deep.
        path: PathBuf,
        /// The limit that the caller gave.
        most: usize,
    },
    /// An entry is neither a file nor a directory nor a symbolic link (in a tar archive, a hard
    /// link counts as such).
    #[error("{}: neither a file nor a directory nor a symbolic link: leave it out", .0.display())]
    NotPlain(PathBuf),
    /// A file became shorter while it was copied.
    #[error("{}: became shorter while it was copied", .0.display())]
    Changed(PathBuf),
    /// A path leads out of the tree, or is not valid.
    #[error("{}: not a path within the tree", .0.display())]
    BadPath(PathBuf),
    /// The stream is not a tar archive, or ends too early.
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

/// Trees. Drop the client after an error and after dropping a future: answers may still be in
/// transit.
impl<S: AsyncRead + AsyncWrite + Unpin + Send> AgentClient<S> {
    /// Unpacks a tar archive (ustar, pax or GNU, not compressed) into a directory of the guest,
    /// which is made if it does not exist. Existing files and links are replaced. Everything is
    /// made with the rights of `account`, or root's if there is none, and belongs to it. Of the
    /// archive's metadata only the permissions are used. Nothing is written outside of the
    /// directory, whatever names and links the archive or the directory contains; archives with
    /// devices or hard links are refused.
    ///
    /// # Errors
    /// [`TreeError`]; a part of the tree may be written then.
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

    /// Packs a directory of the guest into a tar archive (ustar, with pax headers for values that
    /// do not fit): files, directories and symbolic links, all owned by root. The directory is read
    /// with the rights that the place names ([`Place::by`](crate::proto::Place::by)). Links are
    /// packed as links with their targets unchanged: unpack the archive with care.
    ///
    /// # Errors
    /// [`TreeError`]; the archive is then incomplete.
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
