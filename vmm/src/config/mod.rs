//! Configuration of a VM, checked as a whole before anything is created.

use std::path::PathBuf;

use crate::boot::{EntryChoice, ImageFiles, LoadError, Payload};
use crate::host::CpuProfile;
use crate::limits::Limits;
use crate::memory::{GAP_START, HUGE_PAGE_SIZE, HugePages};
use crate::placement::{Placement, VcpuThread};
use crate::virtio::pmem::{MAX_IMAGES, PmemFile};

/// Minimum guest memory in MiB.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Maximum guest memory in MiB (1 TiB, which 40 physical address bits allow for any guest).
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Maximum number of vCPUs of one VM.
pub const MAX_VCPUS: u8 = 32;
/// Guest memory in MiB by default.
pub const DEFAULT_MEMORY_MIB: u64 = 128;

/// Why a configuration is refused. Nothing was started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Less than [`MIN_MEMORY_MIB`].
    #[error("{0} bytes of guest memory are too few; give it at least {MIN_MEMORY_MIB} MiB")]
    MemoryTooSmall(u64),
    /// Not whole MiB.
    #[error("{0} bytes of guest memory are not whole MiB; round to a multiple of 1048576")]
    MemoryNotWhole(u64),
    /// Not whole pages of 2 MiB, with [`HugePages::Reserved`].
    #[error(
        "{0} bytes of guest memory are not whole pages of 2 MiB; round to a multiple of 2097152"
    )]
    MemoryNotHuge(u64),
    /// More memory than the host has, or than any guest can have.
    #[error("{asked} MiB of guest memory are more than this host's {host} MiB")]
    MemoryTooLarge {
        /// MiB asked for.
        asked: u64,
        /// MiB that the host has.
        host: u64,
    },
    /// Zero vCPUs, or more than are supported.
    #[error("{asked} vCPUs are not possible; choose 1 to {most}")]
    Vcpus {
        /// vCPUs asked for.
        asked: u8,
        /// Most that this host and Hearth support.
        most: u8,
    },
    /// More pmem images than a VM has interrupt lines for.
    #[error("{0} images are too many for one VM; it takes {MAX_IMAGES}")]
    Images(usize),
    /// A processor quota of zero, or of more than all vCPUs could use.
    #[error("a quota of {asked} percent is not possible; choose 1 to {most}")]
    Quota {
        /// Percent asked for.
        asked: u32,
        /// Percent of all vCPUs together.
        most: u32,
    },
}

/// A VM's configuration. Build one with [`VmConfig::builder`].
#[derive(Clone, Debug)]
pub struct VmConfig {
    pub(crate) payload: Payload,
    pub(crate) memory_bytes: u64,
    pub(crate) huge_pages: Option<HugePages>,
    pub(crate) vcpus: u8,
    pub(crate) words: Vec<String>,
    pub(crate) plain_cmdline: bool,
    pub(crate) console: bool,
    pub(crate) pit: bool,
    pub(crate) pmu: bool,
    pub(crate) count_instructions: bool,
    pub(crate) entry: EntryChoice,
    pub(crate) profile: Option<CpuProfile>,
    pub(crate) images: Vec<PmemFile>,
    pub(crate) limits: Limits,
    pub(crate) placement: Option<Placement>,
}

/// Builder of a [`VmConfig`]. Every method takes and returns the builder. Of several calls that set
/// one value, the last wins.
#[derive(Clone, Debug)]
#[must_use]
pub struct VmConfigBuilder(VmConfig);

impl VmConfig {
    /// Returns a builder for a guest that boots `kernel` (a 64-bit ELF vmlinux, or a bzImage) with
    /// 128 MiB and one vCPU.
    pub fn builder(kernel: impl Into<PathBuf>) -> VmConfigBuilder {
        Self::with_payload(Payload::Linux(ImageFiles::new(kernel.into(), None)))
    }

    /// Returns a builder for a guest that runs `code` from 1 MiB on, in 64-bit mode with the first
    /// GiB identity-mapped. For probes and tests of the VMM.
    pub fn flat(code: impl Into<Vec<u8>>) -> VmConfigBuilder {
        Self::with_payload(Payload::Flat(code.into()))
    }

    fn with_payload(payload: Payload) -> VmConfigBuilder {
        VmConfigBuilder(VmConfig {
            payload,
            memory_bytes: DEFAULT_MEMORY_MIB << 20,
            huge_pages: None,
            vcpus: 1,
            words: Vec::new(),
            plain_cmdline: false,
            console: false,
            pit: false,
            pmu: false,
            count_instructions: false,
            entry: EntryChoice::Auto,
            profile: None,
            images: Vec::new(),
            limits: Limits::default(),
            placement: None,
        })
    }

    /// Returns the guest memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Returns the number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// Reads kernel and initramfs into memory, unless that was done for this configuration or a
    /// clone of it. Booting does it too; done in advance, it takes the cost of reading (a few ms)
    /// from the first boot.
    ///
    /// # Errors
    /// [`LoadError`] says what is wrong with which file.
    pub fn preload(&self) -> Result<(), LoadError> {
        match &self.payload {
            Payload::Linux(files) => files.image().map(drop),
            Payload::Flat(_) => Ok(()),
        }
    }

    /// Checks everything that can be checked without the host's KVM.
    fn check(&self, host_mib: u64) -> Result<(), ConfigError> {
        let mib = self.memory_bytes >> 20;
        if mib < MIN_MEMORY_MIB {
            return Err(ConfigError::MemoryTooSmall(self.memory_bytes));
        }
        if !self.memory_bytes.is_multiple_of(1 << 20) {
            return Err(ConfigError::MemoryNotWhole(self.memory_bytes));
        }
        let huge = self.memory_bytes.is_multiple_of(HUGE_PAGE_SIZE);
        if self.huge_pages == Some(HugePages::Reserved) && !huge {
            return Err(ConfigError::MemoryNotHuge(self.memory_bytes));
        }
        let host = host_mib.min(MAX_MEMORY_MIB);
        if mib > host {
            return Err(ConfigError::MemoryTooLarge { asked: mib, host });
        }
        if self.images.len() > MAX_IMAGES {
            return Err(ConfigError::Images(self.images.len()));
        }
        let most = 100 * u32::from(self.vcpus);
        if let Some(asked) = self.limits.cpu_percent
            && !(1..=most).contains(&asked)
        {
            return Err(ConfigError::Quota { asked, most });
        }
        self.check_vcpus(MAX_VCPUS)
    }

    pub(crate) fn check_vcpus(&self, most: u8) -> Result<(), ConfigError> {
        if self.vcpus == 0 || self.vcpus > most {
            return Err(ConfigError::Vcpus {
                asked: self.vcpus,
                most,
            });
        }
        Ok(())
    }

    /// Returns the kernel parameters on a host with `profile`, the VMM's own first, without those
    /// that describe devices. VMs that boot from the same files with the same parameters boot
    /// alike.
    #[must_use]
    pub fn boot_words(&self, profile: CpuProfile) -> Vec<String> {
        self.cmdline(profile, &[])
    }

    /// Returns all kernel parameters: the VMM's own, `devices`, then those of this configuration.
    pub(crate) fn cmdline(&self, profile: CpuProfile, devices: &[String]) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        if !self.plain_cmdline {
            // The guest ends at once, in a way that the VMM sees, and reports the reason on our
            // port; our kernel boots faster and lets its clones re-key their random generator. Free
            // memory is reported in blocks of 1 MiB: with the kernel's default, 2 or 4 MiB, it
            // reports nothing while fewer than 32 such blocks are free. Kernels ignore parameters
            // that they do not know.
            words.extend(
                [
                    "reboot=k",
                    "panic=-1",
                    "hearth.report=0x5f0",
                    "hearth.fast",
                    "hearth.clone",
                    "page_reporting.page_reporting_order=8",
                ]
                .map(String::from),
            );
            if self.console {
                words.push("console=ttyS0".into());
            } else {
                words.extend(["quiet", "8250.nr_uarts=0"].map(String::from));
            }
            // With memory above 4 GiB the kernel keeps 64 MiB of bounce buffers for devices that
            // cannot address it. Ours can.
            if self.memory_bytes > GAP_START {
                words.push("swiotlb=noforce".into());
            }
            words.extend(profile.kernel_words().iter().map(|w| (*w).to_owned()));
        }
        words.extend(devices.iter().cloned());
        words.extend(self.words.iter().cloned());
        words
    }
}

impl VmConfigBuilder {
    /// Sets the initramfs file. Uncompressed cpio is by far the fastest.
    pub fn initramfs(mut self, path: impl Into<PathBuf>) -> Self {
        if let Payload::Linux(files) = self.0.payload {
            self.0.payload = Payload::Linux(files.with_initramfs(path.into()));
        }
        self
    }

    /// Sets the guest memory in MiB, 32 or more.
    pub fn memory_mib(self, mib: u64) -> Self {
        self.memory_bytes(mib.saturating_mul(1 << 20))
    }

    /// Sets the guest memory in bytes, whole MiB.
    pub fn memory_bytes(mut self, bytes: u64) -> Self {
        self.0.memory_bytes = bytes;
        self
    }

    /// Gives the guest memory in pages of 2 MiB. Ordinary pages by default.
    pub fn huge_pages(mut self, pages: HugePages) -> Self {
        self.0.huge_pages = Some(pages);
        self
    }

    /// Sets the number of vCPUs, 1 to 32.
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.0.vcpus = vcpus;
        self
    }

    /// Appends parameters to the kernel command line.
    pub fn append(mut self, words: &str) -> Self {
        self.0
            .words
            .extend(words.split_whitespace().map(String::from));
        self
    }

    /// Omits the kernel parameters that the VMM would add, except those that describe devices.
    pub fn plain_cmdline(mut self) -> Self {
        self.0.plain_cmdline = true;
        self
    }

    /// Gives the guest a serial console. [`Vm::console`](crate::Vm::console) returns its output.
    /// Costs an exit per byte printed.
    pub fn console(mut self, on: bool) -> Self {
        self.0.console = on;
        self
    }

    /// Enables [`Vm::emulated_instructions`](crate::Vm::emulated_instructions), for measurements.
    /// Costs a descriptor per vCPU.
    pub fn count_instructions(mut self, on: bool) -> Self {
        self.0.count_instructions = on;
        self
    }

    /// Gives the guest a programmable interval timer. Kernels with KVM guest support do not need
    /// it.
    pub fn pit(mut self, on: bool) -> Self {
        self.0.pit = on;
        self
    }

    /// Gives the guest the processor's performance counters, if the host's KVM has any to give:
    /// only for a guest that you trust, because the counters reveal activity of its neighbours,
    /// too. Off by default.
    pub fn pmu(mut self, on: bool) -> Self {
        self.0.pmu = on;
        self
    }

    /// Gives the guest a read-only pmem image file (`/dev/pmem0`, the next `/dev/pmem1`, and so on;
    /// 8 at most). Its size is a multiple of 2 MiB. All VMs of this configuration and their clones
    /// read the same pages; the guest's writes are ignored. The file is opened once, at the first
    /// boot, and must not change while guests use it.
    pub fn pmem(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.images.push(PmemFile::new(path.into()));
        self
    }

    /// Limits the processor time of the guest: `percent` of one processor, for all its vCPUs
    /// together, over each 100 ms; 1 to 100 for each vCPU. No limit by default. The work of devices
    /// on the event threads is not counted; it has bounds of its own.
    pub fn cpu_quota(mut self, percent: u32) -> Self {
        self.0.limits.cpu_percent = Some(percent);
        self
    }

    /// Sets whether the threads that run this VM and its devices are confined by seccomp filters.
    /// On by default. System calls that they do not need return `EPERM`; the filters set
    /// `no_new_privs` on these threads. Switch it off if the `tracing` subscriber or allocator of
    /// the program needs more on these threads than writing to open descriptors.
    pub fn seccomp(mut self, on: bool) -> Self {
        self.0.limits.seccomp = on;
        self
    }

    /// Sets a callback that decides where the threads of this VM's vCPUs run. `place` is called
    /// with each thread before its vCPU runs, on the thread that creates the VM, one after another.
    /// By default they run where the program's first thread may run. Threads to be placed are
    /// created for this VM and end with it, which costs a boot some 100 us.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let config = hearth_vmm::VmConfig::builder("vmlinux")
    ///     .vcpus(2)
    ///     .place_vcpus(|thread| thread.pin(&[4 + thread.index()]))
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// If `place` fails, the boot fails with that error
    /// ([`VcpuError::Placement`](crate::VcpuError::Placement)).
    pub fn place_vcpus(
        mut self,
        place: impl Fn(&VcpuThread) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.0.placement = Some(Placement::new(place));
        self
    }

    /// Sets the boot protocol by which the kernel is entered.
    pub fn entry(mut self, entry: EntryChoice) -> Self {
        self.0.entry = entry;
        self
    }

    /// Forces the CPU profile, for a kernel of your own. By default it is the host's probed one.
    pub fn profile(mut self, profile: CpuProfile) -> Self {
        self.0.profile = Some(profile);
        self
    }

    /// Checks the configuration.
    ///
    /// # Errors
    /// [`ConfigError`] says which value is not possible and what would be.
    pub fn build(self) -> Result<VmConfig, ConfigError> {
        self.0.check(host_memory_mib())?;
        Ok(self.0)
    }
}

fn host_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) >> 20
}

#[cfg(test)]
mod tests;
