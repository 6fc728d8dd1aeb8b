//! What a vCPU looks like to its guest: CPUID, MSRs and the local APIC at boot.

pub(crate) mod cpuid;
mod features;
pub(crate) mod msrs;
pub(crate) mod setup;
