//! Attacks on memory through the device: pages given up while in use, results written to harmful
//! addresses.

use super::*;

const PAGE: u64 = 4096;

/// The page number of an address, as the balloon's driver sends it.
fn pfn(address: u64) -> [u8; 4] {
    u32::try_from(address / PAGE).unwrap().to_le_bytes()
}

/// The page of the driver ring is released while in use: its index reads as zero again, which is a
/// fault.
#[test]
fn rings_given_to_the_balloon_need_a_reset() {
    let (mut attacker, _) = Attacker::balloon();
    attacker.up(F_VERSION_1, 2);
    attacker.write(BUFFER, &pfn(parts(0)[1]));
    attacker.descriptor(0, 0, (BUFFER, 4), 0, 0);
    attacker.offer(0, 0);
    attacker.run();
    assert_eq!(attacker.word(parts(0)[1] + 2), 0, "the page is gone");
    attacker.assert_refused("the driver ring in the balloon", "available ring index");
}

#[test]
fn descriptors_given_to_the_balloon_are_the_drivers_loss() {
    let (mut attacker, _) = Attacker::balloon();
    attacker.up(F_VERSION_1, 2);
    attacker.write(BUFFER, &[pfn(parts(0)[0]), pfn(parts(0)[2])].concat());
    attacker.descriptor(0, 0, (BUFFER, 8), 0, 0);
    attacker.offer(0, 0);
    attacker.run();
    assert_eq!(attacker.word(parts(0)[0] + 8), 0, "the page is gone");
    assert_eq!(attacker.used(0), 1, "written after the page came back");
    attacker.assert_unaffected("descriptors in the balloon");
}

#[test]
fn reports_of_pages_in_use_cost_their_driver_its_rings() {
    let (mut attacker, balloon) = Attacker::balloon();
    attacker.up(F_VERSION_1 | F_REPORTING, 3);
    let rings = parts(2)[0];
    attacker.descriptor(2, 0, (rings, 0xc000), WRITE, 0);
    attacker.offer(2, 0);
    attacker.run();
    assert_eq!(balloon.reported(), 0, "less than a MiB");
    assert_eq!(attacker.word(rings + 8), 0, "released");
    attacker.assert_refused("a report of the rings", "available ring index");
}

#[test]
fn reports_of_what_is_not_whole_pages_of_memory_release_nothing() {
    for (attack, place, flags) in [
        ("outside memory", (RAM, MIB as u32), WRITE),
        ("over the end of memory", (RAM - MIB, 2 * MIB as u32), WRITE),
        ("of a device's registers", (0xd000_0000, 4096), WRITE),
        ("of the image", (GAP_END, MIB as u32), WRITE),
        ("around 2^64", (u64::MAX - 4095, 4096), WRITE),
        ("of 4 GiB", (0, u32::MAX), WRITE),
        ("of less than a page", (BUFFER + 1, 4094), WRITE),
        ("of two halves of pages", (BUFFER + 2048, 4096), WRITE),
        ("of nothing", (BUFFER, 0), WRITE),
        ("in a buffer to be read", (BUFFER, MIB as u32), 0),
    ] {
        let (mut attacker, balloon) = Attacker::balloon();
        attacker.up(F_VERSION_1 | F_REPORTING, 3);
        let marks = [BUFFER, BUFFER + PAGE, RAM - PAGE];
        for mark in marks {
            attacker.write(mark, &[0x77; 4]);
        }
        attacker.descriptor(2, 0, place, flags, 0);
        attacker.offer(2, 0);
        attacker.run();
        assert_eq!(attacker.used(2), 1, "{attack}: given back");
        assert!(
            marks.iter().all(|mark| attacker.word(*mark) == 0x7777),
            "{attack}"
        );
        assert_eq!(balloon.reported(), 0, "{attack}");
        attacker.assert_unaffected(attack);
    }
}

#[test]
fn page_numbers_that_are_not_the_guests_are_ignored() {
    let (mut attacker, _) = Attacker::balloon();
    attacker.up(F_VERSION_1, 2);
    attacker.write(RAM - PAGE, &[0x77; 4]);
    let end = u32::try_from(RAM / PAGE).unwrap();
    let numbers = [
        end,
        end + 1,
        0xd_0000,
        0xf_ffff,
        0x10_0000,
        u32::MAX,
        u32::MAX - 1,
    ];
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    attacker.write(BUFFER, &bytes);
    // The last three bytes are part of a number.
    attacker.descriptor(0, 0, (BUFFER, 4 * 7 + 3), 0, 0);
    attacker.offer(0, 0);
    attacker.run();
    assert_eq!((attacker.used(0), attacker.word(RAM - PAGE)), (1, 0x7777));
    attacker.assert_unaffected("page numbers outside memory");
}

/// Each page on its own costs two system calls: a turn takes no more than 256 of them, however few
/// bytes they are, and no more than 16 MiB.
#[test]
fn scattered_pages_cost_their_driver_its_turn() {
    for (stride, each, ranges) in [(1, 512, 1), (2, 384, 384)] {
        let (mut attacker, _) = Attacker::balloon();
        attacker.up(F_VERSION_1, 2);
        let pages = (0..each).map(|n| 0x100 + n * stride);
        let bytes: Vec<u8> = pages.flat_map(u32::to_le_bytes).collect();
        // The last page, which is not among those that are given up.
        let at = RAM - PAGE;
        attacker.write(at, &bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        for index in 0..SIZE {
            attacker.descriptor(0, index, (at, len), 0, 0);
            attacker.write(parts(0)[1] + 4 + 2 * u64::from(index), &index.to_le_bytes());
        }
        attacker.write(parts(0)[1] + 2, &SIZE.to_le_bytes());
        // 16 MiB in 8 ranges are one turn, 3072 ranges are 12; the last turn finds nothing.
        let turns = usize::from(SIZE) * ranges / 256 + usize::from(ranges == 1) + 1;
        assert_eq!(attacker.run(), turns, "stride {stride}");
        assert_eq!(attacker.used(0), SIZE, "stride {stride}");
        attacker.assert_unaffected("scattered pages");
    }
}

/// One descriptor covers 2 GiB: in one turn it would block the event thread for half a second.
#[test]
fn a_report_of_gigabytes_leaves_the_host_in_turns_of_16_mib() {
    const START: u64 = 64 * MIB;
    const REPORT: u64 = 2 << 30;
    let doorbell = Doorbell::new().unwrap();
    let device = Kind::Balloon.device(&doorbell);
    let mut attacker = Attacker::in_memory(Kind::Balloon, device, doorbell, 3 << 30);
    attacker.up(F_VERSION_1 | F_REPORTING, 3);
    // One page in each MiB, and one on either side.
    let marks: Vec<u64> = (START..START + REPORT).step_by(MIB as usize).collect();
    for mark in &marks {
        attacker.write(*mark, &[0x77; 4]);
    }
    let around = [START - PAGE, START + REPORT];
    for mark in around {
        attacker.write(mark, &[0x77; 4]);
    }
    let len = u32::try_from(REPORT).unwrap();
    attacker.descriptor(2, 0, (START, len), WRITE, 0);
    attacker.offer(2, 0);
    for turn in 1..=128 {
        assert_eq!(attacker.used(2), 0, "not before all of it is gone");
        assert_eq!(attacker.transport.run(), Progress::More);
        let gone = marks.iter().filter(|mark| attacker.word(**mark) == 0);
        assert_eq!(gone.count(), 16 * turn, "after {turn} turns");
    }
    assert_eq!(attacker.used(2), 1);
    assert_eq!(attacker.transport.run(), Progress::Idle);
    assert!(around.iter().all(|mark| attacker.word(*mark) == 0x7777));
    attacker.assert_unaffected("a report of gigabytes");
}

#[test]
fn results_are_written_to_memory_and_nowhere_else() {
    let outside = "outside guest memory";
    for (attack, address, why) in [
        ("in the image", GAP_END, outside),
        ("over the end of memory", RAM - 3, outside),
        ("around 2^64", u64::MAX - 3, outside),
        ("on a device's registers", 0xd000_0000, outside),
        // The result, zero, moves the driver ring's index back.
        ("over the driver ring", parts(0)[1], "available ring index"),
    ] {
        let mut attacker = Attacker::new(Kind::Pmem);
        attacker.up(F_VERSION_1, 1);
        attacker.write(BUFFER, &[0; 4]);
        attacker.descriptor(0, 0, (BUFFER, 4), NEXT, 1);
        attacker.descriptor(0, 1, (address, 4), WRITE, 0);
        attacker.offer(0, 0);
        attacker.run();
        attacker.assert_refused(attack, why);
    }
}
