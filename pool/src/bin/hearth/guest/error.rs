//! Reasons why the end of a program is not known.

use std::path::PathBuf;
use std::time::Duration;

use hearth_agent::client::{ExecError, HandshakeError};
use hearth_agent::proto::SpawnFailure;
use hearth_images::{ImagesError, RecipeError};
use hearth_vmm::virtio::vsock::ListenError;
use hearth_vmm::{BootError, ConfigError, Exit, HostError, LoadError};

use super::copies::CopyError;
use crate::FAILED;
use crate::machine::DoesNotFit;
use crate::runtime::RuntimeError;

/// The guest has the program, but cannot execute it; `env` uses the same code.
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
    Memory(#[from] DoesNotFit),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the guest could not be started")]
    Boot(#[from] BootError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
    #[error(
        "there is nothing to run: give code (--lang python 'print(1)'), a file (script.py) or, after --, a program of the guest"
    )]
    NoProgram,
    #[error(
        "{path}: its language is not known; its name should end in .py, .js or .sh, or give --lang and the code itself or \
         stdin. A program of the guest goes after two dashes: hearth run -- {path}", path = .0.display()
    )]
    NoLanguage(PathBuf),
    #[error("{name}: the code cannot be read")]
    Code {
        name: String,
        source: std::io::Error,
    },
    #[error(
        "the guest has no {interpreter} to run the code: image {image} has it (--image {image})"
    )]
    NoInterpreter {
        interpreter: &'static str,
        image: &'static str,
    },
    #[error("--layer is for guests with a root file system: --image python, say, or --root")]
    NoRoot,
    #[error("--package is for images with Python: --image python")]
    NoPackages,
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(
        "stdin is no terminal, and a shell is for somebody who types: for a script there is hearth run -- sh -c ..."
    )]
    NoTerminal,
    #[error(
        "the guest has no /bin/sh: choose an image that has one (--image shell), or a root file system (--root), or name a \
         program after --"
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

/// The exit code for a program that could not be started, or whose end was not reported.
pub(super) fn exec_code(error: &ExecError) -> u8 {
    match error {
        ExecError::Failed(SpawnFailure::NotFound { .. }) => NOT_FOUND,
        ExecError::Failed(
            SpawnFailure::NotExecutable { .. } | SpawnFailure::MissingInterpreter { .. },
        ) => NOT_EXECUTABLE,
        _ => FAILED,
    }
}
