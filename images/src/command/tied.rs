//! Programs that end with the process that started them. The one unsafe call of this crate.

use std::io::ErrorKind;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// A program of a build that is killed is killed, too, instead of working on for nobody. What it
/// has started itself finds nobody who reads its output.
pub(super) fn end_with_us(command: &mut Command) {
    let us = getpid();
    let tie = move || {
        // Sent when the thread ends that started it, which waits for it.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // We may have ended before that.
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
