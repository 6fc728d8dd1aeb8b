//! Real programs through a real agent, without a VM: the caller's view.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::time::{Duration, Instant};

use common::{Agent, eventually, is_alive, sh, sh_fed};
use hearth_agent::{
    client::{Command, ConnectionError, ExecError, FreezeError, OutputLimits},
    proto::{
        ExitStatus, Input, InstanceId, Leftover, Limits, OutputEnd, OutputMode, Refresh,
        SpawnFailure, User,
    },
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn failure(agent: &Agent, command: Command) -> SpawnFailure {
    match agent.client().await.exec(command).await {
        Err(ExecError::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn output_and_code_arrive() {
    let agent = Agent::start().await;
    let output = agent.output(sh("echo out; echo err >&2; exit 7")).await;
    assert_eq!(output.status, ExitStatus::Code(7));
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!((output.end, output.timed_out), (OutputEnd::Complete, false));
    assert!(output.usage.wall_us > 0 && output.usage.max_rss_kib > 0);
}

#[tokio::test]
async fn each_path_that_ls_is_given_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["a", "b"] {
        std::fs::create_dir(at(name)).unwrap();
        std::fs::write(at(name).join(format!("in-{name}")), "").unwrap();
    }
    let agent = Agent::start().await;
    let ls = |paths: &[&str]| {
        let init = Command::new(env!("CARGO_BIN_EXE_hearth-init")).arg("ls");
        init.args(paths).current_dir(dir.path())
    };
    for (paths, code, said) in [
        (&[][..], 0, "a\nb\n"),
        (&["a"], 0, "in-a\n"),
        (&["a", "b"], 0, "a:\nin-a\nb:\nin-b\n"),
        (&["none", "b/in-b", "b"], 1, "b/in-b\nb:\nin-b\n"),
    ] {
        let output = agent.output(ls(paths)).await;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!((output.status, &*text), (ExitStatus::Code(code), said));
        assert_eq!(output.stderr.is_empty(), code == 0);
    }
}

#[tokio::test]
async fn all_codes_and_signals() {
    let agent = Agent::start().await;
    for code in [
        0, 1, 2, 3, 42, 63, 64, 77, 126, 127, 128, 129, 200, 254, 255,
    ] {
        assert_eq!(
            agent
                .output(Command::new("exit").arg(code.to_string()))
                .await
                .status,
            ExitStatus::Code(code)
        );
    }
    for signal in (1..=31).chain([34, 64]) {
        // Stopped or ignored by default: the program survives.
        if matches!(signal, 17..=23 | 28) {
            continue;
        }
        let status = agent
            .output(Command::new("kill-self").arg(signal.to_string()))
            .await
            .status;
        assert_eq!(status, ExitStatus::Signal(signal));
        assert_eq!(status.shell_code(), 128 + signal);
    }
}

#[tokio::test]
async fn eight_mebibytes_through_stdin_and_back() {
    let agent = Agent::start().await;
    let input: Vec<u8> = (0..8_u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let exec = agent.exec(Command::new("cat").stdin(Input::Pipe)).await;
    let output = exec
        .output_with(&input, OutputLimits::default())
        .await
        .unwrap();
    assert_eq!(output.status, ExitStatus::Code(0));
    assert!(output.stdout == input, "{} bytes", output.stdout.len());
    assert_eq!(output.stdout_cut, 0);
}

#[tokio::test]
async fn output_limits_say_what_was_cut() {
    let agent = Agent::start().await;
    let exec = agent
        .exec(sh("head -c 300000 /dev/zero; head -c 5 /dev/zero >&2"))
        .await;
    let output = exec
        .output(OutputLimits {
            stdout_bytes: 1000,
            stderr_bytes: 5,
        })
        .await
        .unwrap();
    assert_eq!((output.stdout.len(), output.stdout_cut), (1000, 299_000));
    assert_eq!((output.stderr.len(), output.stderr_cut), (5, 0));
}

#[tokio::test]
async fn output_is_read_to_its_end_whatever_the_exit_is() {
    let agent = Agent::start().await;
    for _ in 0..20 {
        let output = agent.output(Command::new("fill").arg("65536")).await;
        assert_eq!(output.stdout.len(), 65536);
        assert!(
            output
                .stdout
                .iter()
                .enumerate()
                .all(|(at, &byte)| byte == at as u8)
        );
    }
    let lines = agent
        .output(sh(
            "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo zeile ü $i; done",
        ))
        .await;
    let text = String::from_utf8(lines.stdout).unwrap();
    assert_eq!(text.lines().count(), 1000);
    assert!(text.ends_with("zeile ü 1000\n"));
}

#[tokio::test]
async fn merged_output_keeps_the_order() {
    let agent = Agent::start().await;
    let output = agent
        .output(sh("echo 1; echo 2 >&2; echo 3; echo 4 >&2").output_mode(OutputMode::Merged))
        .await;
    assert_eq!(output.stdout, b"1\n2\n3\n4\n");
    assert!(output.stderr.is_empty());
}

#[tokio::test]
async fn what_is_missing_is_named() {
    let agent = Agent::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    };
    assert_eq!(
        failure(&agent, Command::new("no-such-program")).await,
        SpawnFailure::NotFound {
            program: "no-such-program".into()
        }
    );
    assert!(matches!(
        failure(&agent, Command::new("/no/such/program")).await,
        SpawnFailure::NotFound { .. }
    ));
    let script = file("script", "#!/no/interpreter -x\n", 0o755);
    assert_eq!(
        failure(&agent, Command::new(&script)).await,
        SpawnFailure::MissingInterpreter {
            program: script.to_str().unwrap().into(),
            interpreter: "/no/interpreter".into()
        }
    );
    // The same with a relative path, which is resolved from the working directory.
    let relative = Command::new("./script").current_dir(dir.path());
    assert!(matches!(
        failure(&agent, relative).await,
        SpawnFailure::MissingInterpreter { .. }
    ));
    let plain = file("plain", "#!/bin/sh\n", 0o644);
    assert!(matches!(
        failure(&agent, Command::new(plain)).await,
        SpawnFailure::NotExecutable { errno: 13, .. }
    ));
    let garbage = file("garbage", "garbage", 0o755);
    assert!(matches!(
        failure(&agent, Command::new(garbage)).await,
        SpawnFailure::NotExecutable { errno: 8, .. }
    ));
    assert!(matches!(
        failure(&agent, Command::new(dir.path())).await,
        SpawnFailure::NotExecutable { .. }
    ));
    assert_eq!(
        failure(&agent, sh("true").current_dir("/no/such/dir")).await,
        SpawnFailure::MissingCwd {
            cwd: "/no/such/dir".into(),
            errno: 2
        }
    );
    assert!(matches!(
        failure(&agent, sh("true").current_dir("/etc/passwd")).await,
        SpawnFailure::MissingCwd { errno: 20, .. }
    ));
    for bad in [
        Command::new(""),
        Command::new("a\0b"),
        sh("true").env("A=B", "c"),
        sh("true").env("", "c"),
    ] {
        assert!(matches!(
            failure(&agent, bad).await,
            SpawnFailure::BadArgument(_)
        ));
    }
    agent.assert_alive().await;
}

#[tokio::test]
async fn a_connection_serves_one_program_after_another() {
    let agent = Agent::start().await;
    let mut client = agent.client().await;
    for round in 0..20_u64 {
        client.ping(round).await.unwrap();
        let exec = client.exec(sh_fed("read x; exit $x")).await.unwrap();
        let mut exec = exec;
        exec.stdin()
            .unwrap()
            .write_all(format!("{round}\n").as_bytes())
            .await
            .unwrap();
        let (end, back) = exec.finish().await.unwrap();
        assert_eq!(end.status, ExitStatus::Code(round as u8));
        client = back;
    }
}

#[tokio::test]
async fn environment_directory_and_standing() {
    let agent = Agent::start_with(
        |command| {
            command.env("AGENT_SECRET", "1");
        },
        None,
    )
    .await;
    let output = agent
        .output(
            sh("env; pwd")
                .env_clear()
                .env("B", "2")
                .env("A", "1")
                .current_dir("/usr"),
        )
        .await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("A=1\nB=2\n") && text.ends_with("/usr\n"),
        "{text}"
    );
    let output = agent
        .output(Command::new("env").env("HOME", "/elsewhere"))
        .await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("HOME=/elsewhere\n") && text.contains("PATH=/usr/local/sbin:"),
        "{text}"
    );
    assert!(!text.contains("AGENT_SECRET"));
    // The program has a session of its own, no signal blocked or ignored, and no descriptor but the
    // three (and ls's own).
    let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd | wc -l; cut -d' ' -f1,5,6 /proc/$$/stat";
    let text = String::from_utf8(agent.output(sh(script)).await.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let mask = |line: &str| u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap();
    // Signals 32 and 33 are the C library's own; they may be inherited ignored from a test runner.
    assert_eq!(
        (mask(lines[0]), mask(lines[1]) & !(3 << 31)),
        (0, 0),
        "{text}"
    );
    assert_eq!(lines[2], "4", "{text}");
    let ids: Vec<_> = lines[3].split(' ').collect();
    assert!(ids[0] == ids[1] && ids[1] == ids[2], "{text}");
}

#[tokio::test]
async fn signals_reach_the_group() {
    let agent = Agent::start().await;
    let mut exec = agent
        .exec(sh(
            "trap 'echo got; exit 5' USR1; echo ready; while :; do sleep 0.05; done",
        ))
        .await;
    let mut stdout = exec.stdout().unwrap();
    let mut line = [0; 6];
    stdout.read_exact(&mut line).await.unwrap();
    exec.signal(10).await.unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "got\n");
    assert_eq!(exec.wait().await.unwrap().status, ExitStatus::Code(5));
}

#[tokio::test]
async fn a_program_that_does_not_read_can_be_signalled() {
    let agent = Agent::start().await;
    let mut exec = agent
        .exec(Command::new("sleep").arg("100").stdin(Input::Pipe))
        .await;
    let mut stdin = exec.stdin().unwrap();
    let mut sent = 0;
    // Fill the pipe, the agent's buffer and the window.
    while let Ok(Ok(count)) =
        tokio::time::timeout(Duration::from_millis(300), stdin.write(&[7; 65536])).await
    {
        sent += count;
        assert!(sent < 1 << 20, "no end to what is taken");
    }
    exec.signal(15).await.unwrap();
    assert_eq!(exec.wait().await.unwrap().status, ExitStatus::Signal(15));
    assert!(stdin.write(&[1]).await.is_err());
    agent.assert_alive().await;
}

#[tokio::test]
async fn a_program_that_closes_stdin_is_no_error() {
    let agent = Agent::start().await;
    let exec = agent.exec(sh_fed("exec <&-; sleep 0.3; echo done")).await;
    let output = exec
        .output_with(&vec![1; 1 << 20], OutputLimits::default())
        .await
        .unwrap();
    assert_eq!(
        (output.status, output.stdout.as_slice()),
        (ExitStatus::Code(0), &b"done\n"[..])
    );
}

#[tokio::test]
async fn timeout_terminates_then_kills() {
    let agent = Agent::start().await;
    let short = Duration::from_millis(150);
    let output = agent
        .output(Command::new("sleep").arg("100").timeout(short))
        .await;
    assert_eq!(
        (output.status, output.timed_out),
        (ExitStatus::Signal(15), true)
    );
    let begun = Instant::now();
    let output = agent
        .output(
            Command::new("ignore-term")
                .arg("100")
                .timeout(short)
                .grace(2 * short),
        )
        .await;
    assert_eq!(
        (output.status, output.timed_out),
        (ExitStatus::Signal(9), true)
    );
    assert!(begun.elapsed() >= 3 * short);
    let output = agent
        .output(sh("trap 'echo bye; exit 3' TERM; while :; do sleep 0.02; done").timeout(short))
        .await;
    assert_eq!(
        (output.status, output.timed_out, output.stdout.as_slice()),
        (ExitStatus::Code(3), true, &b"bye\n"[..])
    );
    let output = agent
        .output(sh("true").timeout(Duration::from_secs(100)))
        .await;
    assert_eq!(
        (output.status, output.timed_out),
        (ExitStatus::Code(0), false)
    );
}

/// A program that ignores SIGTERM and whose child left the session.
fn stubborn() -> Command {
    sh("trap '' TERM; setsid sleep 1000 & echo $!; wait; sleep 1000")
}

async fn timeout_kills_all(agent: &Agent) {
    let command = stubborn()
        .timeout(Duration::from_millis(200))
        .grace(Duration::from_millis(100));
    let output = agent.output(command).await;
    assert_eq!(
        (output.status, output.timed_out),
        (ExitStatus::Signal(9), true)
    );
    let child: u32 = String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    eventually("the grandchild is dead", || !is_alive(child)).await;
}

async fn dropping_kills_all(agent: &Agent) {
    let mut exec = agent.exec(stubborn()).await;
    let (main, mut line) = (exec.pid(), [0; 16]);
    let mut stdout = exec.stdout().unwrap();
    let count = stdout.read(&mut line).await.unwrap();
    let child: u32 = std::str::from_utf8(&line[..count])
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(is_alive(main) && is_alive(child));
    drop(exec);
    eventually("both are dead", || !is_alive(main) && !is_alive(child)).await;
    // An output stream that outlives the handle returns an error.
    assert!(stdout.read(&mut line).await.is_err());
    agent.assert_alive().await;
}

#[tokio::test]
async fn by_descent_timeout_and_cancel_reach_everything() {
    let agent = Agent::start().await;
    timeout_kills_all(&agent).await;
    dropping_kills_all(&agent).await;
}

#[tokio::test]
async fn by_cgroup_timeout_and_cancel_reach_everything() {
    let Some(agent) = Agent::start_in_cgroup().await else {
        // Written past the output capture of the test runner, which counts these lines.
        let skipped = b"\nNOT MEASURED: no cgroup2 that this user may write to\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return;
    };
    timeout_kills_all(&agent).await;
    dropping_kills_all(&agent).await;
    // An orphan that left the session can be found only through the cgroup.
    let exec = agent
        .exec(sh("(setsid sleep 1000 & echo $!) ; sleep 1000"))
        .await;
    let mut exec = exec;
    let mut line = [0; 16];
    let count = exec.stdout().unwrap().read(&mut line).await.unwrap();
    let orphan: u32 = std::str::from_utf8(&line[..count])
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(is_alive(orphan));
    drop(exec);
    eventually("the orphan is dead", || !is_alive(orphan)).await;
    // The same cgroup is reused.
    for _ in 0..5 {
        agent.output(sh("true")).await;
    }
    let text = agent.output(sh("cat /proc/self/cgroup")).await.stdout;
    assert!(
        String::from_utf8_lossy(&text).contains("/exec-"),
        "{}",
        String::from_utf8_lossy(&text)
    );
}

#[tokio::test]
async fn what_outlives_the_program_does_not_hold_the_result() {
    let agent = Agent::start().await;
    let begun = Instant::now();
    let output = agent
        .output(sh("sleep 30 & echo $!").linger(Duration::from_millis(200)))
        .await;
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(
        (output.status, output.end),
        (ExitStatus::Code(0), OutputEnd::StillOpen)
    );
    let child: u32 = String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(is_alive(child), "kept by default");
    unsafe_free_kill(child);
    // A leftover process that floods the pipe: the program's own output is complete all the same.
    let output = agent
        .output(sh("yes & echo mine; exit 4").linger(Duration::from_millis(200)))
        .await;
    assert_eq!(
        (output.status, output.end),
        (ExitStatus::Code(4), OutputEnd::StillOpen)
    );
    assert!(output.stdout.windows(5).any(|window| window == b"mine\n"));
    // The leftover process is killed on request.
    let output = agent
        .output(sh("sleep 30 & echo $!").leftover(Leftover::Kill))
        .await;
    assert_eq!(output.end, OutputEnd::Complete);
    agent.assert_alive().await;
}

fn unsafe_free_kill(pid: u32) {
    assert!(
        std::process::Command::new("kill")
            .arg(pid.to_string())
            .status()
            .unwrap()
            .success()
    );
}

#[tokio::test]
async fn twenty_at_once_and_pings_go_on() {
    let agent = Agent::start().await;
    let mut pinger = agent.client().await;
    let mut running = tokio::task::JoinSet::new();
    for number in 0..20_u8 {
        let client = agent.client().await;
        running.spawn(async move {
            let script = format!("sleep 0.3; cat; echo {number}; exit {number}");
            let exec = client.exec(sh_fed(&script)).await.unwrap();
            let output = exec
                .output_with(&[number; 100_000], OutputLimits::default())
                .await
                .unwrap();
            assert_eq!(output.status, ExitStatus::Code(number));
            assert!(output.stdout.starts_with(&[number; 100_000]));
        });
    }
    let (mut nonce, mut most) = (0, 0);
    while !running.is_empty() {
        nonce += 1;
        let pong = tokio::time::timeout(Duration::from_secs(5), pinger.ping(nonce))
            .await
            .unwrap()
            .unwrap();
        most = most.max(pong.execs);
        if let Ok(Some(done)) =
            tokio::time::timeout(Duration::from_millis(5), running.join_next()).await
        {
            done.unwrap();
        }
    }
    assert!(most >= 10, "only {most} at once");
    assert_eq!(pinger.ping(0).await.unwrap().execs, 0);
}

#[tokio::test]
async fn a_slow_reader_holds_the_program_not_memory() {
    let agent = Agent::start().await;
    let mut exec = agent
        .exec(Command::new("fill").arg((32 << 20).to_string()))
        .await;
    let mut stdout = exec.stdout().unwrap();
    let before = agent.rss_kib();
    let mut total = 0_usize;
    let mut chunk = vec![0; 256 * 1024];
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let count = stdout.read(&mut chunk).await.unwrap();
        total += count;
    }
    assert!(
        agent.rss_kib() < before + 1024,
        "{} -> {} KiB",
        before,
        agent.rss_kib()
    );
    let ticks = agent.cpu_ticks();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(
        agent.cpu_ticks() <= ticks + 3,
        "the agent spins while nobody reads"
    );
    loop {
        match stdout.read(&mut chunk).await.unwrap() {
            0 => break,
            count => {
                assert!(
                    chunk[..count]
                        .iter()
                        .enumerate()
                        .all(|(at, &byte)| byte == (total + at) as u8)
                );
                total += count;
            }
        }
    }
    assert_eq!(total, 32 << 20);
    assert_eq!(exec.wait().await.unwrap().status, ExitStatus::Code(0));
}

#[tokio::test]
async fn user_and_limits_are_applied() {
    let agent = Agent::start().await;
    let limits = Limits {
        open_files: Some(33),
        file_bytes: Some(4096),
        ..Limits::default()
    };
    let output = agent.output(sh("ulimit -n; head -c 10000 /dev/zero >/tmp/hearth-limit-$$; echo $?; rm -f /tmp/hearth-limit-$$").limits(limits)).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.starts_with("33\n") && !text.ends_with("\n0\n"),
        "{text}"
    );
    let user = User {
        uid: 65534,
        gid: 65534,
        groups: vec![100, 101],
    };
    if rustix::process::getuid().is_root() {
        let output = agent.output(Command::new("/usr/bin/id").user(user)).await;
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains("uid=65534")
                && text.contains("gid=65534")
                && text.contains("100")
                && text.contains("101"),
            "{text}"
        );
    } else {
        assert!(matches!(
            failure(&agent, sh("true").user(user)).await,
            SpawnFailure::User { errno: 1 }
        ));
    }
    // Without cgroups, a limit that needs one is refused, not ignored.
    let limits = Limits {
        memory_bytes: Some(1 << 20),
        ..Limits::default()
    };
    assert!(matches!(
        failure(&agent, sh("true").limits(limits)).await,
        SpawnFailure::Limit { .. }
    ));
}

#[tokio::test]
async fn argument_lists_up_to_the_limit() {
    let agent = Agent::start().await;
    let long = "x".repeat(60_000);
    assert_eq!(
        agent
            .output(Command::new("echo").arg(&long))
            .await
            .stdout
            .len(),
        60_001
    );
    let many = agent
        .output(sh("echo $#").args(std::iter::repeat_n("y", 20_000)))
        .await;
    assert_eq!(many.stdout, b"19999\n");
    let client = agent.client().await;
    let error = client
        .exec(Command::new("echo").arg("x".repeat(70_000)))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ExecError::TooLarge { bytes: 70_000.. }),
        "{error}"
    );
}

#[tokio::test]
async fn out_of_descriptors_is_a_typed_failure() {
    let agent = Agent::start_with(
        |command| {
            use std::os::unix::process::CommandExt;
            let limit = rustix::process::Rlimit {
                current: Some(16),
                maximum: Some(16),
            };
            // SAFETY: one system call between fork and exec.
            unsafe {
                command.pre_exec(move || {
                    Ok(rustix::process::setrlimit(
                        rustix::process::Resource::Nofile,
                        limit,
                    )?)
                })
            };
        },
        None,
    )
    .await;
    let mut held = Vec::new();
    let failure = loop {
        match agent
            .client()
            .await
            .exec(Command::new("sleep").arg("100"))
            .await
        {
            Ok(exec) => held.push(exec),
            Err(error) => break error,
        }
        assert!(held.len() < 16);
    };
    assert!(
        matches!(failure, ExecError::Failed(SpawnFailure::Exhausted(_))),
        "{failure:?}"
    );
    // Connections beyond the agent's limit wait, without making it spin, and are served when there
    // is room again.
    let mut waiting = Vec::new();
    for _ in 0..8 {
        waiting.push(agent.stream().await.unwrap());
    }
    let ticks = agent.cpu_ticks();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(
        agent.cpu_ticks() <= ticks + 5,
        "the agent spins on a connection that it cannot take"
    );
    drop((held, waiting));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(agent.output(sh("echo again")).await.stdout, b"again\n");
}

#[tokio::test]
async fn nothing_is_left_over() {
    let agent = Agent::start().await;
    agent.output(sh("true")).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (fds, rss) = (agent.open_fds(), agent.rss_kib());
    for _ in 0..200 {
        agent.output(sh("echo x; echo y >&2")).await;
    }
    for _ in 0..20 {
        drop(agent.exec(Command::new("sleep").arg("100")).await);
    }
    eventually("descriptors are back", || agent.open_fds() <= fds).await;
    assert!(
        agent.rss_kib() <= rss + 256,
        "{rss} -> {} KiB",
        agent.rss_kib()
    );
}

#[tokio::test]
async fn an_agent_that_dies_is_an_error_everywhere() {
    let agent = Agent::start().await;
    let mut exec = agent.exec(Command::new("sleep").arg("1")).await;
    let mut stdout = exec.stdout().unwrap();
    let mut client = agent.client().await;
    drop(agent);
    assert!(stdout.read(&mut [0; 8]).await.is_err());
    assert!(matches!(
        exec.wait().await,
        Err(ExecError::Connection(ConnectionError::Closed))
    ));
    assert!(client.ping(1).await.is_err());
}

#[tokio::test]
async fn without_cgroups_programs_cannot_be_held() {
    let agent = Agent::start().await;
    let mut client = agent.client().await;
    let refused = client.freeze().await.unwrap_err();
    assert!(
        matches!(refused, FreezeError::Refused { errno: 95 }),
        "{refused}"
    );
    // Nothing is frozen, so there is nothing to thaw, and the connection can still be used.
    client.thaw().await.unwrap();
    client.ping(1).await.unwrap();
}

#[tokio::test]
async fn refresh_reports_each_part() {
    let agent = Agent::start().await;
    let mut client = agent.client().await;
    let instance = InstanceId(*b"0123456789abcdef");
    let refreshed = client
        .refresh(Refresh {
            instance: Some(instance),
            ..Refresh::default()
        })
        .await
        .unwrap();
    // An agent that is an ordinary process does not change the machine, and reports that.
    assert!(!refreshed.all_applied());
    assert_eq!(client.ping(1).await.unwrap().instance, instance);
    assert!(
        client
            .refresh(Refresh::default())
            .await
            .unwrap()
            .all_applied()
    );
    let short = Refresh {
        entropy: vec![1; 5],
        ..Refresh::default()
    };
    assert!(matches!(
        client.refresh(short).await,
        Err(ConnectionError::Rejected(_))
    ));
}
