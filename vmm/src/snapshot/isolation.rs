//! Isolation of clones: no VM sees the writes of another. A hundred clones write to random pages of
//! the same few thousand, all at once, and then every byte of each clone is checked.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{GuestRam, MIB, PAGE_SIZE};
use crate::vm::Vm;
use crate::{Exit, VmConfig};

const MEMORY: u64 = 32 * MIB;
/// Address of a clone's seed; zero until the test writes it.
const SEED: u64 = 2 * MIB;
/// Start of the area that a clone writes to: 4,096 pages.
const AREA: u64 = 4 * MIB;
const AREA_MASK: u64 = 0x00ff_f000;
/// Number of writes of each clone.
const WRITES: u32 = 400;
/// The initial page tables of the guest, in which the processor sets accessed and dirty bits.
const PAGE_TABLES: std::ops::Range<usize> = 0x9000..0x1_0000;
/// A clone that takes longer is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// Guest code that waits for its seed, draws numbers from it by xorshift, and writes each number to
/// the page that it selects.
fn code() -> Vec<u8> {
    let mut code = vec![
        // l: mov rax, [SEED]; test rax, rax; jz l
        0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x20, 0x00, 0x48, 0x85, 0xc0, 0x74, 0xf3, 0xb9,
    ];
    // mov ecx, WRITES
    code.extend(WRITES.to_le_bytes());
    let draw = [
        // mov rbx, rax; shl rbx, 13; xor rax, rbx
        0x48, 0x89, 0xc3, 0x48, 0xc1, 0xe3, 13, 0x48, 0x31, 0xd8,
        // mov rbx, rax; shr rbx, 7; xor rax, rbx
        0x48, 0x89, 0xc3, 0x48, 0xc1, 0xeb, 7, 0x48, 0x31, 0xd8,
        // mov rbx, rax; shl rbx, 17; xor rax, rbx
        0x48, 0x89, 0xc3, 0x48, 0xc1, 0xe3, 17, 0x48, 0x31, 0xd8,
        // mov rbx, rax; and ebx, AREA_MASK; mov [rbx + AREA], rax; dec ecx
        0x48, 0x89, 0xc3, 0x81, 0xe3, 0x00, 0xf0, 0xff, 0x00, 0x48, 0x89, 0x83, 0x00, 0x00, 0x40,
        0x00, 0xff, 0xc9,
    ];
    code.extend(draw);
    // jnz to the draw
    let back = i8::try_from(draw.len() + 2).unwrap();
    code.extend([0x75, (-back).cast_unsigned()]);
    // mov al, 1; mov dx, 0x5f0; out dx, al: power off; then an endless loop
    code.extend([0xb0, 1, 0x66, 0xba, 0xf0, 0x05, 0xee, 0xeb, 0xfe]);
    code
}

/// Does what [`code`] does, in a copy of the memory.
fn play(memory: &mut [u8], seed: u64) {
    let mut put = |at: u64, value: u64| {
        let at = usize::try_from(at).unwrap();
        memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(SEED, seed);
    let mut state = seed;
    for _ in 0..WRITES {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        put(AREA + (state & AREA_MASK), state);
    }
}

fn all_of(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(ram.bytes()).unwrap()];
    ram.map().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn digest_of(template: &Template) -> manifest::Digest {
    let target = crate::memory::memfd().unwrap();
    target.set_len(MEMORY).unwrap();
    memory::copy_pages(&template.frozen.memory, &target, MEMORY).unwrap()
}

/// A clone, and its memory for the test to inspect.
fn clone_of(template: &Template) -> (Vm, GuestRam) {
    let prepared = template.prepare().unwrap();
    let ram = prepared.ram();
    (prepared.fork_paused().unwrap(), ram)
}

/// Whether this host has KVM. If not, says so on stderr, past the output capture of the test
/// runner, which counts these lines.
fn kvm() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"\nNOT MEASURED: no /dev/kvm\n");
    }
    there
}

async fn clones_do_not_mix(count: u64) {
    if !kvm() {
        return;
    }
    let config = VmConfig::flat(code()).memory_mib(MEMORY / MIB);
    let inner = VmInner::create(&config.build().unwrap()).unwrap();
    assert!(inner.control.settle(STUCK));
    // Every other page of the area has data in the template, the rest are holes.
    let fill = |ram: &GuestRam| {
        for page in (0..=AREA_MASK / PAGE_SIZE).step_by(2) {
            let at = GuestAddress(AREA + page * PAGE_SIZE);
            ram.map()
                .write_slice(&[page as u8 | 1; 4096], at)
                .map_err(std::io::Error::other)?;
        }
        Ok(())
    };
    inner.capture().unwrap().save(fill).unwrap();
    let template = Template::of(inner).unwrap();
    let before = digest_of(&template);
    let (untouched, quiet) = clone_of(&template);
    let original = all_of(&quiet);

    let clones: Vec<(u64, Vm, GuestRam)> = (1..=count)
        .map(|number| {
            let seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let (vm, ram) = clone_of(&template);
            ram.map().write_obj(seed, GuestAddress(SEED)).unwrap();
            vm.resume().unwrap();
            (seed, vm, ram)
        })
        .collect();
    for (_, vm, _) in &clones {
        let exit = tokio::time::timeout(STUCK, vm.exited()).await.unwrap();
        assert_eq!(exit, Exit::PowerOff);
    }
    for (seed, _, ram) in &clones {
        let mut expected = original.clone();
        play(&mut expected, *seed);
        let actual = all_of(ram);
        expected[PAGE_TABLES].copy_from_slice(&actual[PAGE_TABLES]);
        let wrong = (actual != expected)
            .then(|| (0..actual.len()).find(|at| actual[*at] != expected[*at]))
            .flatten();
        assert_eq!(
            wrong, None,
            "the clone of seed {seed:#x} has a byte that is not its own"
        );
    }
    assert!(
        all_of(&quiet) == original,
        "a clone that did nothing changed"
    );
    assert_eq!(digest_of(&template), before, "the template changed");
    drop(untouched);
}

#[tokio::test]
async fn a_hundred_clones_that_write_at_once_do_not_mix() {
    clones_do_not_mix(100).await;
}

/// Guest code that increments a counter at 4 MiB and then one at the end of memory, for ever. The
/// first counter is never behind the second.
const TWO_COUNTS: [u8; 18] = [
    // l: inc qword [0x400000]; inc qword [0x1fff000]; jmp l
    0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x40, 0x00, 0x48, 0xff, 0x04, 0x25, 0x00, 0xf0, 0xff, 0x01,
    0xeb, 0xee,
];

#[test]
fn a_vm_that_is_resumed_while_it_is_captured_does_not_run_before_the_end() {
    if !kvm() {
        return;
    }
    let config = VmConfig::flat(TWO_COUNTS).memory_mib(MEMORY / MIB);
    let inner = VmInner::create(&config.build().unwrap()).unwrap();
    // The data between the two counters takes time to copy.
    let fill = |ram: &GuestRam| {
        for page in 0x401..0x1f00 {
            let at = GuestAddress(page * PAGE_SIZE);
            ram.map()
                .write_slice(&[page as u8; 4096], at)
                .map_err(std::io::Error::other)?;
        }
        Ok(())
    };
    assert!(inner.control.settle(STUCK));
    inner.capture().unwrap().save(fill).unwrap();
    let vm = Vm::of(inner);
    vm.resume().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let counts = std::thread::scope(|scope| {
        scope.spawn(|| {
            let bound = Instant::now() + STUCK;
            while !done.load(std::sync::atomic::Ordering::Relaxed) && Instant::now() < bound {
                vm.resume().unwrap();
            }
        });
        let capture = || {
            let template = vm.snapshot().unwrap();
            let count = |at| {
                let mut bytes = [0; 8];
                let memory = &template.frozen.memory;
                std::os::unix::fs::FileExt::read_exact_at(&**memory, &mut bytes, at).unwrap();
                u64::from_le_bytes(bytes)
            };
            (count(4 * MIB), count(MEMORY - PAGE_SIZE))
        };
        let counts: Vec<_> = (0..20).map(|_| capture()).collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        counts
    });
    for (first, second) in &counts {
        assert!(first - second <= 1, "torn: {counts:?}");
    }
    assert!(counts.first() < counts.last(), "it stood still: {counts:?}");
    assert_eq!(vm.status(), crate::VmStatus::Running);
}

/// Regression: all of these calls waited for the copy, which takes time in proportion to the
/// guest's memory.
#[test]
fn a_vm_that_is_copied_can_be_looked_at_and_ended() {
    if !kvm() {
        return;
    }
    struct Told(std::sync::mpsc::Sender<()>);
    impl Drop for Told {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }
    let config = VmConfig::flat([0xeb, 0xfe]).memory_mib(32);
    let vm = Vm::create(&config.build().unwrap()).unwrap();
    vm.pause().unwrap();
    let (said, told) = std::sync::mpsc::channel();
    vm.on_drop(Told(said));
    let capture = vm.capture().unwrap();
    let whole = capture.save(|ram| {
        assert!(!capture.is_over());
        assert_eq!(vm.device_faults().len(), 2);
        vm.private_bytes().unwrap();
        vm.kill();
        vm.teardown();
        assert!(capture.is_over());
        // The memory that is copied is still mapped, and the VM's drop guards go after the capture.
        assert!(told.try_recv().is_err());
        super::memory::copy_out(ram, || true).map(drop)?;
        super::memory::copy_out(ram, || !capture.is_over()).map(drop)
    });
    // Not asserted: a copy of memory without data has no page range to stop at.
    drop(whole);
    assert!(told.try_recv().is_err());
    drop(capture);
    told.try_recv().unwrap();
    assert!(vm.snapshot().is_err());
}
