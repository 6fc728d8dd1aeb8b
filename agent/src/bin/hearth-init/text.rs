//! Unbuffered standard output and error.

use alloc::vec::Vec;
use core::fmt;

use rustix::{
    fd::BorrowedFd,
    io::{Errno, write},
};

use crate::sys::{stderr, stdout};

/// Writes all bytes.
pub(crate) fn put(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match write(to, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Writes a line to standard output, in one piece.
pub(crate) fn say(line: impl AsRef<[u8]>) -> Result<(), Errno> {
    let line = [line.as_ref(), b"\n"].concat();
    put(stdout(), &line)
}

/// Standard error, for formatted text.
#[derive(Debug)]
pub(crate) struct Stderr;

impl fmt::Write for Stderr {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        put(stderr(), text.as_bytes()).map_err(|_| fmt::Error)
    }
}

/// Joins words with a separator byte.
pub(crate) fn joined(words: &[Vec<u8>], with: u8) -> Vec<u8> {
    words.join(&with)
}
