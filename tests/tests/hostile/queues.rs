//! Attacks on queues: by the addresses of their rings and by their indices.

use hearth_tests::flat::MMIO_BASE;
use hearth_tests::kvm;
use hearth_vmm::virtio::mmio::register;

use crate::driver::*;

#[tokio::test]
async fn queues_that_cannot_be_are_refused_at_activation() {
    if !kvm() {
        return;
    }
    let good = rings(0).map(u64::from);
    let [desc, driver, device] = good;
    let outside = "outside guest memory";
    for (attack, size, parts, why) in [
        ("no entries", 0, good, "size"),
        ("not a power of two", 24, good, "size"),
        ("larger than the device allows", 1024, good, "size"),
        (
            "descriptors outside memory",
            8,
            [END, driver, device],
            outside,
        ),
        (
            "descriptors over the end of memory",
            8,
            [END - 16, driver, device],
            outside,
        ),
        (
            "driver ring over the end of memory",
            8,
            [desc, END - 8, device],
            outside,
        ),
        (
            "device ring over the end of memory",
            8,
            [desc, driver, END - 8],
            outside,
        ),
        (
            "descriptors that wrap around 2^64",
            8,
            [u64::MAX - 15, driver, device],
            outside,
        ),
        (
            "driver ring that wraps around 2^64",
            8,
            [desc, u64::MAX - 1, device],
            outside,
        ),
        (
            "a ring on the device itself",
            8,
            [desc, driver, u64::from(MMIO_BASE)],
            outside,
        ),
        ("descriptors askew", 8, [desc + 8, driver, device], "align"),
        ("driver ring askew", 8, [desc, driver + 1, device], "align"),
        ("device ring askew", 8, [desc, driver, device + 2], "align"),
    ] {
        for (index, name) in [(VSOCK, "vsock"), (BALLOON, "balloon")] {
            let others = (1..queues_of(index)).fold(negotiated(index), good_queue);
            let code = start(queue(others, 0, size, parts));
            assert_reset(&format!("{name}: {attack}"), index, code, why).await;
        }
    }
    for (device, why) in [
        (BALLOON, "without an inflate queue"),
        (VSOCK, "three queues"),
    ] {
        assert_reset(
            "a device without queues",
            device,
            start(negotiated(device)),
            why,
        )
        .await;
    }
}

/// The ring is laid out so that the field by which the device turns notifications on and off is the
/// driver's index. Regression: it held the event thread for ever, and this guest and all others of
/// that thread got no answer.
#[tokio::test]
async fn a_notification_switch_laid_over_the_index_does_not_hold_the_event_thread() {
    if !kvm() {
        return;
    }
    for (device, index) in [(VSOCK, 1), (BALLOON, 0)] {
        let [desc, driver, _] = rings(index).map(u64::from);
        let good = (0..queues_of(device)).filter(|other| *other != index);
        let code = good.fold(negotiated(device), good_queue);
        let odd = [desc, driver + 2, driver + 4];
        let code = start(queue(code, index, SIZE.into(), odd));
        let code = descriptor(code, index, 0, (BUFFER.into(), 44), 0, 0);
        // The available index of the ring that was moved by two bytes.
        let code = code
            .store(rings(index)[1] + 4, 1)
            .write(register::QUEUE_NOTIFY, index);
        // The device may see the ring before the guest has written all of it, so which fault it
        // finds is a race (played alone, it is the overlap). The test requires only that it finds
        // one and stops.
        assert_reset("notification switch over the index", device, code, "").await;
    }
}

#[tokio::test]
async fn indices_that_jump_need_a_reset() {
    if !kvm() {
        return;
    }
    for (attack, index) in [
        ("more chains than entries", SIZE + 1),
        ("as far as an index can be", u16::MAX),
    ] {
        for (device, queue) in [(VSOCK, 1), (BALLOON, 0)] {
            let code = offer(live(device), queue, 0, index);
            assert_reset(attack, device, code, "available ring index").await;
        }
    }
    let code = offer_one(live(BALLOON), (BUFFER.into(), 4), 0, 0);
    let code = code.await_change16(rings(0)[2] + 2, 0);
    let code = offer(code, 0, 0, 0);
    assert_reset(
        "an index that goes back",
        BALLOON,
        code,
        "available ring index",
    )
    .await;
}

/// The balloon discards the rings' memory while the device uses them: their index is zero again.
#[tokio::test]
async fn rings_that_their_driver_gives_away_need_a_reset() {
    if !kvm() {
        return;
    }
    let code = live(BALLOON).store(BUFFER, rings(0)[1] >> 12);
    let code = offer_one(code, (BUFFER.into(), 4), 0, 0);
    assert_reset(
        "the driver ring in the balloon",
        BALLOON,
        code,
        "available ring index",
    )
    .await;
    const REPORTING: u32 = 1 << 5;
    let code = live_with(BALLOON, REPORTING, 3);
    let ring = (rings(2)[1].into(), 4096);
    let code = offer(descriptor(code, 2, 0, ring, WRITE, 0), 2, 0, 1);
    assert_reset(
        "a report of the driver ring",
        BALLOON,
        code,
        "available ring index",
    )
    .await;
}
