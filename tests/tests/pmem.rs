#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! Read-only pmem files in guests of a few instructions and in real ones.

use std::os::unix::fs::FileExt;

use hearth_agent::client::Command;
use hearth_tests::flat::Code;
use hearth_tests::{Guest, kvm, noise, within};
use hearth_vmm::{Exit, StoreError, Template, Vm, VmConfig};
use tempfile::NamedTempFile;

const GRANULE: usize = 2 << 20;
/// The bytes that a guest reads of each file: the kernel's copies take seconds per MiB where ring 0
/// is emulated.
const READ: usize = 192 << 10;
/// The address of the first pmem file in a small guest.
const FIRST: u64 = 1 << 32;

fn image(content: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().write_all_at(content, 0).unwrap();
    file
}

/// Starts a guest that can reach the first 2 MiB of its first pmem file; `rbx` is the address.
fn reaching_the_image() -> Code {
    // The boot page tables lie at 0x9000: the fifth GiB gets a page directory at 2 MiB with one
    // page of 2 MiB that is present, writable and large.
    Code::new()
        .store64(0x20_0000, FIRST | 0x83)
        .store64(0xa020, 0x20_0003)
        .raw(&[0x48, 0xbb])
        .raw(&FIRST.to_le_bytes())
}

fn boot(code: Code, image: &NamedTempFile) -> Vm {
    let config = VmConfig::flat(code.bytes()).memory_mib(32).console(true);
    Vm::boot(&config.pmem(image.path()).build().unwrap()).unwrap()
}

#[tokio::test]
async fn a_guest_that_writes_to_an_image_changes_nothing() {
    if !kvm() {
        return;
    }
    let mut content = noise(GRANULE, 3);
    content[0x1234] = b'A';
    let image = image(&content);
    let code = reaching_the_image()
        .print_register(0x1234)
        .write8(0x1234, b'B')
        .write(0x1234, 0x4444_4444)
        .print_register(0x1234)
        .report(1)
        .spin();
    let vm = boot(code, &image);
    assert_eq!(within(5, "end", vm.exited()).await, Exit::PowerOff);
    assert_eq!(vm.console().text(), "AA");
    let writes = vm.exits().mmio.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(writes, 2, "each write left the guest");
    assert!(std::fs::read(image.path()).unwrap() == content);
}

#[tokio::test]
async fn an_image_that_is_cut_short_ends_the_guest_that_touches_it_and_nothing_else() {
    if !kvm() {
        return;
    }
    let image = image(&noise(GRANULE, 4));
    let code = reaching_the_image().print("?").raw(&[
        // mov dx, 0x3fd; l: in al, dx; test al, 1; jz l (waits for input that never comes)
        0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb,
    ]);
    let other = boot(code, &image);
    let code = reaching_the_image();
    let code = code.print_register(0x1000).report(1).spin();
    let config = VmConfig::flat(code.bytes()).memory_mib(32).console(true);
    let vm = Vm::create(&config.pmem(image.path()).build().unwrap()).unwrap();
    image.as_file().set_len(0).unwrap();
    vm.resume().unwrap();
    // Where KVM runs the guest's instructions itself, it answers with zeroes, as for memory that
    // does not exist; elsewhere it gives up on the vCPU.
    match within(5, "end", vm.exited()).await {
        Exit::BusError => assert_eq!(vm.console().text(), ""),
        Exit::PowerOff => assert_eq!(vm.console().text(), "\0"),
        other => panic!("{other}"),
    }
    assert_eq!(other.status(), hearth_vmm::VmStatus::Running);
}

/// Returns how many mappings of `path` this process has.
fn mappings(path: &std::path::Path) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let path = path.to_str().unwrap();
    maps.lines().filter(|line| line.ends_with(path)).count()
}

#[tokio::test]
async fn clones_read_the_image_through_one_mapping_that_goes_with_the_last() {
    if !kvm() {
        return;
    }
    let mut content = noise(2 * GRANULE, 5);
    content[0x42] = b'C';
    let images = [image(&content), image(&noise(GRANULE, 6))];
    let code = reaching_the_image().print_register(0x42).report(1).spin();
    let config = VmConfig::flat(code.bytes()).memory_mib(32).console(true);
    let config = images.iter().fold(config, |c, image| c.pmem(image.path()));
    let config = config.build().unwrap();
    let template = Vm::create(&config).unwrap().into_template().unwrap();
    let cold = Vm::boot(&config).unwrap();
    let clones = [template.fork().unwrap(), template.fork().unwrap(), cold];
    for vm in &clones {
        assert_eq!(within(5, "end", vm.exited()).await, Exit::PowerOff);
        assert_eq!(vm.console().text(), "C");
    }
    for image in &images {
        assert_eq!(mappings(image.path()), 1);
    }
    drop((config, template, clones));
    let gone = async {
        while images.iter().any(|image| mappings(image.path()) > 0) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    within(5, "unmapping", gone).await;
}

/// Returns the content that the guest reads from a file.
async fn read(guest: &Guest, path: &str) -> Vec<u8> {
    let output = guest.run(Command::new("cat").arg(path)).await;
    assert!(output.status.success(), "{path}: {output:?}");
    output.stdout
}

#[tokio::test]
async fn a_real_guest_finds_its_images_and_so_do_its_clones() {
    if !kvm() {
        return;
    }
    let contents = [noise(GRANULE, 1), noise(2 * GRANULE, 2)];
    let images = contents.each_ref().map(|content| image(content));
    let (guest, _) =
        Guest::boot(|config| images.iter().fold(config, |c, image| c.pmem(image.path()))).await;
    let devices = "/sys/bus/nd/devices";
    for (region, address, bytes) in [(0, "0x100000000", "2097152"), (1, "0x108000000", "4194304")] {
        let namespace = format!("{devices}/namespace{region}.0");
        let said = read(&guest, &format!("{namespace}/resource")).await;
        assert_eq!(String::from_utf8_lossy(&said).trim(), address);
        let said = read(&guest, &format!("{namespace}/size")).await;
        assert_eq!(String::from_utf8_lossy(&said).trim(), bytes);
    }
    for (index, content) in contents.iter().enumerate() {
        assert_eq!(
            checksum(&guest, index).await,
            fnv(&content[..READ]),
            "image {index}"
        );
    }
    drop(guest.agent);
    let template = guest.vm.into_template().unwrap();
    let clone = Guest::of(&template).await;
    assert_eq!(checksum(&clone, 1).await, fnv(&contents[1][..READ]));

    // A saved template records its pmem files, and loading it needs them.
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("template");
    template.save(&dir).unwrap();
    drop((clone, template));
    let paths = images.each_ref().map(NamedTempFile::path);
    let template = Template::load_with(&dir, &paths).unwrap();
    let clone = Guest::of(&template).await;
    assert_eq!(checksum(&clone, 0).await, fnv(&contents[0][..READ]));
    let refused = Template::load(&dir).unwrap_err();
    assert!(matches!(refused, StoreError::Images { wanted: 2, .. }));
}

/// Returns the checksum of the beginning of the guest's pmem file `index`, computed in the guest.
async fn checksum(guest: &Guest, index: usize) -> String {
    let command = Command::new("checksum")
        .arg(READ.to_string())
        .arg(format!("/dev/pmem{index}"));
    let output = guest.run(command).await;
    assert!(output.status.success(), "image {index}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Returns the FNV-1a sum, 64 bits, in the format of the guest's `checksum`.
fn fnv(content: &[u8]) -> String {
    let sum = content.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{sum:016x}")
}
