//! Responses of the agent to the host.

use alloc::string::String;

use serde::{Deserialize, Serialize};

use super::{ExitStatus, FileReply, FrameError, InstanceId, frame::decode};

/// A message from the agent, after its hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response<'a> {
    /// The answer to a ping.
    Pong(Pong),
    /// The program was started.
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
    /// The number of bytes of input newly written to the program; the window grows by as much.
    StdinTaken(u32),
    /// The program closed its stdin; input that it has not read is lost.
    StdinClosed,
    /// The program has ended and no more output follows. The connection is free for the next exec.
    Exited(Exited),
    /// The answer to a refresh.
    Refreshed(Refreshed),
    /// A request broke the protocol; the agent closes the connection.
    Rejected(Rejection),
    /// The answer to a freeze.
    Frozen(Standstill),
    /// The answer to a thaw.
    Thawed(Applied),
    /// An answer about files.
    File(#[serde(borrow)] FileReply<'a>),
    /// Output of the program on descriptor 3.
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
    /// The number of programs that run, on all connections.
    pub execs: u32,
    /// Whether file systems and cgroups are set up. The agent does that after its first pong, so a
    /// template should be captured only after a pong with `true` here.
    pub prepared: bool,
}

/// The guest's memory, as reported by sysinfo(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Memory that the kernel manages, in bytes.
    pub total_bytes: u64,
    /// Unused memory, in bytes.
    pub free_bytes: u64,
}

/// Why a program could not be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum SpawnFailure {
    /// No such program.
    #[error("{program}: no such program in the guest")]
    NotFound {
        /// As named in the request.
        program: String,
    },
    /// The file is there but cannot be executed: no permission, a directory, or no known format.
    #[error("{program}: not executable (errno {errno})")]
    NotExecutable {
        /// As named in the request.
        program: String,
        /// EACCES, ENOEXEC and the like.
        errno: i32,
    },
    /// The file names an interpreter (a `#!` line or an ELF loader) that does not exist.
    #[error("{program}: its interpreter {interpreter} is not in the guest")]
    MissingInterpreter {
        /// As named in the request.
        program: String,
        /// The interpreter's name; empty if it could not be determined.
        interpreter: String,
    },
    /// The working directory cannot be entered.
    #[error("working directory {cwd} cannot be entered (errno {errno})")]
    MissingCwd {
        /// As named in the request.
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
    /// The program could not take on the user or group.
    #[error("cannot run as the user asked for (errno {errno})")]
    User {
        /// The system's error number.
        errno: i32,
    },
    /// A limit could not be set.
    #[error("cannot set a limit on {limit} (errno {errno})")]
    Limit {
        /// The limit.
        limit: Resource,
        /// The system's error number.
        errno: i32,
    },
    /// The image for the guest's root file system could not be mounted.
    #[error(
        "the guest's root file system cannot be mounted (errno {errno}): its first image must be an EROFS file system"
    )]
    NoRoot {
        /// The system's error number.
        errno: i32,
    },
    /// Anything else.
    #[error("cannot start the program (errno {errno})")]
    Other {
        /// The system's error number.
        errno: i32,
    },
    /// No terminal could be made for the program.
    #[error(
        "the guest has no terminal to give (errno {errno}): its kernel needs UNIX98_PTYS, and /dev/pts must be mounted"
    )]
    NoTerminal {
        /// The system's error number.
        errno: i32,
    },
    /// The user to run as does not exist.
    #[error("no user {name} in the guest's /etc/passwd")]
    NoUser {
        /// As named in the request.
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

/// The end of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// How its main process ended.
    pub status: ExitStatus,
    /// Whether the timeout ended it.
    pub timed_out: bool,
    /// Whether its output was read to the end.
    pub output: OutputEnd,
    /// The resources it used.
    pub usage: Usage,
}

/// How a program's output ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputEnd {
    /// All writers have closed it.
    Complete,
    /// A process that outlived the main process still held it open. What was written until the end
    /// of the linger time was delivered.
    StillOpen,
}

/// Resources used by the main process and the children that it waited for.
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

/// Whether the programs are frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standstill {
    /// All are frozen, or there are none.
    All,
    /// Some are not frozen yet: they are still in the kernel.
    NotYet,
    /// The guest's kernel cannot freeze programs.
    Refused {
        /// EOPNOTSUPP if the kernel has no cgroups (version 2).
        errno: i32,
    },
}

/// The result of each part of a refresh.
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
    /// Resuming the frozen programs. `NotAsked` if none are frozen or another part failed.
    pub programs: Applied,
}

impl Refreshed {
    /// Returns whether no part failed.
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

/// The result of one part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Applied {
    /// It was not requested.
    #[default]
    NotAsked,
    /// Done.
    Done,
    /// The system refused.
    Failed {
        /// The system's error number.
        errno: i32,
    },
}

/// How the host broke the protocol, in the agent's view.
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
    /// An exec while a program runs on the connection.
    #[error("a program already runs on this connection")]
    ExecRunning,
    /// A request about files while another one is in progress on the connection.
    #[error("a file is being transferred on this connection")]
    FileRunning,
    /// File content while no file is being written.
    #[error("content for no file")]
    NoFile,
    /// More input than the window allows.
    #[error("more input than the window allows")]
    StdinOverrun,
    /// A number or size out of range.
    #[error("value out of range")]
    OutOfRange,
    /// The agent has reached its limit of connections.
    #[error("too many connections to the agent")]
    TooManyConnections,
}
