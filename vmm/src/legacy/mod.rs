//! The few devices of a PC that kernels insist on: a serial port, the keyboard controller's reset
//! line, and a port of our own on which our kernel says how it ends.

pub(crate) mod console;
pub(crate) mod debug_exit;
pub(crate) mod serial;
