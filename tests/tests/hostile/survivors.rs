//! The host process's footprint after it ran hostile guests.

use std::time::Duration;

use hearth_tests::flat::Code;
use hearth_tests::{Footprint, alone, kvm, patience};
use hearth_vmm::virtio::mmio::register;

use crate::driver::*;

/// One guest of each kind: faults of devices, faults of the processor, floods, and guests that
/// never end.
fn hostile() -> Vec<Code> {
    let page = (u64::from(BUFFER), 4);
    let [desc, driver, _] = rings(0).map(u64::from);
    let odd = start(queue(
        good_queue(negotiated(BALLOON), 1),
        0,
        SIZE.into(),
        [desc, driver + 2, driver + 4],
    ));
    vec![
        expect_reset(live(VSOCK).write(register::QUEUE_READY, 0)),
        expect_reset(start(negotiated(VSOCK))),
        expect_reset(offer(live(BALLOON), 0, 0, u16::MAX)),
        expect_reset(offer_one(live(BALLOON), (END, 4), 0, 0)),
        odd.store(rings(0)[1] + 4, 1)
            .write(register::QUEUE_NOTIFY, 0),
        expect_served(offer_one(live(BALLOON), page, NEXT, 0), 0),
        live(VSOCK).spin(),
        live(BALLOON)
            .write(register::QUEUE_NOTIFY, 0)
            .raw(&[0xeb, 0xf4]),
        Code::new().print("x").raw(&[0xeb, 0xfd]),
        Code::new().sleep(),
        Code::new().triple_fault(),
    ]
}

/// Runs all of them at once.
async fn round() {
    let vms: Vec<_> = hostile().into_iter().map(Code::boot).collect();
    for vm in &vms {
        // Waits until the guest ends by itself, or lets it run for a while.
        let _ = tokio::time::timeout(Duration::from_millis(200), vm.exited()).await;
    }
    for (index, vm) in vms.into_iter().enumerate() {
        // Every other one is only dropped.
        if index % 2 == 0 {
            vm.destroy();
        }
    }
}

#[tokio::test]
async fn hostile_guests_leave_nothing_behind() {
    if !kvm() || !alone() {
        return;
    }
    // The first round creates what belongs to the process: the library's process-wide threads and
    // the allocator's arenas for as many threads.
    round().await;
    let limit = patience(Duration::from_secs(2));
    // A teardown thread tears the dropped VMs down.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = Footprint::now();
    for _ in 0..3 {
        round().await;
    }
    before.assert_restored(16, limit);
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}
