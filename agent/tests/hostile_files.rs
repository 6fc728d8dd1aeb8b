//! Peers that break the protocol of file operations.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use common::{
    Agent,
    peers::{last_word, scripted, wire},
};
use hearth_agent::{
    client::{AgentClient, ConnectionError, FileError, MAX_ENTRIES, TreeError, TreeLimits},
    proto::{
        DirEntry, Exec, FileKind, FileReply, FileRequest, Hello, Metadata, Place, Put, Rejection,
        Request, Response, encode,
    },
};
use serde_bytes::ByteBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

fn file(request: FileRequest) -> Request<'static> {
    Request::File(Box::new(request))
}

fn get(path: &str) -> Request<'static> {
    file(FileRequest::Get {
        at: Place::new(path),
        offset: 0,
        most: u64::MAX,
    })
}

fn exec(word: &str) -> Request<'static> {
    Request::Exec(Box::new(Exec {
        argv: [word, "1000"].map(ByteBuf::from).into(),
        ..Exec::default()
    }))
}

#[tokio::test]
async fn a_host_that_mixes_up_its_requests_is_told() {
    let agent = Agent::start().await;
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    std::fs::File::create(&large)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let large = large.to_str().unwrap();
    let put = || file(FileRequest::Put(Put::new(dir.path().join("new"))));
    let data = Request::FileData(b"x");
    let none = "/nothing/here";
    for (requests, reason) in [
        (vec![data.clone()], Rejection::NoFile),
        (vec![Request::FileEnd], Rejection::NoFile),
        (vec![get(large), data.clone()], Rejection::NoFile),
        (vec![get(large), Request::FileEnd], Rejection::NoFile),
        (vec![get(none), Request::FileEnd], Rejection::NoFile),
        (vec![get(large), get(large)], Rejection::FileRunning),
        (vec![get(large), exec("sleep")], Rejection::FileRunning),
        (vec![put(), data.clone(), put()], Rejection::FileRunning),
        (vec![put(), exec("sleep")], Rejection::FileRunning),
        (
            vec![put(), Request::FileEnd, data.clone()],
            Rejection::NoFile,
        ),
        (vec![exec("sleep"), get(none)], Rejection::ExecRunning),
        (vec![exec("sleep"), put()], Rejection::ExecRunning),
    ] {
        let bytes = wire(&requests);
        assert_eq!(
            last_word(&agent, &bytes).await,
            Some(reason),
            "{requests:?}"
        );
    }
    // One put was completed; nothing remains of the others.
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    agent.assert_alive().await;
}

#[tokio::test]
async fn a_guest_that_lies_about_files() {
    let reply = Response::File;
    let is_lie = |error: FileError| {
        let protocol = matches!(error, FileError::Connection(ConnectionError::Protocol(_)));
        assert!(protocol, "{error:?}");
    };
    let stat = Metadata {
        kind: FileKind::File,
        size: 1,
        mode: 0,
        uid: 0,
        gid: 0,
        modified_s: i64::MIN,
        modified_ns: u32::MAX,
    };
    // More data than was requested.
    let more = [reply(FileReply::Data(b"12345")), reply(FileReply::Done)];
    let (mut client, _guest) = scripted(&more).await;
    let mut got = Vec::new();
    is_lie(client.get_into("/a", 0..4, &mut got).await.unwrap_err());
    assert_eq!(got, b"");
    // Answers to another request.
    for answer in [
        reply(FileReply::Stat(stat)),
        reply(FileReply::Entries(Vec::new())),
        Response::StdinClosed,
        Response::Started { pid: 1 },
    ] {
        let (mut client, _guest) = scripted(std::slice::from_ref(&answer)).await;
        is_lie(client.get("/a", 4).await.unwrap_err());
        let (mut client, _guest) = scripted(std::slice::from_ref(&answer)).await;
        is_lie(client.remove("/a", false).await.unwrap_err());
        let (mut client, _guest) = scripted(std::slice::from_ref(&answer)).await;
        is_lie(client.put(Put::new("/a"), b"x").await.unwrap_err());
    }
    // The guest reports the end before everything was sent.
    let (mut client, _guest) = scripted(&[reply(FileReply::Done)]).await;
    is_lie(client.put(Put::new("/a"), &[0; 200_000]).await.unwrap_err());
    // An endless directory.
    let entry = |_| DirEntry {
        name: ByteBuf::from("n"),
        kind: FileKind::File,
    };
    let page = reply(FileReply::Entries((0..10_000).map(entry).collect()));
    let (mut client, guest) = scripted(&vec![page; MAX_ENTRIES / 10_000 + 1]).await;
    assert!(matches!(client.list("/").await, Err(FileError::TooMany)));
    drop(guest);
}

/// Returns a client of a guest that greets and sends these responses; it ignores requests.
async fn talker(responses: Vec<Response<'static>>) -> AgentClient<DuplexStream> {
    let (ours, mut guest) = duplex(1 << 20);
    tokio::spawn(async move {
        // Sends everything, or stops when the connection is closed.
        let mut said = Vec::new();
        Hello::default().encode(&mut said).unwrap();
        for response in responses {
            encode(&response, &mut said).unwrap();
            if guest.write_all(&said).await.is_err() {
                return;
            }
            said.clear();
        }
        let _ = guest.read_to_end(&mut said).await;
    });
    AgentClient::handshake(ours).await.unwrap()
}

#[tokio::test]
async fn a_guest_that_lies_about_a_tree() {
    let reply = Response::File;
    let entry = |name: &str, kind| DirEntry {
        name: ByteBuf::from(name),
        kind,
    };
    let is_lie = |error: TreeError, about: &str| {
        let TreeError::File(FileError::Connection(ConnectionError::Protocol(said))) = &error else {
            panic!("{error:?}");
        };
        assert!(said.contains(about), "{error:?}");
    };
    let read = async |responses: Vec<Response<'static>>, limits: TreeLimits| {
        let mut client = talker(responses).await;
        let mut archive = Vec::new();
        let got = client.get_tree("/tree", limits, &mut archive).await;
        (got, archive)
    };
    let done = || reply(FileReply::Done);
    let limits = TreeLimits::default;

    // A link and then a directory, a file or a link of the same name: unpacking it would write to
    // the link's target. Adjacent or not, in one answer or in two.
    let _attack = "a name twice in a directory";
    for kind in [FileKind::Dir, FileKind::File, FileKind::Link] {
        let twice = [
            entry("a", FileKind::Link),
            entry("b", FileKind::File),
            entry("a", kind),
        ];
        let one = vec![reply(FileReply::Entries(twice.to_vec())), done()];
        let (got, archive) = read(one, limits()).await;
        is_lie(got.unwrap_err(), "a name twice");
        assert_eq!(archive, b"");
        let pages = twice.map(|entry| reply(FileReply::Entries(vec![entry])));
        let (got, _) = read([pages.to_vec(), vec![done()]].concat(), limits()).await;
        is_lie(got.unwrap_err(), "a name twice");
    }

    let _attack = "a name longer than any";
    let long = "n".repeat(256);
    let page = reply(FileReply::Entries(vec![entry(&long, FileKind::File)]));
    let (got, _) = read(vec![page.clone(), done()], limits()).await;
    is_lie(got.unwrap_err(), "no name of a file");
    let mut client = talker(vec![page, done()]).await;
    let listed = client.list("/").await;
    let protocol = matches!(
        &listed,
        Err(FileError::Connection(ConnectionError::Protocol(_)))
    );
    assert!(protocol, "{listed:?}");

    // Each directory has as many entries as are allowed, with the longest names; one of them is
    // another such directory.
    let _attack = "more names than a host should hold";
    let names = |level: usize| {
        (0..MAX_ENTRIES / 200).map(move |page| {
            let name = |number: usize| format!("{level}{page:0>9}{number:0>245}");
            let all = (0..200).map(|number| entry(&name(number), FileKind::Dir));
            reply(FileReply::Entries(all.collect()))
        })
    };
    let directory = reply(FileReply::Stat(Metadata {
        kind: FileKind::Dir,
        size: 0,
        mode: 0o755,
        uid: 0,
        gid: 0,
        modified_s: 0,
        modified_ns: 0,
    }));
    let levels = (0..2).flat_map(|level| names(level).chain([done(), directory.clone()]));
    let limits = TreeLimits {
        entries: usize::MAX,
        ..TreeLimits::default()
    };
    let (got, _) = read(levels.collect(), limits).await;
    assert!(matches!(got, Err(TreeError::TooMany(_))), "{got:?}");
}
