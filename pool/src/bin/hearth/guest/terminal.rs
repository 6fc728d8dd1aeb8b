//! This process's terminal, while a program in a guest uses it.

use std::io::{self, IsTerminal};

use hearth_agent::proto::WindowSize;
use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// Whether stdin is a terminal.
pub(crate) fn is_there() -> bool {
    io::stdin().is_terminal()
}

/// The terminal's size; the default where it is not known.
pub(crate) fn size() -> WindowSize {
    tcgetwinsize(stdin()).map_or(WindowSize::default(), |size| WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Passes on every key unchanged, control characters included, until it is dropped.
pub(super) struct Raw {
    before: Termios,
}

impl Raw {
    pub(super) fn enter() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Fails only if the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}
