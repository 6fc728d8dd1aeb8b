//! Kernel files of any content: ELF files and bzImages.
#![no_main]

use std::io::Write;
use std::os::fd::AsRawFd;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    // An unnamed file, so that nothing is left behind.
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(content).expect("room");
    let opened = format!("/proc/self/fd/{}", file.as_raw_fd());
    let _ = hearth_vmm::testing::check_kernel(opened.as_ref());
});
