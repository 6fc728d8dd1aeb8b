//! Attacks on the virtio-mmio registers.

use hearth_tests::flat::Code;
use hearth_tests::kvm;
use hearth_vmm::VmStatus;
use hearth_vmm::virtio::mmio::{register, status};

use crate::driver::*;

#[tokio::test]
async fn steps_out_of_order_need_a_reset() {
    if !kvm() {
        return;
    }
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK};
    for device in [VSOCK, BALLOON] {
        let fresh = || Code::new().device(device);
        let acknowledged = || fresh().write(register::STATUS, ACKNOWLEDGE | DRIVER);
        for (attack, code, why) in [
            (
                "running at once",
                fresh().write(register::STATUS, DRIVER_OK),
                "out of order",
            ),
            (
                "all bits at once",
                fresh().write(register::STATUS, UP.into()),
                "out of order",
            ),
            (
                "a bit cleared",
                acknowledged().write(register::STATUS, DRIVER),
                "was cleared",
            ),
            (
                "features before the driver",
                fresh().write(register::DRIVER_FEATURES, VERSION_1),
                "outside negotiation",
            ),
            (
                "features after they were settled",
                negotiated(device).write(register::DRIVER_FEATURES, VERSION_1),
                "outside negotiation",
            ),
            (
                "a queue before features",
                acknowledged().write(register::QUEUE_NUM, 8),
                "outside its phase",
            ),
            (
                "a queue moved while it is served",
                live(device).write(register::QUEUE_DESC_LOW, BUFFER),
                "outside its phase",
            ),
            (
                "a queue stopped while it is served",
                live(device).write(register::QUEUE_READY, 0),
                "outside its phase",
            ),
            (
                "a queue changed after it was ready",
                good_queue(negotiated(device), 0).write(register::QUEUE_NUM, 32),
                "a ready queue was changed",
            ),
            (
                "a queue of 65536 entries",
                negotiated(device).write(register::QUEUE_NUM, 0x1_0000),
                "larger than 65535",
            ),
            (
                "a register of one byte",
                fresh().write8(register::STATUS, 1),
                "32 bits wide",
            ),
            (
                "a register of two bytes",
                fresh().write16(register::STATUS, 1),
                "32 bits wide",
            ),
            (
                "a register of eight bytes",
                fresh().write64(register::STATUS, 1),
                "32 bits wide",
            ),
            (
                "a register askew",
                fresh().write(register::STATUS + 2, 1),
                "32 bits wide",
            ),
        ] {
            assert_reset(&format!("device {device}: {attack}"), device, code, why).await;
        }
    }
}

#[tokio::test]
async fn features_that_do_not_exist_are_not_taken() {
    if !kvm() {
        return;
    }
    use status::{ACKNOWLEDGE, DRIVER, FEATURES_OK};
    let before = ACKNOWLEDGE | DRIVER;
    for device in [VSOCK, BALLOON] {
        for (attack, selector, value, taken) in [
            ("a feature that was not offered", 0, 1 << 28, false),
            ("features beyond those that exist", 2, u32::MAX, true),
            (
                "a selector of features out of range",
                u32::MAX,
                u32::MAX,
                true,
            ),
        ] {
            let code = Code::new()
                .device(device)
                .write(register::STATUS, before)
                .write(register::DRIVER_FEATURES_SEL, 1)
                .write(register::DRIVER_FEATURES, VERSION_1)
                .write(register::DRIVER_FEATURES_SEL, selector)
                .write(register::DRIVER_FEATURES, value)
                .write(register::STATUS, before | FEATURES_OK)
                .print_register(register::STATUS);
            let (said, vm) = printed(code.report(1).spin()).await;
            let now = if taken { before | FEATURES_OK } else { before };
            assert_eq!(said, [u8::try_from(now).unwrap()], "{attack}");
            assert_no_fault(attack, &vm);
        }
    }
}

/// KVM splits such an access: each device sees its own part.
#[tokio::test]
async fn an_access_over_two_devices_is_the_fault_of_the_one_whose_register_it_hits() {
    if !kvm() {
        return;
    }
    // Writes four bytes, two of them at the start of the balloon's registers; then reads as many.
    let code = Code::new()
        .device(VSOCK)
        .write(0xffe, 0)
        .print_register(0xffe)
        .report(1)
        .spin();
    let (said, vm) = printed(code).await;
    assert_eq!(said, [0]);
    assert_fault("an access over two devices", &vm, BALLOON, "32 bits wide");
}

#[tokio::test]
async fn registers_of_no_device_read_zero_and_take_nothing() {
    if !kvm() {
        return;
    }
    // Offsets behind the last of this VM's two MMIO regions, and at the end of the page.
    let mut code = Code::new().device(VSOCK);
    for offset in [0x2000, 0x2070, 0x3000, 0x1f_fff8] {
        code = code
            .write64(offset, -1)
            .write8(offset + 1, 0xff)
            .print_register(offset);
    }
    let (said, vm) = printed(code.report(1).spin()).await;
    assert_eq!(said, [0; 4]);
    assert_no_fault("registers of no device", &vm);
    let accesses = vm.exits().mmio.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(accesses, 12, "each left the guest");
}

#[tokio::test]
async fn config_space_answers_at_every_offset_and_width() {
    if !kvm() {
        return;
    }
    for device in [VSOCK, BALLOON] {
        let mut code = Code::new().device(device);
        for offset in [0x100, 0x101, 0x104, 0x108, 0x1fc, 0xff8, 0xffd, 0xfff] {
            // mov al / ax / eax / rax, [rbx + offset]; mov byte and qword [rbx + offset], 0
            let at = u32::to_le_bytes(offset);
            for read in [
                &[0x8a, 0x83][..],
                &[0x66, 0x8b, 0x83],
                &[0x8b, 0x83],
                &[0x48, 0x8b, 0x83],
            ] {
                code = code.raw(read).raw(&at);
            }
            code = code.write8(offset.into(), 0);
            // Bytes beyond the region are the next device's registers.
            if offset + 8 <= 0x1000 {
                code = code.write64(offset.into(), 0);
            }
        }
        let (said, vm) = printed(code.print("done").report(1).spin()).await;
        assert_eq!(said, b"done", "device {device}");
        assert_no_fault("configuration space", &vm);
        assert!(vm.exits().total() > 46, "the accesses left the guest");
        assert_eq!(vm.balloon().actual(), 0);
    }
}

#[tokio::test]
async fn notifications_without_end_and_in_every_state_hold_nobody_up() {
    if !kvm() {
        return;
    }
    // l: mov dword [rbx + QUEUE_NOTIFY], 0; jmp l
    let storm = |code: Code| code.write(register::QUEUE_NOTIFY, 0).raw(&[0xeb, 0xf4]);
    let storms = [
        create(storm(Code::new().device(VSOCK)), None),
        create(storm(live(BALLOON)), None),
    ];
    for vm in &storms {
        vm.resume().unwrap();
    }
    // Meanwhile a third VM, on one of the event threads of the first two, is served.
    let page = (BUFFER.into(), 4);
    assert_served(
        "beside a storm",
        offer_one(live(BALLOON).store(BUFFER, 0x500), page, 0, 0),
    )
    .await;
    let code = offer(live(VSOCK), 1, 0, 99);
    assert_reset("beside a storm", VSOCK, code, "available ring index").await;
    for vm in storms {
        assert_eq!(vm.status(), VmStatus::Running);
        assert_no_fault("a storm of notifications", &vm);
        vm.destroy();
    }
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}

#[tokio::test]
async fn a_device_that_wants_a_reset_comes_back_after_one() {
    if !kvm() {
        return;
    }
    let broken = live(BALLOON)
        .write(register::QUEUE_DESC_LOW, BUFFER)
        .await_register(register::STATUS, 0x40)
        .write(register::STATUS, 0);
    let again = live(BALLOON).store(BUFFER, 0x500);
    let again = offer_one(again, (BUFFER.into(), 4), 0, 0);
    let code = broken.raw(&expect_served(again, 0).bytes());
    let (said, vm) = printed(code).await;
    assert_eq!(said, [UP]);
    assert_fault("broken, then reset", &vm, BALLOON, "outside its phase");
    assert!(vm.device_faults().iter().all(|faults| !faults.needs_reset));
}
