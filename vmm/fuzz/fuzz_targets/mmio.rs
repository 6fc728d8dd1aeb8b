//! The registers of any device, in any order.
#![no_main]

use hearth_vmm_fuzz::{Driver, Kind, Op};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Kind, Vec<Op>)| {
    let (kind, ops) = input;
    Driver::new(kind).act(&ops);
});
