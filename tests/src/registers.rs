//! A program that fills all vector registers and checks that they keep their values. It is machine
//! code, because no compiler keeps values in all of them.

use std::arch::global_asm;

use hearth_agent::client::Command;
use hearth_agent::proto::{ExitStatus, Put};

use crate::flat::program;
use crate::{Guest, within};

/// Returns the program, a static ELF file: `registers KIND SEED ROUNDS`. `KIND` is [`AVX`] or
/// [`AVX_512`]. In each round it loads all registers with numbers of its own, does one of these
/// things, and checks the registers:
///
/// - it yields, or moves to another CPU
/// - it takes a signal, whose handler loads other numbers and yields
/// - it forks a child, which checks what it inherited and loads other numbers
/// - it forks a child that executes a program, which checks that all registers are zero
/// - it computes
///
/// It prints `wrong=N`, the number of failed checks, and exits with 0 if N is 0.
#[must_use]
pub fn keeper() -> Vec<u8> {
    // SAFETY: two labels around bytes that nothing writes to in this process.
    unsafe { program(&raw const hearth_registers, &raw const hearth_registers_end) }
}

/// The kind that uses 16 registers of 32 bytes.
pub const AVX: &str = "a";
/// The kind that uses 32 registers of 64 bytes and seven masks.
pub const AVX_512: &str = "z";

/// Returns whether programs in guests have AVX-512. The host's answer holds for them: they see the
/// processor that they run on.
#[must_use]
pub fn has_avx_512() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw")
}

/// Returns the kind of program that uses the most registers.
#[must_use]
pub fn widest() -> &'static str {
    match has_avx_512() {
        true => AVX_512,
        false => AVX,
    }
}

/// Runs `programs` [`keeper`]s at once in a guest, each for `rounds` rounds.
///
/// # Panics
/// If one finds another's numbers in a register.
pub async fn keep(guest: &Guest, kind: &str, programs: u32, rounds: u32) {
    let put = Put::new("/tmp/registers").mode(0o755);
    let put = guest.connect().await.put(put, &keeper()).await;
    put.unwrap();
    let mut running = Vec::new();
    for program in 0..programs {
        let command = Command::new("/tmp/registers")
            .arg(kind)
            .arg((1000 + 7 * program).to_string())
            .arg(rounds.to_string());
        running.push(guest.connect().await.exec(command).await.unwrap());
    }
    for exec in running {
        let output = exec.output(Default::default());
        let output = within(60 + u64::from(rounds), "rounds", output)
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(
            (said.as_str(), output.status),
            ("wrong=0\n", ExitStatus::Code(0))
        );
    }
}

unsafe extern "C" {
    static hearth_registers: u8;
    static hearth_registers_end: u8;
}

// Callee-saved registers: ebx kind (99 is c, 122 z), r12 the last number, r13 rounds left, r14
// failed checks.
global_asm!(
    r#"
.pushsection .rodata.hearth_registers, "a", @progbits
.balign 64
.set NUMBERS, 32 * 8 + 8

hearth_registers:
    mov rbp, rsp
    mov rax, [rbp + 16]
    movzx ebx, byte ptr [rax]
    cmp bl, 99
    je .Lexecuted
    mov rsi, [rbp + 24]
    call .Lnumber
    mov r12, rax
    mov rsi, [rbp + 32]
    call .Lnumber
    mov r13, rax
    xor r14d, r14d
    // rt_sigaction(SIGUSR1)
    lea rsi, [rip + .Laction]
    lea rax, [rip + .Lhandler]
    mov [rsi], rax
    lea rax, [rip + .Lrestorer]
    mov [rsi + 16], rax
    mov edi, 10
    xor edx, edx
    mov r10d, 8
    mov eax, 13
    syscall

.Lround:
    lea rdi, [rip + .Lwanted]
    mov ecx, NUMBERS
    movabs rdx, 0x5851f42d4c957f2d
4:  imul r12, rdx
    add r12, 0x14057b7
    mov [rdi], r12
    add rdi, 8
    dec ecx
    jnz 4b
    lea rdi, [rip + .Lwanted]
    call .Lload
    mov eax, r13d
    and eax, 7
    jz .Lyield
    cmp eax, 1
    je .Lsignal
    cmp eax, 2
    je .Lfork
    cmp eax, 3
    je .Lmove
    cmp eax, 4
    je .Lsignal
    cmp eax, 5
    je .Lexecute
    cmp eax, 6
    je .Lyield
    mov ecx, 3000000
4:  dec ecx
    jnz 4b
    jmp .Ldone

.Lmove:
    // sched_setaffinity(0): the CPU of the round. Where there is no such CPU it stays.
    mov ecx, r13d
    shr ecx, 3
    and ecx, 1
    mov eax, 1
    shl eax, cl
    push rax
    xor edi, edi
    mov esi, 8
    mov rdx, rsp
    mov eax, 203
    syscall
    pop rax
.Lyield:
    push 3
4:  mov eax, 24
    syscall
    dec qword ptr [rsp]
    jnz 4b
    pop rax
    jmp .Ldone

.Lsignal:
    // kill(getpid(), SIGUSR1)
    mov eax, 39
    syscall
    mov edi, eax
    mov esi, 10
    mov eax, 62
    syscall
    jmp .Ldone

.Lfork:
    mov eax, 57
    syscall
    test eax, eax
    jnz .Lwait
    call .Lcheck
    push rax
    lea rdi, [rip + hearth_registers]
    call .Lload
    mov eax, 24
    syscall
    pop rdi
    jmp .Lexit

.Lexecute:
    mov eax, 57
    syscall
    test eax, eax
    jnz .Lwait
    // execve("/proc/self/exe", ["c", "cKIND"])
    lea rdi, [rip + .Lself]
    lea rax, [rip + .Lchild]
    mov [rax + 1], bl
    push 0
    push rax
    push rax
    mov rsi, rsp
    xor edx, edx
    mov eax, 59
    syscall
    mov edi, 3
    jmp .Lexit

.Lwait:
    // wait4(pid)
    mov edi, eax
    push 0
    mov rsi, rsp
    xor edx, edx
    xor r10d, r10d
    mov eax, 61
    syscall
    pop rax
    test eax, eax
    jz .Ldone
    inc r14
.Ldone:
    call .Lcheck
    add r14, rax
    dec r13
    jnz .Lround

    // "wrong=N\n"
    lea rdi, [rip + .Ltext_end - 1]
    mov byte ptr [rdi], 10
    mov rax, r14
    mov ecx, 10
4:  xor edx, edx
    div rcx
    add dl, 48
    dec rdi
    mov [rdi], dl
    test rax, rax
    jnz 4b
    sub rdi, 6
    mov dword ptr [rdi], 0x6e6f7277
    mov word ptr [rdi + 4], 0x3d67
    mov rsi, rdi
    lea rdx, [rip + .Ltext_end]
    sub rdx, rdi
    mov edi, 1
    mov eax, 1
    syscall
    xor edi, edi
    test r14, r14
    setnz dil
.Lexit:
    mov eax, 231
    syscall

.Lexecuted:
    movzx ebx, byte ptr [rax + 1]
    call .Lcheck
    mov rdi, rax
    jmp .Lexit

.Lhandler:
    lea rdi, [rip + hearth_registers]
    call .Lload
    mov eax, 24
    syscall
    ret
.Lrestorer:
    mov eax, 15
    syscall

// The number at rsi.
.Lnumber:
    xor eax, eax
4:  movzx ecx, byte ptr [rsi]
    test ecx, ecx
    jz 5f
    lea rax, [rax + rax * 4]
    lea rax, [rcx + rax * 2 - 48]
    inc rsi
    jmp 4b
5:  ret

// Loads all registers from rdi.
.Lload:
    cmp bl, 122
    je 4f
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu ymm\n, [rdi + \n * 64]
.endr
    ret
4:
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    vmovdqu64 zmm\n, [rdi + \n * 64]
.endr
.irp n, 1, 2, 3, 4, 5, 6, 7
    kmovq k\n, [rdi + 2048 + \n * 8]
.endr
    ret

// Whether (0 or 1) registers are not as wanted, in rax. What no register holds is as wanted.
.Lcheck:
    cld
    lea rsi, [rip + .Lwanted]
    lea rdi, [rip + .Lfound]
    mov ecx, NUMBERS
    rep movsq
    lea rdi, [rip + .Lfound]
    cmp bl, 122
    je 4f
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vmovdqu [rdi + \n * 64], ymm\n
.endr
    jmp 5f
4:
.irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    vmovdqu64 [rdi + \n * 64], zmm\n
.endr
.irp n, 1, 2, 3, 4, 5, 6, 7
    kmovq [rdi + 2048 + \n * 8], k\n
.endr
5:  lea rsi, [rip + .Lwanted]
    mov ecx, NUMBERS
    xor eax, eax
    repe cmpsq
    setne al
    ret

.Lself: .asciz "/proc/self/exe"
.Lchild: .asciz "c?"
.balign 64
.Laction: .quad 0, 0x04000000, 0, 0
.Ltext: .fill 32
.Ltext_end:
.balign 64
.Lwanted: .fill NUMBERS * 8
.Lfound: .fill NUMBERS * 8
hearth_registers_end:
.popsection
"#
);
