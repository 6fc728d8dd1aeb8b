#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]
//! Peers that crash, hang or lie: each is reported with its reason, and none is measured.
//!
//! The peers are scripts that print the versions of the real ones.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hearth_bench::peer::{Booted, Channel, Firecracker, PeerError, Qemu};
use hearth_tests::kvm;
use serde_json::Value;

const QEMU: &str = "QEMU emulator version 7.2.22";
const FIRECRACKER: &str = "Firecracker v1.9.0";
/// Time limit of a peer's guest.
const LIMIT: Duration = Duration::from_secs(2);

/// Writes a script that prints `greeting` as its version, and does something else when it is to run
/// a guest.
fn script(dir: &Path, greeting: &str, does: &str) -> PathBuf {
    let path = dir.join("peer");
    let text =
        format!("#!/bin/sh\nif [ \"$1\" = --version ]; then echo '{greeting}'; exit; fi\n{does}\n");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn guest() -> Booted<'static> {
    Booted {
        kernel: Path::new("/kernel"),
        initramfs: Path::new("/initramfs"),
        root: None,
        words: "quiet",
        memory_mib: 128,
        vcpus: 1,
        limit: LIMIT,
    }
}

/// Retries while the program, which was just written, is still held open by a process that another
/// test forks.
async fn found<T, F: Future<Output = Result<T, PeerError>>>(
    find: impl Fn() -> F,
) -> Result<T, PeerError> {
    loop {
        match find().await {
            Err(PeerError::Start { source, .. })
                if source.kind() == std::io::ErrorKind::ExecutableFileBusy => {}
            other => return other,
        }
    }
}

async fn qemu(does: &str) -> Result<Duration, PeerError> {
    let dir = tempfile::tempdir().unwrap();
    let path = script(dir.path(), QEMU, does);
    let mut qemu = found(|| Qemu::find(&path)).await.unwrap();
    assert_eq!(qemu.version, QEMU);
    qemu.channel = Channel::Serial;
    qemu.boot_to_pong(guest()).await
}

async fn firecracker(does: &str) -> (Result<Duration, PeerError>, Result<Duration, PeerError>) {
    let (dir, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = script(dir.path(), FIRECRACKER, does);
    let found = found(|| Firecracker::find(&path, files.path())).await;
    let firecracker = found.unwrap();
    let boot = firecracker.boot_to_pong(guest()).await;
    (boot, firecracker.restore_to_pong(LIMIT).await)
}

#[tokio::test]
async fn a_peer_that_is_missing_or_another_program_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = Qemu::find(&dir.path().join("nothing")).await.unwrap_err();
    assert!(matches!(nowhere, PeerError::Start { .. }), "{nowhere}");
    let path = script(dir.path(), "something 1.0", "exit 0");
    let other = found(|| Qemu::find(&path)).await.unwrap_err();
    assert!(
        matches!(&other, PeerError::Another { said, .. } if said == "something 1.0"),
        "{other}"
    );
    let other = Firecracker::find(&path, dir.path()).await.unwrap_err();
    assert!(matches!(other, PeerError::Another { .. }), "{other}");
}

#[tokio::test]
async fn a_peer_that_crashes_says_why() {
    let crash = "echo no such device >&2; kill -SEGV $$";
    let error = qemu(crash).await.unwrap_err();
    assert!(
        matches!(&error, PeerError::Ended { said, .. } if said == "no such device"),
        "{error}"
    );
    // A peer that exits with success before its guest is up is the same error.
    let error = qemu("exit 0").await.unwrap_err();
    assert!(matches!(error, PeerError::Ended { .. }), "{error}");
    let (boot, restore) = firecracker(crash).await;
    for error in [boot.unwrap_err(), restore.unwrap_err()] {
        assert!(
            matches!(&error, PeerError::Ended { said, .. } if said == "no such device"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_peer_that_hangs_is_given_up_and_ended() {
    let begin = Instant::now();
    let dir = tempfile::tempdir().unwrap();
    let pid = dir.path().join("pid");
    let error = qemu(&format!("echo $$ > {}; exec sleep 1000", pid.display()))
        .await
        .unwrap_err();
    assert!(matches!(error, PeerError::Silent(LIMIT)), "{error}");
    let pid = std::fs::read_to_string(pid).unwrap();
    assert!(
        !Path::new(&format!("/proc/{}", pid.trim())).exists(),
        "it lives on"
    );
    // A peer that prints without end is detected at once.
    let error = qemu("while echo nothing; do :; done").await.unwrap_err();
    assert!(matches!(error, PeerError::Lies(_)), "{error}");
    let (boot, restore) = firecracker("exec sleep 1000").await;
    assert!(matches!(boot, Err(PeerError::Silent(LIMIT))), "{boot:?}");
    assert!(
        matches!(restore, Err(PeerError::Silent(LIMIT))),
        "{restore:?}"
    );
    assert!(begin.elapsed() < Duration::from_secs(60));
}

/// Connects to the host's socket as a guest's agent would, and sends bytes that are not the
/// protocol.
const BABBLER: &str = r#"
use Socket;
my ($config) = $ARGV[2] or die;
open my $file, '<', $config or die;
my ($path) = join('', <$file>) =~ /"uds_path":"([^"]+)"/ or die;
socket(my $agent, PF_UNIX, SOCK_STREAM, 0) or die;
connect($agent, sockaddr_un("${path}_1025")) or die;
syswrite $agent, "x" x 4096;
sleep 1000;
"#;

#[tokio::test]
async fn a_peer_whose_guest_is_no_guest_lies() {
    let dir = tempfile::tempdir().unwrap();
    let babbler = dir.path().join("babbler.pl");
    std::fs::write(&babbler, BABBLER).unwrap();
    let (boot, _) = firecracker(&format!("exec perl {} \"$@\"", babbler.display())).await;
    let error = boot.unwrap_err();
    assert!(matches!(error, PeerError::Lies(_)), "{error}");
}

/// Returns the command's report of a run with this peer.
fn reported(peer: &str, does: &str) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let greeting = if peer == "--qemu" { QEMU } else { FIRECRACKER };
    let path = script(dir.path(), greeting, does);
    let output = Command::new(env!("CARGO_BIN_EXE_vmm-bench"))
        .args(["peers", "-n", "1", "--peer-limit", "60", "--json", peer])
        .arg(path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_command_reports_a_peer_that_fails_and_measures_nothing() {
    if !kvm() {
        return;
    }
    for peer in ["--qemu", "--firecracker"] {
        let report = reported(peer, "echo no such device >&2; exit 1");
        assert_eq!(report["results"].as_array().unwrap().len(), 0);
        let why = report["not_measured"][0].as_str().unwrap();
        assert!(why.contains("no such device"), "{why}");
    }
}

#[test]
fn a_peer_that_only_prints_as_a_kernel_does_is_found_out() {
    if !kvm() {
        return;
    }
    let report = reported(
        "--qemu",
        "echo Linux version 9; echo Run /init as init process; exec sleep 1000",
    );
    assert_eq!(report["results"].as_array().unwrap().len(), 0);
    let why = report["not_measured"][0].as_str().unwrap();
    // Over vsock the script never connects, so there is no answer to check.
    let over_vsock = Path::new("/dev/vhost-vsock").exists();
    let found_out = match over_vsock {
        true => "was not up after",
        false => "does not show the guest",
    };
    assert!(why.contains(found_out), "{why}");
}

#[tokio::test]
async fn over_vsock_the_guest_has_an_address_and_only_its_agent_counts() {
    let dir = tempfile::tempdir().unwrap();
    let given = dir.path().join("given");
    let does = format!("echo \"$@\" > {}; exec sleep 1000", given.display());
    let path = script(dir.path(), QEMU, &does);
    let mut qemu = found(|| Qemu::find(&path)).await.unwrap();
    qemu.channel = Channel::Vsock;
    let error = qemu.boot_to_pong(guest()).await.unwrap_err();
    if matches!(&error, PeerError::Io(refused) if refused.raw_os_error() == Some(libc::EAFNOSUPPORT))
    {
        println!("NOT MEASURED: QEMU over vsock: this host has no vsock sockets");
        return;
    }
    assert!(matches!(error, PeerError::Silent(LIMIT)), "{error}");
    let given = std::fs::read_to_string(given).unwrap();
    let (_, device) = given
        .split_once("-device vhost-vsock-device,guest-cid=")
        .unwrap();
    let cid: u32 = device.split(' ').next().unwrap().parse().unwrap();
    assert!(cid > 2, "the guest has the host's address: {cid}");
    assert!(!given.contains("stdio"), "{given}");
}
