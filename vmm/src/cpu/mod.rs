//! What a vCPU looks like to its guest: CPUID, MSRs and the local APIC at boot.

pub(crate) mod cpuid;
pub(crate) mod setup;
