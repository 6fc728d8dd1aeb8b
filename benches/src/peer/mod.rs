//! Other monitors, run as their users run them: each guest in a process of its own, whose start
//! counts.
//!
//! What a peer says is believed only as far as it can be checked. One that crashes, hangs or shows
//! another guest than the one it was given is an error, and what was measured of it before is
//! dropped.

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

/// How long a peer may take to say what it is.
const GREETING: Duration = Duration::from_secs(10);
/// How much of a peer's complaints is told.
const TAIL: u64 = 2000;

/// Where the peers are, if they are to be measured.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// Firecracker.
    pub firecracker: Option<PathBuf>,
    /// QEMU for x86-64.
    pub qemu: Option<PathBuf>,
    /// How long a peer's guest may take.
    pub limit: Option<Duration>,
}

/// What a peer is given to boot: the same as Hearth.
#[derive(Clone, Copy, Debug)]
pub struct Booted<'a> {
    /// Kernel.
    pub kernel: &'a Path,
    /// Initramfs with the agent.
    pub initramfs: &'a Path,
    /// Image of its root file system, for virtio-pmem, if it has one; the words say so.
    pub root: Option<&'a Path>,
    /// Words on the kernel's command line.
    pub words: &'a str,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub vcpus: u8,
    /// How long it may take.
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
    /// It is something else.
    #[error("{} does not say that it is {wanted}, but: {said:?}", program.display())]
    Another {
        /// The program.
        program: PathBuf,
        /// What it should be.
        wanted: &'static str,
        /// What it says.
        said: String,
    },
    /// It ended before its guest was up.
    #[error("it ended before its guest was up ({status}): {said}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// The end of what it said.
        said: String,
    },
    /// Its guest was not up in time.
    #[error("its guest was not up after {0:?}")]
    Silent(Duration),
    /// Its guest hung up.
    #[error("its guest closed the connection before it answered")]
    HungUp,
    /// Its guest is not the one that it was given.
    #[error("it does not show the guest that it was given: {0}")]
    Lies(String),
    /// It refused what it was asked for.
    #[error("it refused {what}: {said}")]
    Refused {
        /// What it was asked.
        what: String,
        /// Its answer.
        said: String,
    },
    /// It could not be reached.
    #[error("it cannot be talked to")]
    Io(#[from] std::io::Error),
}

/// The first line of what `program --version` says, which must begin with `wanted`.
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

/// A process of a peer's, which ends with its handle.
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

/// The error of a process that ended too early.
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

/// The beginning of what a process complained of. What it started may hold its error output open.
async fn tail(stderr: ChildStderr) -> String {
    let mut said = Vec::new();
    let mut stderr = stderr.take(TAIL);
    let read = stderr.read_to_end(&mut said);
    let _ = tokio::time::timeout(Duration::from_millis(200), read).await;
    String::from_utf8_lossy(&said).trim().replace('\n', "; ")
}
