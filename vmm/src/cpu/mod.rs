//! State of a vCPU that its guest sees: CPUID, MSRs, and the registers and local APIC at boot.

pub(crate) mod cpuid;
mod features;
pub(crate) mod msrs;
pub(crate) mod setup;
