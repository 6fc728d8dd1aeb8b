//! Keeps the embedding program's signals off the library's threads.
//!
//! A signal to a process goes to any thread that does not block it: a handler of the embedding
//! program could run on a thread of the library, on its small stack and under its seccomp filter.
//! Therefore the spawning thread blocks all signals meanwhile, and the new thread inherits its
//! mask. A vCPU thread unblocks the signal that kicks it (see `vcpu::kick`).

/// Signals that a thread's own instructions cause (signal(7)). If blocked, they would still end the
/// program, without its handlers.
const SYNCHRONOUS: [libc::c_int; 6] = [
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGTRAP,
];

/// Calls `act`, which spawns a thread, with all signals but the [`SYNCHRONOUS`] ones blocked on the
/// calling thread.
pub(crate) fn blocked<T>(act: impl FnOnce() -> T) -> T {
    let _blocked = Blocked::new();
    act()
}

/// Guard that blocks signals while it lives. Holds the previous signal mask.
struct Blocked(libc::sigset_t);

impl Blocked {
    fn new() -> Self {
        // SAFETY: all-zero is a valid set; the calls read and write live sets, and change this
        // thread's mask alone.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            for signal in SYNCHRONOUS {
                libc::sigdelset(&raw mut all, signal);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}
