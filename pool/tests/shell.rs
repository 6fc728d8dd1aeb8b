//! `hearth shell` from the view of a user at a terminal: a real terminal pair, a real guest.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hearth_tests::{kvm, not_measured, shell_root};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};

/// Timeout, longer than a boot takes on any host.
const PATIENCE: Duration = Duration::from_secs(120);

/// A terminal, and the command that runs on it.
struct Seat {
    keyboard: File,
    terminal: OwnedFd,
    screen: Arc<Mutex<String>>,
    before: Termios,
    child: Child,
}

impl Seat {
    /// Runs the command as a shell does: it leads a session that the terminal controls. `None`
    /// where that is not possible.
    fn take(args: &[&str], size: (u16, u16)) -> Option<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = openpt(flags).unwrap();
        unlockpt(&ours).unwrap();
        let terminal = ioctl_tiocgptpeer(&ours, flags).unwrap();
        resize(&terminal, size);
        let stdio = || Stdio::from(terminal.try_clone().unwrap());
        let child = Command::new("setsid")
            .args(["--ctty", "--wait", env!("CARGO_BIN_EXE_hearth")])
            .args(args)
            .env("TERM", "vt100")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn();
        let Ok(child) = child else {
            not_measured("no setsid to give a command a terminal of its own");
            return None;
        };
        let before = tcgetattr(&terminal).unwrap();
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut shown, kept) = (File::from(ours.try_clone().unwrap()), screen.clone());
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = shown.read(&mut chunk) {
                let text = String::from_utf8_lossy(&chunk[..count]);
                kept.lock().unwrap().push_str(&text);
            }
        });
        Some(Self {
            keyboard: ours.into(),
            terminal,
            screen,
            before,
            child,
        })
    }

    fn types(&mut self, keys: &str) {
        self.screen.lock().unwrap().clear();
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until the screen shows `text`, since the last keys; returns the screen.
    fn sees(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.screen.lock().unwrap().clone();
            if shown.contains(text) {
                return shown;
            }
            assert!(Instant::now() < deadline, "{shown:?} and no {text:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn modes(&self) -> LocalModes {
        tcgetattr(&self.terminal).unwrap().local_modes
    }

    /// Waits for the command's end, at which the terminal must be as it was before.
    fn leaves(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "{:?}", self.screen.lock());
            std::thread::sleep(Duration::from_millis(20));
        };
        let after = tcgetattr(&self.terminal).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        assert_eq!(after.input_modes, self.before.input_modes);
        assert_eq!(after.output_modes, self.before.output_modes);
        status
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn resize(terminal: &OwnedFd, (rows, columns): (u16, u16)) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

#[test]
fn somebody_types_to_a_shell_in_a_guest() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let passwd = [("etc/passwd", "user:x:1000:1000::/home/user:/bin/sh\n")];
    let Some(image) = shell_root(dir.path(), &["/usr/bin/stty"], &passwd) else {
        return;
    };
    let args = ["shell", "--root", image.to_str().unwrap()];
    let Some(mut seat) = Seat::take(&args, (30, 100)) else {
        return;
    };
    seat.sees("$ ");
    // Keys go to the guest unprocessed.
    assert!(
        !seat
            .modes()
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    );
    seat.types("pwd; stty size; echo $TERM-$((6 * 7))\r");
    let shown = seat.sees("vt100-42");
    assert!(shown.contains("\n/home/user\r\n30 100\r"), "{shown:?}");
    // The window's new size.
    resize(&seat.terminal, (40, 120));
    let deadline = Instant::now() + PATIENCE;
    loop {
        seat.types("stty size; echo $((6 * 8))\r");
        if seat.sees("48").contains("\n40 120\r") {
            break;
        }
        assert!(Instant::now() < deadline, "{:?}", seat.screen.lock());
    }
    // Ctrl-C ends the program that runs in the guest, but neither the shell nor this command.
    seat.types("echo be''gun; while :; do :; done\r");
    seat.sees("begun");
    seat.types("\x03");
    seat.sees("$ ");
    seat.types("echo code-$?\r");
    seat.sees("code-130");
    seat.types("exit 7\r");
    assert_eq!(seat.leaves().code(), Some(7));
}

#[test]
fn a_signal_ends_the_guest_and_leaves_the_terminal_as_it_was() {
    if !kvm() {
        return;
    }
    let Some(mut seat) = Seat::take(&["shell", "--", "cat"], (24, 80)) else {
        return;
    };
    let deadline = Instant::now() + PATIENCE;
    while seat.modes().contains(LocalModes::ICANON) {
        assert!(Instant::now() < deadline, "{:?}", seat.screen.lock());
        std::thread::sleep(Duration::from_millis(20));
    }
    seat.types("to the cat\r");
    seat.sees("to the cat\r\nto the cat\r\n");
    let command = Pid::from_child(&seat.child);
    kill_process(command, Signal::TERM).unwrap();
    assert_eq!(seat.leaves().code(), Some(143));
}

#[test]
fn without_a_terminal_or_a_shell_it_says_what_to_do() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    let output = command.arg("shell").stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("hearth run -- sh -c"), "{said}");

    let Some(mut seat) = Seat::take(&["shell"], (24, 80)) else {
        return;
    };
    assert_eq!(seat.leaves().code(), Some(127));
    seat.sees("--image shell");
}
