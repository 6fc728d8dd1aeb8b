//! The rings of any device, laid over each other, over the descriptors, or apart.
#![no_main]

use hearth_vmm_fuzz::{Driver, Kind, Layout, Op};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Kind, u64, (u8, Layout), u16, Vec<Op>)| {
    let (kind, features, odd, chains, ops) = input;
    let mut driver = Driver::new(kind);
    driver.lay(features, odd, chains);
    driver.act(&ops);
});
