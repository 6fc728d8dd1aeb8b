//! The properties of the host on which a template was made. A guest can resume only on a processor
//! and a kernel like those of its capture: it has read CPUID, and the meaning of saved state is
//! defined by that host's KVM.

use std::fmt;
use std::sync::OnceLock;

use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use crate::cpu::cpuid;
use crate::host::{Host, HostError};
use crate::kvm::{KvmError, create_vcpu, create_vm};

/// The properties of a host that saved state depends on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Release and build of the host's kernel.
    kernel: String,
    /// Frequency of the time stamp counter, to which the guest has set its clocks; 0 if KVM does
    /// not report it.
    tsc_khz: u32,
    /// CPUID as shown to guests, without the parts that differ between processors of one host.
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// How the host that a template was made on differs from this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Another processor.
    Processor {
        /// Processor of the origin host.
        there: String,
        /// Processor of this host.
        here: String,
    },
    /// The same processor, but KVM shows guests other features (microcode, firmware or module
    /// settings differ).
    Feature {
        /// CPUID leaf.
        leaf: u32,
        /// Index (subleaf) within the leaf.
        index: u32,
    },
    /// The same processor, but its time stamp counter has another frequency: the guest's clocks
    /// would be wrong.
    Clock {
        /// Frequency on the origin host, in kHz.
        there: u32,
        /// Frequency on this host, in kHz.
        here: u32,
    },
    /// Another kernel.
    Kernel {
        /// Kernel of the origin host.
        there: String,
        /// Kernel of this host.
        here: String,
    },
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Processor { there, here } => {
                write!(f, "it was made on processor {there:?}, this is {here:?}")
            }
            Self::Feature { leaf, index } => {
                write!(f, "KVM's CPUID leaf {leaf:#x} index {index} differs")
            }
            Self::Clock { there, here } => write!(
                f,
                "it was made on a time stamp counter of {there} kHz, this is one of {here} kHz"
            ),
            Self::Kernel { there, here } => {
                write!(f, "it was made on kernel {there:?}, this is {here:?}")
            }
        }
    }
}

impl Origin {
    /// Returns the properties of this host.
    pub(crate) fn here() -> Result<Self, HostError> {
        let uname = rustix::system::uname();
        let kernel = [uname.release(), uname.version()]
            .map(|part| part.to_string_lossy())
            .join(" ");
        let host = Host::get()?;
        Ok(Self {
            kernel,
            tsc_khz: tsc_khz(host)?,
            cpuid: cpuid::shown(host.cpuid()).filter_map(whole_host).collect(),
        })
    }

    /// Returns how this host, on which a template was made, differs from `here`; `None` if it does
    /// not.
    pub(crate) fn difference(&self, here: &Self) -> Option<Difference> {
        let same_clock = is_same_rate(self.tsc_khz, here.tsc_khz);
        if same_clock && (&self.kernel, &self.cpuid) == (&here.kernel, &here.cpuid) {
            return None;
        }
        let (there_is, here_is) = (self.processor(), here.processor());
        if there_is != here_is {
            return Some(Difference::Processor {
                there: there_is,
                here: here_is,
            });
        }
        if self.kernel != here.kernel {
            return Some(Difference::Kernel {
                there: self.kernel.clone(),
                here: here.kernel.clone(),
            });
        }
        if !same_clock {
            return Some(Difference::Clock {
                there: self.tsc_khz,
                here: here.tsc_khz,
            });
        }
        let lacks = |one: &Self, other: &Self| {
            let mut leaves = one.cpuid.iter();
            leaves.find(|leaf| !other.cpuid.contains(leaf)).copied()
        };
        let leaf = lacks(self, here).or_else(|| lacks(here, self));
        // Equal leaves in another order count as a difference, too.
        let leaf = leaf.unwrap_or_default();
        Some(Difference::Feature {
            leaf: leaf.function,
            index: leaf.index,
        })
    }

    /// Returns the brand (leaves 0x8000_0002 to 0x8000_0004) and the signature (leaf 1, EAX).
    fn processor(&self) -> String {
        let leaf = |function| {
            self.cpuid
                .iter()
                .find(move |leaf| leaf.function == function)
        };
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .filter_map(leaf)
            .flat_map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
            .flat_map(u32::to_le_bytes)
            .filter(|byte| *byte != 0)
            .collect();
        let signature = leaf(1).map_or(0, |leaf| leaf.eax);
        format!("{} {signature:#x}", String::from_utf8_lossy(&brand).trim())
    }
}

/// Whether two frequencies agree within KVM's own tolerance (`tsc_tolerance_ppm` in
/// arch/x86/kvm/x86.c). Hosts measure the frequency at each boot.
fn is_same_rate(one: u32, other: u32) -> bool {
    const TOLERANCE_PPM: u64 = 250;
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * TOLERANCE_PPM
}

/// Returns the frequency in kHz that KVM gives a guest by default; 0 if KVM does not report it.
fn tsc_khz(host: &Host) -> Result<u32, KvmError> {
    static RATE: OnceLock<u32> = OnceLock::new();
    if let Some(rate) = RATE.get() {
        return Ok(*rate);
    }
    let vm = create_vm(host.kvm())?;
    let vcpu = create_vcpu(&vm, 0, host.cpuid())?;
    let rate = vcpu.get_tsc_khz().unwrap_or(0);
    Ok(*RATE.get_or_init(|| rate))
}

/// Clears the fields of a leaf that depend on which processor of the host answered (Intel SDM
/// volume 2, CPUID; AMD APM volume 3, appendix E). Returns `None` for leaves that only describe
/// caches: hybrid processors have two kinds of these, and to the guest they are a hint, which does
/// no harm if it is of another processor.
fn whole_host(mut leaf: kvm_cpuid_entry2) -> Option<kvm_cpuid_entry2> {
    match leaf.function {
        0x2 | 0x4 | 0x8000_0005 | 0x8000_0006 | 0x8000_0019 | 0x8000_001d => return None,
        // Initial APIC id.
        0x1 => leaf.ebx &= 0x00ff_ffff,
        // x2APIC id.
        0xb | 0x1f => leaf.edx = 0,
        // Size of the state that is enabled at the moment.
        0xd => leaf.ebx = 0,
        // Extended APIC id, core id, node id.
        0x8000_001e => (leaf.eax, leaf.ebx, leaf.ecx) = (0, 0, 0),
        _ => {}
    }
    Some(leaf)
}

#[cfg(test)]
pub(crate) mod tests {
    use kvm_bindings::CpuId;

    use super::*;

    /// A made-up host.
    pub(crate) fn host() -> Origin {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        Origin {
            kernel: "6.12 #1".into(),
            tsc_khz: 2_000_000,
            cpuid: vec![
                leaf(1, 0x50654),
                leaf(7, 1),
                leaf(0x8000_0002, u32::from_le_bytes(*b"Fast")),
            ],
        }
    }

    impl Origin {
        pub(crate) fn rename_kernel(&mut self, kernel: &str) {
            self.kernel = kernel.into();
        }
    }

    #[test]
    fn each_difference_is_named() {
        assert_eq!(host().difference(&host()), None);
        let mut other = host();
        other.kernel = "6.13 #1".into();
        let difference = host().difference(&other).unwrap();
        assert!(matches!(difference, Difference::Kernel { .. }));
        assert!(difference.to_string().contains("6.13"), "{difference}");
        other.cpuid[0].eax += 1;
        let difference = host().difference(&other).unwrap();
        let Difference::Processor { there, here } = &difference else {
            panic!("{difference}");
        };
        assert_eq!(
            (there.as_str(), here.as_str()),
            ("Fast 0x50654", "Fast 0x50655")
        );
        for change in [
            |o: &mut Origin| o.cpuid[1].edx = 4,
            |o: &mut Origin| {
                o.cpuid.remove(1);
            },
        ] {
            let mut other = host();
            change(&mut other);
            let feature = Some(Difference::Feature { leaf: 7, index: 0 });
            assert_eq!(host().difference(&other), feature);
            assert_eq!(other.difference(&host()), feature);
        }
        let mut other = host();
        other.cpuid.swap(0, 1);
        assert!(host().difference(&other).is_some());
    }

    #[test]
    fn another_clock_rate_is_a_difference_and_how_exactly_it_was_measured_is_none() {
        let at = |tsc_khz| Origin { tsc_khz, ..host() };
        for same in [1_999_500, 2_000_000, 2_000_500] {
            assert_eq!(host().difference(&at(same)), None);
        }
        for other in [0, 1_999_499, 2_000_501, 2_400_000] {
            let there = 2_000_000;
            let expected = Some(Difference::Clock { there, here: other });
            assert_eq!(host().difference(&at(other)), expected);
            assert!(at(other).difference(&host()).is_some());
        }
        // Neither frequency is known.
        assert_eq!(at(0).difference(&at(0)), None);
    }

    #[test]
    fn which_processor_of_a_host_answered_is_no_difference() {
        let answered = |apic: u32| {
            [0x1, 0xb, 0x8000_001e].map(|function| {
                whole_host(kvm_cpuid_entry2 {
                    function,
                    ebx: if function == 1 { apic << 24 | 0x800 } else { 0 },
                    edx: if function == 0xb { apic } else { 0 },
                    ecx: if function == 0x8000_001e { apic } else { 0 },
                    ..Default::default()
                })
            })
        };
        assert_eq!(answered(0), answered(7));
        assert_eq!(answered(0)[0].map(|leaf| leaf.ebx), Some(0x800));
    }

    /// Performance and efficiency cores have different caches, and either kind may answer CPUID.
    #[test]
    fn which_kind_of_a_hybrid_host_s_processors_answered_is_no_difference() {
        let host = |kind: u32| {
            let leaf = |function, index, eax| kvm_cpuid_entry2 {
                function,
                index,
                eax,
                ..Default::default()
            };
            let caches = (0..4).map(move |index| leaf(0x4, index, 0x121 + kind));
            let leaves = caches.chain([
                leaf(0x1, 0, 0xb0671),
                leaf(0x2, 0, 0xff + kind),
                leaf(0x7, 0, 2),
                leaf(0x1a, 0, kind << 24),
                leaf(0x8000_0006, 0, kind),
            ]);
            let host = CpuId::from_entries(&leaves.collect::<Vec<_>>()).unwrap();
            let shown: Vec<_> = cpuid::shown(&host).filter_map(whole_host).collect();
            shown
        };
        assert_eq!(host(0x20), host(0x40));
        assert_eq!(host(0x20).len(), 2);
    }
}
