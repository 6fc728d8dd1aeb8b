//! The state of the guest that all connections share.

use alloc::{boxed::Box, string::String, vec::Vec};
use core::fmt::Write;

use hearth_agent::proto::{
    Account, Applied, Exec, FileFailure, Hello, Input, InstanceId, Memory, OutputMode, Pong,
    Refresh, Refreshed, SpawnFailure, Standstill, WindowSize,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags, fchown, fcntl_setfl, open},
    io::{Errno, fcntl_dupfd_cloexec},
    pipe::{PipeFlags, pipe_with},
    system::sysinfo,
};

use crate::{
    account::{self, Person, Unknown},
    cgroup::{Cgroup, Cgroups},
    clock::{Instant, uptime_us},
    diagnose,
    exec::{Pipes, Program},
    hygiene::{self, Hygiene},
    mounts,
    plan::{self, Plan},
    quiet,
    rights::Rights,
    root::{self, Root},
    runtime,
    spawn::{Image, NotStarted, Refusal, Start, Step},
    terminal,
    text::Stderr,
};

/// The guest.
#[derive(Debug)]
pub(crate) struct Guest {
    instance: InstanceId,
    started_us: u64,
    /// Whether this process is PID 1 and may therefore change the system.
    init: bool,
    prepared: bool,
    /// The error of switching to the root file system that was asked for.
    no_root: Option<Errno>,
    hygiene: Hygiene,
    pub(crate) cgroups: Cgroups,
    /// The number of running programs.
    pub(crate) programs: u32,
    /// Children that were killed before they executed their program and are not reaped yet.
    abandoned: Vec<Start>,
}

impl Guest {
    pub(crate) fn booted(started_us: u64, init: bool, cgroups: Cgroups) -> Self {
        Self {
            instance: hygiene::draw_instance(),
            started_us,
            init,
            prepared: false,
            no_root: None,
            hygiene: Hygiene::new(),
            cgroups,
            programs: 0,
            abandoned: Vec::new(),
        }
    }

    pub(crate) fn hello(&self) -> Hello {
        Hello {
            instance: self.instance,
            started_us: self.started_us,
            greeted_us: uptime_us(),
        }
    }

    pub(crate) fn pong(&self, nonce: u64) -> Pong {
        let info = sysinfo();
        let unit = u64::from(info.mem_unit.max(1));
        Pong {
            nonce,
            instance: self.instance,
            uptime_us: uptime_us(),
            memory: Memory {
                total_bytes: info.totalram.saturating_mul(unit),
                free_bytes: info.freeram.saturating_mul(unit),
            },
            execs: self.programs,
            prepared: self.prepared,
        }
    }

    /// Sets up mounts, sysctls and cgroups for programs, once.
    pub(crate) fn prepare(&mut self) {
        if self.prepared {
            return;
        }
        self.prepared = true;
        if self.init {
            let environment = runtime::environment();
            if let Some(root) = Root::named(&environment) {
                self.no_root = root::switch_to(&root).err();
            }
            let failed = mounts::prepare();
            mounts::bound();
            quiet::settle();
            // The console costs an exit per byte: silent unless the kernel parameters set
            // `hearth_log`.
            if environment
                .iter()
                .any(|word| word.starts_with(b"hearth_log="))
            {
                for (place, errno) in failed {
                    let _ = writeln!(Stderr, "hearth-init: cannot mount {place}: {errno}");
                }
            }
        }
        self.cgroups.prepare();
    }

    pub(crate) fn refresh(&mut self, refresh: &Refresh) -> Refreshed {
        self.prepare();
        self.instance = refresh.instance.unwrap_or(self.instance);
        let mut done = self.hygiene.refresh(refresh, self.init);
        // Programs are thawed only when every part was applied: none sees the template's identity.
        if self.cgroups.are_frozen() && done.all_applied() {
            done.programs = self.thaw();
        }
        done
    }

    /// Freezes all programs.
    pub(crate) fn freeze(&mut self) -> Standstill {
        self.prepare();
        match self.cgroups.freeze() {
            Ok(true) => Standstill::All,
            Ok(false) => Standstill::NotYet,
            Err(errno) => Standstill::Refused {
                errno: errno.raw_os_error(),
            },
        }
    }

    /// Thaws the frozen programs.
    pub(crate) fn thaw(&mut self) -> Applied {
        match self.cgroups.thaw() {
            Ok(()) => Applied::Done,
            Err(errno) => Applied::Failed {
                errno: errno.raw_os_error(),
            },
        }
    }

    /// Starts a program.
    pub(crate) fn start(&mut self, exec: &Exec) -> Result<Program, SpawnFailure> {
        self.prepare();
        if let Some(errno) = self.no_root {
            // The programs of another root are not those that were asked for.
            return Err(SpawnFailure::NoRoot {
                errno: errno.raw_os_error(),
            });
        }
        if let Some(time) = exec.wall_clock
            && self.init
        {
            hygiene::correct_clock(time).map_err(|errno| SpawnFailure::Other {
                errno: errno.raw_os_error(),
            })?;
        }
        let person = self.person(exec.user.as_ref());
        let person = person.map_err(|_| SpawnFailure::NoUser {
            name: match &exec.user {
                Some(Account::Name(name)) => String::from_utf8_lossy(name).into_owned(),
                _ => String::new(),
            },
        })?;
        let plan = Plan::new(exec, person.as_ref())?;
        let cgroup = self.cgroups.acquire(&exec.limits)?;
        match launch(exec, plan, cgroup.as_ref()) {
            Ok((start, pipes)) => {
                self.programs += 1;
                Ok(Program::new(exec, start, Instant::now(), pipes, cgroup))
            }
            Err(failed) => {
                self.cgroups.release(cgroup);
                Err(diagnose::failure(&failed))
            }
        }
    }

    /// Returns the rights with which files are accessed for an account.
    pub(crate) fn rights(&self, account: Option<&Account>) -> Result<Rights, FileFailure> {
        let person = self.person(account)?;
        // Root's rights are the agent's own.
        let person = person.filter(|person| (person.ids.uid, person.ids.gid) != (0, 0));
        let ids = person.map(|person| plan::ids(&person.ids)).transpose();
        Ok(Rights::of(ids.map_err(|_| FileFailure::NoUser)?))
    }

    /// Looks up an account and creates its home directory if need be. `None` is the agent's own
    /// user.
    fn person(&self, account: Option<&Account>) -> Result<Option<Person>, Unknown> {
        let person = account::person(account)?;
        if let Some(Person {
            ids,
            entry: Some(entry),
        }) = &person
            && self.init
        {
            // A missing home shows when the program needs it.
            let _ = entry.settle_home(ids);
        }
        Ok(person)
    }

    /// Releases a program that has ended or that no connection waits for any longer.
    pub(crate) fn ended(&mut self, program: Program) {
        self.programs = self.programs.saturating_sub(1);
        let (start, cgroup) = program.into_parts();
        self.abandoned.extend(start);
        self.cgroups.release(cgroup);
    }

    /// Handles the death of a child that belongs to no connection.
    pub(crate) fn reaped(&mut self, pid: i32) {
        let dead = |start: &mut Start| start.pid().as_raw_pid() == pid;
        for mut start in self.abandoned.extract_if(.., dead) {
            start.gone();
            let _ = start.end();
        }
    }
}

/// Starts the child that becomes the program, with the pipes between it and the agent.
fn launch(exec: &Exec, plan: Plan, cgroup: Option<&Cgroup>) -> Result<(Start, Pipes), NotStarted> {
    let launched = match exec.terminal {
        Some(size) => on_terminal(exec, size, &plan),
        None => on_pipes(exec, &plan),
    };
    let (theirs, ours) = match launched {
        Ok(ends) => ends,
        Err(refusal) => return Err(Box::new((plan, refusal))),
    };
    let image = Image {
        plan,
        session: true,
        terminal: ours.terminal,
        stdio: theirs.stdio(),
        results: theirs.results.as_ref().map(AsFd::as_fd),
        cgroup: cgroup.map(Cgroup::dir),
    };
    Ok((Start::begin(image)?, ours))
}

/// The program's ends of its pipes, or of its terminal.
struct Theirs {
    stdin: OwnedFd,
    /// `None`: the same as stdin.
    stdout: Option<OwnedFd>,
    /// `None`: the same as stdout.
    stderr: Option<OwnedFd>,
    results: Option<OwnedFd>,
}

impl Theirs {
    fn stdio(&self) -> [BorrowedFd<'_>; 3] {
        let stdout = self.stdout.as_ref().unwrap_or(&self.stdin);
        let stderr = self.stderr.as_ref().unwrap_or(stdout);
        [&self.stdin, stdout, stderr].map(AsFd::as_fd)
    }
}

fn on_pipes(exec: &Exec, plan: &Plan) -> Result<(Theirs, Pipes), Refusal> {
    let refused = refused_at(Step::Stdio);
    let (stdin, stdin_ours) = match exec.stdin {
        Input::Pipe => {
            let (theirs, ours) =
                our_end_last(pipe_with(PipeFlags::CLOEXEC).map_err(refused)?).map_err(refused)?;
            (theirs, Some(ours))
        }
        Input::Null => (null().map_err(refused)?, None),
    };
    let (stdout_ours, stdout) =
        our_end_first(pipe_with(PipeFlags::CLOEXEC).map_err(refused)?).map_err(refused)?;
    let (stderr_ours, stderr) = match exec.output {
        OutputMode::Merged => (None, None),
        OutputMode::Separate => {
            let (ours, theirs) =
                our_end_first(pipe_with(PipeFlags::CLOEXEC).map_err(refused)?).map_err(refused)?;
            (Some(ours), Some(theirs))
        }
    };
    let (results_ours, results) = match exec.results {
        true => {
            let (ours, theirs) =
                our_end_first(pipe_with(PipeFlags::CLOEXEC).map_err(refused)?).map_err(refused)?;
            (Some(ours), Some(theirs))
        }
        false => (None, None),
    };
    let theirs = Theirs {
        stdin,
        stdout: Some(stdout),
        stderr,
        results,
    };
    if let Some((uid, gid, _)) = plan.user.as_ref().filter(|(uid, ..)| !uid.is_root()) {
        // The user may then open them by name, as /dev/stderr. If this fails, the program gets the
        // error when it opens them.
        let [stdin, outputs @ ..] = theirs.stdio();
        let stdin = (exec.stdin == Input::Pipe).then_some(stdin);
        let results = theirs.results.as_ref().map(AsFd::as_fd);
        for pipe in outputs.into_iter().chain(stdin).chain(results) {
            let _ = fchown(pipe, Some(*uid), Some(*gid));
        }
    }
    Ok((
        theirs,
        Pipes {
            stdin: stdin_ours,
            stdout: stdout_ours,
            stderr: stderr_ours,
            results: results_ours,
            terminal: false,
        },
    ))
}

fn on_terminal(exec: &Exec, size: WindowSize, plan: &Plan) -> Result<(Theirs, Pipes), Refusal> {
    let refused = refused_at(Step::Terminal);
    let owner = plan.user.as_ref().map(|(uid, ..)| *uid);
    let (ours, theirs) = terminal::open(size, owner).map_err(refused)?;
    let stdin = match exec.stdin {
        Input::Pipe => Some(fcntl_dupfd_cloexec(&ours, 0).map_err(refused)?),
        Input::Null => None,
    };
    Ok((
        Theirs {
            stdin: theirs,
            stdout: None,
            stderr: None,
            results: None,
        },
        Pipes {
            stdin,
            stdout: ours,
            stderr: None,
            results: None,
            terminal: true,
        },
    ))
}

fn refused_at(step: Step) -> impl Fn(Errno) -> Refusal + Copy {
    move |errno| Refusal { step, errno }
}

/// Makes the agent's end non-blocking. The program's end is a separate open file and stays as it
/// is.
fn our_end_first((ours, theirs): (OwnedFd, OwnedFd)) -> Result<(OwnedFd, OwnedFd), Errno> {
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    Ok((ours, theirs))
}

fn our_end_last((theirs, ours): (OwnedFd, OwnedFd)) -> Result<(OwnedFd, OwnedFd), Errno> {
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    Ok((theirs, ours))
}

/// Opens an empty input. Without a /dev/null, it is a pipe that has no writer.
fn null() -> Result<OwnedFd, Errno> {
    open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .or_else(|_| pipe_with(PipeFlags::CLOEXEC).map(|(reader, _)| reader))
}
