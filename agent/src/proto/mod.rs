//! The wire protocol between host and agent.
//!
//! A connection is a byte stream that carries *frames*: a length (`u32`, little endian, at most
//! [`MAX_FRAME`]) and as many bytes of payload. The first frame in each direction is a [`Hello`];
//! after that the host sends [`Request`]s and the agent [`Response`]s, each one postcard value.
//!
//! ```text
//! agent                                   host
//!   | -- Hello (greets first, at once) --> |
//!   | <-- Hello, then any request -------- |   one write: no round trip is spent on the handshake
//!   | <-- Ping -------------------------- |
//!   | -- Pong --------------------------> |
//!   | <-- Exec -------------------------- |   at most one at a time on a connection
//!   | -- Started | Failed --------------> |
//!   | <-- Stdin, StdinEof, Signal, Resize |   Stdin only within the window (see STDIN_WINDOW)
//!   | -- Stdout, Stderr, Results, StdinTaken > |
//!   | -- Exited ------------------------> |   the connection is free for the next exec
//!   | <-- File, FileData, FileEnd ------- |   at most one at a time, and no exec (see FileRequest)
//!   | -- File --------------------------> |
//! ```
//!
//! - **Flow control.** Output is limited by the connection's own flow control: the agent stops
//!   reading a program's pipes while the host does not read. Input has a window of [`STDIN_WINDOW`]
//!   bytes, so that a program that does not read its stdin never keeps the agent from seeing a
//!   signal or a ping.
//! - **Cancelling.** Closing the connection kills its program and all that the program started.
//! - **Versions.** The layout of [`Hello`] up to its version never changes. Any other change to a
//!   type here changes [`VERSION`]; both sides refuse a peer of another version.

mod file;
mod frame;
mod hello;
mod request;
mod response;
mod status;

pub use file::{
    DirEntry, FileFailure, FileKind, FileReply, FileRequest, Metadata, Place, Put, PutMode,
};
pub use frame::{FrameBuffer, FrameError, encode};
pub use hello::{Hello, HelloError, InstanceId};
pub use request::{
    Account, Exec, Input, Leftover, Limits, OutputMode, Refresh, Request, ShutdownKind, User,
    WallClock, WindowSize,
};
pub use response::{
    Applied, Exited, Memory, OutputEnd, Pong, Refreshed, Rejection, Resource, Response,
    SpawnFailure, Standstill, Usage,
};
pub use status::ExitStatus;

/// The version of this protocol; both sides must have the same.
pub const VERSION: u16 = 4;

/// The vsock port on which the agent listens.
pub const AGENT_PORT: u32 = 1024;

/// The vsock port of the host (CID 2) that the agent connects to when it is ready.
pub const READY_PORT: u32 = 1025;

/// Most bytes of a program's input or output in one frame.
pub const MAX_CHUNK: usize = 64 * 1024;

/// Most bytes of payload in a frame: a chunk and room for its header. Argument lists and
/// environments must also fit.
pub const MAX_FRAME: usize = MAX_CHUNK + 1024;

/// Most bytes of input that the host may have sent and the agent not yet reported as taken
/// ([`Response::StdinTaken`]).
pub const STDIN_WINDOW: usize = 128 * 1024;

/// The number of bytes of taken input at which the agent must report; it may keep fewer than these
/// unreported, so that small writes do not cost a message each.
pub const STDIN_UNREPORTED: usize = STDIN_WINDOW / 4;

/// The kernel parameter that makes the guest's first image the root file system. The image must be
/// an EROFS file system; what programs write goes to an overlay in the guest's memory.
pub const ROOT_WORD: &str = "hearth_root=/dev/pmem0";

/// Returns the kernel parameter, used beside [`ROOT_WORD`], that limits what programs write over
/// the image to `mib` MiB of the guest's memory. Without it, the limit is 60 % of the memory.
/// `/tmp` counts towards the limit.
#[must_use]
pub fn layer_word(mib: u64) -> alloc::string::String {
    alloc::format!("hearth_layer={mib}m")
}

/// Longest time to wait for output after the main process has ended, in milliseconds.
pub const MAX_LINGER_MS: u32 = 60_000;

/// Fewest bytes of entropy in a [`Refresh`] that carries any.
pub const MIN_ENTROPY: usize = 32;

/// Most bytes of entropy in a [`Refresh`].
pub const MAX_ENTROPY: usize = 512;

/// Longest host name that Linux accepts, in bytes.
pub const MAX_HOSTNAME: usize = 64;
