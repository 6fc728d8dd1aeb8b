//! A connection: greeting, requests, and the program that it runs.

use alloc::vec::Vec;

use hearth_agent::proto::{
    FrameError, Hello, HelloError, Rejection, Request, Response, ShutdownKind, VERSION,
};

use rustix::{fd::OwnedFd, io::Errno};

use crate::{
    channel::{Channel, Lost, Output},
    clock::Instant,
    diagnose,
    exec::{Program, Which},
    files::{self, Base, Task},
    guest::Guest,
    hygiene,
    reaper::Reaped,
};

/// A connection to the host.
#[derive(Debug)]
pub(crate) struct Conn {
    pub(crate) channel: Channel,
    phase: Phase,
    program: Option<Program>,
    /// The file request in progress; never together with a program.
    task: Option<Task>,
    /// The base directory of file requests.
    base: Base,
    dialled: bool,
    greeted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The agent is connecting and waits for the host to accept.
    Connecting,
    /// The host has not sent its hello.
    Greeting,
    Ready,
    /// To be dropped.
    Over(Lost),
}

/// How a connection that the agent made has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hangup {
    /// The host did not accept the connection.
    NotTaken(Errno),
    /// The connection failed after the host had greeted, as it does when the guest becomes a clone.
    Broken,
    /// The host closed the connection.
    Wanted,
}

/// The reason why the connection cannot go on, such as a malformed frame.
#[derive(Clone, Copy, Debug)]
struct Refused(Rejection);

/// A pipe of the program on which an event occurred.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pipe {
    Stdin,
    Output { which: Which, hung_up: bool },
}

/// The actions that a connection requests of the event loop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) shutdown: Option<ShutdownKind>,
    /// A pong was queued.
    pub(crate) ponged: bool,
}

impl From<FrameError> for Refused {
    fn from(_: FrameError) -> Self {
        Self(Rejection::Malformed)
    }
}

impl From<Rejection> for Refused {
    fn from(reason: Rejection) -> Self {
        Self(reason)
    }
}

impl Conn {
    /// Creates a connection that the host opened.
    pub(crate) fn accepted(socket: OwnedFd, guest: &Guest) -> Self {
        let mut conn = Self {
            channel: Channel::new(socket),
            phase: Phase::Greeting,
            program: None,
            task: None,
            base: Base::default(),
            dialled: false,
            greeted: false,
        };
        conn.greet(guest);
        conn
    }

    /// Creates a connection that the agent is opening to the host.
    pub(crate) fn dialled(socket: OwnedFd) -> Self {
        Self {
            channel: Channel::new(socket),
            phase: Phase::Connecting,
            program: None,
            task: None,
            base: Base::default(),
            dialled: true,
            greeted: false,
        }
    }

    pub(crate) fn is_connecting(&self) -> bool {
        self.phase == Phase::Connecting
    }

    /// Returns how the connection ended, if it has.
    pub(crate) fn over(&self) -> Option<Lost> {
        if let Phase::Over(lost) = self.phase {
            Some(lost)
        } else {
            None
        }
    }

    /// Returns how it ended, if it has and the agent opened it.
    pub(crate) fn hangup(&self) -> Option<Hangup> {
        let lost = self.over().filter(|_| self.dialled)?;
        Some(match lost.0 {
            Some(_) if self.greeted => Hangup::Broken,
            Some(errno) => Hangup::NotTaken(errno),
            None => Hangup::Wanted,
        })
    }

    /// Whether requests are read. They are not while the host does not read the answers.
    pub(crate) fn wants_input(&self) -> bool {
        self.channel.output.has_room()
    }

    pub(crate) fn program(&self) -> Option<&Program> {
        self.program.as_ref()
    }

    /// Refuses the connection; the reason is sent if the socket takes it.
    pub(crate) fn refuse(&mut self, reason: Rejection) {
        let _ = self.channel.output.push(&Response::Rejected(reason));
        let _ = self.channel.flush();
        self.lose(Lost(None));
    }

    /// Handles the end of the attempt to connect.
    pub(crate) fn connected(&mut self, guest: &Guest) {
        match self.channel.connected() {
            Ok(()) => {
                self.phase = Phase::Greeting;
                self.greet(guest);
            }
            Err(lost) => self.lose(lost),
        }
    }

    fn greet(&mut self, guest: &Guest) {
        let _ = self.channel.output.greet(&guest.hello());
    }

    /// Reads once.
    pub(crate) fn read(&mut self) {
        if let Err(lost) = self.channel.read() {
            self.lose(lost);
        }
    }

    /// Moves input or output of the program.
    pub(crate) fn pump(&mut self, pipe: Pipe, scratch: &mut Vec<u8>) {
        let Self {
            channel: Channel { output, .. },
            program: Some(program),
            ..
        } = self
        else {
            return;
        };
        let moved = match pipe {
            Pipe::Stdin => program.pump_input(output),
            Pipe::Output { which, hung_up } => program.pump_output(which, hung_up, scratch, output),
        };
        if moved.is_err() {
            self.lose(Lost(None));
        }
    }

    /// Reports that the program has started, or why it did not.
    pub(crate) fn started(&mut self, guest: &mut Guest) {
        let Some(running) = self.program.as_mut().and_then(Program::runs) else {
            return;
        };
        let said = match (running, &self.program) {
            (Ok(()), Some(program)) => Response::Started { pid: program.pid() },
            (Err(failed), _) => Response::Failed(diagnose::failure(&failed)),
            (Ok(()), None) => return,
        };
        if matches!(said, Response::Failed(_))
            && let Some(program) = self.program.take()
        {
            guest.ended(program);
        }
        if self.channel.output.push(&said).is_err() {
            self.lose(Lost(None));
        }
    }

    /// Passes a death on to the program, if it is its main process; returns whether it is.
    pub(crate) fn reaped(
        &mut self,
        dead: &Reaped,
        now: Instant,
        guest: &mut Guest,
        scratch: &mut Vec<u8>,
    ) -> bool {
        if !self.program.as_ref().is_some_and(|it| it.is_main(dead.pid)) {
            return false;
        }
        // The start, or its failure, may not have been reported yet.
        self.started(guest);
        if let Some(program) = &mut self.program {
            program.reaped(dead, now);
            // The output has mostly ended by now; reading its end here saves a turn of the loop.
            for which in Which::ALL {
                let hung_up = true;
                self.pump(Pipe::Output { which, hung_up }, scratch);
            }
        }
        true
    }

    /// Does all that can be done now: serves the received requests, handles what is due, and sends.
    pub(crate) fn settle(
        &mut self,
        guest: &mut Guest,
        now: Instant,
        scratch: &mut Vec<u8>,
    ) -> Asked {
        let mut asked = Asked::default();
        if let Some(program) = &mut self.program
            && program.tick(now, &mut self.channel.output).is_err()
        {
            self.lose(Lost(None));
        }
        loop {
            if matches!(self.phase, Phase::Over(_) | Phase::Connecting) {
                break;
            }
            if let Err(Refused(reason)) = self.serve(guest, &mut asked) {
                self.refuse(reason);
                break;
            }
            if let Err(lost) = self.channel.flush() {
                self.lose(lost);
                break;
            }
            // A request that waited for room in the output is in the buffer already: no event
            // announces it.
            let waits = !matches!(self.channel.input.peek(), Ok(None));
            if !(waits && self.channel.output.has_room()) {
                break;
            }
        }
        if self.is_busy() {
            self.step(scratch);
        }
        self.retire(guest);
        asked
    }

    /// Whether there is work that needs no event.
    pub(crate) fn is_busy(&self) -> bool {
        self.phase == Phase::Ready
            && self.task.as_ref().is_some_and(Task::is_active)
            && self.channel.output.has_room()
    }

    /// Does one step of the file request in progress, so that other connections have their turn.
    fn step(&mut self, scratch: &mut Vec<u8>) {
        let Some(task) = &mut self.task else {
            return;
        };
        match task.step(scratch, &mut self.channel.output) {
            Ok(done) => {
                if done {
                    self.task = None;
                }
                if let Err(lost) = self.channel.flush() {
                    self.lose(lost);
                }
            }
            Err(_) => self.lose(Lost(None)),
        }
    }

    /// Serves the received requests as long as there is room for answers.
    fn serve(&mut self, guest: &mut Guest, asked: &mut Asked) -> Result<(), Refused> {
        let Self {
            channel: Channel { input, output, .. },
            phase,
            program,
            task,
            base,
            greeted,
            ..
        } = self;
        loop {
            if let Some(end) = program.as_ref().and_then(Program::ended) {
                output.push(&Response::Exited(end))?;
                program.take().into_iter().for_each(|it| guest.ended(it));
            }
            if !output.has_room() {
                return Ok(());
            }
            let Some(payload) = input.next_frame()? else {
                return Ok(());
            };
            match phase {
                Phase::Greeting => {
                    Hello::decode(payload).map_err(|error| match error {
                        HelloError::Version { peer } => Rejection::Version {
                            agent: VERSION,
                            host: peer,
                        },
                        _ => Rejection::NotHello,
                    })?;
                    *phase = Phase::Ready;
                    *greeted = true;
                }
                _ => answer(
                    Request::decode(payload)?,
                    program,
                    (task, base),
                    output,
                    guest,
                    asked,
                )?,
            }
        }
    }

    /// Kills and releases the program of a connection that is over.
    fn retire(&mut self, guest: &mut Guest) {
        if self.over().is_some()
            && let Some(mut program) = self.program.take()
        {
            program.kill_all();
            guest.ended(program);
        }
    }

    fn lose(&mut self, lost: Lost) {
        if !matches!(self.phase, Phase::Over(_)) {
            self.phase = Phase::Over(lost);
        }
    }
}

/// Carries out one request.
fn answer(
    request: Request<'_>,
    program: &mut Option<Program>,
    (task, base): (&mut Option<Task>, &mut Base),
    output: &mut Output,
    guest: &mut Guest,
    asked: &mut Asked,
) -> Result<(), Refused> {
    match request {
        Request::Ping { nonce } => {
            asked.ponged = true;
            output.push(&Response::Pong(guest.pong(nonce)))?;
        }
        Request::Exec(_) | Request::File(_) if program.is_some() => {
            return Err(Rejection::ExecRunning.into());
        }
        Request::Exec(_) | Request::File(_) if task.is_some() => {
            return Err(Rejection::FileRunning.into());
        }
        Request::Exec(exec) => {
            base.forget();
            match guest.start(&exec) {
                Ok(started) => *program = Some(started),
                Err(failure) => output.push(&Response::Failed(failure))?,
            }
        }
        Request::Stdin(bytes) => {
            if let Some(program) = program {
                program.input(bytes, output)?;
            }
        }
        Request::StdinEof => {
            if let Some(program) = program {
                program.end_input();
            }
        }
        Request::Signal(signal @ 1..=64) => {
            if let Some(program) = program {
                program.signal(signal);
            }
        }
        Request::Resize(size) => {
            if let Some(program) = program {
                program.resize(size);
            }
        }
        Request::Signal(_) => return Err(Rejection::OutOfRange.into()),
        Request::Refresh(refresh) if !hygiene::in_range(&refresh) => {
            return Err(Rejection::OutOfRange.into());
        }
        Request::Refresh(refresh) => output.push(&Response::Refreshed(guest.refresh(&refresh)))?,
        Request::Shutdown(kind) => asked.shutdown = Some(kind),
        Request::Freeze => output.push(&Response::Frozen(guest.freeze()))?,
        Request::File(request) => *task = files::begin(*request, guest, base, output)?,
        Request::FileData(bytes) => {
            let taken = task.as_mut().and_then(|task| task.data(bytes, output));
            taken.ok_or(Rejection::NoFile)??;
        }
        Request::FileEnd => {
            let put = task.take_if(|task| !task.is_active());
            let ended = put.and_then(|task| task.end(output));
            ended.ok_or(Rejection::NoFile)??;
        }
        Request::Thaw => output.push(&Response::Thawed(guest.thaw()))?,
    }
    Ok(())
}
