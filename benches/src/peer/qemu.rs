//! QEMU's machine for microVMs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};

use super::{Booted, PeerError, command, ended, start, version};

/// The machine without what our kernel does not use.
const MACHINE: &str = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off";
/// How the kernel says that it is done.
pub const INIT: &str = "Run /init as init process";
/// How it begins.
pub const BANNER: &str = "Linux version ";
/// What a guest may print until then.
const MOST: u64 = 1 << 20;

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

    /// Boots a guest until its kernel starts init, which its serial console must say: the time since QEMU was started,
    /// and the kernel's banner.
    ///
    /// # Errors
    /// If it ends, or is not there in time.
    pub async fn boot_to_init(&self, guest: Booted<'_>) -> Result<(Duration, String), PeerError> {
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
            .args(["-display", "none", "-serial", "stdio"]);
        let mut child = start(&mut command, &self.program)?;
        let console = child.stdout.take();
        let console = console.ok_or_else(|| std::io::Error::other("no console"))?;
        let up = async {
            match init_line(console).await? {
                Some(banner) => Ok((begin.elapsed(), banner)),
                None => Err(ended(&mut child).await),
            }
        };
        let up = tokio::time::timeout(guest.limit, up).await;
        let up = up.unwrap_or(Err(PeerError::Silent(guest.limit)));
        // Gone before the next one is measured. It may have ended by itself.
        let _ = child.kill().await;
        up
    }
}

/// Reads until the kernel starts init; the kernel's banner. None if the console ends before.
async fn init_line(console: impl AsyncRead + Unpin) -> Result<Option<String>, PeerError> {
    let mut lines = BufReader::new(console.take(MOST));
    let (mut line, mut banner) = (Vec::new(), String::new());
    while lines.read_until(b'\n', &mut line).await? > 0 {
        let text = String::from_utf8_lossy(&line);
        if let Some(at) = text.find(BANNER) {
            banner = text.get(at..).unwrap_or_default().trim_end().to_owned();
        } else if text.contains(INIT) {
            return Ok(Some(banner));
        }
        line.clear();
    }
    Ok(None)
}
