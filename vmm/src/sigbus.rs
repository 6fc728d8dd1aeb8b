//! Handles SIGBUS on the library's own threads, so that it ends a VM and not the embedding program.
//!
//! The host's kernel sends it to a thread that touches memory that the kernel cannot provide (a
//! page that the hardware has lost, a page of a template's file that cannot be read or was cut
//! off), or whose guest crosses cache lines with a locked instruction where
//! `split_lock_detect=fatal`. A thread that serves a guest registers its VM ([`Watch::guard`]);
//! there the handler marks the VM as lost, and maps a page of zeroes where guest memory is lost, so
//! that the access in progress completes. On all other threads, and for faults that are not due to
//! the guest, the signal goes to the handler that was installed before.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};

use crate::memory::{GuestRam, HUGE_PAGE_SIZE, PAGE_SIZE};

static WANTED: AtomicBool = AtomicBool::new(true);
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
/// The previous action of the signal; never freed, as the handler may run at any time.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

thread_local! {
    /// The VM that this thread serves; null elsewhere. Const-initialised and without a destructor,
    /// so that the handler may read it at any time.
    static SERVED: Cell<*const Watch> = const { Cell::new(std::ptr::null()) };
    /// Whether the thread is in `KVM_RUN`: a SIGBUS there is caused by the guest.
    static IN_GUEST: Cell<bool> = const { Cell::new(false) };
}

/// Leaves SIGBUS of this process to the embedding program, for a program whose own handler must be
/// the first. Guest memory that the host loses then ends the program, unless that handler deals
/// with it. Has an effect before the first VM only; returns whether it had.
pub fn leave_sigbus_alone() -> bool {
    WANTED.store(false, Ordering::SeqCst);
    INSTALLED.get().is_none()
}

/// Installs the handler, once per process, in front of the previous one.
pub(crate) fn install() -> std::io::Result<()> {
    let install = || {
        if !WANTED.load(Ordering::SeqCst) {
            return Ok(());
        }
        // SAFETY: all-zero is a valid `sigaction` (SIG_DFL, no flags, an empty mask).
        let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
        ours.sa_sigaction = handler as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: both are live structures. The previous action is read and kept first, so that the
        // handler finds it from its first call on.
        let done = unsafe {
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut previous) == 0 {
                PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::SeqCst);
                libc::sigaction(libc::SIGBUS, &raw const ours, std::ptr::null_mut())
            } else {
                -1
            }
        };
        match done {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    };
    let installed = *INSTALLED.get_or_init(install);
    installed.map_err(std::io::Error::from_raw_os_error)
}

/// The state of one VM that the handler needs.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Host address and bytes of each region of guest memory in this process. All are mapped as
    /// long as this value lives.
    ranges: Vec<(u64, u64)>,
    lost: AtomicBool,
    _ram: GuestRam,
}

impl Watch {
    pub(crate) fn new(ram: GuestRam) -> Arc<Self> {
        let regions = ram.host_regions().into_iter();
        Arc::new(Self {
            ranges: regions.map(|(_, bytes, host)| (host, bytes)).collect(),
            lost: AtomicBool::new(false),
            _ram: ram,
        })
    }

    /// Registers this VM as the one that the calling thread serves, while the guard lives.
    pub(crate) fn guard(&self) -> Guard<'_> {
        Guard {
            before: SERVED.replace(self),
            _served: self,
        }
    }

    /// Whether a SIGBUS has ended the VM, for instance because the host could not provide its
    /// memory.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Whether `address` is in guest memory.
    fn holds(&self, address: u64) -> bool {
        let inside = |(start, len): &(u64, u64)| address.wrapping_sub(*start) < *len;
        self.ranges.iter().any(inside)
    }
}

/// See [`Watch::guard`].
pub(crate) struct Guard<'a> {
    before: *const Watch,
    _served: &'a Watch,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        SERVED.set(self.before);
    }
}

/// Calls `run`, which enters the guest (`KVM_RUN`), and marks the thread as in the guest meanwhile.
pub(crate) fn in_guest<T>(run: impl FnOnce() -> T) -> T {
    IN_GUEST.set(true);
    let result = run();
    IN_GUEST.set(false);
    result
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid structure to a handler with SA_SIGINFO, and so must a
    // handler that chains to this one; the errno of the interrupted code is this thread's own.
    let (code, address, errno) = unsafe {
        let info = &*info;
        (
            info.si_code,
            info.si_addr() as u64,
            *libc::__errno_location(),
        )
    };
    let served = SERVED.get();
    // SAFETY: the guard that set the pointer borrows the watch, and resets the pointer before the
    // borrow ends.
    if served.is_null() || !unsafe { &*served }.is_met_by(code, address) {
        // SAFETY: called from the handler, with its own arguments.
        unsafe { chain(signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

impl Watch {
    /// Marks the VM as lost if the signal is due to its guest; async-signal-safe. Returns false if
    /// it is not, or if a lost page could not be replaced outside of `KVM_RUN`.
    fn is_met_by(&self, code: c_int, address: u64) -> bool {
        // Only the kernel's own signals (positive codes) have an address.
        let is_lost_page = code > 0 && self.holds(address);
        let is_guests = match code {
            // Sent to this thread alone, which the library never does.
            libc::SI_TKILL => true,
            code => is_lost_page || (code > 0 && IN_GUEST.get()),
        };
        if !is_guests || (is_lost_page && !replace_page(address) && !IN_GUEST.get()) {
            return false;
        }
        self.lost.store(true, Ordering::Relaxed);
        crate::immediate_exit::leave_guest();
        true
    }
}

/// Maps zeroes where guest memory is lost: a page or, if that fails, a huge page.
/// Async-signal-safe.
fn replace_page(address: u64) -> bool {
    [PAGE_SIZE, HUGE_PAGE_SIZE].into_iter().any(|bytes| {
        // SAFETY: the page lies in guest memory that is mapped as long as its watch lives; there
        // are no Rust references into it. mmap(2) is a plain system call.
        let mapped = unsafe {
            libc::mmap(
                (address & !(bytes - 1)) as *mut c_void,
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        mapped != libc::MAP_FAILED
    })
}

/// Passes the signal to the previous action.
///
/// # Safety
/// To be called only from the signal handler, with its own arguments.
unsafe fn chain(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = PREVIOUS.load(Ordering::SeqCst);
    // SAFETY: set before the handler was installed, and never freed.
    let Some(previous) = (unsafe { previous.as_ref() }) else {
        return;
    };
    // SAFETY: the action from sigaction(2) is SIG_DFL, SIG_IGN, or a function of the type that its
    // flags say.
    unsafe {
        // A notice of lost memory that was not touched yet (BUS_MCEERR_AO) does not repeat itself
        // either.
        let sent = (*info).si_code <= 0 || (*info).si_code == libc::BUS_MCEERR_AO;
        match previous.sa_sigaction {
            libc::SIG_IGN if sent => {}
            // A fault cannot be ignored: it would repeat itself at once.
            libc::SIG_DFL | libc::SIG_IGN => {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
                // A fault repeats itself when the handler returns; a signal that was sent is sent
                // again.
                if sent {
                    libc::raise(signal);
                }
            }
            handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{MIB, Sharing};
    use crate::seccomp::{Role, confine};

    /// Regression test: this used to end the embedding program.
    #[test]
    fn memory_that_a_device_cannot_read_ends_its_vm_alone() {
        install().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * MIB).unwrap();
        let cut = file.try_clone().unwrap();
        let ram = GuestRam::map_file(Arc::new(file), 4 * MIB, Sharing::Private).unwrap();
        ram.map().write_obj(7u64, GuestAddress(MIB)).unwrap();
        cut.set_len(0).unwrap();
        let watch = Watch::new(ram.clone());
        let other = Watch::new(GuestRam::new(MIB).unwrap());
        let seen = Arc::clone(&watch);
        // Like an event thread: confined, and with another VM served before.
        let thread = std::thread::spawn(move || {
            confine(Role::Events).unwrap();
            drop(other.guard());
            let serves = seen.guard();
            let read = |at| ram.map().read_obj::<u64>(GuestAddress(at)).unwrap();
            let read = [read(2 * MIB), read(MIB)];
            ram.map()
                .write_obj(9u64, GuestAddress(3 * MIB + 8))
                .unwrap();
            drop(serves);
            (
                read,
                ram.map()
                    .read_obj::<u64>(GuestAddress(3 * MIB + 8))
                    .unwrap(),
                other.is_lost(),
            )
        });
        // `read[1]` is not checked: the host may keep the guest's private copy, or drop it with the
        // file.
        let (read, written, other_is_lost) = thread.join().unwrap();
        assert_eq!((read[0], written, other_is_lost), (0, 9, false));
        assert!(watch.is_lost());
    }
}
