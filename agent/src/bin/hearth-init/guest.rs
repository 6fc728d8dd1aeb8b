//! What the agent knows of the guest, and does for all connections alike.

use alloc::string::String;
use core::fmt::Write;

use hearth_agent::proto::{
    Account, Applied, Exec, Hello, Input, InstanceId, Memory, OutputMode, Pong, Refresh, Refreshed,
    SpawnFailure, Standstill, WindowSize,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{Mode, OFlags, fchown, fcntl_setfl, open},
    io::{Errno, fcntl_dupfd_cloexec},
    pipe::{PipeFlags, pipe_with},
    system::sysinfo,
};

use crate::{
    account::{self, Person},
    cgroup::{Cgroup, Cgroups},
    clock::{Instant, uptime_us},
    diagnose,
    exec::{Pipes, Program},
    hygiene::{self, Hygiene},
    mounts,
    plan::Plan,
    quiet,
    root::{self, Root},
    runtime,
    spawn::{Image, Refusal, Step, spawn},
    terminal,
    text::Stderr,
};

/// The guest.
#[derive(Debug)]
pub(crate) struct Guest {
    instance: InstanceId,
    started_us: u64,
    /// Whether this process is PID 1, and so may change the machine.
    init: bool,
    prepared: bool,
    /// Why the root file system that was asked for is not there.
    no_root: Option<Errno>,
    hygiene: Hygiene,
    pub(crate) cgroups: Cgroups,
    /// Programs that run.
    pub(crate) programs: u32,
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

    /// Sets up what programs need, once.
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
            // The console costs an exit per byte: silent unless the boot words say `hearth_log=1`.
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
        // No program sees the template's identity.
        if self.cgroups.are_frozen() && done.all_applied() {
            done.programs = self.thaw();
        }
        done
    }

    /// Has all programs stand still.
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

    /// Lets programs that stand still go on.
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
            // Programs of another root are not what was asked for.
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
        let person = self.person(exec)?;
        let plan = Plan::new(exec, person.as_ref())?;
        let cgroup = self.cgroups.acquire(&exec.limits)?;
        match launch(exec, &plan, cgroup.as_ref()) {
            Ok((pid, pipes)) => {
                self.programs += 1;
                Ok(Program::new(exec, pid, Instant::now(), pipes, cgroup))
            }
            Err(refusal) => {
                self.cgroups.release(cgroup);
                Err(diagnose::failure(&plan, refusal))
            }
        }
    }

    /// Whom a program is to run as; none: our own user.
    fn person(&self, exec: &Exec) -> Result<Option<Person>, SpawnFailure> {
        let person = account::person(exec.user.as_ref()).map_err(|_| SpawnFailure::NoUser {
            name: match &exec.user {
                Some(Account::Name(name)) => String::from_utf8_lossy(name).into_owned(),
                _ => String::new(),
            },
        })?;
        if let Some(Person {
            ids,
            entry: Some(entry),
        }) = &person
            && self.init
        {
            // What is missing then shows when the program needs it.
            let _ = entry.settle_home(ids);
        }
        Ok(person)
    }

    /// Takes note of a program's end.
    pub(crate) fn ended(&mut self, cgroup: Option<Cgroup>) {
        self.programs = self.programs.saturating_sub(1);
        self.cgroups.release(cgroup);
    }
}

fn launch(
    exec: &Exec,
    plan: &Plan,
    cgroup: Option<&Cgroup>,
) -> Result<(rustix::process::Pid, Pipes), Refusal> {
    if let Some(size) = exec.terminal {
        return launch_on_terminal(exec, size, plan, cgroup);
    }
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
    let stdio = [
        stdin.as_fd(),
        stdout.as_fd(),
        stderr.as_ref().unwrap_or(&stdout).as_fd(),
    ];
    let mut image = image(plan, stdio, cgroup);
    image.results = results.as_ref().map(AsFd::as_fd);
    if let Some((uid, gid, _)) = plan.user.as_ref().filter(|(uid, ..)| !uid.is_root()) {
        // So that the user can open them by name, as /dev/stderr. What that fails of, the program sees when it tries.
        let [stdin, outputs @ ..] = stdio;
        let stdin = (exec.stdin == Input::Pipe).then_some(stdin);
        for pipe in outputs.into_iter().chain(stdin).chain(image.results) {
            let _ = fchown(pipe, Some(*uid), Some(*gid));
        }
    }
    let pid = spawn(&image)?;
    Ok((
        pid,
        Pipes {
            stdin: stdin_ours,
            stdout: stdout_ours,
            stderr: stderr_ours,
            results: results_ours,
            terminal: false,
        },
    ))
}

fn launch_on_terminal(
    exec: &Exec,
    size: WindowSize,
    plan: &Plan,
    cgroup: Option<&Cgroup>,
) -> Result<(rustix::process::Pid, Pipes), Refusal> {
    let refused = refused_at(Step::Terminal);
    let owner = plan.user.as_ref().map(|(uid, ..)| *uid);
    let (ours, theirs) = terminal::open(size, owner).map_err(refused)?;
    let stdin = match exec.stdin {
        Input::Pipe => Some(fcntl_dupfd_cloexec(&ours, 0).map_err(refused)?),
        Input::Null => None,
    };
    let mut image = image(plan, [theirs.as_fd(); 3], cgroup);
    image.terminal = true;
    let pid = spawn(&image)?;
    Ok((
        pid,
        Pipes {
            stdin,
            stdout: ours,
            stderr: None,
            results: None,
            terminal: true,
        },
    ))
}

fn image<'a>(plan: &'a Plan, stdio: [BorrowedFd<'a>; 3], cgroup: Option<&'a Cgroup>) -> Image<'a> {
    Image {
        candidates: &plan.candidates,
        argv: &plan.argv,
        env: &plan.env,
        cwd: &plan.cwd,
        session: true,
        terminal: false,
        stdio,
        results: None,
        limits: &plan.limits,
        user: plan.user.as_ref(),
        cgroup: cgroup.map(Cgroup::dir),
    }
}

fn refused_at(step: Step) -> impl Fn(Errno) -> Refusal + Copy {
    move |errno| Refusal { step, errno }
}

/// Only our end must never block: the program's end is its own open file.
fn our_end_first((ours, theirs): (OwnedFd, OwnedFd)) -> Result<(OwnedFd, OwnedFd), Errno> {
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    Ok((ours, theirs))
}

fn our_end_last((theirs, ours): (OwnedFd, OwnedFd)) -> Result<(OwnedFd, OwnedFd), Errno> {
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    Ok((theirs, ours))
}

/// An empty input. Without a /dev/null, a pipe that nobody writes to serves.
fn null() -> Result<OwnedFd, Errno> {
    open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .or_else(|_| pipe_with(PipeFlags::CLOEXEC).map(|(reader, _)| reader))
}
