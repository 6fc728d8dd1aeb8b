//! Refuses namespaces, as many containers do, and systems that permit them only to certain
//! programs.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// Runs `work` on a thread that may not create or enter namespaces.
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
    // The filter applies to one thread, and to the processes that it starts.
    std::thread::scope(|scope| {
        let refused = scope.spawn(|| {
            apply_filter(&filter).unwrap();
            work()
        });
        refused.join().unwrap()
    })
}
