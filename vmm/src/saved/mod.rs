//! The state of a VM as a template has it: plain data, which may come from a file.

pub(crate) mod cpu;
pub(crate) mod irqchip;
mod serial;

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

use self::cpu::VcpuState;
use self::irqchip::ChipState;
use crate::hardware::Hardware;
use crate::virtio::mmio::TransportState;

/// The state of a VM without its memory. A change here or in any part of it raises
/// `FORMAT` of [`snapshot`](crate::snapshot).
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct VmState {
    pub(crate) hardware: Hardware,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) chips: ChipState,
    pub(crate) transports: Vec<TransportState>,
    #[serde(with = "serial")]
    pub(crate) serial: Option<SerialState>,
}
