//! QEMU's microvm machine. The agent uses vsock if the host's kernel has a device for it, QEMU's
//! only way to provide it, and the serial line otherwise.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use hearth_agent::proto::READY_PORT;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::agent::{answered, done};
use super::{Booted, PeerError, command, start, version};

/// The machine without the devices that our kernel does not use.
const MACHINE: &str = "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off";
/// Kernel parameter that leaves the serial line, on which init is started, to the agent.
pub const SERIAL_WORDS: &str = "loglevel=0";

/// Lower addresses have meanings or are often given (virtio 1.2, 5.10.4).
const FIRST_CID: u32 = 1 << 16;
/// The host's device for guests' vsock.
const VHOST: &str = "/dev/vhost-vsock";

/// The channel of the agent in QEMU's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// vsock by the host's kernel (vhost-vsock).
    Vsock,
    /// The first serial line.
    Serial,
}

impl Channel {
    /// Returns the channel that this host supports.
    fn of_host() -> Self {
        match Path::new(VHOST).exists() {
            true => Self::Vsock,
            false => Self::Serial,
        }
    }
}

/// Returns QEMU's name of the host's processor. On AMD it is without IA32_ARCH_CAPABILITIES (MSR
/// 10AH), which KVM lists for all processors although none of AMD's has it: QEMU before 10.1 exits
/// when it cannot set that register.
fn processor() -> &'static str {
    // Leaf 0: the vendor's name, its middle in EDX ("AuthenticAMD": AMD APM volume 3, Fn0000_0000).
    match std::arch::x86_64::__cpuid(0).edx.to_le_bytes() {
        [b'e', b'n', b't', b'i'] => "host,arch-capabilities=off",
        _ => "host",
    }
}

/// The QEMU that was found.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    /// The version that it reports.
    pub version: String,
    /// The channel of its guest's agent.
    pub channel: Channel,
}

impl Qemu {
    /// Checks the program's version.
    ///
    /// # Errors
    /// If it is not QEMU.
    pub async fn find(program: &Path) -> Result<Self, PeerError> {
        Ok(Self {
            version: version(program, "QEMU emulator version").await?,
            program: program.to_owned(),
            channel: Channel::of_host(),
        })
    }

    /// Boots a guest until its agent answers a ping; returns the time since QEMU was started. Over
    /// the serial line the kernel must be quiet: [`SERIAL_WORDS`] and a console.
    ///
    /// # Errors
    /// If QEMU exits, or the guest is not up in time.
    pub async fn boot_to_pong(&self, guest: Booted<'_>) -> Result<Duration, PeerError> {
        match self.channel {
            Channel::Vsock => self.over_vsock(guest).await,
            Channel::Serial => self.over_serial(guest).await,
        }
    }

    async fn over_vsock(&self, guest: Booted<'_>) -> Result<Duration, PeerError> {
        // A CID that no other guest of this host has.
        let cid = FIRST_CID + std::process::id();
        let mut listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, READY_PORT))?;
        let begin = Instant::now();
        let mut command = self.command(guest);
        command
            .args(["-device", &format!("vhost-vsock-device,guest-cid={cid}")])
            .args(["-serial", "null"])
            .stdout(Stdio::null());
        let mut child = start(&mut command, &self.program)?;
        let up = async { answered(from_guest(&mut listener, cid).await?, begin).await };
        done(&mut child, guest.limit, up).await
    }

    async fn over_serial(&self, guest: Booted<'_>) -> Result<Duration, PeerError> {
        let begin = Instant::now();
        let mut command = self.command(guest);
        command.args(["-serial", "stdio"]).stdin(Stdio::piped());
        let mut child = start(&mut command, &self.program)?;
        let line = child.stdout.take().zip(child.stdin.take());
        let (from, to) = line.ok_or_else(|| std::io::Error::other("no serial line"))?;
        let up = answered(tokio::io::join(from, to), begin);
        done(&mut child, guest.limit, up).await
    }

    fn command(&self, guest: Booted<'_>) -> tokio::process::Command {
        let mut command = command(&self.program);
        command
            .args(["-M", MACHINE, "-accel", "kvm", "-cpu", processor()])
            .args(["-m", &guest.memory_mib.to_string()])
            .args(["-smp", &guest.vcpus.to_string()])
            .arg("-kernel")
            .arg(guest.kernel)
            .arg("-initrd")
            .arg(guest.initramfs)
            .args(["-append", guest.words])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none"]);
        command
    }
}

/// Accepts the connection of this guest's agent; those of other guests are closed.
async fn from_guest(listener: &mut VsockListener, cid: u32) -> Result<VsockStream, PeerError> {
    loop {
        let (stream, from) = listener.accept().await?;
        if from.cid() == cid {
            return Ok(stream);
        }
    }
}
