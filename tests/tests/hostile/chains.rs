//! Attacks on descriptor chains, mostly of the balloon, whose requests are one buffer of page
//! numbers.

use std::time::{Duration, Instant};

use hearth_tests::flat::Code;
use hearth_tests::{kvm, patience, within};
use hearth_vmm::virtio::mmio::register;
use hearth_vmm::{Vm, VmConfig};

use crate::driver::*;

#[tokio::test]
async fn an_honest_driver_gets_its_buffers_back() {
    if !kvm() {
        return;
    }
    // The balloon accepts a page number; without this the attacks below would prove nothing.
    let code = live(BALLOON).store(BUFFER, 0x500);
    assert_served("none", offer_one(code, (BUFFER.into(), 4), 0, 0)).await;
}

#[tokio::test]
async fn chains_that_lead_nowhere_need_a_reset_or_are_given_back() {
    if !kvm() {
        return;
    }
    let page = |code: Code| code.store(BUFFER, 0x500);
    let buffer = (u64::from(BUFFER), 4);
    let outside = "outside guest memory";
    for (attack, place, why) in [
        ("a buffer outside memory", (END, 4), outside),
        ("a buffer over the end of memory", (END - 4, 8), outside),
        (
            "a buffer at the end of the address space",
            (u64::MAX - 3, 8),
            outside,
        ),
        (
            "a buffer of 4 GiB",
            (u64::from(BUFFER), u32::MAX),
            "more page numbers",
        ),
    ] {
        let code = offer_one(live(BALLOON), place, 0, 0);
        assert_reset(attack, BALLOON, code, why).await;
    }
    let code = offer(live(BALLOON), 0, SIZE, 1);
    assert_reset("a head beyond the table", BALLOON, code, "descriptor index").await;
    let nested = |code| descriptor_at(code, BUFFER, (BUFFER.into(), 16), INDIRECT, 0);
    for (attack, code) in [
        (
            "a chain that bites its tail",
            offer_one(page(live(BALLOON)), buffer, NEXT, 0),
        ),
        (
            "a chain that goes on outside the table",
            offer_one(page(live(BALLOON)), buffer, NEXT, 500),
        ),
        (
            "a buffer of no bytes",
            offer_one(live(BALLOON), (BUFFER.into(), 0), 0, 0),
        ),
        (
            "page numbers in a buffer to be written",
            offer_one(page(live(BALLOON)), buffer, WRITE, 0),
        ),
        (
            "page numbers outside memory",
            offer_one(live(BALLOON).store(BUFFER, u32::MAX), buffer, 0, 0),
        ),
        (
            "an indirect table in itself",
            offer_one(nested(live(BALLOON)), (BUFFER.into(), 16), INDIRECT, 0),
        ),
        (
            "an indirect table of 4 GiB",
            offer_one(live(BALLOON), (BUFFER.into(), 0xffff_fff0), INDIRECT, 0),
        ),
    ] {
        assert_served(attack, code).await;
    }
}

#[tokio::test]
async fn a_page_given_to_the_balloon_is_zeroed_here_and_nowhere_else() {
    if !kvm() {
        return;
    }
    const PAGE: u32 = 0x50_0000;
    // A neighbour writes a mark into the page of the same number and prints it without end (jmp
    // back).
    let neighbour = Code::new().store(PAGE, 0x4e).print_byte(PAGE);
    let neighbour = neighbour.raw(&[0xeb, 0xf2]).boot();
    let code = live(BALLOON).store(PAGE, 0x4d).store(BUFFER, PAGE >> 12);
    let code = offer_one(code.print_byte(PAGE), (BUFFER.into(), 4), 0, 0);
    let code = code.await_change16(rings(0)[2] + 2, 0).print_byte(PAGE);
    let (said, vm) = printed(code.report(1).spin()).await;
    assert_eq!(said, [0x4d, 0]);
    assert_no_fault("a page of the balloon", &vm);
    let seen = neighbour.console().since(0).next;
    let later = within(2, "neighbour", neighbour.console().read(seen)).await;
    assert!(!later.bytes.is_empty());
    assert!(later.bytes.iter().all(|byte| *byte == 0x4e));
}

/// Two guests, one for each event thread, report 2.5 GiB in each of eight chains, and offer each
/// chain again as soon as it comes back.
#[tokio::test]
async fn reports_of_gigabytes_hold_neither_a_neighbour_nor_the_host() {
    if !kvm() {
        return;
    }
    const REPORTING: u32 = 1 << 5;
    let [_, driver, device] = rings(2);
    let mut code = live_with(BALLOON, REPORTING, 3);
    code = descriptor(code, 2, 0, (64 << 20, 0xa000_0000), WRITE, 0);
    // l: mov ax, [device + 2]; add ax, 8; mov [driver + 2], ax; mov dword [rbx + QUEUE_NOTIFY], 2;
    // jmp l
    let code = code
        .raw(&[0x66, 0x8b, 0x04, 0x25])
        .raw(&(device + 2).to_le_bytes())
        .raw(&[0x66, 0x83, 0xc0, SIZE as u8])
        .raw(&[0x66, 0x89, 0x04, 0x25])
        .raw(&(driver + 2).to_le_bytes())
        .write(register::QUEUE_NOTIFY, 2)
        .raw(&[0xeb, 0xe0]);
    let config = VmConfig::flat(code.bytes()).memory_mib(3 << 10);
    let config = config.build().unwrap();
    let hostile = [(); 2].map(|()| Vm::create(&config).unwrap());
    for vm in &hostile {
        vm.resume().unwrap();
    }
    let limit = patience(Duration::from_secs(10));
    for vm in &hostile {
        let begin = Instant::now();
        while vm.balloon().reported() < 20 << 10 {
            assert!(begin.elapsed() < limit, "{} MiB", vm.balloon().reported());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    for _ in 0..3 {
        let page = (BUFFER.into(), 4);
        let honest = live(BALLOON).store(BUFFER, 0x500);
        assert_served("beside reports of gigabytes", offer_one(honest, page, 0, 0)).await;
    }
    for vm in hostile {
        assert_no_fault("reports of gigabytes", &vm);
        vm.pause().unwrap();
        vm.resume().unwrap();
        vm.kill();
        vm.destroy();
    }
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}
