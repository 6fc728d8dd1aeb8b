//! How the command reports failures.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use crate::FAILED;

/// The advice where the host's file size limit stops a write.
const FILE_LIMIT: &str = "ulimit -f";

/// Formats an error with all its causes on one line. Causes that the text before already ends with
/// are left out.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    let mut at_file_limit = false;
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.ends_with(&said) {
            text = format!("{text}: {said}");
        }
        let kind = error.downcast_ref().map(io::Error::kind);
        at_file_limit |= kind == Some(io::ErrorKind::FileTooLarge);
        cause = error.source();
    }
    if at_file_limit && !text.contains(FILE_LIMIT) {
        text = format!("{text}; raise {FILE_LIMIT}");
    }
    text
}

/// Prints the error and returns the exit code for it.
pub(crate) fn failed(error: &dyn Error) -> ExitCode {
    eprintln!("hearth: {}", chain(error));
    ExitCode::from(FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Sample {
        #[error("outer")]
        Outer(#[source] std::io::Error),
        #[error("says all: {0}")]
        Repeats(#[source] std::io::Error),
    }

    #[test]
    fn each_cause_is_said_once() {
        let cause = || std::io::Error::other("inner");
        assert_eq!(chain(&Sample::Outer(cause())), "outer: inner");
        assert_eq!(chain(&Sample::Repeats(cause())), "says all: inner");
    }

    #[test]
    fn a_file_that_may_not_grow_is_said_with_the_limit() {
        let text = chain(&Sample::Outer(io::ErrorKind::FileTooLarge.into()));
        assert!(text.ends_with("; raise ulimit -f"), "{text}");
    }
}
