//! The host as this process sees it: access to KVM, CPU profile, supported CPUID and MSRs. Probed
//! once. A failure is not cached, so that a corrected permission takes effect.

mod probe;

use std::sync::{Mutex, OnceLock};

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use probe::MOST_PATIENT;
pub(crate) use probe::Probe;

use crate::advice::advice;
use crate::caps::Caps;
use crate::forked::Mark;

/// Environment variable that forces the CPU profile: `native`, `emulated` or `auto`.
pub const PROFILE_VARIABLE: &str = "HEARTH_CPU_PROFILE";

/// Why this host cannot run guests, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: enable virtualisation in the firmware, load the kvm_intel or kvm_amd \
         module, or, inside a virtual machine, enable nested virtualisation"
    )]
    NoKvm,
    /// The caller may not open `/dev/kvm`.
    #[error(
        "user {user} may not open /dev/kvm: run `sudo usermod -aG kvm {user}` and log in again"
    )]
    NoAccess {
        /// Name or number of the user who lacks access.
        user: String,
    },
    /// `/dev/kvm` has another API version than the stable one.
    #[error("/dev/kvm speaks API version {0}, expected 12: use a Linux kernel of this century")]
    ApiVersion(i32),
    /// The host's KVM lacks something that Hearth needs.
    #[error("this host's KVM lacks {0}: use Linux 5.10 or later")]
    Missing(&'static str),
    /// [`PROFILE_VARIABLE`] has an unknown value.
    #[error("HEARTH_CPU_PROFILE is {0:?}: use native, emulated or auto")]
    BadProfile(String),
    /// An ioctl failed.
    #[error("{call} on /dev/kvm failed{}", advice(source))]
    Ioctl {
        /// The ioctl's name.
        call: &'static str,
        /// The host's error.
        source: std::io::Error,
    },
    /// The process was forked from one that uses Hearth. The threads of the library and of its VMs
    /// do not exist in this process.
    #[error(
        "process {0} has used Hearth and forked this one, which has none of its threads: execute a program after fork(2), or \
         fork before the first VM"
    )]
    Forked(u32),
    /// The VM for the probe could not be created.
    #[error("KVM refused to make a VM to look at")]
    Kvm(#[from] crate::kvm::KvmError),
    /// KVM starts a thread of its own when a VM first runs (since Linux 6.13), and the host has
    /// none left.
    #[error(
        "the host refused KVM a thread for the probe guest; check ulimit -u and pids.max (systemd: TasksMax)"
    )]
    Thread(#[source] std::io::Error),
    /// The probe guest could not run.
    #[error("the probe guest did not run as expected: {0}")]
    Probe(String),
}

/// How the host runs a guest's ring 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuProfile {
    /// On the processor (VT-x, AMD-V, or a paravirtual kernel).
    Native,
    /// In KVM's instruction emulator, about a thousand times slower and with instructions missing.
    Emulated,
}

impl CpuProfile {
    /// Kernel parameters that this profile needs. The emulator lacks the instructions that the
    /// kernel patches in when it sees these features; `hearth.emulated` switches on our kernel
    /// patches. `rodata=off` leaves the kernel's pages as they were mapped: write-protecting them
    /// walks them one by one, which is a tenth of the boot's instructions on such hosts, and
    /// protects the kernel only from itself.
    ///
    /// Such hosts run ring 3 on the processor, so that guests read the host's time stamp counter,
    /// which cannot be restored. A clone that used it as its clock would see all the time since the
    /// capture pass at once, or, after a restart of the host, see time stand still. KVM's clock is
    /// restored.
    #[must_use]
    pub fn kernel_words(self) -> &'static [&'static str] {
        match self {
            Self::Native => &[],
            Self::Emulated => &[
                "hearth.emulated",
                "no_timer_check",
                "clocksource=kvm-clock",
                // Ports of `vcpu::xsave`.
                "hearth.xsave=0x5f4",
                "nofsgsbase",
                "rodata=off",
                // By number (arch/x86/include/asm/cpufeatures.h), in this order: smap, smep, umip,
                // pcid, invpcid, erms, fsrm, popcnt, rdrand, rdseed, rdpid, clflushopt, clwb,
                // la57, cx16, xsaves, xsavec, pku. The kernel searches for each name among 700,
                // which takes a hundredth of the boot.
                "clearcpuid=308,295,514,145,298,297,580,151,158,306,534,311,312,528,141,323,321,515",
            ],
        }
    }
}

/// The probed host. Lives as long as the process.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    profile: CpuProfile,
    probe: Option<Probe>,
    cpuid: CpuId,
    msr_indices: Vec<u32>,
    caps: Caps,
    max_vcpus: usize,
    /// Identifies the process that probed the host.
    mark: Mark,
}

static HOST: OnceLock<Host> = OnceLock::new();

/// Returns whether this process was forked from one that has used the library, and has executed no
/// other program since. Such a process must not touch the library's objects that it inherited:
/// their threads do not exist here, and event queues are the parent's.
pub(crate) fn is_forked() -> bool {
    HOST.get().is_some_and(|host| host.mark.is_forked())
}

impl Host {
    /// Returns the host of this process, probed at the first call (8 to 20 ms where ring 0 is
    /// emulated).
    ///
    /// # Errors
    /// [`HostError`] says what is missing and how to fix it.
    pub fn get() -> Result<&'static Host, HostError> {
        static PROBING: Mutex<()> = Mutex::new(());
        if let Some(host) = HOST.get() {
            return host.of_this_process();
        }
        let _one_at_a_time = PROBING.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(host) = HOST.get() {
            return host.of_this_process();
        }
        let host = Host::probe()?;
        Ok(HOST.get_or_init(|| host))
    }

    fn of_this_process(&self) -> Result<&Self, HostError> {
        if is_forked() {
            return Err(HostError::Forked(self.mark.process()));
        }
        Ok(self)
    }

    fn probe() -> Result<Host, HostError> {
        let kvm = open()?;
        let forced = forced_profile()?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| ioctl("KVM_GET_SUPPORTED_CPUID", e))?;
        let probe = match forced {
            Some(_) => None,
            None => Some(Probe::run(&kvm, &cpuid)?),
        };
        let profile = forced
            .or(probe.map(|p| p.profile()))
            .unwrap_or(CpuProfile::Native);
        let msr_indices = kvm
            .get_msr_index_list()
            .map_err(|e| ioctl("KVM_GET_MSR_INDEX_LIST", e))?
            .as_slice()
            .to_vec();
        let caps = Caps::of(&kvm);
        let max_vcpus = kvm.get_max_vcpus();
        tracing::debug!(?profile, ?probe, "host probed");
        Ok(Host {
            kvm,
            profile,
            probe,
            cpuid,
            msr_indices,
            caps,
            max_vcpus,
            mark: Mark::of_this_process(),
        })
    }

    /// Returns the open `/dev/kvm`.
    #[must_use]
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Returns the CPU profile in use.
    #[must_use]
    pub fn profile(&self) -> CpuProfile {
        self.profile
    }

    /// Returns the time of the probe guest's best round; `None` when the profile was forced.
    #[must_use]
    pub fn probed(&self) -> Option<std::time::Duration> {
        self.probe.map(|p| p.best)
    }

    /// Returns the factor by which to multiply a timeout that was chosen for a fast host: 1 to 10,
    /// by the time that the probe guest took. 10 where ring 0 is emulated.
    #[must_use]
    pub fn timeout_factor(&self) -> u32 {
        match self.probe {
            Some(probe) => probe.timeout_factor(),
            None => match self.profile {
                CpuProfile::Native => 1,
                CpuProfile::Emulated => MOST_PATIENT,
            },
        }
    }

    /// Returns the CPUID leaves that KVM can give a guest.
    #[must_use]
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Returns the indices of the MSRs that a snapshot must save.
    #[must_use]
    pub fn msr_indices(&self) -> &[u32] {
        &self.msr_indices
    }

    pub(crate) fn caps(&self) -> Caps {
        self.caps
    }

    /// Returns the maximum number of vCPUs of one VM on this host.
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.max_vcpus
    }
}

pub(crate) fn ioctl(call: &'static str, e: kvm_ioctls::Error) -> HostError {
    HostError::Ioctl {
        call,
        source: std::io::Error::from_raw_os_error(e.errno()),
    }
}

fn forced_profile() -> Result<Option<CpuProfile>, HostError> {
    match std::env::var(PROFILE_VARIABLE) {
        Err(_) => Ok(None),
        Ok(word) => match word.as_str() {
            "" | "auto" => Ok(None),
            "native" => Ok(Some(CpuProfile::Native)),
            "emulated" => Ok(Some(CpuProfile::Emulated)),
            _ => Err(HostError::BadProfile(word)),
        },
    }
}

fn open() -> Result<Kvm, HostError> {
    let kvm = Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => HostError::NoKvm,
        libc::EACCES | libc::EPERM => HostError::NoAccess { user: user() },
        _ => ioctl("open", e),
    })?;
    let version = kvm.get_api_version();
    if version.cast_unsigned() != KVM_API_VERSION {
        return Err(HostError::ApiVersion(version));
    }
    for (cap, name) in [
        (
            Cap::Irqchip,
            "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)",
        ),
        (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
        (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
        (Cap::UserMemory, "user memory slots (KVM_CAP_USER_MEMORY)"),
        (
            Cap::ImmediateExit,
            "immediate exit (KVM_CAP_IMMEDIATE_EXIT)",
        ),
    ] {
        if !kvm.check_extension(cap) {
            return Err(HostError::Missing(name));
        }
    }
    Ok(kvm)
}

fn user() -> String {
    let uid = rustix::process::geteuid().as_raw();
    std::fs::read_to_string("/etc/passwd")
        .ok()
        .and_then(|passwd| {
            passwd.lines().find_map(|line| {
                let mut fields = line.split(':');
                let name = fields.next()?;
                (fields.nth(1)?.parse::<u32>().ok()? == uid).then(|| name.to_owned())
            })
        })
        .unwrap_or_else(|| format!("with id {uid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_adds_no_kernel_word() {
        assert!(CpuProfile::Native.kernel_words().is_empty());
        assert!(
            CpuProfile::Emulated
                .kernel_words()
                .contains(&"hearth.emulated")
        );
    }

    #[test]
    fn errors_say_what_to_do() {
        let text = HostError::NoAccess { user: "ada".into() }.to_string();
        assert!(text.contains("usermod -aG kvm ada"), "{text}");
    }
}
