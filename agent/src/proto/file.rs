//! Requests and replies about files of the guest.
//!
//! A [`FileRequest`] occupies the connection until its last reply: [`FileReply::Done`],
//! [`FileReply::Failed`], or the single [`FileReply::Stat`] of a stat request. Content travels in
//! frames of at most [`MAX_CHUNK`](super::MAX_CHUNK) bytes; the connection's own flow control slows
//! down a sender that is too fast.

use alloc::vec::Vec;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::Account;

/// A request about files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileRequest {
    /// Asks for the metadata of a file: [`FileReply::Stat`].
    Stat {
        /// The path.
        at: Place,
        /// Whether a symbolic link at the path is followed.
        follow: bool,
    },
    /// Lists a directory: any number of [`FileReply::Entries`], then [`FileReply::Done`].
    List {
        /// The directory.
        at: Place,
    },
    /// Reads a regular file: any number of [`FileReply::Data`], then [`FileReply::Done`].
    Get {
        /// The file.
        at: Place,
        /// The offset of the first byte that is sent.
        offset: u64,
        /// The most bytes that are sent.
        most: u64,
    },
    /// Writes a regular file. Its content follows in
    /// [`Request::FileData`](super::Request::FileData) and ends with
    /// [`Request::FileEnd`](super::Request::FileEnd), which the host must send even if a
    /// [`FileReply::Failed`] comes before.
    Put(Put),
    /// Makes a directory.
    MakeDir {
        /// The path.
        at: Place,
        /// Its permissions (07777).
        mode: u32,
        /// Whether missing parent directories are made, and a directory that exists is no error.
        parents: bool,
        /// The owner of the directory and of the parents that are made; none: the account of
        /// [`Place::by`].
        owner: Option<Account>,
    },
    /// Removes a file, a link or an empty directory.
    Remove {
        /// What is removed.
        at: Place,
        /// Whether a directory is removed with its content. Links are not followed.
        recursive: bool,
    },
    /// Moves a file or directory within one file system.
    Rename {
        /// The old path.
        at: Place,
        /// The new path; resolved as `at` is.
        to: ByteBuf,
        /// Whether an existing file at the new path is replaced.
        replace: bool,
    },
    /// Makes a symbolic link. An existing file at the path is replaced, unless it is a directory.
    MakeLink {
        /// The path.
        at: Place,
        /// The path that the link points to.
        target: ByteBuf,
        /// The owner of the link; none: the account of [`Place::by`].
        owner: Option<Account>,
    },
    /// Reads the target of a symbolic link: [`FileReply::Data`], then [`FileReply::Done`].
    ReadLink {
        /// The link.
        at: Place,
    },
}

impl FileRequest {
    /// Returns the path that the request is about; of a rename, the old one.
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
    /// The path; a relative one starts at `beneath`, or at `/`.
    pub path: ByteBuf,
    /// The directory that the path may not leave, neither by `..` nor through links. Consecutive
    /// requests on a connection that name the same directory and account share one lookup: they
    /// all use the directory found first, whatever is at its path meanwhile.
    pub beneath: Option<ByteBuf>,
    /// The account whose rights, and no others, are used to follow the path and carry out the
    /// request, and which owns what is made. None: the agent's own rights, which are unrestricted.
    pub by: Option<Account>,
}

/// A file to be written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Put {
    /// The path.
    pub at: Place,
    /// How an existing file is treated.
    pub how: PutMode,
    /// Permissions (07777); none: those of the file that is replaced, or 0644. A file that is
    /// appended to keeps its own.
    pub mode: Option<u32>,
    /// The owner of a newly made file; none: the account of [`Place::by`].
    pub owner: Option<Account>,
}

/// How writing treats an existing file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PutMode {
    /// It is replaced atomically once the new file is complete. A symbolic link is replaced itself,
    /// not its target.
    #[default]
    Replace,
    /// It is kept, and the request fails.
    Create,
    /// The content is appended to it as it arrives.
    Append,
}

/// An answer about files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileReply<'a> {
    /// Metadata of the file.
    Stat(Metadata),
    /// Some entries of the directory.
    Entries(Vec<DirEntry>),
    /// Some of the content, or the target of a link.
    Data(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// The request was carried out completely.
    Done,
    /// The request failed, perhaps after a part of it was carried out.
    Failed(FileFailure),
}

/// Metadata of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// The kind of file.
    pub kind: FileKind,
    /// The size in bytes.
    pub size: u64,
    /// Permissions (07777).
    pub mode: u32,
    /// The user it belongs to.
    pub uid: u32,
    /// The group it belongs to.
    pub gid: u32,
    /// When its content last changed, in whole seconds since 1970-01-01 00:00 UTC.
    pub modified_s: i64,
    /// The nanoseconds of that time, below 1,000,000,000.
    pub modified_ns: u32,
}

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Link,
    /// A device, pipe or socket, or unknown because the file system does not report it.
    Other,
}

/// An entry of a directory; `.` and `..` are not listed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Its name.
    pub name: ByteBuf,
    /// The kind of file.
    pub kind: FileKind,
}

/// Why a request about files failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum FileFailure {
    /// The file does not exist.
    #[error("no such file or directory")]
    NotFound,
    /// The file exists already.
    #[error("there is a file or directory of this name already")]
    Exists,
    /// A regular file was expected, and a directory, device, pipe or socket found.
    #[error("not a regular file")]
    NotAFile,
    /// A directory was expected, and something else found.
    #[error("not a directory")]
    NotADirectory,
    /// The directory to be removed is not empty.
    #[error("the directory is not empty: remove it recursively")]
    NotEmpty,
    /// The path leads out of the directory that it must stay beneath.
    #[error("the path leads out of the directory that it may not leave")]
    Escapes,
    /// The path names no entry of a directory (it is empty, or ends in `.` or `..`), or contains a
    /// NUL byte.
    #[error("the path names no file or directory")]
    BadPath,
    /// The file system is full.
    #[error("the guest's file system is full")]
    Full,
    /// The file system is read-only, or permission is denied.
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
        /// The system's error number.
        errno: i32,
    },
    /// A symbolic link was expected, and something else found.
    #[error("not a symbolic link")]
    NotALink,
    /// The account named in the request does not exist.
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
            // openat2 returns EXDEV for a path that leads out of the directory (RESOLVE_BENEATH).
            Errno::XDEV => Self::Escapes,
            Errno::NOSPC | Errno::DQUOT => Self::Full,
            Errno::ROFS | Errno::ACCESS | Errno::PERM => Self::NotPermitted { errno: number },
            _ => Self::Other { errno: number },
        }
    }
}
