//! Why the end of a program is not known.

use std::time::Duration;

use hearth_agent::client::{ExecError, HandshakeError};
use hearth_agent::proto::SpawnFailure;
use hearth_images::ImagesError;
use hearth_vmm::virtio::vsock::ListenError;
use hearth_vmm::{BootError, ConfigError, Exit, HostError, LoadError};

use super::copies::CopyError;
use crate::FAILED;

/// The guest has the program, but cannot execute it; as `env` has it.
const NOT_EXECUTABLE: u8 = 126;
/// The guest has no such program.
pub(super) const NOT_FOUND: u8 = 127;

#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Images(#[from] ImagesError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the guest could not be started")]
    Boot(#[from] BootError),
    #[error("cannot start the event loop")]
    Runtime(#[source] std::io::Error),
    #[error("name a program after --")]
    NoProgram,
    #[error(
        "stdin is no terminal, and a shell is for somebody who types: for a script there is hearth run -- sh -c ..."
    )]
    NoTerminal,
    #[error(
        "the guest has no /bin/sh: give it a root file system that has one (--root; hearth image import makes one), or name \
         a program after --"
    )]
    NoShell,
    #[error("the terminal cannot be set up")]
    Terminal(#[source] std::io::Error),
    #[error("cannot wait for the guest's agent")]
    Listen(#[from] ListenError),
    #[error("{exit} {when}{}", hint(*.console))]
    Ended {
        exit: Exit,
        when: &'static str,
        console: bool,
    },
    #[error("the guest's agent did not answer within {waited:?} of the boot{}", hint(*.console))]
    NotUp { waited: Duration, console: bool },
    #[error("the guest's agent did not greet as it should")]
    Handshake(#[from] HandshakeError),
    #[error("the guest did not end the program within {0:?} of its time limit")]
    Overdue(Duration),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error("a file could not be copied")]
    Copy(#[from] CopyError),
    #[error("the guest was ended by signal {0}")]
    Signal(u8),
}

fn hint(console: bool) -> &'static str {
    if console {
        "; see its console above"
    } else {
        "; run it with --console to see what it says"
    }
}

/// The exit code for a program that could not be started, or whose end did not come.
pub(super) fn exec_code(error: &ExecError) -> u8 {
    match error {
        ExecError::Failed(SpawnFailure::NotFound { .. }) => NOT_FOUND,
        ExecError::Failed(
            SpawnFailure::NotExecutable { .. } | SpawnFailure::MissingInterpreter { .. },
        ) => NOT_EXECUTABLE,
        _ => FAILED,
    }
}
