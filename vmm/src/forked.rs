//! Tells whether this process is the one that used the library first, or a forked child of it.
//! Operations on VMs check this, so it takes no system call (where the kernel has
//! `MADV_WIPEONFORK`).

use std::sync::atomic::{AtomicBool, Ordering};

/// A mark that a process makes for itself.
#[derive(Debug)]
pub(crate) struct Mark {
    /// A flag that is set, and cleared in a child. `None` where the host provides no such page.
    page: Option<&'static AtomicBool>,
    process: u32,
}

impl Mark {
    /// Marks the calling process. Keeps a page of memory for the lifetime of the process.
    pub(crate) fn of_this_process() -> Self {
        let page = wiped_on_fork();
        if let Some(page) = page {
            page.store(true, Ordering::Relaxed);
        }
        Self {
            page,
            process: std::process::id(),
        }
    }

    /// Returns whether the caller is a forked child of the process that made the mark.
    pub(crate) fn is_forked(&self) -> bool {
        match self.page {
            Some(page) => !page.load(Ordering::Relaxed),
            None => self.process != std::process::id(),
        }
    }

    /// The id of the process that made the mark.
    pub(crate) fn process(&self) -> u32 {
        self.process
    }
}

/// Maps a zeroed page that a child of fork(2) finds zeroed again (`MADV_WIPEONFORK`, since Linux
/// 4.14).
fn wiped_on_fork() -> Option<&'static AtomicBool> {
    let bytes = size_of::<AtomicBool>();
    // SAFETY: a new private mapping of a page, which nothing else knows of; the kernel rounds its
    // size up. It is never unmapped, so that the reference is good for ever, and all-zero bytes
    // are a clear flag.
    unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if page == libc::MAP_FAILED {
            return None;
        }
        if libc::madvise(page, bytes, libc::MADV_WIPEONFORK) != 0 {
            libc::munmap(page, bytes);
            return None;
        }
        Some(&*page.cast::<AtomicBool>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns what [`Mark::is_forked`] returns in a child of fork(2).
    fn child_says(mark: &Mark) -> bool {
        // SAFETY: the child reads a page, and ends without running anything else.
        unsafe {
            match libc::fork() {
                0 => libc::_exit(i32::from(mark.is_forked())),
                child => {
                    let mut status = 0;
                    assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
                    libc::WEXITSTATUS(status) == 1
                }
            }
        }
    }

    #[test]
    fn a_child_knows_that_it_is_one_and_its_parent_that_it_is_none() {
        let mark = Mark::of_this_process();
        assert!(mark.page.is_some(), "this kernel wipes no pages");
        assert!(!mark.is_forked());
        assert!(child_says(&mark));
        assert!(!mark.is_forked());
        let by_number = Mark { page: None, ..mark };
        assert!(!by_number.is_forked() && child_says(&by_number));
    }
}
