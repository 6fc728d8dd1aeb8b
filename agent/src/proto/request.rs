//! Requests of the host to the agent.

use alloc::{boxed::Box, string::String, vec::Vec};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{FileRequest, FrameError, InstanceId, frame::decode};

/// A message from the host, after its hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request<'a> {
    /// Asks for a [`Pong`](super::Pong) with the same nonce.
    Ping {
        /// Any number; the pong repeats it.
        nonce: u64,
    },
    /// Runs a program. At most one at a time on a connection.
    Exec(Box<Exec>),
    /// Input for the running program; ignored when no program runs.
    Stdin(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// Marks the end of the input. On a terminal, the agent types the end-of-file character.
    StdinEof,
    /// Sends this signal (1 to 64) to the running program's process group; ignored when it has
    /// ended.
    Signal(u8),
    /// Makes a clone unique: see [`Refresh`].
    Refresh(Box<Refresh>),
    /// Ends the guest. No response is sent; the host sees how the VM ends.
    Shutdown(ShutdownKind),
    /// Freezes all programs and what they started until a [`Refresh`] or a [`Thaw`](Self::Thaw).
    /// The response says whether all are frozen; if not, repeat the request until they are.
    Freeze,
    /// Resumes frozen programs.
    Thaw,
    /// A request about files. One at a time on a connection, and not while a program runs on it.
    File(Box<FileRequest>),
    /// Content of the file that is being written ([`FileRequest::Put`]).
    FileData(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// Marks the end of the content.
    FileEnd,
    /// Sets the size of the running program's terminal; ignored when there is none.
    Resize(WindowSize),
}

impl<'a> Request<'a> {
    /// Decodes a frame's payload.
    ///
    /// # Errors
    /// [`FrameError::Malformed`].
    pub fn decode(payload: &'a [u8]) -> Result<Self, FrameError> {
        decode(payload)
    }
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments. The program is searched in PATH unless it has a slash.
    pub argv: Vec<ByteBuf>,
    /// Environment variables, added to the agent's defaults (PATH and HOME; also USER and LOGNAME
    /// for a user with a name) unless [`clear_env`](Self::clear_env).
    pub env: Vec<(ByteBuf, ByteBuf)>,
    /// Whether to start from an empty environment.
    pub clear_env: bool,
    /// Working directory; none: the home directory of a user with a name, if it exists, and
    /// otherwise `/`.
    pub cwd: Option<ByteBuf>,
    /// Where stdin comes from.
    pub stdin: Input,
    /// Where stdout and stderr go.
    pub output: OutputMode,
    /// Time until SIGTERM is sent to the program, in milliseconds; none: unlimited.
    pub timeout_ms: Option<u64>,
    /// Time from SIGTERM to SIGKILL, in milliseconds.
    pub grace_ms: u32,
    /// Time to wait for the end of output after the main process has ended, in milliseconds, at
    /// most [`MAX_LINGER_MS`](super::MAX_LINGER_MS). What the main process wrote is always
    /// delivered.
    pub linger_ms: u32,
    /// What happens to processes that outlive the main process.
    pub leftover: Leftover,
    /// The account to run as; none: the agent's own user (root).
    pub user: Option<Account>,
    /// Resource limits.
    pub limits: Limits,
    /// The host's time when it sent this. The guest's wall clock is set to it before the program
    /// starts, unless the clock is ahead by at most 2 s, which the message may have taken.
    pub wall_clock: Option<WallClock>,
    /// Gives the program a controlling terminal of this size as its stdin, stdout and stderr; its
    /// output is reported as stdout. Input needs [`Input::Pipe`]. TERM is set unless
    /// [`env`](Self::env) sets it or [`clear_env`](Self::clear_env) is true. Closing the
    /// connection hangs the terminal up.
    pub terminal: Option<WindowSize>,
    /// Gives the program a third output, on descriptor 3, reported as
    /// [`Response::Results`](super::Response::Results), which is separate from what the user's
    /// code prints. What the program wrote to stdout and stderr before is reported before.
    pub results: bool,
    /// Lets a program of a user other than root gain privileges by executing a file: set-user-id
    /// and set-group-id programs and files with capabilities take effect. Otherwise they do not
    /// (`no_new_privs`).
    pub new_privileges: bool,
}

/// The size of a terminal; zero: unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Where a program's stdin comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// `/dev/null`.
    #[default]
    Null,
    /// [`Request::Stdin`] frames.
    Pipe,
}

/// Where a program's output goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputMode {
    /// Two pipes; the order between them is not kept.
    #[default]
    Separate,
    /// One pipe for both, reported as stdout, in the order of the writes.
    Merged,
}

/// What happens to processes that a program leaves behind when its main process exits. A timeout or
/// a closed connection kills them in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Leftover {
    /// They keep running; their output is not read any more.
    #[default]
    Keep,
    /// They are killed.
    Kill,
}

/// A user account in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Account {
    /// The user with these ids.
    Ids(User),
    /// The user with this name in the guest's `/etc/passwd`, with the groups of `/etc/group`.
    /// `root` always exists. A home directory directly below `/home` is made if it is missing, and
    /// given to the user if it is root's.
    Name(ByteBuf),
    /// The default user of the guest's image: `user` as a [`Name`](Self::Name) if it exists, and
    /// otherwise the agent's own user (root).
    Usual,
}

/// Ids of a user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Resource limits of one program and all that it starts. None: unlimited, except for the number of
/// processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory of all its processes, in bytes (cgroup `memory.max`).
    pub memory_bytes: Option<u64>,
    /// Processes and threads (cgroup `pids.max`); none: half of the guest kernel's own limit, so
    /// that a program that forks without end leaves some for others.
    pub processes: Option<u32>,
    /// Open files per process (RLIMIT_NOFILE).
    pub open_files: Option<u32>,
    /// Largest file that the program may write, in bytes (RLIMIT_FSIZE).
    pub file_bytes: Option<u64>,
}

impl Limits {
    /// Returns whether a cgroup controller is needed.
    #[must_use]
    pub fn need_controllers(&self) -> bool {
        self.memory_bytes.is_some() || self.processes.is_some()
    }
}

/// Time since the epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallClock {
    /// Nanoseconds since 1970-01-01 00:00 UTC.
    pub since_epoch_ns: u64,
}

/// The values that make a clone unique after restore, applied before any user code runs in it. Each
/// part is optional and reported separately. Programs that were [frozen](Request::Freeze) are
/// resumed once all requested parts are done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refresh {
    /// Fresh entropy, 32 to 512 bytes, for the kernel's random generator, which is then reseeded.
    /// If there are 80 bytes or more, the last 16 are used for the boot id instead. 80 bytes are
    /// best: Hearth's kernels then need not hash. Empty: none.
    #[serde(with = "serde_bytes")]
    pub entropy: Vec<u8>,
    /// The host's time when it sent this. Hearth's kernels step the wall clock to the hypervisor's
    /// clock, which has no delivery delay. Other kernels set it to this time, and so do Hearth's
    /// if the hypervisor's clock is more than 60 s ahead of this time or more than 20 ms
    /// behind it.
    pub wall_clock: Option<WallClock>,
    /// The new identity: instance id and `/etc/machine-id`. The kernel's boot id is renewed with
    /// it.
    pub instance: Option<InstanceId>,
    /// The new host name, 1 to 64 bytes.
    pub hostname: Option<String>,
}

/// How to end the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShutdownKind {
    /// Power off.
    PowerOff,
    /// Reboot; the VMM sees a reset.
    Reboot,
}
