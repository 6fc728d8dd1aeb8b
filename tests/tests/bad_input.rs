#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Invalid input is refused with a typed error that says what to do, and nothing is started.

use std::path::Path;
use std::process::Command;
use std::sync::Once;
use std::time::Duration;

use hearth_tests::flat::{Code, elf};
use hearth_tests::{Footprint, alone, error_chain, kvm, not_measured};
use hearth_vmm::{
    BootError, BzImageError, ConfigError, CpuProfile, EntryChoice, Exit, Host, KernelError,
    KernelFormat, LoadError, Vm, VmConfig, VmConfigBuilder,
};
use tempfile::TempDir;

/// The address of the synthetic kernels.
const KERNEL_AT: u64 = 16 << 20;

/// A directory with files to boot from.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, content: &[u8]) -> std::path::PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

/// A kernel of two instructions that powers off.
fn kernel() -> Vec<u8> {
    let code = Code::new().report(1).spin().bytes();
    elf(&[(KERNEL_AT, &code), (KERNEL_AT + 0x20_0000, &[7; 5000])])
}

/// Creates the process-wide parts (event threads, `/dev/kvm`), so that footprints compared later
/// differ only by a VM's resources.
fn warm_up() {
    Code::new().spin().boot().destroy();
}

/// Returns the error of booting `config`. The attempt must leave nothing behind.
fn refused(config: VmConfigBuilder) -> BootError {
    static WARM: Once = Once::new();
    WARM.call_once(warm_up);
    let before = Footprint::now();
    let config = config
        .memory_mib(64)
        .build()
        .expect("a possible configuration");
    let error = match Vm::boot(&config) {
        Ok(vm) => panic!("it booted: {:?}", vm.status()),
        Err(error) => error,
    };
    drop(config);
    before.assert_restored(2, Duration::from_secs(5));
    error
}

fn kernel_error(path: &Path) -> KernelError {
    match refused(VmConfig::builder(path)) {
        BootError::Load(LoadError::Kernel {
            path: named,
            source,
        }) => {
            assert_eq!(named, path, "the error names the file");
            source
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_synthetic_kernel_boots_so_that_its_damaged_forms_mean_something() {
    if !kvm() {
        return;
    }
    let files = Files::new();
    let path = files.file("vmlinux", &kernel());
    let vm = Vm::boot(&VmConfig::builder(path).memory_mib(64).build().unwrap()).unwrap();
    let exit = tokio::time::timeout(Duration::from_secs(10), vm.exited()).await;
    assert_eq!(exit.unwrap(), Exit::PowerOff);
}

#[test]
fn a_kernel_that_is_missing_empty_or_no_file() {
    if !kvm() || !alone() {
        return;
    }
    let files = Files::new();
    let missing = kernel_error(&files.0.path().join("nothing"));
    assert!(matches!(&missing, KernelError::Read(e) if e.kind() == std::io::ErrorKind::NotFound));
    assert!(matches!(
        kernel_error(&files.file("empty", b"")),
        KernelError::Empty
    ));
    assert!(matches!(
        kernel_error(files.0.path()),
        KernelError::NotAFile
    ));
    assert!(matches!(
        kernel_error(Path::new("/dev/zero")),
        KernelError::NotAFile
    ));
}

#[test]
fn a_kernel_that_is_a_pipe_does_not_block_its_caller() {
    if !kvm() || !alone() {
        return;
    }
    let files = Files::new();
    let path = files.0.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let (done, outcome) = std::sync::mpsc::channel();
    let kernel = path.clone();
    std::thread::spawn(move || {
        let as_kernel = Vm::boot(&VmConfig::builder(&kernel).build().unwrap()).err();
        let vmlinux = kernel.with_file_name("vmlinux");
        std::fs::write(&vmlinux, self::kernel()).unwrap();
        let config = VmConfig::builder(vmlinux).initramfs(kernel);
        let as_initramfs = Vm::boot(&config.build().unwrap()).err();
        let _ = done.send((as_kernel, as_initramfs));
    });
    let outcome = outcome.recv_timeout(Duration::from_secs(10));
    let (as_kernel, as_initramfs) = outcome.expect("an answer, not a wait for a writer");
    assert!(matches!(
        as_kernel,
        Some(BootError::Load(LoadError::Kernel {
            source: KernelError::NotAFile,
            ..
        }))
    ));
    assert!(matches!(
        as_initramfs,
        Some(BootError::Load(LoadError::Initramfs { .. }))
    ));
}

#[test]
fn a_kernel_cut_anywhere() {
    if !kvm() || !alone() {
        return;
    }
    let files = Files::new();
    let whole = kernel();
    for len in [
        1,
        4,
        20,
        63,
        64,
        100,
        176,
        177,
        200,
        whole.len() / 2,
        whole.len() - 1,
    ] {
        let error = kernel_error(&files.file("cut", &whole[..len]));
        assert!(
            matches!(error, KernelError::Elf(_) | KernelError::Format(_)),
            "{len} bytes: {error:?}"
        );
        assert!(
            len < 20 || error.to_string().contains("truncated"),
            "{len} bytes: {error}"
        );
    }
}

#[test]
fn what_is_no_kernel_is_named_by_its_content_whatever_it_is_called() {
    if !kvm() || !alone() {
        return;
    }
    let files = Files::new();
    let mut bzimage = vec![0; 0x1000];
    bzimage[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let arm = {
        let mut file = kernel();
        file[18] = 183;
        file
    };
    for (content, format, said) in [
        (
            &[0x1f, 0x8b, 8, 0][..],
            KernelFormat::Compressed("gzip"),
            "gzip",
        ),
        (
            &[0x28, 0xb5, 0x2f, 0xfd],
            KernelFormat::Compressed("zstd"),
            "zstd",
        ),
        (b"#!/bin/sh\necho", KernelFormat::Unknown, "no kernel"),
        (&[0; 4096], KernelFormat::Unknown, "no kernel"),
        (&arm, KernelFormat::ForeignElf, "not 64-bit x86"),
    ] {
        let error = kernel_error(&files.file("vmlinux", content));
        assert!(
            matches!(error, KernelError::Format(found) if found == format),
            "{error:?}"
        );
        let text = error.to_string();
        assert!(text.contains(said), "{text}");
        assert!(text.contains("64-bit ELF vmlinux or a bzImage"), "{text}");
    }
    let error = kernel_error(&files.file("vmlinux", &bzimage));
    assert!(
        matches!(
            error,
            KernelError::BzImage(BzImageError::Protocol { major: 0, .. })
        ),
        "{error:?}"
    );
    // A program for this machine is an ELF file too, but its segments do not lie where a kernel's
    // do.
    let own = std::env::current_exe().unwrap();
    assert!(matches!(kernel_error(&own), KernelError::Elf(_)));
}

#[test]
fn segments_that_no_guest_could_hold() {
    if !kvm() || !alone() {
        return;
    }
    let files = Files::new();
    for (what, at) in [
        ("below 1 MiB", 0x1000),
        ("in the gap", 0xd000_0000),
        ("at the end", u64::MAX - 1),
    ] {
        let error = kernel_error(&files.file("odd", &elf(&[(at, b"code")])));
        assert!(matches!(error, KernelError::Elf(_)), "{what}: {error:?}");
    }
    let none = kernel_error(&files.file("none", &elf(&[])));
    assert!(matches!(none, KernelError::Elf(_)), "{none:?}");
    // The file is valid, but the guest's memory ends below its address.
    let far = files.file("far", &elf(&[(1 << 30, b"code")]));
    let error = refused(VmConfig::builder(far));
    assert!(
        matches!(&error, BootError::Load(LoadError::DoesNotFit { .. })),
        "{error:?}"
    );
    assert!(error.to_string().contains("more memory"), "{error}");
}

#[test]
fn an_initramfs_that_is_missing_or_does_not_fit() {
    if !kvm() || !alone() {
        return;
    }
    let files = Files::new();
    let kernel = files.file("vmlinux", &kernel());
    let missing = files.0.path().join("nothing");
    let error = refused(VmConfig::builder(&kernel).initramfs(&missing));
    assert!(
        matches!(&error, BootError::Load(LoadError::Initramfs { path, .. }) if *path == missing),
        "{error:?}"
    );
    let error = refused(VmConfig::builder(&kernel).initramfs(files.0.path()));
    assert!(
        matches!(&error, BootError::Load(LoadError::Initramfs { .. })),
        "{error:?}"
    );
    let big = files.file("big", b"");
    std::fs::File::options()
        .write(true)
        .open(&big)
        .unwrap()
        .set_len(60 << 20)
        .unwrap();
    let error = refused(VmConfig::builder(&kernel).initramfs(&big));
    assert!(
        matches!(&error, BootError::Load(LoadError::DoesNotFit { initramfs, .. }) if *initramfs == 60 << 20),
        "{error:?}"
    );
}

#[test]
fn a_command_line_or_entry_that_the_kernel_could_not_use() {
    if !kvm() || !alone() {
        return;
    }
    let files = Files::new();
    let kernel = files.file("vmlinux", &kernel());
    let error = refused(VmConfig::builder(&kernel).append(&"word ".repeat(500)));
    assert!(
        matches!(&error, BootError::Load(LoadError::Cmdline(_))),
        "{error:?}"
    );
    let error = refused(VmConfig::builder(&kernel).append("zero\0byte"));
    assert!(
        matches!(&error, BootError::Load(LoadError::Cmdline(_))),
        "{error:?}"
    );
    let error = refused(VmConfig::builder(&kernel).entry(EntryChoice::Pvh));
    assert!(
        matches!(
            &error,
            BootError::Load(LoadError::Kernel {
                source: KernelError::NoPvh,
                ..
            })
        ),
        "{error:?}"
    );
}

#[test]
fn memory_and_vcpus_out_of_range() {
    if !alone() {
        return;
    }
    let before = Footprint::now();
    let with_memory = |bytes| {
        let config = VmConfig::builder("vmlinux").memory_bytes(bytes);
        config.build().map(drop)
    };
    let mib = 1_u64 << 20;
    assert_eq!(with_memory(0), Err(ConfigError::MemoryTooSmall(0)));
    assert_eq!(
        with_memory(31 * mib),
        Err(ConfigError::MemoryTooSmall(31 * mib))
    );
    assert_eq!(with_memory(32 * mib), Ok(()));
    for odd in [1, 4096, mib - 1] {
        assert_eq!(
            with_memory(64 * mib + odd),
            Err(ConfigError::MemoryNotWhole(64 * mib + odd))
        );
    }
    for huge in [1 << 50, u64::MAX - mib + 1] {
        let error = with_memory(huge).unwrap_err();
        assert!(
            matches!(error, ConfigError::MemoryTooLarge { asked, host } if asked > host && host > 0),
            "{error:?}"
        );
    }
    assert!(VmConfig::builder("k").memory_mib(u64::MAX).build().is_err());
    for vcpus in [0, 33, 255] {
        let error = VmConfig::builder("k").vcpus(vcpus).build().map(drop);
        assert_eq!(
            error,
            Err(ConfigError::Vcpus {
                asked: vcpus,
                most: 32
            })
        );
    }
    before.assert_restored(2, Duration::from_secs(5));
}

/// Runs the `try-boot` program by way of `wrapper`; `None` if the wrapper fails.
fn try_boot(wrapper: &[&str], env: &[(&str, &str)]) -> Option<String> {
    // A copy, because other users may be unable to enter the build directory.
    let dir = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir()
        .unwrap();
    let program = dir.path().join("try-boot");
    std::fs::copy(env!("CARGO_BIN_EXE_try-boot"), &program).unwrap();
    let mut words = wrapper
        .iter()
        .map(std::ffi::OsStr::new)
        .chain([program.as_os_str()]);
    let mut command = Command::new(words.next().unwrap());
    command
        .args(words)
        .envs(env.iter().copied())
        .current_dir("/");
    let output = command.output().ok()?;
    let text = String::from_utf8(output.stdout).unwrap();
    if !text.is_empty() {
        return Some(text);
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !said.contains("panicked") && output.status.code().is_some(),
        "{:?}: {said}",
        output.status
    );
    eprintln!("{wrapper:?}: {said}");
    None
}

/// Asserts that the answer is this refusal, and that nothing was started.
fn assert_refused(answer: &str, variant: &str, hint: &str) {
    assert!(
        answer.starts_with(&format!("refused: {variant}")),
        "{answer}"
    );
    assert!(answer.contains(hint), "{answer}");
    assert!(answer.contains("threads of a vm: 0\n"), "{answer}");
    assert!(no_vm_is_left(answer), "{answer}");
}

#[test]
fn without_dev_kvm() {
    // An empty /dev in a new mount namespace; ordinary users may need a user namespace as well.
    let script = "mount -t tmpfs none /dev && exec \"$0\"";
    let user: &[&str] = &["unshare", "-r", "-m", "sh", "-c", script];
    let root: &[&str] = &["unshare", "-m", "sh", "-c", script];
    let Some(answer) = try_boot(root, &[]).or_else(|| try_boot(user, &[])) else {
        return not_measured("no mount namespace of our own, so /dev/kvm cannot be hidden");
    };
    assert_refused(&answer, "Host(NoKvm)", "/dev/kvm does not exist");
}

#[test]
fn without_permission_to_open_dev_kvm() {
    if !kvm() {
        return;
    }
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let Some(answer) = try_boot(&nobody, &[]) else {
        return not_measured("not root, so a user without access cannot be had");
    };
    if answer.starts_with("booted") {
        return not_measured("/dev/kvm is open to every user here");
    }
    assert_refused(&answer, "Host(NoAccess", "usermod -aG kvm");
}

#[test]
fn a_forced_profile_that_does_not_exist() {
    if !kvm() {
        return;
    }
    let answer = try_boot(&["env"], &[("HEARTH_CPU_PROFILE", "fast")]).unwrap();
    assert_refused(
        &answer,
        "Host(BadProfile(\"fast\"))",
        "native, emulated or auto",
    );
    for profile in ["native", "emulated", "auto", ""] {
        let answer = try_boot(&["env"], &[("HEARTH_CPU_PROFILE", profile)]).unwrap();
        assert_eq!(answer, "booted\n", "{profile}");
    }
}

/// Returns whether no VM is left, except for the spare that a process keeps on hosts where
/// `KVM_CREATE_VM` waits.
fn no_vm_is_left(answer: &str) -> bool {
    let left = |count: u32| answer.contains(&format!("vm descriptors: {count}\n"));
    let may_have_spare = Host::get().is_ok_and(|host| host.profile() == CpuProfile::Native);
    left(0) || may_have_spare && left(1)
}

#[test]
fn with_too_few_descriptors_a_boot_is_refused_not_half_done() {
    if !kvm() {
        return;
    }
    let mut refusals = 0;
    for limit in 6..48 {
        // A soft limit: the program raises it again before it counts its descriptors.
        let script = format!("ulimit -Sn {limit}; exec \"$0\"");
        // With fewer descriptors a program cannot even be loaded.
        let Some(answer) = try_boot(&["sh", "-c", &script], &[]) else {
            continue;
        };
        if answer.starts_with("booted") {
            break;
        }
        refusals += 1;
        assert!(no_vm_is_left(&answer), "{limit}: {answer}");
        assert!(!answer.contains("hearth-vcpu"), "{limit}: {answer}");
        assert!(
            answer.contains("os error 24") || answer.contains("descriptor"),
            "{limit} descriptors: the reason is not named: {answer}"
        );
    }
    assert!(refusals > 3, "the limit was felt {refusals} times");
}

#[test]
fn error_texts_name_the_file_and_the_reason_once_each() {
    if !kvm() || !alone() {
        return;
    }
    let error = refused(VmConfig::builder("/nowhere/vmlinux"));
    let text = error_chain(&error);
    assert_eq!(text.matches("/nowhere/vmlinux").count(), 1, "{text}");
    assert!(text.contains("No such file"), "{text}");
}
