//! The library's threads take no part in the embedding program's signals.
//!
//! A signal to a process goes to any thread that does not block it: a handler of the embedding
//! program's would run on a thread of ours, on its small stack and under its seccomp filter. So
//! threads are made by one that blocks all signals meanwhile, and begin with that. A vCPU thread
//! lets in the one that kicks it (see `vcpu::kick`).

/// What the thread does that gets one of them (signal(7)). Blocked, they would end the program all
/// the same, past its handlers.
const SYNCHRONOUS: [libc::c_int; 6] = [
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGTRAP,
];

/// Does `act`, which makes a thread, with all signals but [`SYNCHRONOUS`] ones blocked on the
/// calling thread.
pub(crate) fn blocked<T>(act: impl FnOnce() -> T) -> T {
    let _blocked = Blocked::new();
    act()
}

/// While it lives, signals are blocked. Holds what was blocked before.
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
