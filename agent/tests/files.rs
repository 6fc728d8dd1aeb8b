//! File operations through a real agent, without a VM.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    time::Duration,
};

use common::{Agent, Client, eventually};
use hearth_agent::{
    client::FileError,
    proto::{FileFailure, FileKind, Place, Put, PutMode},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(99);
            (state >> 56) as u8
        })
        .collect()
}

async fn client() -> (Agent, Client, tempfile::TempDir) {
    let agent = Agent::start().await;
    let client = agent.client().await;
    (agent, client, tempfile::tempdir().unwrap())
}

/// Returns the guest's reason for a failure.
fn failure<T: std::fmt::Debug>(result: Result<T, FileError>) -> FileFailure {
    match result {
        Err(FileError::Failed { failure, .. }) => failure,
        other => panic!("{other:?}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn what_is_put_can_be_got_at_any_size() {
    let (_agent, mut client, dir) = client().await;
    let path = dir.path().join("file");
    for size in [0, 1, 4096, 65_536, 65_537, 3 << 20] {
        let content = noise(size);
        client.put(Put::new(&path), &content).await.unwrap();
        assert!(fs::read(&path).unwrap() == content, "{size}");
        assert!(client.get(&path, size).await.unwrap() == content, "{size}");
        let stat = client.stat(&path, true).await.unwrap();
        assert_eq!(
            (stat.kind, stat.size, stat.mode),
            (FileKind::File, size as u64, 0o644)
        );
        assert_eq!(stat.modified_s, fs::metadata(&path).unwrap().mtime());
    }
    assert_eq!(names(dir.path()), ["file"]);
    let mut part = Vec::new();
    let got = client.get_into(&path, 70_000..70_005, &mut part).await;
    assert_eq!((got.unwrap(), &part[..]), (5, &noise(70_005)[70_000..]));
    assert!(matches!(
        client.get(&path, 100).await,
        Err(FileError::TooLarge { most: 100 })
    ));
    // The kernel's files report a size of zero.
    let version = client.get("/proc/version", 4096).await.unwrap();
    assert_eq!(version, fs::read("/proc/version").unwrap());
    client.ping(1).await.unwrap();
}

#[tokio::test]
async fn a_file_is_replaced_at_once_or_not_at_all() {
    let (agent, mut client, dir) = client().await;
    let path = dir.path().join("file");
    client
        .put(Put::new(&path).mode(0o751), b"old")
        .await
        .unwrap();
    let held = fs::File::open(&path).unwrap();
    // The host disconnects after half of the file.
    let mut half = agent.client().await;
    let (mut writer, mut reader) = duplex(1 << 16);
    writer.write_all(&noise(1 << 16)).await.unwrap();
    let put = half.put_from(Put::new(&path), &mut reader);
    assert!(
        tokio::time::timeout(Duration::from_millis(300), put)
            .await
            .is_err()
    );
    assert_eq!(names(dir.path()).len(), 2);
    assert_eq!(fs::read(&path).unwrap(), b"old");
    drop(half);
    eventually("nothing of it remains", || names(dir.path()).len() == 1).await;
    assert_eq!(fs::read(&path).unwrap(), b"old");

    // A reader that has the file open keeps the old content; the permissions stay, the owner does
    // not.
    client.put(Put::new(&path), b"new").await.unwrap();
    assert_eq!(std::io::read_to_string(held).unwrap(), "old");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o751);

    // The host's reader fails.
    let mut broken = agent.client().await;
    let mut failing = failing_reader();
    let put = broken.put_from(Put::new(&path), &mut failing).await;
    assert!(matches!(put, Err(FileError::Host(_))), "{put:?}");
    drop(broken);
    eventually("nothing of it remains", || names(dir.path()).len() == 1).await;
    assert_eq!(fs::read(&path).unwrap(), b"new");
}

/// Returns a reader that yields a few bytes, then an error.
fn failing_reader() -> impl tokio::io::AsyncRead + Unpin {
    struct Failing;
    impl tokio::io::AsyncRead for Failing {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            std::task::Poll::Ready(Err(std::io::Error::other("no more")))
        }
    }
    b"some".as_slice().chain(Failing)
}

#[tokio::test]
async fn what_is_there_stays_is_extended_or_is_no_file() {
    let (_agent, mut client, dir) = client().await;
    let at = |name: &str| dir.path().join(name);
    client.put(Put::new(at("a")), b"one").await.unwrap();
    let create = Put::new(at("a")).how(PutMode::Create);
    assert_eq!(
        failure(client.put(create, b"two").await),
        FileFailure::Exists
    );
    let create = Put::new(at("b")).how(PutMode::Create).mode(0o600);
    client.put(create, b"two").await.unwrap();
    assert_eq!(fs::metadata(at("b")).unwrap().mode() & 0o7777, 0o600);
    let append = Put::new(at("a")).how(PutMode::Append);
    client.put(append.clone(), b" more").await.unwrap();
    client.put(append, b" and more").await.unwrap();
    assert_eq!(fs::read(at("a")).unwrap(), b"one more and more");

    fs::create_dir(at("dir")).unwrap();
    for how in [PutMode::Replace, PutMode::Append] {
        let put = client.put(Put::new(at("dir")).how(how), b"x").await;
        assert_eq!(failure(put), FileFailure::NotAFile);
    }
    // A link is replaced, its target stays.
    symlink(at("a"), at("link")).unwrap();
    client.put(Put::new(at("link")), b"mine").await.unwrap();
    assert!(fs::symlink_metadata(at("link")).unwrap().is_file());
    assert_eq!(fs::read(at("a")).unwrap(), b"one more and more");
    assert_eq!(names(dir.path()), ["a", "b", "dir", "link"]);
}

#[tokio::test]
async fn what_cannot_be_done_says_why_and_the_connection_is_good_for_more() {
    let (_agent, mut client, dir) = client().await;
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), "x").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    use FileFailure as Why;
    assert_eq!(failure(client.get(at("none"), 1).await), Why::NotFound);
    assert_eq!(
        failure(client.get(at("file/in"), 1).await),
        Why::NotADirectory
    );
    assert_eq!(failure(client.get(dir.path(), 1).await), Why::NotAFile);
    // A pipe without a writer is refused at once, not waited for.
    assert_eq!(failure(client.get(at("pipe"), 1).await), Why::NotAFile);
    assert_eq!(failure(client.get("/dev/zero", 1).await), Why::NotAFile);
    let append = Put::new(at("pipe")).how(PutMode::Append);
    assert_eq!(failure(client.put(append, b"x").await), Why::NotAFile);
    assert_eq!(failure(client.list(at("file")).await), Why::NotADirectory);
    assert_eq!(failure(client.stat("", true).await), Why::BadPath);
    assert_eq!(failure(client.stat("a\0b", true).await), Why::BadPath);
    for path in ["/", ".", "..", "a/..", "a/."] {
        assert_eq!(
            failure(client.remove(path, true).await),
            Why::BadPath,
            "{path}"
        );
    }
    assert_eq!(
        failure(client.remove(at("none"), true).await),
        Why::NotFound
    );
    assert_eq!(
        failure(client.make_dir(at("file"), 0o755, false).await),
        Why::Exists
    );
    assert_eq!(
        failure(client.make_dir(at("file"), 0o755, true).await),
        Why::NotADirectory
    );
    assert_eq!(
        failure(client.make_dir(at("a/b"), 0o755, false).await),
        Why::NotFound
    );
    assert_eq!(
        failure(client.rename(at("file"), at("pipe"), false).await),
        Why::Exists
    );
    let put = client.put(Put::new("/proc/version"), &noise(1 << 20)).await;
    assert!(matches!(
        failure(put),
        Why::NotFound | Why::NotPermitted { .. }
    ));
    let long = "x/".repeat(40_000);
    assert!(matches!(
        client.stat(long, true).await,
        Err(FileError::PathTooLong { bytes: 80_000 })
    ));
    let said = client.get(at("none"), 1).await.unwrap_err();
    let said = format!("{said}: {}", std::error::Error::source(&said).unwrap());
    assert!(
        said.ends_with("none, in the guest: no such file or directory"),
        "{said}"
    );
    client.ping(1).await.unwrap();
    assert_eq!(names(dir.path()), ["file", "pipe"]);
}

#[tokio::test]
async fn directories_are_made_listed_renamed_and_removed() {
    let (agent, mut client, dir) = client().await;
    let at = |name: &str| dir.path().join(name);
    client.make_dir(at("a//b/./c/"), 0o750, true).await.unwrap();
    client.make_dir(at("a/b/c"), 0o700, true).await.unwrap();
    assert_eq!(fs::metadata(at("a/b/c")).unwrap().mode() & 0o7777, 0o750);
    client.make_dir(at("plain"), 0o711, false).await.unwrap();
    assert_eq!(fs::metadata(at("plain")).unwrap().mode() & 0o7777, 0o711);
    for number in 0..3000 {
        fs::write(at(&format!("a/b/{number:0100}")), "").unwrap();
    }
    symlink("/", at("a/root")).unwrap();
    let mut listed: Vec<_> = client.list(at("a/b")).await.unwrap();
    listed.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(listed.len(), 3001);
    assert!(
        listed[..3000]
            .iter()
            .all(|entry| entry.kind == FileKind::File)
    );
    assert_eq!(
        (listed[3000].name(), listed[3000].kind),
        ("c".as_ref(), FileKind::Dir)
    );
    let stat = client.stat(at("a/root"), false).await.unwrap();
    assert_eq!(stat.kind, FileKind::Link);
    let stat = client.stat(at("a/root"), true).await.unwrap();
    assert_eq!(stat.kind, FileKind::Dir);
    assert_eq!(client.stat("/", false).await.unwrap().kind, FileKind::Dir);

    client.rename(at("a"), at("moved"), false).await.unwrap();
    client.put(Put::new(at("x")), b"x").await.unwrap();
    client.put(Put::new(at("y")), b"y").await.unwrap();
    client.rename(at("x"), at("y"), true).await.unwrap();
    assert_eq!(fs::read(at("y")).unwrap(), b"x");

    assert_eq!(
        failure(client.remove(at("moved"), false).await),
        FileFailure::NotEmpty
    );
    // A deep tree with entries of every kind beside it; the targets of links stay.
    let deep = at("moved").join(["d"; 150].join("/"));
    client.make_dir(&deep, 0o755, true).await.unwrap();
    fs::create_dir(at("kept")).unwrap();
    fs::write(at("kept/file"), "").unwrap();
    symlink(at("kept"), deep.join("link")).unwrap();
    let fds = agent.open_fds();
    client.remove(at("moved"), true).await.unwrap();
    client.remove(at("plain"), false).await.unwrap();
    client.remove(at("y"), true).await.unwrap();
    assert_eq!(names(dir.path()), ["kept"]);
    assert_eq!(names(&at("kept")), ["file"]);
    assert_eq!(agent.open_fds(), fds);

    let too_deep = at("t").join(["d"; 240].join("/"));
    client.make_dir(&too_deep, 0o755, true).await.unwrap();
    assert_eq!(
        failure(client.remove(at("t"), true).await),
        FileFailure::TooDeep
    );
    client
        .remove(at("t").join(["d"; 100].join("/")), true)
        .await
        .unwrap();
    client.remove(at("t"), true).await.unwrap();
    assert_eq!(agent.open_fds(), fds);
}

#[tokio::test]
async fn a_path_that_leads_out_is_refused_where_that_is_asked() {
    let (_agent, mut client, dir) = client().await;
    let home = dir.path().join("home");
    fs::create_dir_all(home.join("inner")).unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    fs::create_dir(dir.path().join("other")).unwrap();
    symlink("../secret", home.join("out")).unwrap();
    symlink(dir.path(), home.join("up")).unwrap();
    symlink("inner", home.join("in")).unwrap();
    let at = |path: &str| Place::beneath(&home, path);
    let absolute = dir.path().join("secret");
    let ways = [
        "../secret",
        "out",
        "up/secret",
        "inner/../../secret",
        absolute.to_str().unwrap(),
    ];
    for way in ways {
        let escapes = |why| assert_eq!(why, FileFailure::Escapes, "{way}");
        escapes(failure(client.get(at(way), 100).await));
        escapes(failure(client.stat(at(way), true).await));
        escapes(failure(client.list(at(way)).await));
        escapes(failure(
            client
                .put(Put::new(at(way)).how(PutMode::Append), b"x")
                .await,
        ));
        if way != "out" {
            // These operations act on the link itself, which is within the directory.
            escapes(failure(client.put(Put::new(at(way)), b"x").await));
            escapes(failure(client.remove(at(way), true).await));
            escapes(failure(client.rename(at(way), "inner/x", true).await));
            escapes(failure(client.rename(at("inner"), way, true).await));
            escapes(failure(client.make_dir(at(way), 0o755, false).await));
        }
    }
    assert_eq!(failure(client.list(at("..")).await), FileFailure::Escapes);
    assert_eq!(
        failure(client.stat(at(".."), false).await),
        FileFailure::Escapes
    );
    assert_eq!(
        failure(client.make_dir(at("up/other/new"), 0o755, true).await),
        FileFailure::Escapes
    );
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"secret");
    assert_eq!(names(dir.path()), ["home", "other", "secret"]);

    // Within the directory, links are followed.
    client
        .put(Put::new(at("in/../in/file")), b"mine")
        .await
        .unwrap();
    assert_eq!(client.get(at("in/file"), 100).await.unwrap(), b"mine");
    assert_eq!(
        client.stat(at("out"), false).await.unwrap().kind,
        FileKind::Link
    );
    client.make_dir(at("in/a/b"), 0o755, true).await.unwrap();
    client
        .rename(at("in/file"), "in/a/file", false)
        .await
        .unwrap();
    client.put(Put::new(at("out")), b"mine").await.unwrap();
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"secret");
    assert_eq!(names(&home.join("inner")), ["a"]);
}

#[tokio::test]
async fn a_slow_host_costs_the_agent_no_memory_and_others_no_time() {
    let (agent, mut client, dir) = client().await;
    let path = dir.path().join("large");
    let file = fs::File::create(&path).unwrap();
    file.set_len(256 << 20).unwrap();
    let before = agent.rss_kib();
    let (mut writer, mut reader) = duplex(1000);
    let copy = client.get_into(&path, 0..u64::MAX, &mut writer);
    let look = async {
        let mut some = vec![0; 5000];
        reader.read_exact(&mut some).await.unwrap();
        let mut other = agent.client().await;
        for nonce in 0..50 {
            other.ping(nonce).await.unwrap();
        }
        let held = agent.rss_kib().saturating_sub(before);
        assert!(held < 2048, "{held} KiB");
        let ticks = agent.cpu_ticks();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(agent.cpu_ticks() - ticks < 20, "the agent spins");
        tokio::io::copy(&mut reader, &mut tokio::io::sink()).await
    };
    let copied = tokio::select! {
        copied = copy => copied.unwrap(),
        _ = look => unreachable!("the writer is held"),
    };
    assert_eq!(copied, 256 << 20);
}

#[tokio::test]
async fn a_large_tree_is_removed_while_pings_are_answered() {
    let (agent, mut client, dir) = client().await;
    let tree = dir.path().join("tree");
    for outer in 0..40 {
        let inner = tree.join(outer.to_string());
        fs::create_dir_all(&inner).unwrap();
        for file in 0..250 {
            fs::write(inner.join(file.to_string()), "").unwrap();
        }
        fs::set_permissions(&inner, fs::Permissions::from_mode(0o700)).unwrap();
    }
    let mut other = agent.client().await;
    let pings = async {
        let mut nonce = 0;
        while tree.exists() {
            nonce += 1;
            other.ping(nonce).await.unwrap();
        }
        nonce
    };
    let (removed, pings) = tokio::join!(client.remove(&tree, true), pings);
    removed.unwrap();
    assert!(pings > 5, "{pings} pings during 10,000 removals");
}
