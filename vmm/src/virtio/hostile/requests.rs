//! Attacks by the content of requests: the balloon's statistics, pmem flushes, configuration space.

use super::*;

/// A balloon that was started with its statistics queue, and the host's handle of it.
fn with_statistics() -> (Attacker, Balloon) {
    let (mut attacker, balloon) = Attacker::balloon();
    attacker.up(F_VERSION_1 | F_STATS, 3);
    (attacker, balloon)
}

#[test]
fn a_second_statistics_buffer_needs_a_reset() {
    let (mut attacker, _) = with_statistics();
    attacker.descriptor(2, 0, (BUFFER, 10), 0, 0);
    attacker.write(parts(2)[1], &[0, 0, 2, 0, 0, 0, 0, 0]);
    attacker.run();
    assert_eq!(attacker.used(2), 0, "held");
    attacker.assert_refused("two buffers at once", "second statistics buffer");
}

#[tokio::test]
async fn statistics_are_read_to_a_bound_wherever_they_lie() {
    for (attack, place, flags, why) in [
        (
            "to the end of memory",
            (BUFFER, (RAM - BUFFER) as u32),
            0,
            "",
        ),
        ("of 4 GiB", (BUFFER, u32::MAX), 0, ""),
        ("of no bytes", (BUFFER, 0), 0, ""),
        ("in a buffer to be written", (BUFFER, 100), WRITE, ""),
        ("outside memory", (RAM, 10), 0, "outside guest memory"),
        (
            "over the end of memory",
            (RAM - 5, 10),
            0,
            "outside guest memory",
        ),
    ] {
        let (mut attacker, balloon) = with_statistics();
        // The device reads 64 entries: free memory is in the last of them, the total in the next.
        let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let mut report = entry(999, 1).repeat(63);
        report.extend(entry(4, 7));
        report.extend(entry(5, 8));
        attacker.write(BUFFER, &report);
        attacker.descriptor(2, 0, place, flags, 0);
        attacker.offer(2, 0);
        attacker.run();
        if !why.is_empty() {
            attacker.assert_refused(attack, why);
            continue;
        }
        let asked = tokio::spawn(async move { balloon.stats(Duration::from_secs(60)).await });
        while attacker.used(2) == 0 {
            tokio::task::yield_now().await;
            attacker.run();
        }
        // The second report, in the same buffer, is the answer.
        attacker.write(parts(2)[1], &[0, 0, 2, 0, 0, 0, 0, 0]);
        attacker.run();
        let stats = asked.await.unwrap().unwrap();
        let all = place.1 >= 640 && flags == 0;
        assert_eq!(stats.free, all.then_some(7), "{attack}");
        assert_eq!(stats.total, None, "{attack}: beyond the bound");
        attacker.assert_unaffected(attack);
    }
}

#[test]
fn requests_of_an_image_that_are_none_need_a_reset_or_are_refused() {
    let lacking = "without its 4 bytes each way";
    type Chain<'a> = &'a [((u64, u32), u16)];
    let attacks: &[(&str, Chain<'_>, &str)] = &[
        (
            "a type of 3 bytes",
            &[((BUFFER, 3), NEXT), ((BUFFER + 8, 4), WRITE)],
            lacking,
        ),
        (
            "a result of 3 bytes",
            &[((BUFFER, 4), NEXT), ((BUFFER + 8, 3), WRITE)],
            lacking,
        ),
        (
            "a type in two pieces",
            &[((BUFFER, 2), NEXT), ((BUFFER + 2, 2), 0)],
            lacking,
        ),
        (
            "the result before the type",
            &[((BUFFER + 8, 4), NEXT | WRITE), ((BUFFER, 4), 0)],
            "",
        ),
        (
            "a type of 4 GiB",
            &[((BUFFER, u32::MAX), NEXT), ((BUFFER + 8, 4), WRITE)],
            lacking,
        ),
        (
            "two types",
            &[
                ((BUFFER, 4), NEXT),
                ((BUFFER + 4, 4), NEXT),
                ((BUFFER + 8, 4), WRITE),
            ],
            "",
        ),
        (
            "two results",
            &[
                ((BUFFER, 4), NEXT),
                ((BUFFER + 8, 4), NEXT | WRITE),
                ((RAM, 4), WRITE),
            ],
            "",
        ),
    ];
    for (attack, chain, why) in attacks {
        let mut attacker = Attacker::new(Kind::Pmem);
        attacker.up(F_VERSION_1, 1);
        // A flush, then a type that does not exist, then the bytes that the result replaces.
        attacker.write(BUFFER, &[0, 0, 0, 0, 9, 0, 0, 0, 0x55, 0x55, 0x55, 0x55]);
        for (at, (place, flags)) in (0u16..).zip(*chain) {
            attacker.descriptor(0, at, *place, *flags, at + 1);
        }
        attacker.offer(0, 0);
        attacker.run();
        if why.is_empty() {
            assert_eq!(
                (attacker.used(0), attacker.word(BUFFER + 8)),
                (1, 0),
                "{attack}"
            );
            attacker.assert_unaffected(attack);
        } else {
            assert_eq!(attacker.word(BUFFER + 8), 0x5555, "{attack}: not answered");
            attacker.assert_refused(attack, why);
        }
    }
    for kind in [1u32, 9, u32::MAX] {
        let mut attacker = Attacker::new(Kind::Pmem);
        attacker.up(F_VERSION_1, 1);
        attacker.write(BUFFER, &kind.to_le_bytes());
        attacker.descriptor(0, 0, (BUFFER, 4), NEXT, 1);
        attacker.descriptor(0, 1, (BUFFER + 8, 4), WRITE, 0);
        attacker.offer(0, 0);
        attacker.run();
        assert_eq!(attacker.word(BUFFER + 8), 0xffff, "{kind}: refused");
        attacker.assert_unaffected("a type that does not exist");
    }
}

#[test]
fn configuration_space_answers_at_every_offset_and_width_and_stays() {
    for (name, mut attacker) in Attacker::each() {
        attacker.up(F_VERSION_1, attacker.queues);
        let mut before = [0; 64];
        attacker.transport.read(register::CONFIG, &mut before);
        for offset in register::CONFIG..0x1000 {
            for width in [1, 2, 3, 4, 8, 64] {
                let mut data = vec![0x5a; width];
                attacker.transport.read(offset, &mut data);
                let at = usize::try_from(offset - register::CONFIG).unwrap();
                let known = before.iter().skip(at).chain(std::iter::repeat(&0));
                assert!(
                    data.iter().eq(known.take(width)),
                    "{name}: {width} at {offset:#x}"
                );
                // The one field that the driver may write: the balloon's `actual`.
                if (name, offset, width) != ("balloon", register::CONFIG + 4, 4) {
                    attacker.transport.write(offset, &vec![0xa5; width]);
                }
            }
        }
        let mut after = [0; 64];
        attacker.transport.read(register::CONFIG, &mut after);
        assert_eq!(before, after, "{name}");
        attacker.assert_unaffected(name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_balloon_that_lies_about_its_size_keeps_nobody_waiting() {
    let (mut attacker, balloon) = Attacker::balloon();
    attacker.up(F_VERSION_1, 2);
    attacker.transport.write(register::CONFIG + 4, &[0xff; 4]);
    assert_eq!(balloon.actual(), u32::MAX / 256);
    let missed = balloon.resize(8, Duration::from_secs(5)).await;
    assert!(missed.is_err(), "it never said 8");
    // The size that the guest reported becomes the target that it is shown.
    attacker.run();
    let mut target = [0; 4];
    attacker.transport.read(register::CONFIG, &mut target);
    assert_eq!(target, [0xff; 4]);
    attacker.assert_unaffected("a size of 16 TiB");
}
