#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! User code that uses up all resources of a guest, or attacks all that it can reach: the agent
//! survives, and reports how the program ended.

use std::time::Duration;

use hearth_agent::client::{Command, FileError, OutputLimits};
use hearth_agent::proto::{ExitStatus, FileFailure, Input, Leftover, Limits, Put, User};
use hearth_tests::{Guest, patience, shell_guest, within};
use hearth_vmm::VmStatus;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const NOBODY: User = User {
    uid: 65534,
    gid: 65534,
    groups: Vec::new(),
};
/// The agent's own program, at a path that exists in any root file system.
const APPLETS: &str = "/proc/1/exe";

fn sh(script: &str) -> Command {
    Command::new("sh").args(["-c", script])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns the processes other than the agent, the kernel's own and the one that lists them.
async fn processes(guest: &Guest) -> Vec<String> {
    let script = "for p in /proc/[0-9]*; do [ -e $p/exe ] && echo ${p#/proc/}; done; echo $$";
    let output = guest.run(sh(script)).await;
    let said = text(&output.stdout);
    let mut ids: Vec<_> = said.lines().map(str::to_owned).collect();
    let own = ids.pop().unwrap();
    ids.retain(|id| *id != own && id != "1");
    ids
}

/// Waits until the agent is the only process.
async fn calm(guest: &Guest) {
    let gone = async { while !processes(guest).await.is_empty() {} };
    within(20, "end of all programs", gone).await;
}

/// Asserts that the agent answers and runs programs.
async fn is_well(guest: &mut Guest) {
    within(5, "pong", guest.agent.ping(7_000)).await.unwrap();
    let output = guest.run(sh("echo well")).await;
    assert_eq!(text(&output.stdout), "well\n", "{output:?}");
    assert_eq!(guest.vm.status(), VmStatus::Running);
}

/// Runs a program that the kernel must kill because of its memory; the agent answers meanwhile.
async fn is_killed_for_memory(guest: &mut Guest, hog: Command) {
    let mut exec = guest.connect().await.exec(hog).await.unwrap();
    let end = async {
        let mut said = Vec::new();
        let mut stdout = exec.stdout().unwrap();
        stdout.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"");
        exec.wait().await.unwrap()
    };
    tokio::pin!(end);
    let mut nonce = 1_000;
    let exited = loop {
        nonce += 1;
        tokio::select! {
            exited = &mut end => break exited,
            pong = within(5, "pong beside it", guest.agent.ping(nonce)) => drop(pong.unwrap()),
        }
    };
    assert_eq!(exited.status, ExitStatus::Signal(9));
}

#[tokio::test]
async fn a_program_that_takes_more_memory_than_it_may_is_killed_and_nobody_else() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    let limits = Limits {
        memory_bytes: Some(3 << 20),
        ..Limits::default()
    };
    let hog = Command::new("alloc").arg("6").limits(limits);
    is_killed_for_memory(&mut guest, hog).await;
    is_well(&mut guest).await;
}

#[tokio::test]
#[ignore = "long: an emulated kernel looks for memory that is nowhere"]
async fn a_program_that_takes_all_memory_is_killed_and_nobody_else() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    // Nearly all memory, because other programs use some of it.
    let memory = guest.agent.ping(1).await.unwrap().memory;
    let total = (memory.total_bytes >> 20) - 1;
    let hog = Command::new("alloc").arg(total.to_string());
    is_killed_for_memory(&mut guest, hog).await;
    is_well(&mut guest).await;
}

/// Forks without end; each child waits for somebody to open the other end of the pipe.
const FORKS: &str = "mkfifo /tmp/fifo; while :; do : < /tmp/fifo & done";

#[tokio::test]
async fn a_program_that_forks_without_end_comes_to_its_limit() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    let limits = Limits {
        processes: Some(8),
        ..Limits::default()
    };
    let output = guest.run(sh(FORKS).limits(limits)).await;
    assert!(text(&output.stderr).contains("fork"), "{output:?}");
    assert!(!output.status.success(), "{output:?}");
    let left = processes(&guest).await.len();
    assert!((1..=8).contains(&left), "{left}");
    // A program without a limit of its own gets half of `threads-max`, which leaves as many for
    // others.
    let script = "IFS=: read -r number none group < /proc/self/cgroup; read -r most < /sys/fs/cgroup$group/pids.max; \
                  all=$(cat /proc/sys/kernel/threads-max); echo $((all / 2 - most))";
    let output = guest.run(sh(script)).await;
    assert_eq!(text(&output.stdout), "0\n", "{output:?}");
    is_well(&mut guest).await;
}

#[tokio::test]
#[ignore = "long: a hundred processes and more, made by an emulated kernel"]
async fn a_program_that_forks_without_end_leaves_processes_for_others() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    let output = guest.run(sh(FORKS)).await;
    assert!(text(&output.stderr).contains("fork"), "{output:?}");
    let left = processes(&guest).await.len();
    assert!(left > 20, "{left}");
    is_well(&mut guest).await;

    // The classic fork bomb, which also keeps the processor busy.
    let bomb = sh("b() { b | b & }; b; read -r line");
    let bomb = bomb.stdin(Input::Pipe).leftover(Leftover::Kill);
    let exec = guest.connect().await.exec(bomb).await.unwrap();
    for nonce in 10..15 {
        let pong = within(5, "pong beside it", guest.agent.ping(nonce)).await;
        pong.unwrap();
        tokio::time::sleep(patience(Duration::from_millis(50))).await;
    }
    drop(exec);
    let bomb_is_gone = async { while processes(&guest).await.len() > left {} };
    within(20, "end of the bomb", bomb_is_gone).await;
    is_well(&mut guest).await;
}

/// Fills the file systems, one after the other; all stay full until the end.
async fn fills(guest: &mut Guest, places: &[&str]) {
    for place in places {
        let output = guest.run(sh(&format!("cat /dev/zero > {place}"))).await;
        let said = text(&output.stderr);
        assert!(said.contains("No space left"), "{place}: {output:?}");
        within(5, "pong", guest.agent.ping(2)).await.unwrap();
        let put = Put::new(format!("{place}.too"));
        let put = guest.agent.put(put, &[7; 100_000]);
        let Err(FileError::Failed { failure, .. }) = within(5, "put", put).await else {
            panic!("{place}: there is room");
        };
        assert_eq!(failure, FileFailure::Full, "{place}");
    }
    is_well(guest).await;
    for place in places {
        let removed = guest.agent.remove(*place, false);
        within(5, "removal", removed).await.unwrap();
        let put = guest.agent.put(Put::new(*place), &[7; 100_000]);
        within(5, "put", put).await.unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_is_the_programs_trouble_and_not_the_agents() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    fills(&mut guest, &["/dev/shm/full", "/dev/full-too"]).await;
}

#[tokio::test]
#[ignore = "long: more than half of the memory is written, page by page"]
async fn all_disks_full_leave_memory_for_programs() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    let places = ["/tmp/full", "/full", "/dev/shm/full", "/dev/full-too"];
    fills(&mut guest, &places).await;
}

#[tokio::test]
async fn signals_to_everybody_reach_programs_and_not_the_agent() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    // A program of another request. An ordinary user cannot signal root's; root can signal all.
    let start = |user: Option<User>| {
        let victim = Command::new("sleep").arg("1000");
        match user {
            Some(user) => victim.user(user),
            None => victim,
        }
    };
    let mut root_s = guest.connect().await.exec(start(None)).await.unwrap();
    let own = guest
        .connect()
        .await
        .exec(start(Some(NOBODY)))
        .await
        .unwrap();
    let output = guest
        .run(sh("kill -9 -1; echo survived").user(NOBODY))
        .await;
    assert_eq!(text(&output.stdout), "survived\n", "{output:?}");
    let ended = within(5, "end of the user's program", own.wait()).await;
    assert_eq!(ended.unwrap().status, ExitStatus::Signal(9));
    root_s.signal(0x40).await.unwrap();
    let ended = within(5, "end of root's program", root_s.wait()).await;
    assert_eq!(ended.unwrap().status, ExitStatus::Signal(0x40));

    let root_s = guest.connect().await.exec(start(None)).await.unwrap();
    let output = guest.run(sh("kill -9 -1; echo survived")).await;
    assert_eq!(text(&output.stdout), "survived\n", "{output:?}");
    let ended = within(5, "end of root's program", root_s.wait()).await;
    assert_eq!(ended.unwrap().status, ExitStatus::Signal(9));
    // Sends every signal there is to the agent alone.
    let script =
        "n=1; while [ $n -le 64 ]; do kill -$n 1 2>/dev/null; n=$((n + 1)); done; echo sent";
    for command in [sh(script), sh(script).user(NOBODY)] {
        let output = guest.run(command).await;
        assert_eq!(text(&output.stdout), "sent\n", "{output:?}");
    }
    is_well(&mut guest).await;
}

#[tokio::test]
async fn a_program_inherits_nothing_of_the_agents() {
    let Some(guest) = shell_guest().await else {
        return;
    };
    // Other programs run and connections are open meanwhile. The program has the three standard
    // descriptors, and the one that `ls` opens.
    let other = Command::new("cat").stdin(Input::Pipe);
    let other = guest.connect().await.exec(other).await.unwrap();
    for command in [
        Command::new("ls").arg("/proc/self/fd"),
        Command::new("ls").arg("/proc/self/fd").user(NOBODY),
        Command::new("ls")
            .arg("/proc/self/fd")
            .terminal(Default::default()),
    ] {
        let output = guest.run(command).await;
        let said = text(&output.stdout).replace('\r', "");
        assert_eq!(said, "0\n1\n2\n3\n", "{output:?}");
    }
    // It inherits no blocked or ignored signal either.
    let script = "while read -r name mask; do case $name in Sig[BI]*) echo $name $mask;; esac; done < /proc/self/status";
    let output = guest.run(sh(script)).await;
    let nothing = "SigBlk: 0000000000000000\nSigIgn: 0000000000000000\n";
    assert_eq!(text(&output.stdout), nothing);
    drop(other);
}

#[tokio::test]
async fn timeout_and_cancel_reach_those_who_left_the_session_and_lost_their_parent() {
    let Some(mut guest) = shell_guest().await else {
        return;
    };
    let script = format!(
        "trap '' TERM; {APPLETS} background ignore-term 1000 >/dev/null; \
         ({APPLETS} background ignore-term 1000 >/dev/null &); echo begun; while :; do read -r line; done"
    );
    let family = || sh(&script).stdin(Input::Pipe);
    let timed = family().timeout(patience(Duration::from_millis(400)));
    let exec = guest
        .connect()
        .await
        .exec(timed.grace(Duration::from_millis(200)));
    let mut exec = exec.await.unwrap();
    let mut stdin = exec.stdin().unwrap();
    let output = within(30, "end by timeout", exec.output(OutputLimits::default()));
    let output = output.await.unwrap();
    assert!(output.timed_out, "{output:?}");
    assert_eq!(output.status, ExitStatus::Signal(9));
    assert_eq!(text(&output.stdout), "begun\n");
    assert!(stdin.write_all(b"gone\n").await.is_err());
    calm(&guest).await;

    let mut exec = guest.connect().await.exec(family()).await.unwrap();
    let stdin = exec.stdin().unwrap();
    let mut begun = [0; 6];
    let mut stdout = exec.stdout().unwrap();
    let reading = stdout.read_exact(&mut begun);
    within(10, "begin", reading).await.unwrap();
    assert!(processes(&guest).await.len() >= 3);
    drop((exec, stdin));
    calm(&guest).await;
    is_well(&mut guest).await;
}
