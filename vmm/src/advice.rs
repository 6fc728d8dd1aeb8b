//! Advice on limits of the host, chosen by the error that the limit causes.

use std::io;

/// Returns the advice to append to a message about `error`.
pub(crate) fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "; raise ulimit -n",
        Some(libc::ENFILE) => "; raise sysctl fs.file-max",
        Some(libc::EAGAIN) => "; check ulimit -u and pids.max (systemd: TasksMax)",
        Some(libc::ENOMEM) => "; check ulimit -v and the memory that is free to this process",
        Some(libc::EFBIG) => "; raise ulimit -f",
        _ => "",
    }
}
