//! The kernel command line.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::LoadError;
use crate::layout;

/// Why a command line is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// Longer than kernels read.
    #[error("the kernel command line has {0} bytes; kernels read at most 2047: shorten it")]
    TooLong(usize),
    /// A control character or a byte outside ASCII.
    #[error("the kernel command line word {0:?} has a character that is not printable ASCII")]
    BadCharacter(String),
}

/// Joins the kernel parameters in `words` and writes them, zero-terminated, at [`layout::CMDLINE`].
/// Returns the number of bytes without the terminator.
pub(super) fn write(ram: &GuestMemoryMmap, words: &[String]) -> Result<u32, LoadError> {
    if let Some(bad) = words
        .iter()
        .find(|w| !w.bytes().all(|b| (0x20..0x7f).contains(&b)))
    {
        return Err(CmdlineError::BadCharacter(bad.clone()).into());
    }
    let mut line = words.join(" ").into_bytes();
    if line.len() >= layout::CMDLINE_MAX {
        return Err(CmdlineError::TooLong(line.len()).into());
    }
    let len = line.len() as u32;
    line.push(0);
    ram.write_slice(&line, GuestAddress(layout::CMDLINE))?;
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{GuestRam, MIB};

    fn words(len: usize) -> Vec<String> {
        vec!["x".repeat(len)]
    }

    #[test]
    fn the_longest_line_fits_and_one_more_byte_is_refused() {
        let ram = GuestRam::new(MIB).unwrap();
        assert_eq!(write(ram.map(), &words(2047)).unwrap(), 2047);
        let end: u8 = ram
            .map()
            .read_obj(GuestAddress(layout::CMDLINE + 2047))
            .unwrap();
        assert_eq!(end, 0);
        assert!(matches!(
            write(ram.map(), &words(2048)),
            Err(LoadError::Cmdline(CmdlineError::TooLong(2048)))
        ));
    }

    #[test]
    fn control_characters_are_refused() {
        let ram = GuestRam::new(MIB).unwrap();
        for bad in ["a\nb", "a\0b", "\u{e9}"] {
            assert!(matches!(
                write(ram.map(), &[bad.to_owned()]),
                Err(LoadError::Cmdline(CmdlineError::BadCharacter(_)))
            ));
        }
    }
}
