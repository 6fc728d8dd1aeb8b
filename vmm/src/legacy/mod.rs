//! The few legacy PC devices that kernels insist on: a serial port, the keyboard controller's reset
//! line, and a debug-exit port on which Hearth's guest kernel reports how it ends.

pub(crate) mod console;
pub(crate) mod debug_exit;
pub(crate) mod serial;
