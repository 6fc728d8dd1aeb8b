//! A template's manifest file: any bytes, or any bytes as the devices of a file whose checksum is
//! right.
#![no_main]

use hearth_vmm::testing::{read_template, template_with};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((how, bytes)) = input.split_first() else {
        return;
    };
    if how & 1 == 0 {
        let _ = read_template(&template_with(bytes));
    } else {
        let _ = read_template(bytes);
    }
});
