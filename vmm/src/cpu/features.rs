//! Allowlist of the CPUID features that guests are shown, leaf by leaf and bit by bit.
//!
//! KVM lists all features that it can give a guest, and learns new ones with each kernel. A guest
//! gets a feature only after a review: its state is saved with a template (`snapshot::cpu`), it
//! takes nothing from the guest's neighbours, and it causes no messages in the host's kernel log.
//! Left out are, among others, performance measurement (PMU, LBR, PT, IBS), state that is not saved
//! (AMX, CET, PKS, FRED, UINTR), enclaves and encryption (SGX, SEV, TDX, key locker), nested
//! virtual machines (VMX, SVM), TSX, MONITOR, and all of resource control.
//!
//! Sources: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux,
//! arch/x86/include/asm/cpufeatures.h.

use kvm_bindings::kvm_cpuid_entry2;

/// All bits of a register.
const ALL: u32 = u32::MAX;
const NONE: u32 = 0;
/// The highest leaves that are shown.
const MAX_BASIC: u32 = 0x1f;
const MAX_KVM: u32 = 0x4000_0001;
const MAX_EXTENDED: u32 = 0x8000_0021;

/// Bits of a leaf's registers that are shown. Leaves and indices without an entry are hidden.
struct Allowed {
    function: u32,
    index: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

const fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Allowed {
    Allowed {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
    }
}

/// Returns a mask of the numbered bits.
const fn bits(bits: &[u32]) -> u32 {
    let mut mask = 0;
    let mut rest = bits;
    while let [bit, tail @ ..] = rest {
        mask |= 1 << *bit;
        rest = tail;
    }
    mask
}

/// Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, PCID, SSE4.1, SSE4.2, x2APIC, MOVBE,
/// POPCNT, TSC deadline timer, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND, hypervisor.
const BASIC_ECX: u32 = bits(&[
    0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
]);
/// Leaf 1 EDX: all features that every 64-bit processor has, self snoop, HTT.
const BASIC_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27, 28,
]);
/// Leaf 1 ECX: MSR_IA32_PERF_CAPABILITIES.
const PDCM: u32 = 1 << 15;
/// Leaf 7 EBX: FSGSBASE, TSC_ADJUST, BMI1, AVX2, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, INVPCID,
/// ZERO_FCS_FDS, AVX-512 F, DQ, RDSEED, ADX, SMAP, IFMA, CLFLUSHOPT, CLWB, AVX-512 PF, ER, CD, SHA,
/// AVX-512 BW, VL.
const SEVEN_EBX: u32 = bits(&[
    0, 1, 3, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31,
]);
/// Leaf 7 ECX: AVX-512 VBMI, UMIP, PKU, OSPKE, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG,
/// VPOPCNTDQ, LA57, RDPID, CLDEMOTE, MOVDIRI, MOVDIR64B.
const SEVEN_ECX: u32 = bits(&[1, 2, 3, 4, 6, 8, 9, 10, 11, 12, 14, 16, 22, 25, 27, 28]);
/// Leaf 7 EDX: AVX-512 4VNNIW, 4FMAPS, FSRM, VP2INTERSECT, MD_CLEAR, SERIALIZE, AVX-512 FP16,
/// SPEC_CTRL, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
const SEVEN_EDX: u32 = bits(&[2, 3, 4, 8, 10, 14, 23, 26, 27, 28, 29, 31]);
/// Leaf 7.1 EAX: SHA512, SM3, SM4, AVX-VNNI, AVX-512 BF16, CMPCCXADD, FZRM, FSRS, FSRC, AVX-IFMA.
const SEVEN_1_EAX: u32 = bits(&[0, 1, 2, 4, 5, 7, 10, 11, 12, 23]);
/// Leaf 7.1 EDX: AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, PREFETCHITI.
const SEVEN_1_EDX: u32 = bits(&[4, 5, 10, 14]);
/// Leaf 7.2 EDX: PSFD, IPRED_CTRL, RRSBA_CTRL, DDPD_U, BHI_CTRL, MCDT_NO.
const SEVEN_2_EDX: u32 = bits(&[0, 1, 2, 3, 4, 5]);
/// State components that a guest may use: x87, SSE, AVX, AVX-512 (three), PKRU. Together they fit
/// into `kvm_xsave`.
const XCR0: u32 = bits(&[0, 1, 2, 5, 6, 7, 9]);
/// Leaf 0xD.1 EAX: XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES (without supervisor state).
const XSAVE_KINDS: u32 = bits(&[0, 1, 2, 3]);
/// Leaf 0x8000_0001 ECX: LAHF, CMP_LEGACY, CR8_LEGACY, ABM, SSE4A, MISALIGNSSE, 3DNOWPREFETCH,
/// OSVW, XOP, FMA4, TBM, TOPOEXT.
const EXTENDED_ECX: u32 = bits(&[0, 1, 4, 5, 6, 7, 8, 9, 11, 16, 21, 22]);
/// Leaf 0x8000_0001 EDX: those of leaf 1, SYSCALL, NX, MMXEXT, FXSR_OPT, GBPAGES, RDTSCP, LM, 3DNOW
/// (two).
const EXTENDED_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 22, 23, 24, 25, 26, 27, 29, 30,
    31,
]);
/// Leaf 0x8000_0001 ECX: performance counters of the core.
const PERFCTR_CORE: u32 = 1 << 23;
/// Leaf 0x8000_0007 EDX: the time stamp counter has a constant rate.
const INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 0x8000_0008 EBX: CLZERO, XSAVEERPTR, WBNOINVD, IBPB, IBRS, STIBP, IBRS and STIBP always on,
/// SSBD (two kinds), SSB_NO, PSFD, BTC_NO, IBPB_RET.
const SPECULATION: u32 = bits(&[0, 2, 9, 12, 14, 15, 16, 17, 24, 25, 26, 28, 29, 30]);
/// Leaf 0x8000_0021 EAX: NO_NESTED_DATA_BP, LFENCE_RDTSC, VERW_CLEAR, NULL_SEL_CLR_BASE, AUTOIBRS,
/// NO_SMM_CTL_MSR, FSRS, FSRC, SBPB, IBPB_BRTYPE, SRSO_NO, SRSO_USER_KERNEL_NO.
const EXTENDED_21_EAX: u32 = bits(&[0, 2, 5, 6, 8, 9, 10, 11, 27, 28, 29, 30]);
/// Leaf 0x8000_0021 ECX: TSA_SQ_NO, TSA_L1_NO.
const EXTENDED_21_ECX: u32 = bits(&[1, 2]);

/// Matches any index of a leaf.
const ANY: u32 = u32::MAX;

const ALLOWED: &[Allowed] = &[
    leaf(0x0, 0, [ALL; 4]),
    leaf(0x1, 0, [ALL, ALL, BASIC_ECX, BASIC_EDX]),
    // Caches.
    leaf(0x2, 0, [ALL; 4]),
    leaf(0x4, ANY, [ALL; 4]),
    // ARAT: the APIC timer never stops.
    leaf(0x6, 0, [1 << 2, NONE, NONE, NONE]),
    leaf(0x7, 0, [ALL, SEVEN_EBX, SEVEN_ECX, SEVEN_EDX]),
    leaf(0x7, 1, [SEVEN_1_EAX, NONE, NONE, SEVEN_1_EDX]),
    leaf(0x7, 2, [NONE, NONE, NONE, SEVEN_2_EDX]),
    leaf(0xd, 0, [XCR0, ALL, ALL, NONE]),
    leaf(0xd, 1, [XSAVE_KINDS, ALL, NONE, NONE]),
    leaf(0xd, 2, [ALL; 4]),
    leaf(0xd, 5, [ALL; 4]),
    leaf(0xd, 6, [ALL; 4]),
    leaf(0xd, 7, [ALL; 4]),
    leaf(0xd, 9, [ALL; 4]),
    // KVM itself (Documentation/virt/kvm/x86/cpuid.rst).
    leaf(0x4000_0000, 0, [ALL; 4]),
    leaf(MAX_KVM, 0, [ALL; 4]),
    leaf(0x8000_0000, 0, [ALL; 4]),
    leaf(0x8000_0001, 0, [ALL, ALL, EXTENDED_ECX, EXTENDED_EDX]),
    // The processor's name.
    leaf(0x8000_0002, 0, [ALL; 4]),
    leaf(0x8000_0003, 0, [ALL; 4]),
    leaf(0x8000_0004, 0, [ALL; 4]),
    // Caches and TLB entries.
    leaf(0x8000_0005, 0, [ALL; 4]),
    leaf(0x8000_0006, 0, [ALL; 4]),
    leaf(0x8000_0007, 0, [NONE, NONE, NONE, INVARIANT_TSC]),
    // Address widths and core counts.
    leaf(0x8000_0008, 0, [ALL, SPECULATION, ALL, NONE]),
    // TLB entries for 1 GiB pages, performance optimisation identifiers.
    leaf(0x8000_0019, 0, [ALL; 4]),
    leaf(0x8000_001a, 0, [ALL; 4]),
    leaf(0x8000_001d, ANY, [ALL; 4]),
    leaf(0x8000_001e, 0, [ALL; 4]),
    leaf(
        MAX_EXTENDED,
        0,
        [EXTENDED_21_EAX, NONE, EXTENDED_21_ECX, NONE],
    ),
];

/// Additional bits and leaves for a guest with a PMU.
const PMU: &[Allowed] = &[
    leaf(0x1, 0, [NONE, NONE, PDCM, NONE]),
    leaf(0xa, 0, [ALL; 4]),
    leaf(0x8000_0001, 0, [NONE, NONE, PERFCTR_CORE, NONE]),
    leaf(0x8000_0022, 0, [ALL; 4]),
];

/// Returns the leaves of KVM's list `host` that a guest is shown, masked to the allowed bits.
pub(super) fn reviewed(host: &[kvm_cpuid_entry2], pmu: bool) -> Vec<kvm_cpuid_entry2> {
    let lists: &[&[Allowed]] = if pmu { &[ALLOWED, PMU] } else { &[ALLOWED] };
    let mut shown: Vec<kvm_cpuid_entry2> = host
        .iter()
        .filter_map(|entry| {
            let allowed = lists.iter().flat_map(|list| list.iter());
            let mut masks = allowed
                .filter(|allowed| {
                    allowed.function == entry.function
                        && [entry.index, ANY].contains(&allowed.index)
                })
                .peekable();
            masks.peek()?;
            let mut shown = kvm_cpuid_entry2 {
                eax: 0,
                ebx: 0,
                ecx: 0,
                edx: 0,
                ..*entry
            };
            for mask in masks {
                shown.eax |= entry.eax & mask.eax;
                shown.ebx |= entry.ebx & mask.ebx;
                shown.ecx |= entry.ecx & mask.ecx;
                shown.edx |= entry.edx & mask.edx;
            }
            Some(shown)
        })
        .collect();
    let extended = if pmu { MAX_EXTENDED + 1 } else { MAX_EXTENDED };
    let area = xsave_area(&shown);
    for entry in &mut shown {
        match (entry.function, entry.index) {
            (0, _) => entry.eax = entry.eax.min(MAX_BASIC),
            (0x4000_0000, _) => entry.eax = entry.eax.min(MAX_KVM),
            (0x8000_0000, _) => entry.eax = entry.eax.min(extended),
            // The highest index of the leaf.
            (0x7, 0) => entry.eax = entry.eax.min(2),
            // KVM updates EBX, the size for the components that are enabled at the moment. ECX is
            // the size for all that can be enabled.
            (0xd, 0) => entry.ecx = area,
            _ => {}
        }
    }
    shown
}

/// Returns the bytes of the largest area that `XSAVE` writes: each component has its size in EAX
/// and its offset in EBX (Intel SDM volume 1, 13.2); the legacy region and the header take 576.
fn xsave_area(leaves: &[kvm_cpuid_entry2]) -> u32 {
    let components = leaves
        .iter()
        .filter(|leaf| leaf.function == 0xd && leaf.index >= 2);
    let ends = components.map(|leaf| leaf.ebx.saturating_add(leaf.eax));
    ends.fold(576, u32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the CPUID of a processor with every feature.
    fn everything() -> Vec<kvm_cpuid_entry2> {
        let functions = (0..0x40)
            .chain(0x4000_0000..0x4000_0020)
            .chain(0x8000_0000..0x8000_0040)
            .chain(0xc000_0000..0xc000_0008);
        functions
            .flat_map(|function| (0..20).map(move |index| (function, index)))
            .map(|(function, index)| kvm_cpuid_entry2 {
                function,
                index,
                eax: ALL,
                ebx: ALL,
                ecx: ALL,
                edx: ALL,
                ..Default::default()
            })
            .collect()
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = leaves
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (function, index));
        found.copied().unwrap_or_default()
    }

    #[test]
    fn a_guest_is_shown_nothing_that_nobody_looked_at() {
        let shown = reviewed(&everything(), false);
        // PMU, MONITOR, resource control (two), SGX, PT, key locker, hybrid, LBR, AMX (two), AVX10,
        // SVM, IBS, SEV, resource control, performance counters, Centaur's.
        for function in [
            0xa,
            0x5,
            0xf,
            0x10,
            0x12,
            0x14,
            0x19,
            0x1a,
            0x1c,
            0x1d,
            0x1e,
            0x24,
            0x8000_000a,
            0x8000_001b,
            0x8000_001f,
            0x8000_0020,
            0x8000_0022,
            0xc000_0001,
        ] {
            assert!(
                shown.iter().all(|leaf| leaf.function != function),
                "{function:#x}"
            );
        }
        let one = get(&shown, 1, 0);
        // MONITOR, VMX, SMX, PDCM; debug store.
        assert_eq!(
            (one.ecx & bits(&[3, 5, 6, 15]), one.edx & bits(&[21])),
            (0, 0)
        );
        let seven = get(&shown, 7, 0);
        // SGX, TSX (two), MPX, PT; CET, key locker, bus lock traps, ENQCMD, SGX_LC, PKS; UINTR,
        // hybrid, PCONFIG, LBR, CET, AMX.
        assert_eq!(seven.ebx & bits(&[2, 4, 11, 14, 25]), 0);
        assert_eq!(seven.ecx & bits(&[7, 23, 24, 29, 30, 31]), 0);
        assert_eq!(seven.edx & bits(&[5, 15, 18, 19, 20, 22, 24, 25]), 0);
        // No supervisor state, no XFD; no MPX, no PT, no CET, no AMX among the components.
        let xsave = get(&shown, 0xd, 1);
        assert_eq!((xsave.eax >> 4, xsave.ecx, xsave.edx), (0, 0, 0));
        assert_eq!(get(&shown, 0xd, 0).eax, 0b10_1110_0111);
        let components = shown.iter().filter(|leaf| leaf.function == 0xd);
        let components: Vec<u32> = components.map(|leaf| leaf.index).collect();
        assert_eq!(components, [0, 1, 2, 5, 6, 7, 9]);
        // SVM, IBS, performance counters (three), MWAITX.
        assert_eq!(
            get(&shown, 0x8000_0001, 0).ecx & bits(&[2, 10, 23, 24, 28, 29]),
            0
        );
        assert_eq!(get(&shown, 0, 0).eax, MAX_BASIC);
        assert_eq!(get(&shown, 0x8000_0000, 0).eax, MAX_EXTENDED);
    }

    #[test]
    fn a_pmu_is_shown_to_who_asks_for_it() {
        let shown = reviewed(&everything(), true);
        assert_eq!(get(&shown, 0xa, 0).eax, ALL);
        assert_ne!(get(&shown, 1, 0).ecx & PDCM, 0);
        assert_ne!(get(&shown, 0x8000_0001, 0).ecx & PERFCTR_CORE, 0);
        assert_eq!(get(&shown, 0x8000_0000, 0).eax, 0x8000_0022);
        let without = reviewed(&everything(), false);
        assert_eq!(get(&without, 1, 0).ecx | PDCM, get(&shown, 1, 0).ecx);
    }

    #[test]
    fn nothing_is_shown_that_the_host_has_not() {
        let none: Vec<_> = everything()
            .into_iter()
            .map(|leaf| kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                ..Default::default()
            })
            .collect();
        let area = |leaf: &kvm_cpuid_entry2| (leaf.function, leaf.index) == (0xd, 0);
        for leaf in reviewed(&none, true).iter().filter(|leaf| !area(leaf)) {
            assert_eq!(
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx),
                (0, 0, 0, 0),
                "{leaf:?}"
            );
        }
        assert!(reviewed(&[], true).is_empty());
    }

    #[test]
    fn the_largest_area_is_that_of_what_is_shown() {
        let component = |index, eax, ebx| kvm_cpuid_entry2 {
            function: 0xd,
            index,
            eax,
            ebx,
            ..Default::default()
        };
        // AVX, AVX-512, PKRU and AMX's tiles, with the sizes and offsets of real processors.
        let host = [
            component(0, 0x602e7, 11008),
            component(2, 256, 576),
            component(5, 64, 1088),
            component(6, 512, 1152),
            component(7, 1024, 1664),
            component(9, 8, 2688),
            component(18, 8192, 2816),
        ];
        assert_eq!(get(&reviewed(&host, false), 0xd, 0).ecx, 2696);
        assert_eq!(get(&reviewed(&host[..2], false), 0xd, 0).ecx, 832);
        assert_eq!(get(&reviewed(&host[..1], false), 0xd, 0).ecx, 576);
    }
}
