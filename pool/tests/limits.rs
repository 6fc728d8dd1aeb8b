//! The `hearth` command under limits of its host: exceeding a limit is an error that says what to
//! raise, the doctor predicts it, and what the doctor calls enough is enough.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::BorrowedFd;
use std::process::{Command, Stdio};
use std::sync::Once;
use std::time::Duration;

use hearth_tests::{Cgroup, kernel_path, kvm, not_measured, patience, shell_root};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::Value;

const HEARTH: &str = env!("CARGO_BIN_EXE_hearth");
/// Exit code of wrong usage and of failures of the command itself.
const FAILED: i32 = 125;

/// Returns the command under limits in `prlimit`'s format, with no descriptors but the standard
/// three. The command is killed if it hangs.
fn limited(limits: &[&str]) -> Command {
    keep_to_itself_what_was_inherited();
    let mut command = Command::new("timeout");
    let seconds = patience(Duration::from_secs(30)).as_secs().to_string();
    command
        .args(["--signal=KILL", &seconds, "prlimit"])
        .args(limits)
        .arg(HEARTH)
        .stdin(Stdio::null());
    command
}

/// Returns the command with more descriptors already open: their numbers are the digits of `more`.
fn inheriting(more: &str, limits: &[&str]) -> Command {
    keep_to_itself_what_was_inherited();
    let mut command = Command::new("sh");
    let open = more.chars().map(|number| format!("{number}<&0 "));
    let script = format!("exec {}&& exec prlimit \"$@\"", open.collect::<String>());
    command
        .args(["-c", &script, "sh"])
        .args(limits)
        .arg(HEARTH)
        .stdin(Stdio::null());
    command
}

/// Whether guests can run on this host. The first call runs one without a limit, which also builds
/// the files that it boots from, so that no build runs under a limit.
fn runs_without_a_limit() -> bool {
    static TRIED: Once = Once::new();
    let can_run = kvm();
    if can_run {
        TRIED.call_once(|| {
            let (code, text) = outcome(Command::new(HEARTH).args(["run", "--", "true"]));
            assert_eq!(code, Some(0), "{text}");
        });
    }
    can_run
}

/// Sets close-on-exec on all inherited descriptors: they would count against the limits of the
/// commands that the tests start.
fn keep_to_itself_what_was_inherited() {
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let number = entry.unwrap().file_name().into_string().unwrap();
        let number = number.parse::<i32>().unwrap();
        if number > 2 {
            // SAFETY: the number alone is used, for a flag that all other descriptors of a test
            // have anyway.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            // A descriptor that another thread has just closed does not need it.
            let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
        }
    }
}

fn outcome(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// Runs the doctor; returns its exit code and its check of this name.
fn doctor(mut command: Command, name: &str) -> (Option<i32>, Value) {
    let output = command.args(["doctor", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name).unwrap();
    (output.status.code(), check.clone())
}

/// Limits too small for any guest: a part of the error, and the check that predicts it.
const TOO_SMALL: [(&str, &str, &str); 4] = [
    ("--nofile=8", "Too many open files", "files"),
    ("--nofile=18:18", "ulimit -n", "files"),
    ("--fsize=1048576", "ulimit -f", "file size"),
    ("--as=67108864", "ulimit -v", "addresses"),
];

#[test]
fn a_limit_that_leaves_no_guest_is_an_error_and_foretold_by_the_doctor() {
    if !runs_without_a_limit() {
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

/// One descriptor too few, and just enough, in a process that inherited open descriptors.
#[test]
fn what_is_inherited_open_counts() {
    if !runs_without_a_limit() {
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

/// For each descriptor that may be the one that cannot be opened.
#[test]
fn each_number_of_descriptors_is_enough_or_an_error_that_says_what_to_raise() {
    if !runs_without_a_limit() {
        return;
    }
    let mut enough = false;
    // With fewer, the command itself cannot be loaded.
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

/// For each mapping that may be the one that does not fit: a thread's stack, a kernel, a guest.
#[test]
fn each_size_of_the_address_space_is_enough_or_an_error_that_says_what_to_raise() {
    if !runs_without_a_limit() {
        return;
    }
    let kernel = kernel_path();
    let boot = ["boot", "--timeout", "0.1", "--kernel"].map(OsStr::new);
    let boot = [boot.as_slice(), &[kernel.as_os_str()]].concat();
    let run = ["run", "--", "true"].map(OsStr::new);
    // `boot` reaches its threads with little memory; `run` reads the kernel into memory before.
    let few = (8..32).map(|mib| (mib, boot.as_slice(), 124));
    let more = [16, 24, 36, 40, 64, 96, 128, 192, 256, 512, 1024];
    let more = more.map(|mib| (mib, run.as_slice(), 0));
    let mut enough = false;
    for (mib, arguments, success) in few.chain(more) {
        let limit = |mib: u64| format!("--as={}", mib << 20);
        // With less, the command itself cannot be loaded.
        if outcome(limited(&[&limit(mib - 1)]).arg("--version")).0 != Some(0) {
            continue;
        }
        let (code, text) = outcome(limited(&[&limit(mib)]).args(arguments));
        enough = code == Some(success);
        if !enough {
            assert_eq!(code, Some(FAILED), "{mib} MiB, {arguments:?}: {text}");
            assert!(text.contains("ulimit -v"), "{mib} MiB: {text}");
        }
    }
    assert!(enough, "1 GiB is not enough");
}

/// The guest chooses how large the files are.
#[test]
fn files_that_are_too_large_for_the_host_are_an_error_and_no_signal() {
    if !runs_without_a_limit() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let Some(root) = shell_root(home.path(), &["/usr/bin/truncate"], &[]) else {
        return;
    };
    let root = root.to_str().unwrap();
    let out = home.path().join("out");
    fs::create_dir(&out).unwrap();
    // Guest memory is a file, too, so no smaller limit is possible.
    let limited = || limited(&["--fsize=33554432"]);
    let run = ["run", "--memory", "32", "--root", root];
    let copy = format!("/tmp/large:{}", out.join("large").display());
    let program = ["--", "/usr/bin/truncate", "-s", "33M", "/tmp/large"];
    let mut command = limited();
    command.args(run).args(["--copy-out", &copy]).args(program);
    let (code, text) = outcome(&mut command);
    assert_eq!(code, Some(FAILED), "{text}");
    assert!(text.contains("ulimit -f"), "{text}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "{text}");
    // A program whose output cannot be written any more is ended, as with a closed pipe.
    let log = File::create(out.join("log")).unwrap();
    log.set_len(32 << 20).unwrap();
    let log = File::options().append(true).open(out.join("log")).unwrap();
    let endless = ["--", "/bin/sh", "-c", "while :; do echo more; done"];
    let mut command = limited();
    let status = command.args(run).args(endless).stdout(log).status();
    assert_eq!(status.unwrap().code(), Some(128 + 13));
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
    if !runs_without_a_limit() {
        return;
    }
    // No signal can be queued any more: a vCPU is stopped all the same.
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

#[test]
fn a_limit_on_threads_is_an_error_at_every_number_of_them() {
    if !runs_without_a_limit() {
        return;
    }
    // One of them is the process itself.
    let mut enough = None;
    for max in 1..=15 {
        let Some(cgroup) = Cgroup::pids("few", max) else {
            not_measured("no cgroup with pids.max may be made here");
            return;
        };
        let (code, text) = outcome(cgroup.command(HEARTH).args(["run", "--", "true"]));
        match code {
            Some(0) => enough = enough.or(Some(max)),
            code => {
                assert_eq!(code, Some(FAILED), "{max}: {text}");
                assert!(text.contains("pids.max"), "{max}: {text}");
                assert_eq!(enough, None, "{max}: {text}");
            }
        }
        let (_, check) = doctor(cgroup.command(HEARTH), "threads");
        let verdict = if max < 15 { "fail" } else { "warn" };
        assert_eq!(check["verdict"], verdict, "{max}: {check}");
    }
    assert!(enough.is_some(), "what the doctor calls enough is not");
}

/// A limit that is smaller than the guest is detected beforehand. A guest that fits may still reach
/// the limit: then the kernel ends the command with SIGKILL, which only the cgroup's
/// `memory.events` or `memory.oom_control` shows.
#[test]
fn a_guest_that_the_memory_of_a_cgroup_cannot_hold_is_an_error_and_foretold_by_the_doctor() {
    if !runs_without_a_limit() {
        return;
    }
    let Some(cgroup) = Cgroup::memory("small", 64 << 20) else {
        return not_measured("no cgroup with a limit of memory may be made here");
    };
    let file = cgroup.limit_file().display().to_string();
    let (_, check) = doctor(cgroup.command(HEARTH), "memory");
    assert_eq!(check["verdict"], "warn", "{check}");
    assert!(check["advice"].as_str().unwrap().contains(&file), "{check}");
    for arguments in [
        ["run", "--", "true"].as_slice(),
        &["boot", "--kernel", "none"],
    ] {
        let (code, text) = outcome(cgroup.command(HEARTH).args(arguments));
        assert_eq!(code, Some(FAILED), "{arguments:?}: {text}");
        assert!(text.contains(&file), "{arguments:?}: {text}");
        assert!(text.contains("--memory"), "{arguments:?}: {text}");
    }
    let (code, text) = outcome(cgroup.command(HEARTH).args(["pool", "--seconds", "1"]));
    assert_eq!(code, Some(FAILED), "{text}");
    assert!(text.contains("limits.memory_mib"), "{text}");
    let small = ["run", "--memory", "32", "--", "true"];
    let (code, text) = outcome(cgroup.command(HEARTH).args(small));
    assert_eq!(code, Some(0), "{text}");
    cgroup.limit(31 << 20);
    let (code, check) = doctor(cgroup.command(HEARTH), "memory");
    assert_eq!((code, check["verdict"].as_str()), (Some(1), Some("fail")));
    let (code, text) = outcome(cgroup.command(HEARTH).args(small));
    assert_eq!(code, Some(FAILED), "{text}");
    assert!(text.contains(&file), "{text}");
}

#[test]
fn a_log_filter_that_is_none_is_refused() {
    let (code, text) = outcome(limited(&[]).env("HEARTH_LOG", "a=b=c").arg("doctor"));
    assert_eq!(code, Some(FAILED), "{text}");
    assert!(text.contains("HEARTH_LOG"), "{text}");
}
