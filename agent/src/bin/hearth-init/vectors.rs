//! Registers that programs would lose. Where ring 0 is emulated, programs run on the processor itself and see its AVX; the
//! guest's kernel cannot save what AVX adds, as nothing emulates `XSAVE`, and the next program or thread overwrites it. So
//! programs are asked to do without, in the words that common libraries listen to.

use core::arch::x86_64::__cpuid;

use rustix::{
    fs::{Mode, OFlags, open},
    io::read,
};

/// The word by which the host tells the guest's kernel that ring 0 is emulated.
const EMULATED: &[u8] = b"hearth.emulated";
/// What is read of the boot words; the kernel itself takes 2 KiB (arch/x86/include/asm/setup.h).
const MOST_BYTES: usize = 2048;
/// `OSXSAVE` and `AVX`: the system keeps registers with `XSAVE`, says the processor (Intel SDM volume 1, 14.3).
const AVX: u32 = 1 << 27 | 1 << 28;

/// Programs' variables; who starts a program may set others.
pub(crate) const WITHOUT: [(&[u8], &[u8]); 4] = [
    // glibc 2.33 and newer (sysdeps/x86/cpu-tunables.c). Its string functions take the last for a wish, too.
    (
        b"GLIBC_TUNABLES",
        b"glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512BW,-AVX512VL,-FMA,-FMA4,-AVX_Fast_Unaligned_Load",
    ),
    // OpenSSL: AVX, FMA and XOP; all of leaf 7 that is made of AVX (OPENSSL_ia32cap(3)).
    (
        b"OPENSSL_ia32cap",
        b"~0x1000180000000000:~0x5e42d0230020",
    ),
    // Go (internal/cpu).
    (b"GODEBUG", b"cpu.avx=off,cpu.avx2=off"),
    // simdutf, which is part of Node.
    (b"SIMDUTF_FORCE_IMPLEMENTATION", b"westmere"),
];

/// Whether programs see AVX, and the kernel does not keep it.
pub(crate) fn are_lost() -> bool {
    __cpuid(1).ecx & AVX == AVX && boot_words().is_some_and(|words| has(&words, EMULATED))
}

fn boot_words() -> Option<[u8; MOST_BYTES]> {
    let file = open(
        "/proc/cmdline",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok()?;
    let mut words = [0; MOST_BYTES];
    read(&file, &mut words).ok()?;
    Some(words)
}

fn has(words: &[u8], wanted: &[u8]) -> bool {
    words
        .split(|&byte| byte == 0 || byte.is_ascii_whitespace())
        .any(|word| word == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_as_a_whole() {
        assert!(has(b"quiet hearth.emulated\n\0\0", EMULATED));
        assert!(has(b"hearth.emulated", EMULATED));
        assert!(!has(
            b"quiet xhearth.emulated hearth.emulated=0\0",
            EMULATED
        ));
        assert!(!has(b"", EMULATED));
    }

    #[test]
    fn nothing_is_lost_outside_of_a_guest() {
        assert!(!are_lost());
    }
}
