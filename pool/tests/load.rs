//! `hearth pool`: a pool under load, from its user's view.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hearth_tests::kvm;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn hearth(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    command.arg("pool").args(args).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn text(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code();
    (code, text(output.stdout), text(output.stderr))
}

#[test]
fn a_pool_is_shown_under_load_and_summed_up_at_a_signal() {
    if !kvm() {
        return;
    }
    let args = [
        "--profile",
        "base",
        "--warm",
        "2",
        "--load",
        "3",
        "--json",
        "--",
        "echo",
        "x",
    ];
    let mut child = hearth(&args).spawn().unwrap();
    // The command prints a line each second; the load has begun when a line counts a run.
    let stderr = std::io::BufReader::new(child.stderr.take().unwrap());
    let (mut begun, mut lines) = (None, Vec::new());
    for line in std::io::BufRead::lines(stderr) {
        let line = line.unwrap();
        if begun.is_none() && line.contains("runs ") && !line.contains("runs 0") {
            begun = Some(Instant::now());
        }
        lines.push(line);
        if begun.is_some_and(|begun| begun.elapsed() > Duration::from_secs(2)) {
            break;
        }
    }
    assert!(begun.is_some(), "{lines:?}");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let (code, stdout, _) = text(child.wait_with_output().unwrap());
    assert_eq!(code, Some(0), "{stdout} {lines:?}");
    let last = lines.last().unwrap();
    for word in [
        "ready ", "/2", "booting ", "leased ", "hits ", "misses ", "p50 ", "p99 ",
    ] {
        assert!(last.contains(word), "{word}: {last}");
    }
    let summary: Value = serde_json::from_str(&stdout).unwrap();
    let number = |name: &str| summary[name].as_u64().unwrap();
    assert_eq!(
        (number("load"), number("size"), number("failures")),
        (3, 2, 0),
        "{summary}"
    );
    // With three tasks and two warm guests there are hits and misses.
    assert!(
        number("hits") >= 2 && number("misses") >= 1 && number("runs") >= 2,
        "{summary}"
    );
    assert!(
        number("hits") + number("misses") >= number("runs"),
        "{summary}"
    );
    for times in ["acquire_us", "run_us"] {
        let [p50, p99] = ["p50", "p99"].map(|name| summary[times][name].as_f64().unwrap());
        assert!(0.0 < p50 && p50 <= p99, "{summary}");
    }
}

#[test]
fn what_is_wrong_with_a_pool_or_its_program_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pool.toml");
    let toml = "max_concurrent_vms = 2\n[profiles.small]\nimage = \"base\"\nmemory_mib = 128\nwarm_pool_size = 1\n";
    std::fs::write(&file, toml).unwrap();
    let config = ["--config", file.to_str().unwrap()];
    let profile = ["--profile", "small"];
    for (args, wanted) in [
        (&["--profile", "nosuch"][..], "no recipe is named nosuch"),
        (&["--load", "0"], "1..=10000"),
        (&["--config", "/no/such/file"], "/no/such/file"),
        (&config, "no profile base; it has small"),
    ] {
        let (code, stdout, stderr) = text(hearth(args).output().unwrap());
        assert_eq!(
            (code, stdout.as_str()),
            (Some(125), ""),
            "{args:?}: {stderr}"
        );
        assert!(stderr.contains(wanted), "{args:?}: {stderr}");
    }
    if !kvm() {
        return;
    }
    // A run takes a third of a second where ring 0 is emulated, and more beside other work.
    let program = ["--seconds", "5", "--", "no-such-program"];
    let args = [&config[..], &profile, &program].concat();
    let (code, stdout, stderr) = text(hearth(&args).output().unwrap());
    assert_eq!(code, Some(125), "{stderr}");
    assert!(
        stdout.contains("no-such-program: no such program"),
        "{stdout}"
    );
}
