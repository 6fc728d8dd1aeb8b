//! The terminal of a program that requested one: a pseudo-terminal, the master of which is the
//! agent's.

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

/// An upper bound of the unread bytes that the kernel holds for a terminal.
pub(crate) const MOST_HELD: usize = 16 << 10;

/// Makes a terminal: the agent's end, which never blocks, and the program's, which belongs to the
/// program's user.
pub(crate) fn open(size: WindowSize, owner: Option<Uid>) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = openpt(flags)?;
    unlockpt(&ours)?;
    // Not opened by path: a root file system of the user's may have any file there.
    let theirs = ioctl_tiocgptpeer(&ours, flags)?;
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    if owner.is_some() {
        fchown(&theirs, owner, None)?;
    }
    resize(&ours, size)?;
    Ok((ours, theirs))
}

/// Sets the size; the foreground process group gets SIGWINCH.
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

/// Returns the characters to write so that the program sees the end of its input. After the
/// beginning of a line, the first end-of-file character only submits that line, so a second
/// follows; a program that reads keys, not lines, gets the character itself.
pub(crate) fn end_of_input(terminal: BorrowedFd<'_>, line_begun: bool) -> Vec<u8> {
    let Ok(modes) = tcgetattr(terminal) else {
        return Vec::new();
    };
    let twice = line_begun && modes.local_modes.contains(LocalModes::ICANON);
    let character = modes.special_codes[SpecialCodeIndex::VEOF];
    // Zero: the character is disabled.
    let count = if character == 0 {
        0
    } else {
        1 + usize::from(twice)
    };
    alloc::vec![character; count]
}
