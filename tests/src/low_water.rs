//! A program that reads from a vsock connection of the host with a low-water mark (`SO_RCVLOWAT`),
//! which no program of the agent uses.

use std::arch::global_asm;

use crate::flat::program;

/// The port that the program listens on.
pub const PORT: u32 = 3900;
/// The size of its socket's receive buffer in bytes.
pub const BUFFER: usize = 131_072;
/// The low-water mark: the bytes that must be queued before it reads.
pub const MARK: usize = 65_537;
/// The bytes that it reads first, without a mark.
pub const FIRST: usize = 65_536;

/// Returns the program, a static ELF file. It listens, prints `listening`, accepts one connection,
/// waits until its [`BUFFER`] is full, and for half a second more, so that the peer learns that it
/// is. It then reads [`FIRST`] bytes, waits for [`MARK`] bytes, reads those, and prints `whole`.
#[must_use]
pub fn reader() -> Vec<u8> {
    // SAFETY: two labels around bytes that nothing writes to in this process.
    unsafe { program(&raw const hearth_low_water, &raw const hearth_low_water_end) }
}

unsafe extern "C" {
    static hearth_low_water: u8;
    static hearth_low_water_end: u8;
}

// r12: the listener, r13: the connection.
global_asm!(
    r#"
.pushsection .rodata.hearth_low_water, "a", @progbits
.balign 64
.macro syscall5 number, a, b, c, d=0, e=0
    mov eax, \number
    mov rdi, \a
    mov rsi, \b
    mov rdx, \c
    mov r10, \d
    mov r8, \e
    syscall
.endm

hearth_low_water:
    lea rbp, [rip + .Llow_buffer]
    // socket(AF_VSOCK, SOCK_STREAM)
    syscall5 41, 40, 1, 0
    mov r12, rax
    // setsockopt(AF_VSOCK, SO_VM_SOCKETS_BUFFER_SIZE)
    lea r14, [rip + .Llow_size]
    syscall5 54, r12, 40, 0, r14, 8
    // bind, listen
    lea r14, [rip + .Llow_address]
    syscall5 49, r12, r14, 16
    syscall5 50, r12, 1, 0
    test eax, eax
    jnz .Llow_failed
    lea r14, [rip + .Llow_listening]
    syscall5 1, 1, r14, 10
    // accept
    syscall5 43, r12, 0, 0
    mov r13, rax
    mov [rip + .Llow_poll], eax
    // setsockopt(SOL_SOCKET, SO_RCVLOWAT)
    lea r14, [rip + .Llow_size]
    syscall5 54, r13, 1, 18, r14, 4
    test eax, eax
    jnz .Llow_failed
    call .Llow_wait
    lea r14, [rip + .Llow_mark]
    syscall5 54, r13, 1, 18, r14, 4
    test eax, eax
    jnz .Llow_failed
    // nanosleep
    lea r14, [rip + .Llow_pause]
    syscall5 35, r14, 0, 0
    // recvfrom(MSG_WAITALL)
    syscall5 45, r13, rbp, {first}, 0x100
    cmp eax, {first}
    jne .Llow_failed
    call .Llow_wait
    syscall5 45, r13, rbp, {mark}, 0x100
    cmp eax, {mark}
    jne .Llow_failed
    lea r14, [rip + .Llow_whole]
    syscall5 1, 1, r14, 6
    xor edi, edi
    mov eax, 231
    syscall
.Llow_failed:
    mov edi, 1
    mov eax, 231
    syscall

// poll(POLLIN), without end.
.Llow_wait:
    lea r14, [rip + .Llow_poll]
    syscall5 7, r14, 1, -1
    cmp eax, 1
    jne .Llow_failed
    ret

.Llow_listening: .ascii "listening\n"
.Llow_whole: .ascii "whole\n"
.balign 8
.Llow_size: .quad {buffer}
.Llow_pause: .quad 0, 500000000
.Llow_mark: .long {mark}
// struct pollfd, struct sockaddr_vm (VMADDR_CID_ANY)
.Llow_poll: .long 0
    .short 1, 0
.Llow_address:
    .short 40, 0
    .long {port}, -1, 0
.Llow_buffer: .fill {mark}
hearth_low_water_end:
.popsection
"#,
    first = const FIRST,
    mark = const MARK,
    buffer = const BUFFER,
    port = const PORT,
);
