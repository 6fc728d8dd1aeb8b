//! What a VM consists of, apart from the contents of its memory.

use crate::host::CpuProfile;
use crate::limits::Limits;

/// The guest's vsock address. Every VM has its own socket space, so one number serves all.
pub const GUEST_CID: u64 = 3;

/// The hardware of a VM, apart from the contents of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Hardware {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    pub(crate) console: bool,
    pub(crate) pit: bool,
    pub(crate) pmu: bool,
    pub(crate) profile: CpuProfile,
    /// Not stored in a template's file: limits are the host's policy.
    #[serde(skip)]
    pub(crate) limits: Limits,
}
