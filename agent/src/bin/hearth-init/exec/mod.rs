//! A running program: its pipes, its time limit and its end.
//!
//! ```text
//! starting --- child executed it ---> running --- main process reaped ---> draining ---> ended
//! ```
//!
//! - **running.** When its time limit is over: SIGTERM, a grace period, SIGKILL.
//! - **draining.** Ends when all outputs are closed. When the linger time is over, what the pipes
//!   hold is read, and they are closed.
//!
//! The time limit runs from the start of the child and ends the request whatever the program does:
//! a program that was killed but cannot be reaped, as another program traces it, counts as dead
//! after [`REAPING`].

mod stdin;
mod stream;

use alloc::{vec, vec::Vec};
use core::time::Duration;

use hearth_agent::proto::{
    Exec, ExitStatus, Exited, FrameError, Leftover, MAX_CHUNK, OutputEnd, Rejection, Response,
    Usage, WindowSize,
};
use rustix::{
    fd::{BorrowedFd, OwnedFd},
    io::{Errno, read},
    process::Pid,
};

use self::{stdin::Stdin, stream::Stream};
use crate::{
    cgroup::Cgroup,
    channel::Output,
    clock::Instant,
    kill::{KILL, TERM, kill_tree},
    reaper::Reaped,
    spawn::{NotStarted, Start},
    sys, terminal,
};

/// Reads from one pipe before other events are handled.
const READS: usize = 4;
/// Time from SIGKILL until a program that was not reaped counts as dead.
const REAPING: Duration = Duration::from_secs(1);

/// The agent's ends of a program's pipes; none of them blocks.
#[derive(Debug)]
pub(crate) struct Pipes {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: OwnedFd,
    /// `None` if stderr goes to stdout.
    pub(crate) stderr: Option<OwnedFd>,
    /// The third output, of a program that has one.
    pub(crate) results: Option<OwnedFd>,
    /// Whether stdin and stdout are a terminal.
    pub(crate) terminal: bool,
}

/// A running program.
#[derive(Debug)]
pub(crate) struct Program {
    pid: Pid,
    /// The start of the program, until it runs.
    start: Option<Start>,
    began: Instant,
    stdin: Stdin,
    stdout: Stream,
    stderr: Stream,
    results: Stream,
    terminal: bool,
    timeout: Timeout,
    linger: Duration,
    leftover: Leftover,
    cgroup: Option<Cgroup>,
    exit: Option<Exit>,
}

/// The outputs of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Stdout,
    Stderr,
    Results,
}

impl Which {
    pub(crate) const ALL: [Self; 3] = [Self::Stdout, Self::Stderr, Self::Results];

    fn response(self, data: &[u8]) -> Response<'_> {
        match self {
            Self::Stdout => Response::Stdout(data),
            Self::Stderr => Response::Stderr(data),
            Self::Results => Response::Results(data),
        }
    }
}

#[derive(Debug)]
enum Timeout {
    Never,
    Running {
        term_at: Instant,
        grace: Duration,
    },
    Terminated {
        kill_at: Instant,
    },
    /// After SIGKILL. From `lost_at` on, the program counts as dead even if it was not reaped;
    /// `None`: never, as a time overflowed.
    Killed {
        lost_at: Option<Instant>,
    },
}

#[derive(Debug)]
struct Exit {
    status: ExitStatus,
    usage: Usage,
    give_up_at: Instant,
}

impl Program {
    pub(crate) fn new(
        exec: &Exec,
        start: Start,
        now: Instant,
        pipes: Pipes,
        cgroup: Option<Cgroup>,
    ) -> Self {
        let term_at = exec
            .timeout_ms
            .and_then(|ms| now.checked_add(Duration::from_millis(ms)));
        let grace = Duration::from_millis(exec.grace_ms.into());
        Self {
            pid: start.pid(),
            start: Some(start),
            began: now,
            stdin: Stdin::new(pipes.stdin, pipes.terminal),
            stdout: Stream::Open(pipes.stdout),
            stderr: Stream::of(pipes.stderr),
            results: Stream::of(pipes.results),
            terminal: pipes.terminal,
            timeout: term_at.map_or(Timeout::Never, |term_at| Timeout::Running {
                term_at,
                grace,
            }),
            linger: Duration::from_millis(exec.linger_ms.into()),
            leftover: exec.leftover,
            cgroup,
            exit: None,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }

    /// Returns the descriptor to wait for until the program runs. It hangs up then.
    pub(crate) fn waits_to_run(&self) -> Option<BorrowedFd<'_>> {
        self.start.as_ref().map(Start::waits_for)
    }

    /// Handles the hang-up of the descriptor of [`waits_to_run`](Self::waits_to_run); returns
    /// whether the program was started.
    pub(crate) fn runs(&mut self) -> Option<Result<(), NotStarted>> {
        let mut start = self.start.take()?;
        start.gone();
        Some(start.end())
    }

    /// Returns the descriptors to wait for once the program runs: stdin only while input is
    /// buffered, outputs only while the connection has room.
    pub(crate) fn waits_for(
        &self,
        room: bool,
    ) -> (Option<BorrowedFd<'_>>, [Option<BorrowedFd<'_>>; 3]) {
        if self.start.is_some() {
            return (None, [None; 3]);
        }
        let outputs = Which::ALL.map(|which| self.stream(which).pipe().filter(|_| room));
        (self.stdin.waits_for(), outputs)
    }

    fn stream(&self, which: Which) -> &Stream {
        match which {
            Which::Stdout => &self.stdout,
            Which::Stderr => &self.stderr,
            Which::Results => &self.results,
        }
    }

    /// Takes input, and buffers it where the program has no room for it.
    pub(crate) fn input(&mut self, bytes: &[u8], out: &mut Output) -> Result<(), Rejection> {
        self.stdin.take(bytes, out)
    }

    /// Ends the input once all of it is written.
    pub(crate) fn end_input(&mut self) {
        self.stdin.end();
    }

    /// Writes buffered input and reports the bytes that the program took.
    pub(crate) fn pump_input(&mut self, out: &mut Output) -> Result<(), FrameError> {
        self.stdin.pump(out)
    }

    /// Sets the size of the program's terminal, if it has one.
    pub(crate) fn resize(&self, size: WindowSize) {
        if let Some(terminal) = self.stdout.pipe().filter(|_| self.terminal) {
            let _ = terminal::resize(terminal, size);
        }
    }

    /// Reads available output; `scratch` grows with the output. With `hung_up` (all writers have,
    /// or may have, hung up), one more read is made to see the end. Results are read only after
    /// what was printed before them.
    pub(crate) fn pump_output(
        &mut self,
        which: Which,
        hung_up: bool,
        scratch: &mut Vec<u8>,
        out: &mut Output,
    ) -> Result<(), FrameError> {
        if which == Which::Results {
            for which in [Which::Stdout, Which::Stderr] {
                // Anything beyond this was written later.
                let mut before = self.stream(which).waiting();
                while before > 0 {
                    if !out.has_room() {
                        return Ok(());
                    }
                    match self.read_output(which, false, scratch, out)? {
                        0 => break,
                        count => before = before.saturating_sub(count),
                    }
                }
            }
        }
        self.read_output(which, hung_up, scratch, out).map(drop)
    }

    /// Reads one output and returns the number of bytes read.
    fn read_output(
        &mut self,
        which: Which,
        hung_up: bool,
        scratch: &mut Vec<u8>,
        out: &mut Output,
    ) -> Result<usize, FrameError> {
        let mut total = 0;
        let stream = match which {
            Which::Stdout => &mut self.stdout,
            Which::Stderr => &mut self.stderr,
            Which::Results => &mut self.results,
        };
        for _ in 0..READS {
            let (Some(pipe), true) = (stream.pipe(), out.has_room()) else {
                break;
            };
            let limit = if let Stream::Last { rest, .. } = &*stream {
                *rest
            } else {
                MAX_CHUNK
            };
            let room = scratch.len().min(limit);
            let chunk = scratch.get_mut(..room).unwrap_or_default();
            match read(pipe, &mut *chunk) {
                Ok(0) => {
                    *stream = Stream::Closed {
                        end: OutputEnd::Complete,
                    }
                }
                Ok(count) => {
                    let data = chunk.get(..count).unwrap_or_default();
                    out.push(&which.response(data))?;
                    stream.passed(count);
                    total += count;
                    if count < room && !hung_up {
                        break;
                    }
                    if count == scratch.len() && count < MAX_CHUNK {
                        scratch.resize((count * 4).min(MAX_CHUNK), 0);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    stream.emptied();
                    break;
                }
                // A terminal reports by an error that no process has it open.
                Err(_) if self.terminal && self.exit.is_none() => stream.leave(),
                Err(_) => {
                    *stream = Stream::Closed {
                        end: OutputEnd::Complete,
                    }
                }
            }
        }
        // Input that is typed now is read by no program.
        if self.terminal && self.stdout.pipe().is_none() && self.stdin.close() {
            out.push(&Response::StdinClosed)?;
        }
        Ok(total)
    }

    /// Reads all that the terminal holds, the size of which is not known beforehand, and closes it.
    fn empty_terminal(&mut self, out: &mut Output) -> Result<(), FrameError> {
        if let Stream::Open(terminal) = &self.stdout {
            let mut rest = vec![0; terminal::MOST_HELD];
            while let Ok(count @ 1..) = read(terminal, &mut *rest) {
                out.push(&Response::Stdout(rest.get(..count).unwrap_or_default()))?;
                rest.truncate(rest.len().saturating_sub(count));
            }
            self.stdout = Stream::Closed {
                end: OutputEnd::StillOpen,
            };
        }
        Ok(())
    }

    /// Sends a signal to the program's process group, until the main process is reaped.
    pub(crate) fn signal(&self, signal: u8) {
        if self.exit.is_none() {
            sys::kill_group(self.pid, signal);
        }
    }

    /// Whether `pid` is the program's main process, not yet reaped.
    pub(crate) fn is_main(&self, pid: i32) -> bool {
        pid == self.pid.as_raw_pid() && self.exit.is_none()
    }

    /// Handles the death of the main process.
    pub(crate) fn reaped(&mut self, dead: &Reaped, now: Instant) {
        let wall = now.saturating_duration_since(self.began);
        self.exit = Some(Exit {
            status: dead.status,
            usage: Usage {
                wall_us: u64::try_from(wall.as_micros()).unwrap_or(u64::MAX),
                user_us: dead.user_us,
                system_us: dead.system_us,
                max_rss_kib: dead.max_rss_kib,
            },
            give_up_at: now.checked_add(self.linger).unwrap_or(now),
        });
        self.stdout.attend();
        self.stdin.close();
        if self.leftover == Leftover::Kill || self.is_timed_out() {
            self.kill_all();
        }
    }

    fn is_timed_out(&self) -> bool {
        matches!(
            self.timeout,
            Timeout::Terminated { .. } | Timeout::Killed { .. }
        )
    }

    /// Does what is due at `now`: signals of the time limit, and the end of the linger time.
    pub(crate) fn tick(&mut self, now: Instant, out: &mut Output) -> Result<(), FrameError> {
        match (&self.exit, &self.timeout) {
            (Some(exit), _) if now >= exit.give_up_at && self.terminal => {
                self.empty_terminal(out)?;
            }
            (Some(exit), _) if now >= exit.give_up_at => {
                self.stdout.give_up();
                self.stderr.give_up();
                self.results.give_up();
            }
            (None, Timeout::Running { term_at, grace }) if now >= *term_at => {
                self.timeout = match now.checked_add(*grace) {
                    Some(kill_at) => Timeout::Terminated { kill_at },
                    None => Timeout::Killed { lost_at: None },
                };
                sys::kill_group(self.pid, TERM);
            }
            (None, Timeout::Terminated { kill_at }) if now >= *kill_at => {
                self.timeout = Timeout::Killed {
                    lost_at: now.checked_add(REAPING),
                };
                self.kill_all();
            }
            (None, Timeout::Killed { lost_at: Some(at) }) if now >= *at && self.start.is_none() => {
                let dead = Reaped::killed(self.pid.as_raw_pid());
                self.reaped(&dead, now);
            }
            _ => {}
        }
        Ok(())
    }

    /// Returns when [`tick`](Self::tick) has something to do next.
    pub(crate) fn next_tick(&self) -> Option<Instant> {
        match (&self.exit, &self.timeout) {
            (Some(exit), _) => Which::ALL
                .iter()
                .any(|&which| matches!(self.stream(which), Stream::Open(_)))
                .then_some(exit.give_up_at),
            (None, Timeout::Running { term_at: at, .. } | Timeout::Terminated { kill_at: at }) => {
                Some(*at)
            }
            (None, Timeout::Killed { lost_at }) => lost_at.filter(|_| self.start.is_none()),
            (None, Timeout::Never) => None,
        }
    }

    /// Returns the result once the main process is dead and all output is read.
    pub(crate) fn ended(&self) -> Option<Exited> {
        let exit = self.exit.as_ref()?;
        let (Stream::Closed { end: stdout }, Stream::Closed { end: stderr }, Stream::Closed { .. }) =
            (&self.stdout, &self.stderr, &self.results)
        else {
            return None;
        };
        Some(Exited {
            status: exit.status,
            timed_out: self.is_timed_out(),
            output: if *stdout == OutputEnd::Complete {
                *stderr
            } else {
                *stdout
            },
            usage: exit.usage,
        })
    }

    /// Kills the program and all processes that it started.
    pub(crate) fn kill_all(&mut self) {
        if self.cgroup.as_mut().is_some_and(Cgroup::kill) {
            return;
        }
        match self.exit {
            None => kill_tree(self.pid),
            // The pid may belong to another process by now. The id of the group is not reused while
            // the group exists.
            Some(_) => {
                sys::kill_group(self.pid, KILL);
            }
        }
    }

    /// Returns the parts that outlive the program: the child, if it never ran, until it is dead,
    /// and the cgroup.
    pub(crate) fn into_parts(self) -> (Option<Start>, Option<Cgroup>) {
        (self.start, self.cgroup)
    }
}
