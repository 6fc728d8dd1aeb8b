//! The terminal of a program that was given one: a pseudo-terminal, whose other end is ours.

use alloc::vec::Vec;

use hearth_agent::proto::WindowSize;
use rustix::{
    fd::{BorrowedFd, OwnedFd},
    fs::{OFlags, fchown, fcntl_setfl},
    io::Errno,
    process::Uid,
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize},
};

/// More than the kernel holds of what was written to a terminal and not read.
pub(crate) const MOST_HELD: usize = 16 << 10;

/// Makes a terminal: our end, which never blocks, and the program's, which belongs to the user whom
/// it runs as.
pub(crate) fn open(size: WindowSize, owner: Option<Uid>) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    unlockpt(&ours)?;
    // Not by its path: a root file system of the user's may have anything there.
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    if owner.is_some() {
        fchown(&theirs, owner, None)?;
    }
    resize(&ours, size)?;
    Ok((ours, theirs))
}

/// Sets the size; what runs in the foreground gets SIGWINCH.
pub(crate) fn resize(terminal: impl rustix::fd::AsFd, size: WindowSize) -> Result<(), Errno> {
    tcsetwinsize(
        terminal,
        Winsize {
            ws_row: size.rows,
            ws_col: size.columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )
}

/// What is to be typed so that the program sees the end of its input. In a line that was begun, the
/// first such character only hands over the line; a program that reads keys and not lines gets the
/// character itself.
pub(crate) fn end_of_input(terminal: BorrowedFd<'_>, line_begun: bool) -> Vec<u8> {
    let Ok(modes) = tcgetattr(terminal) else {
        return Vec::new();
    };
    let twice = line_begun && modes.local_modes.contains(LocalModes::ICANON);
    let character = modes.special_codes[SpecialCodeIndex::VEOF];
    // Zero: it was switched off.
    let count = if character == 0 {
        0
    } else {
        1 + usize::from(twice)
    };
    alloc::vec![character; count]
}
