//! Confines the image's Python on machines where users may have no namespaces. Landlock limits it
//! to the files of the tree, and seccomp to the system calls for reading, computing and writing.
//! That is too narrow for commands.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::confine;
use super::tree_root::TreeRoot;
use crate::command;

/// The permitted system calls. Of these, only `open`, `mkdir`, `rename` and `unlink` (with their
/// `at` variants) change files by path, and Landlock checks them. None reaches another process or a
/// network.
const CALLS: [i64; 59] = [
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_madvise,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_stat,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

/// The permitted commands of `fcntl`. Others make the kernel send a signal that the program chooses
/// to any process of the user (`F_SETSIG`, `F_SETOWN`, and `F_SETFL` with `O_ASYNC`).
const FCNTL: [i32; 5] = [
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_GETFL,
    libc::F_SETFD,
];

const NO_RIGHTS: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

/// Why programs cannot be confined by rules on this machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum RulesError {
    #[error("this kernel has no Landlock")]
    Landlock(#[from] RulesetError),
    #[error("seccomp is not to be had")]
    Seccomp(#[from] seccompiler::BackendError),
    #[error(transparent)]
    File(#[from] io::Error),
}

/// Returns a command for a program of the tree, given by its path in the tree. The program sees
/// this machine's paths, but can access files of the tree only.
pub(super) fn command(tree: &TreeRoot, program: &str) -> Result<Command, RulesError> {
    let mut rules = Some(rules(tree)?);
    let filter = filter()?;
    // If the path is a link that leads out of the tree, its target cannot be started either.
    let mut command = command::tool(tree.path().join(program));
    command.env_clear();
    // SAFETY: the closure takes no lock: it makes system calls, and frees what was allocated
    // before.
    unsafe {
        command.pre_exec(move || {
            libc::umask(0o022);
            confine::close_on_exec()?;
            let rules = rules.take().ok_or(io::ErrorKind::InvalidInput)?;
            let status = rules
                .restrict_self()
                .map_err(|_| io::ErrorKind::Unsupported)?;
            if status.ruleset == RulesetStatus::NotEnforced {
                return Err(io::ErrorKind::Unsupported.into());
            }
            // This matters for root: with root's capabilities, `madvise` can take memory from other
            // processes. `restrict_self` has set `no_new_privs`, so that exec does not restore
            // them.
            rustix::thread::set_capabilities(None, NO_RIGHTS)?;
            apply_filter(&filter).map_err(|_| io::ErrorKind::Unsupported.into())
        });
    }
    Ok(command)
}

fn rules(tree: &TreeRoot) -> Result<RulesetCreated, RulesetError> {
    // Landlock's first version is required and suffices; restrictions of later versions are used
    // where the kernel has them.
    let needed = AccessFs::from_all(ABI::V1);
    let within = AccessFs::from_read(ABI::V1)
        | AccessFs::WriteFile
        | AccessFs::MakeReg
        | AccessFs::MakeDir
        | AccessFs::RemoveFile;
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(needed)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(AccessNet::from_all(ABI::V6))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rule(PathBeneath::new(tree.dir(), within | AccessFs::Truncate))
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.into_iter().map(|call| (call, Vec::new())).collect();
    let fcntl: Result<_, _> = FCNTL.into_iter().map(fcntl).collect();
    allowed.insert(libc::SYS_fcntl, fcntl?);
    let refuse = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(allowed, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Allows one command of `fcntl`. The kernel reads its lower 32 bits only.
fn fcntl(command: i32) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        1,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::from(command.unsigned_abs()),
    )?])
}
