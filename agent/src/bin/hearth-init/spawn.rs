//! Starting a program without copying the agent: a child that shares its memory until it has executed the program.
//!
//! The parent stands still meanwhile (CLONE_VFORK), so the child reports what failed by writing it down. Neither
//! `posix_spawn` nor the standard library can put the child into a cgroup, a session, a user and limits before its first
//! instruction without a copy of the address space, which costs tens of milliseconds where ring 0 is emulated.

use alloc::{boxed::Box, ffi::CString, vec::Vec};
use core::{
    arch::asm,
    ffi::{CStr, c_char, c_void},
    mem::MaybeUninit,
    ptr,
};

use rustix::{
    fd::{AsRawFd, BorrowedFd},
    io::Errno,
    process::{Pid, Resource, Rlimit, chdir, ioctl_tiocsctty, setrlimit, setsid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use crate::{plan::Ids, reaper, sys};

/// Enough for a few system calls, unoptimised; only what is touched exists.
const STACK_BYTES: usize = 64 * 1024;

/// The descriptor of a program's third output.
const RESULTS: i32 = 3;

/// Everything that the child needs, made before it exists.
pub(crate) struct Image<'a> {
    /// Paths to try in order, as `execvp` does.
    pub(crate) candidates: &'a [CString],
    pub(crate) argv: &'a [CString],
    pub(crate) env: &'a [CString],
    pub(crate) cwd: &'a CStr,
    /// Whether to start a session, and so a process group.
    pub(crate) session: bool,
    /// Whether stdin is a terminal that the session is to control.
    pub(crate) terminal: bool,
    /// What becomes stdin, stdout and stderr, in this order.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// What becomes descriptor 3.
    pub(crate) results: Option<BorrowedFd<'a>>,
    pub(crate) limits: &'a [(Resource, u64)],
    pub(crate) user: Option<&'a Ids>,
    /// The directory of the cgroup to be born in.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// What the child was at when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It does not exist.
    Clone,
    Session,
    Terminal,
    Stdio,
    Cwd,
    Limit(Resource),
    User,
    Exec,
}

/// Why there is no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) step: Step,
    pub(crate) errno: Errno,
}

/// What parent and child share.
struct Child<'a> {
    image: &'a Image<'a>,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    refusal: Option<Refusal>,
}

/// Starts a program. The caller's signal mask is not inherited: the program has none, and default dispositions as far as
/// this process has them. A child that could not execute the program is left for the reaper.
pub(crate) fn spawn(image: &Image<'_>) -> Result<Pid, Refusal> {
    let mut child = Child {
        image,
        argv: pointers(image.argv),
        env: pointers(image.env),
        refusal: None,
    };
    // Not filled: what the child does not touch costs no page.
    let mut stack = Box::new_uninit_slice(STACK_BYTES / size_of::<u128>());
    reaper::expect_children();
    let result = clone_vfork(&mut child, &mut stack, image.cgroup);
    match (result, child.refusal) {
        (Ok(_), Some(refusal)) => Err(refusal),
        (Ok(pid), None) => Ok(pid),
        (Err(errno), _) => Err(Refusal {
            step: Step::Clone,
            errno,
        }),
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// Makes a child that runs [`enter`] on `stack` and waits until it has executed a program or is gone.
fn clone_vfork(
    child: &mut Child<'_>,
    stack: &mut [MaybeUninit<u128>],
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Pid, Errno> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    let top = stack.as_mut_ptr_range().end;
    let args = libc::clone_args {
        flags: u64::from(flags.cast_unsigned()) | CLONE_INTO_CGROUP,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        stack: stack.as_mut_ptr() as u64,
        stack_size: size_of_val(stack) as u64,
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
            (flags | libc::SIGCHLD) as usize,
            top as usize,
        ),
    };
    let result: i64;
    // SAFETY: the child has a stack of its own, 16-byte aligned, and never returns from `enter`; it shares our memory, but
    // we stand still until it has executed a program or exited, and `child` and `stack` outlive that. It shares no signal
    // handlers (none are installed) and runs only async-signal-safe code.
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
            in("r12") ptr::from_mut(child).cast::<c_void>(),
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

/// Where the child begins.
extern "C" fn enter(child: *mut c_void) -> ! {
    // SAFETY: the parent passed a live `Child` and stands still.
    let child = unsafe { &mut *child.cast::<Child<'_>>() };
    child.refusal = Some(become_program(child));
    sys::exit(127)
}

/// Turns the child into the program. Returns only if that fails. Allocates nothing.
fn become_program(child: &Child<'_>) -> Refusal {
    let image = child.image;
    let refused = |step| move |errno| Refusal { step, errno };
    let prepare = || {
        if image.session {
            setsid().map_err(refused(Step::Session))?;
        }
        let [stdin, stdout, stderr] = image.stdio;
        if image.terminal {
            ioctl_tiocsctty(stdin).map_err(refused(Step::Terminal))?;
        }
        dup2_stdin(stdin).map_err(refused(Step::Stdio))?;
        dup2_stdout(stdout).map_err(refused(Step::Stdio))?;
        dup2_stderr(stderr).map_err(refused(Step::Stdio))?;
        if let Some(results) = image.results {
            sys::give(results, RESULTS).map_err(refused(Step::Stdio))?;
        }
        for (resource, value) in image.limits {
            let limit = Rlimit {
                current: Some(*value),
                maximum: Some(*value),
            };
            setrlimit(*resource, limit).map_err(refused(Step::Limit(*resource)))?;
        }
        if let Some((uid, gid, groups)) = image.user {
            set_thread_groups(groups).map_err(refused(Step::User))?;
            set_thread_res_gid(*gid, *gid, *gid).map_err(refused(Step::User))?;
            set_thread_res_uid(*uid, *uid, *uid).map_err(refused(Step::User))?;
        }
        // As the user: who may not enter a directory is not helped into it.
        chdir(image.cwd).map_err(refused(Step::Cwd))
    };
    if let Err(refusal) = prepare() {
        return refusal;
    }
    let _ = sys::set_signal_mask(0);
    let mut errno = Errno::NOENT;
    for candidate in image.candidates {
        match execute(candidate, &child.argv, &child.env) {
            Errno::NOENT | Errno::NOTDIR => {}
            // Found, but not allowed: another directory may have one that is.
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
    // SAFETY: both arrays are null-terminated arrays of pointers to strings that the parent keeps alive.
    match unsafe { sys::call(libc::SYS_execve, args) } {
        Ok(_) => Errno::INVAL,
        Err(errno) => errno,
    }
}
