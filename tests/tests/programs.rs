#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Programs in a real guest, in numbers: all exit codes and signals, many programs at once, much
//! output.

use std::time::Duration;

use hearth_agent::client::{Command, ExecError};
use hearth_agent::proto::{ExitStatus, Input, OutputEnd, Put, SpawnFailure};
use hearth_tests::{Guest, kvm, noise, patience, shared, shell_guest, within};
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;

async fn ends_with(guest: &Guest, command: Command, status: ExitStatus) {
    let output = guest.run(command).await;
    assert_eq!(output.status, status);
    assert_eq!((output.end, output.timed_out), (OutputEnd::Complete, false));
}

#[tokio::test]
async fn a_dozen_exit_codes_over_all_that_there_are() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    for code in [0, 1, 2, 3, 42, 64, 77, 125, 126, 127, 128, 254, 255] {
        let command = Command::new("exit").arg(code.to_string());
        ends_with(guest, command, ExitStatus::Code(code)).await;
    }
}

#[tokio::test]
#[ignore = "long: half a second for each signal where ring 0 is emulated"]
async fn every_signal_that_kills_is_told() {
    if !kvm() {
        return;
    }
    let guest = shared().await;
    for signal in 1..=64 {
        // These signals stop the program or are ignored by default: it survives.
        if matches!(signal, 17..=23 | 28) {
            continue;
        }
        let command = Command::new("kill-self").arg(signal.to_string());
        ends_with(guest, command, ExitStatus::Signal(signal)).await;
    }
}

/// Runs `count` programs at once, each with its own input, while the agent answers pings.
async fn at_once(count: usize) {
    if !kvm() {
        return;
    }
    let mut guest = Guest::fork().await;
    let mut execs = Vec::new();
    for _ in 0..count {
        let cat = Command::new("cat").stdin(Input::Pipe);
        let started = within(10, "start", guest.connect().await.exec(cat)).await;
        execs.push(started.unwrap());
    }
    let running = guest.agent.ping(1).await.unwrap().execs;
    assert_eq!(running as usize, count);
    let mut runs = JoinSet::new();
    for (number, exec) in execs.into_iter().enumerate() {
        runs.spawn(async move {
            let input = noise(3_000 + number, number as u64 + 1);
            let output = exec.output_with(&input, Default::default()).await.unwrap();
            assert!(output.stdout == input, "program {number}");
            assert_eq!(output.status, ExitStatus::Code(0));
        });
    }
    let mut nonce = 1;
    while !runs.is_empty() {
        nonce += 1;
        let pong = within(5, "pong beside programs", guest.agent.ping(nonce)).await;
        pong.unwrap();
        if let Ok(Some(run)) =
            tokio::time::timeout(Duration::from_millis(100), runs.join_next()).await
        {
            run.unwrap();
        }
    }
    assert_eq!(guest.agent.ping(0).await.unwrap().execs, 0);
}

#[tokio::test]
async fn twenty_programs_at_once() {
    at_once(20).await;
}

#[tokio::test]
#[ignore = "long: fifty programs in one emulated kernel"]
async fn fifty_programs_at_once() {
    at_once(50).await;
}

/// Reads a program's output slowly: all of it arrives, and it accumulates neither in the guest's
/// memory nor in ours.
async fn slowly_read(len: usize) {
    if !kvm() {
        return;
    }
    let mut guest = Guest::fork().await;
    let fill = Command::new("fill").arg(len.to_string());
    let mut exec = guest.connect().await.exec(fill).await.unwrap();
    let mut stdout = exec.stdout().unwrap();
    let waiting = tokio::spawn(exec.wait());
    let free = async |guest: &mut Guest, nonce| {
        let pong = within(5, "pong", guest.agent.ping(nonce)).await;
        pong.unwrap().memory.free_bytes
    };
    let mut chunk = vec![0; 64 << 10];
    let (mut total, mut before) = (0, 0);
    loop {
        let count = within(10, "output", stdout.read(&mut chunk)).await.unwrap();
        if count == 0 {
            break;
        }
        for (at, byte) in (total..).zip(&chunk[..count]) {
            assert_eq!(*byte, (at & 0xff) as u8, "at {at}");
        }
        // The program is running by now.
        if total < 1 << 20 && total + count >= 1 << 20 {
            before = free(&mut guest, 1).await;
            tokio::time::sleep(patience(Duration::from_millis(200))).await;
            let after = free(&mut guest, 2).await;
            assert!(
                after + (2 << 20) > before,
                "{before} bytes free, then {after}"
            );
        }
        total += count;
        if total % (8 << 20) < count {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    assert_eq!(total, len);
    let exited = within(5, "end", waiting).await.unwrap().unwrap();
    assert_eq!(exited.status, ExitStatus::Code(0));
    assert_eq!(exited.output, OutputEnd::Complete);
    let after = free(&mut guest, 3).await;
    assert!(
        after + (4 << 20) > before,
        "{before} bytes free, then {after}"
    );
}

#[tokio::test]
async fn eight_mebibytes_of_output_are_read_slowly() {
    slowly_read(8 << 20).await;
}

#[tokio::test]
#[ignore = "long: 100 MiB out of an emulated kernel"]
async fn a_hundred_mebibytes_of_output_are_read_slowly() {
    slowly_read(100 << 20).await;
}

#[tokio::test]
async fn a_thousand_lines_are_a_thousand_lines() {
    let Some(guest) = shell_guest().await else {
        return;
    };
    let script = "i=0; while [ $i -lt 1000 ]; do i=$((i + 1)); echo \u{201e}Zeile\u{201c} $i \u{1f525}; done; echo end >&2";
    let output = guest.run(Command::new("sh").args(["-c", script])).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let expected: String = (1..=1000)
        .map(|number| format!("\u{201e}Zeile\u{201c} {number} \u{1f525}\n"))
        .collect();
    assert!(text == expected, "{text}");
    assert_eq!(output.stderr, b"end\n");
}

#[tokio::test]
async fn what_keeps_a_file_from_running_is_named() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    let files = [
        ("/tmp/script", "#!/no/such/interpreter -x\n", 0o755),
        ("/tmp/plain", "#!/bin/sh\n", 0o644),
        ("/tmp/garbage", "garbage", 0o755),
        ("/tmp/good", "#!/bin/sh\necho good $1\n", 0o755),
    ];
    for (path, content, mode) in files {
        let put = guest
            .agent
            .put(Put::new(path).mode(mode), content.as_bytes());
        within(5, "put", put).await.unwrap();
    }
    let failure = async |command: Command| match guest.connect().await.exec(command).await {
        Err(ExecError::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    };
    let missing = failure(Command::new("/tmp/script")).await;
    let expected = SpawnFailure::MissingInterpreter {
        program: "/tmp/script".into(),
        interpreter: "/no/such/interpreter".into(),
    };
    assert_eq!(missing, expected);
    for (path, errno) in [("/tmp/plain", 13), ("/tmp/garbage", 8)] {
        let refused = failure(Command::new(path)).await;
        let program = path.into();
        assert_eq!(refused, SpawnFailure::NotExecutable { program, errno });
    }
    let output = guest.run(Command::new("/tmp/good").arg("words")).await;
    assert_eq!(output.stdout, b"good words\n");
}
