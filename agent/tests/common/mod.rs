//! Runs `hearth-init` as an ordinary process on a Unix socket.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "each test binary uses its part"
)]

pub mod peers;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command as HostCommand, Stdio},
    time::Duration,
};

use hearth_agent::{
    client::{AgentClient, Command, Exec, Output, OutputLimits},
    proto::Input,
};
use tokio::net::UnixStream;

pub type Client = AgentClient<UnixStream>;
pub type Running = Exec<UnixStream>;

/// An agent, killed at the end of the test.
pub struct Agent {
    child: Child,
    dir: tempfile::TempDir,
    cgroup: Option<PathBuf>,
}

impl Agent {
    pub async fn start() -> Self {
        Self::start_with(|_| {}, None).await
    }

    /// Starts an agent with a cgroup of its own; `None` where this machine does not allow one.
    pub async fn start_in_cgroup() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").ok()?;
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            (words.next()? == "cgroup2").then(|| words.next().map(PathBuf::from))?
        })?;
        let unique = format!("hearth-agent-test-{}-{:p}", std::process::id(), &root);
        let dir = root.join(unique);
        fs::create_dir(&dir).ok()?;
        Some(Self::start_with(|_| {}, Some(dir)).await)
    }

    pub async fn start_with(
        change: impl FnOnce(&mut HostCommand),
        cgroup: Option<PathBuf>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The guest's own build of the program, if one is given.
        let built = env!("CARGO_BIN_EXE_hearth-init").into();
        let mut command = HostCommand::new(std::env::var_os("HEARTH_INIT").unwrap_or(built));
        command
            .arg("--serve-unix")
            .arg(dir.path().join("agent"))
            .stdin(Stdio::null());
        if let Some(cgroup) = &cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        change(&mut command);
        let child = command.spawn().unwrap();
        let agent = Self { child, dir, cgroup };
        for _ in 0..500 {
            if agent.stream().await.is_ok() {
                return agent;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the agent does not listen");
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn stream(&self) -> std::io::Result<UnixStream> {
        UnixStream::connect(self.dir.path().join("agent")).await
    }

    pub async fn client(&self) -> Client {
        AgentClient::handshake(self.stream().await.unwrap())
            .await
            .unwrap()
    }

    pub async fn exec(&self, command: Command) -> Running {
        self.client().await.exec(command).await.unwrap()
    }

    pub async fn output(&self, command: Command) -> Output {
        self.exec(command)
            .await
            .output(OutputLimits::default())
            .await
            .unwrap()
    }

    /// Resident memory of the agent.
    pub fn rss_kib(&self) -> u64 {
        self.status_field("VmRSS:")
    }

    pub fn peak_rss_kib(&self) -> u64 {
        self.status_field("VmHWM:")
    }

    fn status_field(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    }

    pub fn open_fds(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }

    /// Returns the user and system time used, in clock ticks.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let fields: Vec<u64> = rest
            .split_ascii_whitespace()
            .filter_map(|field| field.parse().ok())
            .collect();
        fields[10] + fields[11]
    }

    pub async fn assert_alive(&self) {
        self.client().await.ping(77).await.unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(dir) = &self.cgroup {
            let _ = fs::write(dir.join("cgroup.kill"), "1");
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let _ = remove_group(&entry.path());
            }
            let _ = remove_group(dir);
        }
    }
}

fn remove_group(dir: &Path) -> std::io::Result<()> {
    for _ in 0..100 {
        if !dir.is_dir() || fs::remove_dir(dir).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    fs::remove_dir(dir)
}

/// A shell command.
pub fn sh(script: &str) -> Command {
    Command::new("/bin/sh").arg("-c").arg(script)
}

/// A shell command with a stdin.
pub fn sh_fed(script: &str) -> Command {
    sh(script).stdin(Input::Pipe)
}

/// Whether a process with this id is there and not a zombie.
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
    })
}

/// Waits until a condition holds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 10 s: {what}");
}
