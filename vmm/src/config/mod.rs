//! What a VM is made of, checked as a whole before anything is made.

use std::path::PathBuf;

use crate::boot::{EntryChoice, ImageFiles, LoadError, Payload};
use crate::host::CpuProfile;
use crate::limits::Limits;
use crate::memory::{GAP_START, HUGE_PAGE_SIZE, HugePages};
use crate::placement::{Placement, VcpuThread};
use crate::virtio::pmem::{MAX_IMAGES, PmemFile};

/// Least guest memory in MiB.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Most guest memory in MiB (1 TiB, what 40 physical address bits allow any guest).
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Most vCPUs of one VM.
pub const MAX_VCPUS: u8 = 32;
/// Guest memory in MiB when not said.
pub const DEFAULT_MEMORY_MIB: u64 = 128;

/// Why a configuration is refused. Nothing was started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Less than the least memory.
    #[error("{0} bytes of guest memory are too few; give it at least {MIN_MEMORY_MIB} MiB")]
    MemoryTooSmall(u64),
    /// Not whole MiB.
    #[error("{0} bytes of guest memory are not whole MiB; round to a multiple of 1048576")]
    MemoryNotWhole(u64),
    /// Not whole pages of 2 MiB, where those are to be used alone.
    #[error(
        "{0} bytes of guest memory are not whole pages of 2 MiB; round to a multiple of 2097152"
    )]
    MemoryNotHuge(u64),
    /// More than the host or any guest has.
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
    /// More images than a VM has interrupt lines for.
    #[error("{0} images are too many for one VM; it takes {MAX_IMAGES}")]
    Images(usize),
    /// A processor quota that gives nothing, or more than all vCPUs could use.
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

/// Collects a [`VmConfig`]. Every method takes and returns the builder; the last of equal calls
/// wins.
#[derive(Clone, Debug)]
#[must_use]
pub struct VmConfigBuilder(VmConfig);

impl VmConfig {
    /// A guest that boots `kernel` (a 64-bit ELF vmlinux, or a bzImage) with 128 MiB and one vCPU.
    pub fn builder(kernel: impl Into<PathBuf>) -> VmConfigBuilder {
        Self::with_payload(Payload::Linux(ImageFiles::new(kernel.into(), None)))
    }

    /// A guest that runs `code` from 1 MiB on, in 64-bit mode with the first GiB mapped to itself.
    /// For probes and tests of the monitor.
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

    /// Guest memory in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// Reads kernel and initramfs into memory, unless that was done for this configuration or a
    /// clone of it. Booting does it too; doing it ahead takes the files' cost (a few ms) from the
    /// first boot.
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

    /// The words on the kernel's command line, the monitor's own first, on a host of kind
    /// `profile`; those that tell where devices are come besides. What boots from the same
    /// files with the same words comes up alike.
    #[must_use]
    pub fn boot_words(&self, profile: CpuProfile) -> Vec<String> {
        self.cmdline(profile, &[])
    }

    /// The kernel command line as words, with those that the monitor adds.
    pub(crate) fn cmdline(&self, profile: CpuProfile, devices: &[String]) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        if !self.plain_cmdline {
            // End at once and by ways that the monitor sees; say why on our port; our kernel's
            // short boot. Report free memory by the MiB: the kernel's choice, 2 or 4
            // MiB, has it report nothing while less than 32 such blocks are free.
            // Kernels that do not know a word ignore it.
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
            // For devices that reach no further than 4 GiB the kernel keeps 64 MiB of bounce
            // buffers, once it has memory there. Ours reach all.
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
    /// An initramfs file; uncompressed cpio is fastest by far.
    pub fn initramfs(mut self, path: impl Into<PathBuf>) -> Self {
        if let Payload::Linux(files) = self.0.payload {
            self.0.payload = Payload::Linux(files.with_initramfs(path.into()));
        }
        self
    }

    /// Guest memory in MiB, 32 or more.
    pub fn memory_mib(self, mib: u64) -> Self {
        self.memory_bytes(mib.saturating_mul(1 << 20))
    }

    /// Guest memory in bytes; whole MiB.
    pub fn memory_bytes(mut self, bytes: u64) -> Self {
        self.0.memory_bytes = bytes;
        self
    }

    /// Gives the guest memory in pages of 2 MiB; ordinary ones when not said.
    pub fn huge_pages(mut self, pages: HugePages) -> Self {
        self.0.huge_pages = Some(pages);
        self
    }

    /// Number of vCPUs, 1 to 32.
    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.0.vcpus = vcpus;
        self
    }

    /// Adds words to the end of the kernel command line.
    pub fn append(mut self, words: &str) -> Self {
        self.0
            .words
            .extend(words.split_whitespace().map(String::from));
        self
    }

    /// Leaves out the words that the monitor would add, but for the devices'.
    pub fn plain_cmdline(mut self) -> Self {
        self.0.plain_cmdline = true;
        self
    }

    /// Gives the guest a serial console whose output [`Vm::console`](crate::Vm::console) keeps.
    /// Costs an exit per byte printed.
    pub fn console(mut self, on: bool) -> Self {
        self.0.console = on;
        self
    }

    /// Lets [`Vm::emulated_instructions`](crate::Vm::emulated_instructions) count: for
    /// measurements. Costs a descriptor per vCPU.
    pub fn count_instructions(mut self, on: bool) -> Self {
        self.0.count_instructions = on;
        self
    }

    /// Gives the guest a programmable interval timer. Kernels with KVM guest support do without.
    pub fn pit(mut self, on: bool) -> Self {
        self.0.pit = on;
        self
    }

    /// Gives the guest the processor's performance counters, where the host's KVM has any to give:
    /// for a guest that you trust, as counters tell of its neighbours, too. None when not said.
    pub fn pmu(mut self, on: bool) -> Self {
        self.0.pmu = on;
        self
    }

    /// Gives the guest a read-only image file (`/dev/pmem0`, the next `/dev/pmem1`, and so on; 8 at
    /// most). Its size is a multiple of 2 MiB. All VMs of this configuration and their clones read
    /// the same pages; what the guest writes is ignored. The file is opened once, at the first
    /// boot, and must not change while guests use it.
    pub fn pmem(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.images.push(PmemFile::new(path.into()));
        self
    }

    /// Limits the processor time of the guest: `percent` of one processor, for all its vCPUs
    /// together, over each 100 ms; 1 to 100 for each vCPU. No limit when not said. Work of
    /// devices on the event threads is not counted; it is bounded on its own.
    pub fn cpu_quota(mut self, percent: u32) -> Self {
        self.0.limits.cpu_percent = Some(percent);
        self
    }

    /// Whether the threads that run this VM and its devices are confined by seccomp filters; they
    /// are when not said. Calls that they do not need are answered with `EPERM`; the filters
    /// set `no_new_privs` on these threads. A program whose `tracing` subscriber or allocator
    /// needs more than writing to open descriptors on them switches it off.
    pub fn seccomp(mut self, on: bool) -> Self {
        self.0.limits.seccomp = on;
        self
    }

    /// Has `place` decide where the threads run that run this VM's vCPUs: it is told of each before
    /// its vCPU runs, on the thread that makes the VM, one after another. Where they run
    /// otherwise is where the program's first thread may. Such threads are made for this VM and
    /// end with it, which costs a boot some 100 us.
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
    /// An error of `place` is one of the boot
    /// ([`VcpuError::Placement`](crate::VcpuError::Placement)).
    pub fn place_vcpus(
        mut self,
        place: impl Fn(&VcpuThread) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.0.placement = Some(Placement::new(place));
        self
    }

    /// How the kernel is entered.
    pub fn entry(mut self, entry: EntryChoice) -> Self {
        self.0.entry = entry;
        self
    }

    /// Forces the CPU profile, for a kernel of your own; the host's probed one when not said.
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
