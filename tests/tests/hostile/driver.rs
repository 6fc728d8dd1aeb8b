//! Drivers of a few instructions, and checks of the device that they drove.

use std::path::Path;

use hearth_tests::flat::Code;
use hearth_tests::within;
use hearth_vmm::virtio::mmio::{register, status};
use hearth_vmm::{DeviceFaults, Exit, Vm, VmConfig};

pub(crate) const VSOCK: u32 = 0;
pub(crate) const BALLOON: u32 = 1;
/// The first pmem device, of a guest that has one.
pub(crate) const IMAGE: u32 = 2;
/// Where the test drivers put their queues: descriptors, then the driver ring, then the device
/// ring.
const RINGS: u32 = 0x30_0000;
const RING: u32 = 0x1000;
/// A buffer of the driver.
pub(crate) const BUFFER: u32 = 0x40_0000;
/// End of the guest's memory.
pub(crate) const END: u64 = 32 << 20;
/// Entries of a queue: the maximum for the socket device's event queue.
pub(crate) const SIZE: u16 = 8;
pub(crate) const VERSION_1: u32 = 1;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const UP: u8 =
    (status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK) as u8;
const NEEDS_RESET: u8 = status::NEEDS_RESET as u8;

/// Negotiates features, up to the point at which queues are configured; `features` are the low 32
/// bits.
pub(crate) fn negotiated_with(device: u32, features: u32) -> Code {
    use status::{ACKNOWLEDGE, DRIVER, FEATURES_OK};
    Code::new()
        .device(device)
        .write(register::STATUS, ACKNOWLEDGE)
        .write(register::STATUS, ACKNOWLEDGE | DRIVER)
        .write(register::DRIVER_FEATURES_SEL, 0)
        .write(register::DRIVER_FEATURES, features)
        .write(register::DRIVER_FEATURES_SEL, 1)
        .write(register::DRIVER_FEATURES, VERSION_1)
        .write(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
}

pub(crate) fn negotiated(device: u32) -> Code {
    negotiated_with(device, 0)
}

/// Returns the addresses of the descriptors, driver ring and device ring of queue `index`.
pub(crate) fn rings(index: u32) -> [u32; 3] {
    let base = RINGS + index * 0x1_0000;
    [base, base + RING, base + 2 * RING]
}

pub(crate) fn queue(code: Code, index: u32, size: u32, [desc, driver, device]: [u64; 3]) -> Code {
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

/// Configures a valid queue.
pub(crate) fn good_queue(code: Code, index: u32) -> Code {
    queue(code, index, SIZE.into(), rings(index).map(u64::from))
}

/// Returns the number of queues that a device needs.
pub(crate) fn queues_of(device: u32) -> u32 {
    match device {
        VSOCK => 3,
        BALLOON => 2,
        _ => 1,
    }
}

/// Starts a device that serves its first `queues` queues.
pub(crate) fn live_with(device: u32, features: u32, queues: u32) -> Code {
    start((0..queues).fold(negotiated_with(device, features), good_queue))
}

/// Starts a device with the queues that it needs.
pub(crate) fn live(device: u32) -> Code {
    live_with(device, 0, queues_of(device))
}

pub(crate) fn start(code: Code) -> Code {
    code.write(register::STATUS, UP.into())
}

/// Writes a descriptor of a queue.
pub(crate) fn descriptor(
    code: Code,
    queue: u32,
    index: u32,
    place: (u64, u32),
    flags: u16,
    next: u16,
) -> Code {
    descriptor_at(code, rings(queue)[0] + 16 * index, place, flags, next)
}

/// Writes a descriptor at any address.
pub(crate) fn descriptor_at(
    code: Code,
    at: u32,
    (address, len): (u64, u32),
    flags: u16,
    next: u16,
) -> Code {
    code.store64(at, address)
        .store(at + 8, len)
        .store16(at + 12, flags)
        .store16(at + 14, next)
}

/// Makes chain `head` available as the first of a queue and notifies the device.
pub(crate) fn offer(code: Code, queue: u32, head: u16, idx: u16) -> Code {
    let driver = rings(queue)[1];
    code.store16(driver + 4, head)
        .store16(driver + 2, idx)
        .write(register::QUEUE_NOTIFY, queue)
}

/// Offers one descriptor as the first of the first queue.
pub(crate) fn offer_one(code: Code, place: (u64, u32), flags: u16, next: u16) -> Code {
    offer(descriptor(code, 0, 0, place, flags, next), 0, 0, 1)
}

/// Waits for `NEEDS_RESET`, prints the status, powers off.
pub(crate) fn expect_reset(code: Code) -> Code {
    code.await_register(register::STATUS, NEEDS_RESET)
        .print_register(register::STATUS)
        .report(1)
        .spin()
}

/// Waits until a queue's device ring has an entry, prints the status, powers off.
pub(crate) fn expect_served(code: Code, queue: u32) -> Code {
    code.await_change16(rings(queue)[2] + 2, 0)
        .print_register(register::STATUS)
        .report(1)
        .spin()
}

/// Creates a VM with this code. It does not run yet.
pub(crate) fn create(code: Code, image: Option<&Path>) -> Vm {
    let mut config = VmConfig::flat(code.bytes()).memory_mib(32).console(true);
    if let Some(image) = image {
        config = config.pmem(image);
    }
    Vm::create(&config.build().unwrap()).unwrap()
}

/// Runs a hostile guest to its own end. Returns what it printed.
pub(crate) async fn printed(code: Code) -> (Vec<u8>, Vm) {
    let vm = create(code, None);
    let said = run(&vm).await;
    (said, vm)
}

/// Resumes a VM and waits until its guest powers off. Returns what it printed.
pub(crate) async fn run(vm: &Vm) -> Vec<u8> {
    vm.resume().unwrap();
    let exit = within(2, "end of the hostile guest", vm.exited()).await;
    let said = vm.console().since(0).bytes;
    assert_eq!(exit, Exit::PowerOff, "after {said:?}");
    said
}

/// Asserts that the attack puts its device into the needs-reset state, by the branch whose message
/// contains `why`, and that no other device has a fault.
pub(crate) async fn assert_reset(attack: &str, device: u32, code: Code, why: &str) {
    let (said, vm) = printed(expect_reset(code)).await;
    let [state] = said[..] else {
        panic!("{attack}: {said:?}");
    };
    assert_ne!(state & NEEDS_RESET, 0, "{attack}: {state:#x}");
    assert_fault(attack, &vm, device, why);
}

/// Asserts that the VM's devices had one fault, in `device`, whose message contains `why`.
#[track_caller]
pub(crate) fn assert_fault(attack: &str, vm: &Vm, device: u32, why: &str) {
    for (index, faults) in (0u32..).zip(vm.device_faults()) {
        let DeviceFaults { count, last, .. } = faults;
        if index == device {
            let last = last.unwrap_or_default();
            assert_eq!(count, 1, "{attack}: {last}");
            assert!(last.to_lowercase().contains(why), "{attack}: {last}");
        } else {
            assert_eq!(count, 0, "{attack}: device {index}: {last:?}");
        }
    }
}

/// Asserts that no device found a fault with its driver.
#[track_caller]
pub(crate) fn assert_no_fault(attack: &str, vm: &Vm) {
    let faults = vm.device_faults();
    assert!(
        !faults.is_empty() && faults.iter().all(|f| f.count == 0),
        "{attack}: {faults:?}"
    );
}

/// Asserts that the guest gets its chain back and that no device found a fault.
pub(crate) async fn assert_served(attack: &str, code: Code) {
    let (said, vm) = printed(expect_served(code, 0)).await;
    assert_eq!(said, [UP], "{attack}");
    assert_no_fault(attack, &vm);
}
