//! The languages of sessions, and the driver programs that run their code.

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

/// Compiles the driver under a file name of its own, by which it recognises its frames in
/// tracebacks, and removes its source from the arguments.
const PYTHON_LOADER: &str =
    r#"import sys; exec(compile(sys.argv.pop(), "<hearth>", "exec"), {"__name__": "hearth"})"#;

impl Language {
    /// All languages.
    pub const ALL: [Self; 3] = [Self::Python, Self::Javascript, Self::Shell];

    /// Returns the driver: the program that sessions of this language run in the guest.
    #[must_use]
    pub fn driver(self) -> &'static str {
        match self {
            Self::Python => include_str!("driver.py"),
            Self::Javascript => include_str!("driver.js"),
            Self::Shell => include_str!("driver.sh"),
        }
    }

    /// Returns whether the interpreter that `command` starts can miss an interrupt. Bash can while
    /// it starts a program: it first waits for that program, which did not get the signal. The
    /// other interpreters are interrupted once only, so that their code's clean-up is not
    /// disturbed.
    pub(super) fn misses_interrupts(command: &Command) -> bool {
        command
            .exec
            .argv
            .first()
            .is_some_and(|name| *name == "bash")
    }

    /// Returns a command that starts the interpreter with the driver, as the default user of the
    /// guest's image. The caller may refine it, for example by an environment or limits.
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
