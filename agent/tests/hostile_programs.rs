//! Programs that try to block the agent, or its work for their user.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::time::Duration;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
};

use common::{Agent, eventually, is_alive, sh};
use hearth_agent::{
    client::{Command, FileError, Node, TreeEntry, TreeLimits, TreeWriter},
    proto::{Account, ExitStatus, FileFailure, Place, Put, PutMode, User},
};
use tokio::{io::AsyncReadExt, time::timeout};

/// Whether this process may run programs as another user; prints a note if not.
fn is_root() -> bool {
    if !rustix::process::geteuid().is_root() {
        let skipped = b"\nNOT MEASURED: only root can run a program as somebody else\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), skipped);
        return false;
    }
    true
}

/// A user that only this test has, so that signals to all its processes reach no others.
fn user(uid: u32) -> User {
    User {
        uid,
        gid: uid,
        groups: Vec::new(),
    }
}

/// Sends SIGSTOP to all other processes of its user, again and again, for some seconds.
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
        // The user's own programs are stopped, before they have begun or after: the time limit ends
        // them all the same.
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
        // A program whose caller has given up ends, too.
        let given_up = agent.client().await;
        let starting = given_up.exec(Command::new("true").user(user(54_321)));
        let _ = timeout(Duration::from_millis(20), starting).await;
        // Other connections and programs are not affected.
        let pong = within("a pong", async { agent.client().await.ping(round).await });
        pong.await.unwrap();
        let output = within("a program of root's", agent.output(sh("echo $((6*7))")));
        assert_eq!(output.await.stdout, b"42\n");
    }
    drop((stopper, said));
    let output = within("a program", agent.output(sh("id -u").user(user(54_321))));
    assert_eq!(output.await.stdout, b"54321\n");
    // Nothing is kept of cancelled programs.
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
    // While a process is traced, only its tracer can reap it.
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

/// Returns a directory of root's and one of a user's, in a directory that everyone may enter.
fn two_directories(uid: u32) -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (roots, users) = (dir.path().join("roots"), dir.path().join("users"));
    for place in [&roots, &users] {
        fs::create_dir(place).unwrap();
        fs::set_permissions(place, fs::Permissions::from_mode(0o755)).unwrap();
    }
    chown(&users, Some(uid), Some(uid)).unwrap();
    (dir, roots, users)
}

fn is_refused<T: std::fmt::Debug>(done: Result<T, FileError>) -> bool {
    let Err(FileError::Failed { failure, .. }) = done else {
        panic!("{done:?}");
    };
    matches!(failure, FileFailure::NotPermitted { .. })
}

fn owner(path: &Path) -> (u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.uid(), found.gid())
}

#[tokio::test]
async fn files_for_a_user_are_put_with_that_users_rights() {
    if !is_root() {
        return;
    }
    const UID: u32 = 54_324;
    let _attack = "links and directories in the way of files that are put for a user";
    let agent = Agent::start().await;
    let (_dir, roots, users) = two_directories(UID);
    let account = || Account::Ids(user(UID));
    let secret = roots.join("secret");
    fs::write(&secret, "root's").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    symlink(&secret, users.join("log")).unwrap();
    symlink(&roots, users.join("dir")).unwrap();
    fs::hard_link(&secret, users.join("hard")).unwrap();
    let mut client = agent.client().await;
    let put = |name: &str| Put::new(users.join(name)).account(Some(account()));

    // Root's file through a link, through a hard link, and through a link to its directory.
    for name in ["log", "hard", "dir/secret"] {
        let append = put(name).how(PutMode::Append).mode(0o666);
        assert!(is_refused(client.put(append, b"more").await), "{name}");
        assert!(is_refused(
            client
                .get(Place::new(users.join(name)).by(account()), 99)
                .await
        ));
    }
    assert!(is_refused(client.put(put("dir/new"), b"new").await));
    assert!(is_refused(client.put(put("dir/secret"), b"new").await));
    let at = |name: &str| Place::new(users.join(name)).by(account());
    assert!(is_refused(client.remove(at("dir/secret"), true).await));
    assert!(is_refused(
        client
            .rename(at("dir/secret"), users.join("mine"), true)
            .await
    ));
    assert!(is_refused(
        client.make_dir(at("dir/new"), 0o755, true).await
    ));
    assert!(is_refused(client.make_link(at("dir/new"), "secret").await));
    assert!(is_refused(
        client.list(Place::new("/proc/1/fd").by(account())).await
    ));
    // Nor does the agent's own `/proc/self` give access.
    let own = client
        .get(Place::new("/proc/self/exe").by(account()), 99)
        .await;
    assert!(matches!(own, Err(FileError::Failed { .. })), "{own:?}");

    // With root's rights, and given to the user: an existing file keeps its owner.
    let append = Put::new(users.join("log")).given_to(account());
    let append = append.how(PutMode::Append).mode(0o666);
    client.put(append.clone(), b" file").await.unwrap();
    assert_eq!(fs::read(&secret).unwrap(), b"root's file");
    assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(
        (owner(&secret), fs::read_dir(&roots).unwrap().count()),
        ((0, 0), 1)
    );

    // Where the user may write, files are written and belong to the user.
    client.put(put("file").mode(0o4750), b"mine").await.unwrap();
    client
        .put(put("file").how(PutMode::Append), b" too")
        .await
        .unwrap();
    client
        .put(put("appended").how(PutMode::Append), b"new")
        .await
        .unwrap();
    client
        .make_dir(at("some/where"), 0o700, true)
        .await
        .unwrap();
    client.make_link(at("some/link"), "where").await.unwrap();
    assert_eq!(fs::read(users.join("file")).unwrap(), b"mine too");
    assert_eq!(
        fs::metadata(users.join("file")).unwrap().mode() & 0o7777,
        0o4750
    );
    for name in ["file", "appended", "some", "some/where", "some/link"] {
        assert_eq!(owner(&users.join(name)), (UID, UID), "{name}");
    }
    client
        .put(Put::new(roots.join("given")).given_to(account()), b"x")
        .await
        .unwrap();
    assert_eq!(owner(&roots.join("given")), (UID, UID));
    client.remove(at("some"), true).await.unwrap();

    // After all of that, and after a put that was cancelled half-way, the agent has its own rights,
    // and no others.
    let mut half = agent.client().await;
    let (mut writer, mut reader) = tokio::io::duplex(1 << 10);
    let unfinished = half.put_from(put("unfinished"), &mut reader);
    tokio::io::AsyncWriteExt::write_all(&mut writer, b"some")
        .await
        .unwrap();
    assert!(
        timeout(Duration::from_millis(200), unfinished)
            .await
            .is_err()
    );
    drop(half);
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let own = fs::read_to_string("/proc/self/status").unwrap();
    for field in ["Uid:", "Gid:", "Groups:", "CapEff:"] {
        let line = |status: &str| {
            let found = status.lines().find(|line| line.starts_with(field));
            found.unwrap().to_owned()
        };
        assert_eq!(line(&status), line(&own));
    }
    client.put(Put::new(roots.join("own")), b"x").await.unwrap();
    assert_eq!(owner(&roots.join("own")), (0, 0));
    eventually("nothing of it remains", || {
        fs::read_dir(&users).unwrap().count() == 5
    })
    .await;
}

#[tokio::test]
async fn a_tree_goes_where_it_began_whatever_is_at_the_path_meanwhile() {
    if !is_root() {
        return;
    }
    const UID: u32 = 54_325;
    let _attack = "a directory exchanged while a tree is put there";
    let agent = Agent::start().await;
    // This matters most with root's rights, but holds with a user's, too.
    for account in [None, Some(Account::Ids(user(UID)))] {
        let (_dir, roots, users) = two_directories(UID);
        let (to, moved) = (users.join("to"), users.join("moved"));
        let mut client = agent.client().await;
        let mut writer = TreeWriter::begin(&mut client, to.clone(), account.clone()).unwrap();
        let entry = |name: &str| TreeEntry {
            path: name.into(),
            mode: 0o644,
            modified_s: 0,
            node: Node::File { size: 1 },
        };
        // More entries than may be unanswered at a time, so that the first ones are already
        // written.
        for number in 0..64 {
            let entry = entry(&format!("a{number}"));
            writer.add(&entry, &mut b"x".as_slice()).await.unwrap();
        }
        fs::rename(&to, &moved).unwrap();
        symlink(&roots, &to).unwrap();
        for number in 0..64 {
            let entry = entry(&format!("b/{number}"));
            writer.add(&entry, &mut b"x".as_slice()).await.unwrap();
        }
        writer.finish().await.unwrap();
        assert_eq!(fs::read_dir(&roots).unwrap().count(), 0);
        assert_eq!(fs::read_dir(&moved).unwrap().count(), 65);
        assert_eq!(fs::read_dir(moved.join("b")).unwrap().count(), 64);

        // Reading the tree is alike. A new tree begins at whatever is at the path by then.
        let mut archive = Vec::new();
        let mut dir = Place::new(&moved);
        dir.by = account;
        let got = client.get_tree(dir, TreeLimits::default(), &mut archive);
        assert_eq!(got.await.unwrap().entries, 129);
        let got = client.get_tree(&to, TreeLimits::default(), &mut archive);
        assert_eq!(got.await.unwrap().entries, 0);
    }
}

#[tokio::test]
async fn only_root_and_who_is_let_gain_rights_by_what_they_execute() {
    if !is_root() {
        return;
    }
    let _attack = "a program that would gain rights by what it executes";
    let agent = Agent::start().await;
    let status = || sh("grep NoNewPrivs /proc/self/status");
    for (command, expected) in [
        (status().user(user(54_326)), "1"),
        (status().user_name("nobody"), "1"),
        (status().user(user(54_326)).allow_new_privileges(), "0"),
        (status().user_name("root"), "0"),
        (status(), "0"),
    ] {
        let output = agent.output(command.clone()).await;
        let said = format!("NoNewPrivs:\t{expected}\n");
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            said,
            "{command:?}"
        );
    }
}
