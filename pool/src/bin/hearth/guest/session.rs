//! One guest from its creation to the end of its program.
//!
//! ```text
//! create -> listen -> run -> agent connects -> greeting -> exec -> streams end -> exit status
//!                      \_______ a guest that ends, a time limit, a signal __________/
//! ```

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant, SystemTime};

use hearth_agent::client::{AgentClient, ConnectionError, Exec, ExecError, HandshakeError};
use hearth_agent::proto::{Account, Exited, Put, READY_PORT, SpawnFailure};
use hearth_vmm::virtio::vsock::{VsockListener, VsockStream};
use hearth_vmm::{Exit, Vm, VmConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use super::copies::{self, Copy, CopyError};
use super::error::RunError;
use super::report::{Report, micros};
use super::terminal::{self, Raw};
use super::{Code, Job};
use crate::console;
use crate::signals::Signals;

/// Time limit for a guest to boot up to its agent's greeting, on a fast host.
const BOOT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for the guest to report the end of a program whose time limit is over.
const MARGIN: Duration = Duration::from_secs(10);
/// How long to wait for the guest's exit after a connection broke.
const REASON: Duration = Duration::from_secs(1);
/// Bytes copied at a time.
const CHUNK: usize = 64 << 10;
const SIGPIPE: u8 = 13;

pub(super) struct Plan {
    pub(super) config: VmConfig,
    pub(super) job: Job,
    /// Factor for times that are chosen for a fast host.
    pub(super) slowness: u32,
    /// The default is [`BOOT_TIMEOUT`].
    pub(super) boot_timeout: Option<Duration>,
    pub(super) show_console: bool,
    /// The user that owns the files that are copied in.
    pub(super) owner: Account,
    pub(super) copy_in: Vec<Copy>,
    pub(super) copy_out: Vec<Copy>,
}

struct Session {
    vm: Vm,
    signals: Signals,
    /// Changes of the terminal's size; `None` if the program does not run on it.
    resized: Option<Signal>,
    console: bool,
}

pub(super) async fn session(plan: Plan, report: &mut Report) -> Result<Exited, RunError> {
    let signals = Signals::catch().map_err(RunError::Signals)?;
    let resized = plan
        .job
        .on_terminal
        .then(|| signal(SignalKind::window_change()))
        .transpose()
        .map_err(RunError::Terminal)?;
    let start = Instant::now();
    let vm = Vm::create(&plan.config)?;
    let listener = vm.vsock().listen(READY_PORT)?;
    let console = plan
        .show_console
        .then(|| vm.console().clone())
        .map(|console| {
            tokio::spawn(async move { console::show(&console, tokio::io::stderr()).await })
        });
    let mut session = Session {
        vm,
        signals,
        resized,
        console: plan.show_console,
    };
    // If the VM has ended by now, the next wait for it reports that.
    let _ = session.vm.resume();
    report.phases_us.create = Some(micros(start.elapsed()));
    report.create_us = Some(session.vm.times().into());

    let result = session.work(plan, listener, report).await;
    session.vm.kill();
    if let Some(console) = console {
        // The console task ends with the guest; its last output comes before our own messages.
        let _ = console.await;
    }
    result
}

impl Session {
    async fn work(
        &mut self,
        plan: Plan,
        listener: VsockListener,
        report: &mut Report,
    ) -> Result<Exited, RunError> {
        let scaled = |time: Duration| time.saturating_mul(plan.slowness);
        let boot_timeout = plan.boot_timeout.unwrap_or(scaled(BOOT_TIMEOUT));
        let mut agent = self.agent(listener, boot_timeout, report).await?;
        if !plan.copy_in.is_empty() {
            let start = Instant::now();
            let copying = copies::put(&mut agent, &plan.copy_in, &plan.owner);
            self.unless_ended("while files were copied", copying)
                .await??;
            report.phases_us.copy_in = Some(micros(start.elapsed()));
        }
        let Job {
            command,
            code,
            timeout,
            ..
        } = plan.job;
        if let Some(code) = &code {
            let put = Put::new(&code.place).mode(0o644);
            let put = put.given_to(plan.owner.clone());
            let putting = agent.put(put, &code.content);
            self.unless_ended("while code was copied", putting)
                .await?
                .map_err(CopyError::from)?;
        }
        let start = Instant::now();
        let mut command = command.wall_clock(SystemTime::now());
        if self.resized.is_some() {
            command = command.terminal(terminal::size());
        }
        let starting = agent.exec(command);
        let exec = self
            .unless_ended("before it ran the program", starting)
            .await?;
        let exec = match exec {
            Ok(exec) => exec,
            Err(error) => return Err(self.not_started(error, code).await),
        };
        let (exited, mut agent) = match timeout {
            None => self.program(exec).await?,
            Some(timeout) => {
                let margin = scaled(MARGIN);
                tokio::time::timeout(timeout.saturating_add(margin), self.program(exec))
                    .await
                    .map_err(|_| RunError::Overdue(margin))??
            }
        };
        report.phases_us.exec = Some(micros(start.elapsed()));
        report.exited(&exited);
        if !plan.copy_out.is_empty() {
            let start = Instant::now();
            let copying = copies::get(&mut agent, &plan.copy_out, &plan.owner);
            self.unless_ended("while files were copied", copying)
                .await??;
            report.phases_us.copy_out = Some(micros(start.elapsed()));
        }
        Ok(exited)
    }

    /// Waits until the agent has connected and greeted.
    async fn agent(
        &mut self,
        mut listener: VsockListener,
        limit: Duration,
        report: &mut Report,
    ) -> Result<AgentClient<VsockStream>, RunError> {
        let start = Instant::now();
        let greeting = tokio::time::timeout(limit, async {
            let stream = listener.accept().await?;
            Ok::<_, RunError>(AgentClient::handshake(stream).await?)
        });
        let agent = match self.unless_ended("while it booted", greeting).await? {
            Ok(Ok(agent)) => agent,
            Ok(Err(RunError::Listen(_) | RunError::Handshake(HandshakeError::Connection(_)))) => {
                return Err(self.ended("while it booted").await);
            }
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                return Err(RunError::NotUp {
                    waited: limit,
                    console: self.console,
                });
            }
        };
        // The guest's clock measures the last part, the host's clock the whole.
        let whole = micros(start.elapsed());
        let hello = agent.hello().unwrap_or_default();
        let ready = hello.greeted_us.saturating_sub(hello.started_us).min(whole);
        report.boot_instructions = self.vm.emulated_instructions();
        report.phases_us.boot = Some(whole.saturating_sub(ready));
        report.phases_us.agent_ready = Some(ready);
        Ok(agent)
    }

    /// Runs the program to its end on this process's streams.
    async fn program(
        &mut self,
        mut exec: Exec<VsockStream>,
    ) -> Result<(Exited, AgentClient<VsockStream>), RunError> {
        let _raw = match &self.resized {
            Some(_) => Some(Raw::enter().map_err(RunError::Terminal)?),
            None => None,
        };
        let broken = Notify::new();
        let (stdin, stdout, stderr) = (exec.stdin(), exec.stdout(), exec.stderr());
        // Stdin may never end; the program's end does not wait for it.
        let mut input = pin!(async {
            feed(tokio::io::stdin(), stdin).await;
            std::future::pending::<()>().await;
        });
        // Both streams end with the program, and not before.
        let mut output = pin!(async {
            tokio::join!(
                copy(stdout, tokio::io::stdout(), &broken),
                copy(stderr, tokio::io::stderr(), &broken),
            );
        });
        // On a terminal Ctrl-C reaches the program as a key; a signal is meant for this process.
        let mut told = self.resized.is_some();
        loop {
            let signal = tokio::select! {
                biased;
                () = &mut output => break,
                () = &mut input => continue,
                () = broken.notified() => SIGPIPE,
                () = next(&mut self.resized) => {
                    let _ = exec.resize(terminal::size()).await;
                    continue;
                }
                signal = self.signals.next() => {
                    if std::mem::replace(&mut told, true) {
                        return Err(RunError::Signal(signal));
                    }
                    signal
                }
            };
            // If this fails, the connection is gone, and `output` ends with it.
            let _ = exec.signal(signal).await;
        }
        match exec.finish().await {
            Ok(ended) => Ok(ended),
            Err(error) => Err(self.why(error).await),
        }
    }

    /// Runs `work` unless the guest ends or a signal comes first.
    async fn unless_ended<T>(
        &mut self,
        when: &'static str,
        work: impl Future<Output = T>,
    ) -> Result<T, RunError> {
        let exited = self.vm.exited();
        tokio::select! {
            biased;
            done = work => Ok(done),
            exit = exited => Err(self.ended_by(exit, when)),
            signal = self.signals.next() => Err(RunError::Signal(signal)),
        }
    }

    /// Returns the reason why the program does not run.
    async fn not_started(&self, error: ExecError, code: Option<Code>) -> RunError {
        match (error, code) {
            (ExecError::Failed(SpawnFailure::NotFound { .. }), Some(code)) => {
                let Code {
                    interpreter, image, ..
                } = code;
                RunError::NoInterpreter { interpreter, image }
            }
            (error, _) => self.why(error).await,
        }
    }

    /// Explains a failed exec: if the connection broke because the guest ended, the error is the
    /// guest's end.
    async fn why(&self, error: ExecError) -> RunError {
        match error {
            ExecError::Connection(ConnectionError::Closed | ConnectionError::Io(_)) => {
                self.ended("before the program's end was known").await
            }
            error => error.into(),
        }
    }

    /// Returns the guest's end, which is known or will be within [`REASON`].
    async fn ended(&self, when: &'static str) -> RunError {
        match tokio::time::timeout(REASON, self.vm.exited()).await {
            Ok(exit) => self.ended_by(exit, when),
            Err(_) => ExecError::Connection(ConnectionError::Closed).into(),
        }
    }

    fn ended_by(&self, exit: Exit, when: &'static str) -> RunError {
        RunError::Ended {
            exit,
            when,
            console: self.console,
        }
    }
}

/// Waits for the next signal; for ever if `signals` is `None`. Cancel-safe.
async fn next(signals: &mut Option<Signal>) {
    let came = match signals {
        Some(signals) => signals.recv().await,
        None => None,
    };
    if came.is_none() {
        std::future::pending().await
    }
}

/// Copies input until either side ends. Without `to`, nothing is read.
async fn feed(mut from: impl AsyncRead + Unpin, to: Option<impl AsyncWrite + Unpin>) {
    if let Some(mut to) = to {
        // However the copy ends, the program sees the end of its input.
        let _ = tokio::io::copy(&mut from, &mut to).await;
        let _ = to.shutdown().await;
    }
}

/// Copies output until its end. When a write fails, `broken` is notified, and the rest is read and
/// dropped.
async fn copy(
    from: Option<impl AsyncRead + Unpin>,
    mut to: impl AsyncWrite + Unpin,
    broken: &Notify,
) {
    let Some(mut from) = from else { return };
    let mut chunk = vec![0; CHUNK];
    let mut open = true;
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        let bytes = chunk.get(..count).unwrap_or_default();
        if open && write(&mut to, bytes).await.is_err() {
            open = false;
            broken.notify_one();
        }
    }
}

async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> std::io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}
