//! Programs with a terminal, through a real agent, without a VM.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::time::Duration;

use common::{Agent, Running, eventually, is_alive, sh};
use hearth_agent::{
    client::{Command, OutputLimits},
    proto::{ExitStatus, Leftover, OutputEnd, User, WindowSize},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SIZE: WindowSize = WindowSize {
    rows: 31,
    columns: 117,
};

fn on_terminal(script: &str) -> Command {
    sh(script).terminal(SIZE)
}

/// Returns a program's output without the carriage returns that a terminal adds.
async fn shown(agent: &Agent, command: Command) -> String {
    let output = agent.output(command).await;
    assert_eq!(output.stderr, b"");
    String::from_utf8(output.stdout).unwrap().replace('\r', "")
}

/// Reads until the program has printed `text`.
async fn await_text(exec: &mut Running, text: &str) -> String {
    let mut said = String::new();
    let mut stdout = exec.stdout().unwrap();
    let reading = async {
        while !said.contains(text) {
            let mut chunk = [0; 256];
            let count = stdout.read(&mut chunk).await.unwrap();
            assert_ne!(count, 0, "{said:?} instead of {text:?}");
            said.push_str(&String::from_utf8_lossy(&chunk[..count]));
        }
    };
    let read = tokio::time::timeout(Duration::from_secs(20), reading).await;
    read.unwrap_or_else(|_| panic!("{said:?} instead of {text:?}"));
    said
}

#[tokio::test]
async fn a_program_has_a_terminal_of_the_size_that_was_asked_for() {
    let agent = Agent::start().await;
    let script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && stty size; echo $TERM; echo aside >&2; echo direct >/dev/tty; tty";
    let text = shown(&agent, on_terminal(script)).await;
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..4], ["31 117", "xterm", "aside", "direct"], "{text}");
    assert!(lines[4].starts_with("/dev/pts/"), "{text}");
    // No inherited descriptors: only the three, and ls's own.
    let text = shown(&agent, on_terminal("ls /proc/self/fd | wc -l")).await;
    assert_eq!(text, "4\n");
    let text = shown(&agent, on_terminal("echo $TERM").env("TERM", "dumb")).await;
    assert_eq!(text, "dumb\n");
    let text = shown(&agent, sh("tty; echo -$TERM-")).await;
    assert_eq!(text, "not a tty\n--\n");
}

#[tokio::test]
async fn a_program_learns_of_a_new_size() {
    let agent = Agent::start().await;
    let script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut exec = agent.exec(on_terminal(script)).await;
    let mut stdout = exec.stdout().unwrap();
    let mut ready = [0; 7];
    stdout.read_exact(&mut ready).await.unwrap();
    let size = WindowSize {
        rows: 50,
        columns: 132,
    };
    exec.resize(size).await.unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "50 132\r\n");
    assert_eq!(exec.wait().await.unwrap().status, ExitStatus::Code(4));
    // Without a terminal, a resize has no effect.
    let mut exec = agent.exec(Command::new("sleep").arg("0.2")).await;
    exec.resize(size).await.unwrap();
    assert_eq!(exec.wait().await.unwrap().status, ExitStatus::Code(0));
}

#[tokio::test]
async fn what_is_typed_is_echoed_and_control_characters_act() {
    let agent = Agent::start().await;
    let script = "read line; echo \"<$line>\"; sleep 1000";
    let mut exec = agent.exec(on_terminal(script)).await;
    let mut stdin = exec.stdin().unwrap();
    // The second character erases the first.
    stdin.write_all(b"x\x7fhello\n").await.unwrap();
    let said = await_text(&mut exec, "<hello>").await;
    assert!(said.starts_with('x'), "{said:?}");
    // A shell that is just starting a program may miss the character, so it is typed again.
    let mut ended = Box::pin(exec.wait());
    let exited = loop {
        let _ = stdin.write_all(b"\x03").await;
        let soon = tokio::time::timeout(Duration::from_millis(200), &mut ended);
        if let Ok(exited) = soon.await {
            break exited.unwrap();
        }
    };
    assert_eq!(exited.status, ExitStatus::Signal(2));
}

#[tokio::test]
async fn the_end_of_the_input_is_typed() {
    let agent = Agent::start().await;
    for input in ["", "one\ntwo\n", "no end of line"] {
        // A terminal hands over its input line by line; an unfinished last line arrives, too.
        let exec = agent
            .exec(on_terminal("stty -echo; echo; cat; echo end"))
            .await;
        let limits = OutputLimits::default();
        let output = exec.output_with(input.as_bytes(), limits).await.unwrap();
        assert_eq!(
            (output.status, output.end),
            (ExitStatus::Code(0), OutputEnd::Complete)
        );
        let text = String::from_utf8(output.stdout).unwrap().replace('\r', "");
        assert!(text.ends_with(&format!("{input}end\n")), "{text:?}");
    }
}

#[tokio::test]
async fn all_that_was_written_arrives() {
    let agent = Agent::start().await;
    let output = agent.output(on_terminal("seq 1 20000; exit 3")).await;
    assert_eq!(
        (output.status, output.end),
        (ExitStatus::Code(3), OutputEnd::Complete)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let numbers = text.lines().map(|line| line.parse::<u32>().unwrap());
    assert!(numbers.eq(1..=20000));

    // A process that lives on with the terminal open neither delays the result nor costs output.
    let script = "trap '' HUP; sleep 1000 & seq 1 1000; echo $!";
    let command = on_terminal(script).linger(Duration::from_millis(50));
    let output = agent.output(command).await;
    assert_eq!(
        (output.status, output.end),
        (ExitStatus::Code(0), OutputEnd::StillOpen)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1001);
    let left: u32 = text.lines().last().unwrap().parse().unwrap();
    assert!(is_alive(left));
    let kill = format!("kill {left}");
    assert_eq!(agent.output(sh(&kill)).await.status, ExitStatus::Code(0));

    // Nor does a slow reader cost output.
    let command = on_terminal(script)
        .linger(Duration::ZERO)
        .leftover(Leftover::Kill);
    let mut exec = agent.exec(command).await;
    let mut stdout = exec.stdout().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut text = String::new();
    let (read, exited) = tokio::join!(stdout.read_to_string(&mut text), exec.wait());
    assert_eq!(exited.unwrap().status, ExitStatus::Code(0));
    read.unwrap();
    assert_eq!(text.lines().count(), 1001);
}

#[tokio::test]
async fn typing_to_a_program_that_does_not_read_holds_up_nothing_else() {
    let agent = Agent::start().await;
    let mut exec = agent
        .exec(on_terminal("stty raw -echo; echo ready; sleep 1000"))
        .await;
    let mut stdin = exec.stdin().unwrap();
    await_text(&mut exec, "ready").await;
    let typing = tokio::spawn(async move { stdin.write_all(&[b'x'; 1 << 20]).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    agent.assert_alive().await;
    let before = agent.cpu_ticks();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(agent.cpu_ticks() - before < 20, "the agent spins");
    exec.signal(9).await.unwrap();
    assert_eq!(exec.wait().await.unwrap().status, ExitStatus::Signal(9));
    assert!(typing.await.unwrap().is_err());
}

#[tokio::test]
async fn a_program_that_closed_its_terminal_is_waited_for() {
    let agent = Agent::start().await;
    let script = "exec </dev/null >/dev/null 2>&1; sleep 0.5; exit 6";
    let exec = agent.exec(on_terminal(script)).await;
    let output = exec
        .output_with(&[b'x'; 200_000], OutputLimits::default())
        .await
        .unwrap();
    assert_eq!(output.status, ExitStatus::Code(6));
}

#[tokio::test]
async fn hanging_up_kills_what_runs_on_the_terminal() {
    let agent = Agent::start().await;
    let script = "trap '' HUP TERM INT; (trap '' HUP; sleep 1000) & echo $!.; wait; sleep 1000";
    let mut exec = agent.exec(on_terminal(script)).await;
    let main = exec.pid();
    let said = await_text(&mut exec, ".").await;
    let child: u32 = said.trim_end_matches(['.', '\r', '\n']).parse().unwrap();
    assert!(is_alive(main) && is_alive(child));
    drop(exec);
    eventually("both are dead", || !is_alive(main) && !is_alive(child)).await;
    agent.assert_alive().await;
}

#[tokio::test]
async fn a_terminal_belongs_to_the_user_who_sits_at_it() {
    if !rustix::process::geteuid().is_root() {
        let skipped = b"\nNOT MEASURED: only root can run a program as somebody else\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return;
    }
    let agent = Agent::start().await;
    let user = User {
        uid: 4321,
        gid: 4321,
        groups: vec![],
    };
    let script = "stat -c %u \"$(tty)\"; echo open > \"$(tty)\"";
    assert_eq!(
        shown(&agent, on_terminal(script).user(user)).await,
        "4321\nopen\n"
    );
}

#[tokio::test]
async fn terminals_leave_nothing_behind() {
    let agent = Agent::start().await;
    agent.output(on_terminal("true")).await;
    let before = agent.open_fds();
    for _ in 0..20 {
        agent.output(on_terminal("true")).await;
    }
    drop(agent.exec(on_terminal("sleep 1000")).await);
    let failed = Command::new("/no/such/program").terminal(SIZE);
    assert!(agent.client().await.exec(failed).await.is_err());
    eventually("the descriptors are closed", || agent.open_fds() <= before).await;
}
