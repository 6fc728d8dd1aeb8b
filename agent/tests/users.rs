//! Programs that run as a user, through a real agent, without a VM.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use common::{Agent, sh};
use hearth_agent::{
    client::{Command, ExecError, OutputLimits},
    proto::{Input, SpawnFailure},
};

const WHO: &str = "id -u; id -g; echo $HOME $USER $LOGNAME; pwd";

async fn said(agent: &Agent, command: Command) -> String {
    let output = agent.output(command).await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn a_name_leads_to_ids_home_and_environment() {
    if !rustix::process::geteuid().is_root() {
        let skipped = b"\nNOT MEASURED: only root can run a program as somebody else\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return;
    }
    let agent = Agent::start().await;
    let root = "0\n0\n/root root root\n/root\n";
    assert_eq!(said(&agent, sh(WHO).user_name("root")).await, root);
    // The user as this machine defines it. A home that does not exist is not used as working
    // directory.
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let nobody = passwd.lines().find(|line| line.starts_with("nobody:"));
    let fields: Vec<_> = nobody.unwrap().split(':').collect();
    let (uid, gid, home) = (fields[2], fields[3], fields[5]);
    assert!(!std::path::Path::new(home).exists(), "{home}");
    let text = said(&agent, sh(WHO).user_name("nobody")).await;
    assert_eq!(text, format!("{uid}\n{gid}\n{home} nobody nobody\n/\n"));
    // The command's own settings take precedence.
    let command = sh("echo $HOME $USER; pwd").user_name("root");
    let command = command.env("HOME", "/elsewhere").current_dir("/usr");
    assert_eq!(said(&agent, command).await, "/elsewhere root\n/usr\n");
    let command = sh("echo -$HOME-$USER-").user_name("root").env_clear();
    assert_eq!(said(&agent, command).await, "---\n");
}

#[tokio::test]
async fn a_user_can_open_its_streams_by_name_and_the_rest_is_left_alone() {
    if !rustix::process::geteuid().is_root() {
        let skipped = b"\nNOT MEASURED: only root can run a program as somebody else\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return;
    }
    let agent = Agent::start().await;
    let command = sh("cat /dev/stdin > /dev/stdout; echo err > /dev/stderr").user_name("nobody");
    let exec = agent.exec(command.clone().stdin(Input::Pipe)).await;
    let output = exec
        .output_with(b"in", OutputLimits::default())
        .await
        .unwrap();
    assert_eq!(
        (&*output.stdout, &*output.stderr),
        (&b"in"[..], &b"err\n"[..]),
        "{output:?}"
    );
    agent.output(command).await;
    let null = std::fs::metadata("/dev/null").unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&null), 0);
}

#[tokio::test]
async fn nobody_of_that_name_is_said() {
    let agent = Agent::start().await;
    for name in ["no-such-user", "", "root:x"] {
        let refused = agent.client().await.exec(sh("true").user_name(name)).await;
        let Err(ExecError::Failed(failure)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(failure, SpawnFailure::NoUser { name: name.into() });
        assert!(failure.to_string().contains("/etc/passwd"));
    }
}
