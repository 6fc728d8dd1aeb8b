//! Peers that break the protocol where files are concerned.
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
    client::{ConnectionError, FileError, MAX_ENTRIES},
    proto::{
        DirEntry, Exec, FileKind, FileReply, FileRequest, Metadata, Place, Put, Rejection, Request,
        Response,
    },
};
use serde_bytes::ByteBuf;

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
    // One put was ended; of the others nothing remains.
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
    // More than was asked for.
    let more = [reply(FileReply::Data(b"12345")), reply(FileReply::Done)];
    let (mut client, _guest) = scripted(&more).await;
    let mut got = Vec::new();
    is_lie(client.get_into("/a", 0..4, &mut got).await.unwrap_err());
    assert_eq!(got, b"");
    // Another question's answers.
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
    // It has all before it was sent.
    let (mut client, _guest) = scripted(&[reply(FileReply::Done)]).await;
    is_lie(client.put(Put::new("/a"), &[0; 200_000]).await.unwrap_err());
    // A directory without end.
    let entry = |_| DirEntry {
        name: ByteBuf::from("n"),
        kind: FileKind::File,
    };
    let page = reply(FileReply::Entries((0..10_000).map(entry).collect()));
    let (mut client, guest) = scripted(&vec![page; MAX_ENTRIES / 10_000 + 1]).await;
    assert!(matches!(client.list("/").await, Err(FileError::TooMany)));
    drop(guest);
}
