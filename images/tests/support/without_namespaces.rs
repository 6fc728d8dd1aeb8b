//! Namespaces are refused in many containers, and on systems that permit them to programs that they
//! know.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// Does the work on a thread that namespaces are refused to.
pub(crate) fn without_namespaces<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let refused = [libc::SYS_unshare, libc::SYS_setns].map(|call| (call, Vec::new()));
    let filter: BpfProgram = SeccompFilter::new(
        refused.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        TargetArch::x86_64,
    )
    .unwrap()
    .try_into()
    .unwrap();
    // Of one thread, and of the processes that it starts.
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| {
            apply_filter(&filter).unwrap();
            work()
        });
        refused.join().unwrap()
    })
}
