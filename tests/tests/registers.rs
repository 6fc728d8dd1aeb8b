#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Programs in a guest do not see each other's vector registers.

use std::os::unix::fs::PermissionsExt;

use hearth_tests::{Guest, kvm, not_measured, registers};

async fn on(guest: &Guest, rounds: u32) {
    if !std::arch::is_x86_feature_detected!("avx") {
        return not_measured("the processor has no AVX");
    }
    registers::keep(guest, registers::AVX, 4, rounds).await;
    if !registers::has_avx_512() {
        return not_measured("the processor has no AVX-512");
    }
    registers::keep(guest, registers::AVX_512, 4, rounds).await;
}

#[test]
fn the_program_that_checks_is_right_where_the_kernel_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registers");
    std::fs::write(&path, registers::keeper()).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    if !std::arch::is_x86_feature_detected!("avx") {
        return not_measured("the processor has no AVX");
    }
    let kinds = [registers::AVX, registers::AVX_512];
    for kind in kinds
        .into_iter()
        .take(1 + usize::from(registers::has_avx_512()))
    {
        let output = std::process::Command::new(&path)
            .args([kind, "1", "64"])
            .output();
        assert_eq!(output.unwrap().stdout, b"wrong=0\n");
    }
}

#[tokio::test]
async fn four_programs_at_once_keep_their_vector_registers() {
    if !kvm() {
        return;
    }
    let guest = Guest::fork().await;
    on(&guest, 16).await;
    eprintln!(
        "{:?}, {:?} instructions",
        guest.vm.exits(),
        guest.vm.emulated_instructions()
    );
}

#[tokio::test]
async fn four_programs_on_two_cpus_keep_their_vector_registers() {
    if !kvm() {
        return;
    }
    let (guest, _) = Guest::boot(|config| config.vcpus(2)).await;
    on(&guest, 16).await;
}
