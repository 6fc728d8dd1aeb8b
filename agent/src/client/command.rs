//! A program to run in a guest.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_bytes::ByteBuf;

use crate::proto::{
    Account, Exec, Input, Leftover, Limits, MAX_LINGER_MS, OutputMode, User, WallClock, WindowSize,
};

/// A program to run in a guest, built like `std::process::Command`.
///
/// Defaults: environment PATH and HOME, working directory `/`, no stdin, separate outputs, no
/// timeout, 2 s of grace, 500 ms of linger, the agent's user, no limits, no privileges beyond those
/// of its user.
#[derive(Clone, Debug)]
#[must_use]
pub struct Command {
    pub(super) exec: Exec,
    pub(super) host_margin: Duration,
}

impl Command {
    /// Returns a command that runs `program`, which is searched in the guest's PATH unless it has a
    /// slash.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let exec = Exec {
            argv: vec![bytes(program)],
            grace_ms: 2_000,
            linger_ms: 500,
            ..Exec::default()
        };
        Self {
            exec,
            host_margin: Duration::from_secs(30),
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.exec.argv.push(bytes(arg));
        self
    }

    /// Adds arguments.
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.exec.argv.extend(args.into_iter().map(bytes));
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.exec.env.push((bytes(key), bytes(value)));
        self
    }

    /// Sets an environment variable, unless it is set already or [`env_clear`](Self::env_clear) was
    /// called.
    pub fn env_default(self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        let name = bytes(&key);
        if self.exec.clear_env || self.exec.env.iter().any(|(known, _)| *known == name) {
            return self;
        }
        self.env(key, value)
    }

    /// Starts from an empty environment.
    pub fn env_clear(mut self) -> Self {
        self.exec.env.clear();
        self.exec.clear_env = true;
        self
    }

    /// Sets the working directory, a path in the guest.
    pub fn current_dir(mut self, dir: impl AsRef<OsStr>) -> Self {
        self.exec.cwd = Some(bytes(dir));
        self
    }

    /// Sets where stdin comes from.
    pub fn stdin(mut self, input: Input) -> Self {
        self.exec.stdin = input;
        self
    }

    /// Sets whether stdout and stderr are one stream.
    pub fn output_mode(mut self, mode: OutputMode) -> Self {
        self.exec.output = mode;
        self
    }

    /// Gives the program a terminal of this size as its stdin, stdout and stderr; its output is
    /// reported as stdout. Bytes written to its stdin count as typed: control characters take
    /// effect, and input is echoed. The end of input is typed, too. TERM is `xterm` unless
    /// [`env`](Self::env) sets it or [`env_clear`](Self::env_clear) removes it.
    pub fn terminal(mut self, size: WindowSize) -> Self {
        self.exec.terminal = Some(size);
        self.exec.stdin = Input::Pipe;
        self
    }

    /// Gives the program a third output, on descriptor 3.
    pub(super) fn results(mut self) -> Self {
        self.exec.results = true;
        self
    }

    /// Ends the program after this time: SIGTERM to its process group, then, after
    /// [`grace`](Self::grace), SIGKILL to the program and all that it started. Rounded up to whole
    /// milliseconds.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.exec.timeout_ms =
            Some(u64::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX));
        self
    }

    /// Sets the time between SIGTERM and SIGKILL, up to 49 days.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.exec.grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self
    }

    /// Sets how long to wait for the end of output while processes that outlive the program hold it
    /// open, up to one minute.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.exec.linger_ms = u32::try_from(linger.as_millis())
            .unwrap_or(u32::MAX)
            .min(MAX_LINGER_MS);
        self
    }

    /// Sets what happens to processes that outlive the program.
    pub fn leftover(mut self, leftover: Leftover) -> Self {
        self.exec.leftover = leftover;
        self
    }

    /// Runs the program as the user with these ids.
    pub fn user(self, user: User) -> Self {
        self.account(Account::Ids(user))
    }

    /// Runs the program as the user of this name in the guest's `/etc/passwd`, with HOME, USER and
    /// LOGNAME set, and in the user's home directory. `root` always exists.
    pub fn user_name(self, name: impl AsRef<OsStr>) -> Self {
        self.account(Account::Name(bytes(name)))
    }

    /// Runs the program as the default user of the guest's image: `user`, if its `/etc/passwd` has
    /// one, and root otherwise.
    pub fn usual_user(self) -> Self {
        self.account(Account::Usual)
    }

    /// Runs the program as this account.
    pub fn account(mut self, account: Account) -> Self {
        self.exec.user = Some(account);
        self
    }

    /// Lets a program of a user other than root gain privileges by executing a file, as `sudo`
    /// does. Without this, set-user-id programs and files with capabilities run with the rights of
    /// the user that starts them.
    pub fn allow_new_privileges(mut self) -> Self {
        self.exec.new_privileges = true;
        self
    }

    /// Limits the program's resources.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.exec.limits = limits;
        self
    }

    /// Sends the host's time to the guest. The guest's wall clock is set to it before the program
    /// starts if the clock is behind, or ahead by more than 2 s. Times before 1970 are sent as
    /// 1970.
    pub fn wall_clock(mut self, now: SystemTime) -> Self {
        self.exec.wall_clock = Some(now.into());
        self
    }

    /// Sets how late the guest may report the end of a program that has a
    /// [`timeout`](Self::timeout) before the host gives up with
    /// [`Overdue`](super::ExecError::Overdue). Default 30 s.
    pub fn host_margin(mut self, margin: Duration) -> Self {
        self.host_margin = margin;
        self
    }

    /// Returns the time from the program's start within which the guest must report its end; none
    /// without a timeout.
    pub(super) fn guest_bound(&self) -> Option<Duration> {
        let timeout = Duration::from_millis(self.exec.timeout_ms?);
        let rest = u64::from(self.exec.grace_ms) + u64::from(self.exec.linger_ms);
        timeout.checked_add(Duration::from_millis(rest))
    }
}

impl From<SystemTime> for WallClock {
    fn from(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            since_epoch_ns: u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX),
        }
    }
}

fn bytes(text: impl AsRef<OsStr>) -> ByteBuf {
    ByteBuf::from(text.as_ref().as_bytes())
}
