#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
//! Plays Firecracker's side of the conversation as documented: the API, the Unix socket of its
//! vsock device, and the agent in its guest. The process itself is a script that only sleeps.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hearth_agent::Command;
use hearth_agent::proto::{
    ExitStatus, Exited, FrameBuffer, Hello, OutputEnd, Pong, Request, Response, encode,
};
use hearth_bench::peer::{Booted, Firecracker, PeerError};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);

/// A simulated Firecracker.
struct Played {
    firecracker: Firecracker,
    /// Method and path of each request, and its body.
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    _dirs: [tempfile::TempDir; 2],
}

/// Faults of the simulated Firecracker.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The guest claims to have booted for an hour.
    LongBoot,
    /// Refuses requests to this path.
    Refuses(&'static str),
    /// There is no agent to connect to.
    NoAgent,
    /// The guest's program prints something else.
    Miscounts,
}

async fn played(fault: Fault) -> Played {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (program, dir) = (
        dirs[0].path().join("firecracker"),
        dirs[1].path().to_owned(),
    );
    // The script writes down its first argument; then the player answers in its place.
    let started = dir.join("started");
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo Firecracker v1.9.0; exit; fi\n\
         echo \"$1\" > {0}.new; mv {0}.new {0}; exec sleep 1000\n",
        started.display()
    );
    std::fs::write(&program, text).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let asked = Arc::default();
    let player = Player {
        dir: dir.clone(),
        asked: Arc::clone(&asked),
        fault,
    };
    std::thread::spawn(move || player.play(&started));
    let firecracker = loop {
        // Another test's child may hold the script open for a moment.
        match Firecracker::find(&program, &dir).await {
            Err(PeerError::Start { .. }) => {}
            found => break found.unwrap(),
        }
    };
    Played {
        firecracker,
        asked,
        _dirs: dirs,
    }
}

struct Player {
    dir: PathBuf,
    asked: Arc<Mutex<Vec<(String, Value)>>>,
    fault: Fault,
}

impl Player {
    /// Simulates each process that is started, until the directory is gone.
    fn play(&self, started: &Path) {
        while self.dir.exists() {
            match std::fs::read_to_string(started) {
                Ok(mode) => {
                    std::fs::remove_file(started).unwrap();
                    match mode.trim() {
                        "--no-api" => self.boot(),
                        _ => self.serve(),
                    }
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Plays the guest's agent, which connects to the host.
    fn boot(&self) {
        let stream = UnixStream::connect(self.dir.join("vsock_1025")).unwrap();
        let fault = self.fault;
        std::thread::spawn(move || agent(stream, true, fault));
    }

    /// Serves the API: a connection for each request.
    fn serve(&self) {
        let listener = UnixListener::bind(self.dir.join("api")).unwrap();
        loop {
            let (stream, _) = listener.accept().unwrap();
            let (path, last) = self.answer(stream);
            match path.as_str() {
                "/actions" => self.boot(),
                "/snapshot/load" if last => self.restored(),
                _ => {}
            }
            if last {
                return;
            }
        }
    }

    /// Answers one request; returns its path, and whether it is the process's last.
    fn answer(&self, stream: UnixStream) -> (String, bool) {
        let mut reader = BufReader::new(&stream);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let (method, path) = line.split_once(' ').unwrap();
        let path = path.split(' ').next().unwrap().to_owned();
        let method = method.to_owned();
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            if let Some(value) = header.strip_prefix("Content-Length: ") {
                length = value.trim().parse().unwrap();
            }
            if header == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        let body = serde_json::from_slice(&body).unwrap();
        self.asked
            .lock()
            .unwrap()
            .push((format!("{method} {path}"), body));
        let refused = self.fault == Fault::Refuses(leaked(&path));
        let answer = if refused {
            "HTTP/1.1 400 \r\nContent-Length: 20\r\n\r\n{\"fault_message\":\"\"}"
        } else {
            "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
        };
        (&stream).write_all(answer.as_bytes()).unwrap();
        let last = refused || path.starts_with("/snapshot/");
        (path, last)
    }

    /// Accepts the connection to the restored guest's agent.
    fn restored(&self) {
        let listener = UnixListener::bind(self.dir.join("vsock")).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut line = [0; 13];
        (&stream).read_exact(&mut line).unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        if self.fault == Fault::NoAgent {
            return;
        }
        (&stream).write_all(b"OK 1073741824\n").unwrap();
        let fault = self.fault;
        std::thread::spawn(move || agent(stream, false, fault));
    }
}

/// Returns a known path as a static string.
fn leaked(path: &str) -> &'static str {
    let known = [
        "/machine-config",
        "/boot-source",
        "/vsock",
        "/pmem/root",
        "/actions",
        "/vm",
        "/snapshot/create",
        "/snapshot/load",
    ];
    known.into_iter().find(|known| *known == path).unwrap()
}

/// Plays an agent that greets and answers pings; it is not prepared at first if it has just booted.
fn agent(stream: UnixStream, booted: bool, fault: Fault) -> Option<()> {
    let mut wire = Vec::new();
    let started_us = if fault == Fault::LongBoot {
        3_600_000_000
    } else {
        1
    };
    let hello = Hello {
        started_us,
        ..Hello::default()
    };
    hello.encode(&mut wire).unwrap();
    (&stream).write_all(&wire).ok()?;
    let (mut frames, mut greeted, mut pings) = (FrameBuffer::new(), false, 0);
    loop {
        let payload = loop {
            if let Some(payload) = frames.next_frame().ok()? {
                break payload.to_vec();
            }
            match (&stream).read(frames.spare().ok()?).ok()? {
                0 => return None,
                count => frames.filled(count),
            }
        };
        if !greeted {
            Hello::decode(&payload).unwrap();
            greeted = true;
            continue;
        }
        wire.clear();
        let request = Request::decode(&payload);
        if let Ok(Request::Exec(exec)) = &request {
            assert_eq!(exec.argv, ["python3", "-c", "print(6 * 7)"]);
            let said: &[u8] = match fault {
                Fault::Miscounts => b"41\n",
                _ => b"42\n",
            };
            let started = Response::Started { pid: 1 };
            let exited = Exited {
                status: ExitStatus::Code(0),
                timed_out: false,
                output: OutputEnd::Complete,
                usage: Default::default(),
            };
            for response in [started, Response::Stdout(said), Response::Exited(exited)] {
                encode(&response, &mut wire).unwrap();
            }
            (&stream).write_all(&wire).ok()?;
        }
        if let Ok(Request::Ping { nonce }) = request {
            pings += 1;
            let pong = Pong {
                nonce,
                prepared: !booted || pings > 2,
                instance: Default::default(),
                uptime_us: 1,
                memory: Default::default(),
                execs: 0,
            };
            encode(&Response::Pong(pong), &mut wire).unwrap();
            (&stream).write_all(&wire).ok()?;
        }
    }
}

fn guest() -> Booted<'static> {
    Booted {
        kernel: Path::new("/kernel"),
        initramfs: Path::new("/initramfs"),
        root: None,
        words: "quiet",
        memory_mib: 256,
        vcpus: 2,
        limit: LIMIT,
    }
}

#[tokio::test]
async fn a_boot_and_a_restore_are_asked_for_as_the_api_has_it() {
    let played = played(Fault::None).await;
    let firecracker = &played.firecracker;
    assert_eq!(firecracker.version, "Firecracker v1.9.0");
    firecracker.boot_to_pong(guest()).await.unwrap();
    let config = std::fs::read_to_string(played._dirs[1].path().join("config.json")).unwrap();
    assert!(!config.contains("pmem"), "{config}");
    firecracker.snapshot(guest()).await.unwrap();
    for _ in 0..2 {
        firecracker.restore_to_pong(LIMIT).await.unwrap();
    }
    let asked = played.asked.lock().unwrap();
    let paths: Vec<&str> = asked.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(
        paths,
        [
            "PUT /machine-config",
            "PUT /boot-source",
            "PUT /vsock",
            "PUT /actions",
            "PATCH /vm",
            "PUT /snapshot/create",
            "PUT /snapshot/load",
            "PUT /snapshot/load",
        ]
    );
    assert_eq!(asked[0].1, json!({"vcpu_count": 2, "mem_size_mib": 256}));
    assert_eq!(asked[1].1["initrd_path"], "/initramfs");
    assert_eq!(asked[6].1["resume_vm"], true);
    assert_eq!(asked[6].1["snapshot_path"], asked[5].1["snapshot_path"]);
    assert_eq!(
        asked[6].1["mem_backend"]["backend_path"],
        asked[5].1["mem_file_path"]
    );
}

#[tokio::test]
async fn a_program_in_a_restored_guest_has_the_image_as_its_root() {
    let program = || Command::new("python3").args(["-c", "print(6 * 7)"]);
    let (root, word) = (Path::new("/python.erofs"), b"42\n");
    let guest = Booted {
        root: Some(root),
        ..guest()
    };
    let good = played(Fault::None).await;
    good.firecracker.snapshot(guest).await.unwrap();
    let result = good.firecracker.restore_to_result(program(), word, LIMIT);
    result.await.unwrap();
    let asked = good.asked.lock().unwrap().clone();
    assert_eq!(asked[3].0, "PUT /pmem/root");
    assert_eq!(
        asked[3].1,
        json!({"id": "root", "path_on_host": root, "root_device": false, "read_only": true})
    );
    let bad = played(Fault::Miscounts).await;
    bad.firecracker.snapshot(guest).await.unwrap();
    let result = bad.firecracker.restore_to_result(program(), word, LIMIT);
    let error = result.await.unwrap_err();
    assert!(
        matches!(&error, PeerError::Lies(lie) if lie.contains("41")),
        "{error}"
    );
}

#[tokio::test]
async fn a_guest_whose_clock_belies_its_boot_is_not_measured() {
    let played = played(Fault::LongBoot).await;
    let error = played.firecracker.boot_to_pong(guest()).await.unwrap_err();
    assert!(
        matches!(&error, PeerError::Lies(lie) if lie.contains("3600s")),
        "{error}"
    );
}

#[tokio::test]
async fn a_step_that_is_refused_is_told() {
    let played = played(Fault::Refuses("/snapshot/create")).await;
    let error = played.firecracker.snapshot(guest()).await.unwrap_err();
    assert!(
        matches!(&error, PeerError::Refused { what, said } if what == "PUT /snapshot/create" && said.contains("fault_message")),
        "{error}"
    );
}

#[tokio::test]
async fn a_restored_guest_that_takes_no_connection_is_not_measured() {
    let played = played(Fault::NoAgent).await;
    let error = played.firecracker.restore_to_pong(LIMIT).await.unwrap_err();
    assert!(matches!(error, PeerError::Io(_)), "{error}");
}
