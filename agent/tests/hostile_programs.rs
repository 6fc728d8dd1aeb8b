//! Programs of a user that try to hold up the agent, or what it does for that user.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::time::Duration;

use common::{Agent, eventually, is_alive, sh};
use hearth_agent::{
    client::Command,
    proto::{ExitStatus, User},
};
use tokio::{io::AsyncReadExt, time::timeout};

/// Whether this process may run programs as somebody else, which it says if not.
fn is_root() -> bool {
    if !rustix::process::geteuid().is_root() {
        let skipped = b"\nNOT MEASURED: only root can run a program as somebody else\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return false;
    }
    true
}

/// A user of the test's own: what it does to all its processes meets nobody else's.
fn user(uid: u32) -> User {
    User {
        uid,
        gid: uid,
        groups: Vec::new(),
    }
}

/// Stops all other processes of its user, again and again, for some seconds.
const STOP_ALL: &str = "echo go; i=0; while [ $i -lt 2000000 ]; do kill -STOP -1; i=$((i+1)); done";

const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let done = timeout(PATIENCE, future).await;
    done.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

#[tokio::test]
async fn a_user_that_stops_all_its_processes_does_not_stop_the_agent() {
    if !is_root() {
        return;
    }
    let agent = Agent::start().await;
    let mut stopper = agent.exec(sh(STOP_ALL).user(user(54_321))).await;
    let mut said = stopper.stdout().unwrap();
    assert_eq!(said.read_u8().await.unwrap(), b'g');
    let fds = agent.open_fds();
    for round in 0..20 {
        // Its own programs are stopped, before they have begun or after: the time limit ends them all the same.
        let limited = Command::new("true").user(user(54_321));
        let limited = limited.timeout(Duration::from_millis(50));
        let limited = limited.grace(Duration::from_millis(10));
        let exec = agent.client().await.exec(limited);
        let output = within("a program that is stopped", async {
            let exec = exec.await.unwrap();
            exec.output(Default::default()).await.unwrap()
        });
        let output = output.await;
        let ended = output.status == ExitStatus::Code(0);
        assert!(ended || output.timed_out, "{round}: {output:?}");
        // One that nobody waits for any more goes, too.
        let given_up = agent.client().await;
        let starting = given_up.exec(Command::new("true").user(user(54_321)));
        let _ = timeout(Duration::from_millis(20), starting).await;
        // Others are none the worse.
        let pong = within("a pong", async { agent.client().await.ping(round).await });
        pong.await.unwrap();
        let output = within("a program of root's", agent.output(sh("echo $((6*7))")));
        assert_eq!(output.await.stdout, b"42\n");
    }
    drop((stopper, said));
    let output = within("a program", agent.output(sh("id -u").user(user(54_321))));
    assert_eq!(output.await.stdout, b"54321\n");
    // Nothing is kept of what was given up.
    eventually("no descriptor is left over", || agent.open_fds() <= fds).await;
}

#[tokio::test]
async fn a_program_whose_end_another_hides_ends_with_its_time() {
    if !is_root() {
        return;
    }
    let Ok(python) = std::process::Command::new("python3").arg("-V").output() else {
        let skipped = b"\nNOT MEASURED: no python3 to trace a program with\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return;
    };
    assert!(python.status.success());
    let agent = Agent::start().await;
    // A tracer keeps its tracee from being reaped by anybody else.
    let trace = "import ctypes,sys,time\n\
        libc = ctypes.CDLL(None)\n\
        print(libc.ptrace(0x4206, int(sys.argv[1]), None, None), flush=True)\n\
        time.sleep(1000)";
    let limited = sh("sleep 1000").user(user(54_323));
    let limited = limited.timeout(Duration::from_secs(2));
    let victim = agent.exec(limited.grace(Duration::from_millis(10))).await;
    let pid = victim.pid();
    let tracer = Command::new("python3").args(["-c", trace, &pid.to_string()]);
    let mut tracer = agent.exec(tracer.user(user(54_323))).await;
    let mut said = String::new();
    let mut stdout = tracer.stdout().unwrap();
    while !said.ends_with('\n') {
        said.push(char::from(stdout.read_u8().await.unwrap()));
    }
    if said != "0\n" {
        let skipped = b"\nNOT MEASURED: this machine lets no user trace programs of theirs\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return;
    }
    let output = within("the end", victim.output(Default::default())).await;
    let output = output.unwrap();
    assert!(output.timed_out, "{output:?}");
    assert_eq!(output.status, ExitStatus::Signal(9));
    drop((tracer, stdout));
    eventually("it is gone", || !is_alive(pid)).await;
    agent.assert_alive().await;
}
