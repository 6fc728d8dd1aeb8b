//! Ports through which a guest reports its exit.

use crate::state::Exit;

/// The debug-exit port: Hearth's guest kernel writes one byte to it (kernel parameter
/// `hearth.report=0x5f0`).
pub(crate) const PORT: u16 = 0x5f0;
/// The keyboard controller's command port; 0xFE pulses the reset line.
pub(crate) const I8042_COMMAND: u16 = 0x64;
/// The keyboard controller's data port.
pub(crate) const I8042_DATA: u16 = 0x60;
const I8042_RESET: u8 = 0xfe;

/// Returns the exit that a byte written to [`PORT`] reports; other values are ignored.
pub(crate) fn reported(value: u8) -> Option<Exit> {
    match value {
        1 => Some(Exit::PowerOff),
        2 => Some(Exit::Reboot),
        3 => Some(Exit::Halt),
        4 => Some(Exit::Panic),
        _ => None,
    }
}

/// Returns the exit that a byte written to [`I8042_COMMAND`] causes.
pub(crate) fn i8042(value: u8) -> Option<Exit> {
    (value == I8042_RESET).then_some(Exit::Reboot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_bytes_end_a_guest() {
        for value in 0..=255u8 {
            assert_eq!(reported(value).is_some(), (1..=4).contains(&value));
            assert_eq!(i8042(value).is_some(), value == 0xfe);
        }
    }
}
