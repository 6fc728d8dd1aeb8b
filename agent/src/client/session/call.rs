//! A piece of code, and its outcome.

use std::time::Duration;

use super::{super::OutputLimits, answer::Answer, answer::Kind};
use crate::proto::ExitStatus;

/// A piece of code for a session.
#[derive(Clone, Debug)]
#[must_use]
pub struct Call {
    pub(super) code: String,
    pub(super) timeout: Option<Duration>,
    pub(super) grace: Duration,
    pub(super) limits: OutputLimits,
}

impl Call {
    /// Returns a call of `code` with no timeout, 5 s of grace, and at most 16 MiB of output kept
    /// per stream.
    pub fn new(code: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            timeout: None,
            grace: Duration::from_secs(5),
            limits: OutputLimits::default(),
        }
    }

    /// Interrupts the code after this time, as Ctrl-C does.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets how long interrupted code may take to end before its interpreter is killed.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Sets how much output is kept.
    pub fn limits(mut self, limits: OutputLimits) -> Self {
        self.limits = limits;
        self
    }
}

impl<T: Into<String>> From<T> for Call {
    fn from(code: T) -> Self {
        Self::new(code)
    }
}

/// An output of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallEnd {
    /// The code has no value: a statement, `None`, `undefined`.
    Nothing,
    /// The code's value, as the language displays it (`repr`, `util.inspect`); in a shell, its exit
    /// code.
    Value(String),
    /// The code failed: the traceback or the stack.
    Error(String),
    /// The interpreter ended, and all state is lost.
    Exited(ExitStatus),
}

impl From<Answer> for CallEnd {
    fn from(Answer { kind, text, .. }: Answer) -> Self {
        match kind {
            Kind::Nothing => Self::Nothing,
            Kind::Value => Self::Value(text),
            Kind::Error => Self::Error(text),
        }
    }
}

/// The outcome of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// How it ended.
    pub end: CallEnd,
    /// The number of bytes of its value or error beyond 1 MiB, which were cut off.
    pub end_cut: u64,
    /// Whether its timeout ended it.
    pub timed_out: bool,
    /// Whether it ran in a new interpreter, without the state of earlier calls, because the old
    /// one had ended.
    pub restarted: bool,
    /// The first bytes that it printed, up to the limit. They include what threads of earlier
    /// calls print meanwhile.
    pub stdout: Vec<u8>,
    /// The number of bytes of standard output beyond the limit.
    pub stdout_cut: u64,
    /// The first bytes of its error output, up to the limit.
    pub stderr: Vec<u8>,
    /// The number of bytes of error output beyond the limit.
    pub stderr_cut: u64,
}

/// Output that is kept up to a limit; bytes beyond it are counted.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) bytes: Vec<u8>,
    pub(super) cut: u64,
    limit: usize,
}

impl Kept {
    pub(super) fn new(limit: usize) -> Self {
        let bytes = Vec::new();
        Self {
            bytes,
            cut: 0,
            limit,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = self.limit.saturating_sub(self.bytes.len());
        let (kept, rest) = bytes.split_at(room.min(bytes.len()));
        self.bytes.extend_from_slice(kept);
        self.cut = self.cut.saturating_add(rest.len() as u64);
    }
}
