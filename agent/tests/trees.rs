//! Trees of files into a guest and out of it, as tar archives that the system's tar writes and
//! reads.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::Command as HostCommand,
};

use common::{Agent, peers::scripted};
use hearth_agent::{
    client::{ConnectionError, FileError, TreeError, TreeLimits},
    proto::{DirEntry, FileFailure, FileKind, FileReply, Metadata, Response},
};
use serde_bytes::ByteBuf;

/// Returns kind, permissions and content of each path of a tree.
fn picture(top: &Path) -> BTreeMap<String, String> {
    let (mut picture, mut dirs) = (BTreeMap::new(), vec![top.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            let mode = found.permissions().mode() & 0o7777;
            let what = if found.is_dir() {
                dirs.push(path.clone());
                format!("dir {mode:o}")
            } else if found.is_symlink() {
                format!("link {}", fs::read_link(&path).unwrap().display())
            } else {
                let content = fs::read(&path).unwrap();
                let sum = content
                    .iter()
                    .fold(0_u64, |sum, &byte| sum.wrapping_mul(31) + u64::from(byte));
                format!("file {mode:o} {} {sum:x}", content.len())
            };
            let name = path.strip_prefix(top).unwrap().to_string_lossy();
            picture.insert(name.into_owned(), what);
        }
    }
    picture
}

/// Creates a tree with every kind of entry.
fn sample(top: &Path) {
    let long = "directory-".repeat(12);
    for dir in ["empty", "a/b/c", &format!("{long}/{long}")] {
        fs::create_dir_all(top.join(dir)).unwrap();
    }
    let file = |name: &str, size: usize, mode: u32| {
        let content: Vec<u8> = (0..size).map(|at| (at * 7 / 3) as u8).collect();
        fs::write(top.join(name), content).unwrap();
        fs::set_permissions(top.join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    file("nothing", 0, 0o600);
    file("program", 511, 0o755);
    file("a/block", 512, 0o644);
    file("a/b/more", 200_003, 0o444);
    file("a/b/c/\u{fc}ml\u{e4}ut with blanks", 3, 0o640);
    file(&format!("{long}/{long}/{long}"), 1000, 0o644);
    for number in 0..50 {
        file(&format!("a/b/c/{number}"), number * 40, 0o644);
    }
    symlink("a/b", top.join("inward")).unwrap();
    symlink("/etc/passwd", top.join("outward")).unwrap();
    symlink(format!("{long}/{long}"), top.join("a/far")).unwrap();
    fs::set_permissions(top.join("a/b"), fs::Permissions::from_mode(0o750)).unwrap();
}

fn tar(args: &[&str]) -> Vec<u8> {
    let output = HostCommand::new("tar").args(args).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn a_tree_goes_in_and_comes_out_as_it_was() {
    let agent = Agent::start().await;
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    sample(&source);
    for format in ["gnu", "pax", "ustar", "v7"] {
        // The old formats do not support long names.
        let short = matches!(format, "ustar" | "v7");
        let from = if short {
            source.join("a/b")
        } else {
            source.clone()
        };
        let archive = tar(&["-C", text(&from), "--format", format, "-c", "."]);
        let to = dir.path().join(format).join("new");
        let put = agent
            .client()
            .await
            .put_tree(&to, None, &mut archive.as_slice())
            .await;
        let expected = picture(&from);
        assert_eq!(put.unwrap().entries, expected.len(), "{format}");
        assert_eq!(picture(&to), expected, "{format}");
        // Again, over the existing tree.
        let put = agent
            .client()
            .await
            .put_tree(&to, None, &mut archive.as_slice())
            .await;
        assert_eq!(put.unwrap().entries, expected.len());
        assert_eq!(picture(&to), expected, "{format}");
    }

    let mut archive = Vec::new();
    let mut client = agent.client().await;
    let got = client
        .get_tree(&source, TreeLimits::default(), &mut archive)
        .await
        .unwrap();
    let expected = picture(&source);
    assert_eq!(got.entries, expected.len());
    // The connection can still be used.
    client.ping(1).await.unwrap();
    let (packed, back) = (dir.path().join("packed"), dir.path().join("back"));
    fs::write(&packed, &archive).unwrap();
    fs::create_dir(&back).unwrap();
    tar(&["-C", text(&back), "-xpf", text(&packed)]);
    assert_eq!(picture(&back), expected);
}

#[tokio::test]
async fn an_archive_that_leads_out_of_the_directory_is_refused() {
    let agent = Agent::start().await;
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let source = at("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    let packed = |transform: &str| {
        let transform = format!("--transform=s,^file$,{transform},");
        tar(&["-C", text(&source), "-P", &transform, "-c", "file"])
    };
    for name in [
        "../escaped",
        "a/../../escaped",
        &format!("{}/escaped", dir.path().display()),
    ] {
        let archive = packed(name);
        let put = agent
            .client()
            .await
            .put_tree(at("to"), None, &mut archive.as_slice())
            .await;
        assert!(matches!(put, Err(TreeError::BadPath(_))), "{name}: {put:?}");
    }
    // Through a link in the archive, and through a link that exists already.
    fs::create_dir(at("outside")).unwrap();
    fs::create_dir_all(source.join("one")).unwrap();
    symlink(at("outside"), source.join("link")).unwrap();
    let mut archive = tar(&["-C", text(&source), "-c", "link"]);
    archive.truncate(512);
    archive.extend(packed("link/escaped"));
    for _ in 0..2 {
        let put = agent
            .client()
            .await
            .put_tree(at("to"), None, &mut archive.as_slice())
            .await;
        let Err(TreeError::File(FileError::Failed { failure, .. })) = put else {
            panic!("{put:?}");
        };
        assert!(
            matches!(failure, FileFailure::Escapes | FileFailure::NotADirectory),
            "{failure:?}"
        );
    }
    assert!(!at("escaped").exists());
    assert_eq!(fs::read_dir(at("outside")).unwrap().count(), 0);
    // An entry that is no regular file, directory or symbolic link.
    let pipe = source.join("pipe");
    assert!(
        HostCommand::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    fs::hard_link(source.join("file"), source.join("other")).unwrap();
    for names in [&["pipe"][..], &["file", "other"]] {
        let args = [&["-C", text(&source), "-c"][..], names].concat();
        let archive = tar(&args);
        let put = agent
            .client()
            .await
            .put_tree(at("to"), None, &mut archive.as_slice())
            .await;
        assert!(matches!(put, Err(TreeError::NotPlain(_))), "{put:?}");
    }
    agent.assert_alive().await;
}

#[tokio::test]
async fn a_damaged_archive_is_an_error_and_not_a_smaller_tree() {
    let agent = Agent::start().await;
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), [b'x'; 700]).unwrap();
    let long = "x".repeat(150);
    fs::write(source.join(&long), "content").unwrap();
    let whole = tar(&["-C", text(&source), "--format=pax", "-c", "file", &long]);
    let put = async |archive: &[u8]| {
        let to = dir.path().join("to");
        let put = agent
            .client()
            .await
            .put_tree(to, None, &mut &*archive)
            .await;
        put.map(|count| count.entries)
    };
    assert_eq!(put(&whole).await.unwrap(), 2);
    assert_eq!(put(&[]).await.unwrap(), 0);
    // The archive ends within a file's content, its padding, or a header.
    for end in [1, 511, 600, 1100, 1300, 1536 + 100, 1536 + 600] {
        let cut = put(&whole[..end]).await;
        assert!(
            matches!(cut, Err(TreeError::BadArchive(_) | TreeError::Changed(_))),
            "{end}: {cut:?}"
        );
    }
    for at in (0..512).step_by(13) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x41;
        let put = put(&damaged).await;
        assert!(
            matches!(put, Err(TreeError::BadArchive(_))),
            "{at}: {put:?}"
        );
    }
    assert!(matches!(
        put(&[7; 2048]).await,
        Err(TreeError::BadArchive(_))
    ));
    agent.assert_alive().await;
}

#[tokio::test]
async fn what_comes_out_is_bounded() {
    let agent = Agent::start().await;
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("deep");
    fs::create_dir_all(deep.join("1/2/3/4")).unwrap();
    let large = dir.path().join("large");
    fs::create_dir(&large).unwrap();
    fs::File::create(large.join("one"))
        .unwrap()
        .set_len(5000)
        .unwrap();
    fs::File::create(large.join("two"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    // A link to the parent does not lead into an endless tree.
    symlink("..", large.join("up")).unwrap();
    let limits = TreeLimits {
        bytes: 10_000,
        entries: 5,
        depth: 4,
    };
    let get = async |from: &Path, limits: TreeLimits| {
        let mut archive = Vec::new();
        let got = agent
            .client()
            .await
            .get_tree(from, limits, &mut archive)
            .await;
        (got, archive.len())
    };
    let (got, _) = get(&deep, limits).await;
    assert_eq!(got.unwrap().entries, 4);
    let shallow = TreeLimits { depth: 3, ..limits };
    let (got, _) = get(&deep, shallow).await;
    assert!(
        matches!(got, Err(TreeError::TooDeep { most: 3, .. })),
        "{got:?}"
    );
    let (got, written) = get(&large, limits).await;
    assert!(matches!(got, Err(TreeError::TooLarge(10_000))), "{got:?}");
    assert!(written < 10_000, "{written}");
    let few = TreeLimits {
        entries: 2,
        ..limits
    };
    let (got, _) = get(&large, few).await;
    assert!(matches!(got, Err(TreeError::TooMany(2))), "{got:?}");
    let (got, _) = get(Path::new("/dev"), TreeLimits::default()).await;
    assert!(matches!(got, Err(TreeError::NotPlain(_))), "{got:?}");
}

fn found(kind: FileKind, size: u64) -> Response<'static> {
    Response::File(FileReply::Stat(Metadata {
        kind,
        size,
        mode: 0o644,
        uid: 0,
        gid: 0,
        modified_s: 0,
        modified_ns: 0,
    }))
}

fn listing(names: &[&str], kind: FileKind) -> [Response<'static>; 2] {
    let entry = |name: &&str| DirEntry {
        name: ByteBuf::from(*name),
        kind,
    };
    let entries = names.iter().map(entry).collect();
    [
        Response::File(FileReply::Entries(entries)),
        Response::File(FileReply::Done),
    ]
}

#[tokio::test]
async fn a_guest_that_lies_about_its_tree() {
    let limits = TreeLimits::default();
    for name in ["..", ".", "", "a/b", "/etc/passwd", "a\0b"] {
        let (mut client, _guest) = scripted(&listing(&[name], FileKind::File)).await;
        let mut archive = Vec::new();
        let got = client.get_tree("/", limits, &mut archive).await;
        assert!(
            matches!(
                got,
                Err(TreeError::File(FileError::Connection(
                    ConnectionError::Protocol(_)
                )))
            ),
            "{name}: {got:?}"
        );
        assert_eq!(archive.len(), 0);
    }
    // An endless tree.
    let level = |_| {
        let [entries, done] = listing(&["again"], FileKind::Dir);
        [entries, done, found(FileKind::Dir, 0)]
    };
    let endless: Vec<_> = (0..100).flat_map(level).collect();
    let (mut client, _guest) = scripted(&endless).await;
    let got = client.get_tree("/", limits, &mut Vec::new()).await;
    assert!(
        matches!(got, Err(TreeError::TooDeep { most: 64, .. })),
        "{got:?}"
    );
    // A file whose content is longer or shorter than its announced size.
    for (size, content, grows) in [(3, &b"1234"[..], true), (5, b"1234", false)] {
        let [entries, done] = listing(&["file"], FileKind::File);
        let data = Response::File(FileReply::Data(content));
        let end = Response::File(FileReply::Done);
        let said = [entries, done, found(FileKind::File, size), data, end];
        let (mut client, _guest) = scripted(&said).await;
        let got = client.get_tree("/", limits, &mut Vec::new()).await;
        match grows {
            true => assert!(
                matches!(got, Err(TreeError::File(FileError::Connection(_)))),
                "{got:?}"
            ),
            false => assert!(matches!(got, Err(TreeError::Changed(_))), "{got:?}"),
        }
    }
    let [entries, done] = listing(&["file"], FileKind::File);
    let (mut client, _guest) = scripted(&[entries, done, found(FileKind::File, u64::MAX)]).await;
    let got = client.get_tree("/", limits, &mut Vec::new()).await;
    assert!(matches!(got, Err(TreeError::TooLarge(_))), "{got:?}");
}
