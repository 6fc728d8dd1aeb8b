//! An interpreter in a guest that runs pieces of code one after the other and keeps its state
//! between them.
//!
//! The interpreter is an ordinary program. It is started with a driver in its own language, which
//! reads code from stdin and answers on a third output, so that what the code prints cannot be
//! taken for an answer. Malicious code can still write there, but it deceives only its own session.

mod answer;
mod call;
mod language;

use std::{future::poll_fn, sync::Arc, task::Context, task::Poll, task::Waker, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, timeout},
};

use self::{
    answer::{Answer, Answers, Garbled},
    call::Kept,
};
pub use self::{
    call::{Call, CallEnd, Outcome, OutputStream},
    language::Language,
};
use super::{
    AgentClient, Command, ConnectionError, Exec, ExecError,
    shared::{Handle, Shared, State},
};
use crate::proto::{ExitStatus, MAX_CHUNK, Request, STDIN_UNREPORTED, STDIN_WINDOW};

/// SIGINT.
const INTERRUPT: u8 = 2;
/// Interval at which an interpreter that may have missed the interrupt is interrupted again.
const AGAIN: Duration = Duration::from_secs(1);
/// SIGKILL.
const KILL: u8 = 9;
/// How long the guest may take to report that an interpreter was killed.
const KILLED: Duration = Duration::from_secs(60);
/// How long code of a dropped call may take to end before its interpreter is killed.
const GIVEN_UP: Duration = Duration::from_secs(5);
/// Length of the seed that [`Session::reseed`] takes, in bytes.
pub const SEED_BYTES: usize = 64;

/// Why a session could not be started or cannot continue.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The interpreter could not be started, or the connection failed.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The interpreter ended before it was ready.
    #[error("the interpreter ended before it was ready ({status}): {said}")]
    NotReady {
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its error output.
        said: String,
    },
    /// The code contains a NUL; no language has one.
    #[error("the code has a NUL in it: pass binary data as a file")]
    Nul,
    /// Something in the guest wrote to the output for answers. The interpreter was ended; the next
    /// call starts another.
    #[error("the guest's answer makes no sense: the session starts anew")]
    Garbled,
    /// A hook of the code failed in a clone.
    #[error("a hook failed that was to run in each clone: {0}")]
    Hook(String),
    /// The guest did not report the end of an interpreter that was killed.
    #[error("the guest is overdue by {0:?} with the end of an interpreter")]
    Overdue(Duration),
}

impl From<ConnectionError> for SessionError {
    fn from(error: ConnectionError) -> Self {
        Self::Exec(error.into())
    }
}

/// An interpreter that keeps its state from call to call. Dropping this ends the interpreter and
/// all that its code started.
#[derive(Debug)]
pub struct Session<S> {
    command: Command,
    /// None after the connection failed or a new interpreter could not be started.
    exec: Option<Exec<S>>,
    answers: Answers,
    /// The message that is being sent, and below the number of its bytes that were sent.
    message: Vec<u8>,
    sent: usize,
    /// A call is unfinished: it is running, its future was dropped, or it failed.
    owed: bool,
    /// The interpreter has ended.
    over: bool,
    /// A new interpreter was started, and no outcome has reported it yet.
    restarted: bool,
}

/// The reply to a message.
enum Reply {
    Answer(Answer),
    Exited(ExitStatus),
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Session<S> {
    /// Starts an interpreter and waits until it is ready. `command` is the language's
    /// [`command`](Language::command), which the caller may have refined.
    ///
    /// # Errors
    /// [`SessionError::Exec`] if the guest has no such interpreter or refuses to start it;
    /// [`SessionError::NotReady`].
    ///
    /// # Cancel safety
    /// Dropping the future ends the interpreter.
    pub async fn start(client: AgentClient<S>, command: Command) -> Result<Self, SessionError> {
        let mut session = Self {
            exec: None,
            command,
            answers: Answers::default(),
            message: Vec::new(),
            sent: 0,
            owed: false,
            over: false,
            restarted: false,
        };
        session.boot(client).await?;
        Ok(session)
    }

    /// Returns a session for a connection that survived a fork: a clone's copy of its template's
    /// session, in which no call was running. Call [`reseed`](Self::reseed) before code runs in it.
    pub fn resume(stream: S, command: Command) -> Self {
        let client = AgentClient::resume(stream);
        let shared = Shared::new(client, true, true);
        // It is unknown here how much input the agent has not reported as taken; it is less than
        // `STDIN_UNREPORTED`.
        shared.change(|state| state.stdin.window = STDIN_WINDOW - STDIN_UNREPORTED);
        Self {
            exec: Some(Exec::new(shared, 0, None, KILLED)),
            command,
            answers: Answers::default(),
            message: Vec::new(),
            sent: 0,
            owed: false,
            over: false,
            restarted: false,
        }
    }

    /// Calls `look` with the stream that carries the session; none if the session has no connection
    /// any more.
    pub fn with_stream<T>(&self, look: impl FnOnce(&S) -> T) -> Option<T> {
        let shared = self.exec.as_ref()?.shared().ok()?;
        shared.change(|state| state.client.as_ref().map(|client| look(client.stream())))
    }

    /// Reseeds the interpreter's random generators, so that they differ from those of other clones,
    /// and runs its hooks for clones.
    ///
    /// # Errors
    /// [`SessionError::Hook`]; others as for [`run`](Self::run).
    ///
    /// # Cancel safety
    /// Not safe: drop the session, too.
    pub async fn reseed(&mut self, seed: &[u8; SEED_BYTES]) -> Result<(), SessionError> {
        let mut message = String::from("s");
        for byte in seed {
            message.push_str(&format!("{byte:02x}"));
        }
        self.say(&message);
        match self.reply(|_, _| {}).await? {
            Reply::Answer(answer) => match answer.into() {
                CallEnd::Error(error) => Err(SessionError::Hook(error)),
                _ => Ok(()),
            },
            Reply::Exited(status) => Err(SessionError::NotReady {
                status,
                said: String::new(),
            }),
        }
    }

    /// Runs code and collects what it prints. If the interpreter ended in an earlier call, a new
    /// one is started first.
    ///
    /// # Errors
    /// [`SessionError`]. Code that fails or ends its interpreter is an [`Outcome`], not an error.
    ///
    /// # Cancel safety
    /// Dropping the future interrupts the code. The session stays usable: the next call waits until
    /// the code has ended, and starts a new interpreter if it does not end.
    pub async fn run(&mut self, call: impl Into<Call>) -> Result<Outcome, SessionError> {
        self.run_with(call, |_, _| {}).await
    }

    /// As [`run`](Self::run), and passes what the code prints to `heard` while it runs.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    ///
    /// # Cancel safety
    /// As [`run`](Self::run).
    pub async fn run_with(
        &mut self,
        call: impl Into<Call>,
        mut heard: impl FnMut(OutputStream, &[u8]),
    ) -> Result<Outcome, SessionError> {
        let call = call.into();
        if call.code.contains('\0') {
            return Err(SessionError::Nul);
        }
        self.settle().await?;
        let mut stdout = Kept::new(call.limits.stdout_bytes);
        let mut stderr = Kept::new(call.limits.stderr_bytes);
        let mut print = |stream, bytes: &[u8]| {
            match stream {
                OutputStream::Stdout => stdout.push(bytes),
                OutputStream::Stderr => stderr.push(bytes),
            }
            heard(stream, bytes);
        };
        self.say(&format!("c{}", call.code));
        self.owed = true;
        let (reply, timed_out) = {
            let under_way = UnderWay(self);
            let got = under_way.0.reply_in_time(&call, &mut print).await;
            // The call has ended, so dropping the guard must not interrupt anything.
            std::mem::forget(under_way);
            got?
        };
        self.owed = false;
        let end_cut = match &reply {
            Reply::Answer(answer) => answer.cut,
            Reply::Exited(_) => 0,
        };
        let end = match reply {
            Reply::Answer(answer) => answer.into(),
            Reply::Exited(status) => CallEnd::Exited(status),
        };
        Ok(Outcome {
            end,
            end_cut,
            timed_out,
            restarted: std::mem::take(&mut self.restarted),
            stdout: stdout.bytes,
            stdout_cut: stdout.cut,
            stderr: stderr.bytes,
            stderr_cut: stderr.cut,
        })
    }

    /// Returns the reply to a call, and whether the call had to be interrupted.
    async fn reply_in_time(
        &mut self,
        call: &Call,
        print: &mut impl FnMut(OutputStream, &[u8]),
    ) -> Result<(Reply, bool), SessionError> {
        let Some(limit) = call.timeout else {
            return Ok((self.reply(&mut *print).await?, false));
        };
        if let Ok(reply) = timeout(limit, self.reply(&mut *print)).await {
            return Ok((reply?, false));
        }
        self.signal(INTERRUPT);
        if let Some(reply) = self.reply_of_interrupted(call.grace, &mut *print).await {
            return Ok((reply?, true));
        }
        Ok((self.kill(print).await?, true))
    }

    /// Returns the reply to an interrupted call; none if it does not come within `grace`.
    async fn reply_of_interrupted(
        &mut self,
        grace: Duration,
        mut print: impl FnMut(OutputStream, &[u8]),
    ) -> Option<Result<Reply, SessionError>> {
        let until = Instant::now().checked_add(grace);
        loop {
            let left = until.map_or(grace, |until| {
                until.saturating_duration_since(Instant::now())
            });
            let is_deaf = Language::misses_interrupts(&self.command);
            let wait = if is_deaf { left.min(AGAIN) } else { left };
            if let Ok(reply) = timeout(wait, self.reply(&mut print)).await {
                return Some(reply);
            }
            if wait == left {
                return None;
            }
            self.signal(INTERRUPT);
        }
    }

    /// Ends an earlier call that was dropped, and makes sure that an interpreter runs.
    async fn settle(&mut self) -> Result<(), SessionError> {
        if self.owed {
            // The call was interrupted when its future was dropped. Code that was sent only in part
            // must not run at all.
            let whole = self.sent == self.message.len();
            let ended = whole
                && self
                    .reply_of_interrupted(GIVEN_UP, |_, _| {})
                    .await
                    .is_some_and(|reply| reply.is_ok());
            if !ended && !self.over {
                self.kill(|_, _| {}).await?;
            }
            self.owed = false;
        }
        if self.over {
            let exec = self.exec.take().ok_or(ConnectionError::Closed)?;
            let (_, client) = exec.finish().await?;
            self.boot(client).await?;
            self.restarted = true;
        }
        Ok(())
    }

    /// Starts an interpreter on an idle connection.
    async fn boot(&mut self, client: AgentClient<S>) -> Result<(), SessionError> {
        self.answers.clear();
        self.message.clear();
        self.sent = 0;
        self.exec = Some(client.exec(self.command.clone()).await?);
        self.over = false;
        let mut said = Kept::new(MAX_CHUNK);
        let reply = self.reply(|stream, bytes| {
            if stream == OutputStream::Stderr {
                said.push(bytes);
            }
        });
        match reply.await? {
            Reply::Answer(_) => Ok(()),
            Reply::Exited(status) => Err(SessionError::NotReady {
                status,
                said: String::from_utf8_lossy(&said.bytes).trim().to_owned(),
            }),
        }
    }

    fn say(&mut self, message: &str) {
        self.message.clear();
        self.message.extend_from_slice(message.as_bytes());
        self.message.push(0);
        self.sent = 0;
    }

    /// Sends the rest of the message and waits for the reply. The future may be dropped and this
    /// called again.
    async fn reply(
        &mut self,
        mut print: impl FnMut(OutputStream, &[u8]),
    ) -> Result<Reply, SessionError> {
        let shared = self.shared()?;
        let (answers, message, sent) = (&mut self.answers, &self.message, &mut self.sent);
        let reply = poll_fn(|cx| {
            shared.poll_until(Handle::Main, cx, |state, cx| {
                state.print(&mut print);
                if let Some(results) = &mut state.results {
                    answers.extend(results.bytes.drain(..));
                }
                match answers.next() {
                    Ok(Some(answer)) => return Poll::Ready(Ok(Ok(Reply::Answer(answer)))),
                    Ok(None) => {}
                    Err(Garbled) => return Poll::Ready(Ok(Err(Garbled))),
                }
                match &state.end {
                    Some(Ok(exited)) => return Poll::Ready(Ok(Ok(Reply::Exited(exited.status)))),
                    Some(Err(error)) => return Poll::Ready(Err(error.clone())),
                    None if state.client.is_none() => {
                        return Poll::Ready(Err(ConnectionError::Closed));
                    }
                    None => {}
                }
                let rest = message.get(*sent..).unwrap_or_default();
                match state.pass(rest, cx) {
                    Ok(count) => *sent += count,
                    Err(error) => return Poll::Ready(Err(error)),
                }
                Poll::Pending
            })
        })
        .await?;
        match reply {
            Ok(reply) => {
                self.over = matches!(reply, Reply::Exited(_));
                Ok(reply)
            }
            Err(Garbled) => {
                self.answers.clear();
                Box::pin(self.kill(print)).await?;
                self.owed = false;
                Err(SessionError::Garbled)
            }
        }
    }

    /// Kills the interpreter and waits until it has ended.
    async fn kill(
        &mut self,
        mut print: impl FnMut(OutputStream, &[u8]),
    ) -> Result<Reply, SessionError> {
        self.signal(KILL);
        let shared = self.shared()?;
        let ended = poll_fn(|cx| {
            shared.poll_until(Handle::Main, cx, |state, _| {
                state.print(&mut print);
                // Its last answers are of no use.
                if let Some(results) = &mut state.results {
                    results.bytes.clear();
                }
                match &state.end {
                    Some(end) => Poll::Ready(end.clone()),
                    None if state.client.is_none() => Poll::Ready(Err(ConnectionError::Closed)),
                    None => Poll::Pending,
                }
            })
        });
        let ended = timeout(KILLED, ended).await;
        let exited = ended.map_err(|_| SessionError::Overdue(KILLED))??;
        self.over = true;
        Ok(Reply::Exited(exited.status))
    }

    /// Sends a signal, as far as the connection accepts it now.
    fn signal(&self, signal: u8) {
        if let Ok(shared) = self.shared() {
            let mut cx = Context::from_waker(Waker::noop());
            shared.change(|state| state.send(&Request::Signal(signal), &mut cx).ok());
        }
    }

    fn shared(&self) -> Result<Arc<Shared<S>>, ConnectionError> {
        self.exec.as_ref().ok_or(ConnectionError::Closed)?.shared()
    }
}

/// Guard of a running call: dropping it interrupts the call.
struct UnderWay<'a, S: AsyncRead + AsyncWrite + Unpin + Send>(&'a mut Session<S>);

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Drop for UnderWay<'_, S> {
    fn drop(&mut self) {
        self.0.signal(INTERRUPT);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> State<S> {
    /// Passes the received output to `print`.
    fn print(&mut self, print: &mut impl FnMut(OutputStream, &[u8])) {
        for (stream, queue) in [
            (OutputStream::Stdout, &mut self.stdout),
            (OutputStream::Stderr, &mut self.stderr),
        ] {
            let (front, back) = queue.bytes.as_slices();
            for bytes in [front, back] {
                if !bytes.is_empty() {
                    print(stream, bytes);
                }
            }
            queue.bytes.clear();
        }
    }

    /// Sends as much of `bytes` to the program's stdin as there is room for now, and returns the
    /// number of bytes.
    fn pass(&mut self, bytes: &[u8], cx: &mut Context<'_>) -> Result<usize, ConnectionError> {
        let mut passed = 0;
        while self.stdin.open && self.poll_flush(cx)?.is_ready() {
            let rest = bytes.get(passed..).unwrap_or_default();
            let room = self.stdin.window.min(MAX_CHUNK).min(rest.len());
            let Some(chunk) = rest.get(..room).filter(|chunk| !chunk.is_empty()) else {
                break;
            };
            self.send(&Request::Stdin(chunk), cx)?;
            self.stdin.window -= room;
            passed += room;
        }
        Ok(passed)
    }
}
