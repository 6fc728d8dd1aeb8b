//! Files of the guest: what the host asks, and what the agent answers.
//!
//! A [`FileRequest`] has the connection to itself until its last answer: [`FileReply::Done`],
//! [`FileReply::Failed`], or the one [`FileReply::Stat`] that was asked for. Content travels in
//! frames of at most [`MAX_CHUNK`](super::MAX_CHUNK) bytes; the connection itself holds back who is
//! too fast.

use alloc::vec::Vec;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::Account;

/// Something to do with files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRequest {
    /// What is there: [`FileReply::Stat`].
    Stat {
        /// Where.
        at: Place,
        /// Whether a symbolic link stands for what it points to.
        follow: bool,
    },
    /// The entries of a directory: any number of [`FileReply::Entries`], then [`FileReply::Done`].
    List {
        /// The directory.
        at: Place,
    },
    /// The content of a regular file: any number of [`FileReply::Data`], then [`FileReply::Done`].
    Get {
        /// The file.
        at: Place,
        /// How many bytes of it are left out first.
        offset: u64,
        /// How many bytes are sent at most.
        most: u64,
    },
    /// A regular file; its content follows in [`Request::FileData`](super::Request::FileData) and
    /// ends with [`Request::FileEnd`](super::Request::FileEnd), also if a [`FileReply::Failed`]
    /// comes before that.
    Put(Put),
    /// A new directory.
    MakeDir {
        /// Where.
        at: Place,
        /// Its permissions (07777).
        mode: u32,
        /// Make missing directories on the way, and be content with one that is there.
        parents: bool,
        /// Whom it is given to, with those on the way that are made; none: it belongs to who made
        /// it.
        owner: Option<Account>,
    },
    /// Removes a file, a link, an empty directory.
    Remove {
        /// What.
        at: Place,
        /// A directory goes with all that is in it. Links are not followed.
        recursive: bool,
    },
    /// Gives a file or directory another place in the same file system.
    Rename {
        /// What.
        at: Place,
        /// Where to; resolved as `at` is.
        to: ByteBuf,
        /// Whether what is there is replaced.
        replace: bool,
    },
    /// A symbolic link. What is there is replaced, unless it is a directory.
    MakeLink {
        /// Where.
        at: Place,
        /// What it points to.
        target: ByteBuf,
        /// Whom it is given to; none: it belongs to who made it.
        owner: Option<Account>,
    },
    /// What a symbolic link points to: [`FileReply::Data`], then [`FileReply::Done`].
    ReadLink {
        /// The link.
        at: Place,
    },
}

impl FileRequest {
    /// What it is about.
    #[must_use]
    pub fn at(&self) -> &Place {
        match self {
            Self::Stat { at, .. }
            | Self::List { at }
            | Self::Get { at, .. }
            | Self::Put(Put { at, .. })
            | Self::MakeDir { at, .. }
            | Self::Remove { at, .. }
            | Self::Rename { at, .. }
            | Self::MakeLink { at, .. }
            | Self::ReadLink { at } => at,
        }
    }
}

/// A path in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// A relative one begins at `beneath`, or at `/`.
    pub path: ByteBuf,
    /// The directory that the path, with all links on its way, may not lead out of. It is found
    /// once for all requests on a connection that follow each other and name the same: they
    /// mean that directory, whatever is at its path meanwhile.
    pub beneath: Option<ByteBuf>,
    /// With whose rights, and no others, the path is followed and the request carried out, and to
    /// whom what is made belongs; none: the agent's own, which are all.
    pub by: Option<Account>,
}

/// A file to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    /// Where.
    pub at: Place,
    /// What becomes of what is there.
    pub how: PutMode,
    /// Permissions (07777); none: those of the file that is replaced, or 0644. A file that is
    /// appended to keeps its own.
    pub mode: Option<u32>,
    /// Whom a file that is made is given to; none: it belongs to who made it.
    pub owner: Option<Account>,
}

/// What becomes of a file that is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PutMode {
    /// It is replaced, at once, when the new one is complete. So is a link, not what it points to.
    #[default]
    Replace,
    /// It stays, and the request fails.
    Create,
    /// The content is written to its end as it comes.
    Append,
}

/// An answer about files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileReply<'a> {
    /// What is there.
    Stat(Metadata),
    /// Some entries of a directory.
    Entries(Vec<DirEntry>),
    /// Some content.
    Data(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// All was done.
    Done,
    /// It was not done, or not to its end.
    Failed(FileFailure),
}

/// What is known of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// What it is.
    pub kind: FileKind,
    /// Bytes.
    pub size: u64,
    /// Permissions (07777).
    pub mode: u32,
    /// The user it belongs to.
    pub uid: u32,
    /// The group it belongs to.
    pub gid: u32,
    /// When its content last changed, in whole seconds since 1970-01-01 00:00 UTC.
    pub modified_s: i64,
    /// Nanoseconds on top, below 1,000,000,000.
    pub modified_ns: u32,
}

/// What a directory entry stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A device, pipe or socket; or the file system does not say.
    Other,
}

/// An entry of a directory; `.` and `..` are none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Its name.
    pub name: ByteBuf,
    /// What it is.
    pub kind: FileKind,
}

/// Why something was not done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum FileFailure {
    /// There is nothing.
    #[error("no such file or directory")]
    NotFound,
    /// There is something.
    #[error("there is a file or directory of this name already")]
    Exists,
    /// A directory, device, pipe or socket where a regular file is wanted.
    #[error("not a regular file")]
    NotAFile,
    /// Something else where a directory is wanted.
    #[error("not a directory")]
    NotADirectory,
    /// A directory that is to be removed has entries.
    #[error("the directory is not empty: remove it recursively")]
    NotEmpty,
    /// The path leads out of the directory that it was to stay beneath.
    #[error("the path leads out of the directory that it may not leave")]
    Escapes,
    /// The path names no entry of a directory (it is empty, or ends in `.` or `..`), or has a NUL
    /// byte.
    #[error("the path names no file or directory")]
    BadPath,
    /// The file system is full.
    #[error("the guest's file system is full")]
    Full,
    /// The file system cannot be written to, or the agent may not.
    #[error("not permitted (errno {errno}): the file system is read-only, or the file protected")]
    NotPermitted {
        /// EROFS, EACCES or EPERM.
        errno: i32,
    },
    /// Directories are nested deeper than the agent follows.
    #[error("directories are nested too deep to be removed at once")]
    TooDeep,
    /// Anything else.
    #[error("the guest's system refused (errno {errno})")]
    Other {
        /// Why.
        errno: i32,
    },
    /// Something else where a symbolic link is wanted.
    #[error("not a symbolic link")]
    NotALink,
    /// Nobody has the name of the user whom it was to belong to.
    #[error("no such user in the guest's /etc/passwd")]
    NoUser,
}

impl From<Errno> for FileFailure {
    fn from(errno: Errno) -> Self {
        let number = errno.raw_os_error();
        match errno {
            Errno::NOENT => Self::NotFound,
            Errno::EXIST => Self::Exists,
            Errno::ISDIR => Self::NotAFile,
            Errno::NOTDIR => Self::NotADirectory,
            Errno::NOTEMPTY => Self::NotEmpty,
            // What openat2 has for a way out (RESOLVE_BENEATH).
            Errno::XDEV => Self::Escapes,
            Errno::NOSPC | Errno::DQUOT => Self::Full,
            Errno::ROFS | Errno::ACCESS | Errno::PERM => Self::NotPermitted { errno: number },
            _ => Self::Other { errno: number },
        }
    }
}
