//! The languages of sessions, and the programs that run their code.

use super::super::Command;
use crate::proto::{Input, Leftover};

/// A language that code can be run in, call by call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Language {
    /// CPython 3.8 or newer, `python3` in the guest.
    Python,
    /// Node.js 18 or newer, `node` in the guest.
    Javascript,
    /// Bash 4.1 or newer, `bash` in the guest.
    Shell,
}

/// Gives the driver a file name of its own, by which it finds its frames in tracebacks, and hides
/// it from the arguments.
const PYTHON_LOADER: &str =
    r#"import sys; exec(compile(sys.argv.pop(), "<hearth>", "exec"), {"__name__": "hearth"})"#;

impl Language {
    /// All languages.
    pub const ALL: [Self; 3] = [Self::Python, Self::Javascript, Self::Shell];

    /// The program in the guest that sessions of this language run.
    #[must_use]
    pub fn driver(self) -> &'static str {
        match self {
            Self::Python => include_str!("driver.py"),
            Self::Javascript => include_str!("driver.js"),
            Self::Shell => include_str!("driver.sh"),
        }
    }

    /// Whether the interpreter that `command` starts can miss an interrupt. Bash does while it
    /// starts a program: it waits for that first, which has not been told. The others are told
    /// once, so that code may clean up in peace.
    pub(super) fn misses_interrupts(command: &Command) -> bool {
        command
            .exec
            .argv
            .first()
            .is_some_and(|name| *name == "bash")
    }

    /// Starts an interpreter with that program, as the user whom the guest's image is made for. To
    /// be refined: by an environment or limits, say.
    pub fn command(self) -> Command {
        let command = match self {
            Self::Python => Command::new("python3").args(["-c", PYTHON_LOADER, self.driver()]),
            Self::Javascript => Command::new("node").args(["-e", self.driver()]),
            Self::Shell => Command::new("bash").args(["-c", self.driver(), "shell"]),
        };
        command
            .usual_user()
            .stdin(Input::Pipe)
            .results()
            .leftover(Leftover::Kill)
    }
}
