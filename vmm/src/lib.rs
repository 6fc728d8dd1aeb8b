//! A minimal microVM monitor that lives inside its caller's process, straight on KVM.
//!
//! A [`Vm`] is one guest: memory, vCPU threads, a serial console, and the virtio devices that
//! Hearth needs (vsock, balloon). Exactly one value owns it; dropping that value at any moment is
//! safe and ends the guest. What the guest does can never be more to the host program than a typed
//! error: a bad driver gets its device marked `DEVICE_NEEDS_RESET`, a bad vCPU ends its own VM.

pub mod memory;
pub mod virtio;
