//! The `hearth` command under limits of its host: each is an error that says what to raise, the doctor
//! knows it beforehand, and what the doctor calls enough is enough.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hearth_tests::{kvm, not_measured};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::Value;

/// Wrong usage and what goes wrong in the command itself.
const FAILED: i32 = 125;

/// The command under the limits that `prlimit` knows by these words, with no descriptors but the usual three.
fn limited(limits: &[&str]) -> Command {
    keep_to_itself_what_was_inherited();
    let mut command = Command::new("prlimit");
    command
        .args(limits)
        .arg(env!("CARGO_BIN_EXE_hearth"))
        .stdin(Stdio::null());
    command
}

/// The command with so many descriptors more that are open already.
fn inheriting(more: &str, limits: &[&str]) -> Command {
    keep_to_itself_what_was_inherited();
    let mut command = Command::new("sh");
    let open = more.chars().map(|number| format!("{number}<&0 "));
    let script = format!("exec {}&& exec prlimit \"$@\"", open.collect::<String>());
    command
        .args(["-c", &script, "sh"])
        .args(limits)
        .arg(env!("CARGO_BIN_EXE_hearth"))
        .stdin(Stdio::null());
    command
}

/// What the caller of the tests has left open counts against the limits of whatever they start.
fn keep_to_itself_what_was_inherited() {
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let number = entry.unwrap().file_name().into_string().unwrap();
        let number = number.parse::<i32>().unwrap();
        if number > 2 {
            // SAFETY: the number alone is used, for a flag that all other descriptors of a test have anyway.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            // One that another thread has just closed needs none.
            let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
        }
    }
}

fn outcome(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// Exit code of the doctor and its check of this name.
fn doctor(mut command: Command, name: &str) -> (Option<i32>, Value) {
    let output = command.args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name).unwrap();
    (output.status.code(), check.clone())
}

/// Limits too small for any guest: the words of the error and the check that foretells it.
const TOO_SMALL: [(&str, &str, &str); 4] = [
    ("--nofile=8", "Too many open files", "files"),
    ("--nofile=19:19", "ulimit -n", "files"),
    ("--fsize=1048576", "ulimit -f", "file size"),
    ("--as=67108864", "ulimit -v", "addresses"),
];

#[test]
fn a_limit_that_leaves_no_guest_is_an_error_and_foretold_by_the_doctor() {
    if !kvm() {
        return;
    }
    for (limit, words, name) in TOO_SMALL {
        let (code, text) = outcome(limited(&[limit]).args(["run", "--", "true"]));
        assert_eq!(code, Some(FAILED), "{limit}: {text}");
        assert!(text.contains(words), "{limit}: {text}");
        let (code, check) = doctor(limited(&[limit]), name);
        assert_eq!(code, Some(1), "{limit}: {check}");
        assert_eq!(check["verdict"], "fail", "{limit}: {check}");
        assert!(check["advice"].is_string(), "{limit}: {check}");
    }
}

/// As many as are too few, and one more, in a process that was left some open by whoever started it.
#[test]
fn what_is_inherited_open_counts() {
    if !kvm() {
        return;
    }
    let verdict_at = |more, limit| {
        let (_, check) = doctor(inheriting(more, &[limit]), "files");
        check["verdict"].as_str().unwrap().to_owned()
    };
    assert_eq!(verdict_at("3456789", "--nofile=26"), "fail");
    assert_eq!(verdict_at("3456789", "--nofile=27"), "warn");
    let (code, text) = outcome(inheriting("3456789", &["--nofile=27"]).args(["run", "--", "true"]));
    assert_eq!(code, Some(0), "{text}");
}

/// Whatever it is that there is no descriptor for.
#[test]
fn each_number_of_descriptors_is_enough_or_an_error_that_says_what_to_raise() {
    if !kvm() {
        return;
    }
    let mut enough = false;
    // Fewer, and the command itself cannot be loaded.
    for number in 6..=20 {
        let limit = format!("--nofile={number}");
        let (code, text) = outcome(limited(&[&limit]).args(["run", "--", "true"]));
        match code {
            Some(0) => enough = true,
            code => {
                assert_eq!(code, Some(FAILED), "{limit}: {text}");
                assert!(text.contains("ulimit -n"), "{limit}: {text}");
                assert!(!enough, "{limit}: {text}");
            }
        }
    }
    assert!(enough, "what the doctor calls enough is not");
}

#[test]
fn a_hard_limit_is_not_what_the_doctor_advises_to_raise_to() {
    let (_, check) = doctor(limited(&["--nofile=19:19"]), "files");
    let advice = check["advice"].as_str().unwrap();
    assert!(advice.contains("hard limit"), "{advice}");
    assert!(!advice.contains("ulimit -n 19"), "{advice}");
}

#[test]
fn what_the_doctor_calls_enough_runs_a_guest() {
    if !kvm() {
        return;
    }
    // No place for a queued signal is left: a vCPU is stopped all the same.
    for (limits, name) in [
        (["--nofile=20", "--sigpending=0"], "files"),
        (["--fsize=134217728", "--sigpending=0"], "file size"),
    ] {
        let (_, check) = doctor(limited(&limits), name);
        assert_eq!(check["verdict"], "warn", "{check}");
        let (code, text) = outcome(limited(&limits).args(["run", "--", "true"]));
        assert_eq!(code, Some(0), "{limits:?}: {text}");
    }
}

/// A cgroup of its own for a test; removed with it.
struct Pids(PathBuf);

impl Pids {
    fn new(name: &str, max: u64) -> Option<Self> {
        let root = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
            .map(Path::new)
            .into_iter()
            .find(|root| root.join("cgroup.procs").exists())?;
        let dir = root.join(format!("hearth-{name}-{}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        let cgroup = Self(dir);
        fs::write(cgroup.0.join("pids.max"), max.to_string()).ok()?;
        Some(cgroup)
    }

    /// The command as the cgroup's one process.
    fn command(&self) -> Command {
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ >\"$0/cgroup.procs\" && exec \"$@\""])
            .arg(&self.0)
            .arg(env!("CARGO_BIN_EXE_hearth"))
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Pids {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_limit_on_threads_is_an_error_at_every_number_of_them() {
    if !kvm() {
        return;
    }
    // One is the process itself.
    let mut enough = None;
    for max in 1..=15 {
        let Some(cgroup) = Pids::new("few", max) else {
            not_measured("no cgroup with pids.max may be made here");
            return;
        };
        let (code, text) = outcome(cgroup.command().args(["run", "--", "true"]));
        match code {
            Some(0) => enough = enough.or(Some(max)),
            code => {
                assert_eq!(code, Some(FAILED), "{max}: {text}");
                assert!(text.contains("pids.max"), "{max}: {text}");
                assert_eq!(enough, None, "{max}: {text}");
            }
        }
        let (_, check) = doctor(cgroup.command(), "threads");
        let verdict = if max < 15 { "fail" } else { "warn" };
        assert_eq!(check["verdict"], verdict, "{max}: {check}");
    }
    assert!(enough.is_some(), "what the doctor calls enough is not");
}

#[test]
fn a_log_filter_that_is_none_is_refused() {
    let (code, text) = outcome(limited(&[]).env("HEARTH_LOG", "a=b=c").arg("doctor"));
    assert_eq!(code, Some(FAILED), "{text}");
    assert!(text.contains("HEARTH_LOG"), "{text}");
}
