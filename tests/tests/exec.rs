#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Programs in a real guest: their output, exit status and input, and the errors of what cannot be
//! run.

use std::time::Duration;

use hearth_agent::client::{Command, ConnectionError, ExecError, OutputLimits};
use hearth_agent::proto::{ExitStatus, Input, OutputEnd, OutputMode, SpawnFailure};
use hearth_tests::{kvm, noise, patience, shared, within};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn applet(words: &[&str]) -> Command {
    let (program, args) = words.split_first().unwrap();
    Command::new(program).args(args)
}

#[tokio::test]
async fn stdout_stderr_and_exit_code() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let output = guest.run(applet(&["echo", "hello", "guest"])).await;
    assert_eq!(output.stdout, b"hello guest\n");
    assert_eq!(output.stderr, b"");
    assert_eq!(output.status, ExitStatus::Code(0));
    assert_eq!(output.end, OutputEnd::Complete);
    assert!(output.usage.wall_us > 0 && output.usage.max_rss_kib > 0);

    // `both` runs a program with its stdout on stderr and says on stdout how it ended.
    let output = guest.run(applet(&["both", "echo", "aside"])).await;
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"0\n"[..], &b"aside\n"[..])
    );
    let merged = applet(&["both", "echo", "aside"]).output_mode(OutputMode::Merged);
    let output = guest.run(merged).await;
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"aside\n0\n"[..], &b""[..])
    );

    for code in [0, 1, 7, 127, 255] {
        let output = guest.run(applet(&["exit", &code.to_string()])).await;
        assert_eq!(output.status, ExitStatus::Code(code));
        assert_eq!(output.status.success(), code == 0);
    }
}

#[tokio::test]
async fn signals_that_kill_are_told_from_exit_codes() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    for signal in [6, 9, 11, 15] {
        let output = guest.run(applet(&["kill-self", &signal.to_string()])).await;
        assert_eq!(output.status, ExitStatus::Signal(signal));
        assert!(!output.timed_out);
    }
    // A signal that the host sends.
    let mut exec = guest
        .connect()
        .await
        .exec(applet(&["sleep", "600"]))
        .await
        .unwrap();
    assert!(exec.pid() > 1);
    exec.signal(10).await.unwrap();
    let (exited, mut agent) = within(5, "end", exec.finish()).await.unwrap();
    assert_eq!(exited.status, ExitStatus::Signal(10));
    // The connection can be used again.
    agent.ping(77).await.unwrap();
    let again = agent.exec(applet(&["exit", "3"])).await.unwrap();
    let exited = within(5, "end", again.wait()).await.unwrap();
    assert_eq!(exited.status, ExitStatus::Code(3));
}

/// Sends `len` bytes through a program and back.
async fn round_trip(len: usize) {
    let guest = shared().await;
    let input = noise(len, 0x5eed);
    let cat = applet(&["cat"]).stdin(Input::Pipe);
    let output = guest.run_with(cat, &input).await;
    assert_eq!(output.status, ExitStatus::Code(0));
    assert_eq!(output.stdout.len(), len);
    if let Some(at) = (0..len).find(|&at| output.stdout[at] != input[at]) {
        let mut wrong = (at..len).filter(|&at| output.stdout[at] != input[at]);
        let (count, last) = (wrong.clone().count(), wrong.next_back().unwrap());
        panic!("of {len} bytes {count} came back changed, from {at} to {last}");
    }
    assert_eq!(output.stdout_cut, 0);
}

#[tokio::test]
async fn a_mebibyte_through_stdin_and_back() {
    if !kvm() {
        return;
    }
    for len in [0, 1, 4095, 65_537] {
        round_trip(len).await;
    }
    round_trip(1 << 20).await;
}

#[tokio::test]
#[ignore = "long: 8 MiB through an emulated kernel"]
async fn eight_mebibytes_through_stdin_and_back() {
    if !kvm() {
        return;
    }
    round_trip(8 << 20).await;
}

#[tokio::test]
async fn output_is_read_to_its_end_and_cut_only_where_asked() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let len = 300_000;
    let output = guest.run(applet(&["fill", &len.to_string()])).await;
    assert_eq!(output.stdout.len(), len);
    assert!((0..len).all(|i| output.stdout[i] == (i & 0xff) as u8));
    let exec = guest
        .connect()
        .await
        .exec(applet(&["fill", "200000"]))
        .await
        .unwrap();
    let limits = OutputLimits {
        stdout_bytes: 1000,
        stderr_bytes: 0,
    };
    let output = within(10, "output", exec.output(limits)).await.unwrap();
    assert_eq!((output.stdout.len(), output.stdout_cut), (1000, 199_000));
}

#[tokio::test]
async fn a_program_whose_output_nobody_reads_stands_still_and_the_agent_does_not() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let mut exec = guest
        .connect()
        .await
        .exec(applet(&["fill", "4000000"]))
        .await
        .unwrap();
    let mut stdout = exec.stdout().unwrap();
    let waiting = tokio::time::timeout(Duration::from_secs(1), exec.wait()).await;
    assert!(
        waiting.is_err(),
        "it ended although nobody read: {waiting:?}"
    );
    let mut bytes = Vec::new();
    // Dropping `wait` killed the program: the rest of its output ends with an error, so that it
    // cannot pass for complete.
    assert!(
        within(5, "rest", stdout.read_to_end(&mut bytes))
            .await
            .is_err()
    );
    assert!(bytes.len() < 4_000_000);
    guest.connect().await.ping(5).await.unwrap();
}

#[tokio::test]
async fn input_may_end_early_or_be_ignored() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    // Interactive: each line is echoed before the next is sent.
    let cat = applet(&["cat"]).stdin(Input::Pipe);
    let mut exec = guest.connect().await.exec(cat).await.unwrap();
    let (mut stdin, mut stdout) = (exec.stdin().unwrap(), exec.stdout().unwrap());
    let waiting = tokio::spawn(exec.wait());
    for line in [&b"one\n"[..], b"two\n"] {
        stdin.write_all(line).await.unwrap();
        let mut back = vec![0; line.len()];
        within(5, "echo", stdout.read_exact(&mut back))
            .await
            .unwrap();
        assert_eq!(back, line);
    }
    stdin.shutdown().await.unwrap();
    let exited = within(5, "end", waiting).await.unwrap().unwrap();
    assert_eq!(exited.status, ExitStatus::Code(0));
    // A program that reads none of its 200,000 bytes of input.
    let deaf = applet(&["true"]).stdin(Input::Pipe);
    let output = guest.run_with(deaf, &noise(200_000, 1)).await;
    assert_eq!(output.status, ExitStatus::Code(0));
}

#[tokio::test]
async fn environment_and_working_directory() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let output = guest.run(applet(&["pwd"])).await;
    assert_eq!(output.stdout, b"/\n");
    let output = guest.run(applet(&["pwd"]).current_dir("/proc/self")).await;
    assert!(output.stdout.starts_with(b"/proc/"), "{output:?}");
    let env = applet(&["env"])
        .env_clear()
        .env("GREETING", "good \u{1f44b}");
    let output = guest.run(env).await;
    assert_eq!(output.stdout, "GREETING=good \u{1f44b}\n".as_bytes());
    let output = guest.run(applet(&["env"])).await;
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("PATH=") && text.contains("HOME="), "{text}");
}

/// The kernel saves all vector registers that the processor has and reports them in
/// `/proc/cpuinfo`, and no environment variable makes programs avoid them.
#[tokio::test]
async fn programs_may_use_the_registers_that_the_processor_has() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let text = async |argv: &[&str]| {
        let output = guest.run(applet(argv)).await;
        String::from_utf8(output.stdout).unwrap()
    };
    let kept = text(&["cat", "/proc/cpuinfo"]).await;
    let kept = |name: &str| kept.split_whitespace().any(|flag| flag == name);
    assert_eq!(kept("avx"), std::arch::is_x86_feature_detected!("avx"));
    let avx_512 = std::arch::is_x86_feature_detected!("avx512f");
    assert_eq!(kept("avx512f"), avx_512);
    let environment = text(&["env"]).await;
    assert!(!environment.contains("GLIBC_TUNABLES"), "{environment}");
}

#[tokio::test]
async fn what_cannot_be_run_says_why() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let failure = async |command: Command| match guest.connect().await.exec(command).await {
        Err(ExecError::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    };
    for name in ["no-such-program", "/bin/no-such-program"] {
        let why = failure(applet(&[name])).await;
        let SpawnFailure::NotFound { program } = &why else {
            panic!("{why:?}");
        };
        assert_eq!(program, name);
        assert!(why.to_string().contains(name));
    }
    let why = failure(applet(&["true"]).current_dir("/missing/directory")).await;
    assert!(
        matches!(&why, SpawnFailure::MissingCwd { cwd, errno: 2 } if cwd == "/missing/directory"),
        "{why:?}"
    );
    let why = failure(applet(&["true"]).current_dir("/proc/version")).await;
    assert!(
        matches!(&why, SpawnFailure::MissingCwd { errno: 20, .. }),
        "{why:?}"
    );
    for not_executable in ["/proc", "/proc/version"] {
        let why = failure(applet(&[not_executable])).await;
        assert!(
            matches!(&why, SpawnFailure::NotExecutable { .. }),
            "{why:?}"
        );
    }
    let why = failure(Command::new("")).await;
    assert!(
        matches!(
            &why,
            SpawnFailure::NotFound { .. } | SpawnFailure::BadArgument(_)
        ),
        "{why:?}"
    );
    let why = failure(applet(&["echo", "zero\0byte"])).await;
    assert!(matches!(&why, SpawnFailure::BadArgument(_)), "{why:?}");
    // Too long a request: the client refuses it.
    let long = "x".repeat(100_000);
    let refused = guest.connect().await.exec(applet(&["echo", &long])).await;
    assert!(matches!(refused, Err(ExecError::TooLarge { bytes }) if bytes > 100_000));
}

#[tokio::test]
async fn a_timeout_ends_a_program_gently_then_not() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let slow = applet(&["sleep", "600"]).timeout(Duration::from_millis(300));
    let output = guest.run(slow).await;
    assert!(output.timed_out);
    assert_eq!(output.status, ExitStatus::Signal(15));
    let deaf = applet(&["ignore-term", "600"])
        // Long enough for the program to set the signal to ignored.
        .timeout(patience(Duration::from_secs(2)))
        .grace(Duration::from_millis(300));
    let output = guest.run(deaf).await;
    assert!(output.timed_out);
    assert_eq!(output.status, ExitStatus::Signal(9));
    let quick = applet(&["true"]).timeout(Duration::from_secs(600));
    assert!(!guest.run(quick).await.timed_out);
}

#[tokio::test]
async fn dropping_a_program_kills_it_and_all_that_it_started() {
    if !kvm() {
        return;
    }
    // A guest for this test alone, because it counts programs.
    let mut guest = hearth_tests::Guest::fork().await;
    let exec = guest
        .connect()
        .await
        .exec(applet(&["sleep", "600"]))
        .await
        .unwrap();
    let child = applet(&["both", "sleep", "600"]);
    let family = guest.connect().await.exec(child).await.unwrap();
    assert_eq!(guest.agent.ping(100).await.unwrap().execs, 2);
    drop((exec, family));
    let mut nonce = 100;
    let gone = async {
        loop {
            nonce += 1;
            if guest.agent.ping(nonce).await.unwrap().execs == 0 {
                return;
            }
        }
    };
    within(5, "end of dropped programs", gone).await;
    // No child is left either: only PID 1 and this `ls` exist.
    let listing = guest.run(applet(&["ls", "/proc"])).await;
    let listing = String::from_utf8(listing.stdout).unwrap();
    let own: Vec<&str> = listing
        .lines()
        .filter(|name| name.parse::<u32>().is_ok())
        .collect();
    let mut programs = 0;
    for pid in own {
        let output = guest
            .run(applet(&["cat", &format!("/proc/{pid}/cmdline")]))
            .await;
        // Kernel threads have no command line; the processes of the listing have ended by now.
        programs += usize::from(output.status.success() && output.stdout.starts_with(b"sleep"));
    }
    assert_eq!(programs, 0, "{listing}");
}

#[tokio::test]
async fn programs_on_several_connections_do_not_mix() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    let mut runs = tokio::task::JoinSet::new();
    for number in 0..6 {
        runs.spawn(async move {
            let input = noise(20_000 + number, number as u64 + 1);
            let cat = applet(&["cat"]).stdin(Input::Pipe);
            let output = guest.run_with(cat, &input).await;
            assert!(output.stdout == input, "run {number}");
        });
    }
    runs.spawn(async move {
        let mut agent = guest.connect().await;
        for nonce in 0..20 {
            within(5, "ping beside programs", agent.ping(nonce))
                .await
                .unwrap();
        }
    });
    while let Some(run) = runs.join_next().await {
        run.unwrap();
    }
}

#[tokio::test]
async fn a_vm_that_is_killed_while_a_program_runs_fails_everything_typed() {
    if !kvm() {
        return;
    }
    let guest = hearth_tests::Guest::fork().await;
    let cat = applet(&["cat"]).stdin(Input::Pipe);
    let mut exec = guest.connect().await.exec(cat).await.unwrap();
    let (mut stdin, mut stdout) = (exec.stdin().unwrap(), exec.stdout().unwrap());
    let waiting = tokio::spawn(exec.wait());
    stdin.write_all(b"before").await.unwrap();
    let mut before = [0; 6];
    within(5, "echo", stdout.read_exact(&mut before))
        .await
        .unwrap();
    guest.vm.kill();
    let ended = within(2, "wait", waiting).await.unwrap();
    assert!(
        matches!(ended, Err(ExecError::Connection(ConnectionError::Closed))),
        "{ended:?}"
    );
    let mut rest = Vec::new();
    assert!(
        within(2, "stdout", stdout.read_to_end(&mut rest))
            .await
            .is_err()
    );
    assert!(
        within(2, "stdin", stdin.write_all(&[0; 1 << 20]))
            .await
            .is_err()
    );
    let mut agent = guest.agent;
    assert!(within(2, "ping", agent.ping(2)).await.is_err());
}
