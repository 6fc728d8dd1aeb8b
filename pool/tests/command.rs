//! The `hearth` command from its user's view. Each case that needs a guest boots one, so they are
//! few.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hearth_tests::flat::{Code, elf};
use hearth_tests::kvm;
use serde_json::Value;

/// Load address of kernels of a few instructions.
const KERNEL_AT: u64 = 16 << 20;

fn hearth(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs the command to its end; returns exit code, stdout and stderr.
fn outcome(command: &mut Command) -> (Option<i32>, String, String) {
    text(command.output().unwrap())
}

fn text(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Wrong values, each with a part of the expected message.
const REFUSED: [(&[&str], &str); 12] = [
    (
        &["run", "--memory", "1.5", "--", "true"],
        "whole number of MiB",
    ),
    (
        &["run", "--memory", "128M", "--", "true"],
        "whole number of MiB",
    ),
    (&["run", "--memory", "8", "--", "true"], "at least 32 MiB"),
    (
        &["run", "--memory", "99999999", "--", "true"],
        "more than this host's",
    ),
    (&["run", "--cpus", "0", "--", "true"], "choose 1 to 32"),
    (&["run", "--cpus", "1000", "--", "true"], "choose 1 to 32"),
    (&["run", "--timeout", "0", "--", "true"], "give seconds"),
    (&["run", "true"], "hearth run -- true"),
    (&["image", "build", "nosuch"], "javascript, python, shell"),
    (&["run", "--layer", "4", "--", "true"], "or --root"),
    (
        &["image", "build", "base", "--package", "six"],
        "with Python",
    ),
    (
        &["image", "build", "./none.toml"],
        "cannot read ./none.toml",
    ),
];

#[test]
fn images_that_are_not_there_are_listed_with_what_builds_them() {
    let home = tempfile::tempdir().unwrap();
    let there = |args| outcome(hearth(args).env("XDG_CACHE_HOME", home.path()));
    let (code, stdout, stderr) = there(&["image", "list"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    for name in ["kernel", "base", "javascript", "python", "shell"] {
        let hint = format!("not cached; build it with: hearth image build {name}");
        let line = stdout.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(line.ends_with(&hint), "{line}");
    }
    let (code, stdout, stderr) = there(&["image", "path", "python", "--package", "six"]);
    assert_eq!((code, stdout.as_str()), (Some(125), ""));
    let hint = "hearth image build python --package six\n";
    assert!(stderr.ends_with(hint), "{stderr}");
}

#[test]
fn wrong_usage_says_what_would_be_right_and_is_not_taken_for_a_program() {
    for (args, wanted) in REFUSED {
        let (code, stdout, stderr) = outcome(&mut hearth(args));
        // Where guests cannot run, `run` reports that first.
        if args.first() == Some(&"run") && !stderr.contains(wanted) && !kvm() {
            return;
        }
        assert_eq!((code, stdout.as_str()), (Some(125), ""), "{args:?}");
        assert!(stderr.contains(wanted), "{args:?}: {stderr}");
    }
}

#[test]
fn a_kernel_that_is_none_is_refused_by_name() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.into_os_string().into_string().unwrap()
    };
    let missing = dir.path().join("missing");
    let cases = [
        (missing.to_str().unwrap().to_owned(), "cannot be read"),
        (path("empty", b""), "empty"),
        (path("text", b"#!/bin/sh\n"), "vmlinux"),
    ];
    for (kernel, wanted) in cases {
        let (code, _, stderr) = outcome(&mut hearth(&["boot", "--kernel", &kernel]));
        assert_eq!(code, Some(125), "{stderr}");
        assert!(stderr.contains(&kernel), "{stderr}");
        assert!(stderr.contains(wanted), "{stderr}");
    }
}

#[test]
fn the_doctor_reports_the_same_in_both_forms() {
    let (code, plain, _) = outcome(&mut hearth(&["doctor"]));
    let (json_code, json, _) = outcome(&mut hearth(&["doctor", "--json"]));
    assert_eq!(code, json_code);
    let report: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["can_run_guests"], code == Some(0));
    let checks = report["checks"].as_array().unwrap();
    for check in checks {
        let name = check["name"].as_str().unwrap();
        assert!(plain.contains(name), "{name} is missing in {plain}");
        // Every check that is not ok has advice.
        assert_eq!(
            check["verdict"] == "ok",
            check["advice"].is_null(),
            "{check}"
        );
    }
    for name in ["kvm", "files", "threads", "memory", "build", "images"] {
        assert!(checks.iter().any(|check| check["name"] == name), "{name}");
    }
}

#[test]
fn streams_pass_through_and_the_phases_are_reported_after_them() {
    if !kvm() {
        return;
    }
    let mut child = hearth(&["run", "--json", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"one\ntwo").unwrap();
    drop(stdin);
    let (code, stdout, stderr) = text(child.wait_with_output().unwrap());
    assert_eq!((code, stdout.as_str()), (Some(0), "one\ntwo"), "{stderr}");
    let report: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
    assert_eq!(report["exit_code"], 0);
    assert_eq!(report["error"], Value::Null);
    for phase in [
        "host_probe",
        "image",
        "create",
        "boot",
        "agent_ready",
        "exec",
    ] {
        assert!(report["phases_us"][phase].is_u64(), "{phase}: {report}");
    }
    assert!(report["phases_us"]["boot"].as_u64() > Some(0));
}

#[test]
fn exit_codes_are_the_programs_and_stderr_is_its_own() {
    if !kvm() {
        return;
    }
    let (code, stdout, stderr) = outcome(&mut hearth(&["run", "--", "both", "exit", "7"]));
    assert_eq!((code, stdout.as_str()), (Some(0), "7\n"), "{stderr}");
    let (code, _, stderr) = outcome(&mut hearth(&["run", "--", "exit", "42"]));
    assert_eq!(code, Some(42), "{stderr}");
    let (code, _, stderr) = outcome(&mut hearth(&["run", "--", "kill-self", "9"]));
    assert_eq!(code, Some(137), "{stderr}");
    let (code, _, stderr) = outcome(&mut hearth(&["run", "--", "no-such-program"]));
    assert_eq!(code, Some(127));
    assert!(stderr.contains("no-such-program"), "{stderr}");
}

#[test]
fn files_go_in_before_the_program_and_come_out_after() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("in"), "from the host\n").unwrap();
    std::fs::write(at("out"), "old").unwrap();
    std::fs::set_permissions(at("in"), std::fs::Permissions::from_mode(0o640)).unwrap();
    let copies = [
        "--copy-in",
        &format!("{}:/srv/new/file", at("in")),
        "--copy-out",
        &format!("/srv/new/file:{}", at("out")),
        "--copy-out",
        &format!("/nothing/here:{}", at("none")),
    ];
    let program = ["--", "cat", "/srv/new/file"];
    let (code, stdout, stderr) = outcome(hearth(&["run", "--json"]).args(copies).args(program));
    assert_eq!(stdout, "from the host\n", "{stderr}");
    assert_eq!(
        std::fs::read_to_string(at("out")).unwrap(),
        "from the host\n"
    );
    let mode = std::fs::metadata(at("out")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
    // The second file could not be copied: nothing of it is left, and the exit code reports the
    // failure.
    assert_eq!(code, Some(125), "{stderr}");
    assert!(stderr.contains("/nothing/here"), "{stderr}");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    let report: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
    assert!(report["phases_us"]["copy_in"].is_u64(), "{report}");

    // A missing source is reported before the program runs.
    let copy = ["--copy-in", "/nothing/here:/file", "--", "echo", "ran"];
    let (code, stdout, stderr) = outcome(hearth(&["run"]).args(copy));
    assert_eq!((code, stdout.as_str()), (Some(125), ""), "{stderr}");
    assert!(stderr.contains("/nothing/here: cannot be read"), "{stderr}");
}

#[test]
fn directories_go_in_and_come_out_and_nothing_is_written_beside_them() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for (name, link) in [("tree", "../file"), ("bad", "/etc/passwd")] {
        std::fs::create_dir_all(at(&format!("{name}/inner/empty"))).unwrap();
        std::fs::write(at(&format!("{name}/file")), "content").unwrap();
        std::os::unix::fs::symlink(link, at(&format!("{name}/inner/link"))).unwrap();
    }
    let program = std::fs::Permissions::from_mode(0o750);
    std::fs::set_permissions(at("tree/file"), program).unwrap();
    let copies = [
        "--copy-in",
        &format!("{}:/srv/tree", at("tree")),
        "--copy-in",
        &format!("{}:/srv/bad", at("bad")),
        "--copy-out",
        &format!("/srv/tree:{}", at("out")),
        "--copy-out",
        &format!("/srv/bad:{}", at("none")),
    ];
    let program = ["--", "cat", "/srv/tree/inner/link"];
    let (code, stdout, stderr) = outcome(hearth(&["run"]).args(copies).args(program));
    assert_eq!(stdout, "content", "{stderr}");
    let mode = std::fs::metadata(at("out/file")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o7777, 0o750);
    assert!(std::fs::metadata(at("out/inner/empty")).unwrap().is_dir());
    let link = std::fs::read_link(at("out/inner/link")).unwrap();
    assert_eq!(link.to_str(), Some("../file"));
    // A link that leads out of the copy could make its user read or write elsewhere.
    assert_eq!(code, Some(125), "{stderr}");
    assert!(stderr.contains("/srv/bad/inner/link"), "{stderr}");
    let left = std::fs::read_dir(dir.path()).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["bad", "out", "tree"]);
}

#[test]
fn a_time_limit_and_a_signal_end_the_program() {
    if !kvm() {
        return;
    }
    let (code, _, stderr) = outcome(&mut hearth(&[
        "run",
        "--timeout",
        "0.5",
        "--",
        "sleep",
        "1000",
    ]));
    assert_eq!(code, Some(124), "{stderr}");

    // Signals before the program runs end the guest, later ones reach the program: 143 either way.
    let mut child = hearth(&["run", "--", "sleep", "1000"]).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "still there");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(status.code(), Some(143));
}

#[test]
fn a_guest_that_ends_early_or_never_answers_is_told_apart() {
    if !kvm() {
        return;
    }
    let (code, _, stderr) = outcome(&mut hearth(&["run", "--", "poweroff"]));
    assert_eq!(code, Some(125));
    assert!(stderr.contains("the guest powered off"), "{stderr}");

    let (code, _, stderr) = outcome(&mut hearth(&[
        "run",
        "--boot-timeout",
        "0.01",
        "--",
        "true",
    ]));
    assert_eq!(code, Some(125));
    assert!(stderr.contains("did not answer within 10ms"), "{stderr}");
}

#[test]
fn boot_tells_each_end_apart_by_its_exit_code() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = |name: &str, code: Code| {
        let path = dir.path().join(name);
        std::fs::write(&path, elf(&[(KERNEL_AT, &code.bytes())])).unwrap();
        path.to_str().unwrap().to_owned()
    };
    for (name, guest, expected, said) in [
        ("off", Code::new().report(1), 0, "powered off"),
        ("restart", Code::new().report(2), 0, "rebooted"),
        ("halt", Code::new().report(3), 10, "halted"),
        ("panic", Code::new().report(4), 11, "panicked"),
        ("fault", Code::new().triple_fault(), 12, "triple fault"),
    ] {
        let path = kernel(name, guest.spin());
        let (code, _, stderr) = outcome(&mut hearth(&["boot", "--kernel", &path]));
        assert_eq!(code, Some(expected), "{name}: {stderr}");
        assert!(stderr.contains(said), "{name}: {stderr}");
    }
    // All options of a VM, and a guest that does not end by itself.
    let path = kernel("spin", Code::new().print("here").spin());
    let initramfs = dir.path().join("initramfs");
    std::fs::write(&initramfs, b"070701").unwrap();
    let initramfs = initramfs.to_str().unwrap();
    let args = ["boot", "--kernel", &path, "--initramfs", initramfs];
    let machine = ["--memory", "48", "--cpus", "3", "--timeout", "1"];
    let (code, stdout, stderr) = outcome(hearth(&args).args(machine));
    assert_eq!(code, Some(124), "{stderr}");
    assert_eq!(stdout, "here");
}

#[test]
fn a_program_runs_in_the_machine_that_was_asked_for_with_its_console_shown() {
    if !kvm() {
        return;
    }
    let machine = ["--console", "--memory", "96", "--cpus", "2"];
    let program = ["--", "cat", "/proc/meminfo", "/proc/cpuinfo"];
    let (code, stdout, stderr) = outcome(hearth(&["run"]).args(machine).args(program));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("Linux version"), "{stderr}");
    let total = stdout.lines().find_map(|line| {
        let kib = line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()
    });
    let mib = total.unwrap() / 1024;
    assert!((64..=96).contains(&mib), "{mib} MiB");
    let processors = stdout.lines().filter(|line| line.starts_with("processor"));
    assert_eq!(processors.count(), 2, "{stdout}");
}

#[test]
fn boot_shows_the_console_and_says_how_the_guest_ended() {
    if !kvm() {
        return;
    }
    let kernel = std::env::var("HEARTH_KERNEL").unwrap_or_else(|_| {
        let (code, kernel, stderr) = outcome(&mut hearth(&["image", "build", "kernel"]));
        assert_eq!(code, Some(0), "{stderr}");
        kernel.trim_end().to_owned()
    });
    // Without an initramfs, the kernel panics at the end of its boot.
    let boot = ["boot", "--kernel", &kernel, "--append", "hearth.test=1"];
    let (code, stdout, stderr) = outcome(&mut hearth(&boot));
    assert_eq!(code, Some(11), "{stderr}");
    assert!(stdout.contains("hearth.test=1"), "{stdout}");
    assert!(
        stderr.ends_with("hearth: the guest's kernel panicked\n"),
        "{stderr}"
    );
}
