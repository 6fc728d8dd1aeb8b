#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Guests of a few instructions that drive the virtio devices as no driver may: each says on its
//! console what became of the device, and none may reach anything beyond its own VM.

use hearth_tests::flat::{Code, MMIO_BASE};
use hearth_tests::{kvm, within};
use hearth_vmm::virtio::mmio::{register, status};
use hearth_vmm::{Exit, Vm, VmStatus};

const VSOCK: u32 = 0;
const BALLOON: u32 = 1;
/// Where the test drivers put their queues: descriptors, then the driver's, then the device's ring.
const RINGS: u32 = 0x30_0000;
const RING: u32 = 0x1000;
/// A buffer of the driver.
const BUFFER: u32 = 0x40_0000;
const VERSION_1: u32 = 1;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

fn status_bits(bits: u32) -> u8 {
    u8::try_from(bits).unwrap()
}

/// Up to the moment at which queues are configured.
fn negotiated(device: u32) -> Code {
    use status::{ACKNOWLEDGE, DRIVER, FEATURES_OK};
    Code::new()
        .device(device)
        .write(register::STATUS, ACKNOWLEDGE)
        .write(register::STATUS, ACKNOWLEDGE | DRIVER)
        .write(register::DRIVER_FEATURES_SEL, 1)
        .write(register::DRIVER_FEATURES, VERSION_1)
        .write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
}

/// Where queue `index` has its descriptors, driver ring and device ring.
fn rings(index: u32) -> [u32; 3] {
    let base = RINGS + index * 0x1_0000;
    [base, base + RING, base + 2 * RING]
}

fn queue(code: Code, index: u32, size: u32, [desc, driver, device]: [u64; 3]) -> Code {
    let low = |address: u64| (address & 0xffff_ffff) as u32;
    let high = |address: u64| (address >> 32) as u32;
    code.write(register::QUEUE_SEL, index)
        .write(register::QUEUE_NUM, size)
        .write(register::QUEUE_DESC_LOW, low(desc))
        .write(register::QUEUE_DESC_HIGH, high(desc))
        .write(register::QUEUE_DRIVER_LOW, low(driver))
        .write(register::QUEUE_DRIVER_HIGH, high(driver))
        .write(register::QUEUE_DEVICE_LOW, low(device))
        .write(register::QUEUE_DEVICE_HIGH, high(device))
        .write(register::QUEUE_READY, 1)
}

/// A device that serves its first `queues` queues of 16 entries.
fn live(device: u32, queues: u32) -> Code {
    let code = (0..queues).fold(negotiated(device), |code, index| {
        queue(code, index, 16, rings(index).map(u64::from))
    });
    start(code)
}

fn start(code: Code) -> Code {
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    code.write(register::STATUS, all)
}

/// A descriptor of a queue.
fn descriptor(
    code: Code,
    queue: u32,
    index: u32,
    (address, len): (u64, u32),
    flags: u16,
    next: u16,
) -> Code {
    let at = rings(queue)[0] + 16 * index;
    code.store64(at, address)
        .store(at + 8, len)
        .store16(at + 12, flags)
        .store16(at + 14, next)
}

/// Makes chain `head` available as the first of a queue and says so.
fn offer(code: Code, queue: u32, head: u16, idx: u16) -> Code {
    let driver = rings(queue)[1];
    code.store16(driver + 4, head)
        .store16(driver + 2, idx)
        .write(register::QUEUE_NOTIFY, queue)
}

/// Waits for `NEEDS_RESET`, prints the status, powers off.
fn expect_reset(code: Code) -> Code {
    code.await_register(register::STATUS, status_bits(status::NEEDS_RESET))
        .print_register(register::STATUS)
        .report(1)
        .spin()
}

/// Waits until a queue's device ring has an entry, prints the status, powers off.
fn expect_served(code: Code, queue: u32) -> Code {
    code.await_change16(rings(queue)[2] + 2, 0)
        .print_register(register::STATUS)
        .report(1)
        .spin()
}

/// Runs a hostile guest to its own end. Returns what it printed.
async fn printed(code: Code) -> (Vec<u8>, Vm) {
    let vm = code.boot();
    let exit = within(2, "end of the hostile guest", vm.exited()).await;
    assert_eq!(exit, Exit::PowerOff);
    (vm.console().since(0).bytes, vm)
}

/// The guest's attack ends with a device that wants a reset, and another VM is none the worse.
async fn assert_reset(attack: &str, code: Code) {
    let (bytes, _vm) = printed(expect_reset(code)).await;
    let [state] = bytes[..] else {
        panic!("{attack}: {bytes:?}");
    };
    assert_ne!(
        u32::from(state) & status::NEEDS_RESET,
        0,
        "{attack}: {state:#x}"
    );
}

#[tokio::test]
async fn an_honest_driver_gets_its_buffers_back() {
    if !kvm() {
        return;
    }
    // The balloon takes a page number; without this the attacks below prove nothing.
    let code = live(BALLOON, 2).store(BUFFER, 0x500);
    let code = descriptor(code, 0, 0, (BUFFER.into(), 4), 0, 0);
    let (bytes, _vm) = printed(expect_served(offer(code, 0, 0, 1), 0)).await;
    let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
    assert_eq!(bytes, [status_bits(ok)]);
}

#[tokio::test]
async fn steps_out_of_order_need_a_reset() {
    if !kvm() {
        return;
    }
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
    for device in [VSOCK, BALLOON] {
        let fresh = || Code::new().device(device);
        let acknowledged = || fresh().write(register::STATUS, ACKNOWLEDGE | DRIVER);
        for (attack, code) in [
            (
                "running at once",
                fresh().write(register::STATUS, DRIVER_OK),
            ),
            (
                "all bits at once",
                fresh().write(
                    register::STATUS,
                    ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
                ),
            ),
            (
                "a bit cleared",
                acknowledged().write(register::STATUS, DRIVER),
            ),
            (
                "features before the driver",
                fresh().write(register::DRIVER_FEATURES, VERSION_1),
            ),
            (
                "features after they were settled",
                negotiated(device).write(register::DRIVER_FEATURES, VERSION_1),
            ),
            (
                "a queue before features",
                acknowledged().write(register::QUEUE_NUM, 16),
            ),
            (
                "a queue moved while it is served",
                live(device, 2).write(register::QUEUE_DESC_LOW, BUFFER),
            ),
            (
                "a queue stopped while it is served",
                live(device, 2).write(register::QUEUE_READY, 0),
            ),
            (
                "a queue changed after it was ready",
                queue(negotiated(device), 0, 16, rings(0).map(u64::from))
                    .write(register::QUEUE_NUM, 32),
            ),
            ("a register in bytes", fresh().write8(register::STATUS, 1)),
            ("a register askew", fresh().write(register::STATUS + 2, 1)),
        ] {
            assert_reset(&format!("device {device}: {attack}"), code).await;
        }
    }
}

#[tokio::test]
async fn queues_that_cannot_be_are_refused_at_activation() {
    if !kvm() {
        return;
    }
    let good = rings(0).map(u64::from);
    let [desc, driver, device] = good;
    let end = 32 << 20;
    for (attack, size, parts) in [
        ("no entries", 0, good),
        ("not a power of two", 24, good),
        ("larger than the device allows", 1024, good),
        ("descriptors outside memory", 16, [end, driver, device]),
        (
            "descriptors over the end of memory",
            16,
            [end - 16, driver, device],
        ),
        (
            "driver ring over the end of memory",
            16,
            [desc, end - 8, device],
        ),
        (
            "device ring over the end of memory",
            16,
            [desc, driver, end - 8],
        ),
        (
            "descriptors at the end of the address space",
            16,
            [u64::MAX - 15, driver, device],
        ),
        (
            "a ring on the device itself",
            16,
            [desc, driver, u64::from(MMIO_BASE)],
        ),
        ("descriptors askew", 16, [desc + 8, driver, device]),
        ("driver ring askew", 16, [desc, driver + 1, device]),
        ("device ring askew", 16, [desc, driver, device + 2]),
    ] {
        for (index, name) in [(VSOCK, "vsock"), (BALLOON, "balloon")] {
            let others = (1..3).fold(negotiated(index), |code, other| {
                queue(code, other, 16, rings(other).map(u64::from))
            });
            let code = start(queue(others, 0, size, parts));
            assert_reset(&format!("{name}: {attack}"), code).await;
        }
    }
    // A queue that does not exist at all, and devices without their queues.
    assert_reset("balloon without queues", start(negotiated(BALLOON))).await;
    assert_reset("vsock without queues", start(negotiated(VSOCK))).await;
}

#[tokio::test]
async fn chains_that_lead_nowhere_need_a_reset_or_are_given_back() {
    if !kvm() {
        return;
    }
    let page = |code: Code| code.store(BUFFER, 0x500);
    let buffer = (u64::from(BUFFER), 4);
    let end = 32 << 20;
    for (attack, code) in [
        ("a head beyond the table", offer(live(BALLOON, 2), 0, 16, 1)),
        (
            "more chains than entries",
            offer(live(BALLOON, 2), 0, 0, 17),
        ),
        (
            "an index that jumps by 65535",
            offer(live(BALLOON, 2), 0, 0, u16::MAX),
        ),
        (
            "a buffer outside memory",
            offer(descriptor(live(BALLOON, 2), 0, 0, (end, 4), 0, 0), 0, 0, 1),
        ),
        (
            "a buffer over the end of memory",
            offer(
                descriptor(live(BALLOON, 2), 0, 0, (end - 4, 8), 0, 0),
                0,
                0,
                1,
            ),
        ),
        (
            "a buffer at the end of the address space",
            offer(
                descriptor(live(BALLOON, 2), 0, 0, (u64::MAX - 3, 8), 0, 0),
                0,
                0,
                1,
            ),
        ),
        (
            "a buffer of 4 GiB",
            offer(
                descriptor(live(BALLOON, 2), 0, 0, (u64::from(BUFFER), u32::MAX), 0, 0),
                0,
                0,
                1,
            ),
        ),
    ] {
        assert_reset(attack, code).await;
    }
    for (attack, code) in [
        (
            "a chain that bites its tail",
            offer(
                descriptor(page(live(BALLOON, 2)), 0, 0, buffer, NEXT, 0),
                0,
                0,
                1,
            ),
        ),
        (
            "a chain that goes on outside the table",
            offer(
                descriptor(page(live(BALLOON, 2)), 0, 0, buffer, NEXT, 500),
                0,
                0,
                1,
            ),
        ),
        (
            "a buffer of no bytes",
            offer(
                descriptor(live(BALLOON, 2), 0, 0, (BUFFER.into(), 0), 0, 0),
                0,
                0,
                1,
            ),
        ),
        (
            "page numbers in a buffer to be written",
            offer(
                descriptor(page(live(BALLOON, 2)), 0, 0, buffer, WRITE, 0),
                0,
                0,
                1,
            ),
        ),
        (
            "page numbers outside memory",
            offer(
                descriptor(live(BALLOON, 2).store(BUFFER, u32::MAX), 0, 0, buffer, 0, 0),
                0,
                0,
                1,
            ),
        ),
    ] {
        let (bytes, _vm) = printed(expect_served(code, 0)).await;
        let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        assert_eq!(bytes, [status_bits(ok)], "{attack}");
    }
}

#[tokio::test]
async fn packets_that_lie_need_a_reset() {
    if !kvm() {
        return;
    }
    const TRANSMIT: u32 = 1;
    let end = 32 << 20;
    for (attack, packet) in [
        ("a packet shorter than its header", (u64::from(BUFFER), 43)),
        ("a packet outside memory", (end, 44)),
        ("a packet over the end of memory", (end - 40, 44)),
    ] {
        let code = descriptor(live(VSOCK, 3), TRANSMIT, 0, packet, 0, 0);
        assert_reset(attack, offer(code, TRANSMIT, 0, 1)).await;
    }
    // More payload than the chain holds: the header's length at offset 24.
    let code = live(VSOCK, 3).store(BUFFER + 24, u32::MAX);
    let code = descriptor(code, TRANSMIT, 0, (BUFFER.into(), 44), 0, 0);
    assert_reset("a packet of 4 GiB", offer(code, TRANSMIT, 0, 1)).await;
}

#[tokio::test]
async fn a_device_that_wants_a_reset_comes_back_after_one() {
    if !kvm() {
        return;
    }
    let broken = live(BALLOON, 2)
        .write(register::QUEUE_DESC_LOW, BUFFER)
        .await_register(register::STATUS, status_bits(status::NEEDS_RESET))
        .write(register::STATUS, 0);
    let again = live(BALLOON, 2).store(BUFFER, 0x500);
    let again = descriptor(again, 0, 0, (BUFFER.into(), 4), 0, 0);
    let code = broken.raw(&expect_served(offer(again, 0, 0, 1), 0).bytes());
    let (bytes, _vm) = printed(code).await;
    let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
    assert_eq!(bytes, [status_bits(ok)]);
}

#[tokio::test]
async fn notifications_without_end_and_in_every_state_hold_nobody_up() {
    if !kvm() {
        return;
    }
    // l: mov dword [rbx + QUEUE_NOTIFY], 0; jmp l
    let storm = |code: Code| code.write(register::QUEUE_NOTIFY, 0).raw(&[0xeb, 0xf4]);
    let storms = [
        storm(Code::new().device(VSOCK)).boot(),
        storm(live(BALLOON, 2)).boot(),
    ];
    // A third VM, on one of the event threads of the first two, is served meanwhile.
    for device in [VSOCK, BALLOON] {
        let code = live(device, 3).store(BUFFER, 0x500);
        let code = descriptor(code, 0, 0, (BUFFER.into(), 4), 0, 0);
        if device == BALLOON {
            let (bytes, _vm) = printed(expect_served(offer(code, 0, 0, 1), 0)).await;
            assert_eq!(bytes.len(), 1);
        } else {
            assert_reset("a jumping index", offer(code, 1, 0, 99)).await;
        }
    }
    for vm in storms {
        assert_eq!(vm.status(), VmStatus::Running);
        vm.destroy();
    }
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}

#[tokio::test]
async fn a_page_given_to_the_balloon_is_zeroed_here_and_nowhere_else() {
    if !kvm() {
        return;
    }
    const PAGE: u32 = 0x50_0000;
    let print_page = |code: Code| {
        // mov al, [PAGE]; mov dx, 0x3f8; out dx, al
        let load = [&[0x8a, 0x04, 0x25][..], &PAGE.to_le_bytes()].concat();
        code.raw(&load).raw(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    };
    // A neighbour keeps a mark in the page of the same number, and prints it without end (jmp back).
    let neighbour = print_page(Code::new().store(PAGE, 0x4e))
        .raw(&[0xeb, 0xf2])
        .boot();
    let code = live(BALLOON, 2).store(PAGE, 0x4d).store(BUFFER, PAGE >> 12);
    let code = descriptor(print_page(code), 0, 0, (BUFFER.into(), 4), 0, 0);
    let code = offer(code, 0, 0, 1).await_change16(rings(0)[2] + 2, 0);
    let (bytes, _vm) = printed(print_page(code).report(1).spin()).await;
    assert_eq!(bytes, [0x4d, 0]);
    let seen = neighbour.console().since(0).next;
    let later = within(2, "neighbour", neighbour.console().read(seen)).await;
    assert!(!later.bytes.is_empty());
    assert!(later.bytes.iter().all(|byte| *byte == 0x4e));
}

#[tokio::test]
async fn config_space_answers_at_every_offset_and_width() {
    if !kvm() {
        return;
    }
    for device in [VSOCK, BALLOON] {
        let mut code = Code::new().device(device);
        for offset in [0x100, 0x101, 0x104, 0x108, 0x1fc, 0xffc, 0xffd, 0xfff] {
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
            code = code.raw(&[0xc6, 0x83]).raw(&at).raw(&[0]);
            code = code.raw(&[0x48, 0xc7, 0x83]).raw(&at).raw(&[0; 4]);
        }
        let (bytes, vm) = printed(code.print("done").report(1).spin()).await;
        assert_eq!(bytes, b"done", "device {device}");
        assert!(vm.exits().total() > 48, "the accesses left the guest");
    }
}
