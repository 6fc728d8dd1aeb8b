//! The agent's runtime on the standard library, for tests: arguments, environment and `main`. As in
//! a guest, the standard library's own set-up is left out: programs would inherit the signals that
//! it ignores.

use alloc::vec::Vec;
use std::os::unix::ffi::OsStringExt;

// SAFETY: the only definition of `main`, with C's signature; the arguments are read through
// std::env.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    crate::start().into()
}

/// Returns this program's arguments.
pub(crate) fn args() -> Vec<Vec<u8>> {
    std::env::args_os().map(OsStringExt::into_vec).collect()
}

/// Returns this program's environment, as `KEY=value`.
pub(crate) fn environment() -> Vec<Vec<u8>> {
    let joined = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
        [key.into_vec(), value.into_vec()].join(&b'=')
    };
    std::env::vars_os().map(joined).collect()
}
