//! Attacks by means of the processor: MSRs, hypercalls, code and tables where there is no memory.
//! If KVM cannot continue, the exit of that VM tells the cause; a neighbour continues.

use std::sync::atomic::Ordering;
use std::time::Duration;

use hearth_tests::flat::{Code, MMIO_BASE};
use hearth_tests::{kvm, within};
use hearth_vmm::{Exit, Vm, VmStatus};

use crate::driver::*;

/// Runs a guest that may end in any way.
async fn end(code: Code) -> (Exit, Vm) {
    let vm = create(code, None);
    vm.resume().unwrap();
    let exit = within(2, "end of the hostile guest", vm.exited()).await;
    assert_eq!(vm.status(), VmStatus::Ended(exit.clone()));
    assert!(vm.resume().is_err(), "what has ended stays so");
    (exit, vm)
}

#[tokio::test]
async fn a_triple_fault_ends_its_guest_and_no_other() {
    if !kvm() {
        return;
    }
    let neighbour = Code::new().print("n").spin().boot();
    let (exit, _vm) = end(Code::new().triple_fault()).await;
    assert_eq!(exit, Exit::TripleFault);
    assert_eq!(neighbour.status(), VmStatus::Running);
}

/// The processor answers with a fault; without a handler it becomes a triple fault.
#[tokio::test]
async fn model_registers_that_do_not_exist_are_the_guests_fault() {
    if !kvm() {
        return;
    }
    // lidt of an empty table; mov ecx, register; xor eax, eax; xor edx, edx; rdmsr or wrmsr
    let table = [0x0f, 0x01, 0x1c, 0x25, 0x00, 0x00, 0x20, 0x00];
    for (attack, register, access) in [
        ("a read", 0xdead_beef_u32, 0x32),
        ("a write", 0xdead_beef, 0x30),
        ("a read of the last", u32::MAX, 0x32),
    ] {
        let code = Code::new()
            .raw(&table)
            .raw(&[0xb9])
            .raw(&register.to_le_bytes())
            .raw(&[0x31, 0xc0, 0x31, 0xd2, 0x0f, access]);
        let (exit, vm) = end(code.print("went on").report(1).spin()).await;
        assert_eq!(exit, Exit::TripleFault, "{attack}");
        assert_eq!(vm.console().text(), "", "{attack}");
    }
}

#[tokio::test]
async fn questions_about_the_processor_without_end_are_answered() {
    if !kvm() {
        return;
    }
    // mov eax, r8d; mov ecx, eax; cpuid: existing leaves and many that do not exist; rbx is lost.
    let ask = Code::new().raw(&[0x44, 0x89, 0xc0, 0x89, 0xc1, 0x0f, 0xa2]);
    let (said, vm) = printed(Code::new().repeat(1000, ask).print("done").report(1).spin()).await;
    assert_eq!(said, b"done");
    assert_no_fault("CPUID", &vm);
}

#[tokio::test]
async fn memory_that_is_not_there_reads_zero_and_takes_nothing() {
    if !kvm() {
        return;
    }
    // Addresses behind the end of memory, and at the end of the first GiB, which the page tables
    // map.
    let mut code = Code::new();
    for address in [32 << 20, 64 << 20, (1 << 30) - 8] {
        code = code.store64(address, u64::MAX).print_byte(address);
    }
    let (said, vm) = printed(code.report(1).spin()).await;
    assert_eq!(said, [0; 3]);
    assert_eq!(
        vm.exits().mmio.load(Ordering::Relaxed),
        9,
        "each left the guest"
    );
}

/// KVM does not fetch instructions from a device.
#[tokio::test]
async fn code_in_a_devices_registers_ends_its_guest() {
    if !kvm() {
        return;
    }
    // mov eax, address; jmp rax
    let jump = [&[0xb8][..], &MMIO_BASE.to_le_bytes(), &[0xff, 0xe0]].concat();
    let (exit, vm) = end(Code::new().device(VSOCK).raw(&jump).report(1).spin()).await;
    assert!(
        matches!(exit, Exit::InternalError(_) | Exit::TripleFault),
        "{exit}"
    );
    assert_no_fault("code in registers", &vm);
}

/// Each push writes eight bytes to a register of four.
#[tokio::test]
async fn a_stack_in_a_devices_registers_is_a_fault_of_the_driver() {
    if !kvm() {
        return;
    }
    // mov esp, address; push rax
    let at = (MMIO_BASE + 0x80).to_le_bytes();
    let push = [&[0xbc][..], &at, &[0x50]].concat();
    let code = Code::new().device(VSOCK).raw(&push);
    let (said, vm) = printed(code.print("done").report(1).spin()).await;
    assert_eq!(said, b"done");
    assert_fault("a stack in registers", &vm, VSOCK, "32 bits wide");
}

#[tokio::test]
async fn page_tables_in_a_devices_registers_end_their_guest() {
    if !kvm() {
        return;
    }
    // lidt of an empty table; mov eax, address; mov cr3, rax
    let code = Code::new()
        .device(VSOCK)
        .raw(&[0x0f, 0x01, 0x1c, 0x25, 0x00, 0x00, 0x20, 0x00])
        .raw(&[0xb8])
        .raw(&MMIO_BASE.to_le_bytes())
        .raw(&[0x0f, 0x22, 0xd8]);
    let (exit, vm) = end(code.print("went on").report(1).spin()).await;
    assert!(
        matches!(exit, Exit::InternalError(_) | Exit::TripleFault),
        "{exit}"
    );
    assert_eq!(vm.console().text(), "");
}

/// Known and unknown hypercalls: answered on hardware; where ring 0 is emulated some never return.
/// Those guests can be killed like any other.
#[tokio::test]
async fn hypercalls_harm_nobody_else() {
    if !kvm() {
        return;
    }
    let neighbour = Code::new().print("n").spin().boot();
    for number in [0u8, 5, 9, 12, 0x7f] {
        // mov eax, number; rbx, rcx and rdx as they are; vmcall
        let call = [0xb8, number, 0, 0, 0, 0x0f, 0x01, 0xc1];
        let code = Code::new().print("call ").raw(&call);
        let vm = code.print("done").report(1).spin().boot();
        let answered = tokio::time::timeout(Duration::from_millis(500), vm.exited()).await;
        vm.kill();
        let said = vm.console().text();
        match answered.unwrap_or(Exit::Killed) {
            Exit::PowerOff => assert_eq!(said, "call done", "{number}"),
            Exit::InternalError(_) | Exit::TripleFault | Exit::Killed => {
                assert_eq!(said, "call ", "{number}");
            }
            other => panic!("{number}: {other}"),
        }
        vm.destroy();
    }
    assert_eq!(hearth_vmm::leaked_vms(), 0);
    assert_eq!(neighbour.status(), VmStatus::Running);
}

#[tokio::test]
async fn a_guest_that_sleeps_for_ever_with_interrupts_off_is_ended_at_once() {
    if !kvm() {
        return;
    }
    let vm = Code::new().print("z").sleep().boot();
    within(2, "its word", vm.console().read(0)).await;
    assert_eq!(vm.status(), VmStatus::Running);
    vm.kill();
    assert_eq!(within(2, "its end", vm.exited()).await, Exit::Killed);
    vm.destroy();
    assert_eq!(hearth_vmm::leaked_vms(), 0);
}
