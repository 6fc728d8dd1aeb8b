//! What the agent tells the host.

use alloc::string::String;

use serde::{Deserialize, Serialize};

use super::{ExitStatus, FileReply, FrameError, InstanceId, frame::decode};

/// A message from the agent, after its hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response<'a> {
    /// The answer to a ping.
    Pong(Pong),
    /// The program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The program could not be started. The connection is free for the next exec.
    Failed(SpawnFailure),
    /// Output.
    Stdout(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// Error output.
    Stderr(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
    /// So many more bytes of input were written to the program: the window opens by as much.
    StdinTaken(u32),
    /// The program closed its stdin: what it has not read is lost.
    StdinClosed,
    /// The program has ended and its output is complete. The connection is free for the next exec.
    Exited(Exited),
    /// The answer to a refresh.
    Refreshed(Refreshed),
    /// The request breaks the protocol; the agent closes the connection.
    Rejected(Rejection),
    /// The answer to a freeze.
    Frozen(Standstill),
    /// The answer to a thaw.
    Thawed(Applied),
    /// An answer about files.
    File(#[serde(borrow)] FileReply<'a>),
    /// What the program wrote to descriptor 3.
    Results(#[serde(borrow, with = "serde_bytes")] &'a [u8]),
}

impl<'a> Response<'a> {
    /// Decodes a frame's payload.
    ///
    /// # Errors
    /// [`FrameError::Malformed`].
    pub fn decode(payload: &'a [u8]) -> Result<Self, FrameError> {
        decode(payload)
    }
}

/// The agent's answer to a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The ping's nonce.
    pub nonce: u64,
    /// The guest's identity.
    pub instance: InstanceId,
    /// The guest's CLOCK_BOOTTIME, in microseconds.
    pub uptime_us: u64,
    /// The guest's memory.
    pub memory: Memory,
    /// Programs that run on all connections.
    pub execs: u32,
    /// Whether file systems and cgroups are set up. The agent does that after its first pong, so
    /// that a template should be captured only after a pong that says true.
    pub prepared: bool,
}

/// The guest's memory, as sysinfo(2) has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Memory that the kernel manages, in bytes.
    pub total_bytes: u64,
    /// Memory that nothing uses, in bytes.
    pub free_bytes: u64,
}

/// Why a program could not be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum SpawnFailure {
    /// No such program.
    #[error("{program}: no such program in the guest")]
    NotFound {
        /// As it was asked for.
        program: String,
    },
    /// The file is there but cannot be executed: no permission, a directory, or no known format.
    #[error("{program}: not executable (errno {errno})")]
    NotExecutable {
        /// As it was asked for.
        program: String,
        /// EACCES, ENOEXEC and the like.
        errno: i32,
    },
    /// The file names an interpreter (a `#!` line or an ELF loader) that is not there.
    #[error("{program}: its interpreter {interpreter} is not in the guest")]
    MissingInterpreter {
        /// As it was asked for.
        program: String,
        /// What the file names; empty if that could not be found out.
        interpreter: String,
    },
    /// The working directory cannot be entered.
    #[error("working directory {cwd} cannot be entered (errno {errno})")]
    MissingCwd {
        /// As it was asked for.
        cwd: String,
        /// ENOENT, ENOTDIR, EACCES and the like.
        errno: i32,
    },
    /// The request itself cannot be carried out.
    #[error("bad request: {0}")]
    BadArgument(String),
    /// The guest is out of a resource.
    #[error("guest is out of {0}")]
    Exhausted(Resource),
    /// The user or group could not be taken on.
    #[error("cannot run as the user asked for (errno {errno})")]
    User {
        /// The system's reason.
        errno: i32,
    },
    /// A limit could not be set.
    #[error("cannot set a limit on {limit} (errno {errno})")]
    Limit {
        /// Which.
        limit: Resource,
        /// The system's reason.
        errno: i32,
    },
    /// The image that was to be the guest's root file system could not be mounted.
    #[error(
        "the guest's root file system cannot be mounted (errno {errno}): its first image must be an EROFS file system"
    )]
    NoRoot {
        /// The system's reason.
        errno: i32,
    },
    /// Anything else.
    #[error("cannot start the program (errno {errno})")]
    Other {
        /// The system's reason.
        errno: i32,
    },
    /// There is no terminal for it.
    #[error(
        "the guest has no terminal to give (errno {errno}): its kernel needs UNIX98_PTYS, and /dev/pts must be mounted"
    )]
    NoTerminal {
        /// The system's reason.
        errno: i32,
    },
    /// Nobody has the name of the user whom it was to run as.
    #[error("no user {name} in the guest's /etc/passwd")]
    NoUser {
        /// As it was asked for.
        name: String,
    },
}

/// A resource of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resource {
    /// Memory.
    Memory,
    /// Processes.
    Processes,
    /// Open files.
    OpenFiles,
    /// The size of files.
    FileSize,
}

impl core::fmt::Display for Resource {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Processes => "processes",
            Self::OpenFiles => "open files",
            Self::FileSize => "file size",
        })
    }
}

/// A program's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// How its main process ended.
    pub status: ExitStatus,
    /// Whether the timeout ended it.
    pub timed_out: bool,
    /// Whether its output was read to the end.
    pub output: OutputEnd,
    /// What it used.
    pub usage: Usage,
}

/// How a program's output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputEnd {
    /// Everybody who could write has closed it.
    Complete,
    /// All that was written up to the end of the linger time was delivered; a process that outlived
    /// the main process still held it open.
    StillOpen,
}

/// What the main process and the children that it waited for used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Time from start to exit, in microseconds.
    pub wall_us: u64,
    /// CPU time in user mode, in microseconds.
    pub user_us: u64,
    /// CPU time in the kernel, in microseconds.
    pub system_us: u64,
    /// Largest resident set, in KiB.
    pub max_rss_kib: u64,
}

/// Whether the programs stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standstill {
    /// All of them; or there are none.
    All,
    /// Some are still on their way to it, in the kernel.
    NotYet,
    /// The guest's kernel cannot do it.
    Refused {
        /// EOPNOTSUPP where it has no cgroups (version 2).
        errno: i32,
    },
}

/// What became of each part of a refresh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refreshed {
    /// The kernel's random generator.
    pub entropy: Applied,
    /// The wall clock.
    pub wall_clock: Applied,
    /// `/etc/machine-id`.
    pub machine_id: Applied,
    /// The kernel's boot id.
    pub boot_id: Applied,
    /// The host name.
    pub hostname: Applied,
    /// Programs that stood still go on. Not asked if there are none, nor while another part
    /// failed.
    pub programs: Applied,
}

impl Refreshed {
    /// Whether no part failed.
    #[must_use]
    pub fn all_applied(&self) -> bool {
        [
            self.entropy,
            self.wall_clock,
            self.machine_id,
            self.boot_id,
            self.hostname,
            self.programs,
        ]
        .iter()
        .all(|part| !matches!(part, Applied::Failed { .. }))
    }
}

/// What became of one part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Applied {
    /// It was not asked for.
    #[default]
    NotAsked,
    /// Done.
    Done,
    /// The system refused.
    Failed {
        /// Why.
        errno: i32,
    },
}

/// How the host broke the protocol, as the agent sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Rejection {
    /// The host speaks another version.
    #[error("agent speaks protocol version {agent}, the host {host}")]
    Version {
        /// The agent's version.
        agent: u16,
        /// The host's version.
        host: u16,
    },
    /// The first frame was not a hello.
    #[error("first frame was not a hello")]
    NotHello,
    /// A frame was too long or did not decode.
    #[error("frame too long or malformed")]
    Malformed,
    /// An exec while one runs on the connection.
    #[error("a program already runs on this connection")]
    ExecRunning,
    /// A request while another one about files is under way on the connection.
    #[error("a file is being transferred on this connection")]
    FileRunning,
    /// Content for a file that is not being put.
    #[error("content for no file")]
    NoFile,
    /// More input than the window allows.
    #[error("more input than the window allows")]
    StdinOverrun,
    /// A number or size out of range.
    #[error("value out of range")]
    OutOfRange,
    /// The agent serves as many connections as it can.
    #[error("too many connections to the agent")]
    TooManyConnections,
}
