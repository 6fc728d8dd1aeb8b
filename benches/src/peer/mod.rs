//! Other monitors, run as their users run them: each guest has a process of its own, whose start is
//! included in the time.
//!
//! The answers of a peer are believed only as far as they can be checked. A peer that crashes,
//! hangs or shows another guest than the one it was given is an error, and its earlier measurements
//! are dropped.

mod agent;
mod firecracker;
mod http;
mod qemu;

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, Command};

pub use firecracker::Firecracker;
pub use qemu::{Channel, Qemu, SERIAL_WORDS};

/// How long a peer may take to print its version.
const GREETING: Duration = Duration::from_secs(10);
/// Most bytes that are read of a peer's version or error output, from its start.
const TAIL: u64 = 2000;

/// Paths of the peers that are to be measured.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// Firecracker.
    pub firecracker: Option<PathBuf>,
    /// QEMU for x86-64.
    pub qemu: Option<PathBuf>,
    /// How long a peer's guest may take.
    pub limit: Option<Duration>,
}

/// The inputs of a peer's guest: the same as Hearth's.
#[derive(Clone, Copy, Debug)]
pub struct Booted<'a> {
    /// Kernel.
    pub kernel: &'a Path,
    /// Initramfs with the agent.
    pub initramfs: &'a Path,
    /// Image of its root file system, for virtio-pmem, if it has one; the kernel parameters name
    /// it.
    pub root: Option<&'a Path>,
    /// Kernel parameters.
    pub words: &'a str,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u8,
    /// How long the guest may take.
    pub limit: Duration,
}

/// Why a peer is not measured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// It cannot be run.
    #[error("{} cannot be run", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is another program.
    #[error("{} does not say that it is {wanted}, but: {said:?}", program.display())]
    Another {
        /// The program.
        program: PathBuf,
        /// The expected program.
        wanted: &'static str,
        /// Its version output.
        said: String,
    },
    /// It ended before its guest was up.
    #[error("it ended before its guest was up ({status}): {said}")]
    Ended {
        /// Its exit status.
        status: ExitStatus,
        /// The first bytes of its error output.
        said: String,
    },
    /// Its guest was not up in time.
    #[error("its guest was not up after {0:?}")]
    Silent(Duration),
    /// Its guest closed the connection.
    #[error("its guest closed the connection before it answered")]
    HungUp,
    /// Its guest is not the one that it was given.
    #[error("it does not show the guest that it was given: {0}")]
    Lies(String),
    /// It refused a request.
    #[error("it refused {what}: {said}")]
    Refused {
        /// The request.
        what: String,
        /// Its answer.
        said: String,
    },
    /// The connection to it failed.
    #[error("it cannot be talked to")]
    Io(#[from] std::io::Error),
}

/// Returns the first line of `program --version`, which must begin with `wanted`.
async fn version(program: &Path, wanted: &'static str) -> Result<String, PeerError> {
    let mut child = start(command(program).arg("--version"), program)?;
    let mut said = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let mut stdout = stdout.take(TAIL);
        let read = stdout.read_to_end(&mut said);
        let read = tokio::time::timeout(GREETING, read).await;
        read.map_err(|_| PeerError::Silent(GREETING))??;
    }
    let _ = child.kill().await;
    let said = String::from_utf8_lossy(&said);
    let said = said.lines().next().unwrap_or_default().to_owned();
    match said.starts_with(wanted) {
        true => Ok(said),
        false => Err(PeerError::Another {
            program: program.to_owned(),
            wanted,
            said,
        }),
    }
}

/// Returns the command of a peer's process, which is killed when its handle is dropped.
fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

fn start(command: &mut Command, program: &Path) -> Result<Child, PeerError> {
    command.spawn().map_err(|source| PeerError::Start {
        program: program.to_owned(),
        source,
    })
}

/// Returns the error of a process that ended too early.
async fn ended(child: &mut Child) -> PeerError {
    let status = match child.wait().await {
        Ok(status) => status,
        Err(error) => return PeerError::Io(error),
    };
    let said = match child.stderr.take() {
        Some(stderr) => tail(stderr).await,
        None => String::new(),
    };
    PeerError::Ended { status, said }
}

/// Returns the first bytes of a process's error output. Waits for 200 ms at most: a child of the
/// process may hold the output open.
async fn tail(stderr: ChildStderr) -> String {
    let mut said = Vec::new();
    let mut stderr = stderr.take(TAIL);
    let read = stderr.read_to_end(&mut said);
    let _ = tokio::time::timeout(Duration::from_millis(200), read).await;
    String::from_utf8_lossy(&said).trim().replace('\n', "; ")
}
