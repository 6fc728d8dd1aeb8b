//! QEMU's machine for microVMs. The agent speaks over its serial line: vsock needs the host's vhost-vsock.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::agent::{done, greeted, pinged};
use super::{Booted, PeerError, command, start, version};

/// The machine without what our kernel does not use.
const MACHINE: &str = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off";
/// What leaves the serial line, on which init is started, to the agent.
pub const SERIAL_WORDS: &str = "loglevel=0";

/// QEMU, as found.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    /// As it calls itself.
    pub version: String,
}

impl Qemu {
    /// Sees what the program is.
    ///
    /// # Errors
    /// If it is not QEMU.
    pub async fn find(program: &Path) -> Result<Self, PeerError> {
        let version = version(program, "QEMU emulator version").await?;
        let program = program.to_owned();
        Ok(Self { program, version })
    }

    /// Boots a guest to its agent's pong: the time since QEMU was started. They talk over the serial line, on which the
    /// kernel must be quiet: [`SERIAL_WORDS`] and a console.
    ///
    /// # Errors
    /// If it ends, or is not there in time.
    pub async fn boot_to_pong(&self, guest: Booted<'_>) -> Result<Duration, PeerError> {
        let begin = Instant::now();
        let mut command = command(&self.program);
        command
            .args(["-M", MACHINE, "-accel", "kvm", "-cpu", "host"])
            .args(["-m", &guest.memory_mib.to_string()])
            .args(["-smp", &guest.vcpus.to_string()])
            .arg("-kernel")
            .arg(guest.kernel)
            .arg("-initrd")
            .arg(guest.initramfs)
            .args(["-append", guest.words])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio"])
            .stdin(Stdio::piped());
        let mut child = start(&mut command, &self.program)?;
        let line = child.stdout.take().zip(child.stdin.take());
        let (from, to) = line.ok_or_else(|| std::io::Error::other("no serial line"))?;
        let up = async {
            let mut agent = greeted(tokio::io::join(from, to), begin).await?;
            pinged(&mut agent, 1).await?;
            Ok(begin.elapsed())
        };
        done(&mut child, guest.limit, up).await
    }
}
