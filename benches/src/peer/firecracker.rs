//! Firecracker: a cold boot from a configuration file, and a fresh snapshot restored through its
//! API, each up to the agent's pong over its Unix socket.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hearth_agent::client::OutputLimits;
use hearth_agent::proto::{AGENT_PORT, READY_PORT};
use hearth_agent::{AgentClient, Command};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Child;

use super::agent::{answered, done, greeted, handshake, pinged};
use super::http::{connect, request};
use super::{Booted, PeerError, command, start, version};

/// The guest's address; any but the reserved ones will do.
const CID: u32 = 3;
/// Name of the device with the root file system.
const ROOT: &str = "root";
/// Pause between two pings while the guest prepares itself.
const PREPARE_PAUSE: Duration = Duration::from_millis(20);
/// Longest answer to a `CONNECT`.
const LINE: usize = 64;

type Agent = AgentClient<UnixStream>;

/// The Firecracker that was found, with a directory for its sockets and files.
#[derive(Debug)]
pub struct Firecracker {
    program: PathBuf,
    dir: PathBuf,
    /// The version that it reports.
    pub version: String,
}

impl Firecracker {
    /// Checks the program's version. `dir` is empty, and no other process uses it.
    ///
    /// # Errors
    /// If it is not Firecracker.
    pub async fn find(program: &Path, dir: &Path) -> Result<Self, PeerError> {
        Ok(Self {
            version: version(program, "Firecracker v").await?,
            program: program.to_owned(),
            dir: dir.to_owned(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Boots a guest until its agent answers a ping; returns the time since Firecracker was
    /// started.
    ///
    /// # Errors
    /// If Firecracker exits, or the guest is not up in time.
    pub async fn boot_to_pong(&self, guest: Booted<'_>) -> Result<Duration, PeerError> {
        let mut config = json!({
            "boot-source": boot_source(guest),
            "machine-config": machine(guest),
            "vsock": self.vsock(),
            "drives": [],
        });
        // Not set without a root: older versions do not know the device.
        if let Some(root) = guest.root {
            config["pmem"] = json!([pmem(root)]);
        }
        let file = self.path("config.json");
        std::fs::write(&file, config.to_string())?;
        let listener = self.listen()?;
        let begin = Instant::now();
        let mut command = command(&self.program);
        command.arg("--no-api").arg("--config-file").arg(&file);
        command.stdout(std::process::Stdio::null());
        let mut child = start(&mut command, &self.program)?;
        let up = async {
            let (stream, _) = listener.accept().await?;
            answered(stream, begin).await
        };
        done(&mut child, guest.limit, up).await
    }

    /// Boots a guest and leaves its snapshot in the directory.
    ///
    /// # Errors
    /// Those of [`Self::boot_to_pong`], and if Firecracker refuses a step.
    pub async fn snapshot(&self, guest: Booted<'_>) -> Result<(), PeerError> {
        let listener = self.listen()?;
        let (mut child, api) = self.with_api()?;
        let begin = Instant::now();
        let up = async {
            request(&api, "PUT", "/machine-config", &machine(guest)).await?;
            request(&api, "PUT", "/boot-source", &boot_source(guest)).await?;
            request(&api, "PUT", "/vsock", &self.vsock()).await?;
            if let Some(root) = guest.root {
                request(&api, "PUT", &format!("/pmem/{ROOT}"), &pmem(root)).await?;
            }
            let go = json!({"action_type": "InstanceStart"});
            request(&api, "PUT", "/actions", &go).await?;
            let (stream, _) = listener.accept().await?;
            let mut agent = greeted(stream, begin).await?;
            for nonce in 1.. {
                if pinged(&mut agent, nonce).await? {
                    break;
                }
                tokio::time::sleep(PREPARE_PAUSE).await;
            }
            request(&api, "PATCH", "/vm", &json!({"state": "Paused"})).await?;
            let files = json!({
                "snapshot_type": "Full",
                "snapshot_path": self.path("state"),
                "mem_file_path": self.path("memory"),
            });
            request(&api, "PUT", "/snapshot/create", &files).await
        };
        done(&mut child, guest.limit, up).await
    }

    /// Restores the snapshot until the agent answers a ping on a new connection; returns the time
    /// since Firecracker was started.
    ///
    /// # Errors
    /// Those of [`Self::snapshot`].
    pub async fn restore_to_pong(&self, limit: Duration) -> Result<Duration, PeerError> {
        let asked = async |mut agent: Agent| pinged(&mut agent, 1).await.map(drop);
        self.restore(limit, asked).await
    }

    /// Restores the snapshot and runs a program, which must print `word`, on a new connection;
    /// returns the time since Firecracker was started.
    ///
    /// # Errors
    /// Those of [`Self::snapshot`], and if the program prints anything else.
    pub async fn restore_to_result(
        &self,
        program: Command,
        word: &[u8],
        limit: Duration,
    ) -> Result<Duration, PeerError> {
        let lie = |what: &dyn Display| PeerError::Lies(format!("its guest's program: {what}"));
        let asked = async |agent: Agent| {
            let exec = agent.exec(program).await.map_err(|error| lie(&error))?;
            let output = exec.output(OutputLimits::default()).await;
            let output = output.map_err(|error| lie(&error))?;
            match output.stdout == word {
                true => Ok(()),
                false => {
                    let said = String::from_utf8_lossy(&output.stdout);
                    Err(lie(&format_args!("{}, {said:?}", output.status)))
                }
            }
        };
        self.restore(limit, asked).await
    }

    async fn restore(
        &self,
        limit: Duration,
        asked: impl AsyncFnOnce(Agent) -> Result<(), PeerError>,
    ) -> Result<Duration, PeerError> {
        // Firecracker creates the socket itself.
        remove(&self.path("vsock"))?;
        let begin = Instant::now();
        let (mut child, api) = self.with_api()?;
        let up = async {
            let load = json!({
                "snapshot_path": self.path("state"),
                "mem_backend": {"backend_type": "File", "backend_path": self.path("memory")},
                "resume_vm": true,
            });
            request(&api, "PUT", "/snapshot/load", &load).await?;
            let stream = dial(&self.path("vsock")).await?;
            asked(handshake(stream).await?).await?;
            Ok(begin.elapsed())
        };
        done(&mut child, limit, up).await
    }

    /// Starts a process that is controlled through its API.
    fn with_api(&self) -> Result<(Child, PathBuf), PeerError> {
        let api = self.path("api");
        remove(&api)?;
        let mut command = command(&self.program);
        command.arg("--api-sock").arg(&api);
        command.stdout(std::process::Stdio::null());
        Ok((start(&mut command, &self.program)?, api))
    }

    fn vsock(&self) -> serde_json::Value {
        json!({"guest_cid": CID, "uds_path": self.path("vsock")})
    }

    /// Listens for the guest's agent: a connection to a port of the host goes to the socket with
    /// the port's number.
    fn listen(&self) -> Result<UnixListener, PeerError> {
        remove(&self.path("vsock"))?;
        let path = self.path(&format!("vsock_{READY_PORT}"));
        remove(&path)?;
        Ok(UnixListener::bind(path)?)
    }
}

fn boot_source(guest: Booted<'_>) -> serde_json::Value {
    json!({
        "kernel_image_path": guest.kernel.to_string_lossy(),
        "initrd_path": guest.initramfs.to_string_lossy(),
        "boot_args": guest.words,
    })
}

/// The image of the root file system, which the guest only reads.
fn pmem(root: &Path) -> serde_json::Value {
    json!({"id": ROOT, "path_on_host": root, "root_device": false, "read_only": true})
}

fn machine(guest: Booted<'_>) -> serde_json::Value {
    json!({"vcpu_count": guest.vcpus, "mem_size_mib": guest.memory_mib})
}

/// Removes a file that an earlier guest left, if it exists.
fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Connects to the agent in a running guest.
async fn dial(socket: &Path) -> Result<UnixStream, PeerError> {
    let mut stream = connect(socket).await?;
    let ask = format!("CONNECT {AGENT_PORT}\n");
    stream.write_all(ask.as_bytes()).await?;
    let mut line = Vec::new();
    // Byte by byte: the bytes after the line belong to the agent's protocol.
    while line.last() != Some(&b'\n') && line.len() < LINE {
        line.push(stream.read_u8().await?);
    }
    match line.starts_with(b"OK ") {
        true => Ok(stream),
        false => Err(PeerError::Refused {
            what: ask,
            said: String::from_utf8_lossy(&line).into_owned(),
        }),
    }
}
