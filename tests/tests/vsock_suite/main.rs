#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Linux's own tests of stream sockets over vsock, between a guest and this host. The suite comes
//! from the source package that the guests' kernel is built from; `programs/vsock_suite.c` is
//! linked into both of its programs.

mod relay;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use hearth_agent::client;
use hearth_agent::proto::{ExitStatus, Put};
use hearth_images::Images;
use hearth_tests::{Guest, kvm, not_measured, patience, within};
use hearth_vmm::virtio::vsock::unix::UnixBridge;

const SHIM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs/vsock_suite.c");
/// Path of the suite in the kernel's source.
const SUITE: &str = "tools/testing/vsock";
/// The sources of `vsock_test`, as in the suite's Makefile.
const SOURCES: [&str; 6] = [
    "vsock_test.c",
    "vsock_test_zerocopy.c",
    "timeout.c",
    "control.c",
    "util.c",
    "msg_zerocopy_common.c",
];
const BOTH_WRAP: &[&str] = &["getaddrinfo", "freeaddrinfo", "alarm", "connect"];
const HOST_WRAPS: &[&str] = &["socket", "bind", "accept", "send", "recv", "epoll_wait"];
/// Prefix of the names of stream tests.
const STREAM: &str = "SOCK_STREAM ";
/// Number of stream tests.
const STREAMS: usize = 17;
/// Tests whose client examines its own socket. On the host that is a Unix socket instead of a vsock
/// socket, which has no SO_RCVLOWAT in poll(), and neither SO_ZEROCOPY nor MSG_ERRQUEUE.
const CLIENTS_OWN: &[&str] = &[
    "SOCK_STREAM poll() + SO_RCVLOWAT",
    "SOCK_STREAM MSG_ZEROCOPY",
    "SOCK_STREAM MSG_ZEROCOPY empty MSG_ERRQUEUE",
];
/// Tests whose server does the same: it sets the buffer size of its vsock socket, and SO_RCVLOWAT.
const SERVERS_OWN: &[&str] = &[
    "SOCK_STREAM virtio credit update + SO_RCVLOWAT",
    "SOCK_STREAM virtio credit update + low rx_bytes",
];
/// Longest time of a run, in seconds on hardware.
const LIMIT: u64 = 60;

/// The suite, built for the host and for the guest.
#[derive(Debug)]
struct Suite {
    host: PathBuf,
    guest: PathBuf,
    /// The names of its tests; the index is the test's number.
    tests: Vec<String>,
}

/// Returns the suite. Where it cannot be built, reports the test as skipped and returns `None`.
#[track_caller]
fn suite() -> Option<&'static Suite> {
    static SUITE: OnceLock<Result<Suite, String>> = OnceLock::new();
    if !kvm() {
        return None;
    }
    match SUITE.get_or_init(build) {
        Ok(suite) => Some(suite),
        Err(reason) => {
            not_measured(reason);
            None
        }
    }
}

/// Builds the suite. The error says what is missing for it.
fn build() -> Result<Suite, String> {
    for tool in ["gcc", "dpkg-deb", "tar", "xz", "timeout"] {
        let found = Command::new(tool).arg("--version").output();
        found.map_err(|error| format!("{tool} cannot be run: {error}"))?;
    }
    let package = package().ok_or("the image cache has no source package of the kernel")?;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let unpacked = dir.path().join("package");
    done(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(&package)
            .arg(&unpacked),
    );
    let tarball = files(&unpacked.join("usr/src"), "linux-source-", ".tar.xz").pop();
    let tar = Command::new("tar")
        .args(["--wildcards", "--strip-components=1", "-xJf"])
        .arg(tarball.expect("a package with a tarball"))
        .arg("-C")
        .arg(dir.path())
        .args([&format!("*/{SUITE}"), "*/tools/include"])
        .output();
    succeeded(tar.unwrap(), "tar");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let [host, guest] = ["vsock_test_host", "vsock_test_guest"].map(|name| out.join(name));
    let sources = dir.path().join(SUITE);
    compile(&sources, &guest, &[], BOTH_WRAP);
    compile(
        &sources,
        &host,
        &["-DHOST"],
        &[BOTH_WRAP, HOST_WRAPS].concat(),
    );
    let tests = list(&host);
    Ok(Suite { host, guest, tests })
}

/// Returns the kernel's source package from the image cache, where its file name is a hash.
fn package() -> Option<PathBuf> {
    let cache = Images::open(None).ok()?.cache_dir().join("source");
    files(&cache, "", ".deb").into_iter().find(|file| {
        let name = Command::new("dpkg-deb")
            .arg("-f")
            .arg(file)
            .arg("Package")
            .output();
        name.is_ok_and(|name| name.stdout.starts_with(b"linux-source-"))
    })
}

/// Returns the files of a directory whose names begin and end like this, sorted by name.
fn files(dir: &Path, begin: &str, end: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with(begin) && name.ends_with(end)
        })
        .map(|entry| entry.path())
        .collect();
    files.sort();
    files
}

fn compile(sources: &Path, to: &Path, defines: &[&str], wraps: &[&str]) {
    let factor = patience(Duration::from_secs(1)).as_secs();
    let gcc = Command::new("gcc")
        .current_dir(sources)
        // The flags of the suite's Makefile, and static: a guest has no libraries.
        .args([
            "-O2",
            "-fno-strict-overflow",
            "-fno-strict-aliasing",
            "-fno-common",
        ])
        .args(["-D_GNU_SOURCE", "-I.", "-I../../include", "-static"])
        .arg(format!("-DPATIENCE={factor}"))
        .args(defines)
        .args(SOURCES)
        .arg(SHIM)
        .args(wraps.iter().map(|name| format!("-Wl,--wrap={name}")))
        .arg("-o")
        .arg(to)
        .output();
    succeeded(gcc.unwrap(), "gcc");
}

fn done(command: &mut Command) {
    let name = format!("{command:?}");
    succeeded(command.output().unwrap(), &name);
}

fn succeeded(output: Output, what: &str) {
    assert!(output.status.success(), "{what}: {output:?}");
}

/// Returns the names of the suite's tests, in the order of their numbers.
fn list(program: &Path) -> Vec<String> {
    // `--list` exits with a failure code.
    let output = Command::new(program).arg("--list").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text
        .lines()
        .skip(1)
        .map(|line| line.split_once('\t').unwrap());
    let tests: Vec<String> = lines.map(|(_, name)| name.to_owned()).collect();
    let streams = tests.iter().filter(|name| name.starts_with(STREAM)).count();
    assert_eq!(streams, STREAMS, "{tests:?}");
    tests
}

/// The role of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guests {
    Server,
    Client,
}

/// Runs the suite between a guest and the Unix sockets at `path` on this host, without the tests in
/// `skipped`.
async fn run(suite: &Suite, guest: &Guest, path: &Path, role: Guests, skipped: &[&str]) {
    let (host_mode, guest_mode) = match role {
        Guests::Server => ("client", "server"),
        Guests::Client => ("server", "client"),
    };
    for name in skipped {
        assert!(
            suite.tests.iter().any(|test| test == name),
            "no test {name}"
        );
    }
    let left_out = |name: &str| !name.starts_with(STREAM) || skipped.contains(&name);
    let numbers = (0..).zip(&suite.tests).filter(|(_, name)| left_out(name));
    let skips = numbers.map(|(number, _)| format!("--skip={number}"));

    let put = Put::new("/tmp/vsock_test").mode(0o755);
    let program = fs::read(&suite.guest).unwrap();
    guest.connect().await.put(put, &program).await.unwrap();
    let mut command = client::Command::new("/tmp/vsock_test");
    for argument in arguments(guest_mode, "2") {
        command = command.arg(argument);
    }
    let exec = guest.connect().await.exec(command).await.unwrap();

    let mut command = Command::new("timeout");
    command
        .arg(patience(Duration::from_secs(LIMIT)).as_secs().to_string())
        .arg(&suite.host)
        .args(arguments(host_mode, "3"))
        .args(skips)
        .env("HEARTH_VSOCK", path);
    let host = tokio::task::spawn_blocking(move || command.output());
    let ends = async { tokio::join!(host, exec.output(Default::default())) };
    let (host, guest) = within(LIMIT + 10, "both ends", ends).await;
    let (host, guest) = (host.unwrap().unwrap(), guest.unwrap());
    let said = |out: &[u8]| String::from_utf8_lossy(out).into_owned();
    let story = format!(
        "host, {host_mode}: {}\n{}{}\nguest, {guest_mode}: {:?}\n{}{}",
        host.status,
        said(&host.stdout),
        said(&host.stderr),
        guest.status,
        said(&guest.stdout),
        said(&guest.stderr),
    );
    println!("{story}");
    assert!(
        host.status.success() && guest.status == ExitStatus::Code(0),
        "{story}"
    );
    let mut passed = 0;
    for (number, name) in suite.tests.iter().enumerate() {
        let end = if left_out(name) { "skipped" } else { "ok" };
        let line = format!("{number} - {name}...{end}\n");
        assert!(said(&host.stdout).contains(&line), "{line}{story}");
        assert!(said(&guest.stdout).contains(&line), "{line}{story}");
        passed += usize::from(!left_out(name));
    }
    assert_eq!(passed + skipped.len(), STREAMS);
}

fn arguments(mode: &str, peer: &str) -> Vec<String> {
    let mut arguments = vec![
        format!("--mode={mode}"),
        format!("--peer-cid={peer}"),
        "--control-port=5678".to_owned(),
    ];
    if mode == "client" {
        arguments.push(format!("--control-host={peer}"));
    }
    arguments
}

async fn over_the_bridge(role: Guests, skipped: &[&str]) {
    let Some(suite) = suite() else { return };
    let guest = Guest::fork().await;
    let dir = tempfile::tempdir().unwrap();
    let bridge = UnixBridge::bind(guest.vm.vsock().clone(), dir.path().join("v")).unwrap();
    run(suite, &guest, bridge.path(), role, skipped).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: builds the kernel's tests of vsock, and waits as they do"]
async fn the_kernels_tests_pass_over_the_bridge_with_the_guest_as_server() {
    over_the_bridge(Guests::Server, CLIENTS_OWN).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: builds the kernel's tests of vsock, and waits as they do"]
async fn the_kernels_tests_pass_over_the_bridge_with_the_guest_as_client() {
    over_the_bridge(Guests::Client, SERVERS_OWN).await;
}

async fn over_the_streams(role: Guests, skipped: &[&str]) {
    let Some(suite) = suite() else { return };
    let guest = Guest::fork().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v");
    let serving = tokio::spawn(relay::serve(guest.vm.vsock().clone(), path.clone()));
    run(suite, &guest, &path, role, skipped).await;
    serving.abort();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: builds the kernel's tests of vsock, and waits as they do"]
async fn the_kernels_tests_pass_over_streams_with_the_guest_as_server() {
    over_the_streams(Guests::Server, CLIENTS_OWN).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "long: builds the kernel's tests of vsock, and waits as they do"]
async fn the_kernels_tests_pass_over_streams_with_the_guest_as_client() {
    // A stream of the host cannot stop receiving and still be open.
    let skipped = [SERVERS_OWN, &["SOCK_STREAM SHUT_RD"]].concat();
    over_the_streams(Guests::Client, &skipped).await;
}
