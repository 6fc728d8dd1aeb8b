//! Attacks on the rings: their addresses, indices and descriptors.

use super::*;

/// Returns the index of the queue on which the device takes requests.
fn requests(attacker: &Attacker) -> u32 {
    u32::from(attacker.kind == Kind::Vsock)
}

/// Writes a chain with head 0 in which the device finds no fault.
fn honest(attacker: &Attacker, queue: u32) {
    match attacker.kind {
        Kind::Vsock => {
            let mut header = [0; 44];
            header[0] = 77; // From another guest's CID: not answered.
            attacker.write(BUFFER, &header);
            attacker.descriptor(queue, 0, (BUFFER, 44), 0, 0);
        }
        Kind::Balloon => attacker.descriptor(queue, 0, (BUFFER, 4), 0, 0),
        Kind::Pmem => {
            attacker.descriptor(queue, 0, (BUFFER, 4), NEXT, 1);
            attacker.descriptor(queue, 1, (BUFFER + 4, 4), WRITE, 0);
        }
    }
}

/// The device ring's flags, which switch notifications, overlap the driver ring's index: each look
/// of the device at the ring changes what the next look sees. This blocked the event thread for
/// ever before [`Fault::Gone`](crate::virtio::Fault::Gone).
#[test]
fn a_notification_switch_laid_over_the_index_does_not_make_the_device_spin() {
    for kind in [Kind::Vsock, Kind::Balloon, Kind::Pmem] {
        ends("notification switch over the index", move || {
            let mut attacker = Attacker::new(kind);
            let queue = requests(&attacker);
            let [desc, driver, _] = parts(queue);
            let odd = [desc, driver + 2, driver + 4];
            attacker.up_with(F_VERSION_1, attacker.queues, queue, odd);
            honest(&attacker, queue);
            attacker.offer_in(queue, driver + 2, 0);
            attacker.run();
            attacker.assert_refused("notification switch over the index", "rings overlap");
        });
    }
}

/// The same in the receive queue, which the device looks at only when there is a packet to send.
#[test]
fn a_notification_switch_laid_over_the_index_of_the_receive_queue_does_not_either() {
    ends("notification switch over RX's index", || {
        let mut attacker = Attacker::new(Kind::Vsock);
        let [desc, driver, _] = parts(0);
        attacker.up_with(F_VERSION_1, 3, 0, [desc, driver + 2, driver + 4]);
        attacker.write(desc, &descriptor((BUFFER + 0x1000, 0x1000), WRITE, 0));
        attacker.offer_in(0, driver + 2, 0);
        // Two packets for a connection that does not exist: two resets, but one buffer.
        let mut header = [0; 44];
        (header[0], header[8], header[28], header[30]) = (3, 2, 1, 5);
        attacker.write(BUFFER, &header);
        attacker.descriptor(1, 0, (BUFFER, 44), 0, 0);
        attacker.write(parts(1)[1], &[0, 0, 2, 0, 0, 0, 0, 0]);
        attacker.set(register::QUEUE_NOTIFY, 1);
        attacker.run();
        attacker.assert_refused("notification switch over RX's index", "rings overlap");
    });
}

#[test]
fn rings_laid_over_each_other_are_their_drivers_loss() {
    type Odd = fn([u64; 3]) -> [u64; 3];
    let overlaps: &[(&str, u64, Odd)] = &[
        ("the device ring over the driver ring", 0, |[d, a, _]| {
            [d, a, a]
        }),
        ("the device ring over the descriptors", 0, |[d, a, _]| {
            [d, a, d]
        }),
        (
            "the device's event index over the driver's index",
            F_EVENT_IDX,
            |[d, _, u]| [d, u + 4 + 8 * u64::from(SIZE) - 2, u],
        ),
    ];
    for (attack, features, odd) in overlaps {
        for (name, mut attacker) in Attacker::each() {
            let attack = format!("{name}: {attack}");
            let queue = requests(&attacker);
            let odd = odd(parts(queue));
            attacker.up_with(F_VERSION_1 | features, attacker.queues, queue, odd);
            honest(&attacker, queue);
            attacker.offer_in(queue, odd[1], 0);
            attacker.run();
            assert_eq!(attacker.word(odd[2] + 2), 1, "{attack}: served once");
            attacker.assert_unaffected(&attack);
        }
    }
}

#[test]
fn indices_that_jump_need_a_reset() {
    for (attack, jumps) in [
        ("one more than there are entries", &[SIZE + 1][..]),
        ("as far as an index can be", &[u16::MAX]),
        ("back to where it was", &[1, 0]),
        ("back by one entry", &[2, 1]),
    ] {
        for (name, mut attacker) in Attacker::each() {
            let queue = requests(&attacker);
            attacker.up(F_VERSION_1, attacker.queues);
            honest(&attacker, queue);
            for index in jumps {
                attacker.write(parts(queue)[1] + 2, &index.to_le_bytes());
                attacker.run();
            }
            attacker.assert_refused(&format!("{name}: {attack}"), "available ring index");
        }
    }
}

/// Address 0 is ordinary memory, but `virtio_queue` refuses a driver ring there.
#[test]
fn a_driver_ring_at_address_zero_needs_a_reset() {
    for (name, mut attacker) in Attacker::each() {
        let queue = requests(&attacker);
        let [desc, _, device] = parts(queue);
        attacker.up_with(F_VERSION_1, attacker.queues, queue, [desc, 0, device]);
        attacker.offer_in(queue, 0, 0);
        attacker.run();
        attacker.assert_refused(name, "not ready");
    }
}

#[test]
fn chains_that_lead_nowhere_need_a_reset() {
    let short = "packet shorter than its header";
    let lacking = "without its 4 bytes each way";
    let (outside, index) = ("outside guest memory", "descriptor index");
    let end = (RAM - 2, 44);
    type Chain<'a> = &'a [((u64, u32), u16, u16)];
    // Expected faults of vsock, balloon and pmem; empty where the device takes the chain.
    let attacks: &[(&str, u16, Chain<'_>, [&str; 3])] = &[
        ("a head beyond the table", SIZE, &[], [index; 3]),
        ("the last head there is", u16::MAX, &[], [index; 3]),
        (
            "a chain that goes on outside the table",
            0,
            &[((BUFFER, 4), NEXT, 500)],
            [short, "", lacking],
        ),
        (
            "a chain of nothing that bites its tail",
            0,
            &[((BUFFER, 0), NEXT, 1), ((BUFFER, 0), NEXT, 0)],
            [short, "", lacking],
        ),
        (
            "a buffer over the end of memory",
            0,
            &[(end, 0, 0)],
            [outside, outside, outside],
        ),
        (
            "a buffer that wraps around 2^64",
            0,
            &[((u64::MAX - 3, 44), 0, 0)],
            [outside, outside, outside],
        ),
        (
            "a buffer of 4 GiB",
            0,
            &[((BUFFER, u32::MAX), 0, 0)],
            [outside, "more page numbers", lacking],
        ),
        (
            "only buffers to be written",
            0,
            &[((BUFFER, 44), WRITE, 0)],
            [short, "", lacking],
        ),
        (
            "only buffers to be read",
            0,
            &[((BUFFER, 4), 0, 0)],
            [short, "", lacking],
        ),
        (
            "an indirect table in an indirect table",
            0,
            &[((parts(9)[0], 16), INDIRECT, 0)],
            [short, "", lacking],
        ),
        (
            "an indirect table of odd size",
            0,
            &[((BUFFER, 17), INDIRECT, 0)],
            [short, "", lacking],
        ),
        (
            "an indirect table of nothing",
            0,
            &[((BUFFER, 0), INDIRECT, 0)],
            [short, "", lacking],
        ),
        (
            "an indirect table outside memory",
            0,
            &[((RAM, 16), INDIRECT, 0)],
            [short, "", lacking],
        ),
    ];
    for (attack, head, chain, says) in attacks {
        for ((name, mut attacker), why) in Attacker::each().into_iter().zip(says) {
            let attack = format!("{name}: {attack}");
            let queue = requests(&attacker);
            attacker.up(F_VERSION_1, attacker.queues);
            attacker.write(parts(9)[0], &descriptor((parts(9)[0], 16), INDIRECT, 0));
            for (at, (place, flags, next)) in (0u16..).zip(*chain) {
                attacker.descriptor(queue, at, *place, *flags, *next);
            }
            attacker.offer(queue, *head);
            attacker.run();
            if why.is_empty() {
                assert_eq!(attacker.used(queue), 1, "{attack}: given back");
                attacker.assert_unaffected(&attack);
            } else {
                attacker.assert_refused(&attack, why);
            }
        }
    }
}

/// `virtio_queue` logs an error for each head outside its table: a guest could fill the log of the
/// embedding program. Every attacker of this suite checks the log (see [`log`]).
#[test]
fn a_flood_of_heads_outside_the_table_leaves_the_log_alone() {
    for (_, mut attacker) in Attacker::each() {
        for head in 0..2000 {
            let queue = requests(&attacker);
            attacker.up(F_VERSION_1, attacker.queues);
            attacker.offer(queue, SIZE + head);
            attacker.run();
        }
        assert_eq!(attacker.transport.faults(), 2000);
        assert_eq!(log::lines(), 0);
    }
    // Checks that both kinds of log line are counted.
    ::log::error!("a line");
    tracing::warn!("another");
    assert_eq!(log::take(), 2);
}

/// Indirect tables of 65535 descriptors, which no device offers to take, cost no more than a direct
/// chain: the device reads no more entries than a direct chain can have.
#[test]
fn a_huge_indirect_table_is_not_walked() {
    let table = MIB;
    for (name, at, reached) in [("within reach", 100u16, true), ("out of reach", 200, false)] {
        for kind in [Kind::Balloon, Kind::Pmem] {
            let mut attacker = Attacker::new(kind);
            attacker.up(F_VERSION_1, attacker.queues);
            let mut entries = Vec::new();
            for index in 0..u16::MAX {
                entries.extend(descriptor((BUFFER, 0), NEXT, index + 1));
            }
            let page = RAM / 2 + 0x8000;
            let [one, two] = match kind {
                Kind::Pmem => [((BUFFER, 4), NEXT), ((BUFFER + 8, 4), NEXT | WRITE)],
                _ => [((BUFFER, 4), NEXT), ((BUFFER, 0), NEXT)],
            };
            for (index, (place, flags)) in (at..).zip([one, two]) {
                let slot = 16 * usize::from(index);
                entries[slot..slot + 16].copy_from_slice(&descriptor(place, flags, index + 1));
            }
            attacker.write(table, &entries);
            let pfn = if kind == Kind::Balloon { page >> 12 } else { 0 };
            attacker.write(BUFFER, &u32::try_from(pfn).unwrap().to_le_bytes());
            attacker.write(BUFFER + 8, &[0x55; 4]);
            attacker.write(page, &[0x55]);
            let len = u32::try_from(entries.len()).unwrap();
            attacker.descriptor(0, 0, (table, len), INDIRECT, 0);
            attacker.offer(0, 0);
            attacker.run();
            match kind {
                Kind::Pmem if !reached => {
                    attacker.assert_refused(name, "without its 4 bytes each way");
                }
                Kind::Pmem => {
                    assert_eq!(attacker.word(BUFFER + 8), 0, "answered");
                    attacker.assert_unaffected(name);
                }
                _ => {
                    assert_eq!(attacker.word(page) == 0, reached, "{name}");
                    attacker.assert_unaffected(name);
                }
            }
        }
    }
}
