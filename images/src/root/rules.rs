//! The image's Python where this machine's users may have no namespaces: by Landlock it sees the
//! tree's files alone, and by seccomp it makes no system calls but those that reading, computing
//! and writing take. That is too narrow for commands.
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

/// None of them changes a file by its path but `mkdir`, `rename` and `unlink`, which Landlock
/// judges; none reaches another process or a network.
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

/// What `fcntl` does for them. Others of its commands make the kernel send a signal of their choice
/// to any process of the user's (`F_SETSIG`, `F_SETOWN` and `F_SETFL` with `O_ASYNC`).
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

/// Why programs cannot be confined like this here.
#[derive(Debug, thiserror::Error)]
pub(super) enum RulesError {
    #[error("this kernel has no Landlock")]
    Landlock(#[from] RulesetError),
    #[error("seccomp is not to be had")]
    Seccomp(#[from] seccompiler::BackendError),
    #[error(transparent)]
    File(#[from] io::Error),
}

/// A command for a program of the tree, named by its path there; its own view is this machine's,
/// and all but the tree is shut.
pub(super) fn command(tree: &TreeRoot, program: &str) -> Result<Command, RulesError> {
    let mut rules = Some(rules(tree)?);
    let filter = filter()?;
    // What is behind a link that leads out of the tree cannot be started either.
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
            // Root's as well, for whom `madvise` takes memory from others. `restrict_self` has seen
            // to it that nothing gives them back (`no_new_privs`).
            rustix::thread::set_capabilities(None, NO_RIGHTS)?;
            apply_filter(&filter).map_err(|_| io::ErrorKind::Unsupported.into())
        });
    }
    Ok(command)
}

fn rules(tree: &TreeRoot) -> Result<RulesetCreated, RulesetError> {
    // What the first version cannot do is not needed; what later ones can is taken along.
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

/// Allows one command of `fcntl`, of which the kernel reads 32 bits.
fn fcntl(command: i32) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(
        1,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        u64::from(command.unsigned_abs()),
    )?])
}
