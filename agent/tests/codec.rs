//! The codec against arbitrary bytes and arbitrary messages.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

use hearth_agent::proto::{
    Account, Applied, DirEntry, Exec, FileFailure, FileKind, FileReply, FileRequest, FrameBuffer,
    FrameError, Hello, HelloError, Input, InstanceId, Leftover, Limits, MAX_CHUNK, MAX_FRAME,
    OutputMode, Place, Put, Refresh, Rejection, Request, Response, ShutdownKind, SpawnFailure,
    Standstill, User, VERSION, WallClock, WindowSize, encode,
};
use proptest::{collection::vec, option, prelude::*};
use serde_bytes::ByteBuf;

fn word() -> impl Strategy<Value = ByteBuf> {
    vec(any::<u8>(), 0..40).prop_map(ByteBuf::from)
}

fn user() -> impl Strategy<Value = Account> {
    let ids = (any::<u32>(), any::<u32>(), vec(any::<u32>(), 0..5));
    prop_oneof![
        ids.prop_map(|(uid, gid, groups)| Account::Ids(User { uid, gid, groups })),
        word().prop_map(Account::Name),
        Just(Account::Usual),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    (
        option::of(any::<u64>()),
        option::of(any::<u32>()),
        option::of(any::<u32>()),
        option::of(any::<u64>()),
    )
        .prop_map(|(memory_bytes, processes, open_files, file_bytes)| Limits {
            memory_bytes,
            processes,
            open_files,
            file_bytes,
        })
}

fn clock() -> impl Strategy<Value = Option<WallClock>> {
    option::of(any::<u64>().prop_map(|since_epoch_ns| WallClock { since_epoch_ns }))
}

fn exec() -> impl Strategy<Value = Exec> {
    let what = (
        vec(word(), 0..6),
        vec((word(), word()), 0..6),
        any::<bool>(),
        option::of(word()),
    );
    let how = (
        any::<bool>(),
        any::<bool>(),
        option::of(any::<u64>()),
        any::<u32>(),
        any::<u32>(),
        any::<bool>(),
    );
    let terminal = option::of((any::<u16>(), any::<u16>()));
    let outputs = (terminal, any::<bool>(), any::<bool>());
    (what, how, option::of(user()), limits(), clock(), outputs).prop_map(
        |(what, how, user, limits, wall_clock, (terminal, results, new_privileges))| Exec {
            argv: what.0,
            env: what.1,
            clear_env: what.2,
            cwd: what.3,
            stdin: if how.0 { Input::Pipe } else { Input::Null },
            output: if how.1 {
                OutputMode::Merged
            } else {
                OutputMode::Separate
            },
            timeout_ms: how.2,
            grace_ms: how.3,
            linger_ms: how.4,
            leftover: if how.5 {
                Leftover::Kill
            } else {
                Leftover::Keep
            },
            user,
            limits,
            wall_clock,
            terminal: terminal.map(|(rows, columns)| WindowSize { rows, columns }),
            results,
            new_privileges,
        },
    )
}

fn refresh() -> impl Strategy<Value = Refresh> {
    (
        vec(any::<u8>(), 0..600),
        clock(),
        option::of(any::<[u8; 16]>()),
        option::of(".{0,70}"),
    )
        .prop_map(|(entropy, wall_clock, instance, hostname)| Refresh {
            entropy,
            wall_clock,
            instance: instance.map(InstanceId),
            hostname,
        })
}

/// Feeds `bytes` to a buffer in pieces of these sizes; returns the frames that it contained.
fn cut(bytes: &[u8], pieces: &[usize]) -> Result<Vec<Vec<u8>>, FrameError> {
    let (mut buffer, mut rest, mut frames) = (FrameBuffer::new(), bytes, Vec::new());
    let mut pieces = pieces.iter().copied().cycle();
    loop {
        while let Some(frame) = buffer.next_frame()? {
            frames.push(frame.to_vec());
        }
        if rest.is_empty() {
            return Ok(frames);
        }
        let room = buffer.spare()?;
        let count = pieces
            .next()
            .unwrap_or(1)
            .clamp(1, room.len())
            .min(rest.len());
        let (now, later) = rest.split_at(count);
        room[..count].copy_from_slice(now);
        buffer.filled(count);
        rest = later;
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..4096), pieces in vec(1..600_usize, 1..8)) {
        let _ = Request::decode(&bytes);
        let _ = Response::decode(&bytes);
        let _ = Hello::decode(&bytes);
        let _ = Hello::decode(&[b"HRTH", VERSION.to_le_bytes().as_slice(), &bytes].concat());
        let _ = cut(&bytes, &pieces);
    }

    #[test]
    fn arbitrary_payloads_in_good_frames_never_panic(payloads in vec(vec(any::<u8>(), 0..300), 1..20)) {
        let mut wire = Vec::new();
        for payload in &payloads {
            wire.extend_from_slice(&(payload.len() as u32).to_le_bytes());
            wire.extend_from_slice(payload);
        }
        prop_assert_eq!(cut(&wire, &[7, 1, 500])?, payloads.clone());
        for payload in &payloads {
            let _ = Request::decode(payload);
            let _ = Response::decode(payload);
        }
    }

    #[test]
    fn requests_come_back(
        exec in exec(),
        refresh in refresh(),
        data in vec(any::<u8>(), 0..MAX_CHUNK),
        nonce: u64,
        signal: u8,
        pieces in vec(1..100_000_usize, 1..8),
    ) {
        let sent = [
            Request::Ping { nonce },
            Request::Exec(Box::new(exec)),
            Request::Stdin(&data),
            Request::StdinEof,
            Request::Signal(signal),
            Request::Refresh(Box::new(refresh)),
            Request::Shutdown(ShutdownKind::Reboot),
            Request::Freeze,
            Request::Thaw,
            Request::File(Box::new(FileRequest::Rename {
                at: Place::beneath("/a", "b").by(Account::Usual),
                to: ByteBuf::from("c"),
                replace: true,
            })),
            Request::File(Box::new(FileRequest::MakeDir {
                at: Place::new("/a"),
                mode: 0o755,
                parents: true,
                owner: Some(Account::Usual),
            })),
            Request::File(Box::new(FileRequest::MakeLink {
                at: Place::new("/a"),
                target: ByteBuf::from("b"),
                owner: None,
            })),
            Request::File(Box::new(FileRequest::ReadLink { at: Place::new("/a") })),
            Request::FileData(&data),
            Request::FileEnd,
            Request::Resize(WindowSize { rows: 24, columns: 80 }),
        ];
        let mut wire = Vec::new();
        for request in &sent {
            encode(request, &mut wire)?;
        }
        let frames = cut(&wire, &pieces)?;
        let came: Vec<_> = frames.iter().map(|frame| Request::decode(frame)).collect::<Result<_, _>>()?;
        prop_assert_eq!(&sent[..], &came[..]);
        // A shortened or extended payload does not decode.
        for frame in &frames {
            if frame.len() > 1 {
                prop_assert!(Request::decode(&frame[..frame.len() - 1]).is_err());
            }
            prop_assert!(Request::decode(&[frame.as_slice(), &[0]].concat()).is_err());
        }
    }

    #[test]
    fn one_flipped_byte_never_panics(exec in exec(), at: prop::sample::Index, bit in 0..8_u32) {
        let mut wire = Vec::new();
        encode(&Request::Exec(Box::new(exec)), &mut wire)?;
        let at = at.index(wire.len());
        wire[at] ^= 1 << bit;
        if let Ok(frames) = cut(&wire, &[4096]) {
            for frame in frames {
                let _ = Request::decode(&frame);
            }
        }
    }
}

#[test]
fn responses_come_back() {
    let data = vec![9; MAX_CHUNK];
    let sent = [
        Response::Started { pid: 77 },
        Response::Stdout(&data),
        Response::Stderr(b""),
        Response::Results(&data),
        Response::StdinTaken(u32::MAX),
        Response::StdinClosed,
        Response::Failed(SpawnFailure::MissingInterpreter {
            program: "a".into(),
            interpreter: "b".into(),
        }),
        Response::Rejected(Rejection::Version { agent: 1, host: 2 }),
        Response::Frozen(Standstill::Refused { errno: 95 }),
        Response::Thawed(Applied::Done),
        Response::File(FileReply::Data(&data)),
        Response::File(FileReply::Entries(vec![DirEntry {
            name: ByteBuf::from("name"),
            kind: FileKind::Link,
        }])),
        Response::File(FileReply::Failed(FileFailure::Other { errno: 5 })),
    ];
    let mut wire = Vec::new();
    sent.iter()
        .for_each(|response| encode(response, &mut wire).unwrap());
    let frames = cut(&wire, &[1, 10_000]).unwrap();
    let came: Vec<_> = frames
        .iter()
        .map(|frame| Response::decode(frame).unwrap())
        .collect();
    assert_eq!(&sent[..], &came[..]);
}

#[test]
fn the_limit_is_exact_and_leaves_the_buffer_alone() {
    // One byte of message kind, three of length.
    let fits = vec![0; MAX_FRAME - 4];
    let mut out = b"before".to_vec();
    encode(&Request::Stdin(&fits), &mut out).unwrap();
    assert_eq!(out.len(), b"before".len() + 4 + MAX_FRAME);
    let length = out.len();
    let error = encode(&Request::Stdin(&vec![0; MAX_FRAME - 3]), &mut out).unwrap_err();
    assert_eq!(
        (error, out.len()),
        (FrameError::TooLong(MAX_FRAME as u64 + 1), length)
    );
}

#[test]
fn a_long_length_is_refused_before_memory_is_taken() {
    for length in [MAX_FRAME as u32 + 1, u32::MAX, 0x8000_0000] {
        let mut buffer = FrameBuffer::new();
        buffer.spare().unwrap()[..4].copy_from_slice(&length.to_le_bytes());
        buffer.filled(4);
        let expected = Err(FrameError::TooLong(length.into()));
        assert_eq!(buffer.spare().map(|room| room.len()), expected);
        assert_eq!(buffer.next_frame().map(|_| 0), expected);
    }
}

/// The encoding of this protocol version: to change it means to change VERSION.
#[test]
fn the_wire_is_pinned() {
    assert_eq!(VERSION, 4);
    let mut hello = Vec::new();
    Hello {
        instance: InstanceId([7; 16]),
        started_us: 1,
        greeted_us: 300,
    }
    .encode(&mut hello)
    .unwrap();
    assert_eq!(
        hello,
        [
            b"\x19\0\0\0HRTH\x04\0".as_slice(),
            &[7; 16],
            b"\x01\xac\x02"
        ]
        .concat()
    );
    let bytes = |request: Request<'_>| {
        let mut out = Vec::new();
        encode(&request, &mut out).unwrap();
        out
    };
    assert_eq!(bytes(Request::Ping { nonce: 5 }), b"\x02\0\0\0\x00\x05");
    let exec = Exec {
        argv: vec![ByteBuf::from("a")],
        timeout_ms: Some(1),
        ..Exec::default()
    };
    assert_eq!(
        bytes(Request::Exec(Box::new(exec))),
        b"\x17\0\0\0\x01\x01\x01a\0\0\0\0\0\x01\x01\0\0\0\0\0\0\0\0\0\0\0\0"
    );
    assert_eq!(bytes(Request::Stdin(b"xy")), b"\x04\0\0\0\x02\x02xy");
    assert_eq!(bytes(Request::StdinEof), b"\x01\0\0\0\x03");
    assert_eq!(bytes(Request::Signal(9)), b"\x02\0\0\0\x04\x09");
    assert_eq!(
        bytes(Request::Refresh(Box::default())),
        b"\x05\0\0\0\x05\0\0\0\0"
    );
    assert_eq!(
        bytes(Request::Shutdown(ShutdownKind::PowerOff)),
        b"\x02\0\0\0\x06\0"
    );
    assert_eq!(bytes(Request::Freeze), b"\x01\0\0\0\x07");
    assert_eq!(bytes(Request::Thaw), b"\x01\0\0\0\x08");
    let put = Put::new("/a").mode(0o755);
    assert_eq!(
        bytes(Request::File(Box::new(FileRequest::Put(put)))),
        b"\x0c\0\0\0\x09\x03\x02/a\0\0\0\x01\xed\x03\0"
    );
    assert_eq!(bytes(Request::FileData(b"xy")), b"\x04\0\0\0\x0a\x02xy");
    assert_eq!(bytes(Request::FileEnd), b"\x01\0\0\0\x0b");
    let size = WindowSize {
        rows: 24,
        columns: 300,
    };
    assert_eq!(bytes(Request::Resize(size)), b"\x04\0\0\0\x0c\x18\xac\x02");
}

#[test]
fn versions_are_told_apart_from_strangers() {
    let other = [b"HRTH".as_slice(), &7_u16.to_le_bytes(), b"anything"].concat();
    assert_eq!(Hello::decode(&other), Err(HelloError::Version { peer: 7 }));
    assert_eq!(Hello::decode(b"HRTH"), Err(HelloError::NotHello));
    assert_eq!(Hello::decode(b"HTTP/1.1 200 OK"), Err(HelloError::NotHello));
    assert_eq!(
        Hello::decode(b"HRTH\x04\0short"),
        Err(HelloError::Frame(FrameError::Malformed))
    );
}
