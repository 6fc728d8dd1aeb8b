//! Starts a program without copying the agent: the child shares its memory until it has executed
//! the program.
//!
//! The agent does not wait for the child: once it has taken on its user's id, it can be stopped by
//! other processes of that user, and would stop the agent with it. The child's data stay unchanged
//! until a pipe closes that only the child holds open: it does so when it has executed the program
//! or is dead. If a step fails, the child records that first.
//!
//! Neither `posix_spawn` nor the standard library can put the child into a cgroup, a session, a
//! user and limits before its first instruction without a copy of the address space, which costs
//! tens of milliseconds where ring 0 is emulated.

use alloc::{boxed::Box, ffi::CString, vec::Vec};
use core::{
    arch::asm,
    ffi::{CStr, c_char, c_void},
    fmt,
    mem::MaybeUninit,
    ptr::{self, NonNull},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    io::{Errno, fcntl_dupfd_cloexec},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Resource, Rlimit, chdir, ioctl_tiocsctty, setrlimit, setsid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use crate::{plan::Plan, reaper, sys};

/// Enough for a few system calls in unoptimised code; only touched pages are allocated.
const STACK_BYTES: usize = 64 * 1024;

/// The descriptor of a program's third output.
const RESULTS: RawFd = 3;

/// A program to be started.
pub(crate) struct Image<'a> {
    pub(crate) plan: Plan,
    /// Whether to start a session, and thereby a process group.
    pub(crate) session: bool,
    /// Whether stdin is a terminal, which becomes the session's controlling terminal.
    pub(crate) terminal: bool,
    /// The descriptors that become stdin, stdout and stderr, in this order.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// The descriptor that becomes descriptor 3.
    pub(crate) results: Option<BorrowedFd<'a>>,
    /// The directory of the cgroup that the program is born in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// The step at which the child failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The child could not be created.
    Clone,
    Session,
    Terminal,
    Stdio,
    Cwd,
    Limit(Resource),
    User,
    Exec,
}

/// The step and the error for which a program was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) step: Step,
    pub(crate) errno: Errno,
}

/// A program that was not started, and the reason.
pub(crate) type NotStarted = Box<(Plan, Refusal)>;

/// The data of the child, prepared before it exists. The agent does not touch them until the child
/// is gone.
struct Child {
    plan: Plan,
    session: bool,
    terminal: bool,
    /// Descriptors of the child's own table, a copy of the agent's.
    stdio: [RawFd; 3],
    results: Option<RawFd>,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    /// Not initialised: untouched pages cost nothing.
    stack: Box<[MaybeUninit<u128>]>,
    refusal: Option<Refusal>,
}

/// A child that is to become a program. Its data are freed only by [`end`](Self::end).
pub(crate) struct Start {
    pid: Pid,
    /// Hangs up once the child no longer uses the agent's memory.
    pipe: OwnedFd,
    child: NonNull<Child>,
    /// The child no longer uses the agent's memory.
    gone: bool,
}

impl Start {
    /// Starts a program. It has an empty signal mask, not the caller's, and default dispositions as
    /// far as this process has them.
    pub(crate) fn begin(image: Image<'_>) -> Result<Self, NotStarted> {
        let Image { plan, cgroup, .. } = image;
        let failed = |plan, errno| {
            let step = Step::Clone;
            Box::new((plan, Refusal { step, errno }))
        };
        let (pipe, theirs) = match pipe() {
            Ok(ends) => ends,
            Err(errno) => return Err(failed(plan, errno)),
        };
        let child = Box::new(Child {
            session: image.session,
            terminal: image.terminal,
            stdio: image.stdio.map(|fd| fd.as_raw_fd()),
            results: image.results.map(|fd| fd.as_raw_fd()),
            argv: pointers(&plan.argv),
            env: pointers(&plan.env),
            stack: Box::new_uninit_slice(STACK_BYTES / size_of::<u128>()),
            refusal: None,
            plan,
        });
        reaper::expect_children();
        let child = NonNull::from(Box::leak(child));
        match clone(child, cgroup) {
            Ok(pid) => {
                // From here on the child alone has it open.
                drop(theirs);
                let gone = false;
                Ok(Self {
                    pid,
                    pipe,
                    child,
                    gone,
                })
            }
            // SAFETY: it was leaked above, and there is no child.
            Err(errno) => Err(failed(unsafe { Box::from_raw(child.as_ptr()) }.plan, errno)),
        }
    }

    /// Starts a program as [`begin`](Self::begin) does, and blocks until it runs.
    pub(crate) fn run(image: Image<'_>) -> Result<Pid, Errno> {
        let mut start = Self::begin(image).map_err(|failed| failed.1.errno)?;
        while !start.gone {
            let mut fds = [PollFd::new(&start.pipe, PollFlags::empty())];
            match poll(&mut fds, None) {
                Ok(_) => start.gone = true,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        let pid = start.pid;
        start.end().map_err(|failed| failed.1.errno)?;
        Ok(pid)
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns the descriptor that hangs up once the child no longer uses the agent's memory.
    pub(crate) fn waits_for(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// To be called when the child no longer uses the agent's memory: the pipe has hung up, or it
    /// was reaped.
    pub(crate) fn gone(&mut self) {
        self.gone = true;
    }

    /// Returns why the program was not started, if so, and frees the child's data. To be called
    /// once the child is [`gone`](Self::gone); before, it returns `Ok` and frees nothing. A child
    /// that was killed before it executed the program counts as started.
    pub(crate) fn end(self) -> Result<(), NotStarted> {
        if !self.gone {
            return Ok(());
        }
        // SAFETY: leaked by `begin`; the child, which alone used it, is gone, and so is this value.
        let child = *unsafe { Box::from_raw(self.child.as_ptr()) };
        match child.refusal {
            Some(refusal) => Err(Box::new((child.plan, refusal))),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Start")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

/// Creates a pipe. The child's end has a number above those that the program gets.
fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    if theirs.as_raw_fd() > RESULTS {
        return Ok((ours, theirs));
    }
    Ok((ours, fcntl_dupfd_cloexec(theirs, RESULTS + 1)?))
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// Creates a child that runs [`enter`].
fn clone(child: NonNull<Child>, cgroup: Option<BorrowedFd<'_>>) -> Result<Pid, Errno> {
    // SAFETY: a live `Child`, which nobody else refers to.
    let stack = unsafe { &mut (*child.as_ptr()).stack };
    let (bottom, top) = (stack.as_mut_ptr(), stack.as_mut_ptr_range().end);
    let args = libc::clone_args {
        flags: u64::from(libc::CLONE_VM.cast_unsigned()) | CLONE_INTO_CGROUP,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        stack: bottom as u64,
        stack_size: size_of_val(&**stack) as u64,
        cgroup: cgroup.map_or(0, |fd| u64::from(fd.as_raw_fd().unsigned_abs())),
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
    };
    let (number, first, second) = match cgroup {
        Some(_) => (
            libc::SYS_clone3,
            (&raw const args) as usize,
            size_of_val(&args),
        ),
        None => (
            libc::SYS_clone,
            (libc::CLONE_VM | libc::SIGCHLD) as usize,
            top as usize,
        ),
    };
    let result: i64;
    // SAFETY: the child has a stack of its own, 16-byte aligned, and never returns from `enter`. It
    // shares our memory, and runs beside us: it writes to nothing but its stack and its
    // `Child`, which stay as they are until it is gone, and takes nothing from the heap. It
    // shares no signal handlers: none are installed. Thread-local storage, which it would share,
    // is not used.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") number => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            in("r12") child.as_ptr().cast::<c_void>(),
            in("r13") enter as extern "C" fn(*mut c_void) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        Ok(pid @ 1..) => Pid::from_raw(pid).ok_or(Errno::INVAL),
        Ok(error) => Err(Errno::from_raw_os_error(error.saturating_neg())),
        Err(_) => Err(Errno::INVAL),
    }
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The entry point of the child.
extern "C" fn enter(child: *mut c_void) -> ! {
    let child = child.cast::<Child>();
    // SAFETY: the parent passed a live `Child`, which it does not touch until this child is gone.
    let refusal = become_program(unsafe { &*child });
    // SAFETY: as above; the reference has ended.
    unsafe { (*child).refusal = Some(refusal) };
    sys::exit(127)
}

/// Turns the child into the program. Returns only if that fails. Does not allocate.
fn become_program(child: &Child) -> Refusal {
    let plan = &child.plan;
    let refused = |step| move |errno| Refusal { step, errno };
    let prepare = || {
        if child.session {
            setsid().map_err(refused(Step::Session))?;
        }
        // SAFETY: they are open in this process, whose table is a copy of the parent's at the
        // clone.
        let [stdin, stdout, stderr] = child.stdio.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
        if child.terminal {
            ioctl_tiocsctty(stdin).map_err(refused(Step::Terminal))?;
        }
        dup2_stdin(stdin).map_err(refused(Step::Stdio))?;
        dup2_stdout(stdout).map_err(refused(Step::Stdio))?;
        dup2_stderr(stderr).map_err(refused(Step::Stdio))?;
        if let Some(results) = child.results {
            sys::give(results, RESULTS).map_err(refused(Step::Stdio))?;
        }
        for (resource, value) in &plan.limits {
            let limit = Rlimit {
                current: Some(*value),
                maximum: Some(*value),
            };
            setrlimit(*resource, limit).map_err(refused(Step::Limit(*resource)))?;
        }
        if let Some((uid, gid, groups)) = &plan.user {
            set_thread_groups(groups).map_err(refused(Step::User))?;
            set_thread_res_gid(*gid, *gid, *gid).map_err(refused(Step::User))?;
            // From here on other programs of that user may stop, kill and slow down this process,
            // but not look into it: its memory is not dumpable after this.
            set_thread_res_uid(*uid, *uid, *uid).map_err(refused(Step::User))?;
        }
        if plan.no_new_privs {
            // No program that it executes gains rights, whatever the file's mode says. So the
            // bounding set of capabilities has nothing to limit.
            set_no_new_privs(true).map_err(refused(Step::User))?;
        }
        // As the user: without permission to enter the directory, this must fail.
        chdir(&*plan.cwd).map_err(refused(Step::Cwd))
    };
    if let Err(refusal) = prepare() {
        return refusal;
    }
    let _ = sys::set_signal_mask(0);
    let mut errno = Errno::NOENT;
    for candidate in &plan.candidates {
        match execute(candidate, &child.argv, &child.env) {
            Errno::NOENT | Errno::NOTDIR => {}
            // Found, but not executable: a later directory of PATH may have one that is.
            Errno::ACCESS => errno = Errno::ACCESS,
            other => {
                errno = other;
                break;
            }
        }
    }
    Refusal {
        step: Step::Exec,
        errno,
    }
}

fn execute(path: &CStr, argv: &[*const c_char], env: &[*const c_char]) -> Errno {
    let args = [
        path.as_ptr().addr(),
        argv.as_ptr().addr(),
        env.as_ptr().addr(),
        0,
    ];
    // SAFETY: both arrays are null-terminated arrays of pointers to strings that the parent keeps
    // alive.
    match unsafe { sys::call(libc::SYS_execve, args) } {
        Ok(_) => Errno::INVAL,
        Err(errno) => errno,
    }
}
