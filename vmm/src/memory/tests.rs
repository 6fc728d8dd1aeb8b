use super::*;
use vm_memory::Bytes;

#[test]
fn memory_is_one_region_up_to_the_gap_and_two_beyond_it() {
    let one = |bytes| vec![(GuestAddress(0), bytes)];
    let two = |beyond| {
        vec![
            (GuestAddress(0), GAP_START),
            (GuestAddress(GAP_END), beyond),
        ]
    };
    for (bytes, wanted) in [
        (PAGE_SIZE, one(PAGE_SIZE)),
        (GAP_START - PAGE_SIZE, one(GAP_START - PAGE_SIZE)),
        (GAP_START, one(GAP_START)),
        (GAP_START + PAGE_SIZE, two(PAGE_SIZE)),
        (GAP_END - PAGE_SIZE, two(GAP_END - GAP_START - PAGE_SIZE)),
        (GAP_END, two(GAP_END - GAP_START)),
        (GAP_END + PAGE_SIZE, two(GAP_END - GAP_START + PAGE_SIZE)),
    ] {
        assert_eq!(ranges(bytes), wanted, "{bytes:#x}");
    }
}

#[test]
fn the_file_goes_on_without_a_hole_where_addresses_leave_the_gap_out() {
    assert_eq!(file_offset(GAP_START - 1), GAP_START - 1);
    assert_eq!(file_offset(GAP_END), GAP_START);
    assert_eq!(file_offset(GAP_END + MIB), GAP_START + MIB);
    let ram = GuestRam::new(GAP_START + MIB).unwrap();
    for (addr, value) in [(GAP_START - 1, 1u8), (GAP_END, 2), (GAP_END + MIB - 1, 3)] {
        ram.map().write_obj(value, GuestAddress(addr)).unwrap();
        let mut byte = [0];
        let offset = file_offset(addr);
        std::os::unix::fs::FileExt::read_exact_at(&**ram.file(), &mut byte, offset).unwrap();
        assert_eq!(byte, [value], "{addr:#x}");
    }
}

#[test]
fn discard_beyond_the_gap_frees_that_page_and_no_other() {
    let ram = GuestRam::new(GAP_START + MIB).unwrap();
    let pages = [GAP_START - PAGE_SIZE, GAP_END, GAP_END + PAGE_SIZE];
    let at = |addr| ram.map().read_obj::<u8>(GuestAddress(addr)).unwrap();
    for addr in pages {
        ram.map().write_obj(7u8, GuestAddress(addr)).unwrap();
    }
    ram.discard(GAP_END, PAGE_SIZE).unwrap();
    assert_eq!(pages.map(at), [7, 0, 7]);
}

#[test]
fn contains_checks_the_whole_range_not_only_its_start() {
    let ram = GuestRam::new(2 * MIB).unwrap();
    assert!(ram.contains(0, 2 * MIB));
    assert!(ram.contains(2 * MIB - 1, 1));
    assert!(!ram.contains(2 * MIB - 1, 2));
    assert!(!ram.contains(2 * MIB, 0));
    assert!(!ram.contains(0, u64::MAX));
    assert!(!ram.contains(u64::MAX, u64::MAX));
}

#[test]
fn a_range_across_the_gap_is_not_inside() {
    let ram = GuestRam::new(GAP_START + MIB).unwrap();
    assert!(ram.contains(GAP_END, MIB));
    assert!(!ram.contains(GAP_START - 4096, 8192));
    assert!(!ram.contains(GAP_START, 1));
    ram.map().write_obj(7u8, GuestAddress(GAP_END)).unwrap();
}

#[test]
fn odd_sizes_are_refused() {
    for bytes in [0, 1, 4095, 4097, u64::MAX, u64::MAX - 4095] {
        assert!(
            matches!(GuestRam::new(bytes), Err(MemoryError::Size(_))),
            "{bytes}"
        );
    }
}

/// Returns whether the mapping of `[host, host + len)` has a flag, by the kernel's name for it
/// (proc(5)).
fn has_flag(host: u64, len: u64, flag: &str) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mapping = format!("{host:x}-{:x} ", host + len);
    let (_, rest) = smaps.split_once(&mapping).unwrap();
    let flags = rest.lines().find(|line| line.starts_with("VmFlags:"));
    flags.unwrap().split(' ').any(|known| known == flag)
}

#[test]
fn a_child_of_the_host_program_gets_none_of_it() {
    let image = memfd().unwrap();
    image.set_len(8192).unwrap();
    let mut ram = GuestRam::new(GAP_START + MIB).unwrap();
    for (_, len, host) in ram.host_regions() {
        assert!(has_flag(host, len, "dc"));
    }
    ram.overlay(GAP_END + 4096, &image, 0, 8192).unwrap();
    let (_, len, host) = ram.host_regions()[1];
    assert!(has_flag(host, 4096, "dc"));
    assert!(has_flag(host + 4096, 8192, "dc"));
    assert!(has_flag(host + 12288, len - 12288, "dc"));
    let clone = GuestRam::map_file(Arc::clone(ram.file()), MIB, Sharing::Private).unwrap();
    let (_, len, host) = clone.host_regions()[0];
    assert!(has_flag(host, len, "dc"));
}

#[test]
fn advice_is_given_for_every_region_and_changes_nothing_else() {
    let ram = GuestRam::with_pages(GAP_START + MIB, Some(HugePages::Transparent)).unwrap();
    ram.map().write_obj(7u8, GuestAddress(GAP_END)).unwrap();
    let advised = |ram: &GuestRam| {
        let regions = ram.host_regions().into_iter();
        regions
            .filter(|&(_, len, host)| has_flag(host, len, "hg"))
            .count()
    };
    assert_eq!(advised(&ram), 2);
    assert_eq!(advised(&GuestRam::new(GAP_START + MIB).unwrap()), 0);
    ram.discard(GAP_END, PAGE_SIZE).unwrap();
    assert_eq!(ram.map().read_obj::<u8>(GuestAddress(GAP_END)).unwrap(), 0);
    assert!(ram.can_be_shared());
}

#[test]
fn memory_of_reserved_pages_is_a_multiple_of_them() {
    for bytes in [0, MIB, 3 * MIB, 2 * MIB + PAGE_SIZE] {
        let made = GuestRam::with_pages(bytes, Some(HugePages::Reserved));
        assert!(matches!(made, Err(MemoryError::Size(_))), "{bytes}");
    }
}

#[test]
fn discard_frees_a_shared_page_and_reads_back_zero() {
    let ram = GuestRam::new(MIB).unwrap();
    ram.map().write_obj(0xAAu8, GuestAddress(8192)).unwrap();
    ram.map().write_obj(0xBBu8, GuestAddress(4096)).unwrap();
    ram.discard(8192, 4096).unwrap();
    assert_eq!(ram.map().read_obj::<u8>(GuestAddress(8192)).unwrap(), 0);
    assert_eq!(ram.map().read_obj::<u8>(GuestAddress(4096)).unwrap(), 0xBB);
}

#[test]
fn discard_in_a_clone_shows_the_template_and_leaves_it_alone() {
    let template = GuestRam::new(MIB).unwrap();
    template.map().write_obj(1u8, GuestAddress(4096)).unwrap();
    let clone = GuestRam::map_file(Arc::clone(template.file()), MIB, Sharing::Private).unwrap();
    clone.map().write_obj(2u8, GuestAddress(4096)).unwrap();
    assert_eq!(
        template.map().read_obj::<u8>(GuestAddress(4096)).unwrap(),
        1
    );
    clone.discard(4096, 4096).unwrap();
    assert_eq!(clone.map().read_obj::<u8>(GuestAddress(4096)).unwrap(), 1);
}

#[test]
fn discard_outside_memory_is_an_error() {
    let ram = GuestRam::new(MIB).unwrap();
    assert!(matches!(
        ram.discard(MIB - 4096, 8192),
        Err(MemoryError::OutOfRange { .. })
    ));
    assert!(matches!(
        ram.discard(u64::MAX, 1),
        Err(MemoryError::OutOfRange { .. })
    ));
    ram.discard(100, 200).unwrap();
}

#[test]
fn an_overlay_shows_its_file_and_keeps_writes_private() {
    let image = memfd().unwrap();
    image.set_len(8192).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[5; 8192], 0).unwrap();
    seal(&image).unwrap();
    let mut ram = GuestRam::new(MIB).unwrap();
    ram.overlay(4096, &image, 0, 8192).unwrap();
    let at = |ram: &GuestRam, addr| ram.map().read_obj::<u8>(GuestAddress(addr)).unwrap();
    assert_eq!(
        [
            at(&ram, 4095),
            at(&ram, 4096),
            at(&ram, 12287),
            at(&ram, 12288)
        ],
        [0, 5, 5, 0]
    );
    ram.map().write_obj(9u8, GuestAddress(4096)).unwrap();
    let mut other = GuestRam::new(MIB).unwrap();
    other.overlay(4096, &image, 0, 8192).unwrap();
    assert_eq!((at(&ram, 4096), at(&other, 4096)), (9, 5));
    ram.discard(4096, 4096).unwrap();
    assert_eq!(at(&ram, 4096), 5);
    assert!(ram.overlay(MIB - 4096, &image, 0, 8192).is_err());
    assert!(ram.overlay(1, &image, 0, 4096).is_err());
}

#[test]
fn a_file_shorter_than_the_vm_is_refused() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(4096).unwrap();
    assert!(GuestRam::map_file(file, MIB, Sharing::Private).is_err());
}

/// Returns the flags (`VmFlags` of proc_pid_smaps(5)) of each mapping of this process that begins
/// in `[start, start + len)`.
fn flags_of(start: u64, len: u64) -> Vec<Vec<String>> {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut found = Vec::new();
    let mut is_inside = false;
    for line in maps.lines() {
        let first = line.split(' ').next().unwrap();
        let begin = first
            .split_once('-')
            .and_then(|(from, _)| u64::from_str_radix(from, 16).ok());
        if let Some(begin) = begin {
            is_inside = (start..start + len).contains(&begin);
        } else if let (true, Some(flags)) = (is_inside, line.strip_prefix("VmFlags: ")) {
            found.push(flags.split_whitespace().map(str::to_owned).collect());
        }
    }
    found
}

#[test]
fn guest_memory_is_in_no_core_dump_and_in_no_child() {
    let mut cold = GuestRam::new(4 * MIB).unwrap();
    let image = memfd().unwrap();
    image.set_len(MIB).unwrap();
    cold.overlay(2 * MIB, &image, 0, MIB).unwrap();
    let clone = GuestRam::map_file(Arc::clone(cold.file()), 4 * MIB, Sharing::Private).unwrap();
    let huge = GuestRam::with_pages(4 * MIB, Some(HugePages::Transparent)).unwrap();
    for (ram, least) in [(&cold, 3), (&clone, 1), (&huge, 1)] {
        let (_, len, host) = ram.host_regions()[0];
        let mappings = flags_of(host, len);
        assert!(mappings.len() >= least, "{mappings:?}");
        for flags in mappings {
            for wanted in ["dd", "dc"] {
                assert!(
                    flags.iter().any(|flag| flag == wanted),
                    "{wanted}: {flags:?}"
                );
            }
        }
    }
}

#[test]
fn what_is_in_guest_memory_cannot_be_made_a_program() {
    use std::os::unix::fs::PermissionsExt;
    // SAFETY: the name is a literal that ends with a NUL; the opened fd belongs to this test and
    // stays open.
    let knows = unsafe { libc::memfd_create(c"probe".as_ptr(), libc::MFD_NOEXEC_SEAL) } >= 0;
    if !knows {
        let text = b"\nNOT MEASURED: the host's kernel knows no memfd that cannot be executed\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), text);
        return;
    }
    let file = memfd().unwrap();
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o111, 0);
    let executable = std::fs::Permissions::from_mode(0o700);
    assert!(file.set_permissions(executable).is_err());
    // It can still be sealed.
    seal(&file).unwrap();
}

/// The host once refused this, and only a log message at debug level said so.
#[test]
fn a_program_that_locks_its_memory_gets_back_what_its_guests_give_up() {
    for sharing in [Sharing::Shared, Sharing::Private] {
        let file = Arc::clone(GuestRam::new(MIB).unwrap().file());
        let ram = GuestRam::map_file(file, MIB, sharing).unwrap();
        let (_, len, host) = ram.host_regions()[0];
        // SAFETY: the mapping lives as long as `ram`; locking changes nothing of its content.
        let locked = unsafe { libc::mlock(host as *const libc::c_void, len as usize) };
        if locked != 0 {
            let text = b"\nNOT MEASURED: 1 MiB cannot be locked here\n";
            let _ = std::io::Write::write_all(&mut std::io::stderr(), text);
            return;
        }
        ram.map().write_slice(&[7; 8192], GuestAddress(0)).unwrap();
        ram.discard(0, 8192).unwrap();
        let mut bytes = [1; 8192];
        // SAFETY: `vec` has room for the answer of mincore(2) about two pages of the mapping.
        let held = unsafe {
            let mut vec = [0u8; 2];
            assert_eq!(
                libc::mincore(host as *mut libc::c_void, 8192, vec.as_mut_ptr()),
                0
            );
            vec
        };
        if sharing == Sharing::Shared {
            assert_eq!(held.map(|page| page & 1), [0; 2]);
        }
        ram.map().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert_eq!(bytes, [0; 8192]);
    }
}
