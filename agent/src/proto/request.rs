//! What the host asks of the agent.

use alloc::{boxed::Box, string::String, vec::Vec};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{FileRequest, FrameError, InstanceId, frame::decode};

/// A message from the host, after its hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request<'a> {
    /// Asks for a [`Pong`](super::Pong) with the same nonce.
    Ping {
        /// Any number; the answer repeats it.
        nonce: u64,
    },
    /// Runs a program. At most one at a time on a connection.
    Exec(Box<Exec>),
    /// Input for the running program; ignored when there is none any more.
    Stdin(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// The input is complete. On a terminal it is the end-of-file character that says so.
    StdinEof,
    /// Sends this signal (1 to 64) to the running program's process group; ignored when it has
    /// ended.
    Signal(u8),
    /// Makes a clone a stranger to its siblings.
    Refresh(Box<Refresh>),
    /// Ends the guest. There is no answer; how the VM ends is the answer.
    Shutdown(ShutdownKind),
    /// Has all programs, and what they started, stand still until a [`Refresh`] or a
    /// [`Thaw`](Self::Thaw). The answer says whether they do already: ask again until they do.
    Freeze,
    /// Lets what stands still go on.
    Thaw,
    /// Does something with files. One at a time on a connection, and not while a program runs on
    /// it.
    File(Box<FileRequest>),
    /// Content of the file that is being put.
    FileData(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// The content is complete.
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
    /// Environment, on top of the agent's defaults (PATH, HOME; for a user who has a name USER and
    /// LOGNAME) unless [`clear_env`](Self::clear_env).
    pub env: Vec<(ByteBuf, ByteBuf)>,
    /// Start from an empty environment.
    pub clear_env: bool,
    /// Working directory. If none is given, the home of a user who has a name and one that is
    /// there; `/` otherwise.
    pub cwd: Option<ByteBuf>,
    /// Where stdin comes from.
    pub stdin: Input,
    /// Where stdout and stderr go.
    pub output: OutputMode,
    /// Time until the program is told to end (SIGTERM), in milliseconds; none: unlimited.
    pub timeout_ms: Option<u64>,
    /// Time from SIGTERM to SIGKILL, in milliseconds.
    pub grace_ms: u32,
    /// Time to wait for the end of output after the main process has ended, in milliseconds, at
    /// most [`MAX_LINGER_MS`](super::MAX_LINGER_MS). What the main process wrote is always
    /// delivered.
    pub linger_ms: u32,
    /// What happens to processes that outlive the main process.
    pub leftover: Leftover,
    /// Whom to run as; none: the agent's own user (root).
    pub user: Option<Account>,
    /// Resource limits.
    pub limits: Limits,
    /// The time at the host when it sent this: the guest's wall clock is set to it before the
    /// program starts, unless it is ahead by no more than the 2 s that the message may have
    /// taken.
    pub wall_clock: Option<WallClock>,
    /// Gives the program a terminal of this size: its controlling terminal, stdin, stdout and
    /// stderr, reported as stdout. It needs [`Input::Pipe`] to be typed on, and has TERM set
    /// unless it is given. Closing the connection hangs it up.
    pub terminal: Option<WindowSize>,
    /// Gives the program a third output, on descriptor 3, reported as
    /// [`Response::Results`](super::Response::Results): what it says beside what its users'
    /// code prints. What it wrote to the other two before is reported before.
    pub results: bool,
    /// Lets a program of another user than root gain rights by what it executes: set-user-id and
    /// set-group-id programs, and such with capabilities of their own, act as their files say.
    /// Otherwise they do not (`no_new_privs`).
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
/// a dropped connection kills them in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Leftover {
    /// They live on, without their output.
    #[default]
    Keep,
    /// They are killed.
    Kill,
}

/// Somebody in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Account {
    /// Who has these ids.
    Ids(User),
    /// Whom the guest's `/etc/passwd` has under this name, with the groups of `/etc/group`. `root`
    /// is there in any case. A home below `/home` is made, and made the user's own.
    Name(ByteBuf),
    /// Whom the guest's image is made for: `user` as a [`Name`](Self::Name), and the agent's own
    /// user (root) if there is none.
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

/// Resource limits of one program and all that it starts; none: unlimited, but for the number of
/// processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory of all its processes, in bytes (cgroup `memory.max`).
    pub memory_bytes: Option<u64>,
    /// Processes and threads (cgroup `pids.max`); none: half of what the guest's kernel makes at
    /// all, so that a program that forks without end leaves some for others.
    pub processes: Option<u32>,
    /// Open files per process (RLIMIT_NOFILE).
    pub open_files: Option<u32>,
    /// Largest file that it may write, in bytes (RLIMIT_FSIZE).
    pub file_bytes: Option<u64>,
}

impl Limits {
    /// Whether a cgroup controller is needed.
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

/// What a clone is given before any user code runs in it. Each part is optional and reported on its
/// own. Programs that were [frozen](Request::Freeze) go on once all parts that were asked for are
/// done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refresh {
    /// Fresh entropy, 32 to 512 bytes, for the kernel's generator, which is then reseeded. Of 80
    /// bytes or more the last 16 become the boot id instead. 80 are best: kernels of ours then
    /// need not hash. Empty: none.
    #[serde(with = "serde_bytes")]
    pub entropy: Vec<u8>,
    /// The time at the host when it sent this. Our kernel steps the wall clock to the
    /// hypervisor's, which is not late by the delivery; others, and a time that is more than a
    /// minute from it, to this.
    pub wall_clock: Option<WallClock>,
    /// The new identity: instance id, `/etc/machine-id`; with it the kernel's boot id is drawn
    /// anew.
    pub instance: Option<InstanceId>,
    /// The new host name, 1 to 64 bytes.
    pub hostname: Option<String>,
}

/// How to end the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShutdownKind {
    /// Power off.
    PowerOff,
    /// Reboot; the monitor sees a reset.
    Reboot,
}
