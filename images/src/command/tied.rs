//! Ties programs to the process that starts them: they end with it.

use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Kills the program when the process of the build is killed, as its work is then useless. Children
/// of the program are not killed, but their output is no longer read.
pub(super) fn end_with_us(command: &mut Command) {
    let us = getpid();
    let tie = move || {
        // The signal is sent when the thread that started the program ends. That thread
        // waits for the program.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The process of the build may have ended before this call.
        match getppid() == Some(us) {
            true => Ok(()),
            false => Err(ErrorKind::BrokenPipe.into()),
        }
    };
    // SAFETY: between fork and exec it makes two system calls, touches its own copy of a number,
    // and allocates nothing.
    unsafe {
        command.pre_exec(tie);
    }
}
