//! Attacks on ports: the serial console, the keyboard controller, the debug-exit port, and all
//! others.

use std::sync::atomic::Ordering;

use hearth_tests::flat::{Code, REPORT_PORT, SERIAL_PORT};
use hearth_tests::{kvm, not_measured};
use hearth_vmm::{CpuProfile, Exit, Vm, VmStatus};

use crate::driver::*;

/// Line control and modem control of COM1.
const LCR: u16 = SERIAL_PORT + 3;
const MCR: u16 = SERIAL_PORT + 4;
const LOOPBACK: u8 = 0x10;
const DIVISOR: u8 = 0x80;
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;

/// Ports on which a kernel that cannot save registers has them saved and loaded. The value written
/// is an address in units of 64 bytes.
const SAVE: u16 = 0x5f4;
const LOAD: u16 = 0x5f8;
/// Offsets of MXCSR and XSTATE_BV in a buffer (Intel SDM volume 1, 13.4).
const MXCSR: u32 = 24;
const XSTATE_BV: u32 = 512;

/// Writes 32 bits to a port.
fn out32(code: Code, port: u16, value: u32) -> Code {
    // mov eax, value; mov dx, port; out dx, eax
    code.raw(&[0xb8])
        .raw(&value.to_le_bytes())
        .raw(&[0x66, 0xba])
        .raw(&port.to_le_bytes())
        .raw(&[0xef])
}

/// Returns whether guests have those ports: only hosts that emulate ring 0 offer them.
fn keeps_registers() -> bool {
    if !kvm() {
        return false;
    }
    let emulated = hearth_vmm::Host::get().unwrap().profile() == CpuProfile::Emulated;
    if !emulated {
        not_measured("this host's guests save registers themselves");
    }
    emulated
}

/// Returns the reason for which a guest with this code fails; another guest must be unaffected.
async fn ended(code: Code) -> String {
    let vm = create(code.spin(), None);
    vm.resume().unwrap();
    let exit = hearth_tests::within(2, "the end", vm.exited()).await;
    assert_eq!(vm.status(), VmStatus::Ended(exit.clone()));
    let Exit::Failed(why) = exit else {
        panic!("{exit}");
    };
    let (said, other) = printed(done(Code::new())).await;
    assert_eq!(said, b"done");
    assert_no_fault("beside registers outside of memory", &other);
    why
}

/// Prints on the serial port, which must work again after anything done to it.
fn done(code: Code) -> Code {
    code.out(LCR, 3).out(MCR, 0).print("done").report(1).spin()
}

fn port_exits(vm: &Vm) -> u64 {
    vm.exits().pio.load(Ordering::Relaxed)
}

#[tokio::test]
async fn garbage_in_every_port_ends_nothing() {
    if !kvm() {
        return;
    }
    // Writes and reads every port up to 0x3ff except the keyboard controller's command port, among
    // them those of the interrupt controllers and the timer; then every seventh, which miss the
    // debug-exit port: mov eax, edx; out dx, al; in al, dx; add edx, step; cmp edx, end; jb
    let sweep = |code: Code, from: u32, step: u8, end: u32| {
        code.raw(&[0xba])
            .raw(&from.to_le_bytes())
            .raw(&[0x89, 0xd0, 0xee, 0xec, 0x83, 0xc2, step, 0x81, 0xfa])
            .raw(&end.to_le_bytes())
            .raw(&[0x72, 0xf1])
    };
    let command = u32::from(I8042_COMMAND);
    let code = sweep(Code::new(), 0, 1, command);
    let code = sweep(code, command + 1, 1, 0x400);
    let code = sweep(code, 0x400, 7, 0x1_0000);
    let (said, vm) = printed(done(code)).await;
    assert!(said.ends_with(b"done"), "{said:?}");
    // KVM itself answers some of the ports below 0x100.
    assert!(
        port_exits(&vm) > 2 * (0x300 + 0xfc00 / 7),
        "{}",
        port_exits(&vm)
    );
    assert_no_fault("garbage in every port", &vm);
}

#[tokio::test]
async fn a_flood_of_strings_reaches_the_console_whole() {
    if !kvm() {
        return;
    }
    const BYTES: u32 = 4096;
    // mov edi, BUFFER; mov ecx, BYTES; mov al, '#'; rep stosb; then esi, ecx, dx; rep outsb
    let code = Code::new()
        .raw(&[0xfc, 0xbf])
        .raw(&BUFFER.to_le_bytes())
        .raw(&[0xb9])
        .raw(&BYTES.to_le_bytes())
        .raw(&[0xb0, b'#', 0xf3, 0xaa, 0xbe])
        .raw(&BUFFER.to_le_bytes())
        .raw(&[0xb9])
        .raw(&BYTES.to_le_bytes())
        .raw(&[0x66, 0xba])
        .raw(&SERIAL_PORT.to_le_bytes())
        .raw(&[0xf3, 0x6e]);
    let (said, vm) = printed(done(code)).await;
    let flood = said.iter().filter(|byte| **byte == b'#').count();
    assert_eq!(flood, BYTES as usize);
    assert!(said.ends_with(b"#done"));
    assert_no_fault("a flood of strings", &vm);
}

/// Bytes sent in loopback are not output, and those that do not fit into the port's buffer are
/// dropped.
#[tokio::test]
async fn a_serial_port_in_loopback_holds_what_fits_and_prints_none_of_it() {
    if !kvm() {
        return;
    }
    let code = Code::new()
        .out(MCR, LOOPBACK)
        .repeat(1000, Code::new().out(SERIAL_PORT, b'x'))
        // in al, dx; mov ah, al: the first byte comes back.
        .raw(&[0xec, 0x88, 0xc4])
        .out(MCR, 0)
        // mov al, ah; mov dx, 0x3f8; out dx, al
        .raw(&[0x88, 0xe0, 0x66, 0xba])
        .raw(&SERIAL_PORT.to_le_bytes())
        .raw(&[0xee]);
    let (said, vm) = printed(done(code)).await;
    assert_eq!(said, b"xdone");
    assert!(port_exits(&vm) > 1000);
}

#[tokio::test]
async fn a_divisor_is_no_output() {
    if !kvm() {
        return;
    }
    let code = Code::new().out(LCR, DIVISOR).print("hidden");
    let (said, vm) = printed(done(code)).await;
    assert_eq!(said, b"done");
    assert!(port_exits(&vm) > 10);
}

#[tokio::test]
async fn commands_of_the_keyboard_controller_but_the_reset_do_nothing() {
    if !kvm() {
        return;
    }
    let mut code = Code::new().out(I8042_DATA, 0xfe);
    for command in (0..=0xff).filter(|command| *command != 0xfe) {
        code = code.out(I8042_COMMAND, command);
    }
    let (said, vm) = printed(done(code)).await;
    assert_eq!(said, b"done");
    assert!(port_exits(&vm) >= 256 + 4);
    // The reset command itself, for comparison.
    let vm = create(Code::new().out(I8042_COMMAND, 0xfe).spin(), None);
    vm.resume().unwrap();
    let exit = hearth_tests::within(2, "the reset", vm.exited()).await;
    assert_eq!(
        (exit.clone(), vm.status()),
        (Exit::Reboot, VmStatus::Ended(exit))
    );
}

#[tokio::test]
async fn reports_of_ends_that_do_not_exist_end_nothing() {
    if !kvm() {
        return;
    }
    let mut code = Code::new();
    for how in (0..=0xff).filter(|how| !(1..=4).contains(how)) {
        code = code.out(REPORT_PORT, how);
    }
    // Neighbouring ports, and wider accesses: mov eax, 0x01010100; mov dx, port; out dx, ax; out
    // dx, eax
    code = code.out(REPORT_PORT - 1, 1).out(REPORT_PORT + 1, 1);
    let wide = [0xb8, 0, 1, 1, 1, 0x66, 0xba, 0xf0, 0x05, 0x66, 0xef, 0xef];
    let (said, vm) = printed(done(code.raw(&wide))).await;
    assert_eq!(said, b"done");
    assert!(port_exits(&vm) >= 252 + 4);
}

#[tokio::test]
async fn wide_accesses_to_narrow_ports_are_answered() {
    if !kvm() {
        return;
    }
    // Word and double word accesses to the serial port's data, the keyboard's data and the last
    // port there is: mov dx, port; in ax, dx; in eax, dx; then eax = "okay", written in both
    // widths.
    let mut code = Code::new();
    for port in [SERIAL_PORT, I8042_DATA, u16::MAX] {
        let [low, high] = port.to_le_bytes();
        code = code.raw(&[0x66, 0xba, low, high, 0x66, 0xed, 0xed]);
    }
    let okay = [
        0xb8, b'o', b'k', b'a', b'y', 0x66, 0xba, 0xf8, 0x03, 0x66, 0xef, 0xef,
    ];
    let (said, vm) = printed(done(code.raw(&okay))).await;
    assert_eq!(said, b"okokaydone");
    assert!(port_exits(&vm) >= 8);
}

#[tokio::test]
async fn registers_outside_of_memory_end_their_guest() {
    if !keeps_registers() {
        return;
    }
    // The last bytes of memory are too few for a buffer.
    let last = u32::try_from((END - 64) >> 6).unwrap();
    for port in [SAVE, LOAD] {
        for line in [last, last + 1, 0xd000_0000 >> 6, u32::MAX] {
            let why = ended(out32(Code::new(), port, line)).await;
            assert!(why.contains("outside of its memory"), "{why}");
        }
    }
}

#[tokio::test]
async fn registers_that_no_processor_has_end_their_guest() {
    if !keeps_registers() {
        return;
    }
    let code = Code::new()
        .store64(BUFFER + XSTATE_BV, u64::MAX)
        .store(BUFFER + MXCSR, u32::MAX);
    let why = ended(out32(code, LOAD, BUFFER >> 6)).await;
    assert!(why.contains("KVM_SET_XSAVE failed"), "{why}");
}

#[tokio::test]
async fn registers_without_end_and_of_any_width_hold_nobody_up() {
    if !keeps_registers() {
        return;
    }
    const ROUNDS: u32 = 2000;
    // Writes of one and two bytes name no buffer: mov dx, port; out dx, ax
    let narrow = |code: Code, port: u16| {
        let code = code.out(port, 0xff).raw(&[0x66, 0xba]);
        code.raw(&port.to_le_bytes()).raw(&[0x66, 0xef])
    };
    let code = narrow(narrow(Code::new(), SAVE), LOAD);
    // Unknown components are ignored, both in the mask that the buffer has room for and in those
    // that are present.
    let code = code
        .store64(BUFFER + 464, u64::MAX)
        .store64(BUFFER + XSTATE_BV, u64::MAX);
    let flood = out32(out32(Code::new(), SAVE, BUFFER >> 6), LOAD, BUFFER >> 6);
    let (said, vm) = printed(done(code.repeat(ROUNDS, flood))).await;
    assert_eq!(said, b"done");
    let registers = vm.exits().registers.load(Ordering::Relaxed);
    assert_eq!(registers, u64::from(2 * ROUNDS));
    assert!(port_exits(&vm) >= 4);
    assert_no_fault("registers without end", &vm);
}
