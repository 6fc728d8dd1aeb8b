//! The queues of an initialised balloon device.
#![no_main]

use hearth_vmm_fuzz::{Driver, Kind, Op};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, Vec<Op>)| {
    let (features, ops) = input;
    let mut driver = Driver::new(Kind::Balloon);
    let up = [Op::SetUp { features }];
    driver.act(&up.into_iter().chain(ops).collect::<Vec<_>>());
});
