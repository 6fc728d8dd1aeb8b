//! Peers that break the protocol: the connection ends with a reason, the other side lives on.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod common;

use std::time::Duration;

use common::{
    Agent, eventually, is_alive,
    peers::{last_word, say, scripted, wire},
};
use hearth_agent::{
    client::{
        AgentClient, Command, ConnectionError, ExecError, HandshakeError, OutputLimits, PingError,
    },
    proto::{
        Exec, ExitStatus, Exited, FrameBuffer, HelloError, Input, MAX_FRAME, Memory, OutputEnd,
        Pong, Rejection, Request, Response, STDIN_WINDOW, Usage, VERSION,
    },
};
use serde_bytes::ByteBuf;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::UnixStream,
};

fn sleeper() -> Request<'static> {
    let argv = ["sleep", "1000"].map(ByteBuf::from).into();
    Request::Exec(Box::new(Exec {
        argv,
        stdin: Input::Pipe,
        ..Exec::default()
    }))
}

#[tokio::test]
async fn the_agent_says_what_is_wrong_and_lives() {
    let agent = Agent::start().await;
    let other = {
        let mut bytes = wire(&[]);
        bytes[8] = 9;
        bytes
    };
    assert_eq!(
        last_word(&agent, &other).await,
        Some(Rejection::Version {
            agent: VERSION,
            host: 9
        })
    );
    assert_eq!(
        last_word(&agent, b"\x04\0\0\0ELLO").await,
        Some(Rejection::NotHello)
    );
    assert_eq!(
        last_word(&agent, b"GET / HTTP/1.1\r\n\r\n").await,
        Some(Rejection::Malformed)
    );
    assert_eq!(
        last_word(&agent, &[0xff; 64]).await,
        Some(Rejection::Malformed)
    );
    assert_eq!(last_word(&agent, &[0; 4]).await, Some(Rejection::NotHello));
    let after_hello = |bytes: &[u8]| [&wire(&[]), bytes].concat();
    assert_eq!(
        last_word(&agent, &after_hello(b"\0\0\0\0")).await,
        Some(Rejection::Malformed)
    );
    assert_eq!(
        last_word(&agent, &after_hello(b"\x01\0\0\0\x63")).await,
        Some(Rejection::Malformed)
    );
    let long = u32::try_from(MAX_FRAME + 1).unwrap().to_le_bytes();
    assert_eq!(
        last_word(&agent, &after_hello(&long)).await,
        Some(Rejection::Malformed)
    );
    // A vector that claims four thousand million entries.
    assert_eq!(
        last_word(&agent, &after_hello(b"\x06\0\0\0\x01\xff\xff\xff\xff\x0f")).await,
        Some(Rejection::Malformed)
    );
    assert_eq!(
        last_word(&agent, &wire(&[Request::Signal(0)])).await,
        Some(Rejection::OutOfRange)
    );
    assert_eq!(
        last_word(&agent, &wire(&[Request::Signal(65)])).await,
        Some(Rejection::OutOfRange)
    );
    assert_eq!(
        last_word(&agent, &wire(&[sleeper(), sleeper()])).await,
        Some(Rejection::ExecRunning)
    );
    let chunk = vec![0; 60_000];
    let flood: Vec<_> = std::iter::once(sleeper())
        .chain((0..8).map(|_| Request::Stdin(&chunk)))
        .collect();
    assert_eq!(
        last_word(&agent, &wire(&flood)).await,
        Some(Rejection::StdinOverrun)
    );
    // Requests that concern a program that does not exist are ignored.
    let mut client = agent.client().await;
    client.ping(1).await.unwrap();
    let mut stream = agent.stream().await.unwrap();
    let stray = [
        Request::Stdin(b"x"),
        Request::StdinEof,
        Request::Signal(9),
        Request::Ping { nonce: 3 },
    ];
    stream.write_all(&wire(&stray)).await.unwrap();
    assert_eq!(pong_nonce(&mut stream).await, 3);
    assert_eq!(client.ping(2).await.unwrap().execs, 0);
}

async fn pong_nonce(stream: &mut UnixStream) -> u64 {
    let mut buffer = FrameBuffer::new();
    loop {
        let count = stream.read(buffer.spare().unwrap()).await.unwrap();
        assert!(count > 0);
        buffer.filled(count);
        while let Some(payload) = buffer.next_frame().unwrap() {
            if let Ok(Response::Pong(pong)) = Response::decode(payload) {
                return pong.nonce;
            }
        }
    }
}

#[tokio::test]
async fn a_rejected_connection_takes_its_program_with_it() {
    let agent = Agent::start().await;
    let mut exec = agent
        .exec(Command::new("sleep").arg("1000").stdin(Input::Pipe))
        .await;
    let pid = exec.pid();
    assert!(is_alive(pid));
    let ended = exec.signal(99).await;
    let ended = match ended {
        Ok(()) => exec.wait().await.unwrap_err(),
        Err(error) => error.into(),
    };
    assert!(
        matches!(
            ended,
            ExecError::Connection(ConnectionError::Rejected(Rejection::OutOfRange))
        ),
        "{ended:?}"
    );
    eventually("the program is dead", || !is_alive(pid)).await;
}

#[tokio::test]
async fn random_bytes_do_not_bring_the_agent_down() {
    let agent = Agent::start().await;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..300 {
        let mut stream = agent.stream().await.unwrap();
        let mut bytes = wire(&[Request::Ping { nonce: round }, sleeper()]);
        match random() % 3 {
            0 => bytes.truncate((random() as usize) % bytes.len()),
            1 => {
                let at = (random() as usize) % bytes.len();
                bytes[at] ^= 1 << (random() % 8);
            }
            _ => bytes.extend((0..64).map(|_| random() as u8)),
        }
        let _ = stream.write_all(&bytes).await;
        if round % 2 == 0 {
            let _ =
                tokio::time::timeout(Duration::from_millis(2), stream.read(&mut [0; 256])).await;
        }
    }
    let mut client = agent.client().await;
    for nonce in 0..100 {
        if client.ping(nonce).await.unwrap().execs == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("programs of dropped connections live on");
}

#[tokio::test]
async fn a_peer_that_never_reads_costs_bounded_memory() {
    let agent = Agent::start().await;
    let before = agent.peak_rss_kib();
    let mut stream = agent.stream().await.unwrap();
    let pings: Vec<_> = (0..2000).map(|nonce| Request::Ping { nonce }).collect();
    let bytes = wire(&pings);
    stream.write_all(&bytes).await.unwrap();
    let more = &bytes[wire(&[]).len()..];
    // Write for as long as the agent accepts it.
    let mut sent = 0_usize;
    while let Ok(Ok(count)) =
        tokio::time::timeout(Duration::from_millis(500), stream.write(more)).await
    {
        sent += count;
        assert!(sent < 16 << 20, "the agent takes pings without end");
        // Complete the frame.
        stream.write_all(&more[count..]).await.unwrap_or_default();
        if sent > 4 << 20 {
            break;
        }
    }
    assert!(
        agent.peak_rss_kib() < before + 1024,
        "{before} -> {} KiB",
        agent.peak_rss_kib()
    );
    agent.assert_alive().await;
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_with_a_reason() {
    let agent = Agent::start().await;
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..140 {
        let client = AgentClient::handshake(agent.stream().await.unwrap()).await;
        if let Ok(mut client) = client {
            match client.ping(1).await {
                Ok(_) => held.push(client),
                Err(PingError::Connection(ConnectionError::Rejected(
                    Rejection::TooManyConnections,
                ))) => refused += 1,
                Err(other) => panic!("{other:?}"),
            }
        }
    }
    assert!(
        held.len() >= 127 && refused >= 11,
        "{} held, {refused} refused",
        held.len()
    );
    drop(held);
    tokio::time::sleep(Duration::from_millis(100)).await;
    agent.assert_alive().await;
}

// From here on the guest is hostile: a scripted agent against the client.

fn pong(nonce: u64) -> Response<'static> {
    let memory = Memory::default();
    Response::Pong(Pong {
        nonce,
        instance: Default::default(),
        uptime_us: 5,
        memory,
        execs: 0,
        prepared: true,
    })
}

fn exited(code: u8) -> Response<'static> {
    let status = ExitStatus::Code(code);
    Response::Exited(Exited {
        status,
        timed_out: false,
        output: OutputEnd::Complete,
        usage: Usage::default(),
    })
}

#[tokio::test]
async fn greetings_that_are_none() {
    let hello = |bytes: &'static [u8]| async move {
        let (ours, mut guest) = duplex(4096);
        guest.write_all(bytes).await.unwrap();
        drop(guest);
        AgentClient::handshake(ours).await.unwrap_err()
    };
    assert!(matches!(
        hello(b"\x08\0\0\0HRTH\x07\0xx").await,
        HandshakeError::Hello(HelloError::Version { peer: 7 })
    ));
    assert!(matches!(
        hello(b"\x04\0\0\0HTTP").await,
        HandshakeError::Hello(HelloError::NotHello)
    ));
    assert!(matches!(
        hello(b"HTTP/1.1 400").await,
        HandshakeError::Connection(ConnectionError::Frame(_))
    ));
    assert!(matches!(
        hello(b"\x19\0").await,
        HandshakeError::Connection(ConnectionError::Closed)
    ));
    assert!(matches!(
        hello(b"").await,
        HandshakeError::Connection(ConnectionError::Closed)
    ));
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_answers_costs_the_deadline_only() {
    let (ours, _guest) = duplex(4096);
    let greeting = tokio::time::timeout(Duration::from_secs(5), AgentClient::handshake(ours));
    assert!(greeting.await.is_err());
    let (mut client, _guest) = scripted(&[]).await;
    for nonce in 0..64 {
        assert!(
            tokio::time::timeout(Duration::from_secs(5), client.ping(nonce))
                .await
                .is_err()
        );
    }
    assert!(matches!(
        client.ping(3).await,
        Err(PingError::NonceInUse(3))
    ));
    assert!(matches!(
        client.ping(99).await,
        Err(PingError::Unanswered(64))
    ));
}

#[tokio::test(start_paused = true)]
async fn late_pongs_are_discarded_and_strange_ones_are_not() {
    let (mut client, mut guest) = scripted(&[]).await;
    for nonce in [1, 2] {
        assert!(
            tokio::time::timeout(Duration::from_secs(1), client.ping(nonce))
                .await
                .is_err()
        );
    }
    guest
        .write_all(&say(&[pong(2), pong(1), pong(3)]))
        .await
        .unwrap();
    client.ping(3).await.unwrap();
    // A ping that is answered twice.
    guest.write_all(&say(&[pong(3)])).await.unwrap();
    let error = client.ping(4).await.unwrap_err();
    assert!(error.is_protocol(), "{error:?}");
    // An answer to a ping that was never sent.
    let (mut client, _guest) = scripted(&[pong(8)]).await;
    assert!(client.ping(7).await.unwrap_err().is_protocol());
    // Garbage instead of an answer.
    let (mut client, mut guest) = scripted(&[]).await;
    guest.write_all(b"\x02\0\0\0\xff\xff").await.unwrap();
    assert!(client.ping(7).await.unwrap_err().is_protocol());
    let (mut client, mut guest) = scripted(&[]).await;
    guest.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    assert!(client.ping(7).await.unwrap_err().is_protocol());
    // An answer to another request is a violation; a closed connection is none.
    let (mut client, _guest) = scripted(&[Response::Started { pid: 1 }]).await;
    assert!(client.ping(7).await.unwrap_err().is_protocol());
    let (mut client, guest) = scripted(&[]).await;
    drop(guest);
    assert!(!client.ping(7).await.unwrap_err().is_protocol());
}

#[tokio::test]
async fn a_guest_that_lies_about_a_program() {
    let started = Response::Started { pid: 1 };
    let run = |responses: Vec<Response<'static>>| async move {
        let (client, _guest) = scripted(&responses).await;
        let exec = client.exec(Command::new("x").stdin(Input::Pipe)).await?;
        exec.output(OutputLimits::default()).await
    };
    let good = run(vec![started.clone(), Response::Stdout(b"ab"), exited(3)])
        .await
        .unwrap();
    assert_eq!(
        (good.stdout.as_slice(), good.status),
        (&b"ab"[..], ExitStatus::Code(3))
    );
    for lie in [
        Response::StdinTaken(1),
        Response::StdinTaken(u32::MAX),
        pong(1),
        started.clone(),
    ] {
        let error = run(vec![started.clone(), lie, exited(0)])
            .await
            .unwrap_err();
        assert!(
            matches!(error, ExecError::Connection(ConnectionError::Protocol(_))),
            "{error:?}"
        );
    }
    let error = run(vec![exited(0)]).await.unwrap_err();
    assert!(
        matches!(error, ExecError::Connection(ConnectionError::Protocol(_))),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_flood_of_output_waits_in_the_guest() {
    let (client, mut guest) = scripted(&[Response::Started { pid: 1 }]).await;
    let mut exec = client.exec(Command::new("x")).await.unwrap();
    let mut stdout = exec.stdout().unwrap();
    let flood = tokio::spawn(async move {
        let frame = say(&[Response::Stdout(&[1; 65536])]);
        let mut sent = 0_usize;
        while let Ok(Ok(())) =
            tokio::time::timeout(Duration::from_millis(200), guest.write_all(&frame)).await
        {
            sent += frame.len();
        }
        (sent, guest)
    });
    assert_eq!(stdout.read(&mut [0; 10]).await.unwrap(), 10);
    let (sent, _guest) = flood.await.unwrap();
    // At most: the pipe between the two, one frame in the buffer, a queue and a frame.
    assert!(sent < (1 << 20) + 5 * 65536, "{sent}");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_keep_the_timeout_is_overdue() {
    let (client, _guest) = scripted(&[Response::Started { pid: 1 }]).await;
    let second = Duration::from_secs(1);
    let command = Command::new("x")
        .timeout(second)
        .grace(second)
        .linger(second)
        .host_margin(2 * second);
    let begun = tokio::time::Instant::now();
    let error = client
        .exec(command)
        .await
        .unwrap()
        .wait()
        .await
        .unwrap_err();
    assert!(matches!(error, ExecError::Overdue(_)), "{error:?}");
    assert_eq!(begun.elapsed().as_secs(), 5);
}

#[tokio::test]
async fn the_client_keeps_to_the_window() {
    let (client, mut guest) = scripted(&[Response::Started { pid: 1 }]).await;
    let mut exec = client
        .exec(Command::new("x").stdin(Input::Pipe))
        .await
        .unwrap();
    let mut stdin = exec.stdin().unwrap();
    let mut sent = 0;
    while let Ok(count) =
        tokio::time::timeout(Duration::from_millis(100), stdin.write(&[0; 50_000])).await
    {
        sent += count.unwrap();
    }
    assert_eq!(sent, STDIN_WINDOW);
    guest
        .write_all(&say(&[Response::StdinTaken(1000)]))
        .await
        .unwrap();
    assert_eq!(stdin.write(&[0; 50_000]).await.unwrap(), 1000);
    guest
        .write_all(&say(&[Response::StdinClosed]))
        .await
        .unwrap();
    assert_eq!(
        stdin.write(&[0; 50_000]).await.unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
}

/// A handle that is dropped during a wait must not take the others' wake-up with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_reader_does_not_strand_the_others() {
    for round in 0..200 {
        let (client, mut guest) = scripted(&[Response::Started { pid: 1 }]).await;
        let mut exec = client.exec(Command::new("x")).await.unwrap();
        let (mut stdout, mut stderr) = (exec.stdout().unwrap(), exec.stderr().unwrap());
        let reader = tokio::spawn(async move {
            let mut text = String::new();
            stderr.read_to_string(&mut text).await.unwrap();
            text
        });
        let waiter = tokio::spawn(exec.wait());
        // The handle that polled the stream last is cancelled.
        let _ =
            tokio::time::timeout(Duration::from_micros(round * 10), stdout.read(&mut [0; 8])).await;
        if round % 2 == 0 {
            drop(stdout);
        }
        guest
            .write_all(&say(&[Response::Stderr(b"late"), exited(0)]))
            .await
            .unwrap();
        let (text, end) = tokio::time::timeout(Duration::from_secs(10), async {
            (reader.await, waiter.await)
        })
        .await
        .unwrap();
        assert_eq!(text.unwrap(), "late");
        assert!(end.unwrap().unwrap().status.success());
    }
}
