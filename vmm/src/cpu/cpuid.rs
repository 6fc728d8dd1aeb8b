//! CPUID of a guest: the features that KVM supports and [`features`] allows, with a topology of one
//! package and one thread per core that agrees with the MP table, and without features that the CPU
//! profile cannot run.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::features;
use crate::host::CpuProfile;

/// KVM's paravirtual features (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;
/// PV TLB flush, PV unhalt, PV IPI and PV sched yield: VMCALLs that the emulator cannot pass with
/// many vCPUs.
const KVM_PV_CALLS: u32 = 1 << 9 | 1 << 7 | 1 << 11 | 1 << 13;
/// Asynchronous page faults and steal time: work for the guest's kernel that has no benefit where
/// ring 0 is emulated. Each restored vCPU would first search for all tasks that might have waited
/// for a page (4,000 instructions), and later run other tasks for the microseconds in which the
/// host copies a page.
const KVM_ASYNC_PF_AND_STEAL: u32 = 1 << 4 | 1 << 5 | 1 << 10 | 1 << 14;

/// Returns the CPUID for vCPU `index` of `count` (1 to 32; `index` is below `count`), with
/// performance counters if `pmu`. The APIC id equals `index`.
///
/// # Errors
/// When the table has no room for the topology leaves.
pub(crate) fn for_vcpu(
    host: &CpuId,
    profile: CpuProfile,
    pmu: bool,
    index: u8,
    count: u8,
) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let entries = host.as_slice();
    let max_basic = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    let mut table = features::reviewed(entries, pmu);
    for entry in &mut table {
        patch(entry, profile, index, count);
    }
    for leaf in [0xb, 0x1f] {
        if max_basic >= leaf {
            table.extend(extended_topology(leaf, index, count));
        }
    }
    CpuId::from_entries(&table)
}

/// Returns the leaves that any guest of this host may be shown, whatever its topology, performance
/// counters included.
pub(crate) fn shown(host: &CpuId) -> impl Iterator<Item = kvm_cpuid_entry2> + use<> {
    features::reviewed(host.as_slice(), true).into_iter()
}

/// Returns the physical address bits of the guest's processor (AMD APM volume 3, Fn8000_0008 EAX;
/// 36 if KVM lists no such leaf).
pub(crate) fn address_bits(host: &CpuId) -> u32 {
    let entries = host.as_slice();
    let leaf = entries.iter().find(|e| e.function == 0x8000_0008);
    leaf.map_or(36, |e| e.eax & 0xff)
}

/// Returns the number of APIC id bits that distinguish the cores of one package.
pub(crate) fn core_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

fn patch(entry: &mut kvm_cpuid_entry2, profile: CpuProfile, index: u8, count: u8) {
    let (index, count) = (u32::from(index), u32::from(count));
    let cores_mask = (1u32 << core_bits(count as u8)) - 1;
    match entry.function {
        // Intel SDM volume 2, CPUID leaf 1.
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | (count << 16) | (index << 24);
            // HTT means "the count above is valid", not hyperthreads.
            set(&mut entry.edx, 28, count > 1);
            // TSC deadline timer: KVM has it whenever its own APIC is used, but does not list it.
            set(&mut entry.ecx, 24, true);
            set(&mut entry.ecx, 31, true);
        }
        // Leaf 4 (Intel) and 0x8000001D (AMD): caches. The last level is shared by the package.
        0x4 | 0x8000_001d => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = (entry.eax & !(0xfff << 14)) | (sharing << 14);
            if entry.function == 0x4 && entry.eax & 0x1f != 0 {
                entry.eax = (entry.eax & !(0x3f << 26)) | (cores_mask.min(0x3f) << 26);
            }
        }
        // AMD APM volume 3, Fn8000_0001 ECX bit 1: several cores, no hyperthreads.
        0x8000_0001 => set(&mut entry.ecx, 1, count > 1),
        // AMD APM volume 3, Fn8000_0008 ECX: core count and APIC id size.
        0x8000_0008 => {
            entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | (core_bits(count as u8) << 12);
        }
        // AMD APM volume 3, Fn8000_001E: one thread per core, one node.
        0x8000_001e => {
            entry.eax = index;
            entry.ebx = index & 0xff;
            entry.ecx = 0;
        }
        KVM_FEATURES if profile == CpuProfile::Emulated => {
            entry.eax &= !(KVM_PV_CALLS | KVM_ASYNC_PF_AND_STEAL);
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = (*register & !(1 << bit)) | (u32::from(on) << bit);
}

/// Returns leaf 0xB or 0x1F (Intel SDM volume 2): a thread level of one, then the cores of the
/// package.
fn extended_topology(leaf: u32, index: u8, count: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |subleaf: u32, shift: u32, logical: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index: subleaf,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: subleaf | (kind << 8),
        edx: u32::from(index),
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, core_bits(count), u32::from(count), 2),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;

    fn host() -> CpuId {
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0x1f),
            kvm_cpuid_entry2 {
                ecx: VMX,
                ..leaf(1, 0)
            },
            leaf(4, 1 | 3 << 5 | 0xfff << 14 | 0x3f << 26),
            leaf(0xb, 99),
            leaf(
                KVM_FEATURES,
                0x0100_7efb | KVM_PV_CALLS | KVM_ASYNC_PF_AND_STEAL,
            ),
            kvm_cpuid_entry2 {
                ecx: SVM,
                ..leaf(0x8000_0001, 0)
            },
            leaf(0x8000_0008, 0x3030),
            leaf(0x8000_001d, 3 << 5),
            leaf(0x8000_001e, 77),
        ])
        .unwrap()
    }

    fn get(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn every_count_and_index_agree_on_one_package_without_hyperthreads() {
        for count in 1..=32u8 {
            for index in 0..count {
                let table = for_vcpu(&host(), CpuProfile::Native, false, index, count).unwrap();
                let one = get(&table, 1, 0);
                assert_eq!(one.ebx >> 24, u32::from(index));
                assert_eq!((one.ebx >> 16) & 0xff, u32::from(count));
                assert_eq!((one.edx >> 28) & 1, u32::from(count > 1));
                for leaf in [0xb, 0x1f] {
                    let (thread, core, end) = (
                        get(&table, leaf, 0),
                        get(&table, leaf, 1),
                        get(&table, leaf, 2),
                    );
                    assert_eq!((thread.eax, thread.ebx, thread.ecx), (0, 1, 0x100));
                    assert_eq!((core.ebx, core.ecx), (u32::from(count), 0x201));
                    assert!(1u32 << core.eax >= u32::from(count));
                    assert_eq!(core.edx, u32::from(index));
                    assert_eq!(u32::from(index) >> core.eax, 0, "one package");
                    assert_eq!((end.ebx, end.ecx), (0, 2));
                }
                let l3 = get(&table, 4, 0);
                assert_eq!((l3.eax >> 14) & 0xfff, u32::from(count) - 1);
                let amd = get(&table, 0x8000_0008, 0);
                assert_eq!(amd.ecx & 0xff, u32::from(count) - 1);
                let node = get(&table, 0x8000_001e, 0);
                assert_eq!((node.eax, (node.ebx >> 8) & 0xff), (u32::from(index), 0));
            }
        }
    }

    #[test]
    fn a_guest_has_no_virtual_machines_of_its_own() {
        let table = for_vcpu(&host(), CpuProfile::Native, false, 0, 1).unwrap();
        assert_eq!(get(&table, 1, 0).ecx & VMX, 0);
        assert_eq!(get(&table, 0x8000_0001, 0).ecx & SVM, 0);
    }

    /// A saved guest has read the CPUID of the library version that saved it. If that CPUID
    /// changes, older templates must not be loaded.
    #[test]
    fn what_guests_are_shown_changes_only_with_the_format_of_templates() {
        use sha2::Digest as _;
        let mut seen = sha2::Sha256::new();
        for profile in [CpuProfile::Native, CpuProfile::Emulated] {
            for (index, count) in [(0, 1), (2, 3)] {
                let table = for_vcpu(&host(), profile, false, index, count).unwrap();
                seen.update(postcard::to_stdvec(table.as_slice()).unwrap());
            }
        }
        let seen = seen.finalize();
        assert_eq!(
            (crate::snapshot::FORMAT, format!("{seen:x}").as_str()),
            (
                5,
                "71f0931b26adeb104dd2b759a0ab25eae5e243be185351d864f1f8267ed3a466"
            ),
            "raise FORMAT, then note both here"
        );
    }

    #[test]
    fn the_emulated_profile_has_no_paravirtual_calls() {
        let native = for_vcpu(&host(), CpuProfile::Native, false, 0, 4).unwrap();
        let emulated = for_vcpu(&host(), CpuProfile::Emulated, false, 0, 4).unwrap();
        assert_ne!(get(&native, KVM_FEATURES, 0).eax & KVM_PV_CALLS, 0);
        let cleared = KVM_PV_CALLS | KVM_ASYNC_PF_AND_STEAL;
        assert_eq!(get(&emulated, KVM_FEATURES, 0).eax & cleared, 0);
        assert_eq!(
            get(&emulated, KVM_FEATURES, 0).eax | cleared,
            get(&native, KVM_FEATURES, 0).eax
        );
    }
}
